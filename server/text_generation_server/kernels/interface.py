"""What a device must be able to compute. Layers are given one `Kernels` and never ask what device it is on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..batch import StepBatch
    from .weights import QuantizedWeight


class Matmul(Protocol):
    """y[rows, out] = x[rows, in] @ W.T for one prepared weight; y is new and has the dtype of x."""

    def __call__(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class CacheSpec:
    """The keys and values that one rank keeps for each token."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True)
class KVCache:
    """Paged keys and values of every layer. The layout of the tensors is known to the kernels that made it only."""

    layers: Sequence[tuple[Tensor, Tensor]]
    num_blocks: int
    block_size: int


@dataclass(frozen=True)
class AttentionOptions:
    """How one layer attends. `window`: a query sees that many positions, its own included; None: all before it."""

    scale: float
    window: int | None = None


class Kernels(Protocol):
    """The operations of a decoder on one device."""

    @property
    def device(self) -> torch.device:
        """Where every tensor of a `StepBatch` and of the model lives."""
        ...

    @property
    def row_stable(self) -> bool:
        """Whether a row's bits depend on its own tokens and positions alone."""
        ...

    def prepare(self, hidden_size: int, head_dim: int) -> None:
        """Told once by a model that will be computed: the sizes of its norms and heads."""
        ...

    def new_kv_cache(self, spec: CacheSpec, num_blocks: int, block_size: int) -> KVCache:
        """Allocates the cache. Memory is committed by the operating system as blocks are written."""
        ...

    def linear(self, weight: Tensor) -> Matmul:
        """Prepares a dense weight [out, in], of the dtype of the activations, for repeated use. May keep `weight`."""
        ...

    def quantized_linear(self, weight: QuantizedWeight, dtype: torch.dtype, label: str) -> Matmul:
        """Prepares a quantized weight for activations of `dtype`: the best product that fits brings it into its layout.

        label: names the layer in the log, once for each kind of layer, with why better products did not fit.
        """
        ...

    def embedding(self, weight: Tensor, ids: Tensor) -> Tensor:
        """weight: [num, hidden]; ids: [tokens] int64 in [0, num). Returns [tokens, hidden]."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x²) + eps) * weight over the last axis, computed in float32. x: [tokens, ..., size].

        weight: [size], or x's shape without the tokens.
        """
        ...

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotates the pairs (i, i + head_dim / 2). x: [tokens, heads, head_dim]; cos, sin: [tokens, head_dim] float32.

        cos and sin hold the factors of both halves; the first half of sin is negated.
        """
        ...

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up. gate_up: [tokens, 2 * size], gate first. Returns [tokens, size]."""
        ...

    def store_kv(self, k: Tensor, v: Tensor, layer: int, batch: StepBatch) -> None:
        """Writes k, v [tokens, kv_heads, head_dim] of this step into the cache of `layer`, in place."""
        ...

    def attention(self, q: Tensor, layer: int, batch: StepBatch, options: AttentionOptions) -> Tensor:
        """Causal attention of q [tokens, heads, head_dim] over the cache. Returns [tokens, heads * head_dim]."""
        ...


@dataclass(frozen=True)
class Norm:
    """x / sqrt(mean(x²) + eps) * weight; weight: [hidden]."""

    weight: Tensor
    eps: float


@dataclass(frozen=True)
class BlockParts:
    """x + attention(norm(x)), then x + mlp(norm(x)), on a single rank: rotated heads, silu(gate) * up.

    qkv_bias: of q, k and v one after another. head_norm: of queries and keys, weight [heads + kv_heads, head_dim].
    """

    layer: int
    attention_norm: Norm
    qkv: Matmul
    qkv_bias: Tensor | None
    head_norm: Norm | None
    output: Matmul
    mlp_norm: Norm
    gate_up: Matmul
    down: Matmul
    num_heads: int
    num_kv_heads: int
    head_dim: int
    options: AttentionOptions


class FusedBlock(Protocol):
    """A block as one operation. x: [tokens, hidden], which may be overwritten; cos, sin: as for `rotate`.

    None: the step's cache is laid out otherwise, and nothing was computed.
    """

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, batch: StepBatch) -> Tensor | None: ...


class Survey(Protocol):
    """What drawing ids asks of logits, of all rows at once, each row's bits its own.

    raw, processed: [rows, vocab] float32, which may be the same tensor. masks: [n, ceil(vocab / 32)] int32, one bit for
    each id that may be drawn, lowest first; mask_of: [rows] int64, the mask of each row of `processed`, or -1.
    Returns the log of the sum of exponentials of each row of `raw`, float32; the lowest of the best ids of `processed`
    that may be drawn, int64; and bits, uint8: 1 if all of `raw` is finite, 2 if the best of `processed` is.
    """

    def __call__(
        self, raw: Tensor, processed: Tensor, masks: Tensor, mask_of: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]: ...


@runtime_checkable
class SurveysLogits(Protocol):
    """Kernels that look at logits in one pass instead of one for each question."""

    def surveyor(self) -> Survey | None:
        """None: single operations do it."""
        ...


@runtime_checkable
class FusesBlocks(Protocol):
    """Kernels that compute a whole block at once, which saves what every single operation costs."""

    def fuse_block(self, parts: BlockParts) -> FusedBlock | None:
        """None: this block is computed by single operations."""
        ...
