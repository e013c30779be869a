"""What bitsandbytes makes, stored or while loading: every part equals what it says of the whole layer."""

import copy
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import bitsandbytes.nn as bnb_nn
import pytest
import torch
import transformers as hf
from harness import MODELS
from slices import (
    check_cuts,
    check_declared,
    check_products,
    close,
    numbers,
    read,
    refusal,
    same,
    served,
    source,
    tensors_of,
)
from text_generation_server.checkpoint.index import read_index
from text_generation_server.checkpoint.tensors import Checkpoint
from text_generation_server.errors import CheckpointError, ConfigError
from text_generation_server.kernels.cpu.kernels import CpuKernels
from text_generation_server.kernels.reference.kernels import ReferenceKernels
from text_generation_server.kernels.weights import QuantizedWeight
from text_generation_server.quantization import read as reading
from text_generation_server.quantization.bitsandbytes import (
    Bitsandbytes4bit,
    Bitsandbytes8bit,
    Quantize4bit,
    Quantize8bit,
)
from text_generation_server.quantization.detect import Settings, Source
from text_generation_server.quantization.format import Part, Piece, StoredLinear, WeightFormat
from text_generation_server.quantization.methods import BitsandbytesMethod
from text_generation_server.quantization.spec import Shape, whole
from torch import Tensor

NF4_STATE = "weight.quant_state.bitsandbytes__nf4"
# Rows of whole blocks; rows that share blocks; no even number of values; several nested blocks, cut anywhere.
SHAPES = [(24, 128), (50, 160), (33, 77), (150, 168)]


def weight_of(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers of very different sizes, with rows and single values of zero."""
    g = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(shape, generator=g) * torch.rand(shape[0], 1, generator=g).exp2() ** 4
    weight[::7] *= torch.rand(weight[::7].shape, generator=g) > 0.5
    weight[1:2] = 0
    return weight.to(dtype)


def four_bits(shape: tuple[int, int], kind: str, nested: bool, block: int = 64) -> tuple[dict[str, Tensor], Tensor]:
    """Stored tensors by suffix, and the whole layer as bitsandbytes sees it, float32."""
    packed, state = bnb.quantize_4bit(weight_of(shape), None, None, block, nested, kind)
    tensors = {"weight": packed} | {f"weight.{name}": t for name, t in state.as_dict(packed=True).items()}
    # As one row of an even length: for an odd one bitsandbytes compiles, which takes long.
    num_values = shape[0] * shape[1]
    state.shape = torch.Size((1, num_values + num_values % 2))
    return tensors, bnb.dequantize_4bit(packed, state)[0, :num_values].view(shape)


def eight_bits(shape: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
    codes, scales, _ = bnb.int8_vectorwise_quant(weight_of(shape).half())
    tensors = {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors, codes.double() * scales.double()[:, None] / 127


@pytest.fixture(params=[1, 1 << 23], ids=["small chunks", "one chunk"])
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == 1:
        monkeypatch.setattr(reading, "CHUNK_ROWS", 10)
    monkeypatch.setattr(reading, "CHUNK_VALUES", request.param)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "nested", "block"), [("nf4", False, 64), ("fp4", True, 64), ("nf4", True, 128)])
def test_parts_of_stored_4_bit_layers_equal_those_of_the_whole_layer(
    shape: tuple[int, int], kind: str, nested: bool, block: int
) -> None:
    tensors, expected = four_bits(shape, kind, nested, block)
    check_declared(tensors, Bitsandbytes4bit(kind, nested, block), Shape(*shape))
    check_cuts(tensors, Bitsandbytes4bit(kind, nested, block), expected, same)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_parts_quantized_to_4_bits_while_loading_equal_those_of_the_whole_layer(
    shape: tuple[int, int], kind: str
) -> None:
    check_cuts({"weight": weight_of(shape)}, Quantize4bit(kind), four_bits(shape, kind, False)[1], same)


@pytest.mark.usefixtures("_chunks")
def test_parts_of_8_bit_layers_equal_those_of_the_whole_layer() -> None:
    tensors, expected = eight_bits((50, 160))
    check_declared(tensors, Bitsandbytes8bit(), Shape(50, 160))
    check_cuts(tensors, Bitsandbytes8bit(), expected, close)
    check_cuts({"weight": weight_of((50, 160))}, Quantize8bit(), expected, close)


def test_a_4_bit_code_is_the_one_of_every_table_and_the_first_is_the_high_half() -> None:
    state = json.dumps({"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [4, 8]})
    packed = torch.arange(16, dtype=torch.uint8).view(16, 1) * 16 + 3
    table = bnb.get_4bit_type("nf4", device="cpu").data.float()
    tensors = {"weight": packed, "weight.absmax": torch.tensor([2.0]), "weight.quant_map": table}
    tensors[NF4_STATE] = torch.tensor(list(state.encode()), dtype=torch.uint8)
    expected = torch.stack([table * 2, (table[3] * 2).expand(16)], -1).view(4, 8)
    same(served(tensors, Bitsandbytes4bit("nf4"), Shape(4, 8)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 5), (1, 64), (300, 2048)])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_codes_and_absmax_made_while_loading_are_those_of_bitsandbytes(
    kind: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = weight_of(shape, dtype)
    packed, state = bnb.quantize_4bit(weight, None, None, 64, False, kind)
    (made,) = read(source({"weight": weight}), "layer", Quantize4bit(kind), Shape(*shape))
    assert isinstance(made, QuantizedWeight)
    codes = torch.stack([packed >> 4, packed & 15], -1).view(-1)[: weight.numel()]
    assert torch.equal(made.codes(), codes.view(shape))
    per_value = state.absmax.repeat_interleave(64)[: weight.numel()].view(shape)
    groups = made.groups if isinstance(made.groups, Tensor) else torch.arange(shape[1]) // made.groups
    assert torch.equal(made.scales[:, groups], per_value)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_numbers_between_two_of_a_table_are_rounded_as_by_bitsandbytes(kind: str) -> None:
    table = bnb.get_4bit_type(kind, device="cpu").sort().values
    middles = (table[1:] + table[:-1]) / 2
    around = torch.cat([m for t in (middles, table) for m in (t, t.nextafter(t + 1), t.nextafter(t - 1))]).clamp(-1, 1)
    weight = torch.cat([around, torch.ones(128 - len(around) % 128)]).view(-1, 64)
    weight = torch.cat([weight, weight * 3e-39, weight * 1e30, -weight.flip(1)])
    packed, state = bnb.quantize_4bit(weight, None, None, 64, False, kind)
    same(served({"weight": weight}, Quantize4bit(kind), Shape(*weight.shape)), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_8_bit_codes_made_while_loading_are_those_of_bitsandbytes(dtype: torch.dtype) -> None:
    weight = weight_of((300, 2048), dtype)
    codes, scales, _ = bnb.int8_vectorwise_quant(weight.half())
    (made,) = read(source({"weight": weight}), "layer", Quantize8bit(), Shape(300, 2048))
    assert isinstance(made, QuantizedWeight)
    assert torch.equal(made.codes().int() - 128, codes.int())
    assert torch.equal(made.scales[:, 0], scales / 127)


def test_layers_of_one_table_are_one_matrix() -> None:
    layers = {name: four_bits((rows, 160), "nf4", False) for name, rows in (("q", 50), ("k", 20))}
    tensors = {n: kept for name, (stored, _) in layers.items() for n, kept in source(stored, name).items()}
    linears = [
        (Part(name, (range(3, 17),)), StoredLinear(Shape(len(whole), 160), Bitsandbytes4bit("nf4")))
        for name, (_, whole) in layers.items()
    ]
    weights = reading.read_weight(tensors, "", linears, None, torch.float32)
    assert len(weights) == 1
    same(numbers(weights), torch.cat([whole[3:17] for _, whole in layers.values()]))


CASES: dict[str, tuple[WeightFormat, Callable[[], tuple[dict[str, Tensor], Tensor]]]] = {
    "stored nf4": (Bitsandbytes4bit("nf4"), lambda: four_bits((150, 168), "nf4", False)),
    "stored fp4, nested": (Bitsandbytes4bit("fp4", True), lambda: four_bits((48, 128), "fp4", True)),
    "stored 8 bits": (Bitsandbytes8bit(), lambda: eight_bits((48, 160))),
    "nf4": (Quantize4bit("nf4"), lambda: ({"weight": weight_of((50, 160))}, four_bits((50, 160), "nf4", False)[1])),
    "8 bits": (Quantize8bit(), lambda: ({"weight": weight_of((50, 160))}, eight_bits((50, 160))[1])),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_products_equal_float64(case: str, dtype: torch.dtype, kernels: CpuKernels) -> None:
    format_, make = CASES[case]
    tensors, expected = make()
    for each in (kernels, ReferenceKernels()):
        check_products(each, tensors, format_, expected, dtype)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_products_with_outliers_are_those_of_bitsandbytes(threshold: float, every_kernels: CpuKernels) -> None:
    """A row without outliers and one with: both libraries round what is no outlier to 8 bits, in other blocks."""
    weight = weight_of((96, 256))
    layer = bnb_nn.Linear8bitLt(256, 96, bias=False, has_fp16_weights=False, threshold=threshold)
    layer.load_state_dict({"weight": weight.clone()})
    layer = layer.to("cpu")
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(3)).clamp_(-5.9, 5.9)
    x[1, 17], x[1, 200] = (500.0, -6.0) if threshold else (5.0, -5.0)
    x = x.bfloat16()
    with torch.no_grad():
        expected = layer(x).double()
    (read_weight,) = read(source({"weight": weight}), "layer", Quantize8bit(threshold), Shape(96, 256))
    assert isinstance(read_weight, QuantizedWeight)
    found = every_kernels.quantized_linear(read_weight, torch.bfloat16, "layer")(x).double()
    for row in range(2):
        assert torch.linalg.norm(found[row] - expected[row]) <= 2e-2 * torch.linalg.norm(expected[row])


def method_with(threshold: Any) -> BitsandbytesMethod:
    values = {"load_in_8bit": True, "load_in_4bit": False, "llm_int8_threshold": threshold}
    stated = Source("config.json", values, "bitsandbytes", {key: key for key in values})
    return BitsandbytesMethod(Settings(Path("model"), "bitsandbytes", [stated], {}), {})


@pytest.mark.parametrize("stated", [None, 0.0, 3, 7.5])
def test_the_threshold_is_that_of_the_settings(stated: float | None) -> None:
    method = method_with(stated)
    assert method.applied("layer") == Bitsandbytes8bit(6.0 if stated is None else float(stated))
    (weight,) = read(source(eight_bits((48, 160))[0]), "layer", method.applied("layer"), Shape(48, 160))
    assert isinstance(weight, QuantizedWeight) and weight.outlier_threshold == (6.0 if stated is None else stated)


@pytest.mark.parametrize("stated", ["6.0", True, -1.0, float("nan"), float("inf"), [6.0]])
def test_a_threshold_that_is_none_is_refused(stated: Any) -> None:
    with pytest.raises(ConfigError, match=r"llm_int8_threshold is .*; expected a number of at least 0"):
        method_with(stated)


@pytest.fixture(autouse=True)
def rows_that_end_inside_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """With AVX-512, bitsandbytes 0.50 gives the rows after them wrong scales; a matrix of one row it reads right."""
    dequantize = bnb.dequantize_4bit

    def as_one_row(weight: Tensor, quant_state: bnb.QuantState) -> Tensor:
        flat = copy.copy(quant_state)
        flat.shape = torch.Size([1, quant_state.shape.numel()])
        return dequantize(weight, flat).reshape(quant_state.shape)

    monkeypatch.setattr(bnb, "dequantize_4bit", as_one_row)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose rows share blocks, as transformers saves it."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=160, intermediate_size=224, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1,
        vocab_size=64, pad_token_id=0,
    )  # fmt: skip
    hf.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("settings", "format_", "while_loading"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, Bitsandbytes4bit("nf4"), Quantize4bit("nf4")),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, Bitsandbytes4bit("fp4"), Quantize4bit("fp4")),
        (
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
            Bitsandbytes4bit("nf4", nested=True), None,
        ),
        ({"load_in_8bit": True}, Bitsandbytes8bit(), Quantize8bit()),
    ],
    ids=["nf4", "fp4", "nf4 nested", "8 bits"],
)  # fmt: skip
def test_a_model_saved_by_transformers_is_read_as_transformers_dequantizes_it(
    settings: dict[str, Any], format_: WeightFormat, while_loading: WeightFormat | None, tiny: Path, tmp_path: Path
) -> None:
    config = hf.BitsAndBytesConfig(**settings)
    model: Any = hf.LlamaForCausalLM.from_pretrained(tiny, quantization_config=config, device_map="cpu")
    model.save_pretrained(tmp_path)
    whole = model.dequantize(torch.float32).state_dict()
    checkpoint, linears = tensors_of(tmp_path)
    dense, _ = tensors_of(tiny)
    assert len(linears) == 7
    for name, tensors in linears.items():
        expected = whole[f"{name}.weight"].float()
        check_declared(tensors, format_, Shape(*expected.shape))
        compare = close_to_half if "load_in_8bit" in settings else same
        compare(numbers(read(checkpoint, name, format_, Shape(*expected.shape))), expected)
        if while_loading is not None:
            compare(numbers(read(dense, name, while_loading, Shape(*expected.shape))), expected)


def close_to_half(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected.double(), rtol=1e-3, atol=1e-6)


def test_the_shipped_model_is_read_as_bitsandbytes_dequantizes_it() -> None:
    checkpoint, linears = tensors_of(MODELS / "docs-llama-7m-bnb-nf4")
    assert len(linears) == 42
    for name, tensors in linears.items():
        state = {n.removeprefix("weight."): t for n, t in tensors.items() if n != "weight"}
        quant_state = bnb.QuantState.from_dict(dict(state), torch.device("cpu"))
        expected = bnb.dequantize_4bit(tensors["weight"], quant_state).float()
        shape = Shape(*expected.shape)
        check_declared(tensors, Bitsandbytes4bit("nf4"), shape)
        found = numbers(read(checkpoint, name, Bitsandbytes4bit("nf4"), shape))
        # bitsandbytes rounds to the dtype of the original, float16.
        same(found.to(quant_state.dtype).double(), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_type": "fp4"}, 'quant_type "fp4"; expected "nf4"'),
        ({"blocksize": 128}, "blocksize 128; expected 64"),
        ({"blocksize": 64.0}, "blocksize 64.0; expected 64"),
        ({"dtype": "int8"}, 'dtype "int8"; expected "float16" or "bfloat16" or "float32"'),
        ({"shape": [128, 24]}, r"shape \[128, 24\]; expected \[24, 128\]"),
        ({"shape": None}, r"shape null; expected \[24, 128\]"),
        ({"nested_blocksize": 64}, "nested_blocksize 64; expected 256"),
        ({"nested_dtype": "float16"}, 'nested_dtype "float16"; expected "float32"'),
        ({"nested_offset": float("nan")}, "nested_offset NaN; expected a finite number"),
        ({"nested_offset": True}, "nested_offset true; expected a finite number"),
        ({"nested_offset": "0"}, 'nested_offset "0"; expected a finite number'),
        ({"more": 1}, r'"more".*expected blocksize, dtype, nested_blocksize'),
    ],
    ids=str,
)
def test_a_state_that_contradicts_the_layer_is_refused(change: dict[str, Any], message: str) -> None:
    tensors, _ = four_bits((24, 128), "nf4", True)
    state = json.loads(bytes(tensors[NF4_STATE].tolist())) | change
    tensors[NF4_STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    said = refusal(tensors, Bitsandbytes4bit("nf4", nested=True), Shape(24, 128))
    assert f"tensor layer.{NF4_STATE} says" in said
    assert re.search(message, said)


@pytest.mark.parametrize(
    "state", [b"", b"[]", b"{", b"\xff", b'{"shape": [24, 128], "shape": [24, 128]}', b"[" * 99999]
)
def test_a_state_that_is_not_a_json_object_is_refused(state: bytes) -> None:
    tensors, _ = four_bits((24, 128), "nf4", False)
    tensors[NF4_STATE] = torch.tensor(list(state), dtype=torch.uint8)
    said = refusal(tensors, Bitsandbytes4bit("nf4"), Shape(24, 128))
    assert NF4_STATE in said
    assert "expected bitsandbytes' quant_state" in said


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("case", "suffix"),
    [
        ("stored nf4", "weight.absmax"), ("stored nf4", "weight.quant_map"),
        ("stored fp4, nested", "weight.nested_absmax"), ("stored fp4, nested", "weight.nested_quant_map"),
        ("stored 8 bits", "SCB"), ("nf4", "weight"), ("8 bits", "weight"),
    ],
)  # fmt: skip
def test_what_is_not_finite_is_refused(case: str, suffix: str, value: float) -> None:
    format_, make = CASES[case]
    tensors, expected = make()
    tensors[suffix].view(-1)[-1] = value
    said = refusal(tensors, format_, Shape(*expected.shape))
    assert f"tensor layer.{suffix}" in said
    assert "expected finite scales" in said


def test_a_table_of_other_numbers_is_refused() -> None:
    tensors, _ = four_bits((24, 128), "nf4", False)
    tensors["weight.quant_map"] *= 1e20
    said = refusal(tensors, Bitsandbytes4bit("nf4"), Shape(24, 128))
    assert "expected the table of nf4" in said


def test_a_weight_beyond_float16_is_refused_where_it_must_pass_through_it() -> None:
    weight = weight_of((8, 128))
    weight[5, 3] = 1e5
    assert "rounded to float16 as LLM.int8 does" in refusal({"weight": weight}, Quantize8bit(), Shape(8, 128))


@pytest.mark.parametrize(("layout", "name"), [(1, "col32"), (2, "col_turing"), (3, "col_ampere"), (9, "number 9")])
def test_a_layout_of_old_devices_is_refused_by_name(layout: int, name: str) -> None:
    tensors, expected = eight_bits((50, 160))
    tensors["weight_format"] = torch.tensor([layout], dtype=torch.uint8)
    said = refusal(tensors, Bitsandbytes8bit(), Shape(*expected.shape))
    assert "layer.weight_format" in said
    assert f"laid out as {name}; expected row" in said


def test_8_bit_files_may_leave_the_layout_out() -> None:
    tensors, expected = eight_bits((50, 160))
    del tensors["weight_format"]
    close(served(tensors, Bitsandbytes8bit(), Shape(*expected.shape)), expected)


def test_memory_is_what_the_plan_says() -> None:
    for case in CASES.values():
        format_, (tensors, expected) = case[0], case[1]()
        (weight,) = read(source(tensors), "layer", format_, Shape(*expected.shape))
        assert isinstance(weight, QuantizedWeight)
        assert weight.num_bytes == format_.held_bytes(Shape(*expected.shape), 4)


def test_memory_of_a_cut_inside_a_block_is_about_what_the_plan_says() -> None:
    tensors = {"weight": weight_of((24, 5632))}
    (weight,) = read(source(tensors), "layer", Quantize4bit("nf4"), Shape(24, 5632), None, range(1878, 3755))
    assert isinstance(weight, QuantizedWeight)
    index_bytes = 8 * 1877
    planned = Quantize4bit("nf4").held_bytes(Shape(24, 1877), 4)
    assert planned == pytest.approx(weight.num_bytes - index_bytes, rel=0.02)


def test_rounding_is_fast() -> None:
    torch.set_num_threads(1)
    weight = torch.randn(1024, 4096)
    start = time.process_time()
    read(source({"weight": weight}), "layer", Quantize4bit("nf4"), Shape(1024, 4096))
    # A quarter of 16 million values; a small part of this when nothing else runs.
    assert time.process_time() - start < 1.0


def test_a_table_that_is_not_that_of_its_kind_is_refused() -> None:
    """bitsandbytes ignores what a file says; nobody could tell who is right."""
    checkpoint = MODELS / "docs-llama-7m-bnb-nf4"
    source = Checkpoint(read_index(checkpoint))
    name, shape = "model.layers.0.self_attn.q_proj", Shape(256, 256)
    format_ = Bitsandbytes4bit("nf4")
    pieces = {}
    for spec in format_.specs(shape):
        tensor = source[f"{name}.{spec.suffix}"].read()
        pieces[spec.suffix] = Piece(tensor, (0,) * tensor.ndim, f"{checkpoint}: tensor {name}.{spec.suffix}")
    format_.decode(pieces, whole(shape))
    table = pieces["weight.quant_map"]
    pieces["weight.quant_map"] = table._replace(tensor=table.tensor.flip(0))
    with pytest.raises(CheckpointError, match="expected the table of nf4"):
        format_.decode(pieces, whole(shape))
