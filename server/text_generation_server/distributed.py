"""The ranks of one epoch: a group that forms by Join and ends with its stream, and what it can compute.

Ranks meet over gloo. Tensors go through shared memory; where there is none, over gloo too. Those that lie on a GPU go
through the host's memory as well: what is added, and in which order, is then the same on every device, and a peer that
is gone is noticed in the same way.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from . import shared_memory
from .faults import Faults
from .shared_memory import Segment, SegmentExchange

# A peer that dies or leaves is noticed, and one that hangs is killed by the launcher; this is the last resort.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)


class Transport(Protocol):
    """How tensors get from rank to rank. x is contiguous, and of the same shape and dtype on every rank."""

    def gather(self, x: Tensor, receives: bool, contributed: Callable[[], object]) -> list[Tensor]:
        """x of every rank, for the ranks that receive (rank 0 always does); valid until the next operation.

        `contributed` is called when this rank has given its part, and not yet received.
        """
        ...

    def broadcast(self, x: Tensor, contributed: Callable[[], object]) -> None:
        """Overwrites x with that of rank 0."""
        ...

    def most_elements(self, dtype: torch.dtype) -> int:
        """How large x may be."""
        ...

    def exchange(self, contributed: Callable[[], object] | None) -> SegmentExchange | None:
        """For native code, which calls `contributed` as others do; None: there is no way for it."""
        ...

    @property
    def native_waits(self) -> bool:
        """Whether native code can only go on when others have done their part. Read by any thread."""
        ...

    def close(self) -> None:
        """Releases whoever waits for this rank."""
        ...


class SharedMemory:
    """Through a segment of shared memory."""

    def __init__(self, segment: Segment) -> None:
        self._segment = segment

    def gather(self, x: Tensor, receives: bool, contributed: Callable[[], object]) -> list[Tensor]:
        self._segment.contribute(x)
        contributed()
        return [self._segment.take(rank, x) for rank in range(self._segment.size)] if receives else []

    def broadcast(self, x: Tensor, contributed: Callable[[], object]) -> None:
        is_first = self._segment.rank == 0
        self._segment.contribute(x if is_first else None)
        contributed()
        if not is_first:
            x.copy_(self._segment.take(0, x))

    def most_elements(self, dtype: torch.dtype) -> int:
        return self._segment.slot_elements(dtype)

    def exchange(self, contributed: Callable[[], object] | None) -> SegmentExchange | None:
        return self._segment.exchange(contributed)

    @property
    def native_waits(self) -> bool:
        return self._segment.native_waits

    def close(self) -> None:
        self._segment.close()


class Gloo:
    """Over TCP, by torch's default process group."""

    def gather(self, x: Tensor, receives: bool, contributed: Callable[[], object]) -> list[Tensor]:
        # Those who need not receive do not know whether the others do: rank 0 alone never has to ask.
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        self._wait(dist.all_gather(parts, x, async_op=True), contributed)
        return parts if receives else []

    def broadcast(self, x: Tensor, contributed: Callable[[], object]) -> None:
        self._wait(dist.broadcast(x, src=0, async_op=True), contributed)

    def most_elements(self, dtype: torch.dtype) -> int:
        return 1 << 62

    def exchange(self, contributed: Callable[[], object] | None) -> SegmentExchange | None:
        return None

    @property
    def native_waits(self) -> bool:
        return False

    def close(self) -> None:
        pass

    def _wait(self, work: "dist.Work | None", contributed: Callable[[], object]) -> None:
        contributed()
        assert work is not None
        work.wait()


class Group:
    """Implements `loading.Collectives`. Lives as long as the model; what is behind it is new in each epoch."""

    def __init__(self, rank: int, size: int, faults: Faults) -> None:
        self.rank, self.size = rank, size
        self._faults = faults
        self._transport: Transport | None = None
        self._waits = False

    @property
    def waits(self) -> bool:
        """Whether this rank can only go on when others have done their part. Read by any thread."""
        transport = self._transport
        return self._waits or (transport is not None and transport.native_waits)

    @waits.setter
    def waits(self, waits: bool) -> None:
        self._waits = waits

    def form(self, rendezvous: str, timeout_s: float) -> None:
        """Meets the other ranks through a file that does not exist yet. Raises if they do not come in time."""
        if self.size == 1:
            return
        self.close()
        timeout = timedelta(seconds=timeout_s)
        store = dist.FileStore(rendezvous, self.size)  # type: ignore[attr-defined]
        store.set_timeout(timeout)
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.size, timeout=timeout)
        segment = None
        if shared_memory.is_supported():
            segment = Segment.meet(store, self.rank, self.size, COLLECTIVE_TIMEOUT)
        self._transport = Gloo() if segment is None else SharedMemory(segment)
        # Every process answers here after it was opened by its id: so it was the rank, and not a successor of that id.
        dist.barrier()
        # Only meeting is bounded that tightly: a step may take long.
        dist.distributed_c10d._set_pg_timeout(COLLECTIVE_TIMEOUT, dist.group.WORLD)

    def close(self) -> None:
        """Leaves the group. Whoever waits for this rank in a collective gets an error."""
        if self._transport is not None:
            self._transport.close()
            self._transport = None
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, added in rank order in float32. May overwrite and return `x`."""
        if self.size == 1:
            return x
        here = x.cpu().contiguous()
        for piece in self._pieces(here):
            add_up(self._exchange(piece, receives=True), piece)
        return here.to(x.device)

    def exchange(self) -> SegmentExchange | None:
        """The same for native code; None: a group of one, or one that does not share memory. For one step."""
        if self.size == 1:
            return None
        return self._formed.exchange(self._reach_fault if self._faults.armed else None)

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        """The tensors of all ranks concatenated along `dim`, on every rank."""
        return x if self.size == 1 else torch.cat(self._gather(x.cpu(), receives=True), dim).to(x.device)

    def gather_to_first(self, x: Tensor) -> Tensor | None:
        """The tensors of all ranks concatenated along the last axis, on rank 0; None on the others."""
        if self.size == 1:
            return x
        parts = self._gather(x.cpu(), receives=self.rank == 0)
        return torch.cat(parts, -1).to(x.device) if parts else None

    def broadcast(self, x: Tensor) -> None:
        """Overwrites `x`, which is contiguous, with that of rank 0."""
        if self.size > 1:
            for piece in self._pieces(x):
                self._waits = True
                try:
                    self._formed.broadcast(piece, self._contributed)
                finally:
                    self._waits = False

    @property
    def _formed(self) -> Transport:
        if self._transport is None:
            raise RuntimeError("the group of this epoch is gone")
        return self._transport

    def _pieces(self, x: Tensor) -> tuple[Tensor, ...]:
        """Views of x that the transport can take."""
        most = self._formed.most_elements(x.dtype)
        return (x,) if x.numel() <= most else torch.split(x.view(-1), most)

    def _gather(self, x: Tensor, receives: bool) -> list[Tensor]:
        """`x` of every rank, of any size."""
        x = x.contiguous()
        pieces = self._pieces(x)
        if len(pieces) == 1:
            return self._exchange(x, receives)
        wholes = [torch.empty_like(x) for _ in range(self.size * receives)]
        begin = 0
        for piece in pieces:
            for whole, part in zip(wholes, self._exchange(piece, receives), strict=True):
                whole.view(-1)[begin : begin + len(piece)] = part
            begin += len(piece)
        return wholes

    def _exchange(self, x: Tensor, receives: bool) -> list[Tensor]:
        """One operation of the transport."""
        self._waits = True
        try:
            return self._formed.gather(x, receives, self._contributed)
        finally:
            self._waits = False

    def _contributed(self) -> None:
        # Between contributing and receiving: the worst moment to die. Who hangs here waits for nobody.
        self._waits = False
        self._reach_fault()
        self._waits = True

    def _reach_fault(self) -> None:
        self._faults.reach("all_reduce")


def add_up(parts: list[Tensor], out: Tensor) -> None:
    """The sum in the order of `parts`, in float32, rounded once."""
    if out.dtype == torch.float32:
        torch.add(parts[0], parts[1], out=out)
        for part in parts[2:]:
            out += part
    else:
        total = parts[0].float()
        for part in parts[1:]:
            total += part
        out.copy_(total)
