"""The shipped model is quantized by the command, and served by the launcher on one and two ranks."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from conftest import LLAMA
from support.load import Case, Crowd
from support.server import BINARIES, Server

PROMPTS = ("In the beginning God created", "To install the package, run", "The function returns")
METHODS = ("gptq", "awq")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders by method, made with little text: a few seconds each."""
    folder = tmp_path_factory.mktemp("quantized")
    for method in METHODS:
        done = subprocess.run(
            [BINARIES / "text-generation-server", "quantize", LLAMA, folder / method, "--method", method,
             "--num-samples", "16", "--sequence-length", "256", "--max-ppl-increase", "2"],
            timeout=120, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        assert said["model_dir"] == str(folder / method) and 0 < said["proof"]["increase"] < 2
    return {method: folder / method for method in METHODS}


def surprise(model: transformers.PreTrainedModel, prompt_ids: list[int], ids: list[int]) -> float:
    """Mean negative log-likelihood of a continuation."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1]
    return float(-logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).mean())


@pytest.mark.parametrize("method", METHODS)
def test_greedy_text_of_the_result_is_likely_to_the_model_that_it_was_made_from(
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
        best = original.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=30, min_new_tokens=30)
        own = surprise(original, ids, best[0, len(ids) :].tolist())
        assert surprise(original, ids, answer.ids) < own + 0.7, answer.text
