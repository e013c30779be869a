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
from text_generation_server.planning import plan_model

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


@pytest.fixture
def http(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARK))
    return importlib.import_module("gpu_http")


def test_the_models_that_are_served_are_what_a_plan_expects(
    http: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def extend(command: list[str | Path], **_: object) -> None:
        assert command[1:4] == ["extend-tokenizer", "--vocab-size", "4200"]
        Path(command[-1]).write_text('{"model": {"vocab": {}}}')

    monkeypatch.setattr(http.subprocess, "run", extend)
    d = http.Dimensions(layers=2, hidden=64, size=96, heads=4, kv_heads=2, head_dim=16, vocab=4200)
    folder = http.write_model(d, tmp_path / "model", "cpu")
    plan = plan_model(folder, world_size=1, dtype="bfloat16", device="cuda")
    block = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 96 + 2 * 64
    assert plan.num_parameters == 2 * block + 2 * 4200 * 64 + 64
    assert plan.settings.max_positions == 4096
    assert list(tmp_path.iterdir()) == [folder]
    # What is there is not written again.
    assert http.write_model(d, folder, "no device") == folder


def test_what_clients_do_is_understood_by_the_load_generator(http: ModuleType) -> None:
    known = (BENCHMARK / "src" / "load.rs").read_text()
    words = http.Load(4, 200, 50, 16).options()
    assert words[words.index("--words") + 1] == "100"
    assert all(f"{word[2:].replace('-', '_')}:" in known for word in words[::2])
    assert all(load.streams <= load.requests for goal in http.GOALS.values() for _, _, load, _ in goal)


def test_without_a_gpu_nothing_is_measured() -> None:
    if torch.cuda.is_available():
        return
    done = subprocess.run([sys.executable, BENCHMARK / "gpu.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "--device cuda: " in done.stderr
    assert "nothing is measured" in done.stderr
