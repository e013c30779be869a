"""AVX-512 for processors that have AVX2 alone: the library of our sources over an emulation of its functions.

With EMULATE_AVX512=1 (`make test-emulated`) it is the library of the tests' process.
"""

import hashlib
import os
import shutil
from pathlib import Path

from text_generation_server.kernels.cpu.native import build, library

BUILT = Path(__file__).parent.parent / "build" / "tests"
HEADER = Path(__file__).parent / "emulated_avx512" / "immintrin.h"
WANTED = os.environ.get("EMULATE_AVX512") == "1"
MACRO = "-DKERNELS_EMULATE_AVX512"
# Vectors of 512 bits are passed in memory, by us and to us alone; some that are undefined look like a mistake to gcc.
FLAGS = (
    *build.AVX2,
    "-mbmi2",
    f"-I{HEADER.parent}",
    MACRO,
    "-Wno-psabi",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
    "-O2",
)


def digest() -> str:
    """Tells whether something was built from the sources, the emulation and the flags that are here."""
    return hashlib.sha256(repr((build.digest_of_sources(), HEADER.read_bytes(), FLAGS)).encode()).hexdigest()[:16]


def built_library() -> Path | None:
    """The emulated library, compiled if there is none of these sources yet; None without a compiler."""
    found = BUILT / f"libkernels_{digest()}.so"
    if not found.exists():
        if shutil.which("c++") is None:
            return None
        BUILT.mkdir(parents=True, exist_ok=True)
        # Tiles are a library of their own: see emulated_tiles.py.
        others = {source: flags for source, flags in build.SOURCES.items() if source != "amx.cpp"}
        sources = {source: FLAGS if source.startswith("avx512") else flags for source, flags in others.items()}
        macros = [f'-DKERNELS_SOURCES="{build.digest_of_sources()}"', MACRO]
        build.make_library(["c++"], macros, sources, found)
    return found


def use_emulated_library() -> None:
    """Makes it this process's library, where that is wanted. Before anything of a library is used."""
    found = built_library() if WANTED else None
    if found is not None:
        library.LIBRARY = found
