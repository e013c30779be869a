"""Memory that the ranks of one epoch share, and how they take turns in it. Knows tensors, but no arithmetic.

A line for each rank holds the number of collectives that it has contributed to, and whether it has left. Behind the
lines are two buffers, used in turn, with a slot for each rank. A rank writes its slot, then its number; the others
look at the number for a moment, then sleep on it (futex), then read. Whoever contributes to collective n has finished
reading n - 1, so a buffer is free again as soon as everybody has contributed to the collective after it.

Correct where stores are seen in the order in which they were made (x86-64). The memory has no name: it is gone with the
last process that maps it, however that ends, and ranks of another epoch cannot reach it.
"""

import ctypes
import mmap
import os
import platform
import select
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Protocol, Self

import torch
from loguru import logger
from torch import Tensor

SLOT_BYTES = 1 << 20
PAGE_BYTES = 4096
MOST_SHAPES = 1024
# 64-bit words from one rank's line to the next. Processors fetch pairs of 64-byte cache lines.
LINE_WORDS = 16
NUMBER, LEFT, MARK = 0, 1, 2

# Looking that long costs about as much as to sleep and be woken. The core is offered to others after each look.
SPIN_S = 50e-6
# How long a rank sleeps before it looks whether its peers live.
NAP_S = 5e-3
SYS_FUTEX, FUTEX_WAIT, FUTEX_WAKE = 202, 0, 1  # of x86-64


class PeerLost(RuntimeError):
    """A rank died, left the epoch, or did not come in time: the group cannot go on."""


class Store(Protocol):
    """Where the ranks of one epoch leave each other notes. `get` waits, and raises if nothing comes."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...


class _TimeSpec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_int64), ("nanoseconds", ctypes.c_int64))


class Futex:
    """Sleeping on 64-bit words of shared memory, of which the kernel sees the lower half."""

    def __init__(self, address: int) -> None:
        self._address = address
        self._syscall = ctypes.CDLL(None).syscall
        pointer, integer = ctypes.c_void_p, ctypes.c_long
        self._syscall.argtypes = (integer, pointer, integer, ctypes.c_uint32, pointer, pointer, integer)
        self._syscall.restype = integer

    def wait(self, word: int, seen: int, timeout_s: float) -> None:
        """Sleeps until woken, unless the word is no longer what was seen. May return early."""
        timeout = _TimeSpec(0, int(timeout_s * 1e9))
        self._syscall(
            SYS_FUTEX, self._address + 8 * word, FUTEX_WAIT, seen & 0xFFFFFFFF, ctypes.byref(timeout), None, 0
        )

    def wake(self, word: int) -> None:
        """Wakes all who sleep on the word."""
        self._syscall(SYS_FUTEX, self._address + 8 * word, FUTEX_WAKE, 0x7FFFFFFF, None, None, 0)


# What native code calls: with a rank and a number of collectives; with nothing.
_WAIT = ctypes.CFUNCTYPE(None, ctypes.c_int32, ctypes.c_uint64)
_CONTRIBUTED = ctypes.CFUNCTYPE(None)


class _Exchange(ctypes.Structure):
    """`Exchange` of native/exchange.h."""

    _fields_ = (
        ("words", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("line_words", ctypes.c_int64),
        ("slot_bytes", ctypes.c_int64),
        ("number", ctypes.c_uint64),
        ("wait", _WAIT),
        ("contributed", _CONTRIBUTED),
        ("rank", ctypes.c_int32),
        ("size", ctypes.c_int32),
        ("waits", ctypes.c_int32),
        ("goes_on", ctypes.c_int32),
    )


class SegmentExchange:
    """How native code takes part in the collectives of a segment. Implements `kernels.interface.Exchange`."""

    def __init__(self, segment: "Segment", address: int) -> None:
        """address: of the segment's memory."""
        self._failure: Exception | None = None
        self.fields = _Exchange(
            words=address, slots=address + _header_bytes(segment.size), line_words=LINE_WORDS, slot_bytes=SLOT_BYTES,
            wait=_WAIT(lambda rank, number: self._tell(lambda: segment.wait(rank, number))),
            rank=segment.rank, size=segment.size,
        )  # fmt: skip

    @property
    def address(self) -> int:
        return ctypes.addressof(self.fields)

    def failure(self) -> Exception:
        return self._failure or RuntimeError(f"rank {self.fields.rank} could not end a sum over ranks; see above")

    def tell_when_contributed(self, contributed: Callable[[], object] | None) -> None:
        """contributed: called in each collective when this rank has given its part, and not yet received."""
        if contributed is not None:
            self.fields.contributed = _CONTRIBUTED(lambda: self._tell(contributed))
        elif self.fields.contributed:
            self.fields.contributed = _CONTRIBUTED()

    def close(self) -> None:
        """To be used no more: lets go of the segment."""
        self.fields.wait, self.fields.contributed = _WAIT(), _CONTRIBUTED()

    def _tell(self, function: Callable[[], object]) -> None:
        """Exceptions do not go through native code: what is not expected is printed, and ends it too."""
        try:
            function()
        except (RuntimeError, OSError) as error:
            self._failure = error
        else:
            self.fields.goes_on = 1


class Segment:
    """One rank's view of the shared memory of an epoch."""

    def __init__(self, memory: mmap.mmap, rank: int, peers: dict[int, int], timeout: timedelta) -> None:
        """`peers`: a pidfd of each other rank, closed by this object. `timeout`: the longest that a wait may take."""
        self.rank, self.size = rank, len(peers) + 1
        self._words = memoryview(memory).cast("Q")
        self._bytes = torch.frombuffer(memory, dtype=torch.uint8)
        self._futex = Futex(self._bytes.data_ptr())
        self._slots: dict[tuple[torch.dtype, torch.Size], list[list[Tensor]]] = {}
        self._peers = peers
        self._poll = select.poll()
        for descriptor in peers.values():
            self._poll.register(descriptor, select.POLLIN)
        self._timeout_s = timeout.total_seconds()
        self._native = SegmentExchange(self, self._bytes.data_ptr())

    @classmethod
    def meet(cls, store: Store, rank: int, size: int, timeout: timedelta) -> Self | None:
        """Shares memory with all ranks that meet in `store`; None on every rank if it cannot be had on one of them."""
        store.set(f"process/{rank}", str(os.getpid()))
        peers: dict[int, int] = {}
        memory, problem = None, ""
        with ExitStack() as if_it_fails, ExitStack() as in_any_case:
            try:
                if rank == 0:
                    in_any_case.callback(os.close, _offer(store, size))
                memory = _map(store, size)
                for peer in {*range(size)} - {rank}:
                    peers[peer] = os.pidfd_open(int(store.get(f"process/{peer}")))
                    if_it_fails.callback(os.close, peers[peer])
            except (OSError, ValueError) as error:
                problem = f"rank {rank}: {error}"
            store.set(f"mapped/{rank}", problem)
            problems = [text for r in range(size) if (text := store.get(f"mapped/{r}").decode())]
            if not problems and memory is not None:
                if_it_fails.pop_all()
                return cls(memory, rank, peers, timeout)
        logger.warning("no shared memory between ranks, tensors go over TCP: {}", "; ".join(problems))
        return None

    def slot_elements(self, dtype: torch.dtype) -> int:
        """The most that a rank can contribute at once."""
        return SLOT_BYTES // dtype.itemsize

    def contribute(self, x: Tensor | None) -> None:
        """Begins a collective. x: at most a slot; None: this rank only takes part."""
        self._native.fields.number += 1
        for peer in self._peers:
            self.wait(peer, self._native.fields.number - 1)
        if x is not None:
            self._slots_like(x)[self.rank].copy_(x)
        self._words[self.rank * LINE_WORDS + NUMBER] = self._native.fields.number
        self._futex.wake(self.rank * LINE_WORDS + NUMBER)

    def exchange(self, contributed: Callable[[], object] | None) -> SegmentExchange:
        """For native code: sums with the bits of those over `take`. contributed: see `tell_when_contributed`."""
        self._native.tell_when_contributed(contributed)
        return self._native

    @property
    def native_waits(self) -> bool:
        """Whether native code can only go on when others have done their part. Read by any thread."""
        return bool(self._native.fields.waits)

    def take(self, rank: int, like: Tensor) -> Tensor:
        """What `rank` contributed, of the dtype and shape of `like`. Valid until the next `contribute`."""
        if rank != self.rank:
            self.wait(rank, self._native.fields.number)
        return self._slots_like(like)[rank]

    def close(self) -> None:
        """Leaves: whoever waits for this rank gets an error. The memory goes with the last one that uses it."""
        self._native.close()
        self._words[self.rank * LINE_WORDS + LEFT] = 1
        self._futex.wake(self.rank * LINE_WORDS + NUMBER)
        for pidfd in self._peers.values():
            os.close(pidfd)
        self._peers = {}

    def _slots_like(self, x: Tensor) -> list[Tensor]:
        """Every rank's slot in this collective's buffer."""
        # Making a view takes longer than an addition; decoding uses few shapes.
        slots = self._slots.get((x.dtype, x.shape))
        if slots is None:
            if len(self._slots) == MOST_SHAPES:
                self._slots.clear()
            raw = self._bytes[_header_bytes(self.size) :].view(2, self.size, SLOT_BYTES)
            raw = raw[..., : x.numel() * x.element_size()]
            slots = self._slots[x.dtype, x.shape] = [
                [slot.view(x.dtype).view(x.shape) for slot in half] for half in raw
            ]
        return slots[self._native.fields.number & 1]

    def wait(self, rank: int, number: int) -> None:
        """Returns once `rank` has contributed to collective `number`."""
        words, at = self._words, rank * LINE_WORDS + NUMBER
        if words[at] >= number:
            return
        began = time.monotonic()
        while time.monotonic() - began < SPIN_S:
            if words[at] >= number:
                return
            os.sched_yield()
        while (seen := words[at]) < number:
            self._check_peers(rank, time.monotonic() - began)
            self._futex.wait(at, seen, NAP_S)

    def _check_peers(self, rank: int, waited_s: float) -> None:
        """Raises if the wait for `rank` is in vain."""
        dead = {descriptor for descriptor, _ in self._poll.poll(0)}
        for peer, pidfd in self._peers.items():
            if pidfd in dead:
                raise PeerLost(f"rank {peer} died while rank {self.rank} waited for rank {rank}")
            if self._words[peer * LINE_WORDS + LEFT]:
                raise PeerLost(f"rank {peer} left the epoch while rank {self.rank} waited for rank {rank}")
        if waited_s > self._timeout_s:
            raise PeerLost(f"rank {self.rank} waited {waited_s:.0f} s for rank {rank}")


def is_supported() -> bool:
    """Whether the processor makes stores visible in order."""
    return platform.system() == "Linux" and platform.machine() in ("x86_64", "AMD64")


def _header_bytes(size: int) -> int:
    return -(-size * LINE_WORDS * 8 // PAGE_BYTES) * PAGE_BYTES


def _segment_bytes(size: int) -> int:
    return _header_bytes(size) + 2 * size * SLOT_BYTES


def _offer(store: Store, size: int) -> int:
    """Makes the memory and tells the others where it is. Returns its descriptor, which they open through /proc."""
    mark, descriptor = int.from_bytes(os.urandom(8), "little"), -1
    try:
        descriptor = os.memfd_create("text-generation-ranks")
        os.ftruncate(descriptor, _segment_bytes(size))
        os.pwrite(descriptor, mark.to_bytes(8, "little"), MARK * 8)
    finally:
        store.set("memory", f"{os.getpid()} {descriptor} {mark}")
    return descriptor


def _map(store: Store, size: int) -> mmap.mmap:
    process, descriptor, mark = map(int, store.get("memory").decode().split())
    path = Path(f"/proc/{process}/fd/{descriptor}")
    opened = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        memory = mmap.mmap(opened, _segment_bytes(size))
    finally:
        os.close(opened)
    # Ranks that do not see the same processes would open something else.
    if memoryview(memory).cast("Q")[MARK] != mark:
        raise ValueError(f"{path} is not the memory of rank 0")
    return memory
