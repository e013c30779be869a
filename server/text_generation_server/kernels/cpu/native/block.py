"""A block of a decoder in one call, or several of them (see block.h)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from ....batch import StepBatch
from ...interface import BlockParts, FusedBlock, Sums
from .layer import SCORED_KEYS, NativeLayer, slopes_address, step_rows
from .library import FLOATS, Library
from .linear import NativeLinear


class _Block(ctypes.Structure):
    """`Block` of block.h."""

    _fields_ = (
        ("qkv", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("gate_up", ctypes.c_void_p),
        ("down", ctypes.c_void_p),
        ("attention_norm", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
        ("qkv_bias", ctypes.c_void_p),
        ("head_norm", ctypes.c_void_p),
        ("slopes", ctypes.c_void_p),
        ("hidden", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("attention_eps", ctypes.c_float),
        ("mlp_eps", ctypes.c_float),
        ("head_eps", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("cap", ctypes.c_float),
    )


class _BlockStep(ctypes.Structure):
    """`BlockStep` of block.h."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("sequences", ctypes.c_int64),
        ("table_stride", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("type", ctypes.c_int32),
    )


class _Run:
    """Blocks one after another in one call."""

    def __init__(self, library: Library, blocks: Sequence[tuple[int, int]], collectives: Sums | None):
        """blocks: the address and the layer of each. collectives: of ranks that they are split over."""
        self._library, self._layers, self._collectives = library, [layer for _, layer in blocks], collectives
        self._call = library.function("blocks", "ppplppii", ctypes.c_int32)
        self._pointers = ctypes.c_void_p * len(blocks)
        self._addresses = self._pointers(*(address for address, _ in blocks))

    def __call__(self, x: Tensor, step: _BlockStep | None, batch: StepBatch) -> Tensor | None:
        """None: there is no step, or the ranks share no memory."""
        if step is None:
            return None
        exchange = None if self._collectives is None else self._collectives.exchange()
        if self._collectives is not None and exchange is None:
            return None
        x = x.contiguous()
        caches = [batch.kv_cache.layers[layer] for layer in self._layers]
        keys = self._pointers(*(cache[0].data_ptr() for cache in caches))
        values = self._pointers(*(cache[1].data_ptr() for cache in caches))
        step.x = x.data_ptr()
        failed = self._call(
            ctypes.addressof(self._addresses), ctypes.addressof(keys), ctypes.addressof(values), len(caches),
            ctypes.addressof(step), None if exchange is None else exchange.address, self._library.variant,
            torch.get_num_threads(),
        )  # fmt: skip
        if failed and exchange is not None:
            raise exchange.failure()
        return x


class NativeBlock:
    """A `FusedBlock`: the bits are those of the single operations."""

    def __init__(self, library: Library, parts: BlockParts, matmuls: tuple[NativeLinear, ...]):
        """matmuls: of `parts`: qkv, output, gate and up, down."""
        self._parts, self._matmuls = parts, matmuls
        self._dtype = matmuls[0].dtype
        norms, hidden = (parts.attention_norm, parts.mlp_norm), len(parts.attention_norm.weight)
        bias, heads = parts.qkv_bias, parts.head_norm
        self._block = _Block(
            *(matmul.address for matmul in matmuls), *(norm.weight.data_ptr() for norm in norms),
            None if bias is None else bias.data_ptr(), None if heads is None else heads.weight.data_ptr(),
            slopes_address(parts.options), hidden, parts.num_heads, parts.num_kv_heads, parts.head_dim,
            parts.options.window or 0, *(norm.eps for norm in norms), 0 if heads is None else heads.eps,
            parts.options.scale, parts.options.cap or 0,
        )  # fmt: skip
        self._address, self._hidden = ctypes.addressof(self._block), hidden
        self._run = _Run(library, [(self._address, parts.layer)], parts.collectives)

    @property
    def parts(self) -> BlockParts:
        return self._parts

    @property
    def dtype(self) -> torch.dtype:
        """Of activations."""
        return self._dtype

    @property
    def address(self) -> int:
        """Of the block, as the library knows it."""
        return self._address

    def step(self, x: Tensor, cos: Tensor, sin: Tensor, batch: StepBatch) -> _BlockStep | None:
        """What a call is told besides keys and values; None: the cache is laid out otherwise.

        Raises:
            ValueError: the activations are not those of the step.
        """
        if not NativeLayer.attends(self._parts.head_dim, batch.kv_cache.block_size):
            return None
        step = batch.once("block", lambda: _step(cos, sin, self._dtype, batch))
        if x.shape != (step.rows, self._hidden) or x.dtype != self._dtype:
            expected = f"{self._dtype} {[step.rows, self._hidden]}"
            raise ValueError(f"activations are {x.dtype} {list(x.shape)}; expected {expected}")
        return step

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, batch: StepBatch) -> Tensor | None:
        return self._run(x, self.step(x, cos, sin, batch), batch)


class NativeBlocks:
    """A `FusedBlock` that is several, each after the other."""

    def __init__(self, library: Library, blocks: Sequence[NativeBlock]):
        """blocks: with the same collectives."""
        self._blocks = blocks
        places = [(block.address, block.parts.layer) for block in blocks]
        self._run = _Run(library, places, blocks[0].parts.collectives)

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, batch: StepBatch) -> Tensor | None:
        return self._run(x, self._blocks[0].step(x, cos, sin, batch), batch)


def _step(cos: Tensor, sin: Tensor, dtype: torch.dtype, batch: StepBatch) -> _BlockStep:
    """What all layers of a step share. The tensors live as long as the batch."""
    starts, lengths, tables = batch.once("rows", lambda: step_rows(batch))
    return _BlockStep(
        None, None, None, cos.data_ptr(), sin.data_ptr(), batch.slots.data_ptr(), starts.data_ptr(), lengths.data_ptr(),
        tables.data_ptr(), len(batch.positions), len(lengths), tables.shape[1], batch.kv_cache.block_size,
        FLOATS[dtype],
    )  # fmt: skip


def fuse(library: Library, parts: BlockParts) -> NativeBlock | None:
    """The block, if everything in it is ours."""
    matmuls = (parts.qkv, parts.output, parts.gate_up, parts.down)
    native = tuple(matmul for matmul in matmuls if isinstance(matmul, NativeLinear))
    norms = (parts.attention_norm, parts.mlp_norm, parts.head_norm)
    weights = [parts.qkv_bias, *(norm.weight for norm in norms if norm is not None)]
    if len(native) < len(matmuls) or any(
        weight is not None and (weight.dtype != native[0].dtype or not weight.is_contiguous()) for weight in weights
    ):
        return None
    return NativeBlock(library, parts, native) if NativeLayer.attends(parts.head_dim, SCORED_KEYS) else None


def join(library: Library, blocks: Sequence[FusedBlock]) -> NativeBlocks | None:
    """Blocks in one call, if they are ours, split over the same ranks, and alike in what the first of them checks."""
    native = [block for block in blocks if isinstance(block, NativeBlock)]
    alike = {
        (block.parts.head_dim, len(block.parts.attention_norm.weight), block.dtype, id(block.parts.collectives))
        for block in native
    }
    if len(native) < len(blocks) or len(alike) > 1:
        return None
    return NativeBlocks(library, native)
