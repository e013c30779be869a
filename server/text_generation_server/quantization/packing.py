"""From codes to stored words: the inverse of `unpack.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Where AutoAWQ's `gemm` puts the features of a word, low bits first.
_GEMM_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """codes uint8 [rows, n] -> int32 [rows, ceil(n * bits / 32)]: value i in the bits from i * bits on, low bits first.

    The last word is filled up with zeros; 3-bit values are filled up to 32, which are three words.
    """
    values = F.pad(codes, (0, -codes.shape[1] % (32 if bits == 3 else 32 // bits)))
    # A copy: dimensions of size 1 count as contiguous with any stride, but no view as words is possible then.
    values = values.clone(memory_format=torch.contiguous_format)
    if bits == 8:
        return values.view(torch.int32)
    if bits in (2, 4):
        num = 8 // bits
        slots = values.view(len(values), -1, num)
        data = slots[:, :, 0].clone()
        for i in range(1, num):
            data |= slots[:, :, i] << (i * bits)
        return data.view(torch.int32)
    # Eight values are in as many bytes as each has bits.
    groups = values.view(len(values), -1, 8)
    data = values.new_zeros(len(values), groups.shape[1], bits)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        data[..., byte] |= groups[..., i] << shift
        if shift + bits > 8:
            data[..., byte + 1] |= groups[..., i] >> (8 - shift)
    return data.flatten(1).view(torch.int32)


def pack_gemm(codes: Tensor) -> Tensor:
    """codes uint8 [n, out] of 4 bits -> int32 [n, out / 8] in the order of AutoAWQ's `gemm`."""
    order = torch.tensor(_GEMM_ORDER, device=codes.device)
    return pack_words(codes.view(len(codes), -1, 8).index_select(2, order).flatten(1), 4)
