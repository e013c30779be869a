"""Draws from what grammars allow: the most probable id of rows without chance, a mask for the others.

Whether one id may come next costs a small part of a mask, and what is wanted is mostly among the most probable. Kernels
that follow grammars are preferred; the loop here serves where there are none, and says what is meant.
"""

import math
import time
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..kernels.interface import FAILED, MASKED, DrawsIds, Guidance, GuidedRows
from .constraint import GrammarError
from .grammar import Guided, first_line
from .matcher import Matcher, functions

# So many of the most probable ids are judged before a mask is asked for; fewer where a row needed a mask the last time:
# it is likely to need one again.
TRIES, TRIES_AFTER_A_MASK = 4, 1


@dataclass(slots=True)
class Asked:
    """A row of the logits that a grammar limits."""

    place: int  # of the logits
    constraint: Guided
    is_greedy: bool  # the most probable id is wanted, else the mask alone
    goes_on: bool  # the text may not end yet


@dataclass(frozen=True)
class Found:
    """What came of it: an id, a mask [ceil(vocab / 32)] or an error for each place of the logits."""

    ids: dict[int, int]
    masks: dict[int, NDArray[np.int32]]
    errors: dict[int, str]


def guide(logits: Tensor, asked: list[Asked], ends: NDArray[np.int32], kernels: DrawsIds | None) -> Found:
    """The constraints have to be told of the ids that were drawn, those that are found here included.

    logits: [rows, vocab] float32. ends: [ceil(vocab / 32)], one bit for each id that ends a text.
    kernels: who follows grammars, if they can.
    """
    found = Found({}, {}, {})
    going, matchers = list[Asked](), list[Matcher]()
    for one in asked:
        try:
            matcher = one.constraint.follow()
        except GrammarError as error:
            found.errors[one.place] = str(error)
            continue
        if matcher is None:
            found.masks[one.place] = words = np.empty_like(ends)
            one.constraint.fill(words)
        else:
            going.append(one)
            matchers.append(matcher)
    if not going:
        return found
    rows = GuidedRows(
        matchers=np.array([matcher.address for matcher in matchers], np.uint64),
        rows=np.array([one.place for one in going]),
        is_greedy=np.array([one.is_greedy for one in going]),
        tries=np.array([TRIES_AFTER_A_MASK if one.constraint.needed_mask else TRIES for one in going], np.int32),
        goes_on=np.array([one.goes_on for one in going]),
        mask_words=matchers[0].mask_words,
        functions=functions(),
        ends=ends,
    )
    guidance = kernels.guide(logits, rows) if kernels is not None else None
    if guidance is None:
        guidance = guide_rows(logits, rows, matchers)
    for i, (one, token_id, seconds) in enumerate(
        zip(going, guidance.ids.tolist(), guidance.seconds.tolist(), strict=True)
    ):
        one.constraint.needed_mask = seconds > 0
        if seconds:
            one.constraint.took(seconds)
        if token_id >= 0:
            found.ids[one.place] = token_id
            one.constraint.has_followed(token_id)
        elif token_id == MASKED:
            found.masks[one.place] = guidance.masks[i]
        else:
            found.errors[one.place] = first_line(matchers[i].error() or "the grammar leaves no id to go on with")
    return found


def guide_rows(logits: Tensor, guided: GuidedRows, matchers: list[Matcher]) -> Guidance:
    """One row after the other. See `DrawsIds`."""
    result = Guidance(
        ids=np.full(len(matchers), MASKED),
        masks=np.zeros((len(matchers), len(guided.ends)), np.int32),
        seconds=np.zeros(len(matchers)),
    )
    for i, matcher in enumerate(matchers):
        row = cast(NDArray[np.float32], logits[guided.rows[i]].numpy())
        token_id = try_most_probable(row, matcher, guided.ends, int(guided.tries[i])) if guided.is_greedy[i] else None
        if token_id is None:
            begun = time.thread_time()
            masked = mask_of(matcher, row.size, guided.ends if guided.goes_on[i] else None)
            result.seconds[i] = time.thread_time() - begun
            if masked is None:
                result.ids[i] = FAILED
                continue
            result.masks[i] = masked
            token_id = highest_of(row, masked, matcher, guided.ends) if guided.is_greedy[i] else MASKED
        result.ids[i] = token_id
    return result


def try_most_probable(row: NDArray[np.float32], matcher: Matcher, ends: NDArray[np.int32], tries: int) -> int | None:
    """The highest of `row` [vocab], the first of equals, if it is among the first few and allowed."""
    for turn in range(tries):
        token_id = int(row.argmax())
        if has(ends, token_id) or not math.isfinite(row[token_id]):
            return None
        if matcher.consume([token_id]) == 1:
            return token_id
        row = row.copy() if turn == 0 else row
        row[token_id] = -np.inf
    return None


def mask_of(matcher: Matcher, vocab: int, ends: NDArray[np.int32] | None) -> NDArray[np.int32] | None:
    """Which ids may come next, without `ends` unless nothing else is left. None: nothing, or an error."""
    words = np.zeros(-(-vocab // 32), np.int32)
    matcher.fill(words)
    if vocab % 32:
        words[-1] &= (1 << vocab % 32) - 1
    if matcher.error() is not None or not words.any():
        return None
    # A form that has come to its end counts more than a least length.
    if ends is not None and (words & ~ends).any():
        words &= ~ends
    return words


def highest_of(row: NDArray[np.float32], words: NDArray[np.int32], matcher: Matcher, ends: NDArray[np.int32]) -> int:
    """The highest that a mask leaves, by which the matcher goes on; MASKED: there is none; FAILED: it cannot."""
    allowed = np.unpackbits(words.view(np.uint8), bitorder="little")[: row.size].astype(np.bool_)
    left = np.where(allowed, row, -np.inf)
    token_id = int(left.argmax())
    if not math.isfinite(left[token_id]):
        return MASKED
    return token_id if has(ends, token_id) or matcher.consume([token_id]) == 1 else FAILED


def has(words: NDArray[np.int32], token_id: int) -> bool:
    """Whether the bit of an id is set."""
    return bool(words[token_id // 32] >> (token_id % 32) & 1)
