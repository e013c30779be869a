"""Whole sequences at once, without a cache, on any device that torch computes on: what the quantizer computes with.

Plain torch throughout; nothing here is row-stable. A step is a few sequences of one length.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batch import StepBatch
from ..errors import ConfigError
from .cpu.features import computes_bfloat16
from .interface import AttentionOptions, CacheSpec, KVCache, Matmul
from .weights import DenseRows, QuantizedWeight


@dataclass(frozen=True)
class Machine:
    """One device, what it holds, and the types that are computed in."""

    device: torch.device
    dtype: torch.dtype  # of activations and of weights that are multiplied

    @property
    def is_host(self) -> bool:
        """Whether its memory is that of the process."""
        return self.device.type == "cpu"

    @property
    def name(self) -> str:
        return "cpu" if self.is_host else f"{self.device} ({torch.cuda.get_device_name(self.device)})"

    def free_bytes(self) -> int:
        """Memory of a device of its own that nobody uses."""
        return 0 if self.is_host else torch.cuda.mem_get_info(self.device)[0]

    def used_bytes(self) -> int:
        """Memory of a device of its own that this process uses now."""
        return 0 if self.is_host else torch.cuda.memory_allocated(self.device)

    def peak_bytes(self) -> int:
        """Most memory of a device of its own that this process has used."""
        return 0 if self.is_host else torch.cuda.max_memory_allocated(self.device)

    def wait(self) -> None:
        """Returns when everything that was asked for is computed."""
        if not self.is_host:
            torch.cuda.synchronize(self.device)

    def release(self) -> None:
        """Gives cached memory of the device back."""
        if not self.is_host:
            torch.cuda.empty_cache()

    def trim(self) -> None:
        """Gives memory of the host back that was freed in pieces, which its allocator keeps; else it piles up."""
        if (give_back := _malloc_trim()) is not None:
            give_back(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    """Of glibc; other libraries have none."""
    found: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return found


def machine(device: str, dtype: str | None) -> Machine:
    """The device of that name. dtype: None: what it computes fast and accurately enough.

    Raises:
        ConfigError: there is no such device here.
    """
    if device == "cpu":
        chosen = dtype or ("bfloat16" if computes_bfloat16() else "float32")
        return Machine(torch.device("cpu"), getattr(torch, chosen))
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"--device {device} is unknown; expected cpu, cuda or cuda:N") from None
    if found.type != "cuda":
        raise ConfigError(f"--device {device} is not served; expected cpu, cuda or cuda:N")
    if not torch.cuda.is_available() or (found.index or 0) >= torch.cuda.device_count():
        missing = (
            "a torch that is built for CUDA"
            if torch.version.cuda is None
            else "look whether nvidia-smi finds the GPU (in a container: docker run --gpus all)"
        )
        raise ConfigError(
            f"--device {device}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices; "
            f"use --device cpu, or {missing}"
        )
    return Machine(torch.device("cuda", found.index or 0), getattr(torch, dtype or "bfloat16"))


class Lineage:
    """Which operation made a tensor, by the memory it is in; memory is kept, so that none is used twice."""

    def __init__(self) -> None:
        self._made: dict[int, object] = {}
        self._kept: list[Tensor] = []

    def note(self, made: Tensor, source: object) -> None:
        self._made[made.untyped_storage().data_ptr()] = source
        self._kept.append(made)

    def source(self, tensor: Tensor) -> object | None:
        return self._made.get(tensor.untyped_storage().data_ptr())


@dataclass(frozen=True)
class Normed:
    """The output of a norm with this weight."""

    weight: Tensor


@dataclass(frozen=True)
class Linearly:
    """Each feature is one feature of what `maker` made, times something that does not depend on it.

    features: int64 [size]: of each feature, that of the maker's output.
    """

    maker: object
    features: Tensor


@dataclass
class OfflineKernels:
    """The operations of a decoder over whole sequences. `lineage`: notes where inputs of linears come from."""

    device: torch.device
    lineage: Lineage | None = None
    row_stable: bool = False
    _kv: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def prepare(self, hidden_size: int, head_dim: int) -> None:
        pass

    def new_kv_cache(self, spec: CacheSpec, num_blocks: int, block_size: int) -> KVCache:
        return KVCache([], 0, block_size)

    def linear(self, weight: Tensor | DenseRows) -> Matmul:
        # A weight that is kept on the host (the embedding, as the head) is brought when it is needed first.
        brought = cache((weight.whole() if isinstance(weight, DenseRows) else weight).to)
        return lambda x: F.linear(x, brought(x.device, x.dtype))

    def quantized_linear(self, weight: QuantizedWeight, dtype: torch.dtype, label: str) -> Matmul:
        dense = in_order(weight).to(dtype)
        return lambda x: F.linear(x, dense)

    def embedding(self, weight: Tensor, ids: Tensor) -> Tensor:
        return weight[ids]

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = x.float()
        scale = y.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        normed = (y * scale).mul_(weight).to(x.dtype)
        if self.lineage is not None:
            self.lineage.note(normed, Normed(weight))
        return normed

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        y = x.float()
        swapped = torch.cat((y[..., half:], y[..., :half]), -1).mul_(sin[:, None])
        return (y * cos[:, None]).add_(swapped).to(x.dtype)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        product = F.silu(gate).mul_(up)
        if self.lineage is not None and (maker := self.lineage.source(gate_up)) is not None:
            size = up.shape[-1]
            self.lineage.note(product, Linearly(maker, torch.arange(size, 2 * size)))
        return product

    def store_kv(self, k: Tensor, v: Tensor, layer: int, batch: StepBatch) -> None:
        self._kv[layer] = k, v

    def attention(self, q: Tensor, layer: int, batch: StepBatch, options: AttentionOptions) -> Tensor:
        k, v = self._kv.pop(layer)
        num_sequences, repeat = len(batch.context_lengths), q.shape[1] // k.shape[1]

        def heads_first(x: Tensor) -> Tensor:
            # [sequences, heads, length, head_dim]
            return x.reshape(num_sequences, -1, *x.shape[1:]).transpose(1, 2)

        queries = heads_first(q)
        keys, values = (heads_first(x).repeat_interleave(repeat, 1) for x in (k, v))
        length, window = queries.shape[2], options.window
        if options.cap is not None or options.slopes is not None:
            raise ValueError(f"attention with {options}; expected no cap and no slopes: no such model is quantized")
        if window is None or window >= length:
            y = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=options.scale)
        else:
            at = torch.arange(length, device=self.device)
            seen = (at <= at[:, None]) & (at > at[:, None] - window)
            y = F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen, scale=options.scale)
        out = y.transpose(1, 2).reshape(len(q), -1)
        if self.lineage is not None and (maker := self.lineage.source(v)) is not None:
            # v is a view of what a linear made: its place there says which features it is.
            first, dim = int(v.storage_offset()) % v.stride(0), v.shape[2]
            of_head = torch.arange(q.shape[1]) // repeat * dim
            features = of_head[:, None] + torch.arange(dim) + first
            self.lineage.note(out, Linearly(maker, features.flatten()))
        return out


def in_order(weight: QuantizedWeight) -> Tensor:
    """float32 [out, in] with the features of IN in their own order."""
    values = weight.dequantize()
    return values if weight.order is None else values[:, torch.argsort(weight.order)]


def sequences_batch(num_sequences: int, length: int, kernels: OfflineKernels) -> StepBatch:
    """So many sequences of one length, each from position 0."""
    device = kernels.device
    none = torch.empty(0, dtype=torch.int64, device=device)
    return StepBatch(
        token_ids=none,
        positions=torch.arange(length, device=device).repeat(num_sequences),
        starts=list(itertools.accumulate([0] + [length] * num_sequences)),
        context_lengths=[length] * num_sequences,
        slots=none,
        block_tables=none,
        sample_rows=none,
        kv_cache=KVCache([], 0, 1),
    )


def to_host(tensor: Tensor) -> Tensor:
    """The tensor in the memory of the process."""
    return tensor.cpu()


def add_gram(total: Tensor, x: Tensor) -> None:
    """total += x.T @ x, summed in float32, below and on the diagonal; see `mirror_gram`.

    total: [in, in] float32; x: [tokens, in].
    """
    # Products of 16-bit numbers are exact in float32, and a GPU makes them at the speed of 16 bits.
    widens = x.dtype == torch.float32 or x.device.type != "cuda"
    x = x.float() if widens else x
    for columns in _gram_blocks(len(total)):
        rows = slice(columns.start, None)
        left, right, out = x[:, rows].T, x[:, columns], total[rows, columns]
        if widens:
            out.addmm_(left, right)
        else:
            out.add_(torch.mm(left, right, out_dtype=torch.float32))


def mirror_gram(total: Tensor) -> None:
    """Fills in what `add_gram` left out, in place: the matrix is symmetric, to the last bit."""
    for columns in _gram_blocks(len(total)):
        square = total[columns, columns]
        square.copy_(square.tril() + square.tril(-1).T)
        total[columns, columns.stop :] = total[columns.stop :, columns].T


def _gram_blocks(size: int) -> list[slice]:
    """Columns that are computed together: few, so that products are large, and enough to save almost a half."""
    step = max(256, -(-size // 1024) * 128)
    return [slice(first, min(first + step, size)) for first in range(0, size, step)]


def host_buffer(shape: Sequence[int], dtype: torch.dtype, machine: Machine, file: str | None) -> Tensor:
    """Uninitialized memory of the host from which `machine` copies fast; in `file`, which is made, if one is named."""
    if file is None:
        return torch.empty(*shape, dtype=dtype, pin_memory=not machine.is_host)
    count = 1
    for size in shape:
        count *= size
    return torch.from_file(file, shared=True, size=count, dtype=dtype).view(*shape)
