"""Every operation in the plainest torch there is: what other kernels are tested against. Slow, and not row-stable."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...batch import StepBatch
from ..interface import AttentionOptions, CacheSpec, KVCache, Matmul
from ..weights import DenseRows, QuantizedWeight, as_tensor


class Dequantized:
    """y = x W.T with some rows of W made into numbers at a time."""

    BLOCK = 1024

    def __init__(self, weight: QuantizedWeight):
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        if self.weight.order is not None:
            x = x.index_select(-1, self.weight.order)
        blocks = range(0, self.weight.out_features, self.BLOCK)
        return torch.cat(
            [F.linear(x, self.weight.dequantize(slice(i, i + self.BLOCK)).to(x.dtype)) for i in blocks], -1
        )


class ReferenceKernels:
    """Kernels for any dtype on the CPU. The cache is [num_blocks, block_size, kv_heads, head_dim]."""

    device = torch.device("cpu")
    row_stable = False

    def prepare(self, hidden_size: int, head_dim: int) -> None:
        pass

    def new_kv_cache(self, spec: CacheSpec, num_blocks: int, block_size: int) -> KVCache:
        shape = (num_blocks, block_size, spec.num_kv_heads, spec.head_dim)
        layers = [torch.zeros(2, *shape, dtype=spec.dtype) for _ in range(spec.num_layers)]
        return KVCache([(k, v) for k, v in layers], num_blocks, block_size)

    def linear(self, weight: Tensor | DenseRows) -> Matmul:
        whole = as_tensor(weight, self.device)
        return lambda x: F.linear(x, whole)

    def quantized_linear(self, weight: QuantizedWeight, dtype: torch.dtype, label: str) -> Matmul:
        return Dequantized(weight)

    def embedding(self, weight: Tensor, ids: Tensor) -> Tensor:
        return weight[ids]

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps) * weight).to(x.dtype)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return (x * cos[:, None] + torch.cat((second, first), -1) * sin[:, None]).to(x.dtype)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    def store_kv(self, k: Tensor, v: Tensor, layer: int, batch: StepBatch) -> None:
        for cache, new in zip(batch.kv_cache.layers[layer], (k, v), strict=True):
            cache.flatten(0, 1)[batch.slots] = new

    def attention(self, q: Tensor, layer: int, batch: StepBatch, options: AttentionOptions) -> Tensor:
        k_cache, v_cache = (cache.flatten(0, 1) for cache in batch.kv_cache.layers[layer])
        size, outputs = batch.kv_cache.block_size, []
        for i, length in enumerate(batch.context_lengths):
            queries = q[batch.starts[i] : batch.starts[i + 1]]
            keys = torch.arange(length)
            slots = batch.block_tables[i, keys // size] * size + keys % size
            group = q.shape[1] // k_cache.shape[1]
            k, v = (cache[slots].repeat_interleave(group, 1) for cache in (k_cache, v_cache))
            positions = torch.arange(length - len(queries), length)[:, None]
            hidden = keys > positions
            if options.window is not None:
                hidden |= keys <= positions - options.window
            scores = torch.einsum("qhd,khd->hqk", queries, k) * options.scale
            if options.cap is not None:
                scores = options.cap * torch.tanh(scores / options.cap)
            if options.slopes is not None:
                slopes = torch.tensor(options.slopes, dtype=torch.float64).to(scores.dtype)
                scores = scores + slopes[:, None, None] * (keys - positions)
            scores = scores.masked_fill(hidden, float("-inf"))
            probabilities = scores.to(torch.promote_types(q.dtype, torch.float32)).softmax(-1).to(q.dtype)
            outputs.append(torch.einsum("hqk,khd->qhd", probabilities, v))
        return torch.cat(outputs).flatten(1)
