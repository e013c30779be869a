"""Normalization layers."""

import torch
from torch import Tensor

from ..loading import Loader


class RMSNorm:
    """x / sqrt(mean(x²) + eps) * weight (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, load: Loader, eps: float):
        self.kernels, self.eps, self.weight = load.kernels, eps, load.tensor("weight")

    def __call__(self, x: Tensor) -> Tensor:
        return self.kernels.rms_norm(x, self.weight, self.eps)


class HeadNorm:
    """RMSNorm over each head of q and k at once, with a weight for queries and one for keys (Qwen3)."""

    def __init__(self, load: Loader, num_q: int, num_kv: int, eps: float):
        q, k = (load / "q_norm").tensor("weight"), (load / "k_norm").tensor("weight")
        self.kernels, self.eps = load.kernels, eps
        self.weight = torch.cat((q.expand(num_q, -1), k.expand(num_kv, -1)))  # [q heads + kv heads, head_dim]

    def __call__(self, qk: Tensor) -> Tensor:
        """qk: [tokens, q heads + kv heads, head_dim]."""
        return self.kernels.rms_norm(qk, self.weight, self.eps)
