"""Processors against those of transformers, and against arithmetic in float64."""

import pytest
import torch
from text_generation_server.sampling import processors
from text_generation_server.sampling.params import SamplingParams
from text_generation_server.sampling.processors import Watermark
from torch import Tensor
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    WatermarkLogitsProcessor,
)

VOCAB = 200
PROMPT, GENERATED = [3, 3, 9, 150], [7, 9, 7, 7]


def logits() -> Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(3))


def counts(ids: list[int]) -> Tensor:
    return torch.bincount(torch.tensor(ids), minlength=VOCAB).float()


def penalized(params: SamplingParams) -> Tensor:
    row = logits()[None].clone()
    lengths = torch.tensor([float(len(PROMPT + GENERATED))])
    processors.penalize(row, counts(PROMPT + GENERATED)[None], counts(GENERATED)[None], lengths, [params])
    return row[0]


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([PROMPT + GENERATED]), logits()[None].clone())
    assert torch.allclose(penalized(SamplingParams(repetition_penalty=1.3)), expected[0])


@pytest.mark.parametrize(
    ("params", "scale"),
    [
        # OpenAI: "mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence", c over the sampled ids.
        (SamplingParams(count_penalty=0.7), lambda c, g, n: 0.7 * g),
        (SamplingParams(presence_penalty=-1.1), lambda c, g, n: -1.1 * (g > 0)),
        (SamplingParams(frequency_penalty=1.5), lambda c, g, n: 1.5 * c / n),
        (SamplingParams(count_penalty=0.5, presence_penalty=0.25), lambda c, g, n: 0.5 * g + 0.25 * (g > 0)),
    ],
)
def test_additive_penalties_are_their_formulas(params: SamplingParams, scale) -> None:
    all_ids, generated = counts(PROMPT + GENERATED).double(), counts(GENERATED).double()
    expected = logits().double() - scale(all_ids, generated, len(PROMPT + GENERATED))
    assert torch.allclose(penalized(params).double(), expected, atol=1e-6)


def test_ids_that_end_are_forbidden_as_in_transformers() -> None:
    row = logits()
    processors.forbid(row, [2, 6])
    processor = MinNewTokensLengthLogitsProcessor(2, 3, [2, 6], device="cpu")
    assert torch.equal(row, processor(torch.tensor([[1, 2, 3]]), logits()[None].clone())[0])


@pytest.mark.parametrize("mark", [Watermark(), Watermark(0.25, 3.5), Watermark(0.9, -1.0)], ids=str)
@pytest.mark.parametrize("previous", [0, 1, 77, 199])
def test_the_watermark_is_that_of_transformers(previous: int, mark: Watermark) -> None:
    row = logits()
    processors.watermark(row, previous, mark)
    processor = WatermarkLogitsProcessor(VOCAB, "cpu", greenlist_ratio=mark.gamma, bias=mark.delta)
    assert torch.equal(row, processor(torch.tensor([[5, previous]]), logits()[None].clone())[0])
