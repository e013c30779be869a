"""Weights stored as they are: one tensor [out, in]."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .format import Piece
from .spec import FLOATS, Along, Axis, Cut, Shape, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Dense:
    """float32, float16 or bfloat16, converted to the dtype that is computed in."""

    name = "not quantized"

    def specs(self, shape: Shape) -> tuple[TensorSpec, ...]:
        return (TensorSpec("weight", (Axis(Along.OUT), Axis(Along.IN)), FLOATS),)

    def decode(self, pieces: Mapping[str, Piece], cut: Cut) -> Tensor:
        return pieces["weight"].tensor

    def held_bytes(self, shape: Shape, dtype_bytes: int) -> int:
        return shape.out * shape.in_ * dtype_bytes
