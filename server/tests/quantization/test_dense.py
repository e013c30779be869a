"""Dense matrices are read some rows at a time into the layout of their product: the same bits, in less memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import INSTRUCTION_SETS
from safetensors.torch import save_file
from text_generation_server.checkpoint.index import read_index
from text_generation_server.checkpoint.tensors import Checkpoint
from text_generation_server.kernels import weights
from text_generation_server.kernels.cpu.kernels import CpuKernels
from text_generation_server.kernels.cpu.native import linear as native
from text_generation_server.kernels.cpu.native.library import Library
from text_generation_server.kernels.cpu.native.linear import NativeLinear, dense_linear
from text_generation_server.loading import Alone, Loader, TensorParallel
from text_generation_server.quantization.dense import Dense
from text_generation_server.quantization.format import Part, StoredLinear
from text_generation_server.quantization.spec import Shape

LIBRARIES = [Library(name) for name in INSTRUCTION_SETS if name != "none"]
OUT, IN = 203, 72


@pytest.fixture
def stored(tmp_path: Path) -> tuple[dict[str, torch.Tensor], Loader]:
    """A checkpoint of two matrices, the second at an odd byte of the file, and a loader of it."""
    g = torch.Generator().manual_seed(3)
    tensors = {
        "a.weight": torch.randn(OUT, IN, generator=g).bfloat16(),
        "b.weight": torch.randn(OUT, IN, generator=g).bfloat16(),
    }
    save_file(tensors | {"aa": torch.zeros(3, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(read_index(tmp_path))
    stored_linear = StoredLinear(Shape(OUT, IN), Dense())
    tp = TensorParallel(0, 1, Alone())
    return tensors, Loader(checkpoint, lambda name: stored_linear, tp, CpuKernels(), torch.float32, IN)


@pytest.mark.parametrize("columns", [None, range(24), range(7, 60)], ids=str)
@pytest.mark.parametrize("rows", [(range(OUT),), (range(1, 70), range(101, 102), range(150, OUT))], ids=str)
@pytest.mark.parametrize("values", [1, 3000, 1 << 20])
def test_rows_read_in_pieces_are_packed_to_the_same_bytes_as_the_whole(
    columns: range | None, rows: tuple[range, ...], values: int, stored: tuple[dict[str, torch.Tensor], Loader],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    tensors, load = stored
    library = load.kernels._library  # type: ignore[attr-defined]
    if library is None:
        pytest.skip("our own kernels are not built here")
    parts = torch.cat([tensors[f"{name}.weight"][r.start : r.stop] for name in "ab" for r in rows]).float()
    wanted = parts if columns is None else parts[:, columns.start : columns.stop].contiguous()
    whole = dense_linear(library, wanted)
    monkeypatch.setattr(native, "READ_VALUES", values)
    pieces = load.matmul([Part("a", rows), Part("b", rows)], columns)
    assert isinstance(pieces, NativeLinear)
    assert torch.equal(pieces.kept[0], whole.kept[0])
    x = torch.randn(5, wanted.shape[1], generator=torch.Generator().manual_seed(1))
    assert torch.equal(pieces(x), whole(x))
    stored_bytes = 2 * wanted.numel()
    assert load.checkpoint.bytes_read == stored_bytes, "every row once"


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out", [1, 31, 33, 200])
def test_the_packed_form_does_not_depend_on_how_many_rows_are_read_at_a_time(
    out: int, dtype: torch.dtype, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(out, 43, generator=torch.Generator().manual_seed(out)).to(dtype)
    whole = dense_linear(library, weight)
    monkeypatch.setattr(native, "READ_VALUES", 1)
    assert torch.equal(dense_linear(library, weight).kept[0], whole.kept[0])


@pytest.mark.parametrize("rows", [None, range(5, 190)], ids=str)
def test_an_embedding_is_read_in_pieces(
    rows: range | None, stored: tuple[dict[str, torch.Tensor], Loader], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, load = stored
    monkeypatch.setattr(weights, "READ_VALUES", 7 * IN)
    expected = tensors["a.weight"].float()
    assert torch.equal(load.tensor("a.weight", rows), expected if rows is None else expected[rows.start : rows.stop])


# Loads one matrix of 128 MiB, and prints by how much the peak of the process rose, in MiB.
MEASURE = """
import sys
import torch
from pathlib import Path
from text_generation_server.checkpoint.index import read_index
from text_generation_server.checkpoint.tensors import Checkpoint
from text_generation_server.kernels.cpu.kernels import CpuKernels
from text_generation_server.loading import Alone, Loader, TensorParallel
from text_generation_server.quantization.dense import Dense
from text_generation_server.quantization.format import Part, StoredLinear
from text_generation_server.quantization.spec import Shape
from text_generation_server.shard import forget_peak, peak_rss_bytes

torch.set_num_threads(1)
shape, what = Shape(16384, 2048), sys.argv[2]
kernels = CpuKernels()
kernels.linear(torch.zeros(64, 64))(torch.zeros(1, 64))
linear_of = lambda name: StoredLinear(shape, Dense())
load = Loader(
    Checkpoint(read_index(Path(sys.argv[1]))), linear_of, TensorParallel(0, 1, Alone()), kernels, torch.float32, 2048
)
before = forget_peak()
kept = load.tensor("w.weight") if what == "embedding" else load.matmul([Part("w", (range(shape.out),))])
print((peak_rss_bytes() - before) >> 20)
"""


@pytest.mark.parametrize("what", ["head", "embedding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_dense_matrix_is_in_memory_once_while_it_is_loaded(what: str, dtype: torch.dtype, tmp_path: Path) -> None:
    if what == "head" and not LIBRARIES:
        pytest.skip("our own kernels are not built here")
    save_file({"w.weight": torch.ones(16384, 2048, dtype=dtype)}, tmp_path / "model.safetensors")
    command = [sys.executable, "-c", MEASURE, str(tmp_path), what]
    rose = int(subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout)
    assert 120 <= rose <= 128 + 48
