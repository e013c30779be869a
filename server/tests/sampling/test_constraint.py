"""The toy automaton: which ids may come next, and what it refuses."""

import json

import pytest
from text_generation_server.sampling.constraint import Automaton, GrammarError

EOS = [2, 6]


def automaton(transitions, final=(), start=0, eos=EOS, vocab=100) -> Automaton:
    source = json.dumps({"start": start, "transitions": [list(t) for t in transitions], "final": list(final)})
    return Automaton(source, eos, vocab)


def after(constraint: Automaton, *ids: int) -> list[int]:
    for token_id in ids:
        constraint.advance(token_id)
    return list(constraint.allowed())


def test_the_ways_out_of_a_state_are_allowed_in_order():
    assert after(automaton([(0, 9, 1), (0, 4, 2), (1, 5, 0)])) == [4, 9]


def test_an_id_leads_to_its_next_state():
    assert after(automaton([(0, 9, 1), (1, 5, 0)]), 9) == [5]
    assert after(automaton([(0, 9, 1), (1, 5, 0)]), 9, 5) == [9]


def test_a_final_state_allows_the_end_as_well():
    assert after(automaton([(0, 9, 1), (1, 5, 0)], final=[1]), 9) == [2, 5, 6]


def test_a_state_without_a_way_on_allows_the_end_alone():
    assert after(automaton([(0, 9, 1)]), 9) == EOS


def test_after_the_end_only_the_end_is_allowed_whatever_comes():
    assert after(automaton([(0, 9, 0)], final=[0]), 6) == EOS
    assert after(automaton([(0, 9, 0)], final=[0]), 6, 9, 50) == EOS


def test_an_end_id_that_is_a_way_on_does_not_end():
    assert after(automaton([(0, 2, 1), (1, 7, 1)]), 2) == [7]


def test_an_id_that_does_not_follow_is_an_error_that_names_it():
    with pytest.raises(GrammarError, match="id 5 does not follow state 0"):
        automaton([(0, 9, 1)]).advance(5)


def test_the_state_is_a_function_of_the_ids_alone():
    def make() -> Automaton:
        return automaton([(0, 9, 1), (1, 5, 0), (1, 6, 2)], final=[1])

    stepwise = make()
    for prefix in ([], [9], [9, 5], [9, 5, 9]):
        assert after(stepwise, *prefix[-1:]) == after(make(), *prefix)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{", "not JSON"),
        ("[]", "an object with start, transitions and final"),
        ('{"start": 0, "transitions": []}', "an object with start, transitions and final"),
        ('{"start": -1, "transitions": [], "final": []}', "the start is -1"),
        ('{"start": true, "transitions": [], "final": []}', "the start is True"),
        ('{"start": 0, "transitions": [[0, 1]], "final": []}', r"a transition is \[0, 1\]"),
        ('{"start": 0, "transitions": [[0, 100, 1]], "final": []}', r"an id is 100, expected .* \[0, 100\)"),
        ('{"start": 0, "transitions": [[0, 1.5, 1]], "final": []}', "an id is 1.5"),
        ('{"start": 0, "transitions": [["a", 1, 1]], "final": []}', "a state is 'a'"),
        ('{"start": 0, "transitions": 7, "final": []}', "transitions is 7, expected a list"),
        ('{"start": 0, "transitions": [], "final": 7}', "final is 7, expected a list"),
        ('{"start": 0, "transitions": [], "final": ["a"]}', "a final state is 'a'"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_malformed_automaton_is_refused_with_what_was_found(source, message):
    with pytest.raises(GrammarError, match=message):
        Automaton(source, EOS, 100)


def test_a_model_without_end_ids_cannot_end_a_grammar():
    with pytest.raises(GrammarError, match="no end-of-sequence id"):
        automaton([(0, 1, 1)], eos=[])
