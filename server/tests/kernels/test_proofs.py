"""Shapes at which rows influence each other are found, and not used."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from text_generation_server.errors import ConfigError
from text_generation_server.kernels.cpu import linear
from text_generation_server.kernels.cpu.features import computes_bfloat16
from text_generation_server.kernels.cpu.kernels import CpuKernels
from text_generation_server.kernels.cpu.proofs import (
    Proofs,
    RowSplitter,
    cancelling,
    elements_are_independent,
    proven_row_counts,
    proven_tile_rows,
    rows_are_independent,
)
from text_generation_server.kernels.select import compute_dtype, select_kernels
from torch import Tensor


def in_halves(x: Tensor, w: Tensor) -> Tensor:
    half = x.shape[1] // 2
    return x[:, :half] @ w[:, :half].T + x[:, half:] @ w[:, half:].T


def exact(x: Tensor, w: Tensor) -> Tensor:
    """Row by row in float32, each the same way."""
    return torch.stack([(row * w).cumsum(-1)[:, -1] for row in x])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [1, 2, 8, 32, 64])
def test_a_row_count_with_another_order_of_sums_is_not_proven(bad: int, dtype: torch.dtype) -> None:
    x, w = cancelling(64, 96, 24)

    def multiply(rows: Tensor) -> Tensor:
        rows = rows.float()
        return (in_halves(rows, w) if len(rows) == bad else exact(rows, w)).to(dtype)

    assert proven_row_counts(multiply, x.to(dtype)) == tuple(c for c in (1, 2, 4, 8, 16, 32, 64) if c != bad)


def test_a_place_with_another_order_of_sums_is_found() -> None:
    x, w = cancelling(16, 96, 24)

    def multiply(rows: Tensor) -> Tensor:
        y = exact(rows, w)
        y[3::4] = in_halves(rows, w)[3::4]
        return y

    assert proven_row_counts(multiply, x) == ()


def test_cancelling_sums_show_the_order_in_bfloat16() -> None:
    x, w = cancelling(4, 512, 64)
    assert (x.double() @ w.double().T).abs().max() == 0
    assert not torch.equal(in_halves(x, w).bfloat16(), exact(x, w).bfloat16())


def test_unstable_linears_are_called_with_proven_counts_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def prepack(weight: Tensor) -> linear.Multiply:
        def multiply(x: Tensor) -> Tensor:
            calls.append(len(x))
            return in_halves(x, weight) if len(x) in (1, 2, 32) else exact(x, weight)

        return multiply

    monkeypatch.setattr(linear, "prepack", prepack)
    matmul = linear.LinearFactory(Proofs(), None)(torch.randn(24, 96))
    calls.clear()
    for rows in range(1, 100):
        assert matmul(torch.randn(rows, 96)).shape == (rows, 24)
    assert not {1, 2, 32} & set(calls)


def test_a_linear_without_any_proven_count_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = torch.Generator().manual_seed(0)
    monkeypatch.setattr(linear, "prepack", lambda weight: lambda x: torch.randn(len(x), len(weight), generator=noise))
    kernels = CpuKernels("none")
    kernels.linear(torch.randn(8, 16))
    assert not kernels.row_stable


@given(st.integers(1, 3000), st.sets(st.sampled_from([1, 2, 8, 16, 32, 64, 128, 256, 512])))
@settings(deadline=None, max_examples=60)
def test_any_number_of_rows_splits_into_proven_counts_with_little_padding(rows: int, counts: set[int]) -> None:
    splitter = RowSplitter(sorted(counts | {4}))
    pieces = splitter.split(rows)
    assert set(pieces) <= counts | {4}
    assert sum(pieces) >= rows
    assert sum(pieces) - rows < max(pieces)


def test_functions_with_tails_or_neighbours_are_found() -> None:
    x = torch.randn(5000)
    assert elements_are_independent(lambda x: x * 2 + 1, x)
    assert not elements_are_independent(lambda x: torch.cat((x[:-1] * 2, x[-1:] * 3)), x)
    rows, _ = cancelling(64, 300, 1)
    assert not rows_are_independent(lambda x: x / len(x), rows)


def test_torch_silu_is_why_ours_is_made_of_exp() -> None:
    # Of torch 2.13 on AVX2; where it is found independent, nothing is lost.
    kernels, x = CpuKernels(), torch.randn(5000) * 5
    gate = lambda x: kernels.silu_and_mul(torch.cat((x, torch.ones_like(x)))[None])[0]  # noqa: E731
    assert elements_are_independent(gate, x)


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
def test_attention_tiles_are_proven_on_this_processor(head_dim: int) -> None:
    assert proven_tile_rows(head_dim, 64, (4, 16, 64))


@pytest.mark.parametrize(
    ("flags", "native"), [("fpu avx2", False), ("avx512f avx512_bf16", True), ("amx_bf16 amx_tile", True)]
)
def test_the_default_dtype_is_what_the_processor_multiplies(flags: str, native: bool, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags\t\t: {flags}\n")
    assert computes_bfloat16(tmp_path / "cpuinfo") is native
    assert not computes_bfloat16(tmp_path / "missing")


def test_unserved_devices_are_refused_by_name() -> None:
    assert compute_dtype("cpu", "bfloat16", quantized=False) == "bfloat16"
    assert compute_dtype("cpu", None, quantized=True) == "bfloat16"
    assert compute_dtype("cpu", "float32", quantized=True) == "float32"
    native = "bfloat16" if computes_bfloat16() else "float32"
    assert compute_dtype("cpu", None, quantized=False) == native
    with pytest.raises(ConfigError, match="--device tpu is unknown; expected cpu or cuda"):
        select_kernels("tpu")
