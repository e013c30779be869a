"""GPTQ: every bit width, group, order and cut equals dequantizing in float64 and multiplying."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from makers import (
    FULL,
    Layer,
    check_cuts,
    error,
    gptq,
    gptq_matrix,
    matrix_of,
    number_of_groups,
    pack,
    random_zeros,
    read,
    share,
    unpack,
)
from text_generation_server.checkpoint.index import read_index
from text_generation_server.checkpoint.tensors import Checkpoint
from text_generation_server.errors import CheckpointError
from text_generation_server.kernels.cpu.kernels import CpuKernels
from text_generation_server.kernels.reference.kernels import ReferenceKernels
from text_generation_server.kernels.weights import QuantizedWeight
from text_generation_server.quantization.format import Piece
from text_generation_server.quantization.gptq import Gptq
from text_generation_server.quantization.spec import Shape, whole

MODEL = Path(__file__).parents[3] / "models" / "docs-llama-7m-gptq-4bit-g128"
ORDERS = ("absent", "in order", "act-order", "arbitrary")
# The last group of every size but 32 is shorter.
IN, OUT = 2080, 64
WHOLE = Shape(OUT, IN)
MATRIX = list(itertools.product((2, 3, 4, 8), (-1, 16, 32, 64, 128, 1024), (True, False), ORDERS, ("gptq", "gptq_v2")))


def layer(bits: int, group: int, sym: bool, order: str, version: str, shape: Shape = WHOLE, seed: int = 0) -> Layer:
    # The content decides, not desc_act.
    format_ = Gptq(bits, group, sym, desc_act=order == "act-order", checkpoint_format=version)
    return gptq(np.random.default_rng(seed), shape, format_, order)


@pytest.mark.parametrize(("bits", "group", "sym", "order", "version"), MATRIX if FULL else MATRIX[::13])
def test_ranks_multiply_with_their_part_of_the_dequantized_weight(
    bits: int, group: int, sym: bool, order: str, version: str
) -> None:
    q, k = (layer(bits, group, sym, order, version, seed=seed) for seed in (1, 2))
    if "g_idx" in q.tensors:
        k = replace(k, tensors=k.tensors | {"g_idx": q.tensors["g_idx"]})
        k.weight = gptq_matrix(k.format, k.tensors, k.shape)
    check_cuts({"q": q, "k": k}, ReferenceKernels(), (1, 2, 3, 4), merged=1)


@pytest.mark.parametrize(("bits", "group", "sym", "order"), [
    (4, 128, True, "in order"), (4, 32, False, "act-order"), (3, 128, False, "in order"), (8, -1, True, "absent"),
    (2, 64, False, "arbitrary"), (4, 1024, True, "act-order"),
])  # fmt: skip
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_the_processors_products_are_near_the_float64_product(
    kernels: CpuKernels, bits: int, group: int, sym: bool, order: str, dtype: torch.dtype, most: float
) -> None:
    whole = layer(bits, group, sym, order, "gptq")
    for size in (1, 2):
        columns = share(IN, 0, size)
        weights = read({"o": whole}, [range(OUT)], columns)
        assert error(weights, whole.weight[:, columns.start : columns.stop], kernels, dtype) < most


def test_layers_of_different_orders_do_not_become_one_matrix() -> None:
    q, k = (layer(4, 32, True, "act-order", "gptq", seed=seed) for seed in (1, 2))
    check_cuts({"q": q, "k": k}, ReferenceKernels(), (1, 2), merged=2)


def test_layers_of_different_bits_do_not_become_one_matrix() -> None:
    layers = {name: layer(bits, 32, True, "in order", "gptq") for name, bits in (("q", 2), ("k", 3), ("v", 8))}
    check_cuts(layers, ReferenceKernels(), (1, 2), merged=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_keep_their_dtype(dtype: torch.dtype) -> None:
    whole = gptq(np.random.default_rng(0), Shape(32, 64), Gptq(4, 16, False, False), dtype=dtype)
    (weight,) = read({"o": whole}, [range(32)])
    assert isinstance(weight, QuantizedWeight) and weight.scales.dtype == dtype
    np.testing.assert_allclose(matrix_of([weight]), whole.weight, rtol=1e-6)


def test_three_bits_lie_in_three_words_as_the_quantizers_write_them() -> None:
    """Ten codes and two bits; a bit, ten codes and a bit; two bits and ten codes."""
    codes = np.random.default_rng(0).integers(0, 8, 32)
    words = [0, 0, 0]
    for i in range(10):
        words[0] |= int(codes[i]) << 3 * i
        words[1] |= int(codes[11 + i]) << (3 * i + 1)
        words[2] |= int(codes[22 + i]) << (3 * i + 2)
    words[0] |= (int(codes[10]) & 3) << 30
    words[1] |= int(codes[10]) >> 2 | (int(codes[21]) & 1) << 31
    words[2] |= int(codes[21]) >> 1
    expected = np.array(words, np.uint32).view(np.int32)
    np.testing.assert_array_equal(pack(codes[:, None], 3, 0)[:, 0].numpy(), expected)
    np.testing.assert_array_equal(unpack(torch.from_numpy(expected), 3, 0, 32), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_stored_zero_point_of_all_ones_is_zero(bits: int) -> None:
    whole = layer(bits, 32, False, "in order", "gptq", Shape(64, 64))
    whole.tensors["qzeros"].fill_(-1)
    (weight,) = read({"o": whole}, [range(64)])
    assert isinstance(weight, QuantizedWeight) and weight.zeros is not None and not weight.zeros.any()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("size", [1, 3])
def test_what_gptqmodel_borrowed_across_zero_points_is_given_back(bits: int, size: int) -> None:
    """GPTQModel subtracts one constant from every word: a zero point of 0 takes one from its neighbour."""
    format_ = Gptq(bits, 32, False, False, zeros_borrow=True)
    whole = gptq(np.random.default_rng(0), Shape(96, 128), format_)
    masked = gptq_matrix(replace(format_, zeros_borrow=False), whole.tensors, whole.shape)
    assert not np.array_equal(masked, whole.weight), "some zero point must have borrowed"
    check_cuts({"q": whole}, ReferenceKernels(), (size,))


def test_three_bits_never_borrowed() -> None:
    whole = layer(3, 32, False, "in order", "gptq", Shape(64, 64))
    whole.format = Gptq(3, 32, False, False, zeros_borrow=True)
    np.testing.assert_allclose(matrix_of(read({"o": whole}, [range(64)])), whole.weight, rtol=1e-6)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("written", "said", "found"), [("gptq_v2", "gptq", 9), ("gptq", "gptq_v2", 7)])
def test_a_checkpoint_format_that_symmetric_zero_points_contradict_is_refused(
    written: str, said: str, found: int, sym: bool
) -> None:
    """Whether or not the configuration says that they are symmetric."""
    whole = layer(4, 32, True, "in order", written, Shape(64, 64))
    whole.format = Gptq(4, 32, sym, False, said)
    with pytest.raises(
        CheckpointError, match=rf"tensor layer\.o\.qzeros.* is {found} .*expected 8.* must be {written}"
    ):
        read({"o": whole}, [range(64)])


def test_asymmetric_content_that_calls_itself_symmetric_is_served_as_it_is() -> None:
    whole = layer(4, 32, False, "in order", "gptq", Shape(64, 64))
    whole.format = Gptq(4, 32, True, False)
    np.testing.assert_allclose(matrix_of(read({"o": whole}, [range(64)])), whole.weight, rtol=1e-6)


@pytest.mark.parametrize(("value", "message"), [
    (-1, r"tensor layer\.o\.g_idx puts a feature into group -1; expected groups from 0 to 1"),
    (2, r"tensor layer\.o\.g_idx puts a feature into group 2; expected groups from 0 to 1"),
])  # fmt: skip
def test_a_group_that_does_not_exist_is_refused(value: int, message: str) -> None:
    whole = layer(4, 32, True, "act-order", "gptq", Shape(64, 64))
    whole.tensors["g_idx"][5] = value
    with pytest.raises(CheckpointError, match=message):
        read({"o": whole}, [range(64)])


def test_an_index_of_zeros_that_readers_understand_differently_is_refused() -> None:
    whole = layer(4, 32, True, "in order", "gptq", Shape(64, 64))
    whole.tensors["g_idx"].zero_()
    with pytest.raises(CheckpointError, match=r"g_idx puts every feature into group 0, but there are 2 groups"):
        read({"o": whole}, [range(64)])
    # A cut may lie in group 0.
    assert read({"o": whole}, [range(64)], range(32))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_scales_that_are_not_finite_are_refused(value: float) -> None:
    whole = layer(4, 32, True, "in order", "gptq", Shape(64, 64))
    whole.tensors["scales"][1, 3] = value
    with pytest.raises(CheckpointError, match=rf"tensor layer\.o\.scales holds {value}; expected finite scales"):
        read({"o": whole}, [range(64)])


@pytest.mark.parametrize(("format_", "shape", "message"), [
    (Gptq(3, 32, True, False), Shape(64, 40), "3 bits packs 32 features .* found a linear of 40 to 64"),
    (Gptq(3, 32, True, False), Shape(40, 64), "3 bits packs 32 features .* found a linear of 64 to 40"),
    (Gptq(5, 32, True, False), Shape(64, 64), "5 bits is not served"),
    (Gptq(4, 0, True, False), Shape(64, 64), "groups of 0; expected -1 or"),
    (Gptq(4, 32, True, False, "marlin"), Shape(64, 64), "checkpoint_format is marlin; expected gptq or gptq_v2"),
])  # fmt: skip
def test_what_no_quantizer_writes_is_refused_before_anything_is_read(format_: Gptq, shape: Shape, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        format_.specs(shape)


def test_the_index_may_be_missing_only_without_act_order() -> None:
    optional = {desc_act: Gptq(4, 32, True, desc_act).specs(Shape(64, 64))[-1].optional for desc_act in (True, False)}
    assert optional == {True: False, False: True}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [-1, 16, 32, 128])
@pytest.mark.parametrize("order", ["in order", "act-order"])
def test_the_memory_is_told_before_loading(bits: int, group: int, order: str) -> None:
    whole = layer(bits, group, False, order, "gptq", Shape(64, 512))
    (weight,) = read({"o": whole}, [range(64)])
    assert isinstance(weight, QuantizedWeight)
    # With act-order an index of groups is counted that only a cut needs.
    extra = 8 * 512 + (8 * 512 if group == -1 else 0) if order == "act-order" else 0
    assert weight.num_bytes + extra == whole.format.held_bytes(whole.shape, 2)


def test_every_layer_of_the_shipped_model_is_what_its_codes_say() -> None:
    checkpoint = Checkpoint(read_index(MODEL))
    format_ = Gptq(4, 128, True, False)
    names = sorted({name.rsplit(".", 1)[0] for name in read_index(MODEL) if name.endswith(".qweight")})
    assert len(names) == 6 * 7
    for name in names:
        keys = ("qweight", "qzeros", "scales", "g_idx")
        tensors = {key: checkpoint[f"{name}.{key}"].read() for key in keys}
        shape = Shape(tensors["scales"].shape[1], len(tensors["g_idx"]))
        whole = Layer(shape, format_, tensors, gptq_matrix(format_, tensors, shape))
        np.testing.assert_allclose(matrix_of(read({"o": whole}, [range(shape.out)])), whole.weight, rtol=1e-6)
    checkpoint.close()


def test_the_makers_of_these_tests_agree_with_themselves() -> None:
    for bits, version in itertools.product((2, 3, 4, 8), ("gptq", "gptq_v2")):
        whole = layer(bits, 32, False, "act-order", version, Shape(64, 96))
        np.testing.assert_array_equal(gptq_matrix(whole.format, whole.tensors, whole.shape), whole.weight)
    assert number_of_groups(100, 32) == 4
    assert set(random_zeros(np.random.default_rng(0), (9, 9), 4, True).flat) == {8}


def test_groups_that_do_not_divide_need_an_index() -> None:
    gptq = Gptq(4, 33, sym=True, desc_act=False)
    shape = Shape(64, 128)
    pieces = {
        "qweight": Piece(torch.zeros(16, 64, dtype=torch.int32), (0, 0), "a: tensor l.qweight"),
        "qzeros": Piece(torch.full((4, 8), 0x77777777, dtype=torch.int32), (0, 0), "a: tensor l.qzeros"),
        "scales": Piece(torch.ones(4, 64), (0, 0), "a: tensor l.scales"),
    }
    with pytest.raises(CheckpointError, match="groups of 33 do not divide 128 features, and there is no g_idx"):
        gptq.decode(pieces, whole(shape))
