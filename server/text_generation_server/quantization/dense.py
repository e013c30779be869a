"""Weights stored as they are: one tensor [out, in]."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..kernels.interface import Kernels, Matmul
from .format import Along, Axis, Region, Stored, TensorSpec


@dataclass(frozen=True)
class Dense:
    """float32, float16 or bfloat16, converted to the dtype that is computed in."""

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec("weight", (Axis(Along.OUT), Axis(Along.IN))),)

    def decode(self, stored: Mapping[str, Stored]) -> Mapping[str, Stored]:
        return stored

    def matmul(self, tensors: Mapping[str, Tensor], region: Region, kernels: Kernels) -> Matmul:
        return kernels.linear(tensors["weight"].to(kernels.device, region.dtype))
