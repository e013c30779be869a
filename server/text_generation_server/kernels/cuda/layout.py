"""Brings a weight into the layout of `sources/codes.h`, on whatever device it is on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..weights import Coding, Float8, Integer, QuantizedWeight, Table

CHUNK, STRIP = 64, 16
# CODING of `codes.h`.
DENSE, TABLE = 16, 5
_FLOAT8 = {"e4m3fn": 6, "e5m2": 7}
# Words of a lane, SCALES of `linear.cu`.
_BITS = {2: 2, 3: 3, 4: 4, 8: 8, TABLE: 4, 6: 8, 7: 8, DENSE: 16}
_SCALES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
# A group is filled up to 64 places, which is fastest, if the weight does not grow by more than this.
MOST_PADDING = 1.06
# Values that are laid out at a time.
PIECE_VALUES = 1 << 24


@dataclass(frozen=True)
class PackedWeight:
    """A weight as the kernels read it.

    codes: int32 [strips, chunks, words]; scales: [strips, groups, 8, 2]; zeros: uint8, as scales;
    group_of: int32, the group of every 16 places if `fine`, else of every 64; table: 16 numbers of the
    activations' dtype. places: int32 [64 * chunks], the IN feature of every place or -1; None: as they are.
    """

    coding: int
    out_features: int
    in_features: int
    chunks: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    group_of: Tensor
    fine: bool
    table: Tensor | None
    middle: float
    places: Tensor | None

    def defines(self, dtype: torch.dtype) -> dict[str, int]:
        """Of the module that multiplies with it."""
        return {
            "CODING": self.coding,
            "BF16": int(dtype == torch.bfloat16),
            "SCALES": _SCALES[self.scales.dtype],
            "ZEROS": int(self.zeros is not None),
            "FINE": int(self.fine),
        }

    @property
    def num_bytes(self) -> int:
        """What a product reads."""
        parts = (self.codes, self.scales, self.zeros, self.group_of, self.table, self.places)
        return sum(t.numel() * t.element_size() for t in parts if t is not None)


def pack_quantized(weight: QuantizedWeight, dtype: torch.dtype) -> PackedWeight:
    """For activations of `dtype`: float16 or bfloat16."""
    device, in_ = weight.device, weight.in_features
    groups = weight.groups if isinstance(weight.groups, Tensor) else torch.arange(in_, device=device) // weight.groups
    sizes = torch.bincount(groups, minlength=weight.scales.shape[1]).tolist()
    fine = sum(-(-size // CHUNK) * CHUNK for size in sizes) > in_ * MOST_PADDING
    unit = 16 if fine else CHUNK
    sorted_ = torch.argsort(groups, stable=True)
    parts = [F.pad(part, (0, -len(part) % unit), value=-1) for part in torch.split(sorted_, sizes)]
    sources = torch.cat(parts)
    group_of = torch.repeat_interleave(
        torch.arange(len(sizes), device=device), torch.tensor([len(part) // unit for part in parts], device=device)
    )
    # What fills the last chunk belongs to the last group.
    group_of = F.pad(group_of, (0, -len(sources) % CHUNK // unit), value=len(sizes) - 1)
    sources = F.pad(sources, (0, -len(sources) % CHUNK), value=-1)
    is_plain = torch.equal(sources, torch.arange(in_, device=device))
    places = None
    if weight.order is not None or not is_plain:
        features = sources if weight.order is None else torch.where(sources < 0, -1, weight.order[sources.clamp(min=0)])
        places = features.to(torch.int32)
    return PackedWeight(
        coding=_coding(weight.coding),
        out_features=weight.out_features,
        in_features=in_,
        chunks=len(sources) // CHUNK,
        codes=_pack_rows(weight, None if is_plain else sources, fine),
        scales=_by_strip(weight.scales),
        zeros=None if weight.zeros is None else _by_strip(weight.zeros),
        group_of=group_of.to(torch.int32),
        fine=fine,
        table=_table(weight.coding, dtype, device),
        middle=2.0 ** (weight.coding.bits - 1) if isinstance(weight.coding, Integer) else 0.0,
        places=places,
    )


def pack_dense(weight: Tensor) -> PackedWeight:
    """weight: [out, in] float16 or bfloat16."""
    out, in_ = weight.shape
    chunks, strips = -(-in_ // CHUNK), -(-out // STRIP)
    rows = max(STRIP, PIECE_VALUES // (chunks * CHUNK) // STRIP * STRIP)
    codes = weight.new_empty(strips, chunks, 32 * DENSE, dtype=torch.int32)
    for first in range(0, out, rows):
        part = F.pad(weight[first : first + rows].view(torch.int16), (0, chunks * CHUNK - in_))
        packed = lay_out(part, DENSE)
        codes[first // STRIP : first // STRIP + len(packed)] = packed
    places = None
    if in_ % CHUNK:
        places = torch.arange(chunks * CHUNK, device=weight.device, dtype=torch.int32)
        places[in_:] = -1
    return PackedWeight(
        coding=DENSE,
        out_features=out,
        in_features=in_,
        chunks=chunks,
        codes=codes,
        scales=torch.ones(strips, 1, 8, 2, device=weight.device),
        zeros=None,
        group_of=torch.zeros(chunks, dtype=torch.int32, device=weight.device),
        fine=False,
        table=None,
        middle=0.0,
        places=places,
    )


def _pack_rows(weight: QuantizedWeight, sources: Tensor | None, fine: bool) -> Tensor:
    """sources: the code of every place, -1: none; None: codes as they are, whole chunks."""
    coding = _coding(weight.coding)
    num_places = weight.in_features if sources is None else len(sources)
    strips = -(-weight.out_features // STRIP)
    shape = (strips, num_places // CHUNK, 32 * _BITS[coding])
    packed = torch.empty(shape, dtype=torch.int32, device=weight.device)
    rows = max(STRIP, PIECE_VALUES // num_places // STRIP * STRIP)
    for first in range(0, weight.out_features, rows):
        codes = weight.codes(slice(first, first + rows))
        if sources is not None:
            codes = F.pad(codes, (0, 1))[:, sources]  # the last, a zero, is number -1
        piece = lay_out(codes, coding, fine)
        packed[first // STRIP : first // STRIP + len(piece)] = piece
    return packed


def lay_out(codes: Tensor, coding: int, fine: bool = False) -> Tensor:
    """codes: [out, 64 * chunks], 8 or 16 bits -> int32 [strips, chunks, words of 32 lanes]."""
    out, num_places = codes.shape
    codes = F.pad(codes, (0, 0, 0, -out % STRIP)).to(torch.int32)
    # [strips, half, g, chunks, t, step, pair, 2]: rows g + 8 half, places 16t + 4 step + 2 pair + (0 or 1); if `fine`,
    # 16 step + 4t.
    parts = codes.view(-1, 2, 8, num_places // CHUNK, 4, 4, 2, 2)
    if fine:
        parts = parts.transpose(4, 5)
    lanes = parts.permute(0, 3, 2, 4, 5, 6, 1, 7).reshape(len(parts), num_places // CHUNK, 32, 4, 8)
    words = _words(lanes, coding)  # [strips, chunks, 32, words of a lane]
    bits = _BITS[coding]
    if bits < 4:
        words = torch.cat((words[..., :2].flatten(2), words[..., 2:].flatten(2)), -1)
    else:
        words = words.view(*words.shape[:-1], bits // 4, 4).transpose(2, 3)
    return words.flatten(2)


def _words(codes: Tensor, coding: int) -> Tensor:
    """codes: int32 [..., 4 steps, 8] -> int32 [..., words]; shifts may fill the sign."""
    step = torch.arange(4, device=codes.device)[:, None]
    number = torch.arange(8, device=codes.device)
    register, second = number // 2, number % 2
    if coding == DENSE:
        words: Tensor = (codes[..., 0::2] & 0xFFFF) | (codes[..., 1::2] << 16)
        return words.flatten(-2)
    if _BITS[coding] == 8:
        bytes_ = codes.reshape(*codes.shape[:-1], 2, 4) << 8 * (number % 4).view(2, 4)
        return _joined(bytes_).flatten(-2)
    if coding in (4, TABLE):
        shift = 4 * number if coding == TABLE else 4 * register + 16 * second
        return _joined(codes << shift)
    low = _joined((codes & 3) << (8 * (step % 2) + 2 * register + 16 * second))
    words = low[..., 0::2] | low[..., 1::2]
    if coding == 2:
        return words
    top = _joined(((codes >> 2) << (4 * step + register + 16 * second)).flatten(-2))
    return torch.cat((words, top[..., None]), -1)


def _joined(parts: Tensor) -> Tensor:
    """What lies in separate bits, in one word: the last axis goes."""
    words: Tensor = parts.sum(-1).to(torch.int32)
    return words


def _by_strip(values: Tensor) -> Tensor:
    """[out, groups] -> [strips, groups, 8, 2], filled up with zeros."""
    values = F.pad(values, (0, 0, 0, -len(values) % STRIP))
    return values.view(-1, 2, 8, values.shape[1]).permute(0, 3, 2, 1).contiguous()


def _coding(coding: Coding) -> int:
    match coding:
        case Integer(bits):
            return bits
        case Table():
            return TABLE
        case Float8(kind):
            return _FLOAT8[kind]


def _table(coding: Coding, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    return torch.tensor(coding.values, device=device).to(dtype) if isinstance(coding, Table) else None
