"""Quantized checkpoints through the whole server, found without a flag and named by one, on one and on two ranks."""

import json
import os
import signal
from collections.abc import Callable

import bitsandbytes.functional as bnb
import pytest
import torch
import transformers
from conftest import LLAMA, ROOT
from support.load import Case, Crowd, assert_same, midway, mixed_cases
from support.server import Server

FULL = bool(os.environ.get("FULL"))
# The shipped checkpoints, and what `--quantize` calls their method.
CHECKPOINTS = {
    "docs-llama-7m-gptq-4bit-g128": "gptq",
    "docs-llama-7m-awq-4bit-g128": "awq",
    "docs-llama-7m-bnb-nf4": "bitsandbytes-nf4",
    "docs-llama-7m-fp8": "compressed-tensors",
    "docs-llama-7m-w4a16-compressed-tensors": "compressed-tensors",
}
# (checkpoint, with the flag, ranks)
SERVED = [
    (name, flag, num_shard)
    for i, name in enumerate(CHECKPOINTS)
    for flag in (False, True)
    for num_shard in (1, 2)
    if FULL or ((i + flag + num_shard) % 2 == 0 and (flag or i < 1))
]


@pytest.mark.parametrize(("name", "flag", "num_shard"), SERVED)
def test_a_checkpoint_answers_as_its_reference_says(name: str, flag: bool, num_shard: int) -> None:
    model = ROOT / "models" / name
    flags = ("--quantize", CHECKPOINTS[name]) if flag else ()
    with Server(model, "--dtype", "float32", "--num-shard", str(num_shard), *flags) as server:
        references = json.loads((model / "reference.json").read_text())["greedy"]
        cases = [
            Case(r["prompt"], (("max_new_tokens", len(r["generated_ids"])), ("ignore_eos_token", True)))
            for r in references
        ]
        for reference, answer in zip(references, Crowd(server, cases).join(), strict=True):
            assert answer.ids == reference["generated_ids"], reference["prompt"]


def by_bitsandbytes(kind: str) -> Callable[[torch.Tensor], torch.Tensor]:
    def quantize(weight: torch.Tensor) -> torch.Tensor:
        codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=False)
        state.dtype = torch.float32
        return bnb.dequantize_4bit(codes, state)

    return quantize


def to_int8(weight: torch.Tensor) -> torch.Tensor:
    codes, absmax, _ = bnb.int8_vectorwise_quant(weight.half())
    return codes.float() * absmax[:, None] / 127


def to_fp8(weight: torch.Tensor) -> torch.Tensor:
    scale = weight.float().abs().amax(1, keepdim=True) / 448
    return (weight.float() / scale).to(torch.float8_e4m3fn).float() * scale


ON_THE_FLY = {
    "bitsandbytes-nf4": by_bitsandbytes("nf4"),
    "bitsandbytes-fp4": by_bitsandbytes("fp4"),
    "bitsandbytes": to_int8,
    "fp8": to_fp8,
}


@pytest.mark.parametrize("method", ON_THE_FLY)
def test_a_dense_checkpoint_is_quantized_as_the_library_of_the_method_does(method: str) -> None:
    """Transformers in float32 on weights that the library quantized and dequantized, against two ranks."""
    model = transformers.AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float16).eval()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight = torch.nn.Parameter(ON_THE_FLY[method](module.weight.data), requires_grad=False)
    model = model.float()
    with Server(LLAMA, "--dtype", "float32", "--num-shard", "2", "--quantize", method) as server:
        for prompt in ("In the beginning God created", "To install the package, run"):
            answer = server.stream(prompt, max_new_tokens=40, ignore_eos_token=True)
            ids = transformers.AutoTokenizer.from_pretrained(LLAMA)(prompt, return_tensors="pt").input_ids
            with torch.no_grad():
                logits = model(torch.cat([ids, torch.tensor([answer.ids])], 1)).logits[0]
            best = logits[ids.shape[1] - 1 : -1].log_softmax(-1).max(-1)
            assert answer.ids == best.indices.tolist(), prompt
            found = torch.tensor([token["logprob"] for token in answer.tokens])
            torch.testing.assert_close(found, best.values, rtol=1e-3, atol=1e-3)


def test_a_killed_shard_of_a_quantized_model_changes_nothing() -> None:
    """In bfloat16, which is the default of a quantized checkpoint: any other sum of a replay would show."""
    length = 120
    cases = mixed_cases(16, max_new_tokens=length)
    with Server(ROOT / "models" / "docs-llama-7m-gptq-4bit-g128", "--num-shard", "2") as server:
        golden = Crowd(server, cases).join()
        before = server.wait_clean()
        crowd, _ = midway(server, cases, most=length - 20, least=5)
        os.kill(before["ranks"][1]["process_id"], signal.SIGKILL)
        assert_same(crowd.join(), golden, "rank 1 killed")
        assert server.wait_clean()["generation"] > before["generation"]
