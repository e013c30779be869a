"""Self-attention over the paged KV cache, the same for every architecture.

What differs between architectures is data: how heads are laid out in the checkpoint, how positions enter, and the
options of the attention kernel.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..batch import StepBatch
from ..kernels.interface import AttentionOptions
from ..loading import Loader, TensorParallel
from ..quantization.format import Part
from .linear import load_columns, load_row_parallel
from .rotary import Rotary


@dataclass(frozen=True)
class Heads:
    """Query and key/value heads, of the whole model."""

    num: int
    num_kv: int
    dim: int

    def q_rows(self, tp: TensorParallel) -> range:
        """Features of the query heads that this rank owns."""
        return _rows(tp.share(self.num), self.dim)

    def kv_rows(self, tp: TensorParallel) -> range:
        """Features of the key (or value) heads that this rank owns."""
        return _rows(tp.share_kv_heads(self.num_kv), self.dim)


def _rows(heads: range, dim: int) -> range:
    return range(heads.start * dim, heads.stop * dim)


def separate_qkv(load: Loader, heads: Heads) -> list[Part]:
    """Three linears, each [heads * dim, hidden]."""
    q, kv = heads.q_rows(load.tp), heads.kv_rows(load.tp)
    return [Part("q_proj", (q,)), Part("k_proj", (kv,)), Part("v_proj", (kv,))]


@dataclass(frozen=True)
class Positions:
    """How queries and keys are changed before they meet: normalized per head, rotated."""

    rotary: Rotary
    qk_norm: Callable[[Tensor], Tensor] | None = None


class Attention:
    """output(attention(qkv(x)))"""

    def __init__(
        self, load: Loader, layer: int, heads: Heads, qkv: Sequence[Part], positions: Positions, window: int | None
    ):
        self.kernels, self.layer, self.dim = load.kernels, layer, heads.dim
        self.num_q, self.num_kv = qkv[0].size // heads.dim, qkv[1].size // heads.dim
        self.qkv = load_columns(load, qkv)
        self.output = load_row_parallel(load, "o_proj", load.hidden_size, heads.q_rows(load.tp))
        self.positions = positions
        self.options = AttentionOptions(heads.dim**-0.5, window)

    def __call__(self, x: Tensor, batch: StepBatch) -> Tensor:
        qkv = self.qkv(x).view(len(x), -1, self.dim)  # [tokens, q heads + 2 * kv heads, head_dim]
        qk, v = qkv[:, : self.num_q + self.num_kv], qkv[:, self.num_q + self.num_kv :]
        if self.positions.qk_norm is not None:
            qk = self.positions.qk_norm(qk)
        qk = self.positions.rotary(qk, batch)
        self.kernels.store_kv(qk[:, self.num_q :], v, self.layer, batch)
        return self.output(self.kernels.attention(qk[:, : self.num_q], self.layer, batch, self.options))
