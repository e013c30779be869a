"""Nothing that happened to a quantized layer's files is served silently wrong."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from corruption import Case, Verdict, mutations, outcome
from makers import FULL, Matrix, awq, awq_matrix, gptq, gptq_matrix, pack_quantized, pack_quantized_matrix
from text_generation_server.quantization.awq import Awq
from text_generation_server.quantization.format import WeightFormat
from text_generation_server.quantization.gptq import Gptq
from text_generation_server.quantization.pack_quantized import PackQuantized
from text_generation_server.quantization.spec import Shape
from torch import Tensor

SHAPE = Shape(32, 96)


def of_gptq(
    bits: int, group: int, sym: bool, order: str, version: str = "gptq", relatives: tuple[Case, ...] = ()
) -> Case:
    format_ = Gptq(bits, group, sym, order == "act-order", version)
    return Case(format_, SHAPE, lambda rng: gptq(rng, SHAPE, format_, order).tensors, gptq_matrix, relatives)


def of_awq(version: str, group: int, zero_point: bool, relatives: tuple[Case, ...] = ()) -> Case:
    format_ = Awq(4, group, zero_point, version)
    return Case(format_, SHAPE, lambda rng: awq(rng, SHAPE, format_).tensors, awq_matrix, relatives)


def of_packed(bits: int, group: int, symmetric: bool, index: str, relatives: tuple[Case, ...] = ()) -> Case:
    format_ = PackQuantized(bits, group, symmetric)
    return Case(
        format_, SHAPE, lambda rng: pack_quantized(rng, SHAPE, format_, index).tensors, pack_quantized_matrix, relatives
    )


GPTQ_RELATIVES = (
    of_gptq(4, 32, True, "in order", "gptq_v2"),
    of_gptq(4, 32, False, "act-order"),
    of_gptq(4, 48, True, "in order"),
    of_gptq(4, 40, True, "in order"),
    of_gptq(4, -1, True, "absent"),
    of_gptq(2, 32, True, "in order"),
    of_gptq(3, 32, True, "act-order"),
    of_gptq(8, 32, False, "in order"),
)
AWQ_RELATIVES = (
    of_awq("gemm", 32, True), of_awq("gemm", 32, False), of_awq("gemm", -1, True), of_awq("gemm", 48, True),
    of_awq("gemv", 16, True), of_awq("gemv", 32, False), of_awq("gemv", -1, True),
)  # fmt: skip
PACKED_RELATIVES = (
    of_packed(4, 32, False, "absent"), of_packed(4, 32, True, "act-order"), of_packed(4, -1, True, "absent"),
    of_packed(8, 32, True, "absent"), of_packed(4, 48, True, "absent"), of_packed(3, 32, True, "absent"),
)  # fmt: skip
CASES = [
    of_gptq(4, 32, True, "in order", relatives=GPTQ_RELATIVES),
    of_gptq(4, 32, False, "act-order", "gptq_v2", GPTQ_RELATIVES),
    of_gptq(3, 32, False, "absent", relatives=GPTQ_RELATIVES),
    of_awq("gemm", 32, True, AWQ_RELATIVES),
    of_awq("gemv", 32, True, AWQ_RELATIVES),
    of_packed(4, 32, True, "absent", PACKED_RELATIVES),
    of_packed(8, 32, False, "act-order", PACKED_RELATIVES),
]


@pytest.mark.parametrize("case", CASES if FULL else CASES[:5] + CASES[6:], ids=str)
def test_every_mutation_is_refused_by_name_or_served_right(case: Case, tmp_path: Path) -> None:
    verdict = Verdict()
    verdict.judge(case, 4, tmp_path)
    counts = verdict.counts
    assert not verdict.failures, "\n".join(verdict.failures)
    assert sum(counts.values()) >= 300 and min(counts.values()) >= 50, counts


def test_what_nothing_happened_to_is_served(tmp_path: Path) -> None:
    for case in CASES:
        assert outcome(next(mutations(case, np.random.default_rng(4))), case, tmp_path) == "served"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_layer_that_is_served_wrong_would_be_noticed(case: Case, tmp_path: Path) -> None:
    def off_by_one_value(format_: WeightFormat, tensors: Mapping[str, Tensor], shape: Shape) -> Matrix:
        matrix = case.reference(format_, tensors, shape)
        matrix[-1, -1] *= 1.001
        return matrix

    wrong = replace(case, reference=off_by_one_value)
    mutation = next(mutations(wrong, np.random.default_rng(4)))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        outcome(mutation, wrong, tmp_path)
