"""compressed-tensors: what its own library packs is read, cut and multiplied as it unpacks it itself."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from makers import (
    FULL,
    Layer,
    check_cuts,
    error,
    matrix_of,
    pack_quantized,
    pack_quantized_matrix,
    random_index,
    random_scales,
    read,
    share,
)
from text_generation_server.checkpoint.index import read_index
from text_generation_server.checkpoint.tensors import Checkpoint
from text_generation_server.errors import CheckpointError
from text_generation_server.kernels.cpu.kernels import CpuKernels
from text_generation_server.kernels.reference.kernels import ReferenceKernels
from text_generation_server.kernels.weights import QuantizedWeight
from text_generation_server.quantization.pack_quantized import PackQuantized
from text_generation_server.quantization.spec import Shape

MODEL = Path(__file__).parents[3] / "models" / "docs-llama-7m-w4a16-compressed-tensors"
INDEXES = ("absent", "act-order", "arbitrary")
MATRIX = list(itertools.product((2, 3, 4, 8), (-1, 32, 128, 1024), (True, False), INDEXES))


def scheme(format_: PackQuantized) -> QuantizationScheme:
    grouped = {"strategy": "channel"} if format_.group_size == -1 else {"group_size": format_.group_size}
    weights = QuantizationArgs(num_bits=format_.bits, symmetric=format_.symmetric, **grouped)
    return QuantizationScheme(targets=["Linear"], weights=weights)


def library_layer(format_: PackQuantized, shape: Shape, seed: int = 0) -> Layer:
    """Packed by the library, and unpacked by it in float32."""
    rng = np.random.default_rng(seed)
    groups = 1 if format_.group_size == -1 else shape.in_ // format_.group_size
    state = {
        "weight": torch.from_numpy(rng.standard_normal(shape)).float() * 0.1,
        "weight_scale": random_scales(rng, (shape.out, groups), torch.float32).abs(),
    }
    if not format_.symmetric:
        half = 2 ** (format_.bits - 1)
        state["weight_zero_point"] = torch.from_numpy(rng.integers(-half, half, (shape.out, groups))).to(torch.int8)
    tensors = PackedQuantizationCompressor.compress(state, scheme(format_))
    weight = PackedQuantizationCompressor.decompress(tensors, scheme(format_))["weight"]
    return Layer(shape, format_, {k: v for k, v in tensors.items() if v is not None}, weight.double().numpy())


@pytest.mark.parametrize(("bits", "group", "symmetric", "index"), MATRIX if FULL else MATRIX[::5])
def test_ranks_multiply_with_their_part_of_the_weight(bits: int, group: int, symmetric: bool, index: str) -> None:
    q, k = (library_layer(PackQuantized(bits, group, symmetric), Shape(64, 2048), seed) for seed in (1, 2))
    if index != "absent":
        # The library no longer reads weight_g_idx, which its older files have.
        g_idx = random_index(np.random.default_rng(0), 2048, group, index)
        for layer in (q, k):
            layer.tensors["weight_g_idx"] = torch.from_numpy(g_idx).int()
            layer.weight = pack_quantized_matrix(layer.format, layer.tensors, layer.shape)
    check_cuts({"q": q, "k": k}, ReferenceKernels(), (1, 2, 3, 4), merged=1)


@pytest.mark.parametrize("format_", [PackQuantized(4, 128, True), PackQuantized(8, -1, False)])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_the_processors_products_are_near_the_float64_product(
    kernels: CpuKernels, format_: PackQuantized, dtype: torch.dtype, most: float
) -> None:
    whole = library_layer(format_, Shape(64, 2048))
    for size in (1, 2):
        columns = share(2048, 0, size)
        weights = read({"o": whole}, [range(64)], columns)
        assert error(weights, whole.weight[:, columns.start : columns.stop], kernels, dtype) < most


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_that_do_not_fill_a_word_are_read_as_the_library_packs_them(bits: int) -> None:
    for symmetric in (True, False):
        check_cuts({"q": library_layer(PackQuantized(bits, -1, symmetric), Shape(19, 37))}, ReferenceKernels(), (1, 3))


def test_every_layer_of_the_shipped_model_is_what_the_library_makes_of_it() -> None:
    checkpoint = Checkpoint(read_index(MODEL))
    format_ = PackQuantized(4, 128, True)
    names = sorted({name.rsplit(".", 1)[0] for name in read_index(MODEL) if name.endswith(".weight_packed")})
    assert len(names) == 6 * 7
    for name in names:
        keys = ("weight_packed", "weight_scale", "weight_shape")
        tensors = {key: checkpoint[f"{name}.{key}"].read() for key in keys}
        shape = Shape(*tensors["weight_shape"].tolist())
        state = tensors | {"weight_scale": tensors["weight_scale"].float()}
        weight = PackedQuantizationCompressor.decompress(state, scheme(format_))["weight"]
        whole = Layer(shape, format_, tensors, weight.double().numpy())
        np.testing.assert_allclose(matrix_of(read({"o": whole}, [range(shape.out)])), whole.weight, rtol=1e-6)
    checkpoint.close()


def test_a_shape_that_contradicts_the_configuration_is_refused() -> None:
    whole = library_layer(PackQuantized(4, 32, True), Shape(16, 64))
    whole.tensors["weight_shape"] = torch.tensor([64, 16])
    with pytest.raises(CheckpointError, match=r"tensor layer\.o\.weight_shape is \[64, 16\]; expected \[16, 64\]"):
        read({"o": whole}, [range(16)])


@pytest.mark.parametrize(("value", "reordered"), [(-1, True), (2, False)])
def test_a_group_that_does_not_exist_is_refused(value: int, reordered: bool) -> None:
    whole = library_layer(PackQuantized(4, 32, True), Shape(16, 64))
    whole.format = PackQuantized(4, 32, True, reordered)
    whole.tensors["weight_g_idx"] = torch.full((64,), value)
    with pytest.raises(CheckpointError, match=rf"weight_g_idx puts a feature into group {value}; expected .* 0 to 1"):
        read({"o": whole}, [range(16)])


def test_scales_that_are_not_finite_are_refused() -> None:
    whole = library_layer(PackQuantized(4, 32, True), Shape(16, 64))
    whole.tensors["weight_scale"][3, 1] = float("inf")
    with pytest.raises(CheckpointError, match=r"tensor layer\.o\.weight_scale holds inf; expected finite scales"):
        read({"o": whole}, [range(16)])


@pytest.mark.parametrize(("format_", "shape", "message"), [
    (PackQuantized(4, 128, True), Shape(64, 192), "whole groups only; found a linear of 192 to 64"),
    (PackQuantized(3, -1, True), Shape(64, 40), "multiples of 32 features, found a linear of 40 to 64"),
    (PackQuantized(3, -1, False), Shape(40, 64), "multiples of 32 features, found a linear of 64 to 40"),
    (PackQuantized(5, 32, True), Shape(64, 64), "5 bits is not served"),
    (PackQuantized(4, 0, True), Shape(64, 64), "groups of 0; expected -1 or"),
])  # fmt: skip
def test_what_the_library_does_not_write_or_no_product_takes_is_refused_before_anything_is_read(
    format_: PackQuantized, shape: Shape, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        format_.specs(shape)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_memory_is_told_before_loading(bits: int, symmetric: bool) -> None:
    whole = pack_quantized(np.random.default_rng(0), Shape(64, 512), PackQuantized(bits, 128, symmetric))
    (weight,) = read({"o": whole}, [range(64)])
    assert isinstance(weight, QuantizedWeight)
    assert weight.num_bytes == whole.format.held_bytes(whole.shape, 2)


def test_the_makers_of_these_tests_agree_with_the_library() -> None:
    for bits, symmetric in itertools.product((2, 3, 4, 8), (True, False)):
        whole = library_layer(PackQuantized(bits, 32, symmetric), Shape(32, 96))
        ours = pack_quantized_matrix(whole.format, whole.tensors, whole.shape)
        np.testing.assert_allclose(ours, whole.weight, rtol=1e-6)
        made = pack_quantized(np.random.default_rng(0), whole.shape, replace(whole.format))
        np.testing.assert_array_equal(pack_quantized_matrix(made.format, made.tensors, made.shape), made.weight)
