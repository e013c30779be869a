"""Tensor-parallel linear layers. They know ranks and collectives; not formats, not kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.interface import Matmul
from ..loading import Loader, TensorParallel
from ..quantization.format import Part


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
    """One linear computing the rows of `parts` (q, k, v; or gate, up) in order."""
    if not any(load.has(f"{p.name}.bias") for p in parts):
        return Linear(load.matmul(parts), None)
    biases = [load.tensor_or_zeros(f"{p.name}.bias", r) for p in parts for r in p.rows]
    return Linear(load.matmul(parts), torch.cat(biases))


def load_row_parallel(load: Loader, name: str, size: int, columns: range) -> RowParallel:
    """The IN features `columns` of a linear with `size` OUT features."""
    matmul = load.matmul([Part(name, (range(size),))], columns)
    return RowParallel(matmul, load.tp, load.tensor(f"{name}.bias") if load.has(f"{name}.bias") else None)
