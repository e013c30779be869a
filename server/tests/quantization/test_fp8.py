"""Weights of 8-bit floats: every part equals what compressed-tensors or float64 says of the whole layer."""

import time

import pytest
import torch
from compressed_tensors.compressors.naive_quantized import FloatQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from harness import MODELS
from slices import (
    check_cuts,
    check_declared,
    check_products,
    close,
    cuts,
    numbers,
    read,
    refusal,
    served,
    source,
    tensors_of,
)
from text_generation_server.kernels.cpu.kernels import CpuKernels
from text_generation_server.kernels.reference.kernels import ReferenceKernels
from text_generation_server.kernels.weights import QuantizedWeight
from text_generation_server.quantization import read as reading
from text_generation_server.quantization.format import Part, StoredLinear
from text_generation_server.quantization.fp8 import Fp8, QuantizeFp8
from text_generation_server.quantization.spec import Shape
from torch import Tensor

OUT, IN = 50, 168
DTYPES = {"e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def numbers_of(kind: str) -> Tensor:
    """What the 256 codes stand for, float64, from the layout alone: sign, exponent, fraction. NaN: no number."""
    exponent_bits, fraction_bits = {"e4m3fn": (4, 3), "e5m2": (5, 2)}[kind]
    bias, found = 2 ** (exponent_bits - 1) - 1, []
    for code in range(256):
        exponent, fraction = (code & 127) >> fraction_bits, (code & (2**fraction_bits - 1)) / 2**fraction_bits
        value = 2.0 ** (exponent - bias) * (1 + fraction) if exponent else 2.0 ** (1 - bias) * fraction
        special = (code & 127) == 127 if kind == "e4m3fn" else exponent == 31
        found.append(float("nan") if special else -value if code & 128 else value)
    return torch.tensor(found, dtype=torch.float64)


def layer(format_: Fp8, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """Stored tensors by suffix, random codes of every number, and the whole weight in float64."""
    g = torch.Generator().manual_seed(seed)
    values = numbers_of(format_.kind)
    finite = torch.nonzero(values.isfinite()).view(-1)
    codes = finite[torch.randint(len(finite), (OUT, IN), generator=g)]
    down, across = format_.block
    shape = {"tensor": (), "channel": (OUT, 1), "block": (-(-OUT // down), -(-IN // across))}[format_.scale]
    scale = (torch.rand(shape, generator=g) + 0.01).to(dtype)
    every = scale.double()
    if format_.scale == "block":
        every = every.repeat_interleave(down, 0)[:OUT].repeat_interleave(across, 1)[:, :IN]
    tensors = {"weight": codes.to(torch.uint8).view(DTYPES[format_.kind]), format_.scale_suffix: scale}
    return tensors, values[codes] * every


CASES = [
    (Fp8("tensor"), torch.float32),
    (Fp8("channel"), torch.bfloat16),
    (Fp8("channel", kind="e5m2"), torch.float32),
    (Fp8("block", (16, 48), scale_suffix="weight_scale_inv"), torch.float32),
    (Fp8("block", (128, 128)), torch.bfloat16),
    (Fp8("block", (1, 32)), torch.float16),
    (Fp8("block", (32, 64), scale_suffix="weight_scale_inv"), torch.float8_e8m0fnu),
]


@pytest.mark.parametrize("rows", [7, 128])
@pytest.mark.parametrize(("format_", "dtype"), CASES, ids=str)
def test_parts_equal_those_of_the_whole_layer(
    format_: Fp8, dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "CHUNK_ROWS", rows)
    monkeypatch.setattr(reading, "CHUNK_VALUES", 1)
    tensors, expected = layer(format_, dtype)
    check_declared(tensors, format_, Shape(OUT, IN))
    check_cuts(tensors, format_, expected, close)


@pytest.mark.parametrize(
    ("format_", "shape"), [(Fp8("tensor"), (1,)), (Fp8("tensor"), (1, 1)), (Fp8("channel"), (-1,))], ids=str
)
def test_scales_may_have_another_number_of_dimensions(format_: Fp8, shape: tuple[int, ...]) -> None:
    tensors, expected = layer(format_)
    tensors["weight_scale"] = tensors["weight_scale"].reshape(shape)
    check_declared(tensors, format_, Shape(OUT, IN))
    close(served(tensors, format_, Shape(OUT, IN)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format_", [Fp8("tensor"), Fp8("channel"), Fp8("block", (16, 48))], ids=str)
def test_products_equal_float64(format_: Fp8, dtype: torch.dtype, kernels: CpuKernels) -> None:
    tensors, expected = layer(format_)
    for each in (kernels, ReferenceKernels()):
        check_products(each, tensors, format_, expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_with_what_was_rounded_while_loading_equal_float64(dtype: torch.dtype, kernels: CpuKernels) -> None:
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(6))
    for each in (kernels, ReferenceKernels()):
        check_products(each, {"weight": weight}, QuantizeFp8(), rounded(weight), dtype)


def test_parts_with_scales_of_their_own_are_one_matrix() -> None:
    layers = {name: layer(Fp8("tensor"), seed=seed) for seed, name in enumerate("qkv")}
    tensors = {n: kept for name, (stored, _) in layers.items() for n, kept in source(stored, name).items()}
    linears = [(Part(n, (range(5, 9), range(20, 50))), StoredLinear(Shape(OUT, IN), Fp8("tensor"))) for n in layers]
    weights = reading.read_weight(tensors, "", linears, None, torch.float32)
    assert len(weights) == 1
    assert isinstance(weights[0], QuantizedWeight) and weights[0].scales.shape == (3 * 34, 1)
    close(numbers(weights), torch.cat([w[[*range(5, 9), *range(20, 50)]] for _, w in layers.values()]))


@pytest.mark.parametrize(
    ("format_", "scheme"),
    [
        (Fp8("tensor"), {"strategy": "tensor"}),
        (Fp8("channel"), {"strategy": "channel"}),
        (Fp8("block", (16, 24)), {"strategy": "block", "block_structure": [16, 24]}),
        (Fp8("block", (1, 56)), {"strategy": "group", "group_size": 56}),
    ],
    ids=["tensor", "channel", "block", "group"],
)
def test_what_compressed_tensors_packs_is_read_as_it_unpacks_it(format_: Fp8, scheme: dict[str, object]) -> None:
    args = QuantizationArgs.model_validate({"num_bits": 8, "type": "float", "symmetric": True} | scheme)
    whole = QuantizationScheme(targets=["Linear"], weights=args)
    weight = torch.randn(48, 168, generator=torch.Generator().manual_seed(1))
    down, across = {"tensor": (48, 168), "channel": (1, 168)}.get(format_.scale, format_.block)
    blocks = weight.view(48 // down, down, 168 // across, across).abs().amax((1, 3)) / 448
    scale = blocks.view(1) if format_.scale == "tensor" else blocks
    packed = FloatQuantizationCompressor.compress({"weight": weight, "weight_scale": scale}, whole)
    check_declared(packed, format_, Shape(48, 168))
    unpacked = FloatQuantizationCompressor.decompress(packed, whole)["weight"]
    close(served(packed, format_, Shape(48, 168)), unpacked)


def test_the_shipped_model_is_read_as_compressed_tensors_unpacks_it() -> None:
    checkpoint, linears = tensors_of(MODELS / "docs-llama-7m-fp8")
    args = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="channel")
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    assert len(linears) == 42
    for name, tensors in linears.items():
        shape = Shape(*tensors["weight"].shape)
        check_declared(tensors, Fp8("channel"), shape)
        exact = tensors | {"weight_scale": tensors["weight_scale"].float()}
        unpacked = FloatQuantizationCompressor.decompress(exact, scheme)["weight"]
        close(numbers(read(checkpoint, name, Fp8("channel"), shape)), unpacked)


def rounded(weight: Tensor) -> Tensor:
    """The nearest numbers of e4m3fn to each row over its absmax / 448, in float64."""
    scale = (weight.double().abs().amax(1, keepdim=True) / 448).float().double()
    table = numbers_of("e4m3fn")
    table = table[table.isfinite()].unique()
    scaled = weight.double() / scale.clamp(min=1e-300)
    return table[(scaled[..., None] - table).abs().argmin(-1)] * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_while_loading_numbers_become_the_nearest_and_cuts_those_of_the_whole(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(4)
    weight = torch.randn(OUT, IN, generator=g) * torch.rand(OUT, 1, generator=g).exp2() ** 5
    weight[3], weight[4, 5] = 0, 0
    weight = weight.to(dtype)
    nearest = rounded(weight)
    found = served({"weight": weight}, QuantizeFp8(), Shape(OUT, IN))
    # Halfway between two numbers either is nearest.
    error, least = ((t.double() - weight.double()).abs() for t in (found, nearest))
    assert (error <= least + 1e-6 * nearest.abs()).all()
    check_cuts({"weight": weight}, QuantizeFp8(), found, close)


def test_a_row_is_rounded_by_its_largest_number_wherever_it_is_cut() -> None:
    weight = torch.linspace(-1, 1, 5 * 96).view(5, 96).clone()
    weight[:, -1] = 448.0
    expected = weight.to(torch.float8_e4m3fn).float()
    for rows, columns in cuts(Shape(5, 96)):
        part = numbers(read(source({"weight": weight}), "layer", QuantizeFp8(), Shape(5, 96), rows, columns))
        want = expected if rows is None else expected[rows.start : rows.stop]
        close(part, want if columns is None else want[:, columns.start : columns.stop])


def test_scales_of_activations_and_of_the_cache_are_known_and_not_used() -> None:
    tensors, expected = layer(Fp8("tensor"))
    unused = {"input_scale": torch.tensor(3.0), "k_scale": torch.tensor([7.0]), "v_scale": torch.tensor(0.0)}
    format_ = Fp8("tensor", input_scale=True)
    check_declared(tensors | unused, format_, Shape(OUT, IN))
    close(served(tensors | unused, format_, Shape(OUT, IN)), expected)
    assert "input_scale" not in [spec.suffix for spec in Fp8("tensor").specs(Shape(OUT, IN))]


@pytest.mark.parametrize(
    ("kind", "code"), [("e4m3fn", 0x7F), ("e4m3fn", 0xFF), ("e5m2", 0x7C), ("e5m2", 0xFC), ("e5m2", 0xFE)]
)
def test_codes_that_are_no_numbers_are_refused(kind: str, code: int) -> None:
    format_ = Fp8("channel", kind=kind)
    tensors, _ = layer(format_)
    tensors["weight"].view(torch.uint8)[OUT - 1, IN - 1] = code
    said = refusal(tensors, format_, Shape(OUT, IN))
    assert "tensor layer.weight holds NaN or infinity; expected finite codes" in said


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e37])
@pytest.mark.parametrize("format_", [Fp8("tensor"), Fp8("channel"), Fp8("block", (16, 48))], ids=str)
def test_scales_that_are_not_finite_or_make_infinities_are_refused(format_: Fp8, value: float) -> None:
    tensors, _ = layer(format_)
    tensors["weight_scale"].view(-1)[-1] = value
    said = refusal(tensors, format_, Shape(OUT, IN))
    assert "tensor layer.weight_scale holds NaN, infinity or numbers beyond float32; expected finite scales" in said


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_weights_that_are_not_finite_are_not_rounded(value: float) -> None:
    weight = torch.randn(OUT, IN)
    weight[7, 9] = value
    assert "tensor layer.weight holds NaN" in refusal({"weight": weight}, QuantizeFp8(), Shape(OUT, IN))


@pytest.mark.parametrize(
    ("format_", "shape"),
    [
        (Fp8("tensor"), (2,)), (Fp8("tensor"), (1, 2)), (Fp8("channel"), (OUT,) * 2), (Fp8("channel"), (1, OUT)),
        (Fp8("block", (16, 48)), (3, 4)), (Fp8("block", (16, 48)), (4, 3)), (Fp8("block", (16, 48)), (16,)),
    ],
    ids=str,
)  # fmt: skip
def test_scales_of_another_shape_are_refused(format_: Fp8, shape: tuple[int, ...]) -> None:
    tensors, _ = layer(format_)
    tensors["weight_scale"] = torch.ones(shape)
    said = refusal(tensors, format_, Shape(OUT, IN))
    assert f"tensor layer.weight_scale has shape {list(shape)}; expected" in said


def test_memory_is_what_the_plan_says() -> None:
    for format_, tensors in (
        *((f, layer(f)[0]) for f in (Fp8("tensor"), Fp8("channel"), Fp8("block", (16, 24)))),
        (QuantizeFp8(), {"weight": torch.randn(OUT, IN)}),
    ):
        (weight,) = read(source(tensors), "layer", format_, Shape(OUT, IN))
        assert isinstance(weight, QuantizedWeight)
        assert weight.num_bytes == format_.held_bytes(Shape(OUT, IN), 4)


def test_rounding_is_fast() -> None:
    torch.set_num_threads(1)
    weight = torch.randn(1024, 4096)
    start = time.process_time()
    read(source({"weight": weight}), "layer", QuantizeFp8(), Shape(1024, 4096))
    assert time.process_time() - start < 0.5
