"""What a layer computes besides its products (see layer.h)."""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from math import prod

import torch
from torch import Tensor

from ....batch import StepBatch
from ...interface import AttentionOptions, CacheSpec, KVCache, Sums
from .library import FLOATS, Library
from .pages import own_memory

logger = logging.getLogger(__name__)

# `kScoredKeys` of layer.h.
SCORED_KEYS = 16
# Two vectors of the widest variant.
HEAD_MULTIPLE = 32


class _Attention(ctypes.Structure):
    """`Attention` of layer.h."""

    _fields_ = (
        ("queries", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
        ("query_stride", ctypes.c_int64),
        ("table_stride", ctypes.c_int64),
        ("sequences", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("slopes", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("cap", ctypes.c_float),
        ("type", ctypes.c_int32),
    )


class NativeLayer:
    """Norms, rotation, activation and attention of tensors in float32 or bfloat16, each row's bits its own."""

    def __init__(self, library: Library):
        self._variant = library.variant
        self._rms_norm = library.function("rms_norm", "ipppilllfi")
        self._silu_and_mul = library.function("silu_and_mul", "ippilli")
        self._rotate = library.function("rotate", "ippppilllli")
        self._store_kv = library.function("store_kv", "pppppillllll")
        self._attend = library.function("attend", "ipi")
        self._embed_share = library.function("embed_share", "ppilllplpii", ctypes.c_int32)

    def embed_share(self, weight: Tensor, owned: range, ids: Tensor, sums: Sums) -> Tensor | None:
        exchange = sums.exchange()
        if exchange is None:
            return None
        weight, ids = weight.contiguous(), ids.contiguous()
        y = weight.new_empty(len(ids), weight.shape[1])
        failed = self._embed_share(
            exchange.address, weight.data_ptr(), FLOATS[y.dtype], owned.start, len(owned), y.shape[1], ids.data_ptr(),
            len(ids), y.data_ptr(), self._variant, torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise exchange.failure()
        return y

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        y, size = torch.empty_like(x), x.shape[-1]
        self._rms_norm(
            self._variant, x.data_ptr(), weight.data_ptr(), y.data_ptr(), FLOATS[x.dtype], x.numel() // size, size,
            weight.numel() // size, eps, torch.get_num_threads(),
        )  # fmt: skip
        return y

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
        y = gate_up.new_empty(tokens, size)
        self._silu_and_mul(
            self._variant, gate_up.data_ptr(), y.data_ptr(), FLOATS[y.dtype], tokens, size, torch.get_num_threads()
        )
        return y

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = _tokens_apart(x)
        tokens, heads, dim = x.shape
        y = x.new_empty(tokens, heads, dim)
        self._rotate(
            self._variant, x.data_ptr(), cos.data_ptr(), sin.data_ptr(), y.data_ptr(), FLOATS[x.dtype], tokens, heads,
            dim, x.stride(0), torch.get_num_threads(),
        )  # fmt: skip
        return y

    @staticmethod
    def attends(head_dim: int, block_size: int) -> bool:
        """Whether heads and blocks of these sizes are whole vectors."""
        return head_dim % HEAD_MULTIPLE == 0 and block_size % SCORED_KEYS == 0

    def new_kv_cache(self, spec: CacheSpec, num_blocks: int, block_size: int) -> KVCache:
        """Of each layer: keys [blocks, heads, head_dim, block_size], values [blocks, heads, block_size, head_dim]."""

        def allocate(*block: int) -> Tensor:
            shape = (num_blocks, spec.num_kv_heads, *block)
            return own_memory(prod(shape) * spec.dtype.itemsize).view(spec.dtype).view(shape)

        size, dim = block_size, spec.head_dim
        layers = [(allocate(dim, size), allocate(size, dim)) for _ in range(spec.num_layers)]
        return KVCache(layers, num_blocks, block_size)

    def store_kv(self, k: Tensor, v: Tensor, layer: int, batch: StepBatch) -> None:
        keys, values = batch.kv_cache.layers[layer]
        k, v = _tokens_apart(k), _tokens_apart(v)
        tokens, heads, dim = k.shape
        self._store_kv(
            k.data_ptr(), v.data_ptr(), keys.data_ptr(), values.data_ptr(), batch.slots.data_ptr(), FLOATS[k.dtype],
            tokens, k.stride(0), v.stride(0), heads, dim, values.shape[2],
        )  # fmt: skip

    def attention(self, q: Tensor, layer: int, batch: StepBatch, options: AttentionOptions) -> Tensor:
        keys, values = batch.kv_cache.layers[layer]
        q = _tokens_apart(q)
        tokens, heads, dim = q.shape
        starts, lengths, tables = batch.once("rows", lambda: step_rows(batch))
        y = q.new_empty(tokens, heads * dim)
        step = _Attention(
            q.data_ptr(), y.data_ptr(), keys.data_ptr(), values.data_ptr(), starts.data_ptr(), lengths.data_ptr(),
            tables.data_ptr(), q.stride(0), tables.shape[1], len(lengths), heads, values.shape[1], dim, values.shape[2],
            options.window or 0, slopes_address(options), options.scale, options.cap or 0, FLOATS[q.dtype],
        )  # fmt: skip
        self._attend(self._variant, ctypes.addressof(step), torch.get_num_threads())
        return y


def step_rows(batch: StepBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Starts, lengths and block tables as int64 in memory of their own."""
    return torch.tensor(batch.starts), torch.tensor(batch.context_lengths), batch.block_tables.contiguous()


def slopes_address(options: AttentionOptions) -> int | None:
    """Where the slopes lie as float32, as long as the process lives."""
    return None if options.slopes is None else _kept_floats(options.slopes).data_ptr()


@cache
def _kept_floats(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def _tokens_apart(x: Tensor) -> Tensor:
    """x [tokens, heads, dim], whose heads follow each other without gaps."""
    dim = x.shape[2]
    return x if x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == dim) else x.contiguous()
