"""The inner loop of GPTQ: columns of a weight rounded one after another, each error spread over those that follow.

Weights are held transposed, so that a column is contiguous. One kernel goes through all columns of a run: on a GPU in
Triton, on the host our own, each core with some of the outputs. The plain form is the reference of both, and serves
where neither is there.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from .cpu.native.columns import usual_columns


def round_columns(
    weight: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, most: int, codes: Tensor, errors: Tensor
) -> None:
    """Rounds the columns in order and leaves in `weight` what they would have been before rounding.

    weight: [n, out] floating, up to date but for the errors of these n columns themselves; upper: [n, n], the part of
    the upper Cholesky factor of the inverse Hessian; scale, zero: [n, out], expanded where columns share them; codes
    from 0 to `most`. Written: codes [n, out] uint8, errors [n, out] = (weight - rounded) / upper[i, i].
    Frantar et al. 2022, arXiv:2210.17323, algorithm 1, the inner loop.
    """
    num = len(weight)
    # Triton's tiles are powers of two; the last run of a layer may be anything.
    fits = weight.dtype == torch.float32 and num & (num - 1) == 0 and num >= 16
    if weight.device.type == "cuda" and fits and has_triton():
        from .cuda.columns import round_columns_fused

        round_columns_fused(weight, upper, scale, zero, most, codes, errors)
    elif (native := usual_columns()) is not None and native.takes(weight):
        native.round_columns(weight, upper, scale, zero, most, codes, errors)
    else:
        _round_columns(weight, upper, scale, zero, most, codes, errors)


def _round_columns(
    weight: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, most: int, codes: Tensor, errors: Tensor
) -> None:
    before = upper.T.contiguous()  # row i: how much the errors of the columns before i count
    inverse = upper.diagonal().reciprocal().tolist()
    rounded = torch.empty_like(weight)
    for i in range(len(weight)):
        w, s, z = weight[i], scale[i], zero[i]
        if i:
            w.addmv_(errors[:i].T, before[i, :i], alpha=-1)
        code = torch.addcdiv(z, w, s, out=rounded[i]).round_().clamp_(0, most)
        torch.addcmul(w, code - z, s, value=-1, out=errors[i]).mul_(inverse[i])
    codes.copy_(rounded)


@cache
def has_triton() -> bool:
    """Whether kernels can be made here."""
    return importlib.util.find_spec("triton") is not None
