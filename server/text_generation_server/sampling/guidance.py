"""Rows that grammars limit.

Whether one id may come next costs a small part of a mask, and what is wanted is mostly among the most probable. Kernels
that follow grammars are preferred; `guide_rows` serves where there are none, and says what is meant.
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..kernels.interface import Allowed, FollowsText, Guidance, GuidedRow, GuidedRows
from .constraint import GrammarError
from .grammar import Guided, first_line
from .matcher import functions

# So many of the most probable ids are judged before a mask is asked for; fewer where a row needed a mask the last time:
# it is likely to need one again.
TRIES, TRIES_AFTER_A_MASK = 4, 1


class Asked(NamedTuple):
    """Rows of the logits that grammars limit, and their constraints in the same order."""

    rows: list[GuidedRow]
    constraints: list[Guided]

    def guided_rows(self, ends: NDArray[np.int32]) -> GuidedRows | None:
        """What those who draw are told. ends: [ceil(vocab / 32)], one bit for each id that ends a text."""
        return GuidedRows(self.rows, self.constraints[0].mask_words, functions(), ends) if self.rows else None

    def take_note(
        self, ids: NDArray[np.int64], is_finite: NDArray[np.bool_], guidance: Sequence[Guidance]
    ) -> dict[int, str]:
        """Tells the constraints what came of their rows. The errors of places of the logits.

        ids, is_finite: [rows of the logits].
        """
        errors = dict[int, str]()
        all_ids, all_finite = ids.tolist(), is_finite.tolist()
        for row, constraint, (seconds, has_failed) in zip(self.rows, self.constraints, guidance, strict=True):
            constraint.needed_mask = seconds > 0
            if seconds:
                constraint.took(seconds)
            if has_failed:
                errors[row.place] = first_line(row.matcher.error() or "the grammar leaves no id to go on with")
            elif all_finite[row.place]:
                constraint.has_followed(all_ids[row.place])
        return errors


def ask(
    rows: Iterable[tuple[int, Guided, bool]], ends: NDArray[np.int32]
) -> tuple[Asked, dict[int, NDArray[np.int32]], dict[int, str]]:
    """What follows each row, the mask of those that have come to their end, and errors; each by place of the logits.

    rows: place, constraint, and whether the text may not end yet. ends: [ceil(vocab / 32)].
    """
    asked, masks, errors = Asked([], []), dict[int, NDArray[np.int32]](), dict[int, str]()
    for place, constraint, goes_on in rows:
        try:
            matcher = constraint.follow()
        except GrammarError as error:
            errors[place] = str(error)
            continue
        if matcher is not None:
            tries = TRIES_AFTER_A_MASK if constraint.needed_mask else TRIES
            asked.rows.append(GuidedRow(place, matcher, tries, goes_on))
            asked.constraints.append(constraint)
        else:
            masks[place] = np.empty_like(ends)
            constraint.fill(masks[place])
    return asked, masks, errors


def allowed_by(masks: Mapping[int, NDArray[np.int32]], rows: int) -> Allowed | None:
    """Masks [words] by place, for so many rows of logits; None: there is none."""
    if not masks:
        return None
    of = np.full(rows, -1)
    of[list(masks)] = range(len(masks))
    return Allowed(np.stack(list(masks.values())), of)


@dataclass(frozen=True)
class Found:
    """Ids by which matchers have gone on and masks [words] of others, by place of the logits; of all what it took."""

    ids: dict[int, int]
    masks: dict[int, NDArray[np.int32]]
    guidance: list[Guidance]


def guide_rows(logits: Tensor, guided: GuidedRows, is_greedy: Sequence[bool], is_finite: NDArray[np.bool_]) -> Found:
    """One row after the other. What is drawn from a mask has to be told to `go_on`.

    logits: [rows, vocab] float32; those that are not `is_finite` are passed over. is_greedy: [rows].
    """
    found = Found({}, {}, [])
    for place, matcher, tries, goes_on in guided.rows:
        seconds, has_failed = 0.0, False
        row = cast(NDArray[np.float32], logits[place].numpy())
        token_id = None
        if is_finite[place]:
            token_id = try_most_probable(row, matcher, guided.ends, tries) if is_greedy[place] else None
            if token_id is None:
                begun = time.thread_time()
                words = mask_of(matcher, guided.mask_words, row.size, guided.ends if goes_on else None)
                seconds, has_failed = time.thread_time() - begun, words is None
                if words is not None:
                    found.masks[place] = words
            else:
                found.ids[place] = token_id
        found.guidance.append(Guidance(seconds, has_failed))
    return found


def go_on(found: Found, guided: GuidedRows, ids: NDArray[np.int64], is_finite: NDArray[np.bool_]) -> list[Guidance]:
    """The matchers of rows that were drawn from a mask go on by their ids, unless these end the text. ids: [rows]."""
    after = list[Guidance]()
    for (place, matcher, *_), of_row in zip(guided.rows, found.guidance, strict=True):
        token_id = int(ids[place])
        is_told = place in found.masks and is_finite[place] and not has(guided.ends, token_id)
        failed = of_row.has_failed or (is_told and matcher.consume([token_id]) != 1)
        after.append(Guidance(of_row.mask_seconds, failed))
    return after


def try_most_probable(
    row: NDArray[np.float32], matcher: FollowsText, ends: NDArray[np.int32], tries: int
) -> int | None:
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


def mask_of(
    matcher: FollowsText, mask_words: int, vocab: int, ends: NDArray[np.int32] | None
) -> NDArray[np.int32] | None:
    """Which ids may come next, without `ends` unless nothing else is left. None: nothing, or an error.

    mask_words: of the matcher's own mask.
    """
    words, own = np.zeros(-(-vocab // 32), np.int32), np.zeros(mask_words, np.int32)
    matcher.fill(own)
    shared = min(len(own), len(words))
    words[:shared] = own[:shared]
    if vocab % 32:
        words[-1] &= (1 << vocab % 32) - 1
    if matcher.error() is not None or not words.any():
        return None
    # A form that has come to its end counts more than a least length.
    if ends is not None and (words & ~ends).any():
        words &= ~ends
    return words


def has(words: NDArray[np.int32], token_id: int) -> bool:
    """Whether the bit of an id is set."""
    return bool(words[token_id // 32] >> (token_id % 32) & 1)
