"""Shapes that do not fit words, groups or ranks: whatever the sizes, what is read is right or refused by name."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from makers import FULL, Layer, awq, check_cuts, gptq, matrix_of, pack_quantized, read
from text_generation_server.errors import CheckpointError
from text_generation_server.kernels.reference.kernels import ReferenceKernels
from text_generation_server.quantization import read as read_module
from text_generation_server.quantization.awq import Awq
from text_generation_server.quantization.format import WeightFormat
from text_generation_server.quantization.gptq import Gptq
from text_generation_server.quantization.pack_quantized import PackQuantized
from text_generation_server.quantization.spec import Shape

EXAMPLES = 400 if FULL else 40
GROUPS = st.sampled_from((-1, 16, 32, 64, 128, 1024))
# One side is large, the other small: a layer of both large ones only takes longer.
LARGE = st.one_of(st.integers(1, 512).map(lambda n: 8 * n), st.sampled_from((4304, 10944, 29568)))
SMALL = st.sampled_from((8, 16, 24, 32))
SHAPES = st.one_of(st.builds(Shape, SMALL, LARGE), st.builds(Shape, LARGE, SMALL))
ORDERS = ("absent", "in order", "act-order", "arbitrary")


def make(format_: WeightFormat, shape: Shape, order: str, seed: int) -> Layer:
    rng = np.random.default_rng(seed)
    if isinstance(format_, Gptq):
        return gptq(rng, shape, format_, order)
    if isinstance(format_, PackQuantized):
        return pack_quantized(rng, shape, format_, order)
    assert isinstance(format_, Awq)
    return awq(rng, shape, format_)


FORMATS = st.one_of(
    st.builds(
        Gptq, st.sampled_from((2, 3, 4, 8)), GROUPS, st.booleans(), st.booleans(), st.sampled_from(("gptq", "gptq_v2"))
    ),
    st.builds(Awq, st.just(4), GROUPS, st.booleans(), st.sampled_from(("gemm", "gemv"))),
    st.builds(PackQuantized, st.sampled_from((2, 3, 4, 8)), GROUPS, st.booleans()),
)


def is_written(format_: WeightFormat, shape: Shape) -> bool:
    """Whether a quantizer writes such a layer: see the formats' own tests."""
    if isinstance(format_, Gptq):
        return format_.bits != 3 or (shape.in_ % 32 == 0 and shape.out % 32 == 0)
    assert isinstance(format_, Awq | PackQuantized)
    whole = format_.group_size == -1 or shape.in_ % format_.group_size == 0
    if isinstance(format_, Awq):
        size = shape.in_ if format_.group_size == -1 else format_.group_size
        return whole and (format_.version == "gemm" or size >= 128 or size in (16, 32, 64))
    return whole and (format_.bits != 3 or (shape.in_ % 32 == 0 and (format_.symmetric or shape.out % 32 == 0)))


@given(FORMATS, SHAPES, st.sampled_from(ORDERS), st.integers(1, 5), st.integers(0, 2**32 - 1))
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
def test_any_shape_is_served_as_float64_says_or_refused(
    format_: WeightFormat, shape: Shape, order: str, size: int, seed: int
) -> None:
    if not is_written(format_, shape):
        with pytest.raises(CheckpointError, match=f"{shape.in_}|groups of {shape.in_}"):
            format_.specs(shape)
        return
    if isinstance(format_, Gptq) and format_.desc_act and order == "absent":
        order = "act-order"
    layer = make(format_, shape, order, seed)
    assert {s.suffix: s.shape(shape) for s in format_.specs(shape) if s.suffix in layer.tensors} == {
        suffix: tuple(tensor.shape) for suffix, tensor in layer.tensors.items()
    }
    check_cuts({"o": layer}, ReferenceKernels(), (min(size, shape.out, shape.in_),))


@given(FORMATS, st.builds(Shape, SMALL, SMALL), st.sampled_from(ORDERS), st.data())
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
def test_any_cut_is_that_part_of_the_whole(
    format_: WeightFormat, shape: Shape, order: str, data: st.DataObject
) -> None:
    if not is_written(format_, shape):
        return
    if isinstance(format_, Gptq):
        # What is refused without act-order: an index of zeros.
        format_ = replace(format_, desc_act=order != "absent")
    layer = make(format_, shape, order, 0)
    bounds = [sorted(data.draw(st.sets(st.integers(0, n), min_size=2, max_size=2))) for n in shape]
    rows, columns = (range(*pair) for pair in bounds)
    weights = read({"o": layer}, [rows], columns)
    expected = layer.weight[rows.start : rows.stop, columns.start : columns.stop]
    np.testing.assert_allclose(matrix_of(weights), expected, rtol=1e-6)


@pytest.mark.parametrize("format_", [
    Gptq(3, 32, False, True), Gptq(4, 32, False, False), Awq(4, 32, True), Awq(4, 32, True, "gemv"),
    PackQuantized(4, 32, False),
], ids=lambda format_: format_.name)  # fmt: skip
def test_a_layer_that_is_read_in_chunks_is_the_same(format_: WeightFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make(format_, Shape(160, 96), "in order", 0)
    monkeypatch.setattr(read_module, "CHUNK_VALUES", 1)
    monkeypatch.setattr(read_module, "CHUNK_ROWS", 12)
    check_cuts({"o": layer}, ReferenceKernels(), (1, 3))
