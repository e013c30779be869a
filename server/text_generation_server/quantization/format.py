"""What a way to store weights must answer: which tensors there are, and what they mean. Never imports torch itself.

A format is chosen for each layer (`config.py`). It declares the stored tensors (`specs`) and turns what was read of
them into codes, scales and zero points (`decode`); it never sees a model, a rank or a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from .spec import Cut, Shape, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from ..kernels.weights import Coding


class Stored(Protocol):
    """A tensor that can be read in part."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def where(self) -> str:
        """File and name, for messages."""
        ...

    def read(self, ranges: Mapping[int, range] | None = None) -> Tensor: ...


class Source(Protocol):
    """Where stored tensors come from, by full name."""

    def __contains__(self, name: str) -> bool: ...

    def __getitem__(self, name: str) -> Stored: ...


class Piece(NamedTuple):
    """What was read of one stored tensor."""

    tensor: Tensor
    first: tuple[int, ...]  # the first feature (or flattened value) that each dimension covers; 0 along neither
    where: str


class Decoded(NamedTuple):
    """A cut of a quantized matrix. Rows and columns are those of the cut, and nothing else."""

    coding: Coding
    codes: Tensor  # uint8, as `kernels.codes.pack` lays out [rows, columns], with any bits behind the last
    scales: Tensor  # [rows, groups], a floating dtype of at most 32 bits, finite
    zeros: Tensor | None  # uint8 [rows, groups], of `Integer` codes; None: 2 ** (bits - 1)
    group_of: Tensor  # int64 [columns]: which column of `scales` belongs to each IN feature
    outlier_threshold: float = 0.0  # see `QuantizedWeight`


class WeightFormat(Protocol):
    """A way to store a linear layer's weight. Formats are values: equal ones store alike."""

    @property
    def name(self) -> str:
        """What it is, in a few words, for logs: `gptq 4 bits, groups of 128`."""
        ...

    def specs(self, shape: Shape) -> tuple[TensorSpec, ...]:
        """The stored tensors of a linear of this shape.

        Raises:
            CheckpointError: no linear of this shape can be stored so.
        """
        ...

    def decode(self, pieces: Mapping[str, Piece], cut: Cut) -> Decoded | Tensor:
        """From what was read of the tensors, by suffix, to the cut. Pieces hold the cut widened to whole granules.

        A Tensor is a weight that is not quantized, floating [rows, columns]; `Dense` alone gives it.

        Raises:
            CheckpointError: the tensors hold something that the format does not allow.
        """
        ...

    def held_bytes(self, shape: Shape, dtype_bytes: int) -> int:
        """Memory that the weight takes once loaded. dtype_bytes: of an element of the activations."""
        ...


@dataclass(frozen=True)
class StoredLinear:
    """How the checkpoint stores one linear."""

    shape: Shape
    format: WeightFormat


@dataclass(frozen=True)
class Part:
    """Logical rows (OUT features) of the stored linear `name` that a rank owns."""

    name: str
    rows: tuple[range, ...]

    @property
    def size(self) -> int:
        return sum(len(r) for r in self.rows)


LinearOf = Callable[[str], StoredLinear]
