"""Products with quantized weights, each row's bits its own (see `proofs.py`).

A product is chosen for each weight: the first of `PRODUCTS` that has nothing against it. One product serves every
number of rows of a weight, since another one would give a row other bits.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..interface import Matmul
from ..weights import Float8, Integer, QuantizedWeight, Table
from .linear import Multiply, StableLinear
from .proofs import BASE_ROWS, MAX_PRODUCT, ROW_COUNTS, RowSplitter, cancelling, proven_row_counts

logger = logging.getLogger(__name__)

# Values of a block of rows that are made into numbers at once: enough that starting an operation costs nothing, and
# few enough that they stay in a core's own cache.
BLOCK_VALUES = 1 << 19


class Product(Protocol):
    """A way to multiply with some quantized weights."""

    name: str

    def why_not(self, weight: QuantizedWeight, dtype: torch.dtype) -> str | None:
        """What speaks against it for this weight and activations of this dtype; None: nothing."""
        ...

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype, row_counts: RowCounts) -> Matmul:
        """Brings the weight into the product's own layout."""
        ...


# Proves, once for a key, at which numbers of rows a product of so many IN and OUT features is stable.
RowCounts = Callable[[object, int, int, Callable[[Tensor], Multiply], torch.dtype], tuple[int, ...]]


class Gathered:
    """A product whose weight has its features in another order: the activations are brought into it first."""

    def __init__(self, matmul: Matmul, order: Tensor):
        self.matmul, self.order = matmul, order

    def __call__(self, x: Tensor) -> Tensor:
        return self.matmul(x.index_select(1, self.order))


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

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype, row_counts: RowCounts) -> Matmul:
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
            codes = (torch.round(w * 3) + 8).clamp_(1, 15).int()
            unscaled = torch.zeros(w.shape[1] // group, len(w), 2, dtype=dtype)
            unscaled[..., 0] = 1
            return self._multiply(codes, unscaled, group)

        key = (self.name, group)
        counts = row_counts(key, weight.in_features, weight.out_features, probe, dtype)
        return StableLinear(multiply, RowSplitter(counts), counts)

    @staticmethod
    def _multiply(codes: Tensor, scales_and_zeros: Tensor, group: int) -> Multiply:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        product = torch.ops.aten._weight_int4pack_mm_for_cpu.default
        return lambda x: product(x, packed, group, scales_and_zeros)


class Int8Packed:
    """torch's own 8-bit product (`_weight_int8pack_mm`) of a scale for each OUT feature and no zero points."""

    name = "int8 (torch)"

    def why_not(self, weight: QuantizedWeight, dtype: torch.dtype) -> str | None:
        if weight.coding != Integer(8):
            return f"codes are {_say(weight)}"
        if dtype != torch.bfloat16:
            return f"activations are {dtype}".replace("torch.", "")
        if weight.scales.shape[1] != 1:
            return f"{weight.scales.shape[1]} groups in a row, not one"
        if weight.zeros is not None and bool((weight.zeros != 128).any()):
            return "zero points differ from 128"
        return None

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype, row_counts: RowCounts) -> Matmul:
        multiply = self._multiply((weight.codes() ^ 128).view(torch.int8), weight.scales[:, 0].to(dtype))

        def probe(w: Tensor) -> Multiply:
            return self._multiply((w * 30).round_().clamp_(-127, 127).to(torch.int8), torch.ones(len(w), dtype=dtype))

        counts = row_counts(self.name, weight.in_features, weight.out_features, probe, dtype)
        return StableLinear(multiply, RowSplitter(counts), counts)

    @staticmethod
    def _multiply(weight: Tensor, scales: Tensor) -> Multiply:
        weight = weight.contiguous()
        return lambda x: torch._weight_int8pack_mm(x, weight, scales)


class Dequantized:
    """Blocks of OUT features are made into numbers, one after another, and multiplied. Serves every weight."""

    name = "dequantized blocks"

    def why_not(self, weight: QuantizedWeight, dtype: torch.dtype) -> str | None:
        return None

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype, row_counts: RowCounts) -> Matmul:
        # Where the processor has no bfloat16, numbers stay in float32, which is faster and nearer.
        native = dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        computed = dtype if native else torch.float32
        block = max(16, min(BLOCK_VALUES // weight.in_features, weight.out_features + 15) // 16 * 16)

        def probe(w: Tensor) -> Multiply:
            w = w.to(computed)
            return lambda x: F.linear(x, w)

        counts = row_counts(self.name, weight.in_features, block, probe, computed)
        return DequantizedLinear(weight, block, dtype, computed, RowSplitter(counts))


class DequantizedLinear:
    """y = x W.T, the rows of W made into numbers block by block."""

    def __init__(
        self, weight: QuantizedWeight, block: int, dtype: torch.dtype, computed: torch.dtype, splitter: RowSplitter
    ):
        self.weight, self.block, self.dtype, self.computed, self.splitter = weight, block, dtype, computed, splitter

    def __call__(self, x: Tensor) -> Tensor:
        rows, out = len(x), self.weight.out_features
        pieces = self.splitter.split(rows)
        x = F.pad(x.to(self.computed), (0, 0, 0, sum(pieces) - rows))
        inputs = torch.split(x, pieces)
        y = torch.empty(rows, out, dtype=self.dtype)
        for first in range(0, out, self.block):
            weight = self.weight.dequantize(slice(first, first + self.block)).to(self.computed)
            wanted = len(weight)
            # The last block is filled up: another number of columns may mean another order of sums.
            weight = F.pad(weight, (0, 0, 0, self.block - wanted)) if wanted < self.block else weight
            products = [F.linear(piece, weight) for piece in inputs]
            product = products[0] if len(products) == 1 else torch.cat(products)
            y[:, first : first + wanted] = product[:rows, :wanted]
        return y


PRODUCTS: tuple[Product, ...] = (Int4Packed(), Int8Packed(), Dequantized())


class QuantizedLinearFactory:
    """Chooses the product for each weight; what was proven of a shape is remembered."""

    def __init__(self) -> None:
        self.row_stable = True
        self._counts: dict[tuple[object, int, int, torch.dtype, int], tuple[int, ...]] = {}
        self._told: set[tuple[str, str]] = set()

    def __call__(self, weight: QuantizedWeight, dtype: torch.dtype, label: str) -> Matmul:
        against = []
        for product in PRODUCTS:
            reason = product.why_not(weight, dtype)
            if reason is None:
                break
            against.append(f"not {product.name}: {reason}")
        self._tell(label, weight, product.name, against)
        matmul = product.prepare(weight, dtype, self._row_counts)
        return matmul if weight.order is None else Gathered(matmul, weight.order)

    def _tell(self, label: str, weight: QuantizedWeight, product: str, against: list[str]) -> None:
        """Once for each kind of layer and product."""
        kind = (re.sub(r"\.\d+\.", ".*.", label), product)
        if kind not in self._told:
            self._told.add(kind)
            shape, reasons = f"{weight.in_features} x {weight.out_features}", "".join(f"; {text}" for text in against)
            logger.info("%s: %s, %s: %s%s", kind[0], shape, _say(weight), product, reasons)

    def _row_counts(
        self, key: object, in_: int, out: int, probe: Callable[[Tensor], Multiply], dtype: torch.dtype
    ) -> tuple[int, ...]:
        """At which numbers of rows a product is stable."""
        full_key = (key, in_, out, dtype, torch.get_num_threads())
        if full_key not in self._counts:
            most = max(4 * BASE_ROWS, max((c for c in ROW_COUNTS if c * in_ * out <= MAX_PRODUCT), default=0))
            x, w = cancelling(most, in_, out)
            counts = proven_row_counts(probe(w), x.to(dtype))
            if not counts:
                self.row_stable, counts = False, (BASE_ROWS,)
                logger.warning("%s, %d x %d: rows influence each other; replay is not exact", key, in_, out)
            logger.info("%s, %d x %d %s: proven at rows %s", key, in_, out, dtype, list(counts))
            self._counts[full_key] = counts
        return self._counts[full_key]


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
