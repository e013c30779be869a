"""Codes become the stored words that the formats describe: unpacked by arithmetic of the tests' own."""

import numpy as np
import pytest
import torch
from makers import awq_matrix, combine, gptq_matrix, pack, pack_gemm
from text_generation_server.quantization.awq import Awq
from text_generation_server.quantization.gptq import Gptq
from text_generation_server.quantization.packing import pack_gemm as packed_gemm
from text_generation_server.quantization.packing import pack_words
from text_generation_server.quantization.spec import Shape
from text_generation_server.quantize.layouts import awq_tensors, gptq_tensors
from text_generation_server.quantize.rounding import Codes


def random_codes(bits: int, shape: Shape, size: int, shuffled: bool = False) -> Codes:
    rng = np.random.default_rng(bits * 100 + size)
    groups = -(-shape.in_ // size)
    index = np.arange(shape.in_) // size
    return Codes(
        bits,
        torch.from_numpy(rng.integers(0, 2**bits, shape).astype(np.uint8)),
        torch.from_numpy(rng.uniform(0.001, 0.1, (shape.out, groups))).half(),
        torch.from_numpy(rng.integers(1, 2**bits, (shape.out, groups)).astype(np.uint8)),
        torch.from_numpy(rng.permutation(index) if shuffled else index),
    )


def expected(codes: Codes) -> np.ndarray:
    return combine(
        codes.codes.numpy().astype(np.int64), codes.zeros.numpy().astype(np.int64), codes.scales, codes.group_of.numpy()
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("num", [32, 96, 100, 37])
def test_words_hold_their_values_low_bits_first(bits: int, num: int) -> None:
    if bits == 3 and num % 32:
        num = 64
    values = np.random.default_rng(num).integers(0, 2**bits, (5, num))
    found = pack_words(torch.from_numpy(values.astype(np.uint8)), bits)
    assert torch.equal(found, pack(values, bits, 1))


def test_gemm_words_hold_their_values_in_autoawq_s_order() -> None:
    values = np.random.default_rng(0).integers(0, 16, (7, 48))
    assert torch.equal(packed_gemm(torch.from_numpy(values.astype(np.uint8))), pack_gemm(values))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("size", "shuffled"), [(32, False), (32, True), (128, False), (256, False)])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_a_gptq_layer_is_stored_as_its_format_says(
    bits: int, size: int, shuffled: bool, checkpoint_format: str
) -> None:
    shape = Shape(64, 256)
    codes = random_codes(bits, shape, size, shuffled)
    format_ = Gptq(bits, size, sym=False, desc_act=shuffled, checkpoint_format=checkpoint_format)
    matrix = gptq_matrix(format_, gptq_tensors(codes, checkpoint_format), shape)
    np.testing.assert_array_equal(matrix, expected(codes))
    np.testing.assert_array_equal(codes.dequantize().double().numpy(), expected(codes))


@pytest.mark.parametrize("size", [16, 64, 256])
def test_an_awq_layer_is_stored_as_its_format_says(size: int) -> None:
    shape = Shape(48, 256)
    codes = random_codes(4, shape, size)
    np.testing.assert_array_equal(awq_matrix(Awq(4, size, True), awq_tensors(codes), shape), expected(codes))
