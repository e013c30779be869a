"""The half of `gpu.py` that goes through HTTP: g4, g5 and g6 of a server that the launcher starts on a GPU.

Models have random weights N(0, 0.02) in bfloat16 and the dimensions of Llama 3.1 8B and Llama 3.2 1B, written below
`--folder` (16 and 2.5 GB) with the shipped tokenizer, filled up. int4 is nf4, made from the same file while it is loaded.

No GPU has run it yet; its parts are tested on a processor.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import common
import torch
from safetensors.torch import save_file
from side_by_side import without_end_tokens
from torch import Tensor

PORT = 18330
START_TIMEOUT_S = 900.0
# Of prompts: the shipped tokenizer makes about so many tokens of a word.
TOKENS_PER_WORD = 2


@dataclass(frozen=True)
class Dimensions:
    """Of a model."""

    layers: int
    hidden: int
    size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


LLAMA_8B = Dimensions(32, 4096, 14336, 32, 8, 128, 128256)
LLAMA_1B = Dimensions(16, 2048, 8192, 32, 8, 64, 128256)


@dataclass(frozen=True)
class Load:
    """What clients do: so many at a time, each with a prompt of so many tokens and as many to be answered."""

    streams: int
    prompt_tokens: int
    answer_tokens: int
    requests: int

    def options(self) -> list[str]:
        """For `common.load`."""
        words = max(1, self.prompt_tokens // TOKENS_PER_WORD)
        options = {
            "streams": self.streams, "words": words, "max-new-tokens": self.answer_tokens, "requests": self.requests,
            "warmup": self.streams, "duration": 120, "timeout": 300,
        }  # fmt: skip
        return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def layer(d: Dimensions, number: int, device: str) -> dict[str, Tensor]:
    """One block."""
    shapes = {
        "self_attn.q_proj": (d.heads * d.head_dim, d.hidden), "self_attn.k_proj": (d.kv_heads * d.head_dim, d.hidden),
        "self_attn.v_proj": (d.kv_heads * d.head_dim, d.hidden), "self_attn.o_proj": (d.hidden, d.heads * d.head_dim),
        "mlp.gate_proj": (d.size, d.hidden), "mlp.up_proj": (d.size, d.hidden), "mlp.down_proj": (d.hidden, d.size),
    }  # fmt: skip
    tensors = {f"model.layers.{number}.{name}.weight": random(shape, device) for name, shape in shapes.items()}
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"model.layers.{number}.{name}.weight"] = torch.ones(d.hidden, dtype=torch.bfloat16)
    return tensors


def random(shape: tuple[int, int], device: str) -> Tensor:
    return (torch.randn(shape, dtype=torch.bfloat16, device=device) * 0.02).cpu()


def parts(d: Dimensions, device: str) -> Iterator[dict[str, Tensor]]:
    """All tensors, some at a time."""
    for number in range(d.layers):
        yield layer(d, number, device)
    yield {
        "model.embed_tokens.weight": random((d.vocab, d.hidden), device),
        "lm_head.weight": random((d.vocab, d.hidden), device),
        "model.norm.weight": torch.ones(d.hidden, dtype=torch.bfloat16),
    }


def write_model(d: Dimensions, target: Path, device: str) -> Path:
    """A folder that the launcher serves; nothing in it ends an answer. Kept if it is there."""
    if (target / "config.json").exists():
        return target
    torch.manual_seed(0)
    source = target.with_suffix(".unfinished")
    source.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(parts(d, device)):
        name = f"model-{number:05}.safetensors"
        save_file(tensors, source / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": d.hidden, "vocab_size": d.vocab,
        "intermediate_size": d.size, "num_hidden_layers": d.layers, "num_attention_heads": d.heads, "head_dim": d.head_dim,
        "num_key_value_heads": d.kv_heads, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 1,
    }  # fmt: skip
    (source / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(common.SHIPPED_MODEL / name, source / name)
    command: list[str | Path] = [common.BENCHMARK, "extend-tokenizer", "--vocab-size", str(d.vocab)]
    command += ["--tokenizer", common.SHIPPED_MODEL / "tokenizer.json", "--output", source / "tokenizer.json"]
    subprocess.run(command, check=True, timeout=120)
    without_end_tokens(source, target)
    shutil.rmtree(source)
    return target


def served(launcher: Path, model: Path, load: Load, log: Path, *flags: str) -> common.Report:
    """Starts a server, measures it and stops it."""
    command: list[str | Path] = [launcher, "--model-id", model, "--hostname", "127.0.0.1", "--port", str(PORT), *flags]
    with common.Server(command, log=log, speaks=False) as server:
        server.wait_until_healthy(f"http://127.0.0.1:{PORT}/health", START_TIMEOUT_S)
        report = common.load(f"127.0.0.1:{PORT}", *load.options())
    if report["short_answers"]:
        raise common.MeasureError(f"{model}: {report['short_answers']} answers ended early")
    return report


Rows = list[list[object]]
NF4 = ("--quantize", "bitsandbytes-nf4")
GOALS: dict[str, list[tuple[str, Dimensions, Load, tuple[str, ...]]]] = {
    "g4": [
        ("8B bf16", LLAMA_8B, Load(1, 512, 256, 8), ()),
        ("8B nf4", LLAMA_8B, Load(1, 512, 256, 8), NF4),
        ("1B bf16", LLAMA_1B, Load(1, 512, 256, 8), ()),
    ],
    "g5": [
        ("8B bf16", LLAMA_8B, Load(32, 200, 200, 256), ()),
        ("8B nf4", LLAMA_8B, Load(32, 200, 200, 256), NF4),
    ],
    "g6": [
        ("1B bf16", LLAMA_1B, Load(64, 200, 400, 256), ()),
        ("1B bf16, no graphs", LLAMA_1B, Load(64, 200, 400, 256), ("--cuda-graphs", "0")),
        ("1B bf16, one step at a time", LLAMA_1B, Load(64, 200, 400, 256), ("--pipeline-depth", "1")),
    ],
}


def measure(goal: str, launcher: Path, folder: Path, device: str = "cuda") -> Rows:
    """A row for each server of a goal."""
    common.build("text-generation-benchmark")
    found = Rows()
    for what, dimensions, load, flags in GOALS[goal]:
        model = write_model(dimensions, folder / f"llama-{dimensions.layers}-{dimensions.hidden}", device)
        report = served(launcher, model, load, folder / f"{goal}.log", "--device", device, *flags)
        between = report["between_tokens"]["p50_ms"]
        speed = f"{report['tokens_per_s']:.0f} tokens/s, first token {report['time_to_first_token']['p50_ms']:.0f} ms"
        found.append([f"{what}, through HTTP", load.streams, f"{between * 1e3:.0f}", "", speed])
    return found
