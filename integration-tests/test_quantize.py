"""The shipped model is quantized by the command, and served by the launcher on one and two ranks."""

import json
import math
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from conftest import LLAMA
from support.load import Case, Crowd
from support.server import BINARIES, Server

PROMPTS = ("In the beginning God created", "To install the package, run", "The function returns")
METHODS = {"gptq": ("--method", "gptq"), "awq": ("--method", "awq")}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders by method, made with little text: about three seconds each."""
    folder = tmp_path_factory.mktemp("quantized")
    for method, flags in METHODS.items():
        subprocess.run(
            [BINARIES / "text-generation-server", "quantize", LLAMA, folder / method, *flags, "--num-samples", "24",
             "--sequence-length", "256", "--max-ppl-increase", "1.5"],
            check=True, timeout=120, capture_output=True,
        )  # fmt: skip
    return {method: folder / method for method in METHODS}


def nll(model: transformers.PreTrainedModel, prompt_ids: list[int], ids: list[int]) -> float:
    """Mean, of a continuation."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1]
    return float(-logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).mean())


@pytest.mark.parametrize("method", METHODS)
def test_the_result_is_served_and_its_greedy_text_is_likely_to_the_model_it_was_made_from(
    method: str, results: dict[str, Path]
) -> None:
    cases = [Case(prompt, (("max_new_tokens", 30), ("ignore_eos_token", True))) for prompt in PROMPTS]
    answers = []
    for num_shard in ("1", "2"):
        flags = ("--dtype", "float32", "--num-shard", num_shard, "--quantize", method)
        with Server(results[method], *flags) as server:
            answers.append(Crowd(server, cases).join())
    assert [answer.ids for answer in answers[0]] == [answer.ids for answer in answers[1]]
    tokenizer = transformers.AutoTokenizer.from_pretrained(LLAMA)
    original = transformers.AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float32)
    for prompt, answer in zip(PROMPTS, answers[0], strict=True):
        ids = tokenizer(prompt).input_ids
        own = original.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=30, min_new_tokens=30)
        best = nll(original, ids, own[0, len(ids) :].tolist())
        assert nll(original, ids, answer.ids) < best + 0.7, answer.text


def test_the_report_says_what_the_server_s_log_probabilities_say(results: dict[str, Path]) -> None:
    """Perplexity of the result on a text, by the server, is near that of the original: as near as the report says."""
    lines = [json.loads(line) for line in (results["gptq"] / "quantization_report.jsonl").read_text().splitlines()]
    proof = lines[-1]
    assert proof["kind"] == "proof" and 0 < proof["increase"] < 1.5
    assert math.log(proof["perplexity_after"] / proof["perplexity_before"]) < 0.1
