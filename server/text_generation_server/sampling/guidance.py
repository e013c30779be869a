"""Rows that grammars limit.

Whether one id may come next costs a small part of a mask, and what is wanted is mostly among the most probable. Kernels
that follow grammars are preferred; `guide_rows` serves where there are none, and says what is meant.
"""

import math
import time
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..kernels.interface import GUIDED_ROW, Allowed, FollowsText, GuidedRows
from .constraint import GrammarError
from .grammar import Guided, first_line
from .matcher import Matcher, functions

# So many of the most probable ids are judged before a mask is asked for; fewer where a row needed a mask the last time:
# it is likely to need one again.
TRIES, TRIES_AFTER_A_MASK = 4, 1


@dataclass
class Asked:
    """Rows of the logits that grammars limit, as those who draw are told, and their constraints in the same order.

    holds: of the next step the same may be asked, if it has the same rows.
    """

    guided: GuidedRows | None
    constraints: list[Guided]
    holds: bool

    def take_note(self, ids: NDArray[np.int64], is_finite: NDArray[np.bool_]) -> tuple[set[int], dict[int, str]]:
        """Tells the constraints by which ids their matchers have gone on.

        ids, is_finite: [rows of the logits].

        Returns:
            Places whose constraints need not be told any more, and errors of others.
        """
        if self.guided is None:
            return set(), {}
        rows, told, errors = self.guided.rows, set[int](), dict[int, str]()
        all_ids, all_finite, ends = ids.tolist(), is_finite.tolist(), self.constraints[0].ends
        tries = [TRIES] * len(rows)
        # Numbers of Python: a few of them cost less than numpy's functions when nothing is in a core's caches.
        for i, (_, place, mask_seconds, _, _, has_failed) in enumerate(rows.tolist()):
            if mask_seconds:
                tries[i] = TRIES_AFTER_A_MASK
                self.constraints[i].took(mask_seconds)
                self.holds &= self.constraints[i].is_cheap()
            if has_failed or not all_finite[place]:
                self.holds = False
                if has_failed:
                    cause = self.guided.matchers[i].error() or "the grammar leaves no id to go on with"
                    errors[place] = first_line(cause)
                continue
            told.add(place)
            if all_ids[place] in ends:
                self.constraints[i].advance(all_ids[place])
                self.holds = False
        rows["tries"] = tries
        return told, errors


def ask(
    asked: Iterable[tuple[int, Guided, bool]], ends: NDArray[np.int32]
) -> tuple[Asked, dict[int, NDArray[np.int32]], dict[int, str]]:
    """What follows each row, the mask of those that have come to their end, and errors; each by place of the logits.

    asked: place, constraint, and whether the text may not end yet. ends: [ceil(vocab / 32)], a bit for each id that
    ends a text.
    """
    rows, matchers, constraints = list[tuple[object, ...]](), list[Matcher](), list[Guided]()
    masks, errors = dict[int, NDArray[np.int32]](), dict[int, str]()
    for place, constraint, goes_on in asked:
        try:
            matcher = constraint.follow()
        except GrammarError as error:
            errors[place] = str(error)
            continue
        if matcher is not None:
            rows.append((matcher.address, place, 0.0, TRIES, goes_on, 0))
            matchers.append(matcher)
            constraints.append(constraint)
        else:
            masks[place] = np.empty_like(ends)
            constraint.fill(masks[place])
    if not rows:
        return Asked(None, [], holds=not (masks or errors)), masks, errors
    guided = GuidedRows(np.array(rows, GUIDED_ROW), matchers, matchers[0].mask_words, functions(), ends)
    return Asked(guided, constraints, holds=not (masks or errors or guided.rows["goes_on"].any())), masks, errors


def allowed_by(masks: Mapping[int, NDArray[np.int32]], rows: int) -> Allowed | None:
    """Masks [words] by place, for so many rows of logits; None: there is none."""
    if not masks:
        return None
    of = np.full(rows, -1)
    of[list(masks)] = range(len(masks))
    return Allowed(np.stack(list(masks.values())), of)


def guide_rows(
    logits: Tensor, guided: GuidedRows, is_greedy: Sequence[bool], is_finite: NDArray[np.bool_]
) -> tuple[dict[int, int], dict[int, NDArray[np.int32]]]:
    """One row after the other: ids by which matchers have gone on, or masks [words], by place of the logits.

    What is drawn from a mask has to be told to `go_on`.

    logits: [rows, vocab] float32; those that are not `is_finite` are passed over. is_greedy: [rows].
    """
    ids, masks = dict[int, int](), dict[int, NDArray[np.int32]]()
    for asked, matcher in zip(guided.rows, guided.matchers, strict=True):
        place = int(asked["place"])
        asked["mask_seconds"], asked["has_failed"] = 0, 0
        if not is_finite[place]:
            continue
        row = cast(NDArray[np.float32], logits[place].numpy())
        token_id = try_most_probable(row, matcher, guided.ends, int(asked["tries"])) if is_greedy[place] else None
        if token_id is not None:
            ids[place] = token_id
            continue
        begun = time.thread_time()
        words = mask_of(matcher, row.size, guided.ends if asked["goes_on"] else None)
        asked["mask_seconds"], asked["has_failed"] = time.thread_time() - begun, words is None
        if words is not None:
            masks[place] = words
    return ids, masks


def go_on(guided: GuidedRows, masked: Container[int], ids: NDArray[np.int64], is_finite: NDArray[np.bool_]) -> None:
    """The matchers of places that were drawn from a mask go on by their ids, unless these end the text. ids: [rows]."""
    for asked, matcher in zip(guided.rows, guided.matchers, strict=True):
        token_id = int(ids[asked["place"]])
        if asked["place"] in masked and is_finite[asked["place"]] and not has(guided.ends, token_id):
            asked["has_failed"] = matcher.consume([token_id]) != 1


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


def mask_of(matcher: FollowsText, vocab: int, ends: NDArray[np.int32] | None) -> NDArray[np.int32] | None:
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


def has(words: NDArray[np.int32], token_id: int) -> bool:
    """Whether the bit of an id is set."""
    return bool(words[token_id // 32] >> (token_id % 32) & 1)
