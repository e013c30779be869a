"""Processors against those of transformers, and against arithmetic in float64."""

import pytest
import torch
from conftest import INSTRUCTION_SETS, kernels_of
from text_generation_server.kernels.cpu.kernels import CpuKernels
from text_generation_server.sampling import processors
from text_generation_server.sampling.params import SamplingParams
from text_generation_server.sampling.processors import Watermark
from torch import Tensor
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    WatermarkLogitsProcessor,
)

VOCAB = 200
PROMPT, GENERATED = [3, 3, 9, 150], [7, 9, 7, 7]


def logits() -> Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(3))


def counts(ids: list[int]) -> Tensor:
    return torch.bincount(torch.tensor(ids), minlength=VOCAB).float()


# None: torch's operators.
each_kernels = pytest.mark.parametrize(
    "kernels", [None, *map(kernels_of, INSTRUCTION_SETS)], ids=["torch", *INSTRUCTION_SETS]
)


def penalized(params: SamplingParams, kernels: CpuKernels | None) -> Tensor:
    row, ids = logits()[None].clone(), PROMPT + GENERATED
    processors.change(row, [0], [params], [torch.stack([counts(ids), counts(GENERATED)])], [len(ids)], kernels)
    return row[0]


@each_kernels
def test_the_repetition_penalty_is_that_of_transformers(kernels: CpuKernels | None) -> None:
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([PROMPT + GENERATED]), logits()[None].clone())
    assert torch.allclose(penalized(SamplingParams(repetition_penalty=1.3), kernels), expected[0])


@each_kernels
def test_biases_are_those_of_transformers(kernels: CpuKernels | None) -> None:
    wanted = {(3,): -1.5, (199,): 4.25, (0,): 0.125}
    expected = SequenceBiasLogitsProcessor(wanted)(torch.tensor([PROMPT]), logits()[None].clone())
    params = SamplingParams(logit_bias=tuple((ids[0], value) for ids, value in wanted.items()))
    assert torch.equal(penalized(params, kernels), expected[0])


@each_kernels
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
def test_additive_penalties_are_their_formulas(params: SamplingParams, scale, kernels: CpuKernels | None) -> None:
    all_ids, generated = counts(PROMPT + GENERATED).double(), counts(GENERATED).double()
    expected = logits().double() - scale(all_ids, generated, len(PROMPT + GENERATED))
    assert torch.allclose(penalized(params, kernels).double(), expected, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in INSTRUCTION_SETS if name != "none"])
@pytest.mark.parametrize("vocab", [1, 7, 200, 4099])
def test_our_own_kernels_change_the_rows_that_they_should_to_the_last_bit_as_torch_does(vocab: int, name: str) -> None:
    generator = torch.Generator().manual_seed(vocab)
    before = torch.randn(6, vocab, generator=generator) * 5
    before[1, 0], before[2, -1], before[5, 0] = float("-inf"), float("nan"), -0.0
    generated = torch.randint(0, 3, (6, vocab), generator=generator).float()
    counted = torch.stack([generated + torch.randint(0, 2, (6, vocab), generator=generator), generated], 1)
    rows, biases = [5, 0, 2, 1], ((0, 0.1), (vocab - 1, -3.0))
    params = [
        SamplingParams(repetition_penalty=1.7, frequency_penalty=0.3, presence_penalty=-0.9, count_penalty=1.1),
        SamplingParams(logit_bias=biases),
        SamplingParams(repetition_penalty=0.3, logit_bias=biases),
        SamplingParams(frequency_penalty=-2.0),
    ]
    of_rows = [None if not p.counts_ids else counted[row] for row, p in zip(rows, params, strict=True)]
    found = []
    for kernels in (None, kernels_of(name)):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            after = before.clone()
            processors.change(after, rows, params, of_rows, [17, 300, 21, 1], kernels)
            found.append(after.view(torch.int32))
    torch.set_num_threads(1)
    assert all(torch.equal(after, found[0]) for after in found[1:])
    assert not torch.equal(found[0][rows], before.view(torch.int32)[rows])
    assert torch.equal(found[0][[3, 4]], before.view(torch.int32)[[3, 4]])


def test_penalties_that_do_not_fit_the_logits_are_refused() -> None:
    kernels = next((kernels_of(name) for name in INSTRUCTION_SETS if name != "none"), None)
    if kernels is None:
        pytest.skip("our own kernels are not built here")
    row, params = logits()[None], SamplingParams(repetition_penalty=1.3)
    with pytest.raises(ValueError, match=r"counts are torch.float32 \[2, 199\]; expected float32 \[2, 200\]"):
        processors.change(row, [0], [params], [torch.zeros(2, VOCAB - 1)], [4], kernels)
    with pytest.raises(ValueError, match=r"row 1 of 1$"):
        processors.change(row, [1], [params], [torch.zeros(2, VOCAB)], [4], kernels)
    with pytest.raises(ValueError, match="biases for ids from 200 to 200, of 200"):
        processors.change(row, [0], [SamplingParams(logit_bias=((VOCAB, 1.0),))], [None], [4], kernels)
    with pytest.raises(ValueError, match=r"logits are torch\.float64"):
        processors.change(row.double(), [0], [params], [torch.zeros(2, VOCAB)], [4], kernels)


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
