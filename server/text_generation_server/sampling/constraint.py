"""Constraints on the ids of a sequence: which may come next. A pure function of the ids that were generated.

`AUTOMATON` is a finite automaton over ids, as JSON:

    {"start": 0, "transitions": [[state, id, next state], ...], "final": [state, ...]}

In a final state the end-of-sequence ids are allowed as well; in a state without a way on, they alone.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

# The bits of the number in float32.
MINUS_INFINITY = np.float32(-np.inf).view(np.int32)


class GrammarError(ValueError):
    """A grammar that cannot be used, or ids that do not follow it."""


class Constraint(Protocol):
    """Restricts one sequence."""

    def fill(self, words: NDArray[np.int32]) -> None:
        """Says which ids may come next: one bit for each in words [ceil(vocab / 32)], lowest first; at least one.

        May take milliseconds; is called by another thread than `advance`, never at the same time. Raises GrammarError.
        """
        ...

    def advance(self, token_id: int) -> None:
        """Takes note of the next id. What follows an end-of-sequence id is of no account."""
        ...


def set_bits(words: NDArray[np.int32], token_ids: Sequence[int]) -> None:
    """Allows these ids in a mask, and no others."""
    words.fill(0)
    ids = np.asarray(token_ids, np.int64)
    octets = words.view(np.uint8)
    np.bitwise_or.at(octets, ids >> 3, (1 << (ids & 7)).astype(np.uint8))


@dataclass(frozen=True)
class Allowed:
    """Which ids may be drawn, for some rows of logits.

    words: [n, ceil(vocab / 32)] int32, one bit for each id, lowest first; of: [rows] int64, which of them holds
    for each row of the logits, or -1.
    """

    words: NDArray[np.int32]
    of: NDArray[np.int64]


def biases(words: NDArray[np.int32], vocab_size: int) -> NDArray[np.float32]:
    """What masks [rows, words] add to logits [rows, vocab_size]: 0, and -inf where an id is not allowed.

    Adding is many times as fast as filling in where a mask says so: nothing branches.
    """
    forbidden = np.unpackbits(np.invert(words).view(np.uint8), axis=1, count=vocab_size, bitorder="little")
    return (forbidden.astype(np.int32) * MINUS_INFINITY).view(np.float32)


class Automaton:
    """The toy constraint: no library, no vocabulary, ids alone."""

    def __init__(self, source: str, eos_token_ids: Sequence[int], vocab_size: int) -> None:
        self._eos = sorted(set(eos_token_ids))
        self._ways, self._final, self._state = parse_automaton(source, vocab_size)
        self._ended = False
        if not self._eos:
            raise GrammarError("the model has no end-of-sequence id to end a grammar with")

    def fill(self, words: NDArray[np.int32]) -> None:
        set_bits(words, self.allowed())

    def allowed(self) -> Sequence[int]:
        ways = self._ways.get(self._state, {})
        if self._ended or not ways:
            return self._eos
        return sorted({*ways, *self._eos}) if self._state in self._final else sorted(ways)

    def advance(self, token_id: int) -> None:
        if self._ended or (token_id in self._eos and token_id not in self._ways.get(self._state, {})):
            self._ended = True
            return
        following = self._ways.get(self._state, {}).get(token_id)
        if following is None:
            raise GrammarError(f"id {token_id} does not follow state {self._state}")
        self._state = following


def parse_automaton(source: str, vocab_size: int) -> tuple[dict[int, dict[int, int]], set[int], int]:
    """Ways by state and id, final states, start. Raises GrammarError with what was found and expected."""

    def whole(value: Any, what: str, below: int) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < below:
            raise GrammarError(f"{what} is {value!r}, expected a whole number in [0, {below})")
        return value

    try:
        spec = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"the automaton is not JSON: {error}") from None
    if not isinstance(spec, dict) or not {"start", "transitions", "final"} <= spec.keys():
        raise GrammarError("the automaton is an object with start, transitions and final")
    for name in ("transitions", "final"):
        if not isinstance(spec[name], list):
            raise GrammarError(f"{name} is {spec[name]!r}, expected a list")
    ways: dict[int, dict[int, int]] = {}
    for transition in spec["transitions"]:
        if not isinstance(transition, list) or len(transition) != 3:
            raise GrammarError(f"a transition is {transition!r}, expected [state, id, next state]")
        state, token_id, following = transition
        ways.setdefault(whole(state, "a state", 1 << 31), {})[whole(token_id, "an id", vocab_size)] = whole(
            following, "a state", 1 << 31
        )
    final = {whole(state, "a final state", 1 << 31) for state in spec["final"]}
    return ways, final, whole(spec["start"], "the start", 1 << 31)
