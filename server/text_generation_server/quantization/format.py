"""What a weight looks like on disk, and the one routine that slices and merges it.

A linear layer maps IN features to OUT features. A checkpoint stores it as one or more tensors, and every dimension of
each of those runs along IN, along OUT, or along neither. A `TensorSpec` states that; with it, tensor parallelism and
the merging of q/k/v or gate/up are written once, here, for every format. A format is chosen per layer (`registry.py`),
says what is stored (`decode`, `specs`) and prepares the multiplication (`matmul`); it never sees a model or a rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..kernels.interface import Kernels, Matmul


class Stored(Protocol):
    """A tensor that can be read in part: a `LazyTensor`, or what a format decodes from some."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, ranges: Mapping[int, range] | None = None) -> Tensor: ...


class Along(Enum):
    """What a dimension of a stored tensor counts."""

    IN = auto()
    OUT = auto()
    NEITHER = auto()


class Axis(NamedTuple):
    """One dimension of a stored tensor; each of its elements covers `features` logical features."""

    along: Along
    features: int = 1


class Merge(Enum):
    """How tensors that do not run along OUT are combined when weights are merged."""

    SAME = auto()  # must be equal, one is kept (an index over IN)
    PER_PART = auto()  # one is kept for each part (a scale of the whole tensor)


@dataclass(frozen=True)
class TensorSpec:
    """One of the tensors that make up a weight: its name behind the layer's, its dimensions."""

    suffix: str
    axes: tuple[Axis, ...]
    merge: Merge = Merge.SAME

    def dim(self, along: Along) -> int | None:
        return next((i for i, axis in enumerate(self.axes) if axis.along is along), None)


@dataclass(frozen=True)
class Part:
    """Logical rows (OUT features) of the stored linear `name` that a rank owns."""

    name: str
    rows: tuple[range, ...]

    @property
    def size(self) -> int:
        return sum(len(r) for r in self.rows)


@dataclass(frozen=True)
class Region:
    """The part of a merged weight that a rank computes."""

    out_sizes: tuple[int, ...]  # OUT features of each part
    columns: range | None  # IN features; None: all
    dtype: torch.dtype  # of the activations


class WeightFormat(Protocol):
    """A way to store a linear layer's weight."""

    @property
    def specs(self) -> tuple[TensorSpec, ...]: ...

    def decode(self, stored: Mapping[str, Stored]) -> Mapping[str, Stored]:
        """From the tensors on disk, by suffix, to those that `specs` describes. Reads nothing by itself."""
        ...

    def matmul(self, tensors: Mapping[str, Tensor], region: Region, kernels: Kernels) -> Matmul:
        """Brings a weight that was sliced and merged into the layout of the kernel that multiplies it."""
        ...


class Source(Protocol):
    """Where stored tensors come from, by full name."""

    def __contains__(self, name: str) -> bool: ...

    def __getitem__(self, name: str) -> Stored: ...


def read_weight(
    source: Source, prefix: str, format_: WeightFormat, parts: Sequence[Part], columns: range | None = None
) -> dict[str, Tensor]:
    """Reads the rows of `parts`, and only the IN features `columns`, merged along OUT.

    Raises:
        CheckpointError: a tensor is missing, or a boundary falls inside an element that covers several features.
    """
    decoded = []
    for part in parts:
        names = {spec.suffix: f"{prefix}{part.name}.{spec.suffix}" for spec in format_.specs}
        decoded.append(format_.decode({suffix: source[name] for suffix, name in names.items()}))
    weight = {}
    for spec in format_.specs:
        pieces = [_read_part(spec, d[spec.suffix], p, columns) for d, p in zip(decoded, parts, strict=True)]
        weight[spec.suffix] = _merge(spec, pieces, parts)
    return weight


def _read_part(spec: TensorSpec, stored: Stored, part: Part, columns: range | None) -> Tensor:
    cut: dict[int, range] = {}
    if columns is not None and (dim := spec.dim(Along.IN)) is not None:
        cut[dim] = _elements(spec, part.name, stored.shape[dim], dim, columns)
    out = spec.dim(Along.OUT)
    if out is None:
        return stored.read(cut)
    pieces = [stored.read(cut | {out: _elements(spec, part.name, stored.shape[out], out, r)}) for r in part.rows]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, out)


def _elements(spec: TensorSpec, name: str, stored_size: int, dim: int, features: range) -> range:
    """The stored elements that hold `features` along `dim`."""
    per = spec.axes[dim].features
    if features.start % per or (features.stop % per and features.stop != stored_size * per):
        raise CheckpointError(
            f"{name}.{spec.suffix}: features {features.start} to {features.stop} cut through an element of {per}; "
            "use fewer shards"
        )
    return range(features.start // per, -(-features.stop // per))


def _merge(spec: TensorSpec, pieces: list[Tensor], parts: Sequence[Part]) -> Tensor:
    if (dim := spec.dim(Along.OUT)) is not None:
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
    if spec.merge is Merge.PER_PART:
        return torch.stack(pieces)
    if any(not torch.equal(piece, pieces[0]) for piece in pieces):
        raise CheckpointError(f"{', '.join(p.name for p in parts)}: {spec.suffix} differs, so they cannot be merged")
    return pieces[0]
