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
CHAINS = 16  # of roofs.cpp
# Two operations for each multiplication and its sum: of an instruction's vector.
OPERATIONS = {"avx2": 16, "avx512": 32, "bf16": 64, "vnni": 128, "amx_bf16": 16384, "amx_int8": 32768}
NEEDS = {"avx2": "avx2", "avx512": "avx512f", "bf16": "avx512_bf16", "vnni": "avx512_vnni"}
NEEDS |= {"amx_bf16": "amx_bf16", "amx_int8": "amx_int8"}
NAMES = {"avx2": "float32, AVX2", "avx512": "float32, AVX-512", "bf16": "bfloat16 dot", "vnni": "8-bit dot"}
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


def measure(threads: int) -> Roofs:
    """The best of several tries of each; takes about two seconds."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "roofs.so"
        command = [os.environ.get("CXX", "c++"), "-O3", "-std=c++20", "-shared", "-fPIC", "-pthread"]
        subprocess.run([*command, str(SOURCE), "-o", str(library)], check=True, timeout=300)
        roofs = ctypes.CDLL(str(library))
    size = 512 << 20
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    data = (ctypes.c_char * size).from_buffer(pages)
    ctypes.memset(data, 1, size)
    roofs.roof_read.restype = ctypes.c_double
    read = max(size / roofs.roof_read(data, ctypes.c_int64(size), threads) for _ in range(8))
    flags = common.processor_flags()
    operations = {}
    for kind, each in OPERATIONS.items():
        if NEEDS[kind] in flags:
            function = getattr(roofs, f"roof_{kind}")
            function.restype = ctypes.c_double
            rounds = 3_000_000
            best = min(function(ctypes.c_int64(rounds), threads) for _ in range(5))
            operations[kind] = rounds * CHAINS * each * threads / best
    return Roofs(threads, read, operations)


if __name__ == "__main__":
    for count in dict.fromkeys((1, len(os.sched_getaffinity(0)))):
        print(measure(count).table(), end="\n\n")
