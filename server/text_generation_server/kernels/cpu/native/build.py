"""Builds libkernels.so from the sources beside it: with the package (`setup.py`), or by `python build.py [COMPILER]`.

A C++ compiler is all that is needed. One object for each instruction set, so that the library runs on
every processor and uses the best that the present one has. Nothing is compiled again while sources, flags and compiler
are the same.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARY = HERE / "libkernels.so"
STAMP = HERE / "libkernels.stamp"

# A product and a sum are fused where the sources say so and nowhere else: bits must not depend on an optimizer's mood.
FLAGS = ("-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-pthread", "-Wall", "-Wextra")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
# gcc takes the undefined part of some 512-bit intrinsics for a mistake.
AVX512 = (
    *AVX2,
    "-mavx512f",
    "-mavx512bw",
    "-mavx512dq",
    "-mavx512vl",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
)
# What -O3 adds to code that is unrolled already is time to compile.
AVX512_VNNI = (*AVX512, "-mavx512vnni", "-mavx512vbmi", "-O2")
AVX512_BF16 = (*AVX512_VNNI, "-mavx512bf16")
TILES = ("-mamx-tile", "-mamx-bf16", "-mamx-int8")
SOURCES = {
    # What takes longest first, so that it is not the last to end.
    "avx512_bf16.cpp": AVX512_BF16,
    "avx512.cpp": AVX512,
    "avx2.cpp": AVX2,
    "avx512_vnni.cpp": AVX512_VNNI,
    "avx2_codes.cpp": (*AVX2, "-O2"),
    "amx.cpp": (*AVX512_BF16, *TILES),
    "library.cpp": (),
    "block.cpp": (),
    "exchange.cpp": (),
    "pool.cpp": (),
    "sampling.cpp": (),
    "guidance.cpp": (),
    "codes.cpp": (*AVX2, "-mbmi2"),
    "panels.cpp": (*AVX2, "-mbmi2"),
}


def build(command: str = "c++") -> str | None:
    """Makes LIBRARY with the compiler `command` if it is not up to date. Returns why there is none, or None.

    Raises:
        RuntimeError: the compiler refused a source.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"there are no kernels for {platform.machine()} yet"
    compiler = shlex.split(command)
    if shutil.which(compiler[0]) is None:
        return f"{compiler[0]} was not found: install a C++ compiler (Debian, Ubuntu: g++), or name one with $CXX"
    stamp = _stamp(compiler)
    if LIBRARY.exists() and STAMP.exists() and STAMP.read_text() == stamp:
        return None
    sources, macros = dict(SOURCES), [f'-DKERNELS_SOURCES="{digest_of_sources()}"']
    if knows(compiler, TILES):
        macros.append("-DKERNELS_AMX")
    else:
        del sources["amx.cpp"]
        print(f"kernels are built without amx: {command} does not know {' '.join(TILES)}", file=sys.stderr)
    make_library(compiler, macros, sources, LIBRARY)
    STAMP.write_text(stamp)
    return None


def make_library(compiler: list[str], flags: list[str], sources: dict[str, tuple[str, ...]], library: Path) -> None:
    """Compiles sources, each with its own flags and the common ones, and links them.

    Raises:
        RuntimeError: the compiler refused a source.
    """
    with tempfile.TemporaryDirectory() as folder:

        def compile_one(source: str) -> str:
            target = f"{folder}/{source}.o"
            _run([*compiler, *FLAGS, *flags, *sources[source], "-c", str(HERE / source), "-o", target])
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sources))
        # Not over the running file: a server may have it in its memory.
        made = library.with_name(f".{library.name}.{os.getpid()}")
        _run([*compiler, "-shared", "-pthread", "-o", str(made), *objects])
    made.replace(library)


def digest_of_sources() -> str:
    """Tells whether a library was built from the sources beside it."""
    digest = hashlib.sha256()
    for path in sorted([*HERE.glob("*.cpp"), *HERE.glob("*.h")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _stamp(compiler: list[str]) -> str:
    """Tells one set of sources, flags and compiler from another."""
    digest = hashlib.sha256(_run([*compiler, "--version"]).encode())
    digest.update(repr((compiler, FLAGS, SOURCES, digest_of_sources())).encode())
    return digest.hexdigest()


def knows(compiler: list[str], flags: tuple[str, ...]) -> bool:
    """Whether a compiler takes these flags."""
    command = [*compiler, *flags, "-fsyntax-only", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed with {done.returncode}:\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    reason = build(*sys.argv[1:2])
    if reason is not None:
        sys.exit(f"kernels are not built: {reason}")
