"""Products of the CUDA backend under emulation equal float64 arithmetic, and a row has the same bits among others."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from emulated import DTYPES, TOLERANCE, emulator, error, unwritten
from test_quantized_products import CODINGS, TABLE, make
from text_generation_server.kernels.cuda.kernels import PRODUCTS, CudaKernels
from text_generation_server.kernels.cuda.layout import pack_dense, pack_quantized
from text_generation_server.kernels.cuda.linear import CudaLinear
from text_generation_server.kernels.weights import Coding, Float8, Integer, QuantizedWeight, Table

__all__ = ["unwritten"]
ROWS = (1, 2, 3, 4, 8, 16, 33, 64, 70)
# OUT, IN, size of groups.
SHAPES = [(24, 256, 64), (40, 1024, 128), (72, 192, 192), (17, 1096, 128)]
# Groups that end within 64 places; the last is shorter.
FINE_SHAPES = [(17, 104, 16), (16, 200, 48), (33, 96, 32)]


def name_of(coding: Coding) -> str:
    return type(coding).__name__ + str(getattr(coding, "kind", coding.bits))


CASES = [(c, s) for c in CODINGS for s in SHAPES] + [(c, s) for c in (Integer(3), Integer(4)) for s in FINE_SHAPES]


def weight_of(coding: Coding, out: int, in_: int, groups: int) -> tuple[QuantizedWeight, torch.Tensor]:
    return make(coding, out, in_, groups, isinstance(coding, Integer), False, torch.float16)


@pytest.mark.parametrize(("coding", "shape"), CASES, ids=lambda v: str(v) if isinstance(v, tuple) else name_of(v))
def test_products_equal_float64_for_any_number_of_rows_and_rows_do_not_know_each_other(
    coding: Coding, shape: tuple[int, int, int], pytestconfig: pytest.Config, unwritten: None
) -> None:
    weight, matrix = weight_of(coding, *shape)
    linear = CudaLinear(emulator(pytestconfig), pack_quantized(weight, torch.bfloat16), torch.bfloat16)
    x = torch.randn(70, shape[1], generator=torch.Generator().manual_seed(1)).bfloat16()
    whole = linear(x)
    for rows in ROWS:
        y = linear(x[:rows])
        assert error(y, x[:rows].double() @ matrix.T) <= TOLERANCE[torch.bfloat16], rows
        assert torch.equal(y, whole[:rows]), rows
    assert torch.equal(linear(x[37:38]), whole[37:38])


@pytest.mark.parametrize("coding", [Integer(4), Float8("e4m3fn"), Integer(8)], ids=name_of)
def test_products_in_float16_equal_float64(coding: Coding, pytestconfig: pytest.Config) -> None:
    weight, matrix = weight_of(coding, 40, 256, 64)
    linear = CudaLinear(emulator(pytestconfig), pack_quantized(weight, torch.float16), torch.float16)
    x = torch.randn(20, 256, generator=torch.Generator().manual_seed(1)).half() / 16
    y = linear(x)
    assert error(y, x.double() @ matrix.T) <= TOLERANCE[torch.float16]
    assert torch.equal(linear(x[:5]), y[:5])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 256), (130, 72), (16, 1100)], ids=str)
def test_dense_products_equal_float64(shape: tuple[int, int], dtype: torch.dtype, pytestconfig: pytest.Config) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    linear = CudaLinear(emulator(pytestconfig), pack_dense(matrix), dtype)
    x = torch.randn(33, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    y = linear(x)
    assert error(y, x.double() @ matrix.double().T) <= TOLERANCE[dtype]
    for rows in (1, 8, 9, 17):
        assert torch.equal(linear(x[:rows]), y[:rows])


@pytest.mark.parametrize("index", [True, False])
def test_reordered_features_and_odd_groups_cost_one_gather(index: bool, pytestconfig: pytest.Config) -> None:
    groups: int | torch.Tensor = torch.tensor([0] * 33 + [1] * 5 + [2] * 90) if index else 32
    weight, matrix = make(Integer(4), 24, 128, groups, True, True, torch.float16)
    linear = CudaLinear(emulator(pytestconfig), pack_quantized(weight, torch.bfloat16), torch.bfloat16)
    # A view with gaps, as a part of a larger tensor is.
    x = torch.randn(12, 400, generator=torch.Generator().manual_seed(1)).bfloat16()[:, 100:228]
    assert error(linear(x), x.double() @ matrix.T) <= TOLERANCE[torch.bfloat16]
    assert torch.equal(linear(x)[:3], linear(x[:3]))


def test_bits_depend_neither_on_how_slices_are_spread_nor_on_who_runs_first(pytestconfig: pytest.Config) -> None:
    weight, _ = weight_of(Integer(4), 300, 2048, 128)
    packed = pack_quantized(weight, torch.bfloat16)
    x = torch.randn(40, 2048, generator=torch.Generator().manual_seed(1)).bfloat16()
    wanted = None
    # With a thousand multiprocessors every slice has a block of its own, with one none has.
    for order, processors in ((0, 1), (0, 1000), (1, 1), (1, 1000)):
        linear = CudaLinear(emulator(pytestconfig, order, processors), packed, torch.bfloat16)
        assert linear.slices == 16
        for rows in (40, 5):
            y = linear(x[:rows])
            wanted = y if wanted is None else wanted
            assert torch.equal(y, wanted[:rows]), (order, processors)


def test_a_scratch_buffer_of_numbers_is_the_matrix(pytestconfig: pytest.Config) -> None:
    for coding, group in ((Integer(4), 64), (Integer(4), 16), (Table(TABLE), 64)):
        weight, matrix = weight_of(coding, 24, 256, group)
        linear = CudaLinear(emulator(pytestconfig), pack_quantized(weight, torch.bfloat16), torch.bfloat16, 16)
        assert error(linear.dequantize(), matrix) <= TOLERANCE[torch.bfloat16]
        x = torch.randn(20, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
        assert error(linear(x), x.double() @ matrix.T) <= TOLERANCE[torch.bfloat16]


def test_zero_points_and_codes_at_their_ends_are_exact(pytestconfig: pytest.Config) -> None:
    """One feature at a time with a scale of 1: numbers are whole, and nothing is rounded."""
    for bits in (2, 3, 4, 8):
        weight, _ = make(Integer(bits), 16, 64, 64, True, False, torch.float16)
        weight.scales.fill_(1)
        linear = CudaLinear(emulator(pytestconfig), pack_quantized(weight, torch.bfloat16), torch.bfloat16)
        zeros = weight.zeros
        assert zeros is not None
        y = linear(torch.eye(64).bfloat16())
        assert torch.equal(y.T.float(), weight.codes().float() - zeros.float())


def test_inputs_that_do_not_fit_are_refused_with_their_shapes(pytestconfig: pytest.Config) -> None:
    weight, _ = weight_of(Integer(4), 24, 256, 64)
    linear = CudaLinear(emulator(pytestconfig), pack_quantized(weight, torch.bfloat16), torch.bfloat16)
    for x in (torch.zeros(3, 255).bfloat16(), torch.zeros(3, 256), torch.zeros(256).bfloat16()):
        with pytest.raises(ValueError, match=r"expected torch.bfloat16 \[rows, 256\]"):
            linear(x)
    assert linear(torch.zeros(0, 256).bfloat16()).shape == (0, 24)


def test_codes_that_are_not_numbers_are_served_by_the_next_product(pytestconfig: pytest.Config) -> None:
    weight, _ = weight_of(Float8("e4m3fn"), 24, 64, 64)
    packed, dequantized = PRODUCTS
    gpu = emulator(pytestconfig)
    assert packed.why_not(weight, gpu) is None
    weight.packed[3, 5] = 0x7F
    assert packed.why_not(weight, gpu) == "some codes are not finite numbers"
    assert dequantized.why_not(weight, gpu) is None
    y = CudaKernels(gpu).quantized_linear(weight, torch.bfloat16, "layer")(torch.ones(2, 64).bfloat16())
    assert y.isnan().nonzero()[:, 1].unique().tolist() == [3]


def test_the_dequantized_product_knows_orders(pytestconfig: pytest.Config) -> None:
    weight, matrix = make(Integer(4), 24, 128, 32, True, True, torch.float16)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    y = PRODUCTS[1].prepare(weight, torch.bfloat16, emulator(pytestconfig), None)(x)
    assert error(y, x.double() @ matrix.T) <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("kernel_rows", [4, 16, 32, 64])
@pytest.mark.parametrize("coding", [Integer(4), Integer(8)], ids=str)
def test_the_main_kernels_have_no_bank_conflicts_and_read_weights_in_whole_sectors(
    coding: Coding, kernel_rows: int, pytestconfig: pytest.Config
) -> None:
    weight, _ = weight_of(coding, 128, 1024, 128)
    gpu = emulator(pytestconfig)
    packed = pack_quantized(weight, torch.bfloat16)
    module = gpu.module("linear.cu", packed.defines(torch.bfloat16))
    linear = CudaLinear(gpu, packed, torch.bfloat16)
    x = torch.randn(kernel_rows, 1024).bfloat16()
    module.count()
    linear(x)
    places = module.report()
    module.count(False)
    assert {place.kind for place in places} == {"global read", "global write", "shared read", "shared write"}
    for place in places:
        if place.kind.startswith("shared") or (place.kind == "global read" and place.requests * 4 >= place.units):
            assert place.units == place.fewest, place
