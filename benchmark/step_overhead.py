"""Count what a layer costs in a decode step besides its products and its reading: calls, and time on the processor.

The model has the layers of one of 1.1 billion parameters (22) but widths so small that nothing is left to compute. Two depths
are measured, so that what a step does once drops out: a layer's part is the difference. `single` is the same model with every
operation called on its own, as it is computed where a product is not one of ours.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import torch
from text_generation_server.batch import StepBatch
from text_generation_server.config import prepare_environment
from text_generation_server.kernels.select import select_kernels
from text_generation_server.layers.block import runs_of
from text_generation_server.loading import Alone, TensorParallel
from text_generation_server.models.decoder import Decoder
from text_generation_server.models.registry import load_model
from text_generation_server.planning import plan_model

LAYERS, FEW_LAYERS = 22, 2
LIMIT_US = 60.0
HIDDEN, SIZE, HEADS, KV_HEADS, VOCABULARY = 64, 96, 2, 1, 64
BLOCK = 16


def make_checkpoint(folder: Path, layers: int) -> None:
    """A model of so many tiny layers."""
    from safetensors.torch import save_file

    dim = HIDDEN // HEADS
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": SIZE,
        "num_hidden_layers": layers, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "eos_token_id": 2,
    }  # fmt: skip
    shapes = {"model.embed_tokens": (VOCABULARY, HIDDEN), "model.norm": (HIDDEN,)}
    for layer in range(layers):
        for name, shape in {
            "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,), "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (KV_HEADS * dim, HIDDEN), "self_attn.v_proj": (KV_HEADS * dim, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (SIZE, HIDDEN), "mlp.up_proj": (SIZE, HIDDEN),
            "mlp.down_proj": (HIDDEN, SIZE),
        }.items():  # fmt: skip
            shapes[f"model.layers.{layer}.{name}"] = shape
    folder.mkdir(parents=True)
    save_file({f"{n}.weight": torch.randn(s).bfloat16() for n, s in shapes.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def decode_step(model: Decoder, rows: int) -> StepBatch:
    """One token more for each of so many sequences of 20."""
    cache = model.kernels.new_kv_cache(model.cache_spec, 2 * rows, BLOCK)
    for tensors in cache.layers:
        for tensor in tensors:
            tensor.zero_()
    return StepBatch(
        token_ids=torch.arange(rows) % VOCABULARY,
        positions=torch.full((rows,), 20),
        starts=list(range(rows + 1)),
        context_lengths=[21] * rows,
        slots=torch.arange(rows) * 2 * BLOCK + 20,
        block_tables=torch.arange(2 * rows).view(rows, 2),
        sample_rows=torch.arange(rows),
        kv_cache=cache,
    )


def count_calls(model: Decoder, batch: StepBatch) -> tuple[int, int]:
    """Calls of Python functions and of functions in C that one step makes."""
    counts = {"call": 0, "c_call": 0}

    def note(frame: object, event: str, argument: object) -> None:
        if event in counts:
            counts[event] += 1

    sys.setprofile(note)
    model.forward(batch)
    sys.setprofile(None)
    return counts["call"], counts["c_call"]


def seconds(models: list[Decoder], rows: int, turns: int) -> list[float]:
    """Of a step of each model, the median; they take turns."""
    found: list[list[float]] = [[] for _ in models]
    batches = [decode_step(model, rows) for model in models]
    for _ in range(turns):
        for model, batch, times in zip(models, batches, found, strict=True):
            batch._shared.clear()
            start = time.perf_counter()
            model.forward(batch)
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in found]


def measure(rows_counts: list[int], threads: int, turns: int) -> tuple[str, bool]:
    """The table, and whether the limit held."""
    torch.set_num_threads(threads)
    kernels = select_kernels("cpu")
    models: dict[tuple[str, int], Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for depth in (LAYERS, FEW_LAYERS):
            path = Path(folder) / str(depth)
            make_checkpoint(path, depth)
            for kind in ("whole", "single"):
                plan = plan_model(path, world_size=1, dtype="bfloat16", quantize=None)
                models[kind, depth] = load_model(plan, TensorParallel(0, 1, Alone()), kernels)
                if kind == "single":
                    for block in models[kind, depth].blocks:
                        block.fused = None
                    models[kind, depth].runs = runs_of(models[kind, depth].blocks, kernels)
    lines, held = [], True
    for rows in rows_counts:
        times = dict(zip(models, seconds(list(models.values()), rows, turns), strict=True))
        for kind in ("whole", "single"):
            per_layer = 1e6 * (times[kind, LAYERS] - times[kind, FEW_LAYERS]) / (LAYERS - FEW_LAYERS)
            counts = [
                count_calls(models[kind, depth], decode_step(models[kind, depth], rows))
                for depth in (LAYERS, FEW_LAYERS)
            ]
            calls = [(a - b) / (LAYERS - FEW_LAYERS) for a, b in zip(*counts, strict=True)]
            once = 1e6 * times[kind, LAYERS] - per_layer * LAYERS
            lines.append([rows, kind, f"{calls[0]:.0f}", f"{calls[1]:.0f}", f"{per_layer:.1f}", f"{once:.0f}"])
            held = held and (kind == "single" or per_layer <= LIMIT_US)
    head = ["sequences", "blocks", "Python calls a layer", "C calls a layer", "µs a layer", "µs once a step"]
    verdict = f"Limit: {LIMIT_US:.0f} µs a layer where blocks are whole: **{'held' if held else 'NOT HELD'}**."
    return f"{common.table(head, lines)}\n\n{verdict}", held


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--turns", type=int, default=300)
    parser.add_argument("--name", default="step_overhead", help="of the result's file (default: %(default)s)")
    arguments = parser.parse_args()
    prepare_environment()
    head = common.environment()
    body, held = measure(arguments.rows, arguments.threads, arguments.turns)
    common.write_result(arguments.name, "What a layer costs besides its products", head, body)
    if not held:
        sys.exit(1)


if __name__ == "__main__":
    main()
