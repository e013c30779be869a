"""AWQ: both layouts, every group and cut equal dequantizing in float64 and multiplying."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from makers import FULL, Layer, awq, awq_matrix, check_cuts, error, gemv_width, matrix_of, read, share
from text_generation_server.checkpoint.index import read_index
from text_generation_server.checkpoint.tensors import Checkpoint
from text_generation_server.errors import CheckpointError
from text_generation_server.kernels.cpu.kernels import CpuKernels
from text_generation_server.kernels.reference.kernels import ReferenceKernels
from text_generation_server.kernels.weights import QuantizedWeight
from text_generation_server.quantization.awq import Awq
from text_generation_server.quantization.spec import Shape

MODEL = Path(__file__).parents[3] / "models" / "docs-llama-7m-awq-4bit-g128"
MATRIX = list(itertools.product(("gemm", "gemv"), (-1, 16, 32, 64, 128, 1024), (True, False)))


def layer(version: str, group: int, zero_point: bool, shape: Shape | None = None, seed: int = 0) -> Layer:
    shape = shape or Shape(56, 2048)
    return awq(np.random.default_rng(seed), shape, Awq(4, group, zero_point, version))


@pytest.mark.parametrize(("version", "group", "zero_point"), MATRIX if FULL else MATRIX[::2] + MATRIX[1::5])
def test_ranks_multiply_with_their_part_of_the_dequantized_weight(version: str, group: int, zero_point: bool) -> None:
    q, k = (layer(version, group, zero_point, seed=seed) for seed in (1, 2))
    check_cuts({"q": q, "k": k}, ReferenceKernels(), (1, 2, 3, 4), merged=1)


@pytest.mark.parametrize(("version", "group", "zero_point"), [("gemm", 128, True), ("gemv", 32, True)])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_the_processors_products_are_near_the_float64_product(
    kernels: CpuKernels, version: str, group: int, zero_point: bool, dtype: torch.dtype, most: float
) -> None:
    whole = layer(version, group, zero_point)
    for size in (1, 2):
        columns = share(whole.shape.in_, 1 % size, size)
        weights = read({"o": whole}, [range(whole.shape.out)], columns)
        assert error(weights, whole.weight[:, columns.start : columns.stop], kernels, dtype) < most


@pytest.mark.parametrize("version", ["gemm", "gemv"])
def test_zero_points_that_a_symmetric_checkpoint_leaves_out_are_8(version: str) -> None:
    whole = layer(version, 32, False, Shape(16, 128))
    assert [spec.optional for spec in whole.format.specs(whole.shape)] == [False, True, False]
    del whole.tensors["qzeros"]
    check_cuts({"q": whole}, ReferenceKernels(), (1, 3))


@pytest.mark.parametrize("version", ["gemm", "gemv"])
def test_zero_points_that_a_symmetric_checkpoint_has_count(version: str) -> None:
    whole = layer(version, 32, True, Shape(16, 128))
    whole.format = Awq(4, 32, False, version)
    check_cuts({"q": whole}, ReferenceKernels(), (1, 3))


@pytest.mark.parametrize(("group", "in_", "words"), [
    (128, 4096, 4), (128, 1152, 2), (64, 4096, 8), (64, 576, 2), (32, 2048, 8), (32, 64, 4), (16, 64, 8),
    (-1, 256, 1), (-1, 64, 2),
])  # fmt: skip
def test_gemv_rows_are_filled_up_as_the_quantizers_fill_them(group: int, in_: int, words: int) -> None:
    specs = {spec.suffix: spec.shape(Shape(8, in_)) for spec in Awq(4, group, True, "gemv").specs(Shape(8, in_))}
    assert specs == {"qweight": (8, in_ // 8), "qzeros": (8, words), "scales": (8, 8 * words)}
    assert gemv_width(in_, group if group > 0 else in_) == words


@pytest.mark.parametrize(("said", "found"), [(64, 4), (256, 4)])
def test_a_group_size_that_only_the_filling_of_gemv_contradicts_is_refused(said: int, found: int) -> None:
    """Both have two words of zero points in a row of 512, as groups of 128 have with another rounding."""
    whole = layer("gemv", 128, True, Shape(16, 512))
    whole.format = Awq(4, said, True, "gemv")
    for key, width in (("qzeros", 2), ("scales", 16)):
        if said == 64:
            whole.tensors[key] = torch.nn.functional.pad(whole.tensors[key], (0, width - whole.tensors[key].shape[1]))
    with pytest.raises(CheckpointError, match=rf"tensor layer\.o\.scales has {found} groups .* expected {512 // said}"):
        read({"o": whole}, [range(16)])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("version", ["gemm", "gemv"])
def test_scales_that_are_not_finite_are_refused(value: float, version: str) -> None:
    whole = layer(version, 32, True, Shape(16, 128))
    whole.tensors["scales"][3, 3] = value
    with pytest.raises(CheckpointError, match=rf"tensor layer\.o\.scales holds {value}; expected finite scales"):
        read({"o": whole}, [range(16)])


@pytest.mark.parametrize(("format_", "shape", "message"), [
    (Awq(4, 128, True), Shape(64, 192), "whole groups only; found a linear of 192 to 64"),
    (Awq(4, 32, True), Shape(60, 64), "packs 8 features into a word.* found a linear of 64 to 60"),
    (Awq(4, -1, True, "gemv"), Shape(64, 60), "packs 8 features into a word.* found a linear of 60 to 64"),
    (Awq(4, 48, True, "gemv"), Shape(64, 96), "groups of 48; expected 128 or more, or one of 16, 32, 64"),
    (Awq(3, 32, True), Shape(64, 64), "3 bits is not served; expected 4"),
    (Awq(4, 0, True), Shape(64, 64), "groups of 0; expected -1 or"),
    (Awq(4, 32, True, "gemv_fast"), Shape(64, 64), "layout gemv_fast is not served; expected gemm or gemv"),
])  # fmt: skip
def test_what_no_quantizer_writes_is_refused_before_anything_is_read(format_: Awq, shape: Shape, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        format_.specs(shape)


@pytest.mark.parametrize("version", ["gemm", "gemv"])
@pytest.mark.parametrize("group", [-1, 16, 128])
def test_the_memory_is_told_before_loading(version: str, group: int) -> None:
    whole = layer(version, group, True, Shape(64, 512))
    (weight,) = read({"o": whole}, [range(64)])
    assert isinstance(weight, QuantizedWeight)
    assert weight.num_bytes == whole.format.held_bytes(whole.shape, 2)


def test_every_layer_of_the_shipped_model_is_what_its_codes_say() -> None:
    checkpoint = Checkpoint(read_index(MODEL))
    format_ = Awq(4, 128, True)
    names = sorted({name.rsplit(".", 1)[0] for name in read_index(MODEL) if name.endswith(".qweight")})
    assert len(names) == 6 * 7
    for name in names:
        tensors = {key: checkpoint[f"{name}.{key}"].read() for key in ("qweight", "qzeros", "scales")}
        shape = Shape(tensors["scales"].shape[1], len(tensors["qweight"]))
        whole = Layer(shape, format_, tensors, awq_matrix(format_, tensors, shape))
        np.testing.assert_allclose(matrix_of(read({"o": whole}, [range(shape.out)])), whole.weight, rtol=1e-6)
    checkpoint.close()


def test_the_makers_of_these_tests_agree_with_themselves() -> None:
    for version, zero_point in itertools.product(("gemm", "gemv"), (True, False)):
        whole = layer(version, 32, zero_point, Shape(24, 96))
        np.testing.assert_array_equal(awq_matrix(whole.format, whole.tensors, whole.shape), whole.weight)
