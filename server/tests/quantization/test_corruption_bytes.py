"""Nothing that happened to the files of a layer of bitsandbytes or of 8-bit floats is served silently wrong."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from corruption import Case, Tensors, Verdict
from makers import FULL, Matrix
from text_generation_server.quantization.bitsandbytes import (
    Bitsandbytes4bit,
    Bitsandbytes8bit,
    Quantize4bit,
    Quantize8bit,
)
from text_generation_server.quantization.format import WeightFormat
from text_generation_server.quantization.fp8 import Fp8, QuantizeFp8
from text_generation_server.quantization.spec import Shape
from torch import Tensor

# Rows share blocks of 64 and of 128; blocks of 20 x 40 cover neither all rows nor all columns evenly.
SHAPE = Shape(32, 96)
STATE = "weight.quant_state.bitsandbytes__"
FLOAT8 = {"e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def make(format_: WeightFormat, rng: np.random.Generator) -> Tensors:
    """The tensors of a random layer, as the makers' libraries write them."""
    weight = torch.from_numpy(rng.standard_normal(SHAPE)).float()
    match format_:
        case Bitsandbytes4bit(kind, nested, block):
            packed, state = bnb.quantize_4bit(weight, None, None, block, nested, kind)
            return {"weight": packed} | {f"weight.{name}": t for name, t in state.as_dict(packed=True).items()}
        case Bitsandbytes8bit():
            codes, scales, _ = bnb.int8_vectorwise_quant(weight.half())
            return {"weight": codes, "SCB": scales, "weight_format": torch.zeros(1, dtype=torch.uint8)}
        case Fp8():
            down, across = block_of(format_)
            shape = {"tensor": (1,), "channel": (SHAPE.out, 1)}.get(
                format_.scale, (-(-SHAPE.out // down), -(-SHAPE.in_ // across))
            )
            scale = torch.from_numpy(rng.uniform(0.001, 0.1, shape)).float()
            unused = {"input_scale": torch.ones(1)} if format_.input_scale else {}
            return {"weight": (weight * 100).to(FLOAT8[format_.kind]), format_.scale_suffix: scale} | unused
    return {"weight": weight}


def block_of(format_: Fp8) -> tuple[int, int]:
    return {"tensor": SHAPE, "channel": (1, SHAPE.in_)}.get(format_.scale, format_.block)


def meaning(format_: WeightFormat, tensors: Mapping[str, Tensor], shape: Shape) -> Matrix:
    """What the tensors mean, in float64, from the descriptions of the formats and from bitsandbytes."""
    match format_:
        case Bitsandbytes4bit():
            weight = of_stored_4_bits(format_, tensors, shape)
        case Bitsandbytes8bit():
            assert tensors["weight"].dtype == torch.int8 and not tensors.get("weight_format", torch.zeros(1)).any()
            weight = tensors["weight"].double() * tensors["SCB"].double()[:, None] / 127
        case Fp8():
            assert tensors["weight"].dtype == FLOAT8[format_.kind]
            down, across = block_of(format_)
            scale = tensors[format_.scale_suffix].double().reshape(-1, -(-shape.in_ // across))
            scale = scale.repeat_interleave(down, 0)[: shape.out].repeat_interleave(across, 1)[:, : shape.in_]
            weight = tensors["weight"].double() * scale
        case _:
            weight = of_dense(format_, tensors["weight"])
    return weight.numpy()


def of_stored_4_bits(format_: Bitsandbytes4bit, tensors: Mapping[str, Tensor], shape: Shape) -> Tensor:
    state = json.loads(bytes(tensors[STATE + format_.kind].tolist()))
    assert (state["quant_type"], state["blocksize"], state["shape"]) == (format_.kind, format_.block_size, [*shape])
    assert state["dtype"] in ("float32", "float16", "bfloat16")
    absmax = tensors["weight.absmax"]
    if format_.nested:
        assert (state["nested_blocksize"], state["nested_dtype"]) == (256, "float32")
        outer = tensors["weight.nested_absmax"].repeat_interleave(256)[: len(absmax)]
        offset = torch.tensor(state["nested_offset"], dtype=torch.float32)
        absmax = tensors["weight.nested_quant_map"][absmax.long()] * outer + offset
    else:
        assert absmax.is_floating_point()
    packed = tensors["weight"].view(-1)
    assert packed.dtype == torch.uint8
    codes = torch.stack([packed // 16, packed % 16], -1).view(-1).long()
    scales = absmax.double().repeat_interleave(format_.block_size)[: len(codes)]
    return (tensors["weight.quant_map"].double()[codes] * scales).view(shape)


def of_dense(format_: WeightFormat, weight: Tensor) -> Tensor:
    assert weight.isfinite().all() and weight.dtype in (torch.float32, torch.float16, torch.bfloat16)
    match format_:
        case Quantize4bit(kind):
            packed, state = bnb.quantize_4bit(weight, None, None, 64, False, kind)
            # As one row of an even length: for an odd one bitsandbytes compiles, which takes long.
            state.dtype, state.shape = torch.float32, torch.Size((1, 2 * packed.numel()))
            return bnb.dequantize_4bit(packed, state)[0, : weight.numel()].view(weight.shape).double()
        case Quantize8bit():
            codes, scales, _ = bnb.int8_vectorwise_quant(weight.half())
            return codes.double() * scales.double()[:, None] / 127
    scale = weight.float().abs().amax(1, keepdim=True) / 448
    codes = (weight.float() / scale).nan_to_num(0.0).to(torch.float8_e4m3fn)
    return codes.double() * scale.double()


def case_of(format_: WeightFormat, *relatives: WeightFormat) -> Case:
    return Case(format_, SHAPE, partial(make, format_), meaning, tuple(case_of(r) for r in relatives))


NF4, FP4_NESTED = Bitsandbytes4bit("nf4"), Bitsandbytes4bit("fp4", nested=True)
OTHERS_OF_4_BITS = (
    Bitsandbytes4bit("fp4"), Bitsandbytes4bit("nf4", nested=True), Bitsandbytes4bit("nf4", block_size=128),
    Bitsandbytes4bit("fp4", nested=True, block_size=32), Bitsandbytes8bit(), Quantize4bit("nf4"),
)  # fmt: skip
OTHERS_OF_8_BITS = (NF4, Fp8("tensor"), Quantize8bit())
OTHERS_OF_FP8 = (
    Fp8("tensor"), Fp8("channel"), Fp8("channel", kind="e5m2"), Fp8("block", (20, 40)), Fp8("block", (32, 32)),
    Fp8("tensor", scale_suffix="weight_scale_inv"), Fp8("channel", input_scale=True), QuantizeFp8(),
)  # fmt: skip
CASES = [
    case_of(NF4, *OTHERS_OF_4_BITS),
    case_of(FP4_NESTED, *OTHERS_OF_4_BITS),
    case_of(Bitsandbytes8bit(), *OTHERS_OF_8_BITS),
    case_of(Fp8("tensor", input_scale=True), *OTHERS_OF_FP8),
    case_of(Fp8("channel"), *OTHERS_OF_FP8),
    case_of(Fp8("block", (20, 40), scale_suffix="weight_scale_inv"), *OTHERS_OF_FP8),
    case_of(Quantize4bit("nf4"), Quantize4bit("fp4"), NF4),
    case_of(Quantize8bit(), Bitsandbytes8bit()),
    case_of(QuantizeFp8(), Fp8("channel")),
]
if FULL:
    CASES += [
        case_of(Bitsandbytes4bit("nf4", True, 32), *OTHERS_OF_4_BITS), case_of(Quantize4bit("fp4"), NF4),
        case_of(Fp8("channel", kind="e5m2"), *OTHERS_OF_FP8),
    ]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_mutation_is_refused_by_name_or_served_right(case: Case, tmp_path: Path) -> None:
    verdict, seed = Verdict(), 0
    counts = verdict.counts
    while sum(counts.values()) < 300:
        seed += 1
        verdict.judge(case, seed, tmp_path)
    assert not verdict.failures, "\n".join(verdict.failures)
    assert min(counts.values()) >= 50, counts
