"""Products with quantized weights, each row's bits its own (see `proofs.py`).

A product is chosen for each weight: the first of `products` that has nothing against it. One product serves every
number of rows of a weight, since another one would give a row other bits.
"""

from __future__ import annotations

import logging
import re
from typing import Protocol

import torch
from torch import Tensor

from ..interface import Matmul
from ..weights import Float8, Integer, QuantizedWeight, Table
from .blocks import block_linear
from .linear import StableLinear
from .native.library import Library
from .native.linear import quantized_linear, why_not
from .proofs import Multiply, Proofs

logger = logging.getLogger(__name__)


class Product(Protocol):
    """A way to multiply with some quantized weights."""

    name: str

    def why_not(self, weight: QuantizedWeight, dtype: torch.dtype) -> str | None:
        """What speaks against it for this weight and activations of this dtype; None: nothing."""
        ...

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype, proofs: Proofs) -> Matmul:
        """Brings the weight into the product's own layout."""
        ...


class Gathered:
    """A product whose weight has its features in another order: the activations are brought into it first."""

    def __init__(self, matmul: Matmul, order: Tensor):
        self.matmul, self.order = matmul, order

    def __call__(self, x: Tensor) -> Tensor:
        return self.matmul(x.index_select(1, self.order))


def gathered(matmul: Matmul, weight: QuantizedWeight) -> Matmul:
    """`matmul`, of a weight by place, for activations in the order of the features."""
    return matmul if weight.order is None else Gathered(matmul, weight.order)


class Native:
    """Our own kernels (see `native/linear.h`): numbers are made in registers, or in a core's first cache for many rows.

    Every coding, any groups, any order of features; sums are in float32. Rows are independent by construction.
    """

    name = "native"

    def __init__(self, library: Library | None):
        self._library = library

    def why_not(self, weight: QuantizedWeight, dtype: torch.dtype) -> str | None:
        if self._library is None:
            return "not built"
        if dtype not in (torch.float32, torch.bfloat16):
            return f"activations are {dtype}".replace("torch.", "")
        if weight.device.type != "cpu":
            return f"the weight is on {weight.device}"
        if weight.coding == Float8("e4m3fn") and not weight.holds_only_numbers():
            return "some codes are not numbers"
        return why_not(self._library, weight.coding)

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype, proofs: Proofs) -> Matmul:
        assert self._library is not None
        return quantized_linear(self._library, weight, dtype)


class Int4Packed:
    """torch's own 4-bit product (`_weight_int4pack_mm_for_cpu`): numbers are made in registers.

    It computes (code - 8) * scale + zero in bfloat16 with sums in float32; with float32 activations it is slower than
    everything else. Groups that it does not know are split into ones that it does.
    """

    name = "int4 (torch)"
    GROUPS = (256, 128, 64, 32)
    OUT_MULTIPLE = 16

    def why_not(self, weight: QuantizedWeight, dtype: torch.dtype) -> str | None:
        if weight.coding != Integer(4):
            return f"codes are {_say(weight)}"
        if dtype != torch.bfloat16:
            return f"activations are {dtype}".replace("torch.", "")
        if isinstance(weight.groups, Tensor):
            return "groups begin at odd places"
        if weight.out_features % self.OUT_MULTIPLE:
            return f"{weight.out_features} OUT features are not a multiple of {self.OUT_MULTIPLE}"
        if self._group(weight) is None:
            return f"groups of {weight.groups} of {weight.in_features} features are not multiples of {self.GROUPS[-1]}"
        return None

    def _group(self, weight: QuantizedWeight) -> int | None:
        assert isinstance(weight.groups, int)
        return next((g for g in self.GROUPS if weight.groups % g == 0 and weight.in_features % g == 0), None)

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype, proofs: Proofs) -> Matmul:
        group = self._group(weight)
        assert group is not None and isinstance(weight.groups, int)
        codes = weight.codes().int()
        scales = weight.scales.float()
        zeros = torch.full_like(scales, 8) if weight.zeros is None else weight.zeros.float()
        scales_and_zeros = torch.stack((scales, (8 - zeros) * scales), -1).to(dtype)
        scales_and_zeros = scales_and_zeros.repeat_interleave(weight.groups // group, 1)
        scales_and_zeros = scales_and_zeros[:, : weight.in_features // group]
        multiply = self._multiply(codes, scales_and_zeros.transpose(0, 1).contiguous(), group)

        def probe(w: Tensor) -> Multiply:
            # Codes that cancel as the numbers of `cancelling` do: rounding is symmetric.
            codes = (torch.round(w.float() * 3) + 8).clamp_(1, 15).int()
            unscaled = torch.zeros(w.shape[1] // group, len(w), 2, dtype=dtype)
            unscaled[..., 0] = 1
            return self._multiply(codes, unscaled, group)

        kind = f"{self.name}, groups of {group}"
        splitter = proofs(kind, weight.in_features, weight.out_features, dtype, probe)
        return gathered(StableLinear(multiply, splitter), weight)

    @staticmethod
    def _multiply(codes: Tensor, scales_and_zeros: Tensor, group: int) -> Multiply:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        product = torch.ops.aten._weight_int4pack_mm_for_cpu.default
        return lambda x: product(x, packed, group, scales_and_zeros)


class Int8Packed:
    """torch's own 8-bit product (`_weight_int8pack_mm`) of a scale for each OUT feature and no zero points.

    It reads whole vectors: with other numbers of features it reads beyond the weight.
    """

    name = "int8 (torch)"
    IN_MULTIPLE, OUT_MULTIPLE = 32, 16

    def why_not(self, weight: QuantizedWeight, dtype: torch.dtype) -> str | None:
        if weight.coding != Integer(8):
            return f"codes are {_say(weight)}"
        if dtype != torch.bfloat16:
            return f"activations are {dtype}".replace("torch.", "")
        if weight.in_features % self.IN_MULTIPLE or weight.out_features % self.OUT_MULTIPLE:
            return (
                f"{weight.in_features} x {weight.out_features} features are not multiples of {self.IN_MULTIPLE} and "
                f"{self.OUT_MULTIPLE}"
            )
        if weight.scales.shape[1] != 1:
            return f"{weight.scales.shape[1]} groups in a row, not one"
        if weight.zeros is not None and bool((weight.zeros != 128).any()):
            return "zero points differ from 128"
        return None

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype, proofs: Proofs) -> Matmul:
        multiply = self._multiply((weight.codes() ^ 128).view(torch.int8), weight.scales[:, 0].to(dtype))

        def probe(w: Tensor) -> Multiply:
            return self._multiply(
                (w.float() * 30).round_().clamp_(-127, 127).to(torch.int8), torch.ones(len(w), dtype=dtype)
            )

        splitter = proofs(self.name, weight.in_features, weight.out_features, dtype, probe)
        return gathered(StableLinear(multiply, splitter), weight)

    @staticmethod
    def _multiply(weight: Tensor, scales: Tensor) -> Multiply:
        weight = weight.contiguous()
        return lambda x: torch._weight_int8pack_mm(x, weight, scales)


class Dequantized:
    """Blocks of OUT features are made into numbers, one after another, and multiplied. Serves every weight."""

    name = "dequantized blocks"

    def why_not(self, weight: QuantizedWeight, dtype: torch.dtype) -> str | None:
        return None

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype, proofs: Proofs) -> Matmul:
        # Where the processor has no bfloat16, numbers stay in float32, which is faster and nearer.
        native = dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        computed = dtype if native else torch.float32
        shape = (weight.out_features, weight.in_features)
        matmul = block_linear(lambda rows: weight.dequantize(rows).to(computed), shape, dtype, computed, proofs)
        return gathered(matmul, weight)


def products(library: Library | None) -> tuple[Product, ...]:
    """All of them, the best first. library: our own kernels, if they are built."""
    return (Native(library), Int4Packed(), Int8Packed(), Dequantized())


class QuantizedLinearFactory:
    """Chooses the product for each quantized weight."""

    def __init__(self, proofs: Proofs, library: Library | None) -> None:
        self._proofs, self._products = proofs, products(library)
        self._told: set[tuple[str, str]] = set()

    def __call__(self, weight: QuantizedWeight, dtype: torch.dtype, label: str) -> Matmul:
        against = []
        for product in self._products:
            reason = product.why_not(weight, dtype)
            if reason is None:
                break
            against.append(f"not {product.name}: {reason}")
        self._tell(label, weight, product.name, against)
        return product.prepare(weight, dtype, self._proofs)

    def _tell(self, label: str, weight: QuantizedWeight, product: str, against: list[str]) -> None:
        """Once for each kind of layer and product."""
        kind = (re.sub(r"\.\d+\.", ".*.", label), product)
        if kind not in self._told:
            self._told.add(kind)
            shape, reasons = f"{weight.in_features} x {weight.out_features}", "".join(f"; {text}" for text in against)
            logger.info("%s: %s, %s: %s%s", kind[0], shape, _say(weight), product, reasons)


def _say(weight: QuantizedWeight) -> str:
    groups = "odd groups" if isinstance(weight.groups, Tensor) else f"groups of {weight.groups}"
    order = "" if weight.order is None else ", reordered"
    match weight.coding:
        case Integer(bits):
            return f"{bits} bits in {groups}{order}"
        case Table():
            return f"4 bits by table in {groups}{order}"
        case Float8(kind):
            return f"float8 {kind} in {groups}{order}"
