"""Draws an id for each row (see sampling.cpp)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...interface import Allowed, Drawn, DrawRequests, Guidance, GuidedRows, Penalties
from .library import Library

# `DrawRow` of sampling.h.
DRAW_ROW = np.dtype(
    [
        ("number", np.float64),
        ("top_p", np.float64),
        ("typical_p", np.float64),
        ("top_k", np.int64),
        ("id", np.int64),
        ("temperature", np.float32),
        ("normalizer", np.float32),
        ("logprob", np.float32),
        ("do_sample", np.int32),
        ("is_finite", np.int32),
    ],
    align=True,
)


# `PenalizedRow` of sampling.h.
PENALIZED_ROW = np.dtype(
    [
        ("logits", np.uint64),
        ("counts", np.uint64),
        ("bias_ids", np.uint64),
        ("biases", np.uint64),
        ("num_biases", np.int64),
        ("length", np.float32),
        ("repetition", np.float32),
        ("frequency", np.float32),
        ("presence", np.float32),
        ("count", np.float32),
    ],
    align=True,
)


# `GuidedRow` of sampling.h.
GUIDED_ROW = np.dtype(
    [
        ("matcher", np.uint64),
        ("logits", np.uint64),
        ("mask", np.uint64),
        ("mask_words", np.int64),
        ("id", np.int64),
        ("mask_seconds", np.float64),
        ("is_greedy", np.int32),
        ("tries", np.int32),
        ("goes_on", np.int32),
    ],
    align=True,
)


class _Allowed(ctypes.Structure):
    """`Allowed` of sampling.h."""

    _fields_ = (("masks", ctypes.c_void_p), ("mask_of", ctypes.c_void_p), ("words", ctypes.c_int64))


class NativeSampling:
    """Each row's result is its own, whatever the number of rows and threads."""

    def __init__(self, library: Library):
        self._variant = library.variant
        self._draw = library.function("draw", "iplpllppli")
        self._candidates = library.function("candidates", "iplpppp")
        self._penalize = library.function("penalize", "iplli")
        self._guide = library.function("guide", "ipplpli")

    def draw(self, raw: Tensor, processed: Tensor, requests: DrawRequests, allowed: Allowed | None = None) -> Drawn:
        """raw, processed: [rows, vocab] float32, which may be the same tensor."""
        rows = _rows_of(requests)
        raw, processed = _checked(raw, len(rows)), _checked(processed, len(rows))
        masks = None if allowed is None else _masks_of(allowed, *raw.shape)
        self._draw(
            self._variant, raw.data_ptr(), raw.stride(0), processed.data_ptr(), processed.stride(0), raw.shape[1],
            None if masks is None else ctypes.addressof(masks), rows.ctypes.data, len(rows), torch.get_num_threads(),
        )  # fmt: skip
        return Drawn(
            rows["id"].copy(), rows["logprob"].copy(), rows["normalizer"].copy(), rows["is_finite"].astype(np.bool_)
        )

    def guide(self, logits: Tensor, guided: GuidedRows) -> Guidance:
        """See `DrawsIds`.

        Raises:
            ValueError: logits of another shape or type, or a row that is none of theirs.
        """
        logits = _checked(logits, len(logits))
        vocab, count = logits.shape[1], len(guided.rows)
        words = -(-vocab // 32)
        lowest, highest = guided.rows.min(initial=0), guided.rows.max(initial=0)
        if len(guided.ends) != words or not 0 <= lowest <= highest < len(logits):
            raise ValueError(f"rows {guided.rows} of {len(logits)}, {len(guided.ends)} words of ends for {vocab} ids")
        masks, rows = np.empty((count, words), np.int32), np.zeros(count, GUIDED_ROW)
        rows["matcher"], rows["mask_words"] = guided.matchers, guided.mask_words
        rows["logits"] = logits.data_ptr() + guided.rows * (4 * logits.stride(0))
        rows["mask"] = masks.ctypes.data + np.arange(count) * (4 * words)
        rows["is_greedy"], rows["tries"], rows["goes_on"] = guided.is_greedy, guided.tries, guided.goes_on
        functions = np.array(guided.functions, np.uint64)
        self._guide(
            self._variant, functions.ctypes.data, guided.ends.ctypes.data, vocab, rows.ctypes.data, count,
            torch.get_num_threads(),
        )  # fmt: skip
        return Guidance(rows["id"].copy(), masks, rows["mask_seconds"].copy())

    def penalize(self, logits: Tensor, rows: Sequence[int], penalties: Sequence[Penalties]) -> None:
        """See `DrawsIds`. The bits are those of `processors.penalize` and `processors.bias`.

        Raises:
            ValueError: logits or counts of another shape or type, or a bias for an id that is none.
        """
        vocab = logits.shape[-1]
        if logits.dtype != torch.float32 or logits.ndim != 2 or logits.stride(1) != 1:
            raise ValueError(
                f"logits are {logits.dtype} {list(logits.shape)}; expected float32 [rows, vocab], row by row"
            )
        asked, ids, values = np.zeros(len(penalties), PENALIZED_ROW), list[int](), list[float]()
        for at, (row, how) in enumerate(zip(rows, penalties, strict=True)):
            if how.counts is not None and (
                how.counts.dtype != torch.float32 or how.counts.shape != (2, vocab) or not how.counts.is_contiguous()
            ):
                raise ValueError(
                    f"counts are {how.counts.dtype} {list(how.counts.shape)}; expected float32 {[2, vocab]}, row by row"
                )
            if not 0 <= row < len(logits):
                raise ValueError(f"row {row} of {len(logits)}")
            asked[at] = (
                logits.data_ptr() + row * logits.stride(0) * 4, 0 if how.counts is None else how.counts.data_ptr(),
                8 * len(ids), 4 * len(ids), len(how.bias), how.length, how.repetition, how.frequency, how.presence,
                how.count,
            )  # fmt: skip
            for token_id, value in how.bias:
                ids.append(token_id)
                values.append(value)
        bias_ids, biases = np.array(ids, np.int64), np.array(values, np.float32)
        if len(ids) and not 0 <= bias_ids.min() <= bias_ids.max() < vocab:
            raise ValueError(f"biases for ids from {bias_ids.min()} to {bias_ids.max()}, of {vocab}")
        asked["bias_ids"] += np.uint64(bias_ids.ctypes.data)
        asked["biases"] += np.uint64(biases.ctypes.data)
        self._penalize(self._variant, asked.ctypes.data, len(asked), vocab, torch.get_num_threads())

    def candidates(self, logits: Tensor, requests: DrawRequests) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Ids of one row [1, vocab], all finite, that may be drawn, ascending; and their weights."""
        rows = _rows_of(requests)
        logits = _checked(logits, 1)
        ids, weights = np.empty(logits.shape[1], np.int32), np.empty(logits.shape[1], np.float32)
        count = np.zeros(1, np.int64)
        self._candidates(
            self._variant, logits.data_ptr(), logits.shape[1], rows.ctypes.data, ids.ctypes.data, weights.ctypes.data,
            count.ctypes.data,
        )  # fmt: skip
        return ids[: count[0]], weights[: count[0]]


def _rows_of(requests: DrawRequests) -> NDArray[np.void]:
    rows = np.zeros(len(requests.numbers), DRAW_ROW)
    rows["number"], rows["do_sample"], rows["temperature"] = requests.numbers, requests.do_sample, requests.temperatures
    rows["top_k"], rows["top_p"], rows["typical_p"] = requests.top_k, requests.top_p, requests.typical_p
    return rows


def _checked(logits: Tensor, rows: int) -> Tensor:
    if logits.dtype != torch.float32 or logits.ndim != 2 or len(logits) != rows or not logits.shape[1]:
        raise ValueError(f"logits are {logits.dtype} {list(logits.shape)}; expected float32 [{rows}, vocab], not empty")
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _masks_of(allowed: Allowed, rows: int, vocab: int) -> _Allowed:
    """What lives as long as `allowed`."""
    words, of = allowed.words, allowed.of
    fits = words.ndim == 2 and words.shape[1] * 32 >= vocab and of.shape == (rows,) and of.max(initial=-1) < len(words)
    if (
        not fits
        or words.dtype != np.int32
        or of.dtype != np.int64
        or not (words.flags.c_contiguous and of.flags.c_contiguous)
    ):
        raise ValueError(
            f"masks are {words.dtype} {list(words.shape)}, their rows {of.dtype} {list(of.shape)}, for {vocab} ids; "
            f"expected int32 [n, {-(-vocab // 32)}] and int64 [{rows}] below n"
        )
    return _Allowed(words.ctypes.data, of.ctypes.data, words.shape[1])
