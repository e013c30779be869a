"""A matrix before a matmul makes its own layout of it: one form for every checkpoint format.

Quantized, w[o, i] = (value(code[o, i]) - zero[o, g(i)]) * scale[o, g(i)], where g(i) is the group of IN feature i.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .codes import unpack


@dataclass(frozen=True)
class Integer:
    """An unsigned code is a number. Without zero points of its own a matrix has 2 ** (bits - 1)."""

    bits: int


@dataclass(frozen=True)
class Table:
    """A 4-bit code is a place in a table of 16 numbers (nf4, fp4)."""

    values: tuple[float, ...]
    bits: int = 4


@dataclass(frozen=True)
class Float8:
    """A code is an 8-bit float: e4m3fn or e5m2."""

    kind: str
    bits: int = 8


Coding = Integer | Table | Float8


# Of a dense matrix, values that are read at once where all of it is wanted.
READ_VALUES = 1 << 22


@dataclass(frozen=True)
class DenseRows:
    """A matrix [out, in] of numbers whose rows are read when they are asked for: it need not exist as a whole.

    read: some rows, [rows, in] of `dtype`, on the host.
    """

    out_features: int
    in_features: int
    dtype: torch.dtype
    read: Callable[[range], Tensor]

    @classmethod
    def of(cls, weight: Tensor) -> DenseRows:
        """weight: [out, in], which is there already."""
        return cls(weight.shape[0], weight.shape[1], weight.dtype, lambda rows: weight[rows.start : rows.stop])

    def whole(self, device: torch.device | None = None) -> Tensor:
        """[out, in] on the device (None: the host)."""
        rows = max(1, READ_VALUES // max(1, self.in_features))
        if rows >= self.out_features:
            return self.read(range(self.out_features)).to(device or "cpu")
        weight = torch.empty(self.out_features, self.in_features, dtype=self.dtype, device=device)
        for first in range(0, self.out_features, rows):
            chunk = range(first, min(first + rows, self.out_features))
            weight[chunk.start : chunk.stop] = self.read(chunk)
        return weight


def as_tensor(weight: Tensor | DenseRows, device: torch.device) -> Tensor:
    """All of a dense matrix, on the device."""
    return weight.whole(device) if isinstance(weight, DenseRows) else weight.to(device)


def follow(matrices: Sequence[DenseRows]) -> DenseRows:
    """Dense matrices of as many IN features and one dtype, one after another along OUT."""
    if len(matrices) == 1:
        return matrices[0]

    def read(rows: range) -> Tensor:
        parts, first = [], 0
        for matrix in matrices:
            part = range(max(rows.start - first, 0), min(rows.stop - first, matrix.out_features))
            if part:
                parts.append(matrix.read(part))
            first += matrix.out_features
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return DenseRows(sum(m.out_features for m in matrices), matrices[0].in_features, matrices[0].dtype, read)


@dataclass(frozen=True)
class QuantizedWeight:
    """[out, in] in a few bits per element.

    packed: codes by row, as `pack` lays them out; bits behind the last of a row may be anything.
    scales: [out, groups] float32, float16 or bfloat16.
    zeros:  [out, groups] uint8, of `Integer` only; None: 2 ** (bits - 1).
    groups: features in each group (the last may have fewer), or int64 [in], the group of every place.
    order:  int64 [in], the IN feature at each place; None: features are in their own order.
    outlier_threshold: activations of at least this size are multiplied as they are, besides those that stand out of
        their block, by a product that rounds others to 8 bits (LLM.int8, Dettmers et al. 2022, arXiv:2208.07339, for
        each row by itself); 0: no such number.
    """

    coding: Coding
    in_features: int
    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    groups: int | Tensor
    order: Tensor | None
    outlier_threshold: float = 0.0

    @property
    def out_features(self) -> int:
        return len(self.scales)

    @property
    def device(self) -> torch.device:
        return self.scales.device

    def to(self, device: torch.device) -> QuantizedWeight:
        """The same on another device."""

        def move(value: Tensor) -> Tensor:
            return value.to(device)

        return replace(
            self,
            packed=move(self.packed),
            scales=move(self.scales),
            zeros=None if self.zeros is None else move(self.zeros),
            groups=move(self.groups) if isinstance(self.groups, Tensor) else self.groups,
            order=None if self.order is None else move(self.order),
        )

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        parts = (self.packed, self.scales, self.zeros, self.order, self.groups)
        return sum(t.numel() * t.element_size() for t in parts if isinstance(t, Tensor))

    @cached_property
    def _table(self) -> Tensor:
        """float32: the number of every code of a `Table` or `Float8`."""
        match self.coding:
            case Table(values):
                return torch.tensor(values, dtype=torch.float32, device=self.device)
            case Float8(kind):
                return torch.arange(256, dtype=torch.uint8, device=self.device).view(FLOAT8[kind]).float()
            case Integer():
                raise AssertionError("an integer code is its own number")

    def codes(self, rows: slice = slice(None)) -> Tensor:
        """Of some rows, one to a byte: uint8 [rows, in], by place."""
        return unpack(self.packed[rows], self.coding.bits, self.in_features)

    def holds_only_numbers(self) -> bool:
        """Whether no code of a `Float8` stands for NaN or infinity."""
        assert isinstance(self.coding, Float8)
        least = FLOAT8_NOT_FINITE[self.coding.kind]
        # Some rows at a time: what is found of them stays in a cache.
        rows = max(1, READ_VALUES // 4 // max(1, self.packed.shape[1]))
        return not any(bool((part & 0x7F >= least).any()) for part in torch.split(self.packed, rows))

    def dequantize(self, rows: slice = slice(None)) -> Tensor:
        """Some rows as float32 [rows, in], by place (see `order`)."""
        codes = self.codes(rows)
        if isinstance(self.coding, Integer):
            values = codes.float()
        else:
            # Several times faster than indexing with a tensor, or than torch's conversion of 8-bit floats.
            values = self._table.index_select(0, codes.view(-1).int()).view(codes.shape)
        scales = self.scales[rows].float()
        if isinstance(self.groups, Tensor):
            values -= self._zeros(rows)[:, self.groups] if self.zeros is not None else self._middle
            return values.mul_(scales[:, self.groups])
        if self.zeros is None and self._middle:
            values -= self._middle
        whole = self.in_features // self.groups
        last = self.in_features - whole * self.groups
        self._scale(values[:, : whole * self.groups], scales, rows, slice(whole))
        if last:
            self._scale(values[:, -last:], scales, rows, slice(whole, None))
        return values

    @property
    def _middle(self) -> int:
        return 2 ** (self.coding.bits - 1) if isinstance(self.coding, Integer) else 0

    def _zeros(self, rows: slice) -> Tensor:
        assert self.zeros is not None
        return self.zeros[rows].float()

    def _scale(self, values: Tensor, scales: Tensor, rows: slice, groups: slice) -> None:
        """In place, on features that make up whole `groups` of one size."""
        scales = scales[:, groups]
        if not scales.shape[1]:
            return
        grouped = values.view(len(values), scales.shape[1], -1)
        if self.zeros is not None:
            grouped -= self._zeros(rows)[:, groups, None]
        grouped *= scales[:, :, None]


# Sizes of codes, without their sign, from which on they are not finite.
FLOAT8_NOT_FINITE = {"e4m3fn": 0x7F, "e5m2": 0x7C}
FLOAT8 = {"e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def concatenate(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Weights that are `alike`, one after another along OUT."""
    first = weights[0]
    if len(weights) == 1:
        return first
    packed = torch.cat([w.packed for w in weights])
    zeros = None if first.zeros is None else torch.cat([w.zeros for w in weights if w.zeros is not None])
    return replace(first, packed=packed, scales=torch.cat([w.scales for w in weights]), zeros=zeros)


def alike(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    """Whether both can be one matrix: same coding, groups, order of features and threshold."""
    return (
        (a.coding, a.in_features, a.scales.dtype, a.outlier_threshold)
        == (b.coding, b.in_features, b.scales.dtype, b.outlier_threshold)
        and a.scales.shape[1] == b.scales.shape[1]
        and (a.zeros is None) == (b.zeros is None)
        and _same(a.groups, b.groups)
        and _same(a.order, b.order)
    )


def _same(a: int | Tensor | None, b: int | Tensor | None) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b
