"""Attention over the paged cache (`sources/attention.cu`): what its blocks are to do, worked out once per step."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...batch import Singles, StepBatch
from ..interface import AttentionOptions
from .backend import Backend, Module

# Of `attention.cu`.
FEW_ROWS, SPLIT = 16, 256
MOST_DIM = 256

Ints = NDArray[np.int32]


class _Attention(ctypes.Structure):
    """`Attention` of attention.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k_cache", "v_cache", "slopes", "tables", "items", "y", "partial")),
        ("q_stride", ctypes.c_int64),
        ("table_width", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("heads", "kv_heads", "block_size", "window")),
        ("scale", ctypes.c_float),
        ("cap", ctypes.c_float),
    )


@dataclass(frozen=True)
class WorkList:
    """A step's attention.

    few: blocks of 16 rows, for sequences with no more (query heads that share a key/value head, times tokens); many: of
    more rows. int32 [blocks, 6]: row of the block table, first token, tokens, positions, first row, first of `places`.
    places: int32 [tokens of few, 2]: token, position. splits: of the longest sequence in `few`.
    """

    few: Tensor
    many: Tensor
    places: Tensor
    splits: int


def plan_work(batch: StepBatch, group: int, rows_of_many: int, backend: Backend) -> WorkList:
    """group: query heads that share a key/value head; rows_of_many: rows of a larger block."""
    starts, contexts = np.asarray(batch.starts, np.int32), np.asarray(batch.context_lengths, np.int32)
    tokens = np.diff(starts)
    is_few = tokens * group <= FEW_ROWS
    few, many = np.flatnonzero(is_few), np.flatnonzero(~is_few)
    firsts = np.cumsum(tokens[few]) - tokens[few]
    place = np.concatenate([np.empty(0, np.int32), *(np.arange(starts[i], starts[i + 1], dtype=np.int32) for i in few)])
    owner = np.repeat(few, tokens[few])
    positions = contexts[owner] - starts[owner + 1] + place
    num_blocks = -(-tokens[many] * group // rows_of_many)
    many = np.repeat(many, num_blocks)
    ordinal = np.arange(len(many)) - np.repeat(np.cumsum(num_blocks) - num_blocks, num_blocks)

    tables = np.arange(len(tokens)) if batch.table_rows is None else batch.table_rows

    def items(sequences: NDArray[np.int64], first_row: Ints, first_place: Ints) -> Ints:
        columns = (tables[sequences], starts[sequences], tokens[sequences], contexts[sequences], first_row, first_place)
        return np.stack(columns, 1).astype(np.int32)

    lists = (
        items(few, np.zeros(len(few), np.int32), firsts),
        items(many, (ordinal * rows_of_many).astype(np.int32), np.zeros(len(many), np.int32)),
        np.stack((place, positions), 1).astype(np.int32),
    )
    # One copy to the device.
    flat = np.concatenate([part.ravel() for part in lists])
    padded = np.zeros(-(-len(flat) // 2), np.int64)
    padded.view(np.int32)[: len(flat)] = flat
    whole = torch.empty(len(padded), dtype=torch.int64, device=backend.device)
    backend.streams.upload(padded, whole)
    parts = torch.split(whole.view(torch.int32)[: len(flat)], [part.size for part in lists])
    splits = -(-int(contexts[few].max(initial=0)) // SPLIT)
    return WorkList(parts[0].view(-1, 6), parts[1].view(-1, 6), parts[2].view(-1, 2), splits)


def plan_singles(batch: StepBatch, singles: Singles, group: int, rows_of_many: int) -> WorkList:
    """The same for rows of one token each, from what is on the device: sizes depend on the number of rows alone."""
    positions, rows = batch.positions.int(), len(batch.positions)
    index = torch.arange(rows, dtype=torch.int32, device=positions.device)
    blocks = 1 if group <= FEW_ROWS else -(-group // rows_of_many)
    first_row = rows_of_many * torch.arange(blocks, dtype=torch.int32, device=positions.device)
    columns = (singles.table_rows.int(), index, torch.ones_like(index), positions + 1, torch.zeros_like(index), index)
    # No operation that copies a number from the host: that cannot be recorded.
    items = torch.stack(columns, 1)[:, None].repeat(1, blocks, 1).view(rows * blocks, 6)
    if group <= FEW_ROWS:
        return WorkList(items, items[:0], torch.stack((index, positions), 1), -(-singles.longest // SPLIT))
    items[:, 4], items[:, 5] = first_row.repeat(rows), 0
    return WorkList(items[:0], items, index.new_empty(0, 2), 0)


class PagedAttention:
    """For one head size and dtype. Caches are [num_blocks, kv_heads, block_size, head_dim]."""

    def __init__(self, backend: Backend, head_dim: int, dtype: torch.dtype) -> None:
        if head_dim % 8 or not 0 < head_dim <= MOST_DIM:
            raise ValueError(f"heads of {head_dim}; expected a multiple of 8, {MOST_DIM} at most")
        self.head_dim, self.dtype, self._backend = head_dim, dtype, backend
        defines = {"BF16": int(dtype == torch.bfloat16), "HEAD_DIM": head_dim}
        self._module: Module = backend.module("attention.cu", defines)
        self._kept: dict[tuple[float, ...], Tensor] = {}
        self._dim = -(-head_dim // 32) * 32
        self._keys, self._warps = (16, 2) if self._dim > 128 else (32, 4)

    def __call__(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: StepBatch, options: AttentionOptions
    ) -> Tensor:
        """q: [tokens, heads, head_dim]."""
        tokens, heads, dim = q.shape
        kv_heads, block_size = k_cache.shape[1:3]
        if q.dtype != self.dtype or dim != self.head_dim or k_cache.dtype != self.dtype or heads % kv_heads:
            found = f"q {q.dtype} {list(q.shape)}, cache {k_cache.dtype} {list(k_cache.shape)}"
            raise ValueError(f"{found}; expected {self.dtype} with heads of {self.head_dim}")
        # A head is read 16 bytes at a time.
        if q.stride(2) != 1 or q.stride(1) != dim or q.stride(0) % 8 or q.data_ptr() % 16:
            q = q.contiguous()
        group, rows_of_many = heads // kv_heads, 16 * self._warps
        work = batch.once(
            ("cuda attention", group, rows_of_many),
            lambda: (
                plan_work(batch, group, rows_of_many, self._backend)
                if batch.singles is None
                else plan_singles(batch, batch.singles, group, rows_of_many)
            ),
        )
        y = q.new_empty(tokens, heads * dim)
        window, cap, slopes = options.window or 0, options.cap or 0.0, self._slopes(options)

        def arguments(items: Tensor, partial: Tensor | None) -> _Attention:
            return _Attention(
                q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), slopes, batch.block_tables.data_ptr(),
                items.data_ptr(), y.data_ptr(), None if partial is None else partial.data_ptr(), q.stride(0),
                batch.block_tables.stride(0), heads, kv_heads, block_size, window, options.scale, cap,
            )  # fmt: skip

        stages = 2 * 2 * self._keys * self._dim * 2
        if len(work.many):
            shared = stages + 16 * self._warps * self._dim * 4
            grid = (len(work.many), kv_heads, 1)
            self._module.launch("attention_many", grid, 32 * self._warps, shared, arguments(work.many, None))
        if len(work.few):
            spread, splits = work.splits > 1, work.splits
            partial = q.new_empty(len(work.places), heads, splits, dim + 2, dtype=torch.float32) if spread else None
            shared = stages + 16 * self._dim * 4
            grid = (len(work.few), kv_heads, splits)
            self._module.launch("attention_16", grid, 32, shared, arguments(work.few, partial))
            if partial is not None:
                grid, threads = (len(work.places), heads, 1), -(-dim // 32) * 32
                self._module.launch(
                    "attention_join", grid, threads, 0, partial, work.places, y, heads, splits, window
                )  # fmt: skip
        return y

    def _slopes(self, options: AttentionOptions) -> int | None:
        """Where they lie on the device, as float32."""
        if options.slopes is None:
            return None
        if options.slopes not in self._kept:
            self._kept[options.slopes] = torch.tensor(options.slopes, dtype=torch.float32, device=self._backend.device)
        return self._kept[options.slopes].data_ptr()
