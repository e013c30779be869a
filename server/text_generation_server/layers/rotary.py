"""Rotary positions (Su et al. 2021, arXiv:2104.09864), with the scalings that are fixed functions of position."""

import math

import torch
from torch import Tensor

from ..batch import StepBatch
from ..checkpoint.model_config import Rope
from ..kernels.interface import Kernels


def inverse_frequencies(rope: Rope, dim: int) -> Tensor:
    """Radians per position of each pair of dimensions: [dim / 2] float32."""
    frequencies = 1.0 / rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3(frequencies, rope)
    return frequencies


def _llama3(frequencies: Tensor, rope: Rope) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between interpolated (Llama 3.1)."""
    turns = rope.original_max_positions * frequencies / (2 * math.pi)  # within the original context
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = smooth.clamp(0, 1)
    return (1 - smooth) * frequencies / rope.factor + smooth * frequencies


class Rotary:
    """Cosine and sine of every position, computed once and shared by all layers."""

    def __init__(self, rope: Rope, dim: int, max_positions: int, kernels: Kernels):
        angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), inverse_frequencies(rope, dim))
        self.kernels = kernels
        self.cos = torch.cat((angles.cos(), angles.cos()), -1).to(kernels.device)
        self.sin = torch.cat((-angles.sin(), angles.sin()), -1).to(kernels.device)

    def __call__(self, x: Tensor, batch: StepBatch) -> Tensor:
        """x: [tokens, heads, head_dim]."""
        return self.kernels.rotate(x, *self.factors(batch))

    def factors(self, batch: StepBatch) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the step's tokens: [tokens, head_dim] each."""
        return batch.once(self, lambda: (self.cos[batch.positions], self.sin[batch.positions]))
