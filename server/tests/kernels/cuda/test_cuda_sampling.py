"""Helpers of sampling under emulation, against torch in float64."""

import pytest
import torch
from emulated import emulator, random
from text_generation_server.kernels.cuda.sampling import largest, row_statistics


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
