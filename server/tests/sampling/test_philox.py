"""Random numbers from counters: published answers, uniformity, independence of what a draw is for."""

import numpy as np
import pytest
from text_generation_server.sampling.philox import Purpose, philox4x32, uniform

# Known-answer vectors of the Random123 library (kat_vectors, philox4x32, 10 rounds).
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> np.ndarray:
    return np.array([[int(word, 16) for word in text.split()]], np.uint32)


def numbers(*, seed=7, branch=0, positions=range(100), purpose=Purpose.SAMPLE) -> np.ndarray:
    count = len(positions)
    return uniform(np.full(count, seed, np.uint64), np.full(count, branch, np.uint32), np.array(positions), purpose)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_ten_rounds_give_the_published_answers(counter, key, answer):
    assert philox4x32(words(counter), words(key)).tolist() == words(answer).tolist()


def test_many_counters_at_once_equal_each_alone():
    counters = np.concatenate([words(counter) for counter, _, _ in KNOWN_ANSWERS])
    keys = np.concatenate([words(key) for _, key, _ in KNOWN_ANSWERS])
    assert philox4x32(counters, keys).tolist() == [words(answer)[0].tolist() for _, _, answer in KNOWN_ANSWERS]


def test_a_number_is_the_first_53_bits_of_its_counter_and_key():
    # 64 bits of the published answer, of which Python's exact integers keep 53.
    counter, key, answer = KNOWN_ANSWERS[0]
    first, second, *_ = words(answer)[0].tolist()
    assert numbers(seed=0, positions=[0])[0] == ((first << 32 | second) >> 11) / 2**53


def test_high_bits_of_seed_and_position_matter():
    draws = {
        float(numbers(seed=seed, positions=[at])[0]) for seed in (1, 1 + 2**32, 1 + 2**63) for at in (5, 5 + 2**32)
    }
    assert len(draws) == 6


@pytest.mark.parametrize("varied", ["seed", "branch", "position"])
def test_numbers_are_uniform_along_every_input(varied):
    count, bins = 100_000, 100
    ramp, zeros = np.arange(count), np.zeros(count, np.int64)
    seeds, branches, positions = (ramp if varied == name else zeros for name in ("seed", "branch", "position"))
    draws = uniform(seeds.astype(np.uint64), branches.astype(np.uint32), positions, Purpose.SAMPLE)
    observed, _ = np.histogram(draws, bins, (0, 1))
    statistic = ((observed - count / bins) ** 2 / (count / bins)).sum()
    # Chi-square with 99 degrees of freedom: the quantiles of 0.01 % and 99.99 %.
    assert 53 < statistic < 161
    # Neighbours do not predict each other: five standard deviations of the correlation of independent numbers.
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 5 / np.sqrt(count)
    assert draws.min() >= 0
    assert draws.max() < 1


@pytest.mark.parametrize("other", [{"seed": 8}, {"branch": 1}, {"positions": range(100, 200)}, {"purpose": 1}], ids=str)
def test_another_seed_branch_position_or_purpose_draws_other_numbers(other):
    assert not set(numbers()) & set(numbers(**other))


def test_the_same_inputs_draw_the_same_numbers_in_any_company():
    together = numbers(positions=range(40))
    assert together.tolist() == [numbers(positions=[at])[0] for at in range(40)]
