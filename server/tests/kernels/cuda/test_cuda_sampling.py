"""Sampling under emulation, against torch in float64 and against what processors draw."""

import numpy as np
import pytest
import torch
from emulated import emulator, random
from text_generation_server.kernels.cuda.sampling import draw, drawn_of, largest, row_statistics, words_of
from text_generation_server.kernels.interface import Drawn
from text_generation_server.sampling.params import SamplingParams
from text_generation_server.sampling.sampler import draw_ids, requests_of


@pytest.mark.parametrize("size", [1, 31, 1000, 5003])
def test_statistics_of_a_row_are_torchs(size: int, pytestconfig: pytest.Config) -> None:
    logits = (random(3, size) * 5).float()
    logits[1] = -3.0  # ties: the lowest id
    found = row_statistics(emulator(pytestconfig), logits)
    assert torch.equal(found.most, logits.amax(-1))
    assert torch.equal(found.least, logits.amin(-1))
    assert found.ids.tolist() == [int(logits[0].argmax()), 0, int(logits[2].argmax())]
    torch.testing.assert_close(found.normalizer.double(), logits.double().logsumexp(-1), rtol=1e-6, atol=1e-6)
    alone = row_statistics(emulator(pytestconfig, 1), logits[2:])
    assert torch.equal(alone.normalizer, found.normalizer[2:])


def test_a_number_that_is_none_is_told(pytestconfig: pytest.Config) -> None:
    logits = torch.zeros(3, 100)
    logits[0, 40], logits[1, 7], logits[2, 3] = torch.nan, torch.inf, -torch.inf
    found = row_statistics(emulator(pytestconfig), logits)
    assert found.most.isnan().tolist() == [True, False, False]
    assert found.most[1] == torch.inf
    assert found.least[2] == -torch.inf


@pytest.mark.parametrize(("size", "count"), [(10, 10), (2000, 1), (2000, 50), (4097, 128)])
def test_the_largest_values_are_those_of_a_sort(size: int, count: int, pytestconfig: pytest.Config) -> None:
    logits = (random(3, size) * 3).round(decimals=1).float()  # many ties
    logits[2, ::3] = -torch.inf
    found = largest(emulator(pytestconfig), logits, count, 512)
    for row, number, ids, values in zip(logits, found.found, found.ids, found.values, strict=True):
        least = row.sort(descending=True).values[count - 1]
        wanted = (row >= least).nonzero()[:, 0]
        assert number == len(wanted)
        kept = wanted[:512]
        assert torch.equal(ids[: len(kept)], kept)
        assert torch.equal(values[: len(kept)], row[kept])


def test_logits_that_do_not_fit_are_refused(pytestconfig: pytest.Config) -> None:
    with pytest.raises(ValueError, match="float16"):
        row_statistics(emulator(pytestconfig), torch.zeros(3, 3).half())
    with pytest.raises(ValueError, match="room for 4"):
        largest(emulator(pytestconfig), torch.zeros(3, 30), 5, 4)


def drawn(logits: torch.Tensor, params: list[SamplingParams], positions: list[int], config: pytest.Config) -> Drawn:
    requests = torch.from_numpy(words_of(requests_of(params, np.array(positions))))
    return drawn_of(draw(emulator(config, len(params) % 2), logits, requests).numpy())


HOW = [
    {},
    {"temperature": 0.7, "top_k": 50},
    {"temperature": 1.5, "top_p": 0.9},
    {"top_k": 20, "top_p": 0.5},
    {"top_k": 1},
    {"temperature": 1e-4},
    {"top_p": 1e-9},
    {"temperature": 3.0, "top_k": 5000, "top_p": 0.999},
]


@pytest.mark.parametrize("decimals", [None, 1])
def test_ids_are_those_that_float64_arithmetic_draws(decimals: int | None, pytestconfig: pytest.Config) -> None:
    logits = (random(2 * len(HOW) + 1, 1500) * 3).float()
    if decimals is not None:
        logits = logits.round(decimals=decimals)  # many ties, zeros of both signs
    params = [SamplingParams(do_sample=True, seed=seed, **how) for seed in (1, 2) for how in HOW] + [SamplingParams()]
    positions = list(range(7, 7 + len(params)))
    found = drawn(logits, params, positions, pytestconfig)
    numbers = np.array([request.number for request in requests_of(params, np.array(positions))])
    wanted = draw_ids(logits, logits, params, numbers, None, None)
    assert found.ids.tolist() == wanted.ids.tolist()
    assert found.is_finite.all()
    np.testing.assert_allclose(found.normalizers, logits.double().logsumexp(-1), rtol=1e-6)
    np.testing.assert_allclose(found.logprobs, wanted.logprobs, atol=1e-5)


def test_a_draw_does_not_depend_on_other_rows_or_on_the_order_of_threads(pytestconfig: pytest.Config) -> None:
    logits = (random(4, 1100) * 2).float()
    params = [SamplingParams(do_sample=True, seed=3, **how) for how in HOW[:4]]
    together = drawn(logits, params, [5, 6, 7, 8], pytestconfig)
    for i in range(4):
        alone = drawn(logits[i : i + 1], params[i : i + 1], [5 + i], pytestconfig)
        assert (alone.ids[0], alone.normalizers[0]) == (together.ids[i], together.normalizers[i])


def test_rows_that_are_not_finite_are_told_and_given_an_id_of_the_vocabulary(pytestconfig: pytest.Config) -> None:
    logits = torch.zeros(5, 100)
    logits[0, 40], logits[1, 7], logits[2, 3], logits[4] = torch.nan, torch.inf, -torch.inf, torch.nan
    params = [SamplingParams(do_sample=i % 2 == 0, seed=i, top_p=0.9) for i in range(5)]
    found = drawn(logits, params, [9] * 5, pytestconfig)
    assert found.is_finite.tolist() == [False, False, False, True, False]
    assert ((found.ids >= 0) & (found.ids < 100)).all()


def test_requests_that_do_not_fit_are_refused(pytestconfig: pytest.Config) -> None:
    with pytest.raises(ValueError, match=r"requests are torch.int64 \[2, 4\]; expected int64 \[3, 4\]"):
        draw(emulator(pytestconfig), torch.zeros(3, 10), torch.zeros(2, 4, dtype=torch.int64))
