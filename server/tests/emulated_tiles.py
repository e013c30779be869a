"""AMX for processors without it: the source of our tiles over an emulation of their instructions.

One more instruction set for tests; no server knows it.
"""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

from text_generation_server.kernels.cpu.native import build
from text_generation_server.kernels.cpu.native.library import LIBRARY

NAME = "amx_emulated"
BUILT = Path(__file__).parent.parent / "build" / "tests"


def built_tiles() -> Path | None:
    """The library of the emulated tiles, compiled if there is none of these sources yet; None without a compiler."""
    found = BUILT / f"tiles_{build.digest_of_sources()[:16]}.so"
    if not found.exists():
        if shutil.which("c++") is None:
            return None
        BUILT.mkdir(parents=True, exist_ok=True)
        made = found.with_suffix(f".{os.getpid()}")
        flags = (*build.FLAGS, *build.AVX512_BF16, "-DKERNELS_EMULATE_TILES", "-O3")
        subprocess.run(["c++", *flags, "-shared", "-o", made, build.HERE / "amx.cpp"], check=True)
        made.replace(found)
    return found


def add_emulated_tiles() -> None:
    """Makes NAME one of the variants of this process's library. Before anything else of the library is used."""
    tiles = built_tiles() if LIBRARY.exists() else None
    if tiles is not None:
        emulated, library = ctypes.CDLL(str(tiles)), ctypes.CDLL(str(LIBRARY))
        emulated.kernels_emulated_tiles.restype = ctypes.c_void_p
        library.kernels_add_tiles.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
        library.kernels_add_tiles(NAME.encode(), emulated.kernels_emulated_tiles())
