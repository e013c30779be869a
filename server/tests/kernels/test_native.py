"""Our own products: equal to float64 over odd shapes, the same bits in every company, and never a crash."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import INSTRUCTION_SETS
from hypothesis import given, settings
from hypothesis import strategies as st
from test_quantized_products import CODINGS, close, make
from text_generation_server.batch import StepBatch
from text_generation_server.errors import ConfigError
from text_generation_server.kernels.codes import pack
from text_generation_server.kernels.cpu.kernels import CpuKernels
from text_generation_server.kernels.cpu.native import library as native
from text_generation_server.kernels.cpu.native import linear
from text_generation_server.kernels.cpu.native.layer import NativeLayer
from text_generation_server.kernels.cpu.native.library import Library, load_library
from text_generation_server.kernels.cpu.native.linear import dense_linear, dense_why_not, quantized_linear, why_not
from text_generation_server.kernels.cpu.quantized import Native
from text_generation_server.kernels.interface import AttentionOptions, CacheSpec
from text_generation_server.kernels.weights import Coding, Float8, Integer, QuantizedWeight
from torch import Tensor

LIBRARIES = [Library(name) for name in INSTRUCTION_SETS if name != "none"]
each_library = pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}


def tolerance(library: Library, coding: Coding, dtype: torch.dtype) -> float:
    """Where codes are multiplied by dot instructions, activations have 8 bits."""
    return (
        1e-2 if library.dots_of_codes and isinstance(coding, Integer) and dtype == torch.bfloat16 else TOLERANCE[dtype]
    )


def rows(count: int, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(size)).to(dtype)


@each_library
@given(
    coding=st.sampled_from(CODINGS),
    out=st.integers(8, 300),
    in_=st.integers(8, 900),
    group=st.integers(1, 900),
    zeros=st.booleans(),
    order=st.booleans(),
    count=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    scales=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
@settings(deadline=None, max_examples=120)
def test_random_shapes_equal_float64(
    library: Library,
    coding: Coding,
    out: int,
    in_: int,
    group: int,
    zeros: bool,
    order: bool,
    count: int,
    dtype: torch.dtype,
    scales: torch.dtype,
) -> None:
    weight, matrix = make(coding, out, in_, min(group, in_), zeros and isinstance(coding, Integer), order, scales)
    # `count` rows at a time, but several in all: where weights are alike, how large one row's result is beside what it
    # is summed from, and so beside its error, is a matter of chance.
    x = rows(count * -(-16 // count), in_, dtype)
    product = quantized_linear(library, weight, dtype)
    y = torch.cat([product(part) for part in x.split(count)])
    close(y, x, matrix, tolerance(library, coding, dtype))


@each_library
@pytest.mark.parametrize("in_", [4096, 4304, 10944, 29568])
@pytest.mark.parametrize("coding", [Integer(3), Integer(4), CODINGS[4], Float8("e4m3fn")], ids=str)
def test_long_rows_equal_float64(in_: int, coding: Coding, library: Library) -> None:
    for group in (16, in_):
        weight, matrix = make(coding, 40, in_, group, isinstance(coding, Integer), False, torch.float32)
        for dtype in (torch.float32, torch.bfloat16):
            x = rows(3, in_, dtype)
            close(quantized_linear(library, weight, dtype)(x), x, matrix, tolerance(library, coding, dtype))


@each_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("out", "in_"), [(1, 1), (33, 7), (64, 256), (100, 4304)])
def test_dense_products_equal_float64(out: int, in_: int, dtype: torch.dtype, library: Library) -> None:
    matrix, x = rows(out, in_, dtype), rows(37, in_ + 1, dtype)[:, :in_]
    y = dense_linear(library, matrix)(x)
    assert y.dtype == dtype
    close(y, x, matrix.double(), TOLERANCE[dtype])


@each_library
@pytest.mark.parametrize("coding", [*CODINGS, torch.float32, torch.bfloat16], ids=str)
def test_a_row_has_the_same_bits_in_any_company_on_any_number_of_threads(
    coding: Coding | torch.dtype, library: Library
) -> None:
    in_, out = 296, 333
    kept = torch.get_num_threads()
    dtypes = [coding] if isinstance(coding, torch.dtype) else [torch.float32, torch.bfloat16]
    for group, dtype in product((24, 296), dtypes):
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            if isinstance(coding, torch.dtype):
                matmul = dense_linear(library, rows(out, in_, coding))
            else:
                zeros = isinstance(coding, Integer)
                matmul = quantized_linear(library, make(coding, out, in_, group, zeros, True, torch.float16)[0], dtype)
            x = rows(300, in_, matmul.dtype)
            results.append(matmul(x))
            for count in (1, 2, 3, 4, 5, 6, 7, 8, 13, 16, 24, 33, 48, 49, 64, 200, 256, 257):
                for first in (0, 1, 300 - count):
                    assert torch.equal(matmul(x[first : first + count]), results[-1][first : first + count])
        torch.set_num_threads(kept)
        assert all(torch.equal(result, results[0]) for result in results)


@each_library
@pytest.mark.parametrize("coding", CODINGS, ids=str)
@pytest.mark.parametrize("group", [40, 1304])
def test_long_rows_have_the_same_bits_in_any_company(coding: Coding, group: int, library: Library) -> None:
    """What many rows share is made piece by piece, and a piece may end within a group."""
    in_, out = 1304, 72
    weight, exact = make(coding, out, in_, group, isinstance(coding, Integer), False, torch.float16)
    matmul, x = quantized_linear(library, weight, torch.bfloat16), rows(100, in_, torch.bfloat16)
    alone = torch.cat([matmul(row) for row in x.split(1)])
    close(alone, x, exact, tolerance(library, coding, torch.bfloat16))
    for count in (3, 6, 7, 12, 18, 19, 24, 25, 37, 100):
        assert torch.equal(matmul(x[:count]), alone[:count]), count


# Threads stay, and wake for every product: not in this process.
MANY_THREADS = """
import torch
from text_generation_server.kernels.cpu.native.library import Library
from text_generation_server.kernels.cpu.native.linear import dense_linear

torch.manual_seed(0)
matmul, x = dense_linear(Library(), torch.randn(5120, 296)), torch.randn(8, 296)
results = []
for threads in (1, 2, 63, 257, 300):
    torch.set_num_threads(threads)
    results += [matmul(x) for _ in range(20)]
print(all(torch.equal(result, results[0]) for result in results))
"""


@pytest.mark.skipif(not LIBRARIES, reason="our own kernels are not built here")
def test_more_threads_than_cores_compute_the_same() -> None:
    """Of the first 256, each begins with a range of its own, if there are so many; the others take what these leave."""
    command = [sys.executable, "-c", MANY_THREADS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["True"]


def test_weights_that_were_read_ahead_may_go() -> None:
    """What follows a product is known by its address alone: nothing is looked at there, whoever has it."""
    torch.set_num_threads(2)
    x = rows(1, 512, torch.bfloat16)
    kept = torch.randn(4096, 512).bfloat16()
    first = dense_linear(LIBRARIES[0], kept)
    for _ in range(20):
        second = dense_linear(LIBRARIES[0], torch.randn(4096, 512).bfloat16())
        for _ in range(3):
            assert torch.equal(first(x), dense_linear(LIBRARIES[0], kept)(x))
            second(x)
            first(x)
        del second
    torch.set_num_threads(1)


@each_library
@pytest.mark.parametrize("tiles", [False, True])
def test_tiles_of_onednn_serve_where_ours_are_not_asked_for(
    library: Library, tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    reason = dense_why_not(library, torch.bfloat16)
    assert (reason is not None) is (tiles and not library.dots_of_numbers), reason
    assert dense_why_not(library, torch.float32) is None


@each_library
def test_values_at_the_edges_of_bfloat16_survive(library: Library) -> None:
    """The largest, the smallest and the subnormal; infinities and what is not a number stay in their own rows."""
    finfo = torch.finfo(torch.bfloat16)
    values = torch.tensor([finfo.max, -finfo.max, finfo.tiny, 2.0**-133, 1.0, 0.0]).bfloat16()
    one = torch.eye(6, dtype=torch.bfloat16)
    # Dot instructions take a subnormal for zero, as every library does that uses them.
    kept = torch.where(values.abs() < finfo.tiny, 0, values) if library.dots_of_numbers else values
    assert torch.equal(dense_linear(library, one)(values[None]), kept[None])
    x = torch.zeros(5, 6, dtype=torch.bfloat16)
    x[1, 0], x[3, 2] = float("inf"), float("nan")
    y = dense_linear(library, torch.ones(3, 6, dtype=torch.bfloat16))(x)
    assert y[1].isinf().all() and y[3].isnan().all() and not y[[0, 2, 4]].any()


@each_library
def test_results_are_rounded_to_the_nearest_even_bfloat16(library: Library) -> None:
    x = torch.cat((rows(200, 1), torch.tensor([[1 + 2.0**-8], [1 + 3 * 2.0**-8], [1 + 2.0**-8 + 2.0**-20]])))
    wanted = x.bfloat16()
    # The number itself, as the sum of three bfloat16 numbers.
    parts = [x.bfloat16()]
    for _ in range(2):
        parts.append((x - sum(part.float() for part in parts)).bfloat16())
    y = dense_linear(library, torch.ones(1, 3, dtype=torch.bfloat16))(torch.cat(parts, 1))
    assert torch.equal(y, wanted)


@each_library
def test_activations_of_another_shape_or_type_are_refused_with_both(library: Library) -> None:
    matmul = dense_linear(library, rows(8, 16))
    for wrong in (rows(3, 15), rows(3, 16, torch.bfloat16), rows(3, 16)[0]):
        with pytest.raises(ValueError, match=r"activations are .*; expected torch.float32 \[rows, 16\]"):
            matmul(wrong)
    assert matmul(torch.empty(0, 16)).shape == (0, 8)
    transposed = rows(16, 5).T
    assert torch.equal(matmul(transposed), matmul(transposed.contiguous()))


def test_no_number_and_rarer_codes_keep_to_what_torch_reads() -> None:
    """e4m3 has a code for what is not a number, which our widening would take for 480."""
    weight, _ = make(Float8("e4m3fn"), 8, 32, 32, False, False, torch.float32)
    product = Native(load_library())
    assert product.why_not(weight, torch.float32) is None
    weight.packed[3, 5] = 0xFF
    assert product.why_not(weight, torch.float32) == "some codes are not numbers"
    y = CpuKernels().quantized_linear(weight, torch.float32, "layer")(torch.ones(1, 32))
    assert y.isnan().tolist() == [[i == 3 for i in range(8)]]


def test_a_variant_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor whose instructions do not do what they should."""
    library, quantize, dense = Library(), linear.quantized_linear, linear.dense_linear

    def wrong(matmul: linear.NativeLinear) -> linear.NativeLinear:
        class Wrong(linear.NativeLinear):
            def __call__(self, x: Tensor) -> Tensor:
                return super().__call__(x) * torch.where(torch.arange(self._out) == 5, 1.001, 1)

        matmul.__class__ = Wrong
        return matmul

    monkeypatch.setattr(linear, "quantized_linear", lambda *arguments: wrong(quantize(*arguments)))
    monkeypatch.setattr(linear, "dense_linear", lambda *arguments: wrong(dense(*arguments)))
    assert "wrong by" in str(why_not(library, Integer(4)))
    assert "wrong by" in str(linear.dense_why_not(library, torch.float32))


def test_an_instruction_set_can_be_chosen_and_must_exist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert load_library("none") is None
    for library in LIBRARIES:
        chosen = load_library(library.name)
        assert chosen is not None and chosen.name == library.name
    with pytest.raises(ConfigError, match=r"--instruction-set neon: this processor executes .*avx2"):
        load_library("neon")
    with monkeypatch.context() as patched:
        patched.setattr(native, "LIBRARY", tmp_path / "libkernels.so")
        assert load_library() is None  # not built
    monkeypatch.setattr(native, "digest_of_sources", lambda: "of others")
    assert load_library() is None


def test_the_library_is_built_once_and_without_a_compiler_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = Path(native.__file__).parent
    for source in (*folder.glob("*.cpp"), *folder.glob("*.h"), folder / "build.py"):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    compiler = tmp_path / "compiler"
    compiler.write_text(
        '#!/bin/sh\necho "$@" >> "$0.log"\nwhile [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done\n'
    )
    compiler.chmod(0o755)

    def build(cxx: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, tmp_path / "build.py", cxx],
            env={"PATH": "/nowhere"},
            capture_output=True,
            text=True,
        )

    assert build(str(compiler)).returncode == 0
    calls = (tmp_path / "compiler.log").read_text().splitlines()
    sources = len(list(folder.glob("*.cpp")))
    assert sum("-c" in call.split() for call in calls) == sources
    assert build(str(compiler)).returncode == 0
    again = (tmp_path / "compiler.log").read_text().splitlines()[len(calls) :]
    assert again == ["--version"]
    (tmp_path / "pool.h").write_text("// other\n")
    assert build(str(compiler)).returncode == 0
    assert (tmp_path / "compiler.log").read_text().count("-c ") == 2 * sources
    missing = build("no-such-compiler")
    assert missing.returncode == 1
    assert "no-such-compiler was not found: install a C++ compiler" in missing.stderr


@each_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_without_features_change_nothing(dtype: torch.dtype, library: Library) -> None:
    index = torch.tensor([0] * 5 + [2] * 11)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (9, 16), generator=generator, dtype=torch.uint8)
    scales = torch.rand(9, 4, generator=generator)
    weight = QuantizedWeight(Integer(4), 16, pack(codes, 4), scales, None, index, None)
    x, matmul = rows(25, 16, dtype), quantized_linear(library, weight, dtype)
    for count in (2, 5, 25):
        y, matrix = matmul(x[:count]), (codes.double() - 8) * scales.double()[:, index]
        close(y, x[:count], matrix, tolerance(library, Integer(4), dtype))


# What a layer computes besides its products --------------------------------------------------------------------------


each_layer = pytest.mark.parametrize("layer", list(map(NativeLayer, LIBRARIES)), ids=[each.name for each in LIBRARIES])


@each_layer
@pytest.mark.parametrize("size", [1, 7, 16, 100, 256, 4304])
def test_norms_and_activations_of_any_size_equal_float64(size: int, layer: NativeLayer) -> None:
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 5e-3)):
        x, weight = rows(9, size, dtype), rows(1, size, dtype)[0] + 1
        exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
        torch.testing.assert_close(layer.rms_norm(x, weight, 1e-5).double(), exact, rtol=tolerance, atol=tolerance)
        pair = rows(9, 2 * size, dtype) * 4
        gate, up = pair.double().chunk(2, -1)
        found = layer.silu_and_mul(pair).double()
        torch.testing.assert_close(found, gate / (1 + torch.exp(-gate)) * up, rtol=tolerance, atol=tolerance)


@each_layer
def test_the_exponential_is_right_to_a_few_units_in_the_last_place(layer: NativeLayer) -> None:
    """Seen through silu(x) * 1 for negative x, where it is x * exp(x) to the last bit."""
    x = -torch.linspace(20, 85, 40_001)
    found = layer.silu_and_mul(torch.stack((x, torch.ones_like(x)), 1).view(-1, 2))[:, 0].double()
    exact = x.double() / (1 + torch.exp(-x.double()))
    assert ((found - exact) / exact).abs().max() < 4e-7
    edges = torch.tensor([[float("inf"), 1.0], [float("nan"), 1.0], [-200.0, 1.0], [88.0, 1.0]])
    y = layer.silu_and_mul(edges)[:, 0]
    assert y[0].isinf() and y[1].isnan() and y[2] == 0 and y[3] == 88


@each_layer
def test_elements_have_the_same_bits_in_any_company(layer: NativeLayer) -> None:
    x = rows(200, 100)
    weight = rows(1, 100)[0]
    cos, sin = rows(200, 20).float(), rows(200, 20).float() + 1
    whole = layer.rms_norm(x, weight, 1e-5), layer.silu_and_mul(x), layer.rotate(x.view(200, 5, 20), cos, sin)
    for count in (1, 2, 3, 17):
        for first in (0, 1, 200 - count):
            part = slice(first, first + count)
            assert torch.equal(layer.rms_norm(x[part], weight, 1e-5), whole[0][part])
            assert torch.equal(layer.silu_and_mul(x[part]), whole[1][part])
            assert torch.equal(layer.rotate(x[part].view(count, 5, 20), cos[part], sin[part]), whole[2][part])


def test_caches_lie_in_large_pages_as_far_as_they_fill_them() -> None:
    layer = NativeLayer(LIBRARIES[0])

    def advised(tensor: Tensor) -> bool:
        """As Linux tells it of the mapping (proc(5): `hg` of VmFlags)."""
        inside = False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if begin_end := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                begin, end = (int(number, 16) for number in begin_end.groups())
                inside = begin <= tensor.data_ptr() < end
            elif inside and line.startswith("VmFlags:"):
                return "hg" in line.split()
        raise AssertionError("no mapping holds the tensor")

    large = layer.new_kv_cache(CacheSpec(1, 2, 64, torch.bfloat16), 2048, 16).layers[0]  # 8 MiB each
    small = layer.new_kv_cache(CacheSpec(1, 2, 64, torch.bfloat16), 4, 16).layers[0]
    assert [advised(tensor) for tensor in (*large, *small)] == [True, True, False, False]
    assert all(tensor.shape == (2048, 2, *shape) for tensor, shape in zip(large, ((64, 16), (16, 64)), strict=True))


@each_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("heads", [2, 16])
def test_attention_has_the_same_bits_whole_in_chunks_and_step_by_step(
    heads: int, cap: float | None, window: int | None, dtype: torch.dtype, layer: NativeLayer
) -> None:
    slopes = None if cap is None else tuple(0.5 / (i + 1) for i in range(heads))
    length, dim, size, options = 150, 64, 16, AttentionOptions(0.125, window, cap, slopes)
    q = rows(length, heads * dim, dtype).view(length, heads, dim)
    k, v = (rows(length, 2 * dim + shift, dtype)[:, shift:].reshape(length, 2, dim) for shift in (0, 1))

    def attend(chunk: int) -> Tensor:
        cache = layer.new_kv_cache(CacheSpec(1, 2, dim, dtype), 12, size)
        for tensor in cache.layers[0]:
            tensor.fill_(torch.nan)
        found, table = [], torch.tensor([[3, 1, 4, 11, 5, 9, 2, 6, 8, 7]])
        for begin in range(0, length, chunk):
            positions = torch.arange(begin, min(begin + chunk, length))
            slots = table[0, positions // size] * size + positions % size
            count = len(positions)
            nothing = torch.zeros(0, dtype=torch.int64)
            batch = StepBatch(nothing, positions, [0, count], [begin + count], slots, table, nothing, cache)
            for tensor in cache.layers[0] if window else ():
                tensor[table[0, : max(0, begin - window + 1) // size]] = torch.nan  # nobody sees them any more
            layer.store_kv(k[positions], v[positions], 0, batch)
            found.append(layer.attention(q[positions], 0, batch, options))
        return torch.cat(found)

    whole = attend(length)
    for chunk in (1, 7, 16, 33, 64):
        assert torch.equal(attend(chunk), whole), chunk
