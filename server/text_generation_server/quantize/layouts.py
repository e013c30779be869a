"""Stored tensors of a quantized linear, in the layouts that other tools read, and the settings that go with them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..quantization.awq import Awq
from ..quantization.bitsandbytes import BLOCK, STATE, Bitsandbytes4bit, Bitsandbytes8bit
from ..quantization.blocks import TABLES, round_rows_to_int8, round_to_table
from ..quantization.format import WeightFormat
from ..quantization.gptq import Gptq
from ..quantization.packing import pack_gemm, pack_words
from ..quantization.spec import Shape
from .rounding import Codes
from .settings import Scheme, Solver, as_regex

HEAD = "lm_head"
Tensors = dict[str, Tensor]


def format_of(scheme: Scheme, layer: str) -> WeightFormat | None:
    """How the layer will be stored; None: as it is."""
    bits = scheme.bits_of(layer)
    if bits is None or layer == HEAD:
        return None
    match scheme.method:
        case "gptq" | "rtn":
            # What holds for any order of groups; it is known when the codes are.
            return Gptq(bits, scheme.group_size, scheme.sym, desc_act=True)
        case "awq":
            return Awq(bits, scheme.group_size, not scheme.sym)
        case "bitsandbytes":
            return Bitsandbytes8bit()
        case _:
            return Bitsandbytes4bit(scheme.method.removeprefix("bitsandbytes-"))


def check_shapes(scheme: Scheme, linears: Mapping[str, Shape]) -> dict[str, WeightFormat]:
    """The formats of all layers that are quantized.

    Raises:
        CheckpointError: one has a shape that its format cannot pack, or there is none; says what to do.
    """
    formats = {}
    for name, shape in linears.items():
        if (format_ := format_of(scheme, name)) is None:
            continue
        try:
            format_.specs(shape)
        except CheckpointError as error:
            kind = name.rsplit(".", 1)[-1]
            raise CheckpointError(f"{name}: {error}; or leave it as it is with --exclude {kind}") from error
        formats[name] = format_
    if not formats:
        raise CheckpointError("every linear is excluded; expected at least one to quantize; see --exclude")
    for flag, patterns in (("--exclude", scheme.excluded), ("--module-bits", [p for p, _ in scheme.module_bits])):
        for pattern in patterns:
            if not any(_means(pattern, name) for name in linears):
                some = ", ".join(list(linears)[:7])
                raise CheckpointError(f"{flag} {pattern!r} means no layer; expected some of {some}, ...")
    return formats


def _means(pattern: str, layer: str) -> bool:
    return Scheme(excluded=(pattern,)).bits_of(layer) is None


def gptq_tensors(codes: Codes) -> Tensors:
    """AutoGPTQ's first layout, in which stored zero points are one less than they are."""
    return {
        "qweight": pack_words(codes.codes, codes.bits).T.contiguous(),
        "qzeros": pack_words((codes.zeros - 1).T.contiguous() & (2**codes.bits - 1), codes.bits),
        "scales": codes.scales.T.contiguous(),
        "g_idx": codes.group_of.to(torch.int32),
    }


def awq_tensors(codes: Codes) -> Tensors:
    """AutoAWQ's `gemm`."""
    return {
        "qweight": pack_gemm(codes.codes.T.contiguous()),
        "qzeros": pack_gemm(codes.zeros.T.contiguous()),
        "scales": codes.scales.T.contiguous(),
    }


def nf4_tensors(weight: Tensor, kind: str, stored_dtype: str) -> Tensors:
    """As transformers saves bitsandbytes' 4 bits, with plain absmax. weight: float [out, in], on the host.

    stored_dtype: of the weight in the model that was quantized: what bitsandbytes dequantizes to.
    """
    table = torch.tensor(TABLES[kind], dtype=torch.float32)
    codes, absmax = round_to_table(weight.reshape(-1), table, BLOCK, is_end=True)
    if len(codes) % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    state = {"quant_type": kind, "blocksize": BLOCK, "dtype": stored_dtype, "shape": list(weight.shape)}
    return {
        "weight": ((codes[::2] << 4) | codes[1::2])[:, None].contiguous(),
        "weight.absmax": absmax,
        "weight.quant_map": table,
        STATE + kind: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def int8_tensors(weight: Tensor) -> Tensors:
    """As transformers saves LLM.int8. weight: float [out, in], on the host."""
    codes, absmax = round_rows_to_int8(weight, range(weight.shape[1]))
    return {
        "weight": (codes ^ 128).view(torch.int8),
        "SCB": absmax,
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def quantization_config(
    scheme: Scheme, solver: Solver, dense: Sequence[str], in_order: bool, version: str, compute_dtype: str
) -> dict[str, Any]:
    """`quantization_config` of config.json. dense: full names of linears that are left as they are, but the head."""
    if scheme.method.startswith("bitsandbytes"):
        return _bitsandbytes_config(scheme, dense, compute_dtype)
    maker = f"text-generation-server:{version}"
    if scheme.method == "awq":
        return {
            "quant_method": "awq", "version": "gemm", "bits": scheme.bits, "group_size": scheme.group_size,
            "zero_point": not scheme.sym, "modules_to_not_convert": list(dense) or None,
        }  # fmt: skip
    dynamic: dict[str, Any] = {f"-:{as_regex(pattern)}": {} for pattern in scheme.excluded}
    dynamic |= {f"+:{as_regex(pattern)}": {"bits": bits} for pattern, bits in scheme.module_bits}
    config: dict[str, Any] = {
        "quant_method": "gptq", "bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.sym,
        "desc_act": not in_order, "checkpoint_format": "gptq", "pack_dtype": "int32", "lm_head": False,
        "true_sequential": True, "meta": {"quantizer": [maker]},
    }  # fmt: skip
    if scheme.method == "gptq":
        config |= {"damp_percent": solver.damping, "static_groups": solver.static_groups}
        config["meta"] |= {"act_order": solver.act_order, "mse": solver.mse}
    else:
        config["meta"] |= {"method": "round to nearest", "mse": solver.mse}
    return config | ({"dynamic": dynamic} if dynamic else {})


def _bitsandbytes_config(scheme: Scheme, dense: Sequence[str], compute_dtype: str) -> dict[str, Any]:
    four = scheme.method != "bitsandbytes"
    config: dict[str, Any] = {
        "quant_method": "bitsandbytes", "load_in_4bit": four, "load_in_8bit": not four, "_load_in_4bit": four,
        "_load_in_8bit": not four, "llm_int8_threshold": 6.0, "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        # A list of names takes the place of transformers' own, which is the head.
        "llm_int8_skip_modules": [*dense, HEAD] if dense else None,
    }  # fmt: skip
    if four:
        kind = scheme.method.removeprefix("bitsandbytes-")
        config |= {
            "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": False, "bnb_4bit_compute_dtype": compute_dtype,
            "bnb_4bit_quant_storage": "uint8",
        }  # fmt: skip
    return config
