"""Ranks wait for each other, and can be called away."""

import threading
import time
from pathlib import Path

import pytest
from text_generation_server.meeting import meet, part


def meet_in_threads(rendezvous: str, size: int, delays: list[float]) -> list[bool]:
    met = [False] * size

    def come(rank: int) -> None:
        time.sleep(delays[rank])
        met[rank] = meet(rendezvous, rank, size, 10, lambda: True)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return met


@pytest.mark.parametrize("delays", [[0, 0, 0], [0.1, 0, 0.05], [0, 0.2, 0.1]], ids=str)
def test_all_ranks_meet_in_whatever_order_they_come(tmp_path, delays):
    assert meet_in_threads(str(tmp_path / "epoch-1"), 3, delays) == [True] * 3


def test_one_rank_waits_for_nobody_and_leaves_no_sign(tmp_path):
    assert meet(str(tmp_path / "epoch-1"), 0, 1, 0, lambda: False)
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_is_called_away_says_so_and_takes_its_sign_with_it(tmp_path):
    started = time.monotonic()
    assert not meet(str(tmp_path / "epoch-1"), 0, 2, 60, lambda: time.monotonic() - started < 0.05)
    assert time.monotonic() - started < 5
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_does_not_come_is_named(tmp_path):
    with pytest.raises(TimeoutError, match=r"ranks \[1, 2\] did not join within 0 s"):
        meet(str(tmp_path / "epoch-1"), 0, 3, 0.02, lambda: True)


def test_signs_of_another_epoch_count_for_nothing(tmp_path):
    meet_in_threads(str(tmp_path / "epoch-1"), 2, [0, 0])
    with pytest.raises(TimeoutError):
        meet(str(tmp_path / "epoch-2"), 0, 2, 0.02, lambda: True)


def test_ranks_that_have_met_leave_nothing_behind(tmp_path: Path):
    meet_in_threads(str(tmp_path / "epoch-1"), 2, [0, 0])
    for rank in range(2):
        part(str(tmp_path / "epoch-1"), rank)
    assert list(tmp_path.iterdir()) == []
