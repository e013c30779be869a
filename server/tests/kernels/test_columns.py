"""The fused forms of GPTQ's column loop against the plain one: Triton's in its interpreter, ours on the host."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from conftest import INSTRUCTION_SETS
from text_generation_server.kernels.columns import _round_columns, has_triton, round_columns
from text_generation_server.kernels.cpu.native.columns import NativeColumns, usual_columns
from text_generation_server.kernels.cpu.native.library import Library
from torch import Tensor

LIBRARIES = [Library(name) for name in INSTRUCTION_SETS if name != "none"]

PROGRAM = """
import torch
from text_generation_server.kernels.columns import _round_columns
from text_generation_server.kernels.cuda.columns import round_columns_fused

generator = torch.Generator().manual_seed(0)
for columns, rows, shared in ((32, 40, True), (16, 33, False)):
    weight = torch.randn(columns, rows, generator=generator) * 0.05
    upper = torch.triu(torch.randn(columns, columns, generator=generator) * 0.2, 1)
    upper += torch.diag(torch.rand(columns, generator=generator) + 0.5)
    scale = torch.rand(1 if shared else columns, rows, generator=generator) * 0.01 + 0.005
    zero = torch.randint(1, 16, scale.shape, generator=generator).float()
    scale, zero = scale.expand(columns, -1), zero.expand(columns, -1)
    results = []
    for form in (_round_columns, round_columns_fused):
        work, codes, errors = weight.clone(), torch.empty(columns, rows, dtype=torch.uint8), torch.empty(columns, rows)
        form(work, upper, scale, zero, 15, codes, errors)
        results.append((work, codes, errors))
    (work, codes, errors), found = results
    # A code may differ where rounding errors decide; what follows it in its row then differs too.
    same = (codes == found[1]).all(0)
    assert same.double().mean() > 0.9, same
    assert 4 < len(codes.unique()) <= 16
    torch.testing.assert_close(found[0][:, same], work[:, same], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[2][:, same], errors[:, same], atol=1e-5, rtol=1e-4)
print("same")
"""


def test_the_fused_column_loop_rounds_as_the_plain_one() -> None:
    assert has_triton() == (importlib.util.find_spec("triton") is not None)
    if not has_triton():
        return  # a torch without CUDA comes without it, and the plain form is used
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path), "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "same\n", done.stderr


def run_of(num: int, outputs: int, shared: bool, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """weight, upper (a part of a larger one), scale, zero."""
    g = torch.Generator().manual_seed(num * outputs)
    weight = torch.randn(num, outputs, generator=g) * 0.05
    upper = torch.triu(torch.randn(num, num, generator=g) * 0.2, 1) + torch.diag(torch.rand(num, generator=g) + 0.5)
    scale = torch.rand(1 if shared else num, outputs, generator=g) * 0.01 + 0.005
    zero = torch.randint(1, 16, scale.shape, generator=g).float()
    large = torch.zeros(num + 5, num + 9)
    large[2 : 2 + num, 3 : 3 + num] = upper
    parts = (weight, large.to(dtype)[2 : 2 + num, 3 : 3 + num], scale.expand(num, -1), zero.expand(num, -1))
    return tuple(part.to(dtype) for part in parts)


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("num", "outputs"), [(1, 1), (2, 17), (16, 64), (31, 200), (32, 1000)])
def test_our_own_column_loop_equals_the_plain_one_in_float64(
    num: int, outputs: int, shared: bool, library: Library
) -> None:
    found, wanted = [], []
    for dtype, results in ((torch.float32, found), (torch.float64, wanted)):
        weight, upper, scale, zero = run_of(num, outputs, shared, dtype)
        codes, errors = torch.empty(num, outputs, dtype=torch.uint8), torch.empty(num, outputs, dtype=dtype)
        if dtype == torch.float32:
            NativeColumns(library).round_columns(weight, upper, scale, zero, 15, codes, errors)
        else:
            _round_columns(weight, upper, scale, zero, 15, codes, errors)
        results += [codes, weight.double(), errors.double()]
    # A code may differ where rounding errors decide; what follows it in its row then differs too.
    same = (found[0] == wanted[0]).all(0)
    assert same.double().mean() > 0.9
    torch.testing.assert_close(found[1][:, same], wanted[1][:, same], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[2][:, same], wanted[2][:, same], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
def test_our_own_column_loop_has_the_same_bits_on_any_number_of_threads(library: Library) -> None:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            weight, upper, scale, zero = run_of(32, 2003, False)
            codes, errors = torch.empty(32, 2003, dtype=torch.uint8), torch.empty(32, 2003)
            NativeColumns(library).round_columns(weight, upper, scale, zero, 15, codes, errors)
            results.append((codes, weight, errors))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_the_library_is_looked_into_once_however_many_columns_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    real = Library.function

    def function(self: Library, name: str, arguments: str) -> object:
        looked.append(name)
        return real(self, name, arguments)

    monkeypatch.setattr(Library, "function", function)
    usual_columns.cache_clear()
    for _ in range(3):
        weight, upper, scale, zero = run_of(32, 100, False)
        round_columns(weight, upper, scale, zero, 15, torch.empty(32, 100, dtype=torch.uint8), torch.empty_like(weight))
    assert looked == (["round_columns"] if LIBRARIES else [])
