"""What a device must be able to compute. Layers are given one `Kernels` and never ask what device it is on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from ..batch import StepBatch
    from .weights import DenseRows, QuantizedWeight


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
    """How one layer attends.

    scale: what products of queries and keys are multiplied with.
    window: a query sees that many positions, its own included; None: all before it.
    cap: scores become cap * tanh(score / cap) (Gemma 2, arXiv:2408.00118); None: they stay.
    slopes: of each query head, what is added for each position that a key is further on, after that (ALiBi, Press et
        al. 2021, arXiv:2108.12409); None: nothing.
    """

    scale: float
    window: int | None = None
    cap: float | None = None
    slopes: tuple[float, ...] | None = None


@runtime_checkable
class HoldsMemory(Protocol):
    """Kernels of a device that has memory of its own. Bytes are those of this process, unless it says otherwise."""

    def available_bytes(self, budget_bytes: int) -> int:
        """What is left of a budget, and free on the device."""
        ...

    def peak_bytes(self, forget: bool = False) -> int:
        """The most that was held since it was forgotten. forget: begin anew, first."""
        ...

    def lost(self) -> str | None:
        """Why this process can no longer use the device; None: it can."""
        ...


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

    def linear(self, weight: Tensor | DenseRows) -> Matmul:
        """Prepares a dense weight [out, in], of the dtype of the activations, for repeated use. May keep a tensor.

        A tensor is on the device. Rows are read in order, each once; a kernel that makes a layout of its own does not
        hold more than some of them.
        """
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


class Exchange(Protocol):
    """How native code takes part in sums over ranks."""

    @property
    def address(self) -> int:
        """Of the `Exchange` of native/exchange.h."""
        ...

    def failure(self) -> Exception:
        """What kept native code from ending a sum."""
        ...


class Sums(Protocol):
    """Sums over ranks."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, on every rank. May overwrite and return `x`."""
        ...

    def exchange(self) -> Exchange | None:
        """The same for native code, with the same bits; None: these ranks share no memory."""
        ...


@runtime_checkable
class EmbedsShares(Protocol):
    """Kernels that look up an embedding that is split over ranks, and sum it up, at once."""

    def embed_share(self, weight: Tensor, owned: range, ids: Tensor, sums: Sums) -> Tensor | None:
        """weight: of the ids `owned`. ids: [tokens] int64. Returns [tokens, hidden]; None: not with these ranks."""
        ...


@dataclass(frozen=True)
class BlockParts:
    """x + attention(norm(x)), then x + mlp(norm(x)): rotated heads, silu(gate) * up.

    qkv_bias: of q, k and v one after another. head_norm: of queries and keys, weight [heads + kv_heads, head_dim].
    collectives: sum up what each rank adds to x, of the heads and features that it has; None: it has all.
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
    collectives: Sums | None


class FusedBlock(Protocol):
    """A block as one operation. x: [tokens, hidden], which may be overwritten; cos, sin: as for `rotate`.

    None: the step's cache is laid out otherwise, or its ranks share no memory, and nothing was computed.
    """

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, batch: StepBatch) -> Tensor | None: ...


@runtime_checkable
class FusesBlocks(Protocol):
    """Kernels that compute a whole block at once, which saves what every single operation costs."""

    def fuse_block(self, parts: BlockParts) -> FusedBlock | None:
        """None: this block is computed by single operations."""
        ...

    def join_blocks(self, blocks: Sequence[FusedBlock]) -> FusedBlock | None:
        """Blocks that follow each other as one operation; None: they are called one by one."""
        ...


class DrawRequest(NamedTuple):
    """How the id of a row is drawn.

    number: uniform in [0, 1). top_k: 0 for all. temperature: above 0, and of no account where `do_sample` is not set.
    """

    number: float
    top_p: float
    typical_p: float
    top_k: int
    temperature: float
    do_sample: bool


@dataclass(frozen=True)
class Penalties:
    """What changes the logits of one row, in this order; each has a neutral value.

    counts: [2, vocab] float32, occurrences of every id in prompt and generated ids, and in generated ids alone; needed
    where a penalty is not neutral. length: of prompt and generated ids.
    repetition: divides a positive logit of an id that has occurred and multiplies a negative one; 1.
    frequency: is subtracted, times the share that the id has of all ids; 0.
    presence: is subtracted if the id was generated; 0.
    count: is subtracted, times how often the id was generated; 0.
    bias: ids, and what is added to their logits.
    """

    counts: Tensor | None
    length: int
    repetition: float
    frequency: float
    presence: float
    count: float
    bias: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Allowed:
    """Which ids may be drawn, for some rows of logits.

    words: [n, ceil(vocab / 32)] int32, one bit for each id, lowest first; of: [rows] int64, which of them holds
    for each row of the logits, or -1.
    """

    words: NDArray[np.int32]
    of: NDArray[np.int64]


@dataclass(frozen=True)
class StepWork:
    """A step whose ids are drawn where the model computes. Integers are int64 in host memory."""

    token_ids: NDArray[np.int64]  # [tokens]
    follows: NDArray[np.int64]  # [tokens]: the table's row whose id, drawn last, is the token; -1: it is in token_ids
    positions: NDArray[np.int64]  # [tokens]
    slots: NDArray[np.int64]  # [tokens]
    starts: NDArray[np.int64]  # [rows + 1], as in a StepBatch
    context_lengths: NDArray[np.int64]  # [rows]
    rows: NDArray[np.int64]  # [rows]: of the table
    samples: NDArray[np.bool_]  # [rows]: whether an id is drawn
    requests: Sequence[DrawRequest]  # one for each of these
    kept: NDArray[np.bool_]  # [sampled]: whether the host draws from the row's logits; nobody else knows of typical_p
    # What is new in block tables: [n] row of the table, place, and block.
    new_blocks: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


class Launched(Protocol):
    """A step that was put into the stream."""

    def is_done(self) -> bool: ...

    def wait(self) -> Drawn:
        """Its ids, of which those of kept rows mean nothing. Raises what went wrong on the device."""
        ...

    def logits(self) -> Tensor:
        """Of the kept rows [kept, vocab] float32, on the host, once it was waited for."""
        ...


class DeviceSteps(Protocol):
    """Steps of one epoch, one after another, with block tables and the ids drawn last on the device."""

    def record(self) -> int:
        """Records what steps of common sizes do, so that they take one call each. Returns how many sizes there are."""
        ...

    def measure(self) -> int:
        """About how many bytes of the device `record` takes."""
        ...

    def launch(self, work: StepWork) -> Launched:
        """Puts a step into the stream, behind those before. Does not wait."""
        ...


@dataclass(frozen=True)
class StepRoom:
    """For how much steps are made. sizes: numbers of rows with a token each whose work is recorded; empty: none is."""

    num_rows: int
    max_blocks: int
    max_positions: int
    sizes: Sequence[int]


@runtime_checkable
class RunsAhead(Protocol):
    """Kernels of a device on which a step can begin before the ids of the one before are known to the host."""

    def new_steps(
        self, forward: Callable[[StepBatch], Tensor | None], cache: KVCache, room: StepRoom
    ) -> DeviceSteps: ...


class FollowsText(Protocol):
    """A matcher of llguidance's C interface, which knows which ids may come next in one text."""

    @property
    def address(self) -> int:
        """For the functions of the interface."""
        ...

    def consume(self, token_ids: Sequence[int]) -> int:
        """Goes on by these ids as far as they are allowed. How many of them; -1 after an error."""
        ...

    def fill(self, words: NDArray[np.int32]) -> None:
        """Says which ids may come next: a bit for each in words, lowest first. Nothing after an error."""
        ...

    def error(self) -> str | None:
        """What went wrong; after that, nothing goes on."""
        ...


# A row of the logits whose ids a grammar limits.
GUIDED_ROW = np.dtype(
    [
        ("matcher", np.uint64),  # its address
        ("place", np.int64),  # of the logits
        ("mask_seconds", np.float64),  # result: of processor time that a mask has cost; 0 if none was needed
        ("tries", np.int32),  # so many of the most probable ids are judged before a mask is asked for
        ("goes_on", np.int32),  # the text may not end yet, unless it has to
        ("has_failed", np.int32),  # result: the matcher has an error, or leaves no id; the id means nothing then
    ],
    align=True,
)


@dataclass(frozen=True)
class GuidedRows:
    """Rows whose matchers go on by the id that is drawn, unless it ends the text.

    rows: [n] of GUIDED_ROW, with the results when ids were drawn. matchers: theirs, in the same order.
    mask_words: of the masks of these matchers. functions: addresses of the interface's functions that judge ids
    (`llg_matcher_validate_tokens`), go on by ids (`llg_matcher_consume_tokens`) and find masks
    (`llg_matcher_compute_mask_into`). ends: [ceil(vocab / 32)] int32, one bit for each id that ends a text.
    """

    rows: NDArray[np.void]
    matchers: Sequence[FollowsText]
    mask_words: int
    functions: tuple[int, int, int]
    ends: NDArray[np.int32]


@dataclass(frozen=True)
class Drawn:
    """What came of it; all are [rows]. logprobs and normalizers (log of the sum of exponentials) are of raw logits.

    is_finite: whether the raw logits are, and the processed ones leave an id to draw; else nothing else means anything.
    """

    ids: NDArray[np.int64]
    logprobs: NDArray[np.float32]
    normalizers: NDArray[np.float32]
    is_finite: NDArray[np.bool_]


@runtime_checkable
class DrawsIds(Protocol):
    """Kernels that draw ids: by top_k, then top_p, then typical_p, each row's result its own."""

    def draw_ids(
        self,
        raw: Tensor,
        processed: Tensor,
        requests: Sequence[DrawRequest],
        allowed: Allowed | None,
        guided: GuidedRows | None,
    ) -> Drawn | None:
        """raw, processed: [rows, vocab] float32, before and after the processors; they may be the same tensor.

        allowed: which ids may be drawn; None: all. guided: rows that matchers limit, of which `allowed`
        says nothing.

        None: these kernels do not draw after all, and nothing was computed.
        """
        ...

    def penalize(self, logits: Tensor, rows: Sequence[int], penalties: Sequence[Penalties]) -> bool:
        """Applies penalties to these rows of `logits` [.., vocab] float32, in place. False: nothing was done."""
        ...
