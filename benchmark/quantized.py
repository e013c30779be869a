"""Measure quantized checkpoints beside the same model in bfloat16: loading, memory, decode and prefill.

The model has TinyLlama's dimensions (1.1 billion parameters) and random weights, made here from a fixed seed; speed does
not depend on what the numbers are. Each side is a process of its own that keeps its model; sides take turns, so that a
machine that slows down in between favours none. Few sides stand in memory at once, and bfloat16 is one of them each time:
a side is compared with the bfloat16 that took turns with it. Activations are bfloat16, but those of `float32`. Before a side
loads, it uses as much memory once: of a virtual machine the host may have taken it.

Decode steps run against a cache of the stated length whose content is zeros, which costs what any content costs. Beside
the figures stands what the memory allows: a step reads every weight that the side holds once, but for the embedding, of
which it reads a row. How fast memory is read changes from moment to moment, by half on some machines: it is measured by the
process itself, before and after each of its turns. Peak memory is measured; of
the cache, only what these tokens take counts.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import roofs

LOAD_TIMEOUT_S = 600.0
ROUND_TIMEOUT_S = 600.0
# What is read to see how fast memory is at the moment, and how often before and after a turn.
READ_BYTES, READS = 256 << 20, 3
PR_SET_THP_DISABLE = 41  # linux/prctl.h
TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632,
    "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "eos_token_id": 2,
}  # fmt: skip
Tensors = dict[str, Any]


@dataclass(frozen=True)
class Side:
    """A checkpoint, and how it is loaded."""

    checkpoint: str
    quantize: str | None = None
    dtype: str = "bfloat16"
    small_pages: bool = False  # no page of 2 MiB, as on a machine whose free memory lies in pieces


# Those that follow each other take turns.
SIDES = {
    "bf16": Side("bf16"),
    "gptq 4 bits g128": Side("gptq-4-128"),
    "nf4 on the fly": Side("bf16", "bitsandbytes-nf4"),
    "awq 4 bits g128": Side("awq-4-128"),
    "gptq 4 bits g128 act-order": Side("gptq-4-128-order"),
    "gptq 4 bits g128, small pages": Side("gptq-4-128", small_pages=True),
    "gptq 2 bits g128": Side("gptq-2-128"),
    "gptq 3 bits g128": Side("gptq-3-128"),
    "gptq 8 bits g128": Side("gptq-8-128"),
    "float32": Side("bf16", dtype="float32"),
    "int8 on the fly": Side("bf16", "bitsandbytes"),
    "fp8 on the fly": Side("bf16", "fp8"),
}


def linears() -> dict[str, tuple[int, int]]:
    """OUT and IN features of every linear of a block, by its name in the block."""
    hidden, size, kv = 2048, 5632, 4 * 64
    return {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (size, hidden), "mlp.up_proj": (size, hidden),
        "mlp.down_proj": (hidden, size),
    }  # fmt: skip


def make_checkpoint(name: str, folder: Path) -> None:
    """Write the checkpoint `name` (bf16, or method-bits-group[-order])."""
    import torch
    from safetensors.torch import save_file

    method, _, settings = name.partition("-")
    generator = torch.Generator().manual_seed(0)
    config: dict[str, Any] = dict(TINY_LLAMA)
    tensors: Tensors = {"model.norm.weight": torch.ones(2048).bfloat16()}
    for embedding in ("model.embed_tokens", "lm_head"):
        tensors[f"{embedding}.weight"] = (torch.randn(32000, 2048, generator=generator) * 0.02).bfloat16()
    make: Callable[[int, int], Tensors]
    if method == "bf16":

        def make(out: int, in_: int) -> Tensors:
            return {"weight": (torch.randn(out, in_, generator=generator) * 0.02).bfloat16()}

    else:
        bits, group, *order = settings.split("-")
        config["quantization_config"] = {"quant_method": method, "bits": int(bits), "group_size": int(group)}
        if method == "gptq":
            config["quantization_config"] |= {"desc_act": bool(order), "sym": True, "checkpoint_format": "gptq_v2"}
        else:
            config["quantization_config"] |= {"zero_point": True, "version": "gemm"}

        def words(*shape: int) -> Any:
            return torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64).to(torch.int32)

        def make(out: int, in_: int) -> Tensors:
            return quantized(method, int(bits), int(group), bool(order), out, in_, words)

    for layer in range(TINY_LLAMA["num_hidden_layers"]):  # type: ignore[call-overload]
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = torch.ones(2048).bfloat16()
        for linear, (out, in_) in linears().items():
            tensors |= {f"{prefix}{linear}.{suffix}": tensor for suffix, tensor in make(out, in_).items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def quantized(
    method: str, bits: int, group: int, order: bool, out: int, in_: int, words: Callable[..., Any]
) -> Tensors:
    """Random codes, symmetric where the format can say so, scaled to the spread of the dense weights."""
    import torch

    groups = in_ // group
    scales = torch.full((groups, out), 0.02 / (2**bits / 3.46), dtype=torch.float16)
    if method == "awq":
        middle = torch.full((groups, out // 8), -0x77777778, dtype=torch.int32)
        return {"qweight": words(in_, out // 8), "qzeros": middle, "scales": scales}
    bit = torch.arange(out * bits).view(out, bits) % bits == bits - 1  # the highest of each zero point's bits
    middle = (bit.view(-1, 32).long() << torch.arange(32)).sum(-1).to(torch.int32).expand(groups, -1).contiguous()
    index = torch.arange(in_, dtype=torch.int32) // group
    if order:
        index = index[torch.randperm(in_, generator=torch.Generator().manual_seed(in_))].contiguous()
    return {"qweight": words(in_ * bits // 32, out), "qzeros": middle, "scales": scales, "g_idx": index}


def memory_of_process(field: str) -> int:
    """Bytes: VmRSS or VmHWM (its peak) of this process."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(f"{field}:"))) * 1024


def forget_peak() -> None:
    """The peak of this process's memory begins anew (proc(5))."""
    Path("/proc/self/clear_refs").write_text("5")


def read_files(folder: Path) -> None:
    """Read all weights once, as fast as the machine gives them."""
    buffer = bytearray(8 << 20)
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def get_memory_back(num_bytes: int) -> None:
    """Use so much memory once. A virtual machine's host may have taken what nobody used for seconds, and gives it back many
    times more slowly than the system hands it out: that is not what loading costs."""
    with mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
        pages.madvise(mmap.MADV_HUGEPAGE)
        block = bytes(8 << 20)
        while pages.tell() + len(block) <= num_bytes:
            pages.write(block)
    forget_peak()


def refuse_large_pages() -> None:
    """From now on the system gives this process small pages alone, whatever it asks for (prctl(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_THP_DISABLE) failed")


def work(folder: Path, quantize: str | None, dtype: str, threads: int) -> None:
    """Load a model, say how it went, then answer commands on standard input: `decode BATCH CONTEXT`, `prefill TOKENS`."""
    from text_generation_server.config import prepare_environment

    prepare_environment()  # before torch
    start = time.perf_counter()
    import torch

    import_s = time.perf_counter() - start
    from text_generation_server.batch import StepBatch
    from text_generation_server.kernels.select import select_kernels
    from text_generation_server.loading import Alone, TensorParallel
    from text_generation_server.models.registry import load_model
    from text_generation_server.planning import plan_model

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    kernels = select_kernels("cpu")
    roof = roofs.Roof(threads, size=READ_BYTES)
    start = time.perf_counter()
    read_files(folder)
    read_s = time.perf_counter() - start
    before_loading = memory_of_process("VmRSS")
    get_memory_back(sum(path.stat().st_size for path in folder.glob("*.safetensors")) * 5 // 4)
    start = time.perf_counter()
    plan = plan_model(folder, world_size=1, dtype=dtype, quantize=quantize)
    model = load_model(plan, TensorParallel(0, 1, Alone()), kernels)
    say({
        "load_s": time.perf_counter() - start,
        "import_s": import_s,
        "read_s": read_s,
        "file_bytes": plan.weight_bytes,
        "plan_bytes": plan.weight_bytes_per_rank,
        "peak_bytes": memory_of_process("VmHWM") - before_loading,
        "held_bytes": memory_of_process("VmRSS") - before_loading,
        "row_stable": kernels.row_stable,
    })  # fmt: skip
    block, longest = 16, 2048 + 16
    most = 16
    cache = kernels.new_kv_cache(model.cache_spec, most * longest // block, block)

    def step(rows: Sequence[tuple[int, int]]) -> None:
        """rows: for each, positions in the cache before, and tokens to compute."""
        starts, positions, slots = [0], [], []
        width = max(-(-(before + count) // block) for before, count in rows)
        for row, (before, count) in enumerate(rows):
            for position in range(before, before + count):
                positions.append(position)
                slots.append((row * longest // block + position // block) * block + position % block)
            starts.append(len(positions))
        model.forward(StepBatch(
            token_ids=torch.arange(len(positions)) * 7 % 32000,
            positions=torch.tensor(positions),
            starts=starts,
            context_lengths=[before + count for before, count in rows],
            slots=torch.tensor(slots),
            block_tables=torch.tensor([[row * longest // block + i for i in range(width)] for row in range(len(rows))]),
            sample_rows=torch.tensor([end - 1 for end in starts[1:]]),
            kv_cache=cache,
        ))  # fmt: skip

    for k, v in cache.layers:
        k.zero_(), v.zero_()
    whole_cache = sum(tensor.numel() * tensor.element_size() for layer in cache.layers for tensor in layer)
    for line in sys.stdin:
        command, *numbers = line.split()
        batch, length = map(int, numbers)
        rows = [(length, 1)] * batch if command == "decode" else [(0, length)] * batch
        step(rows if command == "decode" else [(0, 32)])  # to be warm
        forget_peak()
        reads = [roof.read() for _ in range(READS)]
        steps, start = 0, time.perf_counter()
        # At least half a second, but one step of whatever length.
        while steps == 0 or time.perf_counter() - start < 0.5:
            step(rows)
            steps += 1
        seconds = (time.perf_counter() - start) / steps
        used_cache = sum(before + count for before, count in rows) * model.cache_spec.bytes_per_token
        peak = memory_of_process("VmHWM") - before_loading - whole_cache + used_cache
        reads += [roof.read() for _ in range(READS)]
        say({"s": seconds, "steps": steps, "peak_bytes": peak, "read": statistics.median(reads)})


def say(value: dict[str, Any]) -> None:
    """A line of JSON for the parent."""
    print(json.dumps(value), flush=True)


Key = tuple[str, str, int, int]  # side, command, batch, length


@dataclass
class Figures:
    """What was measured."""

    loaded: dict[str, dict[str, Any]]
    seconds: dict[Key, list[float]]  # of a step, each round
    ratios: dict[Key, list[float]]  # bf16's seconds of the same turn by these
    peaks: dict[Key, int]  # bytes
    reads: dict[Key, list[float]]  # bytes a second that the process read beside it


def measure(arguments: argparse.Namespace, folder: Path) -> tuple[str, bool]:
    """Run every side; the tables, and whether the limits held."""
    sides = {name: SIDES[name] for name in arguments.sides}
    for checkpoint in sorted({side.checkpoint for side in sides.values()}):
        if not (folder / checkpoint / "config.json").exists():
            print(f"making {checkpoint}", file=sys.stderr, flush=True)
            make_checkpoint(checkpoint, folder / checkpoint)
    figures = Figures({}, {}, {}, {}, {})
    others = [name for name in sides if name != "bf16"]
    size = max(1, arguments.at_once - 1)
    for first in range(0, max(1, len(others)), size):
        take_turns(
            arguments, {"bf16": SIDES["bf16"]} | {n: sides[n] for n in others[first : first + size]}, folder, figures
        )
    figures.loaded = {name: figures.loaded[name] for name in sides}
    return report(sides, figures)


def take_turns(arguments: argparse.Namespace, sides: dict[str, Side], folder: Path, figures: Figures) -> None:
    """Measure sides that stand in memory together, bf16 first among them."""
    work_items = [("decode", b, n) for b in arguments.batches for n in arguments.contexts]
    work_items += [("prefill", 1, n) for n in arguments.prompts]
    servers: dict[str, common.Server] = {}
    try:
        for name, side in sides.items():
            command = [sys.executable, __file__, "--work", str(folder / side.checkpoint)]
            command += ["--threads", str(arguments.threads), "--quantize", side.quantize or "", "--dtype", side.dtype]
            command += ["--small-pages"] * side.small_pages
            servers[name] = common.Server(command, log=folder / "log")
            figures.loaded[name] = json.loads(servers[name].read_line(LOAD_TIMEOUT_S))
            print(f"{name}: {figures.loaded[name]}", file=sys.stderr, flush=True)
        for turn in range(arguments.rounds):
            for item in work_items:
                if turn and item[0] == "prefill":
                    continue  # long enough that once is telling
                base = 0.0
                for name, server in servers.items():
                    server.write_line(" ".join(map(str, item)))
                    answer = json.loads(server.read_line(ROUND_TIMEOUT_S))
                    base = base or answer["s"]
                    key = (name, *item)
                    figures.seconds.setdefault(key, []).append(answer["s"])
                    figures.ratios.setdefault(key, []).append(base / answer["s"])
                    figures.reads.setdefault(key, []).append(answer["read"])
                    figures.peaks[key] = max(figures.peaks.get(key, 0), answer["peak_bytes"])
                line = {name: round(figures.seconds[(name, *item)][-1] * 1e3, 1) for name in servers}
                print(item, line, file=sys.stderr, flush=True)
    finally:
        for server in servers.values():
            server.__exit__(None, None, None)


def step_bytes(side: Side, plan_bytes: int) -> int:
    """What a step of one token reads of the weights that a side holds."""
    embedding = int(TINY_LLAMA["vocab_size"]) * int(TINY_LLAMA["hidden_size"])  # type: ignore[call-overload]
    return plan_bytes - embedding * (4 if side.dtype == "float32" else 2)


def report(sides: dict[str, Side], figures: Figures) -> tuple[str, bool]:
    """The tables in markdown."""
    held = True
    mib = 2**20
    # Of a block, as the checkpoint stores it: a 22nd of everything but embedding and head.
    rows = []
    for name, facts in figures.loaded.items():
        layer = (facts["file_bytes"] - 2 * 32000 * 2048 * 2) / 22
        limit = 1.25 * facts["file_bytes"] + layer
        within = facts["peak_bytes"] <= limit
        if sides[name].checkpoint.startswith("gptq"):
            held = held and within
        rows.append([
            name, f"{facts['load_s']:.1f}", f"{facts['read_s']:.1f}", f"{facts['import_s']:.1f}",
            f"{facts['load_s'] / max(facts['read_s'], facts['import_s']):.2f}", f"{facts['file_bytes'] / mib:.0f}", f"{facts['held_bytes'] / mib:.0f}",
            f"{facts['peak_bytes'] / mib:.0f}", f"{limit / mib:.0f}", "held" if within else "NOT HELD",
            "yes" if facts["row_stable"] else "NO",
        ])  # fmt: skip
    head = [
        "",
        "load s",
        "reading the file s",
        "importing torch s",
        "load ÷ the longer",
        "file MiB",
        "held MiB",
        "peak MiB",
        "limit: file + 25 % + a layer",
        "",
        "rows stable",
    ]
    parts = ["## Loading and memory\n", common.table(head, rows)]
    for command, batch, length in dict.fromkeys(key[1:] for key in figures.seconds):
        tokens = batch if command == "decode" else batch * length
        title = f"decode, batch {batch}, {length} tokens before" if command == "decode" else f"prefill of {length}"
        rows = []
        for name, facts in figures.loaded.items():
            key = (name, command, batch, length)
            seconds, ratios = figures.seconds[key], figures.ratios[key]
            rate = tokens / statistics.median(seconds)
            size = step_bytes(sides[name], facts["plan_bytes"])
            shares = [size / read / s for read, s in zip(figures.reads[key], seconds, strict=True)]
            row = [name, f"{1e3 * statistics.median(seconds):,.1f}", f"{rate:,.1f}", common.spread(ratios, 2)]
            if command == "decode":
                row += [f"{statistics.median(figures.reads[key]) / 1e9:.1f}", common.spread(shares, 2)]
            rows.append([*row, f"{figures.peaks[key] / mib:,.0f}"])
            if name == "gptq 4 bits g128" and command == "decode" and batch in (1, 4):
                held = held and statistics.median(ratios) >= 1
        head = ["", "ms a step", "tokens/s", "÷ bf16 (more is faster)"]
        head += ["memory GB/s", "of what it allows"] if command == "decode" else []
        head.append("peak MiB")
        parts += [f"\n## {title[0].upper()}{title[1:]}\n", common.table(head, rows)]
    parts.append(
        "\nMemory: as the side's own process read it, all threads, beside its steps. Limits: peak memory of the gptq checkpoints; decode of `gptq 4 bits g128` at batch 1 and 4 not slower than bf16: "
        f"**{'held' if held else 'NOT HELD'}**."
    )
    return "\n".join(parts), held


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=list(SIDES), help="what to compare")
    parser.add_argument("--at-once", type=int, default=5, help="sides that stand in memory together, bf16 among them")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], help="sequences that decode together")
    parser.add_argument("--contexts", type=int, nargs="+", default=[32, 512, 2048], help="tokens before, at most 2048")
    parser.add_argument(
        "--prompts", type=int, nargs="+", default=[32, 512, 2048], help="lengths of prefill, at most 2048"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of each side")
    parser.add_argument("--folder", type=Path, help="where checkpoints are made and kept; by default they are removed")
    parser.add_argument("--name", default="quantized", help="of the result's file (default: %(default)s)")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--quantize", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    parser.add_argument("--small-pages", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        if arguments.small_pages:
            refuse_large_pages()
        work(arguments.work, arguments.quantize or None, arguments.dtype, arguments.threads)
        return
    if "bf16" not in arguments.sides:
        parser.error("--sides: expected bf16 among them; the others are compared with it")
    head = common.environment()
    with tempfile.TemporaryDirectory() as temporary:
        body, held = measure(arguments, arguments.folder or Path(temporary))
    common.write_result(arguments.name, "Quantized checkpoints beside bfloat16", head, body)
    if not held:
        sys.exit(1)


if __name__ == "__main__":
    main()
