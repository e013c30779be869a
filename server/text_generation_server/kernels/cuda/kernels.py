"""The CUDA backend: our own kernels for everything whose bits matter, so that a row's depend on its own tokens and
positions alone. Runs on a GPU, or under emulation in tests."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ...batch import StepBatch
from ...errors import ConfigError
from ..cpu.native.library import load_library
from ..cpu.native.sampling import NativeSampling
from ..interface import (
    Allowed,
    AttentionOptions,
    CacheSpec,
    Drawn,
    DrawRequest,
    GuidedRows,
    KVCache,
    Matmul,
    Penalties,
    StepRoom,
)
from ..weights import DenseRows, Float8, QuantizedWeight, as_tensor
from .attention import PagedAttention
from .backend import Backend, Module
from .layout import pack_dense, pack_quantized
from .linear import CudaLinear
from .steps import CudaSteps

logger = logging.getLogger(__name__)

DTYPES = (torch.float16, torch.bfloat16)


class Product(Protocol):
    """A way to multiply with some quantized weights."""

    name: str

    def why_not(self, weight: QuantizedWeight, backend: Backend) -> str | None:
        """What speaks against it for this weight on this device; None: nothing."""
        ...

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype, backend: Backend, rows: int | None) -> Matmul:
        """Brings the weight into the product's own layout. rows: `library_rows` of `CudaLinear`."""
        ...


class Packed:
    """Codes become numbers in registers, right before they are multiplied. Sums of groups are scaled, in float32."""

    name = "packed"

    def why_not(self, weight: QuantizedWeight, backend: Backend) -> str | None:
        if isinstance(weight.coding, Float8) and not weight.holds_only_numbers():
            return "some codes are not finite numbers"
        if weight.device.type != backend.device.type:
            return f"the weight is on {weight.device}"
        return None

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype, backend: Backend, rows: int | None) -> Matmul:
        return CudaLinear(backend, pack_quantized(weight, dtype), dtype, rows)


class Dequantized:
    """The weight is made into numbers once, at load, and multiplied as a dense one. Serves every weight."""

    name = "dequantized"

    def why_not(self, weight: QuantizedWeight, backend: Backend) -> str | None:
        return None

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype, backend: Backend, rows: int | None) -> Matmul:
        numbers = weight.dequantize().to(dtype)
        if weight.order is not None:
            numbers = torch.empty_like(numbers).index_copy_(1, weight.order, numbers)
        return CudaLinear(backend, pack_dense(numbers), dtype, rows)


PRODUCTS: tuple[Product, ...] = (Packed(), Dequantized())


class CudaKernels:
    """Kernels for float16 and bfloat16."""

    row_stable = True

    def __init__(self, backend: Backend, library_rows: int | None = None) -> None:
        """library_rows: from so many rows on products are cuBLAS's; rows are then no longer stable. None: never."""
        self._backend, self._library_rows = backend, library_rows
        self.device = backend.device
        if library_rows is not None:
            self.row_stable = False
        self._attentions: dict[tuple[int, torch.dtype], PagedAttention] = {}
        self._told: set[tuple[str, str]] = set()
        library = load_library(None)
        self._sampling = None if library is None else NativeSampling(library)

    def available_bytes(self, budget_bytes: int) -> int:
        free, held = self._backend.streams.memory()
        return max(0, min(free, budget_bytes - held))

    def peak_bytes(self, forget: bool = False) -> int:
        return self._backend.streams.peak_bytes(forget)

    def lost(self) -> str | None:
        return self._backend.streams.lost()

    def new_steps(self, forward: Callable[[StepBatch], Tensor | None], cache: KVCache, room: StepRoom) -> CudaSteps:
        return CudaSteps(self._backend, forward, cache, room)

    def draw_ids(
        self,
        raw: Tensor,
        processed: Tensor,
        requests: Sequence[DrawRequest],
        allowed: Allowed | None,
        guided: GuidedRows | None,
    ) -> Drawn | None:
        """On the host, where the logits are of rows that need it."""
        return None if self._sampling is None else self._sampling.draw(raw, processed, requests, allowed, guided)

    def penalize(self, logits: Tensor, rows: Sequence[int], penalties: Sequence[Penalties]) -> bool:
        if self._sampling is not None:
            self._sampling.penalize(logits, rows, penalties)
        return self._sampling is not None

    def prepare(self, hidden_size: int, head_dim: int) -> None:
        """Nothing: modules are compiled, or found in the cache, when they are first used."""

    def new_kv_cache(self, spec: CacheSpec, num_blocks: int, block_size: int) -> KVCache:
        shape = (2, num_blocks, spec.num_kv_heads, block_size, spec.head_dim)
        try:
            layers = [torch.empty(shape, dtype=spec.dtype, device=self.device) for _ in range(spec.num_layers)]
        except torch.OutOfMemoryError as error:
            what = f"a cache of {num_blocks} blocks of {block_size} tokens does not fit on {self.device}"
            raise ConfigError(f"{what}: {str(error).split('. ')[0]}; lower the limits") from None
        return KVCache([(k, v) for k, v in layers], num_blocks, block_size)

    def linear(self, weight: Tensor | DenseRows) -> Matmul:
        self._check_dtype(weight.dtype)
        packed = pack_dense(as_tensor(weight, self.device))
        return CudaLinear(self._backend, packed, weight.dtype, self._library_rows)

    def quantized_linear(self, weight: QuantizedWeight, dtype: torch.dtype, label: str) -> Matmul:
        self._check_dtype(dtype)
        against = []
        for product in PRODUCTS:
            reason = product.why_not(weight, self._backend)
            if reason is None:
                break
            against.append(f"; not {product.name}: {reason}")
        kind = (re.sub(r"\.\d+\.", ".*.", label), product.name)
        if kind not in self._told:
            self._told.add(kind)
            shape = f"{weight.in_features} x {weight.out_features}"
            logger.info("%s: %s, %s: %s%s", kind[0], shape, weight.coding, product.name, "".join(against))
        return product.prepare(weight, dtype, self._backend, self._library_rows)

    def embedding(self, weight: Tensor, ids: Tensor) -> Tensor:
        return weight.index_select(0, ids)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        self._check(x)
        size = x.shape[-1]
        per_token = x[0].numel() // size if len(x) else 1
        inner = x.ndim == 2 or (x.stride(-1) == 1 and x.stride(-2) == size and x.ndim == 3)
        if size % 2 or weight.dtype != x.dtype:
            raise ValueError(f"a norm of {x.dtype} {list(x.shape)} by {weight.dtype}; expected an even size, one dtype")
        if not inner or x.stride(-1) != 1 or x.stride(0) % 2 or x.data_ptr() % 4:
            x = x.contiguous()
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        rows = len(x) * per_token
        if rows:
            # A warp is enough for a head; the number of threads is a matter of the size alone.
            threads = 32 if size <= 256 else 256
            self._elements(x.dtype).launch(
                "rms_norm", (rows, 1, 1), threads, 4 * threads // 32, x, weight.contiguous(), y, x.stride(0), per_token,
                size, weight.numel() // size, float(eps),
            )  # fmt: skip
        return y

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        self._check(x)
        tokens, heads, size = x.shape
        if x.stride(2) != 1 or x.stride(1) != size:
            x = x.contiguous()
        y = torch.empty(tokens, heads, size, dtype=x.dtype, device=x.device)
        if tokens:
            threads = min(128, -(-size // 64) * 32)
            self._elements(x.dtype).launch(
                "rotate", (tokens, heads, 1), threads, 0, x, cos.contiguous(), sin.contiguous(), y, x.stride(0), size
            )
        return y

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        self._check(gate_up)
        size = gate_up.shape[1] // 2
        if size % 2:
            raise ValueError(f"gate and up of {size} features; expected an even number")
        y = gate_up.new_empty(len(gate_up), size)
        if len(gate_up):
            grid = (-(-size // 512), len(gate_up), 1)
            self._elements(gate_up.dtype).launch("silu_and_mul", grid, 256, 0, gate_up.contiguous(), y, size)
        return y

    def store_kv(self, k: Tensor, v: Tensor, layer: int, batch: StepBatch) -> None:
        self._check(k)
        tokens, heads, size = k.shape
        k, v = (x if x.stride(2) == 1 and x.stride(1) == size else x.contiguous() for x in (k, v))
        k_cache, v_cache = batch.kv_cache.layers[layer]
        if tokens:
            self._elements(k.dtype).launch(
                "store_kv", (tokens, heads, 1), min(128, -(-size // 32) * 32), 0, k, v, k_cache, v_cache, batch.slots,
                k.stride(0), v.stride(0), batch.kv_cache.block_size, size,
            )  # fmt: skip

    def attention(self, q: Tensor, layer: int, batch: StepBatch, options: AttentionOptions) -> Tensor:
        key = (q.shape[2], q.dtype)
        if key not in self._attentions:
            self._attentions[key] = PagedAttention(self._backend, *key)
        return self._attentions[key](q, *batch.kv_cache.layers[layer], batch, options)

    def _elements(self, dtype: torch.dtype) -> Module:
        return self._backend.module("elements.cu", {"BF16": int(dtype == torch.bfloat16)})

    def _check_dtype(self, dtype: torch.dtype) -> None:
        """Raises ConfigError for what the GPU does not multiply, ValueError for what our kernels do not."""
        if dtype not in DTYPES:
            raise ValueError(f"a product of {dtype}; expected float16 or bfloat16")
        if dtype == torch.bfloat16 and not self._backend.has_bfloat16:
            raise ConfigError("--dtype bfloat16 needs compute capability 8.0; use --dtype float16 on this GPU")

    def _check(self, x: Tensor) -> None:
        if x.dtype not in DTYPES:
            raise ValueError(f"{x.dtype} {list(x.shape)}; expected float16 or bfloat16")
