"""Measure the CUDA kernels on a GPU against what its memory and arithmetic allow, and against peers that are installed.

Goals (`--goals`), each with random weights N(0, 0.02), timed inside CUDA graphs over more weights than the caches hold,
sides taking turns; before anything is timed it must agree with float64 arithmetic:

- g1: int4 of groups of 128 at few rows: share of the memory's measured bandwidth; torch's int4 product as peer.
- g2: the same from 32 to 8192 rows: time beside cuBLAS in bfloat16, and beside our own scratch buffer + cuBLAS.
- g3: nf4: share of the bandwidth; bitsandbytes as peer.
- g4: one token of a model of Llama 3.1 8B's dimensions, at 512 tokens of context: share of the roofline, int4 and bfloat16.
- g5: steps of 32 sequences on that model: share of the roofline, int4 beside bfloat16.
- g6: a model of 1B at 64 sequences: time of a step launched anew each time, beside replays of its graph.

g4 to g6 are measured inside one process, and then through HTTP (`gpu_http.py`): what clients of a server see that the
launcher starts, and for g6 without graphs and with one step at a time beside it.
Without a GPU this says so and exits with 1. No GPU has run it yet.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import common
import gpu_http
import torch
import torch.nn.functional as F
from gpu_http import LLAMA_1B, LLAMA_8B, Dimensions
from text_generation_server.batch import StepBatch
from text_generation_server.errors import ConfigError
from text_generation_server.kernels.codes import pack
from text_generation_server.kernels.cuda.kernels import CudaKernels
from text_generation_server.kernels.interface import AttentionOptions, CacheSpec, Matmul
from text_generation_server.kernels.weights import Coding, Integer, QuantizedWeight, Table
from torch import Tensor

ROUNDS = 7
ROTATED_BYTES = 1 << 30
GROUP = 128
NF4 = Table((
    -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
))  # fmt: skip
# OUT, IN of Llama 3.1 8B's linears.
SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}


def random_weight(coding: Coding, out: int, in_: int, device: torch.device, group: int = GROUP) -> QuantizedWeight:
    """Codes of all kinds; numbers of about the size of N(0, 0.02)."""
    codes = torch.randint(0, 2**coding.bits, (out, in_), dtype=torch.uint8, device=device)
    dtype = torch.float32 if isinstance(coding, Table) else torch.float16
    scales = (torch.rand(out, -(-in_ // group), device=device) * 0.004 + 0.002).to(dtype)
    return QuantizedWeight(coding, in_, pack(codes, coding.bits), scales, None, group, None)


class Stack:
    """The decode step of a model, without a tokenizer, a checkpoint or a sampler."""

    def __init__(
        self, kernels: CudaKernels, d: Dimensions, coding: Coding | None, sequences: int, context: int
    ) -> None:
        self.kernels, self.d, self.device = kernels, d, kernels.device
        qkv = (d.heads + 2 * d.kv_heads) * d.head_dim
        shapes = [(qkv, d.hidden), (d.hidden, d.heads * d.head_dim), (2 * d.size, d.hidden), (d.hidden, d.size)]
        self.layers = [[self._linear(coding, *shape) for shape in shapes] for _ in range(d.layers)]
        self.head = self._linear(None, d.vocab, d.hidden)
        self.norm = torch.ones(d.hidden, dtype=torch.bfloat16, device=self.device)
        blocks = -(-context // 16)
        spec = CacheSpec(d.layers, d.kv_heads, d.head_dim, torch.bfloat16)
        cache = kernels.new_kv_cache(spec, sequences * blocks, 16)
        for layer in cache.layers:
            for part in layer:
                part.normal_()
        tables = torch.arange(sequences * blocks, device=self.device).view(sequences, blocks)
        last = torch.full((sequences,), context - 1, device=self.device)
        self.x = torch.randn(sequences, d.hidden, dtype=torch.bfloat16, device=self.device)
        self.angles = torch.randn(2, sequences, d.head_dim, device=self.device)
        slots = tables[:, (context - 1) // 16] * 16 + (context - 1) % 16
        starts = list(range(sequences + 1))
        self.batch = StepBatch(last, last, starts, [context] * sequences, slots, tables, last, cache)
        weights = sum(out * in_ for out, in_ in shapes) * d.layers
        per_weight = 2.0 if coding is None else coding.bits / 8 + (4 if isinstance(coding, Table) else 2) / GROUP
        self.bytes = weights * per_weight + 2 * d.vocab * d.hidden + sequences * context * spec.bytes_per_token

    def _linear(self, coding: Coding | None, out: int, in_: int) -> Matmul:
        if coding is not None:
            return self.kernels.quantized_linear(random_weight(coding, out, in_, self.device), torch.bfloat16, "layer")
        return self.kernels.linear(torch.randn(out, in_, dtype=torch.bfloat16, device=self.device) * 0.02)

    def step(self) -> Tensor:
        """Logits of every sequence."""
        d, k, x, batch = self.d, self.kernels, self.x, self.batch
        options = AttentionOptions(d.head_dim**-0.5)
        for layer, (qkv_, output, gate_up, down) in enumerate(self.layers):
            qkv = qkv_(k.rms_norm(x, self.norm, 1e-5)).view(len(x), -1, d.head_dim)
            qk = k.rotate(qkv[:, : d.heads + d.kv_heads], *self.angles)
            k.store_kv(qk[:, d.heads :], qkv[:, d.heads + d.kv_heads :], layer, batch)
            x = x + output(k.attention(qk[:, : d.heads], layer, batch, options))
            x = x + down(k.silu_and_mul(gate_up(k.rms_norm(x, self.norm, 1e-5))))
        return self.head(k.rms_norm(x, self.norm, 1e-5))


def graphed(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """`work` as a graph; modules are compiled and loaded before."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    return graph


def seconds(run: Callable[[], object], times: int = 3) -> float:
    """Of one run."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / times


def interleaved(sides: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The median of each side's seconds; sides take turns."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(ROUNDS + 1):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            taken = seconds(sides[name])
            if turn:
                found[name].append(taken)
    return {name: statistics.median(values) for name, values in found.items()}


def bandwidth() -> float:
    """Bytes per second that the memory gives to a plain reader."""
    data = torch.randint(0, 100, (ROTATED_BYTES * 2 // 4,), dtype=torch.int32, device="cuda")
    graph = graphed(lambda: data.sum(dtype=torch.int64))
    return data.nbytes / interleaved({"read": graph.replay})["read"]


@dataclass(frozen=True)
class Rotated:
    """A graph over so many matrices that no cache holds them; one replay multiplies with each."""

    graph: torch.cuda.CUDAGraph
    count: int


def rotated(make: Callable[[], Matmul], num_bytes: float, x: Tensor) -> Rotated:
    """make: gives a matrix of its own at each call, of so many bytes."""
    matmuls = [make() for _ in range(max(2, int(ROTATED_BYTES / num_bytes)))]
    return Rotated(graphed(lambda: [matmul(x) for matmul in matmuls]), len(matmuls))


def cublas(out: int, in_: int) -> Matmul:
    """torch's product in bfloat16."""
    weight = torch.randn(out, in_, dtype=torch.bfloat16, device="cuda") * 0.02
    return lambda x: F.linear(x, weight)


def check(matmul: Matmul, weight: QuantizedWeight) -> None:
    """The gate: a relative error of at most 4e-3, and a row's bits among others."""
    x = torch.randn(64, weight.in_features, dtype=torch.bfloat16, device="cuda")
    wanted = x.double() @ weight.dequantize().double().T
    y = matmul(x)
    error = float(torch.linalg.norm(y.double() - wanted) / torch.linalg.norm(wanted))
    if not error <= 4e-3:
        raise SystemExit(f"wrong by {error:.1e}: nothing is measured")
    for rows in (1, 2, 3, 4, 8, 16, 33):
        if not torch.equal(matmul(x[:rows]), y[:rows]):
            raise SystemExit(f"a row has other bits among {rows} than among 64: nothing is measured")


def tinygemm(out: int, in_: int) -> Matmul:
    """torch's own int4 product."""
    codes = torch.randint(0, 255, (out, in_ // 2), dtype=torch.uint8, device="cuda")
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    scales = torch.rand(in_ // GROUP, out, 2, dtype=torch.bfloat16, device="cuda")
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, scales)


def bnb_nf4(out: int, in_: int) -> Matmul:
    """bitsandbytes."""
    import bitsandbytes as bnb

    weight = torch.randn(out, in_, dtype=torch.bfloat16, device="cuda") * 0.02
    data, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    return lambda x: bnb.matmul_4bit(x, data.t(), quant_state=state)


Rows = list[list[object]]


def products(kernels: CudaKernels, coding: Coding, group: int, row_counts: Sequence[int], peers: bool) -> Rows:
    """g1, g2, g3."""
    read, result = bandwidth(), Rows()
    for name, (out, in_) in SHAPES.items():
        weight = random_weight(coding, out, in_, kernels.device, group)
        check(kernels.quantized_linear(weight, torch.bfloat16, name), weight)
        num_bytes = out * in_ / 2 + weight.scales.nbytes
        scratch = CudaKernels(kernels._backend, library_rows=1)
        for rows in row_counts:
            x = torch.randn(rows, in_, dtype=torch.bfloat16, device="cuda")
            makers: dict[str, tuple[Callable[[], Matmul], float]] = {
                "ours": (partial(kernels.quantized_linear, weight, torch.bfloat16, "layer"), num_bytes),
                "cuBLAS": (partial(cublas, out, in_), 2 * out * in_),
            }
            if rows >= 32:
                makers["scratch"] = (partial(scratch.quantized_linear, weight, torch.bfloat16, "layer"), num_bytes)
            if peers and rows <= 64 and isinstance(coding, Integer):
                makers["tinygemm"] = (partial(tinygemm, out, in_), num_bytes)
            if peers and isinstance(coding, Table) and importlib.util.find_spec("bitsandbytes") is not None:
                makers["bitsandbytes"] = (partial(bnb_nf4, out, in_), num_bytes)
            sides = {key: rotated(make, size, x) for key, (make, size) in makers.items()}
            times = interleaved({key: side.graph.replay for key, side in sides.items()})
            taken = {key: value / sides[key].count for key, value in times.items()}
            others = " · ".join(f"{key} {value / taken['ours']:.2f}" for key, value in taken.items() if key != "ours")
            result.append([name, rows, f"{taken['ours'] * 1e6:.1f}", f"{num_bytes / taken['ours'] / read:.2f}", others])
    return result


def steps(kernels: CudaKernels, d: Dimensions, codings: dict[str, Coding | None], sequences: int, context: int) -> Rows:
    """g4, g5."""
    read, result = bandwidth(), Rows()
    for name, coding in codings.items():
        stack = Stack(kernels, d, coding, sequences, context)
        taken = interleaved({"step": graphed(stack.step).replay})["step"]
        result.append(
            [
                name,
                sequences,
                f"{taken * 1e6:.0f}",
                f"{stack.bytes / read / taken:.2f}",
                f"{sequences / taken:.0f} tokens/s",
            ]
        )
    return result


def bubbles(kernels: CudaKernels) -> Rows:
    """g6."""
    stack = Stack(kernels, LLAMA_1B, None, 64, 512)
    taken = interleaved({"graph": graphed(stack.step).replay, "launches": stack.step})
    return [
        ["1B bf16", 64, f"{taken['graph'] * 1e6:.0f}", "", f"launched anew {taken['launches'] / taken['graph']:.2f}"]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--goals", default="g1,g2,g3,g4,g5,g6", help="which, with commas between")
    parser.add_argument("--no-peers", action="store_true", help="do not measure torch's int4 product and bitsandbytes")
    parser.add_argument("--no-http", action="store_true", help="measure inside one process alone")
    parser.add_argument("--launcher", type=Path, default=common.ROOT / ".venv" / "bin" / "text-generation-launcher")
    parser.add_argument(
        "--folder", type=Path, default=common.ROOT / "target" / "gpu-models", help="where models are kept"
    )
    arguments = parser.parse_args()
    from text_generation_server.kernels.select import select_kernels

    try:
        kernels = select_kernels("cuda")
    except ConfigError as error:
        sys.exit(f"{error}; nothing is measured")
    assert isinstance(kernels, CudaKernels)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    peers = not arguments.no_peers
    both: dict[str, Coding | None] = {"int4 g128": Integer(4), "bf16": None}
    goals: dict[str, Callable[[], Rows]] = {
        "g1": lambda: products(kernels, Integer(4), GROUP, (1, 2, 4, 8, 16), peers),
        "g2": lambda: products(kernels, Integer(4), GROUP, (32, 64, 128, 256, 512, 1024, 2048, 8192), peers),
        "g3": lambda: products(kernels, NF4, 64, (1, 4, 16, 64), peers),
        "g4": lambda: steps(kernels, LLAMA_8B, both, 1, 512),
        "g5": lambda: steps(kernels, LLAMA_8B, both, 32, 300),
        "g6": lambda: bubbles(kernels),
    }
    rows = []
    for goal in arguments.goals.split(","):
        rows += [[goal, *row] for row in goals[goal]()]
        torch.cuda.empty_cache()
        if goal in gpu_http.GOALS and not arguments.no_http:
            rows += [[goal, *row] for row in gpu_http.measure(goal, arguments.launcher, arguments.folder)]
    head = ["goal", "what", "rows", "µs", "of the memory's bandwidth", "others ÷ ours"]
    body = f"GPU: {torch.cuda.get_device_name()}\n\n{common.table(head, rows)}"
    common.write_result("gpu", "CUDA kernels", common.environment(), body)


if __name__ == "__main__":
    main()
