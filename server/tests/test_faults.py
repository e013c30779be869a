"""Faults on demand strike the rank that is named, when it is time, and once."""

from pathlib import Path

import pytest
from text_generation_server.faults import Faults


def faults(path: Path, line: str, rank: int = 0) -> Faults:
    path.write_text(line)
    faults = Faults(path, rank)
    faults.look()
    return faults


def test_a_fault_strikes_at_the_nth_time_and_then_no_more(tmp_path):
    armed = faults(tmp_path / "fault", "rank=0 point=sample count=3 action=nan")
    assert [armed.reach("sample") for _ in range(5)] == [False, False, True, False, False]


def test_other_points_do_not_count(tmp_path):
    armed = faults(tmp_path / "fault", "rank=0 point=sample count=1 action=nan")
    assert [armed.reach("step"), armed.reach("all_reduce"), armed.reach("sample")] == [False, False, True]


def test_a_fault_is_taken_out_of_the_file_before_it_strikes(tmp_path):
    faults(tmp_path / "fault", "rank=0 point=sample count=1 action=nan")
    assert not (tmp_path / "fault").exists()


def test_a_fault_for_several_times_stays_in_the_file_until_the_last(tmp_path):
    path = tmp_path / "fault"
    path.write_text("rank=0 point=load count=1 action=raise times=2")
    for left in (True, False):
        starting = Faults(path, 0)
        starting.look()
        assert path.exists() == left
        with pytest.raises(RuntimeError, match="fault on demand at load"):
            starting.reach("load")


def test_a_fault_of_another_rank_is_left_alone(tmp_path):
    armed = faults(tmp_path / "fault", "rank=1 point=sample count=1 action=nan")
    assert (tmp_path / "fault").exists()
    assert not armed.reach("sample")


def test_a_file_that_is_just_being_written_is_looked_at_later(tmp_path):
    early = faults(tmp_path / "fault", "")
    (tmp_path / "fault").write_text("rank=0 point=sample count=1 action=nan")
    early.look()
    assert early.reach("sample")


@pytest.mark.parametrize("path", [None, Path("/nonexistent/fault")])
def test_without_a_file_nothing_happens(path):
    calm = Faults(path, 0)
    calm.look()
    assert not calm.reach("step")


@pytest.mark.parametrize(
    "line",
    [
        "rank=0 point=moon count=1 action=nan",
        "rank=0 point=step count=1 action=dance",
        "rank=0 point=step count=0 action=nan",
        "rank=0 point=step action=nan",
        "rank=zero point=step count=1 action=nan",
        "kill it",
    ],
)
def test_a_line_that_is_not_understood_is_an_error_that_says_what_is(tmp_path, line):
    with pytest.raises(ValueError, match=r"fault: expected rank=R point=.* action=.*, found"):
        faults(tmp_path / "fault", line)
