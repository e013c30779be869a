"""Attention over the paged cache in tiles of fixed shape, so that a row's bits depend on its own log alone.

Keys are reduced in tiles of 64 from position 0. Query rows (tokens of one sequence times the query heads of one
key/value head) form tiles of a proven number of rows. All products of one (row tile, key tile, head) are entries of
batched matrix products of one shape; each row's maximum is taken over all tiles (exact), then sums and weighted values
are added tile by tile in order. A tile that a row does not see adds exact zeros.

Cache: [num_blocks + 1, kv_heads, block_size, head_dim]. The last block is all zeros: what lies behind a sequence's end
within a tile is read from there, because memory that nobody wrote may hold NaN, and zero times NaN is NaN. For the same
reason a block is cleared when its first position is written.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import gcd

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...batch import StepBatch
from ..interface import AttentionOptions

TILE_KEYS = 64
TILE_ROWS = (4, 16, 64)
# Bytes of scores, and of gathered keys, that exist at a time. Fresh memory above 32 MB costs page faults at each call.
SLAB_BYTES = 16 << 20
PIECE_BYTES = 8 << 20

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Slab:
    """Row tiles that are computed together, most key tiles first. Entries: by key tile, then row tile, then head."""

    rows: slice  # of the tiles' rows within the plan's
    tile_rows: int
    num_kv_heads: int
    levels: list[int]  # entries before the i-th key tile of each row tile; [most key tiles + 1]
    entry_tile: Tensor  # [entries] int64: which (row tile, head)
    key_units: Tensor  # [entries, units per tile] int64: rows of the cache seen as units
    masked: Tensor  # [m] int64: which (key tile, row tile) some row sees in part only
    mask: Tensor  # [m, 1, tile_rows, TILE_KEYS] float32: 0 or -inf
    distance: Tensor  # [entries, tile_rows] float32: from a tile's first key to the row's own position
    heads: Tensor  # [entries, tile_rows] int64: the query head of each row


@dataclass(frozen=True)
class TilePlan:
    """The step's attention, for layers of one window."""

    query_index: Tensor  # [rows] int64: of [tokens * heads]
    output_index: Tensor  # [tokens * heads] int64: of [rows]
    slabs: list[Slab]
    unit: int  # positions of one block that are read at a time


@dataclass(frozen=True)
class _Tiles:
    """Row tiles of one height, most key tiles first."""

    sequence: Ints  # [tiles]
    positions: Ints  # [tiles, rows]; rows behind a sequence's last repeat it
    query: Ints  # [tiles, kv_heads, rows]: of [tokens * heads]
    real: NDArray[np.bool_]  # [tiles, rows]
    first_key_tile: Ints  # [tiles]
    num_key_tiles: Ints  # [tiles]


def plan_tiles(
    batch: StepBatch, num_heads: int, num_kv_heads: int, window: int | None, row_counts: Sequence[int]
) -> TilePlan:
    """Works out every index once per step; layers share it. `row_counts`: heights of row tiles, ascending."""
    query, slabs, num_rows = [], [], 0
    output = np.empty(len(batch.token_ids) * num_heads, dtype=np.int64)
    for tiles in _row_tiles(batch, num_heads, num_kv_heads, window, row_counts):
        real = np.broadcast_to(tiles.real[:, None], tiles.query.shape)
        output[tiles.query[real]] = num_rows + np.flatnonzero(real)
        query.append(tiles.query.ravel())
        for begin, end in _cut(tiles, num_kv_heads):
            size = (end - begin) * num_kv_heads * tiles.positions.shape[1]
            part, rows = slice(begin, end), slice(num_rows, num_rows + size)
            slabs.append(_slab(batch, tiles, part, rows, num_heads, num_kv_heads, window))
            num_rows += size
    unit = gcd(batch.kv_cache.block_size, TILE_KEYS)
    return TilePlan(torch.from_numpy(np.concatenate(query)), torch.from_numpy(output), slabs, unit)


def _row_tiles(
    batch: StepBatch, num_heads: int, num_kv_heads: int, window: int | None, row_counts: Sequence[int]
) -> Iterator[_Tiles]:
    starts, context = np.asarray(batch.starts, dtype=np.int64), np.asarray(batch.context_lengths, dtype=np.int64)
    group = num_heads // num_kv_heads
    num_rows = np.diff(starts) * group
    height = np.asarray(row_counts)[np.minimum(np.searchsorted(row_counts, num_rows), len(row_counts) - 1)]
    for rows in np.unique(height):
        sequences = np.flatnonzero(height == rows)
        num_tiles = -(-num_rows[sequences] // rows)
        sequence = np.repeat(sequences, num_tiles)
        ordinal = np.arange(len(sequence)) - np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles)
        row = ordinal[:, None] * rows + np.arange(rows)
        real = row < num_rows[sequence][:, None]
        row = np.minimum(row, num_rows[sequence][:, None] - 1)
        token, head = row // group, row % group
        positions = (context - np.diff(starts))[sequence][:, None] + token
        query = (starts[sequence][:, None] + token)[:, None] * num_heads + head[:, None]
        query = query + (np.arange(num_kv_heads) * group)[:, None]
        first = np.zeros(len(sequence), np.int64)
        if window is not None:
            first = np.maximum(positions[:, 0] - window + 1, 0) // TILE_KEYS
        num_key_tiles = positions[:, -1] // TILE_KEYS + 1 - first
        order = np.argsort(-num_key_tiles, kind="stable")
        yield _Tiles(sequence[order], positions[order], query[order], real[order], first[order], num_key_tiles[order])


def _cut(tiles: _Tiles, num_kv_heads: int) -> Iterator[tuple[int, int]]:
    """Ranges of tiles whose scores fit SLAB_BYTES; a single tile may be more."""
    most = SLAB_BYTES // (4 * TILE_KEYS * num_kv_heads * tiles.positions.shape[1])
    begin = 0
    while begin < len(tiles.sequence):
        entries = np.cumsum(tiles.num_key_tiles[begin:])
        end = begin + max(1, int(np.searchsorted(entries, most, side="right")))
        yield begin, end
        begin = end


def _slab(
    batch: StepBatch, tiles: _Tiles, part: slice, rows: slice, num_heads: int, num_kv_heads: int, window: int | None
) -> Slab:
    counts = tiles.num_key_tiles[part]
    level, tile = np.nonzero(np.arange(counts[0])[:, None] < counts)
    key_tile, sequence = tiles.first_key_tile[part][tile] + level, tiles.sequence[part][tile]
    heads = np.arange(num_kv_heads)
    positions = tiles.positions[part][tile]
    last = positions - key_tile[:, None] * TILE_KEYS  # of the keys that a row sees, within the tile
    first = np.full_like(last, 0) if window is None else last - window + 1
    masked = np.flatnonzero((last.min(1) < TILE_KEYS - 1) | (first.max(1) > 0))
    key = np.arange(TILE_KEYS)
    hidden = (key > last[masked][..., None]) | (key < first[masked][..., None])
    mask = np.where(hidden, np.float32("-inf"), np.float32(0))
    return Slab(
        rows=rows,
        tile_rows=positions.shape[1],
        num_kv_heads=num_kv_heads,
        levels=(np.searchsorted(level, np.arange(counts[0] + 1)) * num_kv_heads).tolist(),
        entry_tile=torch.from_numpy((tile[:, None] * num_kv_heads + heads).ravel()),
        key_units=torch.from_numpy(_key_units(batch, sequence, key_tile, num_kv_heads)),
        masked=torch.from_numpy(masked),
        mask=torch.from_numpy(mask[:, None]),
        distance=torch.from_numpy(last.repeat(num_kv_heads, 0).astype(np.float32)),
        heads=torch.from_numpy(tiles.query[part][tile].reshape(-1, positions.shape[1]) % num_heads),
    )


def _key_units(batch: StepBatch, sequence: Ints, key_tile: Ints, num_kv_heads: int) -> Ints:
    """Where the keys lie in the cache seen as [units, unit * head_dim]: [entries * kv_heads, units per tile]."""
    cache, table = batch.kv_cache, batch.block_tables.numpy()
    unit = gcd(cache.block_size, TILE_KEYS)
    position = key_tile[:, None] * TILE_KEYS + np.arange(0, TILE_KEYS, unit)
    written = position < np.asarray(batch.context_lengths)[sequence][:, None]
    block = table[sequence[:, None], np.minimum(position // cache.block_size, table.shape[1] - 1)]
    block = np.where(written, block, cache.num_blocks)
    offset = np.where(written, position % cache.block_size // unit, 0)
    block = block[:, None] * num_kv_heads + np.arange(num_kv_heads)[:, None]  # [entries, kv_heads, units per tile]
    units: Ints = block * (cache.block_size // unit) + offset[:, None]
    return units.reshape(-1, units.shape[-1])


def attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: TilePlan, options: AttentionOptions) -> Tensor:
    """q: [tokens, heads, head_dim]. Returns [tokens, heads * head_dim]. Computed in float32."""
    tokens, _, dim = q.shape
    queries = q.reshape(-1, dim).index_select(0, plan.query_index).float().mul_(options.scale)
    values, sums = torch.zeros_like(queries), queries.new_zeros(len(queries))
    k_units, v_units = (cache.view(-1, plan.unit * dim) for cache in (k_cache, v_cache))
    for slab in plan.slabs:
        _attend_slab(queries[slab.rows], k_units, v_units, slab, options, values[slab.rows], sums[slab.rows])
    values.div_(sums[:, None])
    return values.index_select(0, plan.output_index).view(tokens, -1).to(q.dtype)


def _attend_slab(
    queries: Tensor,
    k_units: Tensor,
    v_units: Tensor,
    slab: Slab,
    options: AttentionOptions,
    values: Tensor,
    sums: Tensor,
) -> None:
    """Adds up the slab's weighted values [rows, head_dim] and sums [rows], which are zero at first."""
    rows, dim = slab.tile_rows, queries.shape[1]
    entries = len(slab.entry_tile)
    scores = queries.new_empty(entries, rows, TILE_KEYS)
    tiles = queries.view(-1, rows * dim)
    for piece in _pieces(entries, dim):
        keys = _gather(k_units, slab.key_units[piece], dim)
        entry_queries = tiles.index_select(0, slab.entry_tile[piece]).view(-1, rows, dim)
        torch.bmm(entry_queries, keys.transpose(1, 2), out=scores[piece])
    if options.cap is not None:
        scores.div_(options.cap).tanh_().mul_(options.cap)
    if options.slopes is not None:
        slopes = torch.tensor(options.slopes, dtype=torch.float32)[slab.heads]
        scores.add_((torch.arange(TILE_KEYS) - slab.distance[..., None]).mul_(slopes[..., None]))
    by_tile = scores.view(-1, slab.num_kv_heads, rows, TILE_KEYS)
    by_tile.index_copy_(0, slab.masked, by_tile.index_select(0, slab.masked).add_(slab.mask))
    _softmax_numerators(scores, slab, sums.view(-1, rows))
    values = values.view(-1, rows, dim)
    for piece in _pieces(entries, dim):
        weighted = torch.bmm(scores[piece], _gather(v_units, slab.key_units[piece], dim))
        for begin, end in pairwise(slab.levels):
            low, high = max(begin, piece.start), min(end, piece.stop)
            if low < high:
                values[low - begin : high - begin] += weighted[low - piece.start : high - piece.start]


def _softmax_numerators(scores: Tensor, slab: Slab, sums: Tensor) -> None:
    """Replaces scores by exp(score - maximum of the row) in place, and adds these up into sums [row tiles, rows]."""
    levels = list(pairwise(slab.levels))
    tile_maximum = scores.amax(-1)
    maximum = tile_maximum[: levels[0][1]].clone()
    for begin, end in levels[1:]:
        torch.maximum(maximum[: end - begin], tile_maximum[begin:end], out=maximum[: end - begin])
    scores.sub_(maximum.index_select(0, slab.entry_tile)[..., None]).exp_()
    tile_sum = scores.sum(-1)
    for begin, end in levels:
        sums[: end - begin] += tile_sum[begin:end]


def _pieces(entries: int, dim: int) -> Iterator[slice]:
    most = max(1, PIECE_BYTES // (4 * TILE_KEYS * dim))
    return (slice(begin, min(begin + most, entries)) for begin in range(0, entries, most))


def _gather(units: Tensor, index: Tensor, dim: int) -> Tensor:
    """Keys or values of each entry: [entries, TILE_KEYS, head_dim] float32."""
    return units.index_select(0, index.view(-1)).float().view(-1, TILE_KEYS, dim)
