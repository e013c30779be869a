"""The CPU backend: our own kernels where they are built, else torch's operators; either way a row's bits depend on its
own tokens and positions alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...batch import StepBatch
from ..interface import (
    Allowed,
    AttentionOptions,
    BlockParts,
    CacheSpec,
    Drawn,
    DrawRequest,
    FusedBlock,
    GuidedRows,
    KVCache,
    Matmul,
    Penalties,
    Sums,
)
from ..weights import DenseRows, QuantizedWeight
from .linear import LinearFactory
from .native.block import fuse, join
from .native.layer import NativeLayer
from .native.library import load_library
from .native.sampling import NativeSampling
from .operators import TorchOperators
from .proofs import Proofs
from .quantized import QuantizedLinearFactory


class CpuKernels:
    """Kernels for float32 and bfloat16."""

    device = torch.device("cpu")

    def __init__(self, instruction_set: str | None = None) -> None:
        """instruction_set: of our own kernels, or `none`; by default the best that the processor executes."""
        self.proofs = Proofs()
        library = self._library = load_library(instruction_set)
        self._linear = LinearFactory(self.proofs, library)
        self._quantized = QuantizedLinearFactory(self.proofs, library)
        self._torch = TorchOperators()
        self._native = None if library is None else NativeLayer(library)
        self._sampling = None if library is None else NativeSampling(library)
        self._elements: TorchOperators | NativeLayer = self._native or self._torch

    @property
    def row_stable(self) -> bool:
        return self.proofs.row_stable and not self._torch.unstable

    def _attention(self, head_dim: int, block_size: int) -> "TorchOperators | NativeLayer":
        """Who attends with heads and blocks of these sizes; each has a layout of the cache."""
        if self._native is not None and self._native.attends(head_dim, block_size):
            return self._native
        return self._torch

    def prepare(self, hidden_size: int, head_dim: int) -> None:
        if self._native is None:
            self._torch.prepare_elements(hidden_size, head_dim)

    def new_kv_cache(self, spec: CacheSpec, num_blocks: int, block_size: int) -> KVCache:
        return self._attention(spec.head_dim, block_size).new_kv_cache(spec, num_blocks, block_size)

    def linear(self, weight: Tensor | DenseRows) -> Matmul:
        return self._linear(weight)

    def quantized_linear(self, weight: QuantizedWeight, dtype: torch.dtype, label: str) -> Matmul:
        return self._quantized(weight, dtype, label)

    def fuse_block(self, parts: BlockParts) -> FusedBlock | None:
        return None if self._library is None else fuse(self._library, parts)

    def join_blocks(self, blocks: Sequence[FusedBlock]) -> FusedBlock | None:
        return None if self._library is None else join(self._library, blocks)

    def draw_ids(
        self,
        raw: Tensor,
        processed: Tensor,
        requests: Sequence[DrawRequest],
        allowed: Allowed | None,
        guided: GuidedRows | None,
    ) -> Drawn | None:
        return None if self._sampling is None else self._sampling.draw(raw, processed, requests, allowed, guided)

    def penalize(self, logits: Tensor, rows: Sequence[int], penalties: Sequence[Penalties]) -> bool:
        if self._sampling is not None:
            self._sampling.penalize(logits, rows, penalties)
        return self._sampling is not None

    def embedding(self, weight: Tensor, ids: Tensor) -> Tensor:
        return weight.index_select(0, ids)

    def embed_share(self, weight: Tensor, owned: range, ids: Tensor, sums: Sums) -> Tensor | None:
        return None if self._native is None else self._native.embed_share(weight, owned, ids, sums)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._elements.rms_norm(x, weight, eps)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self._elements.rotate(x, cos, sin)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        return self._elements.silu_and_mul(gate_up)

    def store_kv(self, k: Tensor, v: Tensor, layer: int, batch: StepBatch) -> None:
        self._attention(k.shape[2], batch.kv_cache.block_size).store_kv(k, v, layer, batch)

    def attention(self, q: Tensor, layer: int, batch: StepBatch, options: AttentionOptions) -> Tensor:
        return self._attention(q.shape[2], batch.kv_cache.block_size).attention(q, layer, batch, options)
