"""AMX for processors without it: the source of our tiles over an emulation of their instructions.

One more instruction set for tests; no server knows it.
"""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import emulated_avx512
from text_generation_server.kernels.cpu.native import build, library

NAME = "amx_emulated"


def built_tiles() -> Path | None:
    """The library of the emulated tiles, compiled if there is none of these sources yet; None without a compiler."""
    emulated = emulated_avx512.WANTED
    name = f"avx2_{emulated_avx512.digest()}" if emulated else build.digest_of_sources()[:16]
    found = emulated_avx512.BUILT / f"tiles_{name}.so"
    if not found.exists():
        if shutil.which("c++") is None:
            return None
        found.parent.mkdir(parents=True, exist_ok=True)
        made = found.with_suffix(f".{os.getpid()}")
        own = emulated_avx512.FLAGS if emulated else (*build.AVX512_BF16, "-O3")
        flags = (*build.FLAGS, *own, "-DKERNELS_EMULATE_TILES")
        subprocess.run(["c++", *flags, "-shared", "-o", made, build.HERE / "amx.cpp"], check=True)
        made.replace(found)
    return found


def add_emulated_tiles() -> None:
    """Makes NAME one of the variants of this process's library. Before anything else of the library is used."""
    tiles = built_tiles() if library.LIBRARY.exists() else None
    if tiles is not None:
        emulated, used = ctypes.CDLL(str(tiles)), ctypes.CDLL(str(library.LIBRARY))
        emulated.kernels_emulated_tiles.restype = ctypes.c_void_p
        used.kernels_add_tiles.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
        used.kernels_add_tiles(NAME.encode(), emulated.kernels_emulated_tiles())
