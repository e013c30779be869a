"""Products by tiles (AMX): over an emulation of the instructions, and over those of the processor where it has them."""

import ctypes
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import INSTRUCTION_SETS
from emulated_avx512 import WANTED
from emulated_tiles import NAME, built_tiles
from numpy.typing import NDArray
from test_quantized_products import CODINGS, make
from text_generation_server.kernels.cpu.native import build
from text_generation_server.kernels.cpu.native.library import LIBRARY, Library
from text_generation_server.kernels.cpu.native.linear import dense_linear, quantized_linear
from text_generation_server.kernels.weights import Coding, Integer

if NAME not in INSTRUCTION_SETS:
    pytest.skip("this processor has not what products by tiles need besides tiles", allow_module_level=True)

TILES, DOTS = Library(NAME), Library("avx512_bf16")
# Around the limits of halves of tiles (16), tiles (32) and what is computed at once (256), and of what tiles are worth
# for codes (8).
COUNTS = (1, 7, 8, 9, 10, 15, 16, 17, 18, 31, 32, 33, 34, 47, 63, 65, 97, 200, 255, 256, 257, 264, 265, 300)
# Groups of whole blocks, of parts of blocks, of more than is made at a time, and no end of a panel at a limit of any.
SHAPES = [(70, 296, 24), (33, 520, 104), (96, 256, 64), (40, 4400, 2200), (64, 4096, 4096), (17, 9, 4)]


def activations(count: int, size: int) -> torch.Tensor:
    x = torch.randn(count, size, generator=torch.Generator().manual_seed(size))
    x[::3, ::7] *= 40  # what stands out of a block is multiplied as it is
    return x.bfloat16()


@pytest.mark.parametrize("coding", [coding for coding in CODINGS if isinstance(coding, Integer)], ids=str)
def test_codes_have_the_same_bits_whatever_numbers_are_multiplied_with(coding: Integer) -> None:
    """A server may move between two makers. Of more than 18 rows one makes units in registers, one in memory."""
    for out, in_, group in SHAPES:
        weight, _ = make(coding, out, in_, group, True, False, torch.float16)
        numbers, none = (quantized_linear(each, weight, torch.bfloat16) for each in (DOTS, Library("avx512_vnni")))
        x = activations(67, in_)
        assert all(torch.equal(numbers(x[:count]), none(x[:count])) for count in (1, 2, 3, 7, 18, 19, 25, 40, 67))


@pytest.mark.parametrize("order", [False, True], ids=["in order", "reordered"])
@pytest.mark.parametrize("zeros", [False, True], ids=["one middle", "zero points"])
@pytest.mark.parametrize("coding", [coding for coding in CODINGS if isinstance(coding, Integer)], ids=str)
def test_codes_have_the_bits_that_dot_instructions_give(coding: Integer, zeros: bool, order: bool) -> None:
    """So few rows need no tiles, and a server with AMX answers as one without."""
    for out, in_, group in SHAPES:
        weight, _ = make(coding, out, in_, group, zeros, order, torch.float16)
        tiles, dots = (quantized_linear(library, weight, torch.bfloat16) for library in (TILES, DOTS))
        x = activations(300, in_)
        for count in COUNTS:
            assert torch.equal(tiles(x[:count]), dots(x[:count])), (out, in_, group, count)


def products_of_tiles(coding: Coding | torch.dtype, count: int) -> int:
    """How often two tiles are multiplied for `count` rows with a weight of [64, 256]."""
    if isinstance(coding, torch.dtype):
        matmul = dense_linear(TILES, activations(64, 256))
    else:
        matmul = quantized_linear(TILES, make(coding, 64, 256, 64, False, False, torch.float16)[0], torch.bfloat16)
    emulated = ctypes.CDLL(str(built_tiles()))
    emulated.kernels_emulated_products.restype = ctypes.c_int64
    before = emulated.kernels_emulated_products()
    matmul(activations(count, 256))
    return int(emulated.kernels_emulated_products() - before)


@pytest.mark.parametrize("coding", [*CODINGS, torch.bfloat16], ids=str)
def test_numbers_always_go_through_tiles_and_codes_from_nine_rows_on(coding: Coding | torch.dtype) -> None:
    # Two panels of two times 16 columns, runs of 64 places in 8 bits and of 32 in bfloat16, halves of at most 16 rows.
    runs = 4 * 256 // (64 if isinstance(coding, Integer) else 32)
    assert products_of_tiles(coding, 8) == (0 if isinstance(coding, Integer) else runs)
    assert [products_of_tiles(coding, count) / runs for count in (9, 16, 17, 32, 33, 64)] == [1, 1, 2, 2, 4, 4]


def by_the_manual(x: torch.Tensor, matrix: torch.Tensor) -> NDArray[np.float32]:
    """x @ matrix.T as TDPBF16PS adds up, 32 places at a time.

    Chains of even and of odd places, both from zero; their sum is added to the tile (Intel's manual, volume 2).
    """
    x64, w64 = (np.pad(each.double().numpy(), ((0, 0), (0, -each.shape[1] % 32))) for each in (x, matrix))
    total = np.zeros((len(x64), len(w64)), np.float32)
    for begin in range(0, x64.shape[1], 32):
        chains = np.zeros((2, *total.shape), np.float32)
        for place in range(32):
            # The product of two bfloat16 numbers is exact, so this rounds once, as a fused multiply-add does.
            product = np.outer(x64[:, begin + place], w64[:, begin + place])
            chains[place % 2] = (chains[place % 2] + product).astype(np.float32)
        total += chains[0] + chains[1]
    return total


@pytest.mark.parametrize(("out", "in_"), [(70, 296), (33, 7), (32, 1056), (64, 32)])
def test_numbers_are_added_up_in_the_order_of_the_manual(out: int, in_: int) -> None:
    matrix, x = activations(out, in_), activations(40, in_)
    wanted = torch.from_numpy(by_the_manual(x, matrix)).bfloat16()
    assert torch.equal(dense_linear(TILES, matrix)(x), wanted)


def test_what_nobody_wrote_and_what_is_no_number_elsewhere_touch_no_row() -> None:
    nan, one = float("nan"), torch.ones(32, 8, dtype=torch.bfloat16)
    spoilt = torch.full((32, 24), nan, dtype=torch.bfloat16)
    for library in (TILES, DOTS):
        # The last places of a run are made in memory that held these.
        assert dense_linear(library, spoilt)(torch.ones(40, 24, dtype=torch.bfloat16)).isnan().all()
        assert (dense_linear(library, one)(torch.ones(40, 8, dtype=torch.bfloat16)) == 8).all()
    matrix, x = activations(70, 296), activations(65, 296)
    for count in (9, 16, 17, 33, 34, 65):
        wanted = dense_linear(TILES, matrix)(x[:count])
        for row in range(count):
            broken = x[:count].clone()
            broken[row] = nan
            y = dense_linear(TILES, matrix)(broken)
            others = torch.arange(count) != row
            assert y[row].isnan().all() and torch.equal(y[others], wanted[others])


def test_subnormal_numbers_are_zero_and_no_mode_of_the_processor_stays_changed() -> None:
    small = torch.tensor([[2.0**-130, 2.0**-100, 1.0]]).bfloat16()
    y = dense_linear(TILES, torch.tensor([[1.0, 0, 0], [0, 2.0**-30, 0], [0, 0, 2.0**-130]]).bfloat16())(small)
    assert not y.any()
    assert (torch.tensor([2.0**-130]) * 2).item() == 2.0**-129


@pytest.mark.parametrize("coding", [*CODINGS, torch.bfloat16], ids=str)
def test_a_processor_with_tiles_gives_the_bits_of_the_emulation(coding: Coding | torch.dtype) -> None:
    if "amx" not in INSTRUCTION_SETS:
        pytest.skip("AMX=1 is not set, or this processor has no AMX, or Linux does not let a process use it")
    for out, in_, group in SHAPES:
        x, found = activations(300, in_), []
        for library in (TILES, Library("amx")):
            if isinstance(coding, torch.dtype):
                matmul = dense_linear(library, activations(out, in_))
            else:
                weight, _ = make(coding, out, in_, group, isinstance(coding, Integer), False, torch.float16)
                matmul = quantized_linear(library, weight, torch.bfloat16)
            found.append([matmul(x[:count]) for count in COUNTS])
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.skipif(WANTED, reason="the emulation asks the processor for AVX2 alone")
def test_what_can_be_chosen_is_what_the_processor_says_that_it_has() -> None:
    information = Path("/proc/cpuinfo").read_text()
    flags = set(re.findall(r"^flags\s*:(.*)$", information, re.MULTILINE)[0].split())
    vendor = re.findall(r"^vendor_id\s*: *(.*)$", information, re.MULTILINE)[0]
    codes = {"avx2", "fma", "f16c", "bmi2", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512vbmi"}
    tiles = codes | {"avx512_bf16", "amx_tile", "amx_bf16", "amx_int8"}
    variants = Library().variants
    built = ["amx"] if build.knows(["c++"], build.TILES) else []
    # The best last.
    of_dots = ["avx512_bf16", "avx512_vnni"] if vendor == "GenuineIntel" else ["avx512_vnni", "avx512_bf16"]
    assert list(variants) == [NAME, "avx2", "avx512", *of_dots, *built]
    assert variants["avx512_vnni"] is (codes <= flags) and variants["avx512_bf16"] is (codes | {"avx512_bf16"} <= flags)
    usable = bool(built) and tiles <= flags
    assert variants.get("amx", False) is usable
    assert Library().name != "amx"
    if usable:
        assert Library("amx").name == "amx"


def test_a_server_cannot_choose_the_emulation() -> None:
    program = "from text_generation_server.kernels.cpu.native.library import load_library; load_library('amx_emulated')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(r"--instruction-set amx_emulated: this processor executes .* of avx2, avx512, ", done.stderr)


def test_the_library_holds_the_instructions_themselves_and_the_emulation_none() -> None:
    emulated = str(built_tiles())
    listings = [
        subprocess.run(["objdump", "--no-show-raw-insn", "-d", path], capture_output=True, text=True, check=True).stdout
        for path in (str(LIBRARY), emulated)
    ]
    present = "amx" in Library().variants
    for name in ("ldtilecfg", "tileloadd", "tilestored", "tilezero", "tdpbf16ps", "tdpbsud", "tilerelease"):
        assert bool(re.search(rf"\s{name}\b", listings[0])) is present, name
        assert not re.search(rf"\s{name}\b", listings[1]), name


def test_a_compiler_without_tiles_leaves_them_out_and_says_so(tmp_path: Path) -> None:
    for source in (*build.HERE.glob("*.cpp"), *build.HERE.glob("*.h"), build.HERE / "build.py"):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    compiler = tmp_path / "compiler"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *-mamx*) exit 1;; esac\necho "$@" >> "$0.log"\n'
        'while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done\n'
    )
    compiler.chmod(0o755)
    done = subprocess.run([sys.executable, tmp_path / "build.py", compiler], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        0, f"kernels are built without amx: {compiler} does not know -mamx-tile -mamx-bf16 -mamx-int8\n",
    )  # fmt: skip
    log = (tmp_path / "compiler.log").read_text()
    assert log.count("-c ") == len(build.SOURCES) - 1 and "KERNELS_AMX" not in log and "amx" not in log
    assert (tmp_path / "libkernels.so").exists()
    # What is left asks for nothing that is not there.
    flags = [*build.FLAGS, "-O0", '-DKERNELS_SOURCES=""', "-c", str(build.HERE / "library.cpp"), "-o", "library.o"]
    for macro, wants in (("-DKERNELS_AMX", True), ("-DKERNELS_OTHER", False)):
        subprocess.run(["c++", *flags, macro], cwd=tmp_path, check=True)
        names = subprocess.run(["nm", "-C", "library.o"], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert ("kTilesAmx" in names.stdout) is wants
