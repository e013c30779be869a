"""The shipped quantized checkpoints, which other libraries made, against what those and transformers say of them.

`reference.json`: transformers in float32 on the dequantized weights. `peer.json`: the maker's own library.
"""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from harness import MODELS, Log, Shard, load, run_ranks
from text_generation_server.kernels.cpu.kernels import CpuKernels
from text_generation_server.loading import TensorParallel
from tokenizers import Tokenizer

QUANTIZED = sorted(MODELS.glob("docs-llama-7m-*"))
TEXT = Path(__file__).parents[1] / "texts" / "eval_public.txt"
WINDOW = 512
# All of the text with FULL=1; the references say the figures of its first 24 windows too.
FULL = bool(os.environ.get("FULL"))
WINDOWS = None if FULL else 24


def windows(path: Path) -> Iterator[list[int]]:
    """The text as the references cut it: every document between <s> and </s>, joined, in windows of 512."""
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    ids: list[int] = []
    for document in TEXT.read_text().split("\n%%%%\n"):
        ids += [1, *tokenizer.encode(document.strip("\n"), add_special_tokens=False).ids, 2]
    for first in range(0, len(ids) - WINDOW + 1, WINDOW):
        yield ids[first : first + WINDOW]


def perplexity(path: Path, kernels: CpuKernels, dtype: str) -> tuple[float, int]:
    """Of the text, and how many tokens were predicted."""

    def work(tp: TensorParallel) -> tuple[float, int]:
        shard, total, count = Shard(load(path, tp, kernels, dtype), num_blocks=33), 0.0, 0
        for i, ids in enumerate(windows(path)):
            if i == WINDOWS:
                break
            log = Log(ids, list(range(32)))
            shard.step([(log, WINDOW)], sample_all=True)
            rows = torch.stack([log.logits[length] for length in range(1, WINDOW)]).double()
            total -= float(rows.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None]).sum())
            count += WINDOW - 1
        return math.exp(total / count), count

    return run_ranks(1, work)[0]  # type: ignore[return-value]


def test_there_is_a_checkpoint_of_every_maker() -> None:
    names = [path.name.removeprefix("docs-llama-7m-") for path in QUANTIZED]
    assert names == ["awq-4bit-g128", "bnb-nf4", "fp8", "gptq-4bit-g128", "w4a16-compressed-tensors"]


@pytest.mark.parametrize(
    ("path", "dtype"),
    [(path, "float32") for path in QUANTIZED]
    + [(path, "bfloat16") for path in QUANTIZED if FULL or "gptq" in path.name],
    ids=lambda value: getattr(value, "name", value),
)
def test_perplexity_equals_the_maker_s(path: Path, dtype: str, kernels: CpuKernels) -> None:
    reference = json.loads((path / "reference.json").read_text())["perplexity"]["eval_public.txt"]
    peer = json.loads((path / "peer.json").read_text())["first_24_windows_of_eval_public"]
    found, count = perplexity(path, kernels, dtype)
    if WINDOWS is not None:
        assert count == peer["tokens"]
        assert found == pytest.approx(peer["perplexity"], rel=0.005)
        reference = reference["first_24_windows"]
    assert count == reference["tokens"]
    assert found == pytest.approx(reference["perplexity"], rel=1e-4 if dtype == "float32" else 0.005)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("path", QUANTIZED, ids=lambda p: p.name)
def test_greedy_ids_equal_the_reference(path: Path, size: int, kernels: CpuKernels) -> None:
    references = json.loads((path / "reference.json").read_text())["greedy"]

    def work(tp: TensorParallel) -> list[Log]:
        shard = Shard(load(path, tp, kernels), num_blocks=16 * len(references))
        logs = [
            Log([*r["prompt_ids"], *r["generated_ids"]], list(range(i * 16, (i + 1) * 16)))
            for i, r in enumerate(references)
        ]
        shard.step([(log, len(log.ids)) for log in logs], sample_all=True)
        return logs

    for log, reference in zip(run_ranks(size, work)[0], references, strict=True):  # type: ignore[call-overload]
        start = len(reference["prompt_ids"])
        found = [int(log.logits[start + i].argmax()) for i in range(len(reference["generated_ids"]))]
        assert found == reference["generated_ids"]
