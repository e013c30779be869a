"""Compiles CUDA C++ to cubins with NVRTC, which comes with torch: no CUDA toolkit, GPU or driver is needed.

A cubin is kept in the user's cache folder under a name that tells sources, definitions, options, compiler and
architecture apart; it is written beside its place and renamed, so that processes may race.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ...errors import ConfigError

SOURCES = Path(__file__).parent / "sources"
# What our kernels are proven to compile for: Turing, Ampere, Ada, Hopper, Blackwell.
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100")
# Sums and products are fused where the sources say so and nowhere else: two kernels that write one formula must agree.
OPTIONS = ("--std=c++17", "--fmad=false", "--diag-suppress=177", "--ptxas-options=-v")

Defines = Mapping[str, int]


class CompileError(ConfigError):
    """NVRTC is missing, or refused a source."""


@dataclass(frozen=True)
class Usage:
    """What the compiler says a kernel takes. Bytes of shared memory are the static ones."""

    registers: int
    stack_bytes: int
    spilled_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class Cubin:
    """A compiled module. log: what the compiler said, which is where `usage` comes from."""

    code: bytes
    log: str

    def usage(self) -> dict[str, Usage]:
        """By kernel."""
        pattern = (
            r"Function properties for (\w+)\n\D*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
            r"(\d+) bytes spill loads"
            r".*?Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?"
        )
        found = {}
        for name, stack, stores, loads, registers, shared in re.findall(pattern, self.log, re.DOTALL):
            found[name] = Usage(int(registers), int(stack), int(stores) + int(loads), int(shared or 0))
        return found


def kernels_of(source: str) -> list[str]:
    """Names of the kernels of a file in `sources`."""
    return re.findall(r"^KERNEL (?:__launch_bounds__\(.*?\) )?(\w+)\(", (SOURCES / source).read_text(), re.MULTILINE)


def text_of(source: str, defines: Defines) -> str:
    """A file of `sources` with the headers of the same folder in their places, and `defines` before it."""
    seen: set[str] = set()

    def expand(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = (SOURCES / name).read_text()
        return re.sub(
            r'^#include "(\w+\.h)"$',
            lambda match: expand(match[1]) if (SOURCES / match[1]).exists() else match[0],
            text.replace("#pragma once\n", ""),
            flags=re.MULTILINE,
        )

    return "".join(f"#define {name} {value}\n" for name, value in sorted(defines.items())) + expand(source)


class Nvrtc:
    """The library, bound once."""

    def __init__(self) -> None:
        self._library = _open()
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        self.version = f"{major.value}.{minor.value}"

    def compile(self, text: str, name: str, architecture: str) -> Cubin:
        """Raises CompileError with the compiler's own words."""
        program = ctypes.c_void_p()
        self._check(
            self._library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), name.encode(), 0, None, None)
        )
        try:
            options = [option.encode() for option in (f"--gpu-architecture={architecture}", *OPTIONS)]
            code = self._library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
            log = self._get(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            if code:
                raise CompileError(f"NVRTC {self.version} refuses {name} for {architecture}:\n{log.strip()}")
            return Cubin(self._get(program, "CUBIN"), log)
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _get(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._library, f"nvrtcGet{what}")(program, buffer))
        return buffer.raw

    def _check(self, code: int) -> None:
        if code:
            raise CompileError(f"NVRTC {self.version}: {self._library.nvrtcGetErrorString(code).decode()}")


def _open() -> ctypes.CDLL:
    """The library of the wheel nvidia-cuda-nvrtc, else the system's."""
    places = []
    package = importlib.util.find_spec("nvidia")
    for folder in package.submodule_search_locations or () if package is not None else ():
        places += sorted(map(str, Path(folder).glob("*/lib/libnvrtc.so.*")))
    for place in [*places, "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]:
        try:
            # It looks for its second library by name alone, among what is loaded.
            for beside in Path(place).parent.glob("libnvrtc-builtins.so.*"):
                ctypes.CDLL(str(beside), ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(place)
        except OSError:
            continue
    raise CompileError("NVRTC was not found; it comes with torch's CUDA builds, or by `pip install nvidia-cuda-nvrtc`")


@cache
def nvrtc() -> Nvrtc:
    return Nvrtc()


def default_cache() -> Path | None:
    """Where cubins are kept if no folder is named: in the user's own cache, if that user has a home folder."""
    try:
        return Path("~/.cache/text-generation-server/cubins").expanduser()
    except RuntimeError:  # a user whom the system does not know, and no HOME
        return None


def compiled(source: str, defines: Defines, architecture: str, folder: Path | None = None) -> Cubin:
    """A module from the cache `folder` (by default the user's), or compiled and put there.

    A cache that cannot be written is done without.

    Raises:
        CompileError: NVRTC is missing, or refuses the source.
    """
    text = text_of(source, defines)
    key = hashlib.sha256(repr((text, architecture, OPTIONS, nvrtc().version)).encode()).hexdigest()[:32]
    folder = folder or default_cache()
    if folder is None:
        return nvrtc().compile(text, source, architecture)
    code, log = (folder / f"{Path(source).stem}-{architecture}-{key}.{kind}" for kind in ("cubin", "log"))
    try:
        return Cubin(code.read_bytes(), log.read_text())
    except OSError:
        pass
    cubin = nvrtc().compile(text, source, architecture)
    try:
        _write(log, cubin.log.encode())
        _write(code, cubin.code)
    except OSError:
        return cubin
    return cubin


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except OSError:
        os.unlink(name)
        raise
