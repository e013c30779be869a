"""Products with quantized weights equal float64 arithmetic on their codes, and give a row the same bits anywhere."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from text_generation_server.kernels.codes import pack, unpack
from text_generation_server.kernels.cpu.kernels import CpuKernels
from text_generation_server.kernels.cpu.native.library import load_library
from text_generation_server.kernels.cpu.quantized import Product, products
from text_generation_server.kernels.interface import Matmul
from text_generation_server.kernels.reference.kernels import ReferenceKernels
from text_generation_server.kernels.weights import Coding, Float8, Integer, QuantizedWeight, Table, alike
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

# Not the table of any format.
TABLE = tuple(((i * 7) % 16 - 8) / 8 for i in range(16))
CODINGS = [Integer(2), Integer(3), Integer(4), Integer(8), Table(TABLE), Float8("e4m3fn"), Float8("e5m2")]


def make(
    coding: Coding, out: int, in_: int, groups: int | Tensor, zeros: bool, order: bool, dtype: torch.dtype
) -> tuple[QuantizedWeight, Tensor]:
    """A weight, and [out, in] float64 of the same by plain arithmetic."""
    g = torch.Generator().manual_seed(out * in_ + coding.bits)
    codes = torch.randint(0, 2**coding.bits, (out, in_), generator=g, dtype=torch.uint8)
    match coding:
        case Integer(bits):
            values = codes.double()
            middle = 2.0 ** (bits - 1)
        case Table(table):
            values, middle = torch.tensor(table, dtype=torch.float64)[codes.long()], 0.0
        case Float8(kind):
            codes %= 120  # every code below is a finite number
            values, middle = codes.view(getattr(torch, f"float8_{kind}")).double(), 0.0
    group_of = torch.arange(in_) // groups if isinstance(groups, int) else groups
    num = int(group_of.max()) + 1
    scales = (torch.rand(out, num, generator=g) + 0.5).to(dtype)
    zero_points = None
    zero = torch.full((out, num), middle, dtype=torch.float64)
    if zeros:
        zero_points = torch.randint(0, 2**coding.bits, (out, num), generator=g, dtype=torch.uint8)
        zero = zero_points.double()
    matrix = (values - zero[:, group_of]) * scales.double()[:, group_of]
    permutation = torch.randperm(in_, generator=g) if order else None
    weight = QuantizedWeight(coding, in_, pack(codes, coding.bits), scales, zero_points, groups, permutation)
    if permutation is not None:
        # Place p holds feature permutation[p].
        matrix = torch.empty_like(matrix).index_copy_(1, permutation, matrix)
    return weight, matrix


def close(y: Tensor, x: Tensor, matrix: Tensor, tolerance: float) -> None:
    want = x.double() @ matrix.T
    assert torch.linalg.norm(y.double() - want) <= tolerance * torch.linalg.norm(want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("coding", CODINGS, ids=str)
@pytest.mark.parametrize(
    ("out", "in_", "groups"),
    [(96, 256, 128), (96, 256, 256), (40, 160, 32), (17, 104, 16), (24, 4304, 128), (48, 256, 64)],
)
def test_products_equal_float64(
    out: int, in_: int, groups: int, coding: Coding, dtype: torch.dtype, every_kernels: CpuKernels
) -> None:
    for zeros in [False, True] if isinstance(coding, Integer) else [False]:
        weight, matrix = make(coding, out, in_, groups, zeros, order=False, dtype=torch.float16)
        x = torch.randn(7, in_, generator=torch.Generator().manual_seed(1)).to(dtype)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        for matmul in (
            every_kernels.quantized_linear(weight, dtype, "layer"),
            ReferenceKernels().quantized_linear(weight, dtype, "layer"),
        ):
            y = matmul(x)
            assert y.dtype == dtype
            close(y, x, matrix, tolerance)


def check_outliers(weight: QuantizedWeight, matrix: Tensor, x: Tensor, outliers: Tensor, kernels: CpuKernels) -> None:
    """Products of x equal float64, in every row and with the same bits alone, also where the outliers meet zeros only.

    There an error that they cause to the other activations cannot hide behind what they add themselves.
    """
    hidden, zeroed = matrix.clone(), weight
    if isinstance(weight.coding, Integer):
        hidden[:, outliers] = 0
        places = outliers if weight.order is None else torch.argsort(weight.order)[outliers]
        codes = weight.codes()
        assert isinstance(weight.groups, int)
        zeros = torch.full_like(weight.scales, 2 ** (weight.coding.bits - 1)) if weight.zeros is None else weight.zeros
        codes[:, places] = zeros[:, places // weight.groups].to(torch.uint8)
        zeroed = replace(weight, packed=pack(codes, weight.coding.bits))
    x = x.bfloat16()
    for served, wanted in ((zeroed, hidden), (weight, matrix)):
        matmul = kernels.quantized_linear(served, torch.bfloat16, "layer")
        y = matmul(x)
        # Of each row, beside its result, or what activations and weights of these sizes usually make if they cancel.
        seen = x.double().index_fill(1, outliers, 0) if wanted is hidden else x.double()
        usual = torch.linalg.norm(seen, dim=1) * torch.linalg.norm(wanted) / len(wanted[0]) ** 0.5
        for found in (y, ReferenceKernels().quantized_linear(served, torch.bfloat16, "layer")(x)):
            y64 = x.double() @ wanted.T
            error = torch.linalg.norm(found.double() - y64, dim=1)
            each = error / torch.maximum(usual, torch.linalg.norm(y64, dim=1))
            assert each.square().mean().sqrt() <= 1e-2 and each.max() <= 1.5e-2
        assert torch.equal(torch.cat([matmul(x[row : row + 1]) for row in range(len(x))]), y)


@pytest.mark.parametrize("order", [False, True], ids=["in order", "reordered"])
@pytest.mark.parametrize("rows", [1, 2, 7, 40])
@pytest.mark.parametrize(("in_", "group"), [(72, 72), (160, 32), (256, 128), (4304, 4304)])
@pytest.mark.parametrize("coding", CODINGS, ids=str)
def test_outliers_do_not_cost_the_other_activations_their_digits(
    coding: Coding, in_: int, group: int, rows: int, order: bool, every_kernels: CpuKernels
) -> None:
    weight, matrix = make(coding, 70, in_, group, isinstance(coding, Integer) and rows % 2 == 1, order, torch.float32)
    x = torch.randn(rows, in_, generator=torch.Generator().manual_seed(2))
    outliers = torch.tensor([3, 40, in_ - 1])
    x[::3, outliers] = torch.tensor([2000.0, -11.0, 800.0])  # the other rows have none
    check_outliers(weight, matrix, x, outliers, every_kernels)


@pytest.mark.parametrize("size", [3.0, 5.0, 8.0, 30.0, 100.0, 1e4])
@pytest.mark.parametrize("period", [8, 16, 64, 100])
def test_no_size_of_outliers_makes_a_product_wrong(size: float, period: int, every_kernels: CpuKernels) -> None:
    weight, matrix = make(Integer(4), 64, 1024, 128, False, False, torch.float32)
    g = torch.Generator().manual_seed(4)
    for others in (torch.randn(3, 1024, generator=g), torch.rand(3, 1024, generator=g) - 0.3):
        x = others.clone()
        x[:, ::period] *= size
        close(every_kernels.quantized_linear(weight, torch.bfloat16, "layer")(x.bfloat16()), x.bfloat16(), matrix, 1e-2)


@pytest.mark.parametrize("threshold", [2.0, 6.0])
def test_activations_beyond_a_threshold_are_not_rounded(threshold: float, every_kernels: CpuKernels) -> None:
    """Of a row in which everything is beyond it, nothing is: the product has the error of bfloat16 results alone."""
    weight, matrix = make(Integer(8), 64, 512, 512, False, False, torch.float32)
    x = (torch.rand(5, 512, generator=torch.Generator().manual_seed(5)) * 2 * threshold + threshold).bfloat16()
    x[:, ::2] *= -1
    matmul = every_kernels.quantized_linear(replace(weight, outlier_threshold=threshold), torch.bfloat16, "layer")
    close(matmul(x), x, matrix, 3e-3)


@pytest.mark.parametrize("coding", CODINGS, ids=str)
@pytest.mark.parametrize("index", [True, False])
def test_products_with_reordered_features_equal_float64(coding: Coding, index: bool, every_kernels: CpuKernels) -> None:
    groups: int | Tensor = torch.tensor([0] * 33 + [1] * 5 + [2] * 90) if index else 32
    weight, matrix = make(coding, 24, 128, groups, isinstance(coding, Integer), order=True, dtype=torch.bfloat16)
    x = torch.randn(3, 128)
    for kernel in (every_kernels, ReferenceKernels()):
        close(kernel.quantized_linear(weight, torch.float32, "layer")(x), x, matrix, 1e-5)


@pytest.mark.parametrize("coding", CODINGS, ids=str)
@pytest.mark.parametrize("index", [True, False])
def test_the_reference_product_keeps_everything_on_the_device_of_the_weight(coding: Coding, index: bool) -> None:
    """On tensors that only know their shape and device, a device that this machine need not have."""
    groups: int | Tensor = torch.tensor([0] * 33 + [1] * 5 + [2] * 90) if index else 48
    weight, _ = make(coding, 24, 128, groups, isinstance(coding, Integer), order=True, dtype=torch.float16)
    device = torch.device("cuda")
    with FakeTensorMode(allow_non_fake_inputs=True):
        moved = weight.to(device)
        x = torch.empty(3, 128, dtype=torch.bfloat16, device=device)
        y = ReferenceKernels().quantized_linear(moved, torch.bfloat16, "layer")(x)
    assert (y.shape, y.dtype, y.device.type) == ((3, 24), torch.bfloat16, "cuda")


PRODUCTS = products(load_library())
TORCH_PRODUCTS = products(None)

# A weight that each product takes.
TAKEN: dict[str, Callable[[], QuantizedWeight]] = {
    "native": lambda: make(Integer(3), 61, 256, 48, True, True, torch.float16)[0],
    "int4 (torch)": lambda: make(Integer(4), 64, 256, 256, True, False, torch.float16)[0],
    "int8 (torch)": lambda: make(Integer(8), 64, 256, 256, False, False, torch.float32)[0],
    "dequantized blocks": lambda: make(Table(TABLE), 80, 256, 64, False, False, torch.float32)[0],
}


def prepare(product: Product, weight: QuantizedWeight, dtype: torch.dtype, kernels: CpuKernels) -> Matmul:
    return product.prepare(weight, dtype, kernels.proofs)


@pytest.mark.parametrize("product", PRODUCTS, ids=lambda p: p.name)
def test_a_row_has_the_same_bits_among_any_others(product: Product, kernels: CpuKernels) -> None:
    weight = TAKEN[product.name]()
    assert product.why_not(weight, torch.bfloat16) is None
    matmul = prepare(product, weight, torch.bfloat16, kernels)
    x = torch.randn(130, 256).bfloat16()
    alone = torch.cat([matmul(row[None]) for row in x])
    for rows in (2, 3, 5, 8, 17, 33, 130):
        for first in (0, 1, 130 - rows):
            assert torch.equal(matmul(x[first : first + rows]), alone[first : first + rows]), (rows, first)
    assert kernels.row_stable


CHOICES: list[tuple[QuantizedWeight, torch.dtype, str]] = [
    (make(Integer(4), 64, 256, 128, True, False, torch.float16)[0], torch.bfloat16, "int4 (torch)"),
    (make(Integer(4), 64, 256, 256, True, False, torch.float16)[0], torch.bfloat16, "int4 (torch)"),
    (make(Integer(4), 64, 2048, 1024, True, False, torch.float16)[0], torch.bfloat16, "int4 (torch)"),
    (make(Integer(4), 64, 96, 96, True, True, torch.float16)[0], torch.bfloat16, "int4 (torch)"),
    (make(Integer(4), 64, 256, 128, True, False, torch.float16)[0], torch.float32, "dequantized blocks"),
    (make(Integer(4), 64, 256, 16, True, False, torch.float16)[0], torch.bfloat16, "dequantized blocks"),
    (make(Integer(4), 40, 256, 128, True, False, torch.float16)[0], torch.bfloat16, "dequantized blocks"),
    (make(Integer(3), 64, 256, 128, True, False, torch.float16)[0], torch.bfloat16, "dequantized blocks"),
    (make(Integer(8), 64, 256, 256, False, False, torch.float16)[0], torch.bfloat16, "int8 (torch)"),
    (make(Integer(8), 64, 256, 256, True, False, torch.float16)[0], torch.bfloat16, "dequantized blocks"),
    (make(Integer(8), 64, 256, 128, False, False, torch.float16)[0], torch.bfloat16, "dequantized blocks"),
    (make(Integer(8), 64, 117, 117, False, False, torch.float16)[0], torch.bfloat16, "dequantized blocks"),
    (make(Integer(8), 64, 1000, 1000, False, False, torch.float16)[0], torch.bfloat16, "dequantized blocks"),
    (make(Integer(8), 61, 256, 256, False, False, torch.float16)[0], torch.bfloat16, "dequantized blocks"),
    (make(Table(TABLE), 64, 256, 64, False, False, torch.float32)[0], torch.bfloat16, "dequantized blocks"),
]


@pytest.mark.parametrize("size", [8, 12, 33, 59, 64, 100, 117, 118, 192, 1001, 1024])
@pytest.mark.parametrize("out", [16, 61, 128])
def test_8_bit_rows_of_any_length_equal_float64(out: int, size: int, every_kernels: CpuKernels) -> None:
    """torch's product of 8 bits reads beyond a row that is not made of whole vectors, and ends the process."""
    weight, matrix = make(Integer(8), out, size, size, False, False, torch.float32)
    x = torch.randn(16, size).bfloat16()
    close(every_kernels.quantized_linear(weight, torch.bfloat16, "layer")(x), x, matrix, 1e-2)


@pytest.mark.parametrize(("weight", "dtype", "name"), CHOICES)
def test_the_first_product_with_nothing_against_it_is_chosen(
    weight: QuantizedWeight, dtype: torch.dtype, name: str
) -> None:
    assert next(product.name for product in PRODUCTS if product.why_not(weight, dtype) is None) == "native"
    assert next(product.name for product in TORCH_PRODUCTS if product.why_not(weight, dtype) is None) == name


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [1, 3, 8, 17, 26, 31, 104, 128])
def test_unpacking_undoes_packing(bits: int, size: int) -> None:
    codes = torch.randint(0, 2**bits, (5, size), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed, bits, size), codes)
    assert packed.shape == (5, -(-size * bits // 8))


def test_weights_of_other_groups_or_codings_are_not_alike() -> None:
    weight, _ = make(Integer(4), 16, 64, 32, True, False, torch.float16)
    assert alike(weight, make(Integer(4), 24, 64, 32, True, False, torch.float16)[0])
    for other in (
        make(Integer(4), 16, 64, 64, True, False, torch.float16)[0],
        make(Integer(8), 16, 64, 32, True, False, torch.float16)[0],
        make(Integer(4), 16, 64, 32, False, False, torch.float16)[0],
        make(Integer(4), 16, 64, 32, True, True, torch.float16)[0],
        replace(weight, groups=torch.arange(64) // 32),
        replace(weight, scales=weight.scales.float()),
    ):
        assert not alike(weight, other)
