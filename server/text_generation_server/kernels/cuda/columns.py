"""GPTQ's column loop as one Triton kernel: each program keeps some rows of the weight in registers for all columns."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

# Rows of the weight in a program.
ROWS = 32


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(
    weight: Any, upper: Any, scale: Any, zero: Any, codes: Any, errors: Any,
    num_rows: Any, stride: Any, scale_stride: Any, zero_stride: Any, most: Any,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    # weight, codes, errors [COLUMNS, num_rows]; upper [COLUMNS, COLUMNS]; a stride of 0 shares scales over columns.
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = rows < num_rows
    w = tl.load(weight + columns[:, None] * stride + rows[None, :], mask=inside[None, :], other=0.0)
    for i in range(COLUMNS):
        here = columns == i
        value = tl.sum(tl.where(here[:, None], w, 0.0), 0)
        s = tl.load(scale + i * scale_stride + rows, mask=inside, other=1.0)
        z = tl.load(zero + i * zero_stride + rows, mask=inside, other=0.0)
        factors = tl.load(upper + i * COLUMNS + columns)
        at = value / s + z
        # To the nearest, and of two as near to the even one, as torch rounds: adding 1.5 * 2**23 leaves whole numbers.
        at = tl.minimum(tl.maximum(at, -4194304.0), 4194303.0)
        code = (at + 12582912.0) - 12582912.0
        code = tl.minimum(tl.maximum(code, 0.0), most)
        error = (value - (code - z) * s) / tl.sum(tl.where(here, factors, 0.0), 0)
        tl.store(codes + i * stride + rows, code.to(tl.uint8), mask=inside)
        tl.store(errors + i * stride + rows, error, mask=inside)
        later = tl.where(columns > i, factors, 0.0)
        w = w - later[:, None] * error[None, :]
    tl.store(weight + columns[:, None] * stride + rows[None, :], w, mask=inside[None, :])


def round_columns_fused(
    weight: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, most: int, codes: Tensor, errors: Tensor
) -> None:
    """As `columns.round_columns`, in one launch. All float32; the number of columns is a power of two, at most 128."""
    num_columns, num_rows = weight.shape
    assert weight.stride(1) == codes.stride(1) == errors.stride(1) == 1
    assert weight.stride(0) == codes.stride(0) == errors.stride(0) and scale.stride(1) == zero.stride(1) == 1
    grid = (triton.cdiv(num_rows, ROWS),)
    _kernel[grid](
        weight, upper.contiguous(), scale, zero, codes, errors,
        num_rows, weight.stride(0), scale.stride(0), zero.stride(0), float(most),
        COLUMNS=num_columns, ROWS=ROWS,
    )  # fmt: skip
