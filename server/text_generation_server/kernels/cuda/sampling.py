"""What drawing ids asks of logits on a device, so that few numbers have to leave it (`sources/sampling.cu`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .backend import Backend

THREADS = 1024


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
    module = backend.module("sampling.cu", {"BF16": 1})
    module.launch("row_statistics", (rows, 1, 1), THREADS, 4 * 4 * 32, logits, results, ids, size)
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
    shared = 4 * (256 + 2 + THREADS)
    module = backend.module("sampling.cu", {"BF16": 1})
    module.launch("largest", (rows, 1, 1), THREADS, shared, logits, found, ids, values, size, count, room)
    return Largest(found, ids, values)


def _checked(logits: Tensor) -> Tensor:
    if logits.dtype != torch.float32 or logits.ndim != 2 or not logits.numel():
        raise ValueError(f"logits are {logits.dtype} {list(logits.shape)}; expected float32 [rows, vocab], not empty")
    return logits.contiguous()
