"""compressed-tensors, format `pack-quantized`: integer weights of 2, 3, 4 or 8 bits beside floating activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import CheckpointError
from .format import Decoded, Piece
from .spec import FLOATS, Along, Axis, Cut, Shape, TensorSpec, held_bytes

if TYPE_CHECKING:
    from torch import Tensor

BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class PackQuantized:
    """Codes in int32 words along IN, zero points in words along OUT, both as value + 2 ** (bits - 1).

    group_size: -1: one scale for each row (strategy `channel`).
    symmetric: there are no zero points.

    reordered: actorder `group`: `weight_g_idx` names the group of every feature. Without it groups follow each other.
    """

    bits: int
    group_size: int
    symmetric: bool
    reordered: bool = False

    @property
    def name(self) -> str:
        group = "one group" if self.group_size == -1 else f"groups of {self.group_size}"
        asymmetric, order = "" if self.symmetric else ", asymmetric", ", act-order" if self.reordered else ""
        return f"pack-quantized int{self.bits}, {group}{asymmetric}{order}"

    def specs(self, shape: Shape) -> tuple[TensorSpec, ...]:
        self._check(shape)
        features, words = (32, 3) if self.bits == 3 else (32 // self.bits, 1)
        groups = Axis(Along.NEITHER, elements=shape.in_ // self._size(shape))
        specs = (
            TensorSpec("weight_packed", (Axis(Along.OUT), Axis(Along.IN, features, words)), ("I32",)),
            TensorSpec("weight_scale", (Axis(Along.OUT), groups), FLOATS),
            TensorSpec("weight_shape", (Axis(Along.NEITHER, elements=2),), ("I64", "I32")),
            TensorSpec("weight_g_idx", (Axis(Along.IN),), ("I32", "I64"), optional=not self.reordered),
        )
        if self.symmetric:
            return specs
        return (*specs, TensorSpec("weight_zero_point", (Axis(Along.OUT, features, words), groups), ("I32",)))

    def decode(self, pieces: Mapping[str, Piece], cut: Cut) -> Decoded:
        from ..kernels.weights import Integer
        from .unpack import check_finite, codes_of_words

        shape = pieces["weight_shape"]
        if tuple(shape.tensor.tolist()) != cut.shape:
            raise CheckpointError(f"{shape.where} is {shape.tensor.tolist()}; expected {list(cut.shape)}")
        words, scales = pieces["weight_packed"], pieces["weight_scale"]
        first = cut.columns.start - words.first[1]
        codes = codes_of_words(words.tensor, self.bits, range(first, first + len(cut.columns)))
        check_finite(scales.tensor, scales.where)
        zeros = None if self.symmetric else self._zeros(pieces["weight_zero_point"], cut)
        return Decoded(Integer(self.bits), codes, scales.tensor, zeros, self._groups(pieces, cut))

    def held_bytes(self, shape: Shape, dtype_bytes: int) -> int:
        groups = -(-shape.in_ // self._size(shape))
        return held_bytes(shape, self.bits, groups, scale_bytes=2, zero_bytes=0 if self.symmetric else 1)

    def _zeros(self, stored: Piece, cut: Cut) -> Tensor:
        """uint8 [rows, groups]."""
        from .unpack import unpack_words

        first = cut.rows.start - stored.first[0]
        return unpack_words(stored.tensor.T, self.bits)[:, first : first + len(cut.rows)].T

    def _groups(self, pieces: Mapping[str, Piece], cut: Cut) -> Tensor:
        """int64 [columns]."""
        from .unpack import groups_in_order, read_group_index

        size = self._size(cut.shape)
        if "weight_g_idx" not in pieces:
            return groups_in_order(cut.columns, size)
        index = pieces["weight_g_idx"]
        return read_group_index(index.tensor, cut.shape.in_ // size, index.where)

    def _size(self, shape: Shape) -> int:
        return shape.in_ if self.group_size == -1 else self.group_size

    def _check(self, shape: Shape) -> None:
        linear = f"a linear of {shape.in_} to {shape.out}"
        if self.bits not in BITS:
            raise CheckpointError(f"pack-quantized with {self.bits} bits is not served; expected one of {BITS}")
        if self.group_size != -1 and self.group_size < 1:
            raise CheckpointError(f"pack-quantized with groups of {self.group_size}; expected -1 or a positive number")
        if shape.in_ % self._size(shape):
            raise CheckpointError(
                f"pack-quantized has whole groups only; found {linear}, whose groups are of {self.group_size}"
            )
        if self.bits == 3 and (shape.in_ % 32 or (shape.out % 32 and not self.symmetric)):
            raise CheckpointError(f"pack-quantized with 3 bits: expected multiples of 32 features, found {linear}")
