"""Time and memory of the quantizer on a model of TinyLlama's or Llama 3's 8B shape, of which only some blocks are made.

Every block costs the same, so the time of all 32 follows from that of a few. The arithmetic floor is what the products
alone need at the speed that the device reaches on a large one: forward through each block once, second moments of every
input, and GPTQ's own updates. Peak memory is held against the estimate that the command prints before it begins.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

SHAPES: dict[str, dict[str, int]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
           "blocks": 32},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4,
           "blocks": 22},
    "tiny": {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 4,
             "blocks": 8},
}  # fmt: skip
TIMEOUT_S = 3600.0
MEMORY_LIMIT = 0.15
TIMES_FLOOR = 5.0


def make_model(folder: Path, shape: str, blocks: int) -> None:
    """Random weights in bfloat16, with the shipped tokenizer."""
    import shutil

    import torch
    from safetensors.torch import save_file

    sizes = SHAPES[shape]
    hidden, size = sizes["hidden_size"], sizes["intermediate_size"]
    dim = hidden // sizes["num_attention_heads"]
    kv = sizes["num_key_value_heads"] * dim
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 4096, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "tie_word_embeddings": False, "max_position_embeddings": 8192, "torch_dtype": "bfloat16",
        "num_hidden_layers": blocks, **{key: value for key, value in sizes.items() if key != "blocks"},
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes_: int) -> Any:
        return (torch.randn(*sizes_, generator=generator) / sizes_[-1] ** 0.5).bfloat16()

    folder.mkdir(parents=True)
    weight_map = {}
    for block in range(blocks):
        prefix = f"model.layers.{block}."
        tensors = {f"{prefix}{n}.weight": torch.ones(hidden).bfloat16()
                   for n in ("input_layernorm", "post_attention_layernorm")}  # fmt: skip
        for name, (out, in_) in {
            "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (size, hidden), "mlp.up_proj": (size, hidden),
            "mlp.down_proj": (hidden, size),
        }.items():  # fmt: skip
            tensors[f"{prefix}{name}.weight"] = normal(out, in_)
        file = f"model-{block:05d}.safetensors"
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    rest = {"model.embed_tokens.weight": normal(4096, hidden), "lm_head.weight": normal(4096, hidden),
            "model.norm.weight": torch.ones(hidden).bfloat16()}  # fmt: skip
    save_file(rest, folder / "model-rest.safetensors")
    weight_map |= dict.fromkeys(rest, "model-rest.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(common.SHIPPED_MODEL / name, folder / name)


def operations(shape: str, tokens: int) -> float:
    """Of one block: a multiplication and an addition are two."""
    sizes = SHAPES[shape]
    hidden, size = sizes["hidden_size"], sizes["intermediate_size"]
    kv = hidden // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    linears = [(2 * (hidden + kv), hidden), (2 * size, hidden), (hidden, size)]  # q, k, v, o; gate, up; down
    weights = sum(out * in_ for out, in_ in linears)
    squares = 3 * hidden**2 + size**2
    updates = sum(out * in_**2 for out, in_ in linears)
    return 2.0 * tokens * (weights + squares) + updates


def speed(device: str) -> float:
    """Operations per second of a large product, in the type that the quantizer computes in there."""
    import torch
    from text_generation_server.kernels.offline import machine

    found = machine(device, None)
    n = 8192 if not found.is_host else 2048
    x = torch.randn(n, n, device=found.device).to(found.dtype)
    best = float("inf")
    for _ in range(5):
        found.wait()
        begun = time.perf_counter()
        x @ x
        found.wait()
        best = min(best, time.perf_counter() - begun)
    return 2 * n**3 / best


def measure(arguments: argparse.Namespace, scratch: Path) -> tuple[str, bool]:
    """The table in markdown, and whether the limits held."""
    import torch

    torch.set_num_threads(arguments.threads)
    model = scratch / "model"
    make_model(model, arguments.shape, arguments.blocks)
    tokens = arguments.samples * arguments.length
    rate = speed(arguments.device)
    rows, held = [], True
    for method in arguments.methods:
        output = scratch / method
        command = [sys.executable, "-m", "text_generation_server.cli", "quantize", str(model), str(output)]
        command += ["--method", method, "--num-samples", str(arguments.samples), "--sequence-length"]
        command += [str(arguments.length), "--device", arguments.device, "--num-threads", str(arguments.threads)]
        subprocess.run(command, check=True, timeout=TIMEOUT_S)
        lines = [json.loads(line) for line in (output / "quantization_report.jsonl").read_text().splitlines()]
        memory, walked = lines[-1]["memory"], lines[-1]["seconds"]
        blocks = SHAPES[arguments.shape]["blocks"]
        whole = walked["walk"] / arguments.blocks * blocks
        floor = operations(arguments.shape, tokens) * blocks / rate
        kinds = ["host"] + (["device"] if memory["device_estimate"] else [])
        off = max(abs(memory[f"{k}_peak"] / memory[f"{k}_estimate"] - 1) for k in kinds)
        ok = off <= MEMORY_LIMIT and (method != "gptq" or arguments.device == "cpu" or whole <= TIMES_FLOOR * floor)
        held &= ok
        gib = [f"{memory[f'{k}_{w}'] / 2**30:.2f}" for k in ("host", "device") for w in ("estimate", "peak")]
        rows.append([method, f"{walked['estimate']:.0f}", f"{walked['all']:.0f}", f"{whole:.0f}", f"{floor:.0f}", f"{whole / floor:.1f}", *gib,
                     f"{100 * off:.0f} %", "held" if ok else "NOT HELD"])  # fmt: skip
    head = ["", "seconds, estimate", "taken", f"walk, {SHAPES[arguments.shape]['blocks']} blocks", "floor", "÷ floor",
            "host GiB, estimate", "peak", "device GiB, estimate", "peak", "off by at most", ""]  # fmt: skip
    body = (
        f"{arguments.blocks} blocks of shape {arguments.shape} on {arguments.device}, {arguments.samples} × "
        f"{arguments.length} tokens, {rate / 1e12:.2f} TFLOP/s in a large product.\n\n{common.table(head, rows)}\n\n"
        f"Limits: peaks within {MEMORY_LIMIT:.0%} of the estimate; on a GPU gptq within {TIMES_FLOOR:g} × the floor: "
        f"**{'held' if held else 'NOT HELD'}**."
    )
    return body, held


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="1b")
    parser.add_argument("--blocks", type=int, default=2, help="how many are made and quantized")
    parser.add_argument("--methods", nargs="+", default=["gptq", "awq", "rtn", "bitsandbytes-nf4"])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    head = common.environment()
    with tempfile.TemporaryDirectory() as scratch:
        body, held = measure(arguments, Path(scratch))
    common.write_result(
        f"quantize_speed_{arguments.device.partition(':')[0]}_{arguments.shape}",
        "Time and memory of the quantizer",
        head,
        body,
    )
    if not held:
        sys.exit(1)


if __name__ == "__main__":
    main()
