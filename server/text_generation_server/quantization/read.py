"""The one routine that slices stored weights and brings them together: written once for every format and every rank."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..kernels.codes import packed_bytes, reorder
from ..kernels.weights import DenseRows, QuantizedWeight, alike, concatenate, follow
from .dense import Dense
from .format import Decoded, Part, Piece, Source, StoredLinear
from .spec import Along, Cut, TensorSpec

# Values that are decoded at once: a few times as many bytes exist beside the weight for a moment.
CHUNK_VALUES = 1 << 21
# Chunks begin at multiples of this row, so that few of them cut a granule.
CHUNK_ROWS = 128


def read_weight(
    source: Source, prefix: str, linears: Sequence[tuple[Part, StoredLinear]], columns: range | None, dtype: torch.dtype
) -> list[Tensor | QuantizedWeight]:
    """As `open_weight`, with all that is dense read."""
    weights = open_weight(source, prefix, linears, columns, dtype)
    return [w.whole() if isinstance(w, DenseRows) else w for w in weights]


def open_weight(
    source: Source, prefix: str, linears: Sequence[tuple[Part, StoredLinear]], columns: range | None, dtype: torch.dtype
) -> list[DenseRows | QuantizedWeight]:
    """Reads the rows of each part, and only the IN features `columns` (None: all), merged along OUT where they can be.

    The matrices returned follow each other along OUT. Those that are not quantized are of `dtype`, and are read when
    their rows are asked for.

    Raises:
        CheckpointError: a tensor is missing or holds what its format does not allow; of dense matrices, when read.
    """
    merged: list[list[DenseRows | QuantizedWeight]] = []
    for part, linear in linears:
        for weight in _read_part(source, prefix + part.name, part, linear, columns, dtype):
            if merged and _can_follow(merged[-1][0], weight):
                merged[-1].append(weight)
            else:
                merged.append([weight])
    return [_concatenate(run) for run in merged]


def _can_follow(first: DenseRows | QuantizedWeight, weight: DenseRows | QuantizedWeight) -> bool:
    if isinstance(first, QuantizedWeight) and isinstance(weight, QuantizedWeight):
        return alike(first, weight)
    return isinstance(first, DenseRows) and isinstance(weight, DenseRows)


def _concatenate(run: list[DenseRows | QuantizedWeight]) -> DenseRows | QuantizedWeight:
    quantized = [w for w in run if isinstance(w, QuantizedWeight)]
    return concatenate(quantized) if quantized else follow([w for w in run if isinstance(w, DenseRows)])


def _read_part(
    source: Source, name: str, part: Part, linear: StoredLinear, columns: range | None, dtype: torch.dtype
) -> Iterator[DenseRows | QuantizedWeight]:
    wanted = range(linear.shape.in_) if columns is None else columns
    specs = [
        spec
        for spec in linear.format.specs(linear.shape)
        if spec.is_read and (not spec.optional or f"{name}.{spec.suffix}" in source)
    ]
    # What does not depend on the rows is read once for all of them.
    once = {
        spec.suffix: _read_piece(source, name, spec, Cut(linear.shape, range(0), wanted))
        for spec in specs
        if not any(axis.along in (Along.OUT, Along.FLAT) for axis in spec.axes)
    }
    for rows in part.rows:
        if isinstance(linear.format, Dense):
            yield _dense_rows(source, name, linear, Cut(linear.shape, rows, wanted), dtype)
            continue
        assembly = _Assembly(len(rows), len(wanted))
        for chunk in _chunks(rows, _columns_read(linear, wanted)):
            cut = Cut(linear.shape, chunk, wanted)
            pieces = once | {
                spec.suffix: _read_piece(source, name, spec, cut) for spec in specs if spec.suffix not in once
            }
            decoded = linear.format.decode(pieces, cut)
            assert isinstance(decoded, Decoded), "what is dense is read when it is asked for"
            assembly.add(decoded, chunk.start - rows.start)
        yield assembly.finish()


def _dense_rows(source: Source, name: str, linear: StoredLinear, cut: Cut, dtype: torch.dtype) -> DenseRows:
    specs = linear.format.specs(linear.shape)

    def read(rows: range) -> Tensor:
        first = cut.rows.start
        part = replace(cut, rows=range(first + rows.start, first + rows.stop))
        weight = linear.format.decode({spec.suffix: _read_piece(source, name, spec, part) for spec in specs}, part)
        assert isinstance(weight, Tensor)
        return weight.to(dtype)

    return DenseRows(len(cut.rows), len(cut.columns), dtype, read)


def _chunks(rows: range, num_columns: int) -> Iterator[range]:
    size = max(CHUNK_ROWS, CHUNK_VALUES // max(1, num_columns) // CHUNK_ROWS * CHUNK_ROWS)
    first = rows.start
    while first < rows.stop:
        last = min(rows.stop, (first // CHUNK_ROWS) * CHUNK_ROWS + size)
        yield range(first, last)
        first = last


def _columns_read(linear: StoredLinear, wanted: range) -> int:
    """How many values of a row are in memory at once."""
    most = len(wanted)
    for axis in (axis for spec in linear.format.specs(linear.shape) for axis in spec.axes):
        if axis.along is Along.IN:
            most = max(most, len(axis.cover(wanted, linear.shape)[0]) // axis.elements * axis.features)
        elif axis.along is Along.FLAT:
            most = linear.shape.in_
    return most


def _read_piece(source: Source, name: str, spec: TensorSpec, cut: Cut) -> Piece:
    stored = source[f"{name}.{spec.suffix}"]
    expected = spec.shape(cut.shape, stored.shape)
    if stored.shape != expected:
        raise CheckpointError(f"{stored.where} has shape {list(stored.shape)}; expected {list(expected)}")
    ranges, first = {}, []
    for dim, axis in enumerate(spec.axes_of(len(stored.shape))):
        if axis.along is Along.NEITHER:
            first.append(0)
            continue
        ranges[dim], begin = axis.cover(cut.along(axis.along), cut.shape)
        first.append(begin)
    return Piece(stored.read(ranges), tuple(first), stored.where)


class _Assembly:
    """Puts decoded chunks of rows together into one matrix."""

    def __init__(self, rows: int, columns: int):
        self.rows, self.columns = rows, columns
        self.first: Decoded | None = None

    def add(self, chunk: Decoded, at: int) -> None:
        if self.first is None:
            self._begin(chunk)
        assert self.first is not None and self.first.coding == chunk.coding
        assert torch.equal(self.first.group_of, chunk.group_of), "groups of IN features do not depend on the row"
        rows = slice(at, at + len(chunk.codes))
        bits, codes = chunk.coding.bits, chunk.codes
        self.packed[rows] = codes if self.order is None else reorder(codes, bits, self.order)
        self.scales[rows] = chunk.scales[:, self.select]
        if self.zeros is not None:
            assert chunk.zeros is not None
            self.zeros[rows] = chunk.zeros[:, self.select]

    def _begin(self, chunk: Decoded) -> None:
        self.first = chunk
        self.order, self.groups, self.select = lay_out_groups(chunk.group_of)
        self.packed = torch.empty(self.rows, packed_bytes(self.columns, chunk.coding.bits), dtype=torch.uint8)
        self.scales = torch.empty(self.rows, len(self.select), dtype=chunk.scales.dtype)
        self.zeros = None if chunk.zeros is None else torch.empty(self.rows, len(self.select), dtype=torch.uint8)

    def finish(self) -> QuantizedWeight:
        assert self.first is not None, "a part has rows"
        return QuantizedWeight(
            self.first.coding, self.columns, self.packed, self.scales, self.zeros, self.groups, self.order,
            self.first.outlier_threshold,
        )  # fmt: skip


def lay_out_groups(group_of: Tensor) -> tuple[Tensor | None, int | Tensor, Tensor]:
    """Order of features, groups of the ordered features, and the groups that these are: see `QuantizedWeight`.

    group_of: int64 [in]. Features of one group are brought together. Groups that begin at multiples of a size become
    groups of that size, also where a cut left only a part of the first (its multiples are then smaller); any others
    are kept as an index.
    """
    order = None if bool((group_of[1:] >= group_of[:-1]).all()) else torch.argsort(group_of, stable=True)
    ordered = group_of if order is None else group_of[order]
    begins = torch.nonzero(ordered[1:] != ordered[:-1]).view(-1) + 1
    size = math.gcd(*begins.tolist()) if len(begins) else len(group_of)
    if -(-len(group_of) // size) <= max(2 * (len(begins) + 1), len(group_of) // 64):
        return order, size, ordered[::size]
    index = torch.zeros(len(group_of), dtype=torch.int64)
    index[begins] = 1
    return order, index.cumsum(0), ordered[torch.cat([begins.new_zeros(1), begins])]
