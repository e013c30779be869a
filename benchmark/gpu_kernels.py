"""Tell what the CUDA kernels cost before a GPU has run them: registers and spills from the compiler's own report, bank
conflicts of shared memory and sectors of global memory from the emulation. Needs NVRTC and a C++ compiler, no GPU.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import common
import torch
from text_generation_server.batch import StepBatch
from text_generation_server.kernels.codes import pack
from text_generation_server.kernels.cuda.attention import PagedAttention
from text_generation_server.kernels.cuda.compile import ARCHITECTURES, compiled
from text_generation_server.kernels.cuda.emulation.emulator import EmulatedModule, Emulator, Place
from text_generation_server.kernels.cuda.kernels import CudaKernels
from text_generation_server.kernels.cuda.layout import pack_dense, pack_quantized
from text_generation_server.kernels.cuda.linear import CudaLinear
from text_generation_server.kernels.interface import AttentionOptions, CacheSpec
from text_generation_server.kernels.weights import Coding, Integer, QuantizedWeight, Table
from torch import Tensor

# File, definitions, which kernels.
MAIN = {
    "int4": (
        "linear.cu",
        {"CODING": 4, "SCALES": 2, "ZEROS": 1, "FINE": 0},
        ("linear_few", "linear_many_16", "linear_many_64"),
    ),
    "nf4": ("linear.cu", {"CODING": 5, "SCALES": 1, "ZEROS": 0, "FINE": 0}, ("linear_few", "linear_many_64")),
    "8 bits": ("linear.cu", {"CODING": 8, "SCALES": 2, "ZEROS": 1, "FINE": 0}, ("linear_few", "linear_many_64")),
    "dense": ("linear.cu", {"CODING": 16, "SCALES": 1, "ZEROS": 0, "FINE": 0}, ("linear_few", "linear_many_64")),
    "heads of 128": ("attention.cu", {"HEAD_DIM": 128}, ("attention_16", "attention_many")),
    "rows": ("elements.cu", {}, ("rms_norm", "rotate", "store_kv")),
    "logits": ("sampling.cu", {}, ("row_statistics", "largest")),
}


def registers() -> list[list[object]]:
    """By kernel: registers on each architecture, and spilled bytes where there are any."""
    rows: list[list[object]] = []
    for name, (source, defines, kernels) in MAIN.items():
        usage = {a: compiled(source, {**defines, "BF16": int(a != "sm_75")}, a).usage() for a in ARCHITECTURES}
        for kernel in kernels:
            found = [usage[a][kernel] for a in ARCHITECTURES]
            cells = [str(u.registers) + (f" ({u.spilled_bytes} B spilled)" if u.spilled_bytes else "") for u in found]
            rows.append([name, f"`{kernel}`", *cells])
    return rows


def weight_of(coding: Coding, out: int, in_: int) -> QuantizedWeight:
    codes = torch.randint(0, 2**coding.bits, (out, in_), dtype=torch.uint8)
    scales = torch.ones(out, in_ // 128, dtype=torch.float32 if isinstance(coding, Table) else torch.float16)
    return QuantizedWeight(coding, in_, pack(codes, coding.bits), scales, None, 128, None)


def counted(module: EmulatedModule, run: object) -> list[Place]:
    assert callable(run)
    module.count()
    run()
    places = module.report()
    module.count(False)
    return places


def accesses(emulator: Emulator) -> list[list[object]]:
    """By kernel and kind of access: requests of a warp, and what they cost beside the least they could."""
    cases: list[tuple[str, list[Place]]] = []
    for name, coding in (
        ("int4", Integer(4)),
        ("nf4", Table(tuple(i / 8 for i in range(16)))),
        ("8 bits", Integer(8)),
        ("dense", None),
    ):
        packed = (
            pack_dense(torch.randn(256, 1024).bfloat16()) if coding is None
            else pack_quantized(weight_of(coding, 256, 1024), torch.bfloat16)
        )  # fmt: skip
        linear = CudaLinear(emulator, packed, torch.bfloat16)
        module = emulator.module("linear.cu", packed.defines(torch.bfloat16))
        for rows in (1, 8, 64):
            x = torch.randn(rows, 1024).bfloat16()
            cases.append((f"{name}, {rows} rows", counted(module, lambda linear=linear, x=x: linear(x))))
    for name, rows in (("attention, one query at 300", [(300, 1)]), ("attention, a prompt of 128", [(128, 128)])):
        kernels = CudaKernels(emulator)
        cache = kernels.new_kv_cache(CacheSpec(1, 2, 128, torch.bfloat16), 32, 16)
        for part in cache.layers[0]:
            part.normal_()
        ((length, queries),) = rows
        nothing = torch.zeros(queries, dtype=torch.int64)
        batch = StepBatch(nothing, nothing, [0, queries], [length], nothing, torch.arange(32)[None], nothing, cache)
        q: Tensor = torch.randn(queries, 8, 128).bfloat16()
        attention = PagedAttention(emulator, 128, torch.bfloat16)
        module = emulator.module("attention.cu", {"BF16": 1, "HEAD_DIM": 128})
        run = lambda a=attention, q=q, b=batch: a(q, *b.kv_cache.layers[0], b, AttentionOptions(0.1))  # noqa: E731
        cases.append((name, counted(module, run)))
    result: list[list[object]] = []
    for name, places in cases:
        cells: list[object] = [name]
        for kind in ("shared read", "shared write", "global read", "global write"):
            mine = [place for place in places if place.kind == kind]
            requests, units, fewest = (sum(getattr(p, f) for p in mine) for f in ("requests", "units", "fewest"))
            cells.append(f"{requests}: {units} / {fewest}" if requests else "–")
        result.append(cells)
    return result


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        second = accesses(Emulator(Path(folder), num_processors=1))
    body = (
        "Registers of a thread by architecture:\n\n"
        + common.table(["module", "kernel", *ARCHITECTURES], registers())
        + "\n\nWhat warps ask of memory, under emulation: requests, then passes of the banks (shared) or sectors of 32 bytes\n"
        "(global) / the fewest that would do. More passes than the fewest are bank conflicts.\n\n"
        + common.table(["kernel", "shared read", "shared write", "global read", "global write"], second)
    )
    common.write_result("gpu_kernels", "CUDA kernels before a GPU has run them", common.environment(), body)


if __name__ == "__main__":
    main()
