"""Draws an id for each row (see sampling.cpp)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...interface import GUIDED_ROW, Allowed, Drawn, DrawRequest, GuidedRows, Penalties
from .library import Library

# `DrawRequest` of sampling.h; in the order of the interface's.
DRAW_REQUEST = np.dtype(
    [
        ("number", np.float64),
        ("top_p", np.float64),
        ("typical_p", np.float64),
        ("top_k", np.int64),
        ("temperature", np.float32),
        ("do_sample", np.int32),
    ],
    align=True,
)

# `DrawRow` of sampling.h.
DRAW_ROW = np.dtype(
    [
        ("how", DRAW_REQUEST),
        ("id", np.int64),
        ("normalizer", np.float32),
        ("logprob", np.float32),
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


class _Allowed(ctypes.Structure):
    """`Allowed` of sampling.h."""

    _fields_ = (("masks", ctypes.c_void_p), ("mask_of", ctypes.c_void_p), ("words", ctypes.c_int64))


class _Guided(ctypes.Structure):
    """`Guided` of sampling.h."""

    _fields_ = (
        ("validate", ctypes.c_void_p),
        ("consume", ctypes.c_void_p),
        ("fill", ctypes.c_void_p),
        ("mask_words", ctypes.c_int64),
        ("ends", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("count", ctypes.c_int64),
    )


class NativeSampling:
    """Each row's result is its own, whatever the number of rows and threads."""

    def __init__(self, library: Library):
        self._variant = library.variant
        self._draw = library.function("draw", "iplpllpppli")
        self._candidates = library.function("candidates", "iplpppp")
        self._penalize = library.function("penalize", "iplli")

    def draw(
        self,
        raw: Tensor,
        processed: Tensor,
        requests: Sequence[DrawRequest],
        allowed: Allowed | None = None,
        guided: GuidedRows | None = None,
    ) -> Drawn:
        """See `DrawsIds`.

        Raises:
            ValueError: logits of another shape or type, masks or ends that are not theirs, or a row that is none.
        """
        count = len(requests)
        is_same, raw = processed is raw, _checked(raw, count)
        processed = raw if is_same else _checked(processed, count)
        rows = np.zeros(count, DRAW_ROW)
        rows["how"] = _array_of(requests)
        masks = None if allowed is None else _masks_of(allowed, *raw.shape)
        led = None if guided is None else _guided_of(guided, raw.shape[1])
        self._draw(
            self._variant, raw.data_ptr(), raw.stride(0), processed.data_ptr(), processed.stride(0), raw.shape[1],
            None if masks is None else ctypes.addressof(masks), None if led is None else ctypes.addressof(led),
            rows.ctypes.data, count, torch.get_num_threads(),
        )  # fmt: skip
        if guided is not None and led is not None and led.count < 0:
            raise ValueError(f"guided rows {guided.rows['place'].tolist()} of {count}")
        return Drawn(rows["id"], rows["logprob"], rows["normalizer"], rows["is_finite"].astype(np.bool_))

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

    def candidates(self, logits: Tensor, request: DrawRequest) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Ids of one row [1, vocab], all finite, that may be drawn, ascending; and their weights."""
        how, logits = _array_of([request]), _checked(logits, 1)
        ids, weights = np.empty(logits.shape[1], np.int32), np.empty(logits.shape[1], np.float32)
        count = np.zeros(1, np.int64)
        self._candidates(
            self._variant, logits.data_ptr(), logits.shape[1], how.ctypes.data, ids.ctypes.data, weights.ctypes.data,
            count.ctypes.data,
        )  # fmt: skip
        return ids[: count[0]], weights[: count[0]]


def _array_of(requests: Sequence[DrawRequest]) -> NDArray[np.void]:
    return np.array(requests, DRAW_REQUEST)


def _guided_of(guided: GuidedRows, vocab: int) -> _Guided:
    """What lives as long as `guided`."""
    words, ends, rows = -(-vocab // 32), guided.ends, guided.rows
    if ends.nbytes != 4 * words or rows.dtype is not GUIDED_ROW:
        raise ValueError(f"ends are {ends.dtype} {list(ends.shape)}; expected int32 [{words}] for {vocab} ids")
    return _Guided(*guided.functions, guided.mask_words, ends.ctypes.data, rows.ctypes.data, len(rows))


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
