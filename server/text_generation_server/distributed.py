"""The ranks of one epoch: a gloo group that forms by Join and ends with its stream, and what it can compute."""

from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from .faults import Faults

# A peer that dies closes its connections, and one that hangs is killed by the launcher; this is the last resort.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)


class Group:
    """Implements `loading.Collectives`. Lives as long as the model; the connections behind it are new in each epoch."""

    def __init__(self, rank: int, size: int, faults: Faults) -> None:
        self.rank, self.size = rank, size
        self._faults = faults
        self._is_formed = size == 1

    def form(self, rendezvous: str, timeout_s: float) -> None:
        """Meets the other ranks through a file that does not exist yet. Raises if they do not come in time."""
        if self.size == 1:
            return
        self.close()
        store = dist.FileStore(rendezvous, self.size)
        timeout = timedelta(seconds=timeout_s)
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.size, timeout=timeout)
        dist.barrier()
        # Only meeting is bounded that tightly: a step may take long.
        dist.distributed_c10d._set_pg_timeout(COLLECTIVE_TIMEOUT, dist.group.WORLD)  # type: ignore[attr-defined]
        self._is_formed = True

    def close(self) -> None:
        """Leaves the group. Whoever waits for this rank in a collective gets an error."""
        if self.size > 1 and dist.is_initialized():
            self._is_formed = False
            dist.destroy_process_group()

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, added in rank order. May overwrite and return `x`."""
        if self.size == 1:
            return x
        if self.size == 2:
            # A sum of two is the same in either order.
            self._wait(lambda: dist.all_reduce(x, async_op=True))
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self._wait(lambda: dist.all_gather(parts, x, async_op=True))
        total = parts[0].float()
        for part in parts[1:]:
            total += part
        return total.to(x.dtype)

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        """The tensors of all ranks concatenated along `dim`, on every rank."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self._wait(lambda: dist.all_gather(parts, x.contiguous(), async_op=True))
        return torch.cat(parts, dim)

    def gather_to_first(self, x: Tensor) -> Tensor | None:
        """The tensors of all ranks concatenated along the last axis, on rank 0; None on the others."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else None
        self._wait(lambda: dist.gather(x.contiguous(), parts, dst=0, async_op=True))
        return torch.cat(parts, -1) if parts is not None else None

    def broadcast(self, x: Tensor) -> None:
        """Overwrites `x` with that of rank 0."""
        if self.size > 1:
            self._wait(lambda: dist.broadcast(x, src=0, async_op=True))

    def _wait(self, start: Callable[[], "dist.Work | None"]) -> None:
        if not self._is_formed:
            raise RuntimeError("the group of this epoch is gone")
        work = start()
        # Between contributing and receiving: the worst moment to die.
        self._faults.reach("all_reduce")
        assert work is not None
        work.wait()
