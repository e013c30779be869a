"""What this processor can do at most, measured: bytes read and multiply-add operations per second."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import common

SOURCE = Path(__file__).parent / "native" / "roofs.cpp"
CHAINS = 12  # of roofs.cpp
# Two operations for each multiplication and its sum: of an instruction's vector.
OPERATIONS = {"avx2": 16, "pairs": 64, "avx512": 32, "bf16": 64, "vnni": 128, "amx_bf16": 16384, "amx_int8": 32768}
NEEDS = {"avx2": "avx2", "pairs": "avx2", "avx512": "avx512f", "bf16": "avx512_bf16", "vnni": "avx512_vnni"}
NEEDS |= {"amx_bf16": "amx_bf16", "amx_int8": "amx_int8"}
NAMES = {"avx2": "float32, AVX2", "pairs": "8-bit pairs, AVX2", "avx512": "float32, AVX-512"}
NAMES |= {"bf16": "bfloat16 dot", "vnni": "8-bit dot"}
NAMES |= {"amx_bf16": "bfloat16 tiles", "amx_int8": "8-bit tiles"}


@dataclass(frozen=True)
class Roofs:
    """Per second: bytes that no cache holds, and operations by kind (keys of OPERATIONS)."""

    threads: int
    read: float
    operations: dict[str, float]

    def table(self) -> str:
        """All of it in markdown."""
        rows = [["read", f"{self.read / 1e9:.1f} GB/s"]]
        rows += [[NAMES[kind], f"{value / 1e9:,.0f} GFLOP/s"] for kind, value in self.operations.items()]
        return common.table([f"roof, {self.threads} thread(s)", ""], rows)


class Roof:
    """Measures them. Memory is read in a process of its own speed: ask the one whose speed is judged, when it is."""

    def __init__(self, threads: int, size: int = 512 << 20):
        """size: bytes that are read, more than a cache holds. They are held as long as this is."""
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "roofs.so"
            command = [os.environ.get("CXX", "c++"), "-O3", "-std=c++20", "-shared", "-fPIC", "-pthread"]
            subprocess.run([*command, str(SOURCE), "-o", str(library)], check=True, timeout=300)
            self._library = ctypes.CDLL(str(library))
        self.threads, self.size = threads, size
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_HUGEPAGE)
        self._data = (ctypes.c_char * size).from_buffer(pages)
        ctypes.memset(self._data, 1, size)
        self._library.roof_read.restype = ctypes.c_double

    def read(self) -> float:
        """Bytes per second, once."""
        return float(self.size / self._library.roof_read(self._data, ctypes.c_int64(self.size), self.threads))

    def operations(self) -> dict[str, float]:
        """Per second, the best of several tries of each kind that the processor has."""
        flags, found = common.processor_flags(), {}
        for kind, each in OPERATIONS.items():
            if NEEDS[kind] in flags:
                function = getattr(self._library, f"roof_{kind}")
                function.restype = ctypes.c_double
                rounds = 3_000_000
                best = min(function(ctypes.c_int64(rounds), self.threads) for _ in range(5))
                found[kind] = rounds * CHAINS * each * self.threads / best
        return found


def measure(threads: int) -> Roofs:
    """The best of several tries of each; takes about two seconds."""
    roof = Roof(threads)
    return Roofs(threads, max(roof.read() for _ in range(8)), roof.operations())


if __name__ == "__main__":
    for count in dict.fromkeys((1, len(os.sched_getaffinity(0)))):
        print(measure(count).table(), end="\n\n")
