"""AWQ (Lin et al. 2023, arXiv:2306.00978): scales of input channels that save the important ones, then clipping.

Both searches judge a rounded weight by what it does to the outputs on the calibration text, tr(D H D^T), which needs
the inputs' second moments H alone: no text is run again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .rounding import Codes, Grid, grouped, output_error, round_to_nearest

# Exponents of the activations that are tried.
RATIOS = tuple(i / 20 for i in range(20))
# Of the range of a group, which shares are tried: as AutoAWQ, down to a half.
CLIPS = tuple(1 - i / 20 for i in range(11))
# Outputs on which a scale is judged.
JUDGED_ROWS = 1024
# Groups that are clipped at once, for memory.
CHUNK_VALUES = 1 << 24


@dataclass(frozen=True)
class Scaling:
    """Input features are divided by `scale` [in], and weights are multiplied with it. error: of the outputs then."""

    scale: Tensor
    error: float


def search_scale(
    weight: Tensor, hessian: Tensor, mean_abs: Tensor, grid: Grid, group_size: int, tie: Tensor | None
) -> Scaling:
    """The best of the scales s = x^r / w^(1-r) (or x^r), where nothing at all is tried too.

    weight: float32 [out, in], of all linears that have this input; hessian: [in, in]; mean_abs: [in], of the inputs.
    tie: int64 [in], equal where features must have one scale, because one output of the layer before makes them.
    """
    spread = weight_spread(weight, group_size)
    if tie is not None:
        mean_abs, spread = (_mean_of_tied(values, tie) for values in (mean_abs, spread))
    # Some outputs tell which scale is best for all; the error is that of these.
    rows = torch.linspace(0, len(weight) - 1, min(JUDGED_ROWS, len(weight)), device=weight.device).long()
    weight = weight[rows]
    ones = torch.ones_like(mean_abs)
    best = Scaling(ones, _scaled_error(weight, hessian, ones, grid, group_size))
    for by_weight in (True, False):
        for ratio in RATIOS if by_weight else RATIOS[1:]:
            scale = mean_abs.clamp(min=1e-4) ** ratio
            if by_weight:
                scale = scale / (spread ** (1 - ratio) + 1e-4)
            scale = scale.clamp(min=1e-4)
            scale = scale / (scale.max() * scale.min()).sqrt()
            if not bool(torch.isfinite(scale).all()):
                continue
            error = _scaled_error(weight, hessian, scale, grid, group_size)
            if error < best.error:
                best = Scaling(scale, error)
    return best


def weight_spread(weight: Tensor, group_size: int) -> Tensor:
    """[in]: mean over the outputs of each weight's share of the largest in its group."""
    shares = grouped(weight.abs(), group_size)
    shares.div_(shares.amax(-1, keepdim=True).clamp(min=1e-12))
    return shares.mean(0).flatten()[: weight.shape[1]]


def _mean_of_tied(values: Tensor, tie: Tensor) -> Tensor:
    num = int(tie.max()) + 1
    sums = values.new_zeros(num).index_add_(0, tie, values)
    counts = values.new_zeros(num).index_add_(0, tie, torch.ones_like(values))
    return (sums / counts.clamp(min=1))[tie]


def _scaled_error(weight: Tensor, hessian: Tensor, scale: Tensor, grid: Grid, group_size: int) -> float:
    rounded = round_to_nearest(weight * scale, grid, group_size).dequantize().to(weight.dtype)
    return output_error(rounded.div_(scale).sub_(weight), hessian)


def clip(weight: Tensor, hessian: Tensor, grid: Grid, group_size: int) -> Tensor:
    """The weight with each group limited to the share of its largest number that disturbs its outputs least.

    weight: float32 [out, in], after scaling; hessian: [in, in], of the scaled inputs. Returns a new tensor.
    """
    groups = grouped(weight, group_size)  # [out, groups, size]
    num, size = groups.shape[1:]
    clipped = groups.clone()
    for group in range(num):
        features = slice(group * size, min((group + 1) * size, weight.shape[1]))
        part = hessian[features, features]
        moments = part.new_zeros(size, size)
        moments[: len(part), : len(part)] = part
        step = max(1, CHUNK_VALUES // size)
        for first in range(0, len(groups), step):
            clipped[first : first + step, group] = _clip_group(groups[first : first + step, group], moments, grid)
    return clipped.flatten(1)[:, : weight.shape[1]]


def _clip_group(values: Tensor, moments: Tensor, grid: Grid) -> Tensor:
    """values: [out, size], a group of each output; moments: [size, size]."""
    most = values.abs().amax(-1, keepdim=True)
    best, found = None, values
    for share in CLIPS:
        limited = values.clamp(-most * share, most * share)
        scale, zero = (x[..., None] for x in grid.fit(limited))
        change = grid.round(limited, scale, zero).sub_(zero).mul_(scale).sub_(values)
        error = ((change @ moments) * change).sum(-1, keepdim=True)
        if best is None:
            best, found = error, limited
            continue
        better = error < best
        best, found = torch.where(better, error, best), torch.where(better, limited, found)
    return found


def scaled_hessian(hessian: Tensor, scale: Tensor) -> Tensor:
    """Of inputs that are divided by `scale`."""
    return (hessian / scale).div_(scale[:, None])


def solve(weight: Tensor, hessian: Tensor, grid: Grid, group_size: int) -> Codes:
    """Codes of a weight [out, in] that is scaled already: clipped, then rounded to nearest."""
    return round_to_nearest(clip(weight, hessian, grid, group_size), grid, group_size)
