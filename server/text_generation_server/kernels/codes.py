"""Codes of quantized weights: out of a checkpoint's words, and of numbers. Our own kernels on the host, else torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from .cpu.native.library import Library


@cache
def _library() -> Library | None:
    """Without a word: which variant multiplies is chosen, and told, elsewhere; what is done here is the same in all."""
    try:
        return Library()
    except OSError:
        return None


def spread_bits(data: Tensor, bits: int) -> Tensor:
    """Values of 2, 3 or 4 bits, low bits first, one to a byte. data: uint8 [n], contiguous -> uint8 [n * 8 / bits].

    n is a multiple of `bits`.
    """
    values = torch.empty(len(data) * 8 // bits, dtype=torch.uint8)
    if (library := _library()) is not None:
        spread = library.function("spread_bits", "pipli")
        spread(data.data_ptr(), bits, values.data_ptr(), len(values), torch.get_num_threads())
        return values
    # Eight values are in as many bytes as each has bits.
    eights, data = values.view(-1, 8), data.view(-1, bits)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        value = data[:, byte] >> shift
        if shift + bits > 8:
            value |= data[:, byte + 1] << (8 - shift)
        torch.bitwise_and(value, 2**bits - 1, out=eights[:, i])
    return values


def climb(values: Tensor, steps: Sequence[tuple[float, int]]) -> Tensor:
    """The code of each number: the sum, modulo 256, of the steps whose bounds are below it.

    values: float32 [n], contiguous; steps: bounds, ascending, and what is added beyond each -> uint8 [n].
    """
    codes = torch.empty(len(values), dtype=torch.uint8)
    if (library := _library()) is not None:
        bounds = torch.tensor([bound for bound, _ in steps], dtype=torch.float32)
        added = torch.tensor([step for _, step in steps], dtype=torch.int32)
        call = library.function("climb", "ppplpli")
        call(
            values.data_ptr(), bounds.data_ptr(), added.data_ptr(), len(steps), codes.data_ptr(), len(values),
            torch.get_num_threads(),
        )  # fmt: skip
        return codes
    codes.zero_()
    above = torch.empty_like(codes)
    for bound, step in steps:
        codes.add_(torch.gt(values, bound, out=above), alpha=step)
    return codes
