"""What tests of CUDA kernels share: emulated GPUs (their libraries are kept), and memory that starts as NaN."""

from pathlib import Path

import pytest
import torch
from text_generation_server.kernels.cuda.emulation.emulator import Emulator
from torch import Tensor

DTYPES = [torch.bfloat16, torch.float16]
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 6e-4}


def cached(config: pytest.Config, name: str) -> Path:
    """A folder that pytest keeps between runs."""
    assert config.cache is not None
    return Path(config.cache.mkdir(name))


_MADE: dict[tuple[int, int], Emulator] = {}


def emulator(config: pytest.Config, order: int = 0, num_processors: int = 2) -> Emulator:
    """A GPU on which threads take turns in an `order`, 0 or 1."""
    key = (order, num_processors)
    if key not in _MADE:
        _MADE[key] = Emulator(cached(config, "emulated_cuda"), order, num_processors)
    return _MADE[key]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(found: Tensor, wanted: Tensor) -> float:
    """Of all numbers together, relative to what is wanted (float64); NaN if any is NaN."""
    return float(torch.linalg.norm(found.double() - wanted) / torch.linalg.norm(wanted))


@pytest.fixture
def unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is allocated and not written is full of NaN."""
    new_empty, empty = Tensor.new_empty, torch.empty

    def fill(tensor: Tensor) -> Tensor:
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: fill(new_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
