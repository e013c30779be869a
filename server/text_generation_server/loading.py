"""What a layer needs in order to build itself: the checkpoint, the weight formats, the kernels, its rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from .errors import ConfigError
from .kernels.interface import Kernels

if TYPE_CHECKING:
    from .checkpoint.tensors import Checkpoint
    from .quantization.format import WeightFormat


class Collectives(Protocol):
    """What ranks may ask of each other. Every rank makes the same calls in the same order.

    The object lives as long as the model; the group behind it is a new one for each epoch. An operation on a group
    that broke raises. Sums are added in rank order, so that their bits do not depend on the number of rows.
    """

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, on every rank. May overwrite and return `x`."""
        ...

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

    def share_unevenly(self, total: int) -> range:
        """As `share`, but the last ranks own fewer, or nothing, where `total` does not divide."""
        part = -(-total // self.size)
        return range(min(self.rank * part, total), min((self.rank + 1) * part, total))

    def share_kv_heads(self, num_kv_heads: int) -> range:
        """As `share`, but ranks have a head in common where there are fewer heads than ranks."""
        if num_kv_heads >= self.size:
            return self.share(num_kv_heads)
        head = self.rank * num_kv_heads // self.size
        return range(head, head + 1)


@dataclass(frozen=True)
class Loader:
    """The place of one module in the checkpoint, and everything its layers are made with."""

    checkpoint: Checkpoint
    format_for: Callable[[str], WeightFormat]
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
        part = lazy.read() if rows is None else lazy.read({0: rows})
        return part.to(self.kernels.device, self.dtype)
