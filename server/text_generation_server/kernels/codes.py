"""Codes of quantized weights: in bits, one to a byte, and of numbers. Our own kernels on the host, else torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu.native.library import Library


@cache
def _library() -> Library | None:
    """Without a word: which variant multiplies is chosen, and told, elsewhere; what is done here is the same in all."""
    try:
        return Library()
    except OSError:
        return None


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


def packed_bytes(columns: int, bits: int) -> int:
    """Of a row of codes as `pack` lays them out."""
    return -(-columns * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes one after another, low bits first; every row begins with a byte, and ends with bits 0.

    codes: uint8 [rows, columns], each of 2, 3, 4 or 8 bits -> uint8 [rows, packed_bytes]; of 8 bits, `codes` itself.
    """
    if bits == 8:
        return codes
    codes = codes.contiguous()
    rows, columns = codes.shape
    if (library := _library_for(codes)) is not None:
        packed = codes.new_empty(rows, packed_bytes(columns, bits))
        gather = library.function("gather_bits", "pllipli")
        gather(codes.data_ptr(), rows, columns, bits, packed.data_ptr(), packed.shape[1], torch.get_num_threads())
        return packed
    # Eight codes are in as many bytes as each has bits.
    eights = F.pad(codes, (0, -columns % 8)).view(rows, -(-columns // 8), 8)
    packed = codes.new_zeros(rows, eights.shape[1], bits)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        packed[..., byte] |= eights[..., i] << shift
        if shift + bits > 8:
            packed[..., byte + 1] |= eights[..., i] >> (8 - shift)
    return packed.flatten(1)[:, : packed_bytes(columns, bits)]


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack`: so many codes of each row, one to a byte. packed: rows may lie apart."""
    if bits == 8:
        return packed[:, :columns].clone()
    rows = len(packed)
    codes = packed.new_empty(rows, columns)
    if (library := _library_for(packed)) is not None:
        spread = library.function("spread_bits", "plllipi")
        spread(
            packed.data_ptr(), packed.stride(0), rows, columns, bits, codes.data_ptr(), torch.get_num_threads()
        )  # fmt: skip
        return codes
    eights = -(-columns // 8)
    data = F.pad(packed, (0, max(0, eights * bits - packed.shape[1])))[:, : eights * bits].reshape(rows, eights, bits)
    for i in range(min(8, columns)):
        byte, shift = divmod(i * bits, 8)
        code = data[..., byte] >> shift
        if shift + bits > 8:
            code = code | data[..., byte + 1] << (8 - shift)
        codes[:, i::8] = (code & (2**bits - 1))[:, : len(range(i, columns, 8))]
    return codes


def reorder(packed: Tensor, bits: int, order: Tensor) -> Tensor:
    """The columns `order` of codes as `pack` lays them out. order: int64 [columns], a permutation."""
    columns = len(order)
    if (library := _library_for(packed)) is None:
        return pack(unpack(packed, bits, columns)[:, order], bits)
    ordered = packed.new_empty(len(packed), packed_bytes(columns, bits))
    places = order.to(torch.int32)
    call = library.function("reorder_bits", "plllippli")
    call(
        packed.data_ptr(), packed.stride(0), len(packed), columns, bits, places.data_ptr(), ordered.data_ptr(),
        ordered.stride(0), torch.get_num_threads(),
    )  # fmt: skip
    return ordered


def transpose_words(words: Tensor, places: Sequence[int]) -> Tensor:
    """Eight codes of 4 bits in each word, which lie along OUT.

    words: int32 [in, n]; places: of the eight codes of a word, low bits first -> 4 bits [8 * n, in] as `pack` lays out.
    """
    in_, num_words = words.shape
    if words.device.type == "cpu" and (library := _library()) is not None:
        words = words.contiguous()
        packed = torch.empty(8 * num_words, packed_bytes(in_, 4), dtype=torch.uint8)
        call, order = library.function("transpose_words", "pllppi"), torch.tensor(places, dtype=torch.int32)
        call(
            words.data_ptr(), in_, num_words, order.data_ptr(), packed.data_ptr(), torch.get_num_threads()
        )  # fmt: skip
        return packed
    shifts = 4 * torch.argsort(torch.tensor(places, device=words.device))
    codes = (words[:, :, None] >> shifts) & 15
    return pack(codes.to(torch.uint8).view(in_, 8 * num_words).T, 4)


def _library_for(data: Tensor) -> Library | None:
    """For bytes on the host, row by row."""
    fits = data.dtype == torch.uint8 and data.device.type == "cpu" and data.stride(-1) == 1
    return _library() if fits else None
