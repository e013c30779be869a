"""One rank of test_collectives.py: does what it is told through a pipe, and answers."""

import json
import os
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from text_generation_server import distributed, shared_memory
from text_generation_server.distributed import Group
from text_generation_server.faults import Fault, Faults


def part(rank: int, shape: list[int], dtype: str) -> torch.Tensor:
    """What a rank contributes: its own random numbers."""
    generator = torch.Generator().manual_seed(rank)
    return (torch.randn(shape, generator=generator) * 3).to(getattr(torch, dtype))


class Rank:
    """Every method is a command."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.faults = rank, Faults(None, rank)
        self.group = Group(rank, size, self.faults)

    def form(self, rendezvous: str) -> str:
        self.group.form(rendezvous, 30)
        return "formed"

    def close(self) -> None:
        self.group.close()

    def transport(self) -> str:
        names = {"NoneType": "none", "SharedMemory": "shared memory", "Gloo": "gloo"}
        return names[type(self.group._transport).__name__]

    def compute(self, operation: str, shape: list[int], dtype: str, out: str) -> None:
        x = part(self.rank, shape, dtype)
        arguments = (0,) if operation == "all_gather" else ()
        result = getattr(self.group, operation)(x, *arguments)
        tensor = x if operation == "broadcast" else result
        Path(f"{out}-{self.rank}").write_bytes(b"" if tensor is None else tensor.view(torch.uint8).numpy().tobytes())

    def compare_rows(self, shape: list[int], dtype: str, rows: list[int]) -> bool:
        x = part(self.rank, shape, dtype)
        whole = self.group.all_reduce(x.clone())
        same = [torch.equal(self.group.all_reduce(x[row : row + 1].clone())[0], whole[row]) for row in rows]
        return all(same)

    def mix(self, count: int) -> int:
        """Operations in an order that all ranks draw alike; returns how many had the expected result."""
        generator, right = torch.Generator().manual_seed(1), 0
        pace = torch.Generator().manual_seed(self.rank)
        for step in range(count):
            kind, length = torch.randint(4, (), generator=generator).item(), 1 + step % 50
            if torch.rand((), generator=pace) < 0.1:
                time.sleep(0.001)
            x = torch.full((2, length), float(self.rank + step))
            all_values = torch.arange(self.group.size) + float(step)
            if kind == 0:
                right += bool((self.group.all_reduce(x) == all_values.sum()).all())
            elif kind == 1:
                right += torch.equal(self.group.all_gather(x), all_values.repeat_interleave(length).expand(2, -1))
            elif kind == 2:
                got = self.group.gather_to_first(x)
                wanted = all_values.repeat_interleave(length).expand(2, -1)
                right += got is None if self.rank else got is not None and torch.equal(got, wanted)
            else:
                self.group.broadcast(x)
                right += bool((x == step).all())
        return right

    def fault(self, action: str) -> None:
        self.faults._armed = Fault("all_reduce", 50, action)

    def reduce(self, count: int) -> int:
        for _ in range(count):
            if self.faults._armed is not None:
                self.faults._armed.remaining = 1
            assert self.group.all_reduce(torch.ones(100))[0] == self.group.size
        return count

    def reduce_until_error(self) -> dict[str, Any]:
        last = time.time()
        while True:
            try:
                self.group.all_reduce(torch.ones(100))
                last = time.time()
            except RuntimeError as error:
                return {"error": f"{type(error).__name__}: {error}", "last": last, "ended": time.time()}

    def descriptors(self) -> int:
        return len(os.listdir("/proc/self/fd"))


def refuse(*_: object) -> None:
    raise OSError("no memory on demand")


def serve(
    rank: int,
    size: int,
    pipe: Connection,
    gloo: bool = False,
    timeout_s: float = 60,
    core: int | None = None,
    without_memory_on: int | None = None,
) -> None:
    """Works until the pipe is closed."""
    torch.set_num_threads(1)
    distributed.COLLECTIVE_TIMEOUT = timedelta(seconds=timeout_s)
    if gloo:
        shared_memory.is_supported = lambda: False
    if core is not None:
        os.sched_setaffinity(0, {core})
    if without_memory_on == rank:
        shared_memory._map = refuse
    member = Rank(rank, size)
    while True:
        arguments = json.loads(pipe.recv_bytes())
        answer = getattr(member, arguments.pop("command"))(**arguments)
        pipe.send_bytes(json.dumps(answer).encode())
