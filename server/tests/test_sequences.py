"""The table of sequences: what it refuses, what it counts, and what ranks compare."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from text_generation_server.sampling.params import SamplingParams
from text_generation_server.sequences import ProtocolError, RowFault, RowState, SequenceTable

VOCAB = 50


def table(num_rows: int = 4, max_positions: int = 64, block_size: int = 16) -> SequenceTable:
    return SequenceTable(num_rows, max_positions, block_size, VOCAB)


def admitted(row: int = 0, tokens=(5, 6, 7), *, blocks=(3, 9)) -> SequenceTable:
    held = table()
    held.admit(row, 77, 1, tokens, len(tokens), 0)
    held.add_blocks(row, blocks)
    return held


ADMISSIONS = [
    ({"row": 4}, "row 4 is not free, or not below 4"),
    ({"row": -1}, "row -1 is not free"),
    ({"tokens": []}, "0 ids"),
    ({"num_prompt": 0}, "0 of them the prompt"),
    ({"num_prompt": 4}, "4 of them the prompt"),
    ({"tokens": [1] * 65}, "65 ids"),
    ({"tokens": [1, VOCAB, 2]}, f"id {VOCAB} is not below the vocabulary's {VOCAB}"),
    ({"cached_len": 8}, "8 of 3 positions cannot be cached"),
    ({"tokens": [1] * 32, "num_prompt": 32, "cached_len": 17}, "17 of 32 positions cannot be cached"),
    ({"tokens": [1] * 32, "num_prompt": 32, "cached_len": 32}, "32 of 32 positions cannot be cached"),
]


@pytest.mark.parametrize(("wrong", "message"), ADMISSIONS, ids=str)
def test_an_admission_that_does_not_fit_is_refused(wrong, message):
    good = {"row": 0, "sequence": 1, "incarnation": 1, "tokens": [5, 6, 7], "num_prompt": 3, "cached_len": 0}
    held = table()
    with pytest.raises(ProtocolError, match=message):
        held.admit(**(good | wrong))
    assert held.num_held == 0


def test_a_held_row_is_refused_until_its_release():
    held = admitted()
    with pytest.raises(ProtocolError, match="row 0 is not free"):
        held.admit(0, 78, 1, [1], 1, 0)
    held.release(0)
    held.admit(0, 78, 1, [1], 1, 0)
    assert held.log(0).tolist() == [1]


def test_a_release_forgets_everything_of_the_row():
    held = admitted()
    held.states[0], held.faults[0] = RowState(SamplingParams()), RowFault("NUMERICAL", "broken")
    held.release(0)
    held.admit(0, 78, 1, [1], 1, 0)
    assert (held.num_held, held.num_blocks[0], held.computed[0]) == (1, 0, 0)
    assert (held.states, held.faults) == ({}, {})


@pytest.mark.parametrize("row", [1, 4, -1])
def test_a_row_that_is_not_held_is_neither_released_nor_worked_on(row):
    held = admitted()
    with pytest.raises(ProtocolError, match=f"row {row} is released but not held"):
        held.release(row)
    with pytest.raises(ProtocolError, match=f"row {row} does not hold incarnation 1"):
        held.check_row(row, 1)


def test_work_for_another_incarnation_is_refused():
    with pytest.raises(ProtocolError, match="row 0 does not hold incarnation 2"):
        admitted().check_row(0, 2)


def test_blocks_are_appended_in_the_order_they_come():
    held = admitted(blocks=[3, 9])
    held.add_blocks(0, [])
    held.add_blocks(0, [1])
    assert held.block_table[0, : held.num_blocks[0]].tolist() == [3, 9, 1]


def test_more_blocks_than_positions_need_are_refused():
    held = admitted(blocks=[0, 1, 2, 3])
    with pytest.raises(ProtocolError, match="row 0 has more than 4 blocks"):
        held.add_blocks(0, [4])


def test_a_log_grows_to_the_limit_and_not_beyond():
    held = admitted(tokens=[1] * 64)
    held.append(np.array([0]), np.array([2]))
    with pytest.raises(ProtocolError, match=r"rows \[0\] are at their last position"):
        held.append(np.array([0]), np.array([2]))


@given(
    log=st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=60),
    data=st.data(),
)
@settings(max_examples=200, deadline=None)
def test_occurrences_counted_one_by_one_equal_those_of_the_whole_log(log, data):
    num_prompt = data.draw(st.integers(1, len(log) - 1))
    known = data.draw(st.integers(num_prompt, len(log)))
    grown = table()
    grown.admit(0, 1, 1, log[:known], num_prompt, 0)
    grown.states[0] = RowState(SamplingParams(repetition_penalty=2.0), counts=grown.count_ids(0))
    for token_id in log[known:]:
        grown.append(np.array([0]), np.array([token_id]))
    counts = grown.states[0].counts
    assert counts is not None
    assert counts[0].tolist() == np.bincount(log, minlength=VOCAB).tolist()
    assert counts[1].tolist() == np.bincount(log[num_prompt:], minlength=VOCAB).tolist()
    rebuilt = table()
    rebuilt.admit(2, 1, 2, log, num_prompt, 0)
    assert torch.equal(rebuilt.count_ids(2), counts)


ROW = np.array([0])


@pytest.mark.parametrize("column", ["sequence", "incarnation", "length", "computed", "num_blocks", "blocks_digest"])
def test_ranks_see_a_number_that_differs_at_once(column):
    ours, theirs = admitted(), admitted()
    getattr(theirs, column)[0] ^= 1
    assert ours.facts(ROW, 1) != theirs.facts(ROW, 1)


def test_ranks_see_a_last_id_that_differs_at_once():
    assert admitted(tokens=[5, 6, 7]).facts(ROW, 1) != admitted(tokens=[5, 6, 8]).facts(ROW, 1)


@pytest.mark.parametrize("blocks", [[3, 8], [9, 3], [3], [3, 9, 0]], ids=str)
def test_ranks_see_block_ids_that_came_differently_at_once(blocks):
    assert admitted(blocks=[3, 9]).facts(ROW, 1) != admitted(blocks=blocks).facts(ROW, 1)


@pytest.mark.parametrize(("array", "at"), [("block_table", 0), ("block_table", 1), ("tokens", 0), ("tokens", 1)])
def test_ranks_see_an_entry_that_went_bad_later_within_a_few_steps(array, at):
    ours, theirs = admitted(), admitted()
    getattr(theirs, array)[0, at] += 1
    assert any(ours.facts(ROW, step) != theirs.facts(ROW, step) for step in range(30))


def test_what_lies_in_other_rows_is_of_no_account():
    ours, theirs = admitted(), admitted()
    theirs.admit(1, 5, 1, [1, 2], 2, 0)
    assert [ours.facts(ROW, step) for step in range(30)] == [theirs.facts(ROW, step) for step in range(30)]
