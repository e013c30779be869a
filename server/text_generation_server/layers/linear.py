"""Tensor-parallel linear layers. They know ranks and collectives; not formats, not kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.interface import Matmul
from ..loading import Loader, TensorParallel
from ..quantization.format import Part, Region, read_weight


class Linear:
    """y = x W.T (+ bias), for the rows this rank holds."""

    def __init__(self, matmul: Matmul, bias: Tensor | None):
        self.matmul, self.bias = matmul, bias

    def __call__(self, x: Tensor) -> Tensor:
        y = self.matmul(x)
        return y if self.bias is None else y.add_(self.bias)


class RowParallel:
    """A linear split over its input features: the ranks' partial results are summed, then the bias is added once."""

    def __init__(self, matmul: Matmul, tp: TensorParallel, bias: Tensor | None):
        self.matmul, self.tp, self.bias = matmul, tp, bias

    def __call__(self, x: Tensor) -> Tensor:
        y = self.tp.collectives.all_reduce(self.matmul(x))
        return y if self.bias is None else y.add_(self.bias)


def load_columns(load: Loader, parts: Sequence[Part]) -> Linear:
    """One linear computing the rows of `parts`, merged in order (q, k, v; or gate, up). Parts share one format."""
    format_ = load.format_for(load.prefix + parts[0].name)
    weight = read_weight(load.checkpoint, load.prefix, format_, parts)
    matmul = format_.matmul(weight, Region(tuple(p.size for p in parts), None, load.dtype), load.kernels)
    biases = [load.tensor(f"{p.name}.bias", r) for p in parts if load.has(f"{p.name}.bias") for r in p.rows]
    return Linear(matmul, torch.cat(biases) if biases else None)


def load_row_parallel(load: Loader, name: str, size: int, columns: range) -> RowParallel:
    """The IN features `columns` of a linear with `size` OUT features."""
    format_ = load.format_for(load.prefix + name)
    weight = read_weight(load.checkpoint, load.prefix, format_, [Part(name, (range(size),))], columns)
    matmul = format_.matmul(weight, Region((size,), columns, load.dtype), load.kernels)
    return RowParallel(matmul, load.tp, load.tensor(f"{name}.bias") if load.has(f"{name}.bias") else None)
