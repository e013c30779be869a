"""Codes of quantized weights: out of a checkpoint's words, of numbers, and in planes. Our own kernels on the host, else
torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from .cpu.native.library import Library

# Widths of the planes that hold a code's bits, the low bits first.
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}


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


def new_planes(rows: int, in_features: int, bits: int, device: torch.device | None = None) -> tuple[Tensor, ...]:
    """Not written yet: one uint8 [rows, ceil(in_features * width / 8)] per plane."""
    sizes = [-(-in_features // (8 // width)) for width in PLANES[bits]]
    return tuple(torch.empty(rows, size, dtype=torch.uint8, device=device) for size in sizes)


def pack(codes: Tensor, bits: int, planes: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
    """codes uint8 [rows, in] -> planes, those given or new ones (see `new_planes`).

    A byte of a plane of width w holds 8 / w features that lie a whole plane apart: byte j those at j, j + n, j + 2n...
    for a plane of n bytes. So packing and unpacking move contiguous runs.
    """
    planes = tuple(planes) if planes is not None else new_planes(len(codes), codes.shape[1], bits, codes.device)
    if bits == 8:
        planes[0].copy_(codes)
        return planes
    library = _library_for(codes, *planes)
    fold = library.function("fold_plane", "plliipli") if library is not None else None
    codes = codes.contiguous() if library is not None else codes
    shift = 0
    for width, plane in zip(PLANES[bits], planes, strict=True):
        if fold is not None:
            fold(
                codes.data_ptr(), *codes.shape, width, shift, plane.data_ptr(), plane.stride(0), torch.get_num_threads()
            )  # fmt: skip
        else:
            _fold(codes, width, shift, plane)
        shift += width
    return planes


def unpack(planes: Sequence[Tensor], bits: int, out: Tensor) -> Tensor:
    """The inverse of `pack`, into `out` [rows, in] of any dtype that holds the codes. Returns `out`."""
    if bits == 8:
        return out.copy_(planes[0])
    library = _library_for(out, *planes) if out.is_contiguous() else None
    unfold = library.function("unfold_plane", "pllliipi") if library is not None else None
    shift = 0
    for width, plane in zip(PLANES[bits], planes, strict=True):
        if unfold is not None:
            unfold(
                plane.data_ptr(), plane.stride(0), *out.shape, width, shift, out.data_ptr(), torch.get_num_threads()
            )  # fmt: skip
        else:
            _unfold(plane, width, shift, out)
        shift += width
    return out


def _library_for(*tensors: Tensor) -> Library | None:
    """Of bytes on the host, row by row."""
    fits = all(t.dtype == torch.uint8 and t.device.type == "cpu" and t.stride(-1) == 1 for t in tensors)
    return _library() if fits else None


def _fold(codes: Tensor, width: int, shift: int, plane: Tensor) -> None:
    part = (codes >> shift) & (2**width - 1)
    size = plane.shape[1]
    plane.zero_()
    for slot in range(8 // width):
        run = part[:, slot * size : (slot + 1) * size]
        plane[:, : run.shape[1]] |= run << (slot * width)


def _unfold(plane: Tensor, width: int, shift: int, out: Tensor) -> None:
    size, mask = plane.shape[1], 2**width - 1
    for slot in range(8 // width):
        run = plane if slot == 0 else plane >> (slot * width)
        run = run if (slot + 1) * width == 8 else run & mask
        place = slice(slot * size, min((slot + 1) * size, out.shape[1]))
        run = run[:, : max(0, place.stop - place.start)]  # a short row leaves the last slots empty
        if shift:
            out[:, place] += run << shift
        else:
            out[:, place] = run
