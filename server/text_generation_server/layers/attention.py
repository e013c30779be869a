"""Self-attention over the paged KV cache, the same for every architecture.

What differs between architectures is data: how heads are laid out in the checkpoint, how positions enter, and the
options of the attention kernel.
"""

import math
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
        owned = tp.share(self.num)
        return range(owned.start * self.dim, owned.stop * self.dim)

    def kv_of(self, tp: TensorParallel) -> list[int]:
        """The key/value heads that this rank needs, in the order of its query heads, the same number on every rank.

        Each serves as many query heads of this rank. Where that does not come out even (12 query and 4 key/value heads
        on 3 ranks: heads 0 to 3 of the first need 0, 0, 0 and 1) a head is held more than once.
        """
        owned, sharing = tp.share(self.num), self.num // self.num_kv
        run = math.gcd(len(owned), sharing)
        return [first // sharing for first in range(owned.start, owned.stop, run)]

    def kv_rows(self, tp: TensorParallel) -> tuple[range, ...]:
        """Features of the key (or value) heads of `kv_of`, neighbours together."""
        runs: list[range] = []
        for head in self.kv_of(tp):
            rows = range(head * self.dim, (head + 1) * self.dim)
            if runs and runs[-1].stop == rows.start:
                runs[-1] = range(runs[-1].start, rows.stop)
            else:
                runs.append(rows)
        return tuple(runs)


def separate_qkv(load: Loader, heads: Heads) -> list[Part]:
    """Three linears, each [heads * dim, hidden]."""
    kv = heads.kv_rows(load.tp)
    return [Part("q_proj", (heads.q_rows(load.tp),)), Part("k_proj", kv), Part("v_proj", kv)]


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
