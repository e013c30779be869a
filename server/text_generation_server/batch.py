"""The tokens of one step, as the model sees them: integers in tensors, and the cache they refer to."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .kernels.interface import KVCache

T = TypeVar("T")


@dataclass(frozen=True)
class Singles:
    """Said of a step whose rows have one token each, so that what is to be done depends on nothing the host must know.

    table_rows: [rows] int64, of each row its row of `block_tables`. longest: no row has more positions in the cache.
    """

    table_rows: Tensor
    longest: int


@dataclass(frozen=True)
class StepBatch:
    """The ragged rows of a step, flattened: row i owns tokens starts[i]:starts[i + 1], consecutive positions.

    Every row has at least one token. A position's key and value go to slot block_id * block_size + offset, with
    offset = position % block_size and block_id = block_tables[row, position // block_size].
    """

    token_ids: Tensor  # [tokens] int64
    positions: Tensor  # [tokens] int64, absolute
    starts: Sequence[int]  # [rows + 1]
    context_lengths: Sequence[int]  # [rows]: positions in the cache once this step's tokens are stored
    slots: Tensor  # [tokens] int64, no duplicates
    block_tables: Tensor  # [rows, max blocks of a row in this step] int64; behind a row's own blocks anything, e.g. 0
    sample_rows: Tensor  # [sampled] int64: indices of the tokens whose logits are wanted
    kv_cache: KVCache
    # Tokens whose logits are looked at and not kept: `score` is given those of a few at a time, [n, vocab] float32, in
    # order, on rank 0.
    scored_rows: Tensor | None = None  # [scored] int64
    score: Callable[[Tensor], None] | None = None
    # Of each row its row of `block_tables`; None: they are in the order of rows.
    table_rows: NDArray[np.int64] | None = None
    # If set, `starts` and `context_lengths` mean nothing.
    singles: Singles | None = None
    _shared: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def on(self, device: torch.device) -> StepBatch:
        """The same, with its tensors there."""
        if self.token_ids.device == device:
            return self
        names = ("token_ids", "positions", "slots", "block_tables", "sample_rows", "scored_rows")
        tensors = {name: t for name in names if (t := getattr(self, name)) is not None}
        return replace(self, **{name: t.to(device, non_blocking=True) for name, t in tensors.items()})

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """What layers share within this step (index plans, rotary factors), computed by the first that asks."""
        if key not in self._shared:
            self._shared[key] = compute()
        value: T = self._shared[key]
        return value
