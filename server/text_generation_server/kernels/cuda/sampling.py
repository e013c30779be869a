"""Draws ids where the logits are, so that few numbers have to leave the device (`sources/sampling.cu`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..interface import Drawn, DrawRequest
from .backend import Backend, Module

THREADS = 1024
# Sums of threads, a histogram, what was chosen.
SHARED = 8 * (THREADS + 256 + 2)
# `Request` of sampling.cu.
REQUEST = np.dtype(
    [
        ("number", np.float64),
        ("top_p", np.float64),
        ("top_k", np.int32),
        ("do_sample", np.int32),
        ("temperature", np.float32),
        ("unused", np.int32),
    ]
)
# Of a request, and of a result.
WORDS, RESULT_WORDS = REQUEST.itemsize // 8, 3


@dataclass(frozen=True)
class RowStatistics:
    """Of each row: maximum, log of the sum of exponentials, minimum [rows] float32; the lowest id of the maximum.

    Where a row has a NaN, maximum and minimum are NaN.
    """

    most: Tensor
    normalizer: Tensor
    least: Tensor
    ids: Tensor


@dataclass(frozen=True)
class Largest:
    """Of each row, everything not smaller than its `count`-th largest value, ids ascending.

    found: [rows] int32, how many there are; ids, values: [rows, room], of which the first `found` mean something.
    """

    found: Tensor
    ids: Tensor
    values: Tensor


def row_statistics(backend: Backend, logits: Tensor) -> RowStatistics:
    """logits: [rows, vocab] float32."""
    logits = _checked(logits)
    rows, size = logits.shape
    results = logits.new_empty(rows, 3)
    ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    _module(backend).launch("row_statistics", (rows, 1, 1), THREADS, 4 * 4 * 32, logits, results, ids, size)
    return RowStatistics(results[:, 0], results[:, 1], results[:, 2], ids)


def largest(backend: Backend, logits: Tensor, count: int, room: int) -> Largest:
    """The `count` largest values of each row and what ties with the last, as far as there is `room`. No sort.

    logits: [rows, vocab] float32 without NaN.
    """
    logits = _checked(logits)
    rows, size = logits.shape
    if not 0 < count <= room:
        raise ValueError(f"{count} largest values in room for {room}")
    found = torch.empty(rows, dtype=torch.int32, device=logits.device)
    ids = torch.empty(rows, room, dtype=torch.int64, device=logits.device)
    values = logits.new_empty(rows, room)
    _module(backend).launch("largest", (rows, 1, 1), THREADS, SHARED, logits, found, ids, values, size, count, room)
    return Largest(found, ids, values)


def words_of(requests: Sequence[DrawRequest]) -> NDArray[np.int64]:
    """Requests without typical_p as `draw` reads them: [rows, WORDS]."""
    words = [(how.number, how.top_p, how.top_k, how.do_sample, how.temperature, 0) for how in requests]
    return np.array(words, REQUEST).view(np.int64).reshape(-1, WORDS)


def draw(backend: Backend, logits: Tensor, requests: Tensor) -> Tensor:
    """An id for each row: [rows, RESULT_WORDS] int64, for `drawn_of` once it is on the host; the first word is the id.

    logits: [rows, vocab] float32, of at most 2^22 ids; requests: [rows, WORDS] int64, on the device. A row that is not
    finite is given some id.
    """
    logits = _checked(logits)
    rows, size = logits.shape
    if requests.dtype != torch.int64 or requests.shape != (rows, WORDS) or not requests.is_contiguous():
        found = f"{requests.dtype} {list(requests.shape)}"
        raise ValueError(f"requests are {found}; expected int64 {[rows, WORDS]}, row by row")
    if size > 1 << 22:
        raise ValueError(f"{size} ids; expected at most {1 << 22}")
    results = torch.empty(rows, RESULT_WORDS, dtype=torch.int64, device=logits.device)
    _module(backend).launch("draw", (rows, 1, 1), THREADS, SHARED, logits, requests, results, size)
    return results


def drawn_of(results: NDArray[np.int64]) -> Drawn:
    """What `draw` gave, on the host."""
    floats = np.ascontiguousarray(results[:, 2]).view(np.float32).reshape(-1, 2)
    return Drawn(results[:, 0], floats[:, 1], floats[:, 0], results[:, 1] != 0)


def _module(backend: Backend) -> Module:
    # It multiplies nothing, but an old GPU has no instructions with bfloat16.
    return backend.module("sampling.cu", {"BF16": int(backend.has_bfloat16)})


def _checked(logits: Tensor) -> Tensor:
    if logits.dtype != torch.float32 or logits.ndim != 2 or not logits.numel():
        raise ValueError(f"logits are {logits.dtype} {list(logits.shape)}; expected float32 [rows, vocab], not empty")
    return logits.contiguous()
