"""The distribution that ids are drawn from against transformers' processors, and that a row ignores its neighbours."""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import pytest
import torch
from conftest import INSTRUCTION_SETS
from text_generation_server.kernels.cpu.native.library import Library
from text_generation_server.kernels.cpu.native.sampling import NativeSampling
from text_generation_server.kernels.interface import GUIDED_ROW, Allowed, Drawn, DrawRequest, GuidedRows
from text_generation_server.sampling import processors
from text_generation_server.sampling.constraint import Automaton, biases
from text_generation_server.sampling.params import SamplingParams
from text_generation_server.sampling.sampler import FIRST_LOOK, Draw, candidates_of, requests_of
from text_generation_server.sampling.sampler import draw as draw_with
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)


class Native:
    """Our own kernels of one instruction set."""

    def __init__(self, name: str) -> None:
        self.sampling = NativeSampling(Library(name))

    def draw_ids(
        self,
        raw: Tensor,
        processed: Tensor,
        requests: Sequence[DrawRequest],
        allowed: Allowed | None,
        guided: GuidedRows | None,
    ) -> Drawn:
        return self.sampling.draw(raw, processed, requests, allowed, guided)


@pytest.fixture(params=INSTRUCTION_SETS, scope="module")
def kernels(request) -> Native | None:
    """Who draws; `none`: torch."""
    return None if request.param == "none" else Native(request.param)


@pytest.fixture
def draw(kernels):
    return partial(draw_with, kernels=kernels)


def random_logits(vocab: int, *, scale: float, rows: int = 1, seed: int = 0) -> Tensor:
    """[rows, vocab] float32; a scale of 0.01 gives a nearly flat distribution, one of 8 a peaked one."""
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def tied_logits(vocab: int) -> Tensor:
    """Few different values, each many times."""
    return random_logits(vocab, scale=1.5).mul_(2).round_().div_(2)


def scaled(logits: Tensor, params: SamplingParams) -> Tensor:
    return (logits - logits.max()) / torch.tensor(params.temperature, dtype=torch.float32)


@pytest.fixture
def candidates(kernels):
    """Ids and probabilities of one row [1, vocab] that may be drawn."""

    def find(logits: Tensor, params: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
        if kernels is not None:
            ids, weights = kernels.sampling.candidates(logits, *requests_of([params], np.zeros(1, np.int64)))
            weights = weights.astype(np.float64)
        else:
            row = scaled(logits[0], params)
            look = row.topk(min(FIRST_LOOK, len(row)))
            ids, weights = candidates_of(row, params, (look.values.numpy(), look.indices.numpy()))
        return ids[weights > 0], weights[weights > 0] / weights.sum()

    return find


def warped(logits: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities [vocab] in float64 after transformers' warpers, in TGI's order."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(params.temperature))])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.typical_p < 1:
        warpers.append(TypicalLogitsWarper(params.typical_p))
    return warpers(torch.empty(1, 0, dtype=torch.int64), logits.double())[0].softmax(-1)


FILTERS = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 127},
    {"top_k": 128},
    {"top_k": 1000},
    {"top_k": 10**6},
    {"top_p": 1e-40},
    {"top_p": 0.3},
    {"top_p": 0.95},
    {"top_p": 0.999999},
    {"typical_p": 1e-40},
    {"typical_p": 0.2},
    {"typical_p": 0.95},
    {"typical_p": 0.999999},
    {"top_k": 200, "top_p": 0.9},
    {"top_k": 20, "typical_p": 0.5},
    {"top_p": 0.9, "typical_p": 0.7},
    {"top_k": 40, "top_p": 0.8, "typical_p": 0.6, "temperature": 0.7},
    {"top_k": 300, "top_p": 0.99, "temperature": 2.5},
]


@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0], ids=["flat", "usual", "peaked"])
@pytest.mark.parametrize("vocab", [50, 4096, 32000])
def test_the_possible_ids_and_their_probabilities_are_those_of_transformers(candidates, vocab, scale, options):
    params = SamplingParams(do_sample=True, **options)
    logits = random_logits(vocab, scale=scale, seed=vocab)
    expected = warped(logits, params)
    ids, probabilities = candidates(logits, params)
    assert ids.tolist() == expected.nonzero()[:, 0].tolist()
    np.testing.assert_allclose(probabilities, expected[ids].numpy(), rtol=2e-5 * scale + 1e-6, atol=1e-300)


@pytest.mark.parametrize("options", [f for f in FILTERS if "temperature" not in f], ids=str)
@pytest.mark.parametrize("vocab", [50, 4096])
def test_ids_that_tie_are_kept_as_transformers_keeps_them(candidates, vocab, options):
    params = SamplingParams(do_sample=True, **options)
    logits = tied_logits(vocab)
    expected = warped(logits, params)
    ids, probabilities = candidates(logits, params)
    # Which of several equal ids top_p keeps is up to an unstable sort there; here it is the first ones.
    assert len(ids) == int((expected > 0).sum())
    kept = expected.nonzero()[:, 0]
    assert torch.equal(logits[0, ids].sort().values, logits[0, kept].sort().values)
    np.testing.assert_allclose(np.sort(probabilities), expected[kept].sort().values.numpy(), rtol=1e-6)


def test_the_first_of_equal_ids_are_kept_by_top_p(candidates):
    ids, _ = candidates(torch.zeros(1, 1000), SamplingParams(do_sample=True, top_p=0.25))
    assert ids.tolist() == list(range(250))


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 5}, {"top_p": 0.8}, {"typical_p": 0.8}, {"temperature": 0.5}], ids=str
)
def test_drawn_frequencies_are_the_probabilities(draw, options):
    count, vocab = 20_000, 50
    logits = random_logits(vocab, scale=1.5, seed=3)
    params = SamplingParams(do_sample=True, seed=11, **options)
    probabilities = warped(logits, params).numpy()
    many = logits.expand(count, vocab).contiguous()
    drawn = np.bincount(draw(many, many, [params] * count, np.arange(count)).ids, minlength=vocab)
    assert not drawn[probabilities == 0].any()
    possible = probabilities > 0
    error = np.abs(drawn - count * probabilities)[possible]
    # Five standard deviations of a binomial count.
    assert (error <= 5 * np.sqrt(count * probabilities * (1 - probabilities))[possible] + 1e-6).all()


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, float(np.float32(1e-40))])
def test_a_tiny_temperature_takes_the_most_probable_id(draw, temperature):
    logits = random_logits(4096, scale=1.0, rows=20)
    params = [SamplingParams(do_sample=True, temperature=temperature, seed=seed) for seed in range(20)]
    assert draw(logits, logits, params, np.arange(20)).ids.tolist() == logits.argmax(-1).tolist()


def test_without_sampling_the_first_most_probable_id_is_taken(draw):
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0]])
    assert draw(logits, logits, [SamplingParams()], np.array([5])).ids.tolist() == [1]


def test_logprobs_are_of_the_raw_distribution(draw):
    raw = random_logits(4096, scale=4.0, rows=9)
    processed = raw / 3
    result = draw(raw, processed, [SamplingParams(do_sample=i % 2 == 0, seed=i) for i in range(9)], np.arange(9))
    expected = raw.double().log_softmax(-1).gather(1, torch.from_numpy(result.ids)[:, None])[:, 0]
    np.testing.assert_allclose(result.logprobs, expected.numpy(), atol=1e-5, rtol=0)


def counted(log: list[int], num_prompt: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Occurrences in the log and in its generated part, [1, vocab] each."""
    counts = (torch.bincount(torch.tensor(ids, dtype=torch.int64), minlength=vocab) for ids in (log, log[num_prompt:]))
    whole, generated = (c.float()[None] for c in counts)
    return whole, generated


@pytest.mark.parametrize("penalty", [0.5, 1.1, 2.0])
def test_the_repetition_penalty_is_that_of_transformers(penalty):
    logits, log = random_logits(50, scale=2.0), [3, 3, 7, 49, 0, 7]
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([log]), logits.clone())
    processors.penalize(logits, *counted(log, 4, 50), torch.tensor([6.0]), [SamplingParams(repetition_penalty=penalty)])
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=0)


def test_frequency_and_presence_penalties_follow_their_formulas():
    logits, log = random_logits(50, scale=2.0), [3, 3, 7, 49, 0, 7]
    expected = logits[0].double().tolist()
    for token_id in set(log):
        expected[token_id] -= 0.75 * log.count(token_id) / len(log)
    for token_id in {0, 7}:
        expected[token_id] -= 0.5
    params = SamplingParams(frequency_penalty=0.75, presence_penalty=0.5)
    processors.penalize(logits, *counted(log, 4, 50), torch.tensor([6.0]), [params])
    np.testing.assert_allclose(logits[0].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_rows_with_other_penalties_do_not_mix():
    logits = random_logits(50, scale=2.0, rows=3)
    params = [
        SamplingParams(repetition_penalty=1.3),
        SamplingParams(frequency_penalty=-1.0),
        SamplingParams(repetition_penalty=0.9, frequency_penalty=0.5, presence_penalty=1.0),
    ]
    logs = [[1, 2, 2], [3, 3, 3, 4], [5, 6, 7, 7, 8]]
    alone = []
    for i in range(3):
        row = logits[i : i + 1].clone()
        processors.penalize(row, *counted(logs[i], 2, 50), torch.tensor([float(len(logs[i]))]), [params[i]])
        alone.append(row)
    whole, generated = (torch.cat(parts) for parts in zip(*(counted(log, 2, 50) for log in logs), strict=True))
    processors.penalize(logits, whole, generated, torch.tensor([3.0, 4.0, 5.0]), params)
    assert torch.equal(logits, torch.cat(alone))


def test_a_bias_is_added_and_repeated_ids_add_up():
    logits = torch.zeros(10)
    processors.bias(logits, ((3, 1.5), (4, -100.0), (3, 0.25)))
    assert logits.tolist() == [0, 0, 0, 1.75, -100, 0, 0, 0, 0, 0]


def test_a_constraint_leaves_the_allowed_ids_alone_and_no_other():
    logits = random_logits(70, scale=1.0, rows=2)
    constraint = Automaton('{"start": 0, "transitions": [[0, 4, 1], [0, 69, 1]], "final": []}', [2], 70)
    words = np.full((2, 3), -1, np.int32)
    constraint.fill(words[1])
    constrained = (logits + torch.from_numpy(biases(words, 70))).tolist()
    assert constrained[0] == logits[0].tolist()
    assert constrained[1] == [float(logits[1, i]) if i in (4, 69) else float("-inf") for i in range(70)]


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 50}, {"top_p": 0.9}, {"typical_p": 0.9}, {"temperature": 1e-3}], ids=str
)
def test_an_impossible_id_is_never_drawn(draw, options):
    raw = random_logits(4096, scale=1.0, rows=200)
    processed = torch.full_like(raw, float("-inf"))
    processed[:, [17, 400, 4095]] = raw[:, [17, 400, 4095]]
    params = [SamplingParams(do_sample=True, seed=seed, **options) for seed in range(200)]
    assert set(draw(raw, processed, params, np.arange(200)).ids.tolist()) <= {17, 400, 4095}


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True}, {"do_sample": True, "top_k": 5}, {"do_sample": True, "top_p": 0.7}], ids=str
)
@pytest.mark.parametrize("vocab", [50, 4096, 4099])
def test_rows_with_a_mask_draw_as_if_the_rest_were_impossible(draw, vocab, options):
    raw = random_logits(vocab, scale=2.0, rows=12, seed=vocab)
    masks = np.random.default_rng(vocab).random((3, vocab)) < 0.3
    octets = np.packbits(masks, axis=1, bitorder="little")
    words = np.zeros((3, -(-vocab // 32)), np.int32)
    words.view(np.uint8)[:, : octets.shape[1]] = octets
    of = np.array([0, -1, 1, 2, 2, -1, 0, 1, 1, 2, 0, -1])
    expected = raw.clone()
    for row, mask in enumerate(of):
        if mask >= 0:
            expected[row, torch.from_numpy(~masks[mask])] = float("-inf")
    params = [SamplingParams(seed=i, **options) for i in range(12)]
    found = draw(raw, raw, params, np.arange(12), Allowed(words, of))
    assert bits_of_all(found) == bits_of_all(draw(raw, expected, params, np.arange(12)))
    assert all(masks[mask, found.ids[row]] for row, mask in enumerate(of) if mask >= 0)
    nothing = Allowed(np.zeros_like(words), of)
    assert draw(raw, raw, params, np.arange(12), nothing).is_finite.tolist() == (of < 0).tolist()


def bits_of_all(result: Draw) -> list[tuple[int, bytes]]:
    return [bits(result, row) for row in range(len(result.ids))]


MANY = [
    SamplingParams(),
    SamplingParams(do_sample=True, seed=1),
    SamplingParams(do_sample=True, seed=2, temperature=0.6),
    SamplingParams(do_sample=True, seed=3, top_k=40),
    SamplingParams(do_sample=True, seed=4, top_p=0.9),
    SamplingParams(do_sample=True, seed=5, top_p=0.99999),
    SamplingParams(do_sample=True, seed=6, typical_p=0.8, temperature=1.3),
    SamplingParams(do_sample=True, seed=7, top_k=500, top_p=0.95, typical_p=0.9),
]


@pytest.fixture(params=[1, 2])
def num_threads(request) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def bits(result: Draw, row: int) -> tuple[int, bytes]:
    return int(result.ids[row]), result.logprobs[row].tobytes()


@pytest.mark.parametrize("vocab", [4096, 32000, 50257])
@pytest.mark.usefixtures("num_threads")
def test_a_row_is_bit_equal_alone_and_among_others(draw, vocab):
    raw = random_logits(vocab, scale=3.0, rows=40, seed=vocab)
    params = [MANY[i % len(MANY)] for i in range(40)]
    positions = np.arange(40) * 3
    alone = [bits(draw(raw[i : i + 1], raw[i : i + 1], params[i : i + 1], positions[i : i + 1]), 0) for i in range(40)]
    for count in (2, 3, 4, 5, 8, 16, 31, 32, 40):
        for first in (0, 40 - count):
            chosen = slice(first, first + count)
            together = draw(raw[chosen], raw[chosen], params[chosen], positions[chosen])
            assert [bits(together, i) for i in range(count)] == alone[chosen], (count, first)


@pytest.mark.parametrize("vocab", [4096, 50257])
def test_the_number_of_threads_changes_no_bit(draw, vocab):
    raw = random_logits(vocab, scale=3.0, rows=33, seed=vocab)
    params, results, before = [MANY[i % len(MANY)] for i in range(33)], [], torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(draw(raw, raw, params, np.arange(33)))
    torch.set_num_threads(before)
    assert [bits(results[0], i) for i in range(33)] == [bits(results[1], i) for i in range(33)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 77, 4095])
def test_a_row_that_is_not_finite_is_told_and_its_neighbours_are_as_ever(draw, bad, place):
    logits = random_logits(4096, scale=2.0, rows=9)
    params = [MANY[i % len(MANY)] for i in range(9)]
    before = draw(logits, logits, params, np.arange(9))
    broken = logits.clone()
    broken[[1, 4], place] = bad
    after = draw(broken, broken, params, np.arange(9))
    assert before.is_finite.all()
    assert after.is_finite.tolist() == [i not in (1, 4) for i in range(9)]
    assert [bits(after, i) for i in range(9) if i not in (1, 4)] == [
        bits(before, i) for i in range(9) if i not in (1, 4)
    ]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("params", MANY, ids=str)
def test_a_row_of_which_processors_leave_no_id_is_told_like_one_that_is_not_finite(draw, params, bad):
    raw = random_logits(4096, scale=2.0, rows=3)
    processed = raw.clone()
    processed[1] = bad
    assert draw(raw, processed, [params] * 3, np.arange(3)).is_finite.tolist() == [True, False, True]


def test_the_most_probable_ids_come_with_their_ties_in_order(draw):
    logits = torch.tensor([[0.0, 2.0, 1.0, 3.0, 1.0, 1.0, -4.0]])
    (ids, logprobs), *_ = draw(logits, logits, [SamplingParams(top_n=3)], np.array([1])).top
    assert ids == [3, 1, 2, 4, 5]
    np.testing.assert_allclose(logprobs, logits[0].double().log_softmax(-1)[ids].numpy(), atol=1e-6)


def test_more_most_probable_ids_than_there_are_is_all_of_them(draw):
    logits = random_logits(10, scale=1.0)
    (ids, _), *_ = draw(logits, logits, [SamplingParams(top_n=50)], np.array([1])).top
    assert ids == logits[0].argsort(descending=True).tolist()


def test_most_probable_ids_are_told_only_to_rows_that_ask(draw):
    logits = random_logits(10, scale=1.0, rows=2)
    assert [
        len(ids) for ids, _ in draw(logits, logits, [SamplingParams(), SamplingParams(top_n=2)], np.array([1, 1])).top
    ] == [0, 2]


def test_logits_of_another_kind_are_refused_with_their_shape(kernels):
    if kernels is None:
        pytest.skip("torch says so in its own words")
    requests = requests_of([SamplingParams()] * 2, np.zeros(2, np.int64))
    for logits in (torch.zeros(2, 9).bfloat16(), torch.zeros(3, 9), torch.zeros(2, 0), torch.zeros(18)):
        with pytest.raises(ValueError, match=r"expected float32 \[2, vocab\]"):
            kernels.draw_ids(logits, logits, requests, None, None)
    logits = torch.zeros(2, 40)
    for words, of in (((1, 1), [0, 0]), ((1, 2), [0]), ((1, 2), [0, 1])):
        with pytest.raises(ValueError, match=r"expected int32 \[n, 2\] and int64 \[2\] below n"):
            kernels.draw_ids(logits, logits, requests, Allowed(np.zeros(words, np.int32), np.array(of)), None)
    for place, words in ((2, 2), (-1, 2), (0, 1)):
        rows = np.array([(0, place, 0.0, 1, False, 0)], GUIDED_ROW)
        guided = GuidedRows(rows, [], 2, (0, 0, 0), np.zeros(words, np.int32))
        with pytest.raises(ValueError, match=r"rows \[.*\] of 2|expected int32 \[2\] for 40 ids"):
            kernels.draw_ids(logits, logits, requests, None, guided)
