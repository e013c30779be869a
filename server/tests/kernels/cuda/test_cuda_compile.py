"""Every CUDA source compiles for every architecture, without spills in the kernels that matter, and cubins are kept."""

import os
from pathlib import Path

import pytest
from emulated import cached
from text_generation_server.kernels.cuda import compile as nvrtc
from text_generation_server.kernels.cuda.ahead import MODULES, compile_ahead
from text_generation_server.kernels.cuda.compile import ARCHITECTURES, CompileError, compiled, kernels_of, text_of

LINEAR = {"CODING": 4, "SCALES": 2, "ZEROS": 1, "FINE": 0}
SOURCES: list[tuple[str, dict[str, int]]] = [
    ("linear.cu", LINEAR),
    ("attention.cu", {"HEAD_DIM": 128}),
    ("elements.cu", {}),
    ("sampling.cu", {}),
]
# Every coding, once.
CODINGS = [
    (2, 3, 0, 0),
    (3, 2, 1, 0),
    (8, 2, 1, 0),
    (5, 1, 0, 0),
    (6, 3, 0, 0),
    (7, 1, 0, 0),
    (16, 1, 0, 0),
    (4, 2, 1, 1),
]


def elf_machine(code: bytes) -> tuple[bytes, int]:
    return code[:4], int.from_bytes(code[18:20], "little")


# The sources know Turing and what came after it: between sm_80 and sm_90 nothing but the compiler differs.
SAMPLED = ARCHITECTURES if os.environ.get("FULL") else [a for a in ARCHITECTURES if a not in ("sm_86", "sm_89")]


@pytest.mark.parametrize("architecture", SAMPLED)
@pytest.mark.parametrize(("source", "defines"), SOURCES, ids=lambda v: v if isinstance(v, str) else "")
def test_every_source_compiles_for_every_architecture(
    source: str, defines: dict[str, int], architecture: str, pytestconfig: pytest.Config
) -> None:
    # Turing has no products of bfloat16.
    bf16 = int(architecture != "sm_75")
    cubin = compiled(source, {**defines, "BF16": bf16}, architecture, cached(pytestconfig, "cubins"))
    assert elf_machine(cubin.code) == (b"\x7fELF", 190)  # EM_CUDA
    usage = cubin.usage()
    assert set(usage) == set(kernels_of(source))
    for kernel, used in usage.items():
        assert used.registers <= 255
        if architecture != "sm_75":
            # The largest tile keeps all registers busy; a few numbers that are used once a slice lie elsewhere.
            assert used.spilled_bytes <= (128 if kernel == "linear_many_64" else 0), (kernel, used)


@pytest.mark.parametrize("coding", CODINGS, ids=str)
def test_every_coding_compiles(coding: tuple[int, int, int, int], pytestconfig: pytest.Config) -> None:
    defines = dict(zip(("CODING", "SCALES", "ZEROS", "FINE"), coding, strict=True)) | {"BF16": 1}
    usage = compiled("linear.cu", defines, "sm_90", cached(pytestconfig, "cubins")).usage()
    # Enough warps fit for the bytes under way that hide the memory's latency.
    assert usage["linear_few"].registers <= 128
    assert usage["linear_few"].spilled_bytes == 0


def test_a_source_that_is_wrong_is_refused_in_the_compilers_words() -> None:
    text = text_of("elements.cu", {"BF16": 1}) + "KERNEL wrong() { nothing_of_this_name(); }"
    with pytest.raises(CompileError, match=r"elements.cu for sm_90(.|\n)*nothing_of_this_name"):
        nvrtc.nvrtc().compile(text, "elements.cu", "sm_90")
    with pytest.raises(CompileError, match="sm_12"):
        nvrtc.nvrtc().compile("", "empty.cu", "sm_12")


def test_a_cubin_is_compiled_once_for_each_source_definition_and_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = nvrtc.nvrtc()

    class Counting:
        version = real.version

        def compile(self, text: str, name: str, architecture: str) -> nvrtc.Cubin:
            calls.append(architecture)
            return real.compile(text, name, architecture)

    monkeypatch.setattr(nvrtc, "nvrtc", Counting)
    first = compiled("elements.cu", {"BF16": 1}, "sm_90", tmp_path)
    assert compiled("elements.cu", {"BF16": 1}, "sm_90", tmp_path) == first
    assert len(calls) == 1
    compiled("elements.cu", {"BF16": 0}, "sm_90", tmp_path)
    compiled("elements.cu", {"BF16": 1}, "sm_80", tmp_path)
    assert len(calls) == 3
    assert not [path for path in tmp_path.iterdir() if path.suffix not in (".cubin", ".log")]
    # A folder that cannot be made is done without, and so is the user's own where there is no such user.
    assert compiled("elements.cu", {"BF16": 1}, "sm_80", tmp_path / next(tmp_path.iterdir()).name / "x").code
    assert len(calls) == 4
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert nvrtc.default_cache() is None
    assert compiled("elements.cu", {"BF16": 1}, "sm_80").code
    with pytest.raises(CompileError, match=r"no home folder .*KERNEL_CACHE"):
        list(compile_ahead(["sm_80"]))
    with pytest.raises(CompileError, match=r"--kernel-cache .* cannot be made: Not a directory"):
        list(compile_ahead(["sm_80"], tmp_path / next(tmp_path.iterdir()).name / "x"))


def test_kernels_that_came_with_an_image_are_read_by_whoever_may_not_write_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compiled("elements.cu", {"BF16": 1}, "sm_90", tmp_path)
    for path in tmp_path.iterdir():
        path.chmod(0o444)
    tmp_path.chmod(0o555)
    monkeypatch.setattr(nvrtc.Nvrtc, "compile", None)
    assert compiled("elements.cu", {"BF16": 1}, "sm_90", tmp_path) == first


def test_everything_can_be_compiled_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "text_generation_server.kernels.cuda.ahead.MODULES",
        [("elements.cu", {"BF16": 0}), ("elements.cu", {"BF16": 1})],
    )
    lines = list(compile_ahead(["sm_75", "sm_90"], tmp_path))
    # Three modules: Turing has no bfloat16.
    assert len(list(tmp_path.glob("*.cubin"))) == 3
    assert any("rms_norm" in line and "registers" in line for line in lines)
    with pytest.raises(CompileError, match="sm_70"):
        list(compile_ahead(["sm_70"], tmp_path))


def test_what_is_compiled_ahead_is_every_source() -> None:
    assert {source for source, _ in MODULES} == {path.name for path in nvrtc.SOURCES.glob("*.cu")}
