"""Ranks as real processes: what they compute together, and what happens when one of them is not there."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import collectives_rank
import numpy as np
import pytest
import torch
from collectives_rank import part
from text_generation_server.distributed import Group
from text_generation_server.faults import Faults

# Each rank is forked from a process that has imported torch and done nothing yet.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["text_generation_server.distributed"])


class Ranks:
    """Processes that do what they are told, one JSON message each way."""

    def __init__(self, size: int, folder: Path, **options: Any) -> None:
        self.folder, self.epoch = folder, 0
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(
                target=collectives_rank.serve, args=(rank, size, theirs), kwargs=options, daemon=True
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def tell(self, rank: int, command: str, **arguments: Any) -> None:
        self.pipes[rank].send_bytes(json.dumps({"command": command, **arguments}).encode())

    def hear(self, rank: int) -> Any:
        assert self.pipes[rank].poll(60), f"rank {rank} does not answer"
        return json.loads(self.pipes[rank].recv_bytes())

    def all(self, command: str, **arguments: Any) -> list[Any]:
        for rank in range(len(self.processes)):
            self.tell(rank, command, **arguments)
        return [self.hear(rank) for rank in range(len(self.processes))]

    def form(self) -> None:
        self.epoch += 1
        answers = self.all("form", rendezvous=str(self.folder / f"rendezvous-{self.epoch}"))
        assert answers == ["formed"] * len(self.processes)

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


@contextmanager
def ranks(size: int, folder: Path, **options: Any) -> Iterator[Ranks]:
    group = Ranks(size, folder, **options)
    try:
        yield group
    finally:
        group.end()


def sum_in_rank_order(size: int, shape: list[int], dtype: str) -> torch.Tensor:
    """By numpy, in float32, rounded once."""
    total = np.zeros(shape, np.float32)
    for rank in range(size):
        total = total + part(rank, shape, dtype).float().numpy()
    return torch.from_numpy(total).to(getattr(torch, dtype))


SHAPES = [[1, 1], [3, 7], [32, 256], [700, 1000]]  # the last one is larger than a slot


@pytest.mark.parametrize("transport", ["shared memory", "gloo"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_rank_gets_the_sum_and_the_parts_of_all(size: int, transport: str, tmp_path: Path) -> None:
    with ranks(size, tmp_path, gloo=transport == "gloo") as group:
        group.form()
        assert group.all("transport") == ["none" if size == 1 else transport] * size
        for dtype in ("float32", "bfloat16"):
            for shape in SHAPES:
                parts = [part(rank, shape, dtype) for rank in range(size)]
                expected = {
                    "all_reduce": [sum_in_rank_order(size, shape, dtype)] * size,
                    "all_gather": [torch.cat(parts, 0)] * size,
                    "gather_to_first": [torch.cat(parts, -1), *[None] * (size - 1)],
                    "broadcast": [parts[0]] * size,
                }
                for operation, tensors in expected.items():
                    out = tmp_path / operation
                    group.all("compute", operation=operation, shape=shape, dtype=dtype, out=str(out))
                    for rank, tensor in enumerate(tensors):
                        expected_bytes = b"" if tensor is None else tensor.view(torch.uint8).numpy().tobytes()
                        assert Path(f"{out}-{rank}").read_bytes() == expected_bytes, (operation, dtype, shape, rank)


class Elsewhere:
    """A tensor on a device that is not this machine's."""

    device = torch.device("meta")

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def cpu(self) -> torch.Tensor:
        return self.x


class Echo:
    """The transport to a peer that gives what this rank gives."""

    def gather(self, x: torch.Tensor, receives: bool, contributed: Any) -> list[torch.Tensor]:
        return [x, x.clone()]

    def most_elements(self, dtype: torch.dtype) -> int:
        return 1 << 20


def test_what_lies_on_a_device_is_added_on_the_host_and_returns_there() -> None:
    group, x = Group(0, 2, Faults(None, 0)), torch.tensor([1.5, -2.0]).bfloat16()
    transport: Any = Echo()
    group._transport = transport
    elsewhere: Any = Elsewhere(x)
    results = (group.all_reduce(elsewhere), group.all_gather(elsewhere), group.gather_to_first(elsewhere))
    assert x.tolist() == [3.0, -4.0]
    assert [(r.device.type, len(r)) for r in results if r is not None] == [("meta", 2), ("meta", 4), ("meta", 4)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_has_the_same_bits_alone_and_among_others(dtype: str, tmp_path: Path) -> None:
    with ranks(3, tmp_path) as group:
        group.form()
        assert all(group.all("compare_rows", shape=[700, 1000], dtype=dtype, rows=[0, 1, 261, 262, 263, 524, 699]))


def test_operations_of_all_kinds_follow_each_other_at_any_pace(tmp_path: Path) -> None:
    # Ranks that need not receive run ahead of the first; its buffers must not be overwritten.
    with ranks(3, tmp_path) as group:
        group.form()
        assert group.all("mix", count=400) == [400] * 3


@pytest.mark.parametrize("action", ["kill", "exit"])
@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_that_dies_inside_an_operation_releases_the_others_at_once(
    action: str, victim: int, tmp_path: Path
) -> None:
    with ranks(3, tmp_path) as group:
        group.form()
        group.tell(victim, "fault", action=action)
        group.hear(victim)
        for rank in range(3):
            group.tell(rank, "reduce_until_error")
        for rank in {0, 1, 2} - {victim}:
            answer = group.hear(rank)
            assert "PeerLost" in answer["error"]
            assert f"rank {victim} died" in answer["error"]
            assert answer["ended"] - answer["last"] < 0.5


def test_a_rank_that_leaves_releases_the_others_and_they_form_again_twenty_times(tmp_path: Path) -> None:
    with ranks(3, tmp_path) as group:
        for epoch in range(20):
            group.form()
            leaver = epoch % 3
            for rank in {0, 1, 2} - {leaver}:
                group.tell(rank, "reduce_until_error")
            group.tell(leaver, "close")
            group.hear(leaver)
            closed = time.time()
            for rank in {0, 1, 2} - {leaver}:
                answer = group.hear(rank)
                assert f"rank {leaver} left" in answer["error"]
                assert answer["ended"] - closed < 0.5
        group.form()
        held = group.all("descriptors")
        for _ in range(3):
            group.form()
        assert group.all("descriptors") == held


def test_a_stopped_rank_is_a_delay(tmp_path: Path) -> None:
    with ranks(2, tmp_path) as group:
        group.form()
        group.tell(1, "fault", action="stop")
        group.hear(1)
        for rank in range(2):
            group.tell(rank, "reduce", count=3)
        process = group.processes[1].pid
        deadline = time.monotonic() + 10
        while Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "T":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(1)
        os.kill(process, signal.SIGCONT)
        assert [group.hear(rank) for rank in range(2)] == [3, 3]


def test_a_wait_ends_at_the_time_limit(tmp_path: Path) -> None:
    with ranks(2, tmp_path, timeout_s=0.3) as group:
        group.form()
        group.tell(0, "reduce_until_error")
        assert "waited 0 s for rank 1" in group.hear(0)["error"]


def test_three_ranks_make_do_with_one_core(tmp_path: Path) -> None:
    with ranks(3, tmp_path, core=min(os.sched_getaffinity(0))) as group:
        group.form()
        assert group.all("reduce", count=200) == [200] * 3


def test_a_rank_without_shared_memory_takes_all_to_gloo(tmp_path: Path) -> None:
    with ranks(3, tmp_path, without_memory_on=1) as group:
        group.form()
        assert group.all("transport") == ["gloo"] * 3
        assert group.all("reduce", count=3) == [3] * 3


def test_the_memory_has_no_name_that_could_be_left_behind(tmp_path: Path) -> None:
    with ranks(2, tmp_path) as group:
        group.form()
        for process in group.processes:
            maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
            shared = [line.split(maxsplit=5)[5] for line in maps if line.split()[1] == "rw-s"]
            assert shared == ["/memfd:text-generation-ranks (deleted)"]
        assert not [name for name in os.listdir("/dev/shm") if "text-generation" in name]
        group.all("close")
        for process in group.processes:
            assert "memfd" not in Path(f"/proc/{process.pid}/maps").read_text()
