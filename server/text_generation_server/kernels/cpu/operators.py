"""A layer by torch's operators, called so that a row's bits depend on its own tokens and positions alone."""

import logging

import torch
from torch import Tensor

from ...batch import StepBatch
from ..interface import AttentionOptions, CacheSpec, KVCache
from .attention import TILE_KEYS, TILE_ROWS, attend, plan_tiles
from .proofs import cancelling, elements_are_independent, proven_tile_rows, rows_are_independent

logger = logging.getLogger(__name__)


class TorchOperators:
    """For float32 and bfloat16. Elementwise work and sums are in float32 for both.

    Only operations that are rounded correctly (+, *, /, sqrt), and exp, which is proven, touch single elements: torch's
    silu, for one, gives other bits in the tail of a vector loop, so it changes with the number of rows.
    """

    def __init__(self) -> None:
        self._tile_rows: dict[int, tuple[int, ...]] = {}
        self._proven: set[object] = set()
        self.unstable: list[str] = []

    def _note(self, what: str, holds: bool) -> None:
        if not holds:
            self.unstable.append(what)
            logger.warning("%s: rows influence each other on this processor; replay is not exact", what)

    def prepare_elements(self, *sizes: int) -> None:
        """Proves norms of these sizes, and exp."""
        if "exp" not in self._proven:
            self._proven.add("exp")
            exponents = torch.randn(40_000, generator=torch.Generator().manual_seed(0)) * 10
            self._note("exp", elements_are_independent(torch.exp, exponents))
        for size in set(sizes) - self._proven:
            self._proven.add(size)
            x, _ = cancelling(64, size, 1)
            self._note(f"norm of {size}", rows_are_independent(_mean_square, x))

    def prepare_attention(self, head_dim: int) -> None:
        if head_dim not in self._tile_rows:
            proven = proven_tile_rows(head_dim, TILE_KEYS, TILE_ROWS)
            scores, _ = cancelling(512, TILE_KEYS, 1)
            sums = rows_are_independent(lambda x: x.sum(-1), scores.exp())
            self._note(f"attention with heads of {head_dim}", bool(proven) and sums)
            self._tile_rows[head_dim] = proven or TILE_ROWS
            logger.info("attention with heads of %d: tiles of %s rows x %d keys", head_dim, proven, TILE_KEYS)

    def new_kv_cache(self, spec: CacheSpec, num_blocks: int, block_size: int) -> KVCache:
        self.prepare_attention(spec.head_dim)

        def allocate() -> Tensor:
            cache = torch.empty((num_blocks + 1, spec.num_kv_heads, block_size, spec.head_dim), dtype=spec.dtype)
            cache[num_blocks] = 0
            return cache

        return KVCache([(allocate(), allocate()) for _ in range(spec.num_layers)], num_blocks, block_size)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = x.float()
        scale = _mean_square(y).add_(eps).rsqrt_()
        return (y * scale).mul_(weight).to(x.dtype)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        y = x.float()
        swapped = torch.cat((y[..., half:], y[..., :half]), -1).mul_(sin[:, None])
        return (y * cos[:, None]).add_(swapped).to(x.dtype)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.float().chunk(2, -1)
        return (gate / torch.neg(gate).exp_().add_(1)).mul_(up).to(gate_up.dtype)

    def store_kv(self, k: Tensor, v: Tensor, layer: int, batch: StepBatch) -> None:
        num_kv_heads = k.shape[1]
        begun, rows = batch.once("store", lambda: _store_index(batch, num_kv_heads))
        for cache, new in zip(batch.kv_cache.layers[layer], (k, v), strict=True):
            if len(begun):
                cache.index_fill_(0, begun, 0)
            cache.view(-1, cache.shape[-1]).index_copy_(0, rows, new.reshape(-1, cache.shape[-1]))

    def attention(self, q: Tensor, layer: int, batch: StepBatch, options: AttentionOptions) -> Tensor:
        k_cache, v_cache = batch.kv_cache.layers[layer]
        num_heads, num_kv_heads, window = q.shape[1], k_cache.shape[1], options.window
        heights = self._tile_rows[q.shape[2]]
        plan = batch.once(("tiles", window), lambda: plan_tiles(batch, num_heads, num_kv_heads, window, heights))
        return attend(q, k_cache, v_cache, plan, options)


def _mean_square(x: Tensor) -> Tensor:
    """Of each row of x [..., size] float32: [..., 1]."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1])


def _store_index(batch: StepBatch, num_kv_heads: int) -> tuple[Tensor, Tensor]:
    """Blocks whose first position is written in this step, and the rows of the flat cache that take its keys."""
    size = batch.kv_cache.block_size
    block, offset = batch.slots // size, batch.slots % size
    rows = (block[:, None] * num_kv_heads + torch.arange(num_kv_heads)) * size + offset[:, None]
    return block[offset == 0], rows.view(-1)
