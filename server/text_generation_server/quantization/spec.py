"""What the tensors of a stored linear look like: the declarations. Never imports torch.

A linear layer maps IN features to OUT features. A checkpoint stores it as one or more tensors, and every dimension of
each of those runs along IN, along OUT, along the matrix flattened row by row, or along neither. A `TensorSpec` states
that; from it follow the shape that a header must show (`planning.py`) and the elements that hold any part of the layer
(`read.py`), so tensor parallelism is written once for every format.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple


class Shape(NamedTuple):
    """Features of a whole linear, over all ranks."""

    out: int
    in_: int


class Along(Enum):
    """What a dimension of a stored tensor counts."""

    IN = auto()
    OUT = auto()
    FLAT = auto()  # OUT * IN values, row after row
    NEITHER = auto()


ANY = -1  # elements of a dimension along NEITHER whose size says nothing


class Axis(NamedTuple):
    """One dimension of a stored tensor: every `features` logical features, the last padded, in `elements` elements.

    3-bit GPTQ: 32 features in 3 words. A dimension along NEITHER has `elements` elements, or `ANY`. Where values can
    only be made from more than the wanted ones, reads are widened to multiples of `reach` features, as far as they go.
    """

    along: Along
    features: int = 1
    elements: int = 1
    reach: int = 1

    def size(self, shape: Shape) -> int:
        """How many elements the dimension has for a linear of this shape."""
        if self.along is Along.NEITHER:
            return self.elements
        return -(-_extent(self.along, shape) // self.features) * self.elements

    def cover(self, features: range, shape: Shape) -> tuple[range, int]:
        """The elements that hold `features`, widened to whole granules, and the first feature that they hold."""
        step = math.lcm(self.features, self.reach)
        start = features.start // step * step
        stop = min(-(-features.stop // step) * step, _extent(self.along, shape))
        first, last = start // self.features, -(-stop // self.features)
        return range(first * self.elements, last * self.elements), start


@dataclass(frozen=True)
class TensorSpec:
    """One of the tensors that make up a weight: its name behind the layer's, its dimensions, its safetensors dtypes."""

    suffix: str
    axes: tuple[Axis, ...]
    dtypes: tuple[str, ...]
    optional: bool = False
    other_axes: tuple[tuple[Axis, ...], ...] = ()  # other numbers of dimensions that files may give it
    is_read: bool = True  # False: files may have it, and nothing is made of it

    def shape(self, shape: Shape, found: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """The shape of the tensor of a linear with these features.

        found: what a file has; decides between numbers of dimensions and says the size of one that may be any.
        """
        if found is None or len(found) != len(axes := self.axes_of(len(found))):
            return tuple(axis.size(shape) for axis in self.axes)
        return tuple(size if axis.elements == ANY else axis.size(shape) for axis, size in zip(axes, found, strict=True))

    def axes_of(self, num_dimensions: int) -> tuple[Axis, ...]:
        """The axes of a stored tensor with so many dimensions; the usual ones if it may not have so many."""
        return next((axes for axes in self.other_axes if len(axes) == num_dimensions), self.axes)


FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Cut:
    """The part of a stored linear that is wanted: some OUT features, some IN features."""

    shape: Shape
    rows: range
    columns: range

    def along(self, along: Along) -> range:
        """The wanted positions of one axis. Along the flattened matrix: those of whole rows."""
        match along:
            case Along.OUT:
                return self.rows
            case Along.IN:
                return self.columns
            case Along.FLAT:
                return range(self.rows.start * self.shape.in_, self.rows.stop * self.shape.in_)
            case Along.NEITHER:
                raise AssertionError("an axis along neither is read whole")


def whole(shape: Shape) -> Cut:
    """All of a linear."""
    return Cut(shape, range(shape.out), range(shape.in_))


def held_bytes(shape: Shape, bits: int, scale_groups: int, scale_bytes: int, zero_bytes: int = 0) -> int:
    """Memory of a quantized matrix: packed codes of `bits`, and for every row and group a scale and a zero point."""
    return shape.out * (-(-shape.in_ * bits // 8) + scale_groups * (scale_bytes + zero_bytes))


def _extent(along: Along, shape: Shape) -> int:
    return {Along.IN: shape.in_, Along.OUT: shape.out, Along.FLAT: shape.out * shape.in_}[along]
