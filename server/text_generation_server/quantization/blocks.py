"""Arithmetic of the formats that round to a table or to 8 bits: scales of flat blocks, and rounding while loading."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..kernels.codes import climb
from .spec import Cut

# Values that are rounded at once: the temporaries stay in a core's cache.
RUN_VALUES = 1 << 18
FP8_LARGEST = 448.0
# The least absmax that bitsandbytes divides by.
LEAST = 1e-38
# bitsandbytes' tables: quantiles of the normal distribution (QLoRA, arXiv:2305.14314), and a sign, two bits of exponent
# and one of mantissa, all over twelve.
TABLES = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": (
        0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12,
        0.0, -0.0625 / 12, -8 / 12, -1.0, -4 / 12, -6 / 12, -2 / 12, -3 / 12,
    ),
}  # fmt: skip


def check_scales(scales: Tensor, largest: float, where: str) -> None:
    """Refuses scales that are not finite, or that make an infinity of a code that stands for `largest`."""
    if scales.numel() and not bool(torch.isfinite(scales.float().abs().amax() * largest)):
        raise CheckpointError(
            f"{where} holds NaN, infinity or numbers beyond float32; expected finite scales; fetch or make it again"
        )


def split_nibbles(packed: Tensor) -> Tensor:
    """uint8 [n] -> uint8 [2 n], the high half of a byte first."""
    return torch.stack([packed >> 4, packed & 15], -1).view(-1)


def scales_of_blocks(absmax: Tensor, first_block: int, block: int, cut: Cut) -> tuple[Tensor, Tensor]:
    """Scales by row and group of a cut from those of blocks that run over the rows, and the group of each column.

    absmax: [blocks] from `first_block` on -> [rows, groups], int64 [columns]. A group is as long as what divides both a
    block and a row, so that in every row the groups are the same columns and none crosses a block.
    """
    in_ = cut.shape.in_
    group = math.gcd(block, in_)
    groups = torch.arange(cut.columns.start // group, -(-cut.columns.stop // group))
    rows = torch.arange(cut.rows.start, cut.rows.stop)
    blocks = (rows[:, None] * in_ + groups * group).div_(block, rounding_mode="floor").sub_(first_block)
    group_of = torch.arange(cut.columns.start, cut.columns.stop) // group
    return absmax[blocks], group_of - cut.columns.start // group


def round_to_table(values: Tensor, table: Tensor, block: int, is_end: bool) -> tuple[Tensor, Tensor]:
    """Codes uint8 [n] and absmax float32 [blocks] of float values [n] that begin with a block, as bitsandbytes' own.

    is_end: the values are the last of their matrix, where a block may be short.
    """
    full = len(values) // block * block
    assert is_end or full == len(values)
    steps = _steps(table)
    codes, absmax = torch.empty(len(values), dtype=torch.uint8), torch.empty(-(-len(values) // block))
    run = max(1, RUN_VALUES // block) * block
    for first in range(0, full, run):
        part = values[first : min(full, first + run)].float().view(-1, block)
        most = absmax[first // block : first // block + len(part)]
        torch.amax(part.abs(), 1, out=most)
        scaled = (part * (1.0 / most.clamp(min=LEAST))[:, None]).view(-1)
        codes[first : first + len(scaled)] = climb(scaled, steps)
    if full < len(values):
        # A short block is divided, not multiplied, and its absmax is never zero.
        part = values[full:].float()
        absmax[-1] = part.abs().amax().clamp(min=LEAST)
        codes[full:] = climb(part / absmax[-1], steps)
    return codes, absmax


def _steps(table: Tensor) -> list[tuple[float, int]]:
    """Above which numbers another code is nearest, ascending, and what it has more than the one before, modulo 256."""
    ordered, order = torch.sort(table, stable=True)
    bounds = [-math.inf, *((ordered[:-1] + ordered[1:]) / 2).tolist()]
    codes = order.tolist()
    return [(b, (code - before) % 256) for b, code, before in zip(bounds, codes, [0, *codes], strict=False)]


def round_rows_to_int8(values: Tensor, columns: range) -> tuple[Tensor, Tensor]:
    """Codes uint8 [rows, columns], 128 standing for zero, and absmax float32 [rows], as bitsandbytes' own.

    values: float [rows, in]. They go through float16; what it cannot hold makes an absmax that is not finite.
    """
    codes = torch.empty(len(values), len(columns), dtype=torch.uint8)
    absmax = torch.empty(len(values))
    for rows in _runs(values):
        part = values[rows].half()
        absmax[rows] = part.abs().amax(1).float()
        scaled = part[:, columns.start : columns.stop] * (127.0 / absmax[rows])[:, None]
        codes[rows] = scaled.nan_to_num_(0.0).round_().add_(128)
    return codes, absmax


def round_rows_to_float8(values: Tensor, columns: range) -> tuple[Tensor, Tensor]:
    """Codes of e4m3fn uint8 [rows, columns] and scales float32 [rows], absmax of the whole row / 448.

    values: float [rows, in]; those that are not finite make a scale that is not.
    """
    codes = torch.empty(len(values), len(columns), dtype=torch.uint8)
    scales = torch.empty(len(values))
    for rows in _runs(values):
        part = values[rows].float()
        scales[rows] = (part.abs().amax(1) / FP8_LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
        scaled = (part[:, columns.start : columns.stop] / scales[rows, None]).clamp_(-FP8_LARGEST, FP8_LARGEST)
        codes[rows] = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
    return codes, scales


def _runs(values: Tensor) -> list[slice]:
    size = max(1, RUN_VALUES // values.shape[1])
    return [slice(first, first + size) for first in range(0, len(values), size)]
