"""Grids of a few bits, and rounding to them. Pure arithmetic on tensors, on whatever device they are.

w = (code - zero) * scale, with codes from 0 to 2 ** bits - 1. Scales are float16 numbers from the start, as they are
stored, so that whoever makes up for the errors of rounding knows the real ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Of the range that a grid covers, which shares are tried, largest first, when errors decide (`Grid.search`).
SHRINK = tuple(1 - i / 40 for i in range(17))
# As GPTQ: large errors count less than squared, the few largest weights of a group must not decide everything.
NORM = 2.4
# Weights whose grids are searched at once.
CHUNK_VALUES = 1 << 22
LEAST_SCALE, MOST_SCALE = 2.0**-24, 65504.0


@dataclass(frozen=True)
class Grid:
    """How codes are spread: symmetric (zero = 2 ** (bits - 1)) or from the least to the most number.

    search: whether smaller ranges are tried, which cut off a few weights and bring the others nearer.
    """

    bits: int
    sym: bool
    search: bool = False

    @property
    def most(self) -> int:
        return (1 << self.bits) - 1

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each row of `weight` [out, ..., n]: both [out, ...], in its dtype; float16 and whole
        numbers.

        importance: [n] or [..., n] without `out`, how much an error counts (`search` only).
        """
        step = max(1, CHUNK_VALUES * len(weight) // max(1, weight.numel()))
        if len(weight) <= step:
            return self._fit(weight, importance)
        # A search makes copies: of some rows at a time.
        starts = range(0, len(weight), step)
        parts = [self._fit(weight[first : first + step], importance) for first in starts]
        return torch.cat([scale for scale, _ in parts]), torch.cat([zero for _, zero in parts])

    def _fit(self, weight: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
        low, high = weight.amin(-1).clamp(max=0), weight.amax(-1).clamp(min=0)
        scale, zero = self._spread(low, high)
        if not self.search:
            return scale, zero
        best = self._error(weight, scale, zero, importance)
        for share in SHRINK[1:]:
            tried = self._spread(low * share, high * share)
            error = self._error(weight, *tried, importance)
            better = error < best
            best = torch.where(better, error, best)
            scale, zero = torch.where(better, tried[0], scale), torch.where(better, tried[1], zero)
        return scale, zero

    def _spread(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        if self.sym:
            scale = torch.maximum(-low, high) * (2 / self.most)
            return as_stored(scale), torch.full_like(scale, 2 ** (self.bits - 1))
        scale = as_stored((high - low) / self.most)
        zero = (-low / scale).round_()
        # A zero point of 0 is stored as -1 by some tools and read wrong by others: the grid begins one step lower.
        from_one = zero < 1
        if bool(from_one.any()):
            scale = torch.where(from_one, as_stored(high / (self.most - 1)), scale)
        return scale, zero.clamp_(1, self.most)

    def _error(self, weight: Tensor, scale: Tensor, zero: Tensor, importance: Tensor | None) -> Tensor:
        error = self.round(weight, scale[..., None], zero[..., None]).sub_(zero[..., None]).mul_(scale[..., None])
        error = error.sub_(weight).abs_().pow_(NORM)
        return error.sum(-1) if importance is None else (error * importance).sum(-1)

    def round(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Codes as whole numbers in the dtype of `weight`; all are of one shape, or broadcast."""
        return torch.addcdiv(zero, weight, scale).round_().clamp_(0, self.most)


def as_stored(scale: Tensor) -> Tensor:
    """Scales as float16 holds them. A group of zeros has 1."""
    stored = torch.where(scale == 0, torch.ones_like(scale), scale.clamp(LEAST_SCALE, MOST_SCALE))
    return stored.half().to(scale.dtype)


@dataclass(frozen=True)
class Codes:
    """A linear in codes: w[o, i] = (codes[o, i] - zeros[o, g]) * scales[o, g], with g = group_of[i].

    codes: uint8 [out, in]; scales: float16 [out, groups]; zeros: uint8 [out, groups]; group_of: int64 [in].
    """

    bits: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group_of: Tensor

    def dequantize(self) -> Tensor:
        """float32 [out, in]: exactly what a reader of the stored tensors gets."""
        values = self.codes.float().sub_(self.zeros.float()[:, self.group_of])
        return values.mul_(self.scales.float()[:, self.group_of])

    def rows(self, first: int, num: int) -> Codes:
        """Some rows of it."""
        part = slice(first, first + num)
        return Codes(self.bits, self.codes[part], self.scales[part], self.zeros[part], self.group_of)

    @property
    def in_order(self) -> bool:
        return bool((self.group_of[1:] >= self.group_of[:-1]).all())


def group_index(num_features: int, group_size: int, device: torch.device) -> Tensor:
    """int64 [in]: the group of each feature where groups follow each other."""
    size = num_features if group_size == -1 else group_size
    return torch.arange(num_features, device=device) // size


def grouped(weight: Tensor, group_size: int) -> Tensor:
    """[out, in] -> [out, groups, size], the last filled up with zeros, which change no grid; a view if it is whole."""
    size = weight.shape[1] if group_size == -1 else group_size
    if missing := -weight.shape[1] % size:
        weight = torch.nn.functional.pad(weight, (0, missing))
    return weight.reshape(len(weight), -1, size)


def round_to_nearest(weight: Tensor, grid: Grid, group_size: int, importance: Tensor | None = None) -> Codes:
    """Each weight to its nearest code; grids are fitted to their groups alone. weight: float32 [out, in]."""
    groups = grouped(weight, group_size)
    scale, zero = grid.fit(groups, None if importance is None else grouped(importance[None], group_size)[0])
    codes = grid.round(groups, scale[..., None], zero[..., None]).to(torch.uint8).flatten(1)[:, : weight.shape[1]]
    index = group_index(weight.shape[1], group_size, weight.device)
    return Codes(grid.bits, codes.contiguous(), scale.half(), zero.to(torch.uint8), index)


def output_error(change: Tensor, hessian: Tensor) -> float:
    """The sum of squares that a change of the weight makes in the outputs: tr(D H D^T). D: [out, in]; H: x.T @ x."""
    return float(((change @ hessian) * change).sum(dtype=torch.float64))
