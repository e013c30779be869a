"""What a layer needs in order to build itself: the checkpoint, the weight formats, the kernels, its rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from .errors import ConfigError
from .kernels.interface import Exchange, Kernels, Matmul, Sums
from .kernels.weights import DenseRows
from .quantization.read import open_weight

if TYPE_CHECKING:
    from .checkpoint.tensors import Checkpoint
    from .quantization.format import LinearOf, Part


class Collectives(Sums, Protocol):
    """What ranks may ask of each other. Every rank makes the same calls in the same order.

    The object lives as long as the model; the group behind it is a new one for each epoch. An operation on a group
    that broke raises. Sums are added in rank order, so that their bits do not depend on the number of rows.
    """

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        """The tensors of all ranks concatenated along `dim`, on every rank. All have the same shape."""
        ...

    def gather_to_first(self, x: Tensor) -> Tensor | None:
        """As `all_gather` along the last axis, on rank 0; None on the others."""
        ...


class Alone:
    """Collectives of a group of one: every operation is the identity."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def exchange(self) -> Exchange | None:
        return None

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        return x

    def gather_to_first(self, x: Tensor) -> Tensor | None:
        return x


@dataclass(frozen=True)
class TensorParallel:
    """Who this rank is, and how it reaches the others."""

    rank: int
    size: int
    collectives: Collectives

    def share(self, total: int) -> range:
        """The contiguous part of range(total) that this rank owns."""
        if total % self.size:
            raise ConfigError(f"{total} does not divide over {self.size} shards")
        part = total // self.size
        return range(self.rank * part, (self.rank + 1) * part)

    def share_evenly(self, total: int) -> range:
        """As `share`, but ranks own one more or less where `total` does not divide."""
        return range(total * self.rank // self.size, total * (self.rank + 1) // self.size)

    def share_unevenly(self, total: int) -> range:
        """As `share`, but the last ranks own fewer, or nothing, where `total` does not divide."""
        part = -(-total // self.size)
        return range(min(self.rank * part, total), min((self.rank + 1) * part, total))


@dataclass(frozen=True)
class Loader:
    """The place of one module in the checkpoint, and everything its layers are made with."""

    checkpoint: Checkpoint
    linear_of: LinearOf  # how the checkpoint stores the linear of a name
    tp: TensorParallel
    kernels: Kernels
    dtype: torch.dtype
    hidden_size: int
    prefix: str = ""

    def __truediv__(self, name: str | int) -> Loader:
        """The loader of the submodule `name`, like a path."""
        return replace(self, prefix=f"{self.prefix}{name}.")

    def has(self, name: str) -> bool:
        return self.prefix + name in self.checkpoint

    def tensor(self, name: str, rows: range | None = None) -> Tensor:
        """A tensor that no format packs (norm, bias, embedding), or some of its rows, in the dtype of the model."""
        lazy = self.checkpoint[self.prefix + name]
        if len(lazy.shape) != 2:
            part = lazy.read() if rows is None else lazy.read({0: rows})
            return part.to(self.kernels.device, self.dtype)
        first, stop = (0, lazy.shape[0]) if rows is None else (rows.start, rows.stop)

        def read(wanted: range) -> Tensor:
            return lazy.read({0: range(first + wanted.start, first + wanted.stop)}).to(self.dtype)

        return DenseRows(stop - first, lazy.shape[1], self.dtype, read).whole(self.kernels.device)

    def tensor_or_zeros(self, name: str, rows: range) -> Tensor:
        """Some elements of a vector; zeros if the checkpoint has none of that name."""
        if self.has(name):
            return self.tensor(name, rows)
        return torch.zeros(len(rows), dtype=self.dtype, device=self.kernels.device)

    def matmul(self, parts: Sequence[Part], columns: range | None = None) -> Matmul:
        """The product with the rows of the linears `parts` in order, and only the IN features `columns` (None: all).

        The parts are one matrix as far as they are stored alike.
        """
        linears = [(part, self.linear_of(self.prefix + part.name)) for part in parts]
        weights = open_weight(self.checkpoint, self.prefix, linears, columns, self.dtype)
        matmuls = []
        while weights:
            weight = weights.pop(0)
            if isinstance(weight, DenseRows):
                matmuls.append(self.kernels.linear(weight))
            else:
                label = self.prefix + "+".join(part.name for part in parts)
                matmuls.append(self.kernels.quantized_linear(weight.to(self.kernels.device), self.dtype, label))
        return matmuls[0] if len(matmuls) == 1 else SideBySide(matmuls)


class SideBySide:
    """Matrices that cannot be one, such as q, k and v of different bits: their results follow each other along OUT."""

    def __init__(self, matmuls: Sequence[Matmul]):
        self.matmuls = matmuls

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([matmul(x) for matmul in self.matmuls], -1)
