"""The benchmark of GPUs: its model computes under emulation, and without a GPU it says so and fails."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from emulated import emulator
from text_generation_server.kernels.cuda.kernels import CudaKernels
from text_generation_server.kernels.weights import Integer

BENCHMARK = Path(__file__).parents[4] / "benchmark"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARK))
    return importlib.import_module("gpu")


def test_a_step_of_the_benchmarks_model_is_finite_and_knows_its_bytes(
    benchmark: ModuleType, pytestconfig: pytest.Config
) -> None:
    small = benchmark.Dimensions(layers=2, hidden=128, size=128, heads=2, kv_heads=1, head_dim=32, vocab=48)
    stack = benchmark.Stack(CudaKernels(emulator(pytestconfig)), small, Integer(4), sequences=2, context=40)
    logits = stack.step()
    assert logits.shape == (2, 48)
    assert logits.isfinite().all()
    weights = 2 * (128 * 128 + 128 * 64 + 256 * 128 + 128 * 128)
    assert stack.bytes == weights * (0.5 + 2 / 128) + 2 * 48 * 128 + 2 * 40 * 2 * 2 * 32 * 2


def test_without_a_gpu_nothing_is_measured() -> None:
    if torch.cuda.is_available():
        return
    done = subprocess.run([sys.executable, BENCHMARK / "gpu.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "--device cuda: " in done.stderr
    assert "nothing is measured" in done.stderr
