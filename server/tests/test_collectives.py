"""Ranks as real processes: what they compute together, and what happens when one of them is not there."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

RANK = Path(__file__).with_name("collectives_rank.py")


class Ranks:
    """Processes that do what they are told, one line of JSON each way."""

    def __init__(self, size: int, folder: Path, *flags: str) -> None:
        self.folder, self.epoch = folder, 0
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(RANK), str(rank), str(size), *flags],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            for rank in range(size)
        ]

    def tell(self, rank: int, command: str, **arguments: Any) -> None:
        pipe = self.processes[rank].stdin
        assert pipe is not None
        pipe.write(json.dumps({"command": command, **arguments}) + "\n")
        pipe.flush()

    def hear(self, rank: int) -> Any:
        pipe = self.processes[rank].stdout
        assert pipe is not None
        return json.loads(pipe.readline())

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
            process.communicate()


@contextmanager
def ranks(size: int, folder: Path, *flags: str) -> Iterator[Ranks]:
    group = Ranks(size, folder, *flags)
    try:
        yield group
    finally:
        group.end()


def part(rank: int, shape: list[int], dtype: str) -> torch.Tensor:
    """What a rank contributes: the same as in collectives_rank.py, by its own seed."""
    generator = torch.Generator().manual_seed(rank)
    return (torch.randn(shape, generator=generator) * 3).to(getattr(torch, dtype))


def sum_in_rank_order(size: int, shape: list[int], dtype: str) -> torch.Tensor:
    """By numpy, in float32, rounded once."""
    total = np.zeros(shape, np.float32)
    for rank in range(size):
        total = total + part(rank, shape, dtype).float().numpy()
    return torch.from_numpy(total).to(getattr(torch, dtype))


SHAPES = [[1, 1], [3, 7], [32, 256], [700, 1000]]  # the last one is larger than a slot


@pytest.mark.parametrize("flags", [(), ("--gloo",)], ids=["shared memory", "gloo"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_rank_gets_the_sum_and_the_parts_of_all(size: int, flags: tuple[str, ...], tmp_path: Path) -> None:
    with ranks(size, tmp_path, *flags) as group:
        group.form()
        assert group.all("transport") == ["none" if size == 1 else "gloo" if flags else "shared memory"] * size
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
                        got = torch.load(f"{out}-{rank}")
                        same = got is None if tensor is None else torch.equal(got, tensor)
                        assert same, (operation, dtype, shape, rank)


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
    with ranks(2, tmp_path, "--timeout", "0.3") as group:
        group.form()
        group.tell(0, "reduce_until_error")
        assert "waited 0 s for rank 1" in group.hear(0)["error"]


def test_a_group_is_formed_on_one_core_too(tmp_path: Path) -> None:
    core = str(min(os.sched_getaffinity(0)))
    with ranks(3, tmp_path, "--core", core) as group:
        group.form()
        assert group.all("reduce", count=200) == [200] * 3


def test_a_rank_without_shared_memory_takes_all_to_gloo(tmp_path: Path) -> None:
    with ranks(3, tmp_path, "--without-memory-on", "1") as group:
        group.form()
        assert group.all("transport") == ["gloo"] * 3
        assert group.all("reduce", count=3) == [3] * 3


def test_nothing_is_left_behind_when_all_are_killed(tmp_path: Path) -> None:
    before = set(os.listdir("/dev/shm"))
    with ranks(2, tmp_path) as group:
        group.form()
        group.all("reduce", count=3)
        during = set(os.listdir("/dev/shm"))
    assert not {name for name in (during | set(os.listdir("/dev/shm"))) - before if "text-generation" in name}
