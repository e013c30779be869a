"""Tiny models of every served architecture, with the shipped tokenizer, and the quantizer run on them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from text_generation_server.checkpoint.tensors import Checkpoint
from text_generation_server.planning import plan_model
from text_generation_server.quantize.checks import quantize
from text_generation_server.quantize.recording import read_dense
from text_generation_server.quantize.run import Outcome
from text_generation_server.quantize.settings import (
    Options,
    Resources,
    Sampling,
    Scheme,
    Solver,
)

MODELS = Path(__file__).parents[3] / "models"
LLAMA = MODELS / "docs-llama-7m"
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 4096, "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=16),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES | {"tie_word_embeddings": True}),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=32),
}
FEW = Sampling(num_samples=6, length=48)


def make(folder: Path, architecture: str, dtype: torch.dtype = torch.float32) -> Path:
    """A random model whose channels differ in size, as those of trained ones do."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[architecture]()).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(torch.exp(0.7 * torch.randn_like(parameter)))
            elif name.endswith("bias"):
                parameter.copy_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(4)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(LLAMA / name, folder / name)
    return folder


def options(model: Path, output: Path, method: str = "gptq", **changes: Any) -> Options:
    """Few samples, one thread."""
    bits = 8 if method == "bitsandbytes" else 4
    scheme = changes.pop("scheme", Scheme(method, bits, 32, sym=method != "awq"))
    base = Options(model, output, str(model), scheme, Solver(), FEW, Resources(dtype="float32", num_threads=1))
    return replace(base, **changes)


def run(model: Path, output: Path, method: str = "gptq", **changes: Any) -> Outcome:
    return quantize(options(model, output, method, **changes))


def report(output: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "quantization_report.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def dequantized(output: Path) -> transformers.PreTrainedModel:
    """The result in transformers, float32, its weights as the server reads them."""
    plan = plan_model(output, world_size=1)
    checkpoint = Checkpoint(plan.index)
    config = transformers.AutoConfig.from_pretrained(output)
    del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    state = {f"{name}.weight": read_dense(checkpoint, name, linear) for name, linear in plan.linears.items()}
    for name in model.state_dict():
        if name not in state and name in checkpoint:
            state[name] = checkpoint[name].read().float()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    checkpoint.close()
    return model


@torch.no_grad()
def perplexity(model: transformers.PreTrainedModel, windows: list[list[int]]) -> float:
    """As the quantizer's: every token but the first of each window."""
    losses = [model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.double() for ids in windows]
    return float(torch.stack(losses).mean().exp())


def files(folder: Path) -> dict[str, bytes]:
    """Content by name, of everything that must be the same in two runs of one command."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "quantization_report.jsonl"}
