"""What the files of a checkpoint say of its quantization: found as every tool writes it, refused where it says less."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from folders import (
    DOWN,
    HEAD,
    STATE,
    K,
    Q,
    awq,
    awq_gemv,
    dense,
    float8,
    float8_blocks,
    float8_rows,
    gptq,
    int8,
    nested,
    nf4,
    packed,
    write,
)  # fmt: skip
from harness import LLAMA, MODELS
from text_generation_server.checkpoint.index import read_index
from text_generation_server.errors import CheckpointError, ShardError
from text_generation_server.planning import ModelPlan, plan_model
from text_generation_server.quantization.awq import Awq
from text_generation_server.quantization.bitsandbytes import (
    Bitsandbytes4bit,
    Bitsandbytes8bit,
    Quantize4bit,
    Quantize8bit,
)
from text_generation_server.quantization.dense import Dense
from text_generation_server.quantization.fp8 import Fp8, QuantizeFp8
from text_generation_server.quantization.gptq import Gptq
from text_generation_server.quantization.pack_quantized import PackQuantized
from text_generation_server.quantization.spec import Shape

FULL = bool(os.environ.get("FULL"))
AUTOGPTQ = {
    "bits": 4, "group_size": 64, "damp_percent": 0.1, "desc_act": False, "sym": True, "true_sequential": True,
    "model_name_or_path": None, "model_file_base_name": "model",
}  # fmt: skip
GPTQMODEL = {
    "bits": 4, "group_size": 64, "desc_act": True, "sym": True, "lm_head": False, "quant_method": "gptq",
    "checkpoint_format": "gptq_v2", "pack_dtype": "int32",
    "meta": {"quantizer": ["gptqmodel:2.2.0"], "uri": "https://github.com/modelcloud/gptqmodel"},
}  # fmt: skip
OPTIMUM = {
    "batch_size": 1, "bits": 4, "block_name_to_quantize": "model.layers", "cache_block_outputs": True,
    "damp_percent": 0.1, "dataset": None, "desc_act": False, "exllama_config": {"version": 1}, "group_size": 64,
    "max_input_length": None, "model_seqlen": 2048, "module_name_preceding_first_block": ["model.embed_tokens"],
    "modules_in_block_to_quantize": [["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"], ["mlp.down_proj"]],
    "pad_token_id": None, "quant_method": "gptq", "sym": True, "tokenizer": None, "true_sequential": True,
    "use_cuda_fp16": True, "use_exllama": True,
}  # fmt: skip
THEBLOKE = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
AWQ = {"bits": 4, "group_size": 64, "quant_method": "awq", "version": "gemm", "zero_point": True}
BNB = {
    "_load_in_4bit": True, "_load_in_8bit": False, "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8", "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False,
    "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False, "llm_int8_skip_modules": None,
    "llm_int8_threshold": 6.0, "load_in_4bit": True, "load_in_8bit": False, "quant_method": "bitsandbytes",
}  # fmt: skip
BNB8 = BNB | {"_load_in_4bit": False, "load_in_4bit": False, "_load_in_8bit": True, "load_in_8bit": True}
DEEPSEEK = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
AUTOFP8 = {"activation_scheme": "static", "ignored_layers": ["lm_head"], "quant_method": "fp8"}
FBGEMM = {
    "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head", DOWN], "quant_method": "fbgemm_fp8",
}  # fmt: skip


def compressed(weights: dict[str, Any], format_: str = "pack-quantized", **changes: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "config_groups": {"group_0": group | changes.pop("group", {})}, "format": format_, "ignore": ["lm_head"],
        "global_compression_ratio": 1.5, "kv_cache_scheme": None, "quant_method": "compressed-tensors",
        "quantization_status": "frozen",
    } | changes  # fmt: skip


INT4 = {
    "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64, "block_structure": None,
    "dynamic": False, "actorder": None, "observer": "minmax", "observer_kwargs": {},
}  # fmt: skip
FP8 = INT4 | {"num_bits": 8, "type": "float", "strategy": "tensor", "group_size": None}
TGI = {"gptq_bits=4": ("I64", (1,)), "gptq_groupsize=64": ("I64", (1,))}
TOKENS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}

G4 = Gptq(4, 64, sym=True, desc_act=False)
A4 = Awq(4, 64, zero_point=True, version="gemm")
BY_INDEX = Gptq(4, 64, sym=False, desc_act=True)

# What writes it: the folder, the beginning of the line, and formats by layer.
DETECTED: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "AutoGPTQ": (
        {"linear": gptq, "files": {"quantize_config.json": AUTOGPTQ}},
        "gptq: 4 bits, groups of 64, symmetric, no act-order (quantize_config.json)",
        {Q: G4, HEAD: Dense()},
    ),
    "AutoGPTQ, both files": (
        {"linear": gptq, "files": {"quantize_config.json": AUTOGPTQ}, "config": OPTIMUM},
        "gptq: 4 bits, groups of 64, symmetric, no act-order (config.json, quantize_config.json)",
        {Q: G4, "model.layers.0.mlp.gate_proj": G4},
    ),
    "AutoGPTQ before sym": (
        {
            "linear": partial(gptq, bits=8, group=-1),
            "files": {"quantize_config.json": {"bits": 8, "group_size": -1, "desc_act": True}},
        },
        "gptq: 8 bits, one group, zero points as stored, act-order (quantize_config.json)",
        {Q: Gptq(8, -1, sym=False, desc_act=True)},
    ),
    "GPTQModel": (
        {"linear": gptq, "config": GPTQMODEL, "files": {"quantize_config.json": GPTQMODEL}},
        "gptq: 4 bits, groups of 64, symmetric, act-order, gptq_v2 (config.json, quantize_config.json)",
        {Q: Gptq(4, 64, sym=True, desc_act=True, checkpoint_format="gptq_v2", zeros_borrow=True)},
    ),
    "GPTQModel with a quantized head": (
        {
            "linear": gptq,
            "config": GPTQMODEL | {"lm_head": True, "checkpoint_format": "gptq"},
            "others": {HEAD: gptq},
        },
        "gptq: 4 bits",
        {HEAD: Gptq(4, 64, sym=True, desc_act=True, zeros_borrow=True)},
    ),
    "GPTQModel's dynamic": (
        {
            "linear": gptq,
            "config": GPTQMODEL
            | {
                "checkpoint_format": "gptq",
                "dynamic": {
                    r"+:.*\.mlp\.(?:gate|up)_proj": {"bits": 8, "group_size": 32, "desc_act": False, "mse": 0.5},
                    r"-:.*\.down_proj$": {},
                    r".*\.k_proj": False,
                    r".*\.(k|v)_proj": {"sym": False},
                },
            },
            "others": {
                "model.layers.0.mlp.gate_proj": partial(gptq, bits=8, group=32),
                "model.layers.0.mlp.up_proj": partial(gptq, bits=8, group=32),
                DOWN: dense,
                K: dense,
            },
        },
        "gptq: 4 bits, groups of 64, symmetric, act-order, 4 rules for layers (config.json)",
        {
            "model.layers.0.mlp.gate_proj": Gptq(8, 32, sym=True, desc_act=False, zeros_borrow=True),
            DOWN: Dense(),
            K: Dense(),
            "model.layers.0.self_attn.v_proj": Gptq(4, 64, sym=False, desc_act=True, zeros_borrow=True),
            Q: Gptq(4, 64, sym=True, desc_act=True, zeros_borrow=True),
        },
    ),
    "Optimum": (
        {"linear": gptq, "config": OPTIMUM, "others": {"model.layers.0.self_attn.o_proj": dense}},
        "gptq: 4 bits, groups of 64, symmetric, no act-order (config.json); not quantized: ",
        {Q: G4, "model.layers.0.self_attn.o_proj": Dense()},
    ),
    "TGI's own quantizer": (
        {"linear": gptq, "extra": TGI},
        "gptq: 4 bits, groups of 64, zero points as stored, act-order as g_idx says (tensors gptq_bits, ",
        {Q: BY_INDEX},
    ),
    "TGI's own quantizer, symmetric": (
        {"linear": gptq, "extra": TGI | {"gptq_sym=1": ("BOOL", (1,))}},
        "gptq: 4 bits, groups of 64, symmetric, act-order as g_idx says (tensors gptq_bits, gptq_groupsize, gptq_sym)",
        {Q: Gptq(4, 64, sym=True, desc_act=True)},
    ),
    "one module left as it is": (
        {"linear": gptq, "files": {"quantize_config.json": AUTOGPTQ}, "others": {DOWN: dense}},
        "gptq: 4 bits, groups of 64, symmetric, no act-order (quantize_config.json); not quantized: "
        "model.layers.*.mlp.down_proj, lm_head",
        {DOWN: Dense(), Q: G4},
    ),
    "AutoAWQ": (
        {"linear": awq, "files": {"quant_config.json": THEBLOKE}},
        "awq: 4 bits, groups of 64, zero points, gemm (quant_config.json)",
        {Q: A4, HEAD: Dense()},
    ),
    "AutoAWQ, both files": (
        {"linear": awq, "files": {"quant_config.json": THEBLOKE}, "config": AWQ},
        "awq: 4 bits, groups of 64, zero points, gemm (config.json, quant_config.json)",
        {Q: A4},
    ),
    "AutoAWQ in quantize_config.json": (
        {"linear": awq, "files": {"quantize_config.json": THEBLOKE}},
        "awq: 4 bits, groups of 64, zero points, gemm (quantize_config.json)",
        {Q: A4},
    ),
    "AutoAWQ's gemv, skipping": (
        {
            "linear": awq_gemv,
            "config": AWQ | {"version": "gemv", "group_size": 128, "modules_to_not_convert": ["down_proj"]},
            "others": {DOWN: dense},
        },
        "awq: 4 bits, groups of 128, zero points, gemv (config.json)",
        {Q: Awq(4, 128, zero_point=True, version="gemv"), DOWN: Dense()},
    ),
    "GPTQModel's awq": (
        {
            "linear": awq,
            "config": GPTQMODEL
            | {"quant_method": "awq", "method": "awq", "checkpoint_format": "gemm", "format": "gemm"}
            | {"zero_point": True, "desc_act": False},
        },
        "awq: 4 bits, groups of 64, zero points, gemm (config.json)",
        {Q: A4},
    ),
    "bitsandbytes nf4": (
        {"linear": nf4, "config": BNB},
        "bitsandbytes-nf4: 4 bits, nf4 (config.json)",
        {Q: Bitsandbytes4bit("nf4"), HEAD: Dense()},
    ),
    "bitsandbytes fp4 in blocks of 128, nothing else said": (
        {
            "linear": partial(nf4, state=STATE | {"quant_type": "fp4", "blocksize": 128}),
            "config": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        },
        "bitsandbytes-fp4: 4 bits, fp4 (config.json)",
        {Q: Bitsandbytes4bit("fp4", block_size=128)},
    ),
    "bitsandbytes nested": (
        {"linear": nested, "config": BNB | {"bnb_4bit_use_double_quant": True}},
        "bitsandbytes-nf4: 4 bits, nf4, nested absmax (config.json)",
        {Q: Bitsandbytes4bit("nf4", nested=True)},
    ),
    "bitsandbytes with a skip list of its own": (
        {
            "linear": nf4,
            "config": BNB | {"llm_int8_skip_modules": ["model.layers.0.mlp", "k_proj"]},
            "others": {"model.layers.0.mlp.gate_proj": dense, "model.layers.0.mlp.up_proj": dense}
            | {DOWN: dense, K: dense, HEAD: nf4},
        },
        "bitsandbytes-nf4: 4 bits, nf4 (config.json)",
        {Q: Bitsandbytes4bit("nf4"), K: Dense(), DOWN: Dense(), HEAD: Bitsandbytes4bit("nf4")},
    ),
    "bitsandbytes 8 bits": (
        {"linear": int8, "config": BNB8},
        "bitsandbytes: 8 bits, one scale for each output, outliers from 6 (config.json)",
        {Q: Bitsandbytes8bit()},
    ),
    "compressed-tensors int4": (
        {"linear": packed, "config": compressed(INT4)},
        "compressed-tensors: pack-quantized int4, groups of 64 (config.json)",
        {Q: PackQuantized(4, 64, symmetric=True), HEAD: Dense()},
    ),
    "compressed-tensors under its former key": (
        {"linear": packed, "config": compressed(INT4), "key": "compression_config"},
        "compressed-tensors: pack-quantized int4, groups of 64 (config.json)",
        {Q: PackQuantized(4, 64, symmetric=True)},
    ),
    "compressed-tensors int8 by channel": (
        {
            "linear": partial(packed, bits=8, group=-1),
            "config": compressed(INT4 | {"num_bits": 8, "strategy": "channel", "group_size": None}),
        },
        "compressed-tensors: pack-quantized int8, one group (config.json)",
        {Q: PackQuantized(8, -1, symmetric=True)},
    ),
    "compressed-tensors of two schemes": (
        {
            "linear": packed,
            "others": {DOWN: float8, K: dense},
            "config": compressed(INT4)
            | {
                "format": "mixed-precision",
                "ignore": ["lm_head", r"re:.*\.k_proj"],
                "config_groups": {
                    "group_0": {"targets": ["Linear"], "weights": INT4, "format": "pack-quantized"},
                    "group_1": {
                        "targets": [r"re:.*\.down_proj$"],
                        "weights": FP8,
                        "format": "float-quantized",
                        "input_activations": TOKENS,
                    },
                },
            },
        },
        "compressed-tensors: pack-quantized int4, groups of 64; 8-bit floats, scales of the tensor (config.json)",
        {Q: PackQuantized(4, 64, symmetric=True), DOWN: Fp8("tensor"), K: Dense()},
    ),
    "compressed-tensors fp8": (
        {
            "linear": float8_rows,
            "config": compressed(FP8 | {"strategy": "channel"}, "float-quantized", group={"input_activations": TOKENS}),
        },
        "compressed-tensors: 8-bit floats, scales of each output (config.json)",
        {Q: Fp8("channel")},
    ),
    "DeepSeek": (
        {"linear": float8_blocks, "config": DEEPSEEK | {"scale_fmt": "ue8m0"}},
        "fp8: 8-bit floats, scales of blocks of 128 x 128, activations not quantized (config.json)",
        {Q: Fp8("block", (128, 128), scale_suffix="weight_scale_inv"), HEAD: Dense()},
    ),
    "AutoFP8": (
        {"linear": lambda out, in_: float8(out, in_) | {"input_scale": ("F32", ())}, "config": AUTOFP8},
        "fp8: 8-bit floats, scales of the tensor or each output, as stored, activations not quantized (config.json)",
        {Q: Fp8("tensor", input_scale=True), HEAD: Dense()},
    ),
    "fbgemm": (
        {"linear": float8_rows, "config": FBGEMM, "others": {DOWN: dense}},
        "fp8: 8-bit floats, scales of each output, activations not quantized (config.json)",
        {Q: Fp8("channel"), DOWN: Dense()},
    ),
    "a key that nobody knows": (
        {"linear": awq, "config": AWQ | {"colour": "red"}},
        "awq: 4 bits, groups of 64, zero points, gemm (config.json; unknown keys without effect: colour)",
        {Q: A4},
    ),
    "a key that nobody knows in a rule for layers": (
        {"linear": gptq, "config": GPTQMODEL | {"dynamic": {r".*\.up_proj": {"colour": "red"}}}},
        "gptq: 4 bits, groups of 64, symmetric, act-order, gptq_v2, 1 rules for layers (config.json; unknown keys "
        "without effect: dynamic: colour)",
        {Q: Gptq(4, 64, sym=True, desc_act=True, checkpoint_format="gptq_v2", zeros_borrow=True)},
    ),
}


def formats(plan: ModelPlan) -> dict[str, Any]:
    return {name: linear.format for name, linear in plan.linears.items()}


@pytest.mark.parametrize("case", DETECTED)
def test_the_settings_are_found_as_the_tool_wrote_them(case: str, tmp_path: Path) -> None:
    folder, line, expected = DETECTED[case]
    plan = plan_model(write(tmp_path, **folder), world_size=1)
    assert plan.describe_quantization().startswith(line)
    found = formats(plan)
    assert {name: found[name] for name in expected} == expected
    assert plan.quantization.method == line.split(":")[0]


@pytest.mark.parametrize("case", DETECTED)
def test_a_flag_that_names_what_was_found_changes_nothing(case: str, tmp_path: Path) -> None:
    folder, line, _ = DETECTED[case]
    write(tmp_path, **folder)
    method = line.split(":")[0]
    assert formats(plan_model(tmp_path, world_size=1, quantize=method)) == formats(plan_model(tmp_path, world_size=1))


@pytest.mark.parametrize("case", DETECTED)
def test_a_flag_that_contradicts_the_files_is_refused(case: str, tmp_path: Path) -> None:
    folder, line, _ = DETECTED[case]
    write(tmp_path, **folder)
    method = line.split(":")[0]
    names = ["awq", "compressed-tensors", "gptq", "bitsandbytes", "bitsandbytes-nf4", "bitsandbytes-fp4", "fp8"]
    for other in names:
        if other != method:
            with pytest.raises(ShardError, match=f"--quantize {other}, but .*{method}: .*leave the flag out"):
                plan_model(tmp_path, world_size=1, quantize=other)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("model", sorted(MODELS.glob("*-llama-7m-*")), ids=lambda path: path.name)
def test_the_shipped_quantized_models_are_planned(model: Path, size: int) -> None:
    plan = plan_model(model, world_size=size, dtype="float32")
    assert plan.weight_bytes == sum(info.num_bytes for info in plan.index.values())
    whole = plan_model(model, world_size=1, dtype="float32").weight_bytes_per_rank
    assert whole / size <= plan.weight_bytes_per_rank < whole / size * 1.1
    assert plan.weight_bytes_per_rank < plan_model(LLAMA, world_size=size, dtype="float32").weight_bytes_per_rank
    assert "(config.json" in plan.describe_quantization()


ON_THE_FLY = {
    "bitsandbytes": Quantize8bit(),
    "bitsandbytes-nf4": Quantize4bit("nf4"),
    "bitsandbytes-fp4": Quantize4bit("fp4"),
    "fp8": QuantizeFp8(),
}


@pytest.mark.parametrize("method", ON_THE_FLY)
def test_plain_weights_are_quantized_on_demand_but_for_the_head(method: str) -> None:
    plan = plan_model(LLAMA, world_size=2, quantize=method)
    assert formats(plan) == {name: Dense() if name == HEAD else ON_THE_FLY[method] for name in plan.linears}
    assert plan.describe_quantization().startswith(f"{method}: quantized to ")


def test_flags_say_what_no_file_says(tmp_path: Path) -> None:
    plan = plan_model(write(tmp_path, gptq), world_size=1, gptq_bits=4, gptq_groupsize=64)
    assert formats(plan)[Q] == BY_INDEX
    assert plan.describe_quantization().startswith(
        "gptq: 4 bits, groups of 64, zero points as stored, act-order as g_idx says (--gptq-bits --gptq-groupsize)"
    )


def test_flags_that_repeat_the_files_change_nothing(tmp_path: Path) -> None:
    plan = plan_model(write(tmp_path, gptq, OPTIMUM), world_size=1, gptq_bits=4, gptq_groupsize=64, quantize="gptq")
    assert formats(plan)[Q] == G4


GPTQ_FILES = {"quantize_config.json": AUTOGPTQ}


def without(values: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


# A folder, arguments, and what the message must say.
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "gptq asked of plain weights": ({"linear": dense}, {"quantize": "gptq"}, [
        "--quantize gptq", "not quantized", "quantize_config.json", "leave the flag out", "bitsandbytes-nf4"]),
    "awq asked of plain weights": ({"linear": dense}, {"quantize": "awq"}, ["--quantize awq", "not quantized"]),
    "eetq asked": ({"linear": dense}, {"quantize": "eetq"}, ["--quantize eetq", "not served", "bitsandbytes"]),
    "exl2 asked": ({"linear": dense}, {"quantize": "exl2"}, ["--quantize exl2", "not served", "gptq or awq"]),
    "marlin asked": ({"linear": gptq, "config": OPTIMUM}, {"quantize": "marlin"}, [
        "--quantize marlin", "not served", "gptq checkpoint"]),
    "nobody knows what was asked": ({"linear": dense}, {"quantize": "int7"}, ["--quantize int7 is unknown", "fp8"]),
    "bits given for plain weights": ({"linear": dense}, {"gptq_bits": 4}, ["--gptq-bits", "no .qweight tensors"]),
    "bits against a file": ({"linear": gptq, "config": OPTIMUM}, {"gptq_bits": 8}, [
        "quantization_config.bits is 4", "--gptq-bits is 8", "correct or remove"]),
    "bits against another method": ({"linear": awq, "config": AWQ}, {"gptq_bits": 4}, [
        "config.json says", "awq", "--gptq-bits that it is gptq"]),
    "bits alone": ({"linear": gptq}, {"gptq_bits": 4}, ["group_size", "--gptq-groupsize", "--gptq-bits"]),
    "no settings: gptq or awq": ({"linear": gptq}, {}, [
        ".qweight", "looked for config.json (quantization_config, compression_config), quantize_config.json, "
        "quant_config.json", "--gptq-bits and --gptq-groupsize"]),
    "no settings, gptq asked": ({"linear": gptq}, {"quantize": "gptq"}, [".qweight", "looked for config.json"]),
    "no settings: compressed-tensors": ({"linear": packed}, {}, [".weight_packed", "compressed-tensors"]),
    "no settings: bitsandbytes": ({"linear": nf4}, {}, ["self_attn.q_proj.weight", "looked for"]),
    "no settings: fp8": ({"linear": float8}, {}, ["F8_E4M3", "looked for config.json"]),
    "no settings, 8 bits asked": ({"linear": int8}, {"quantize": "bitsandbytes"}, ["I8", "looked for"]),
    "no settings: Marlin": ({"linear": lambda out, in_: {"B": ("I32", (in_ // 16, out * 2)), "s": ("F16", (1, out))}},
        {}, [".B ", "marlin", "gptq checkpoint"]),
    "no settings: AQLM": ({"linear": lambda out, in_: {"codes": ("I8", (out, in_ // 8, 1)), "codebooks":
        ("F16", (1, 256, 1, 8)), "scales": ("F16", (out, 1, 1, 1))}}, {}, [".codebooks", "aqlm"]),
    "no settings: EXL2": ({"linear": lambda out, in_: {"q_weight": ("I32", (in_, out))}}, {}, [".q_weight", "exl2"]),
    "settings of plain weights": ({"linear": dense, "config": OPTIMUM}, {}, [
        "config.json says", "gptq", "no tensor is packed", "remove the settings"]),
    "two files, two methods": ({"linear": gptq, "config": AWQ, "files": GPTQ_FILES}, {}, [
        "config.json says", "awq", "quantize_config.json that it is gptq"]),
    "two files, two bits": ({"linear": gptq, "config": OPTIMUM | {"bits": 8}, "files": GPTQ_FILES}, {}, [
        "config.json: quantization_config.bits is 8", "quantize_config.json: bits is 4"]),
    "two files, two orders": ({"linear": gptq, "config": OPTIMUM | {"desc_act": True}, "files": GPTQ_FILES}, {}, [
        "quantization_config.desc_act is True", "quantize_config.json: desc_act is False"]),
    "two files, two group sizes": ({"linear": awq, "config": AWQ, "files": {"quant_config.json": THEBLOKE |
        {"q_group_size": 128}}}, {}, ["group_size is 64", "quant_config.json: q_group_size is 128"]),
    "one file, two formats": ({"linear": gptq, "config": GPTQMODEL | {"format": "gptq"}}, {}, [
        "checkpoint_format is 'gptq_v2'", "format is 'gptq'"]),
    "tensors against a file": ({"linear": gptq, "files": GPTQ_FILES, "extra": {"gptq_bits=8": ("I64", (1,))}}, {}, [
        "quantize_config.json: bits is 4", "tensor gptq_bits is 8"]),
    "tensors of two numbers": ({"linear": gptq, "extra": {"gptq_bits": ("I64", (2,))}}, {}, [
        "tensor gptq_bits", "[2]", "one whole number"]),
    "tensors say bits alone": ({"linear": gptq, "extra": {"gptq_bits=4": ("I64", (1,))}}, {}, [
        "group_size", "gptq_bits", "--gptq-groupsize"]),
    "no bits": ({"linear": gptq, "files": {"quantize_config.json": without(AUTOGPTQ, "bits")}}, {}, [
        "nothing says bits", "quantize_config.json", "--gptq-bits"]),
    "no group size": ({"linear": gptq, "files": {"quantize_config.json": without(AUTOGPTQ, "group_size")}}, {}, [
        "nothing says group_size", "--gptq-groupsize"]),
    "no order, no index": ({"linear": partial(gptq, index=False), "files": {"quantize_config.json":
        without(AUTOGPTQ, "desc_act")}}, {}, ["desc_act", "g_idx", "true or false"]),
    "no method": ({"linear": gptq, "config": {"bits": 4, "group_size": 64}}, {}, [
        "nothing names the method", "bits, group_size", "quant_method"]),
    "an unknown method": ({"linear": gptq, "config": OPTIMUM | {"quant_method": "magic"}}, {}, [
        "magic, which is unknown", "compressed-tensors"]),
    "a method that is no name": ({"linear": gptq, "config": OPTIMUM | {"quant_method": 4}}, {}, ["quant_method is 4"]),
    "settings that are no object": ({"linear": gptq, "config": "gptq"}, {}, ["quantization_config", "an object"]),
    "5 bits": ({"linear": gptq, "config": OPTIMUM | {"bits": 5}}, {}, ["bits is 5", "2, 3, 4, 8"]),
    "bits as text": ({"linear": gptq, "config": OPTIMUM | {"bits": "4"}}, {}, ["bits is '4'", "2, 3, 4, 8"]),
    "groups of 0": ({"linear": gptq, "config": OPTIMUM | {"group_size": 0}}, {}, ["group_size is 0", "-1 for one"]),
    "bits that the tensors deny": ({"linear": gptq, "config": OPTIMUM | {"bits": 8}}, {}, [
        "q_proj.qweight has shape [16, 128]", "[32, 128]"]),
    "groups that the tensors deny": ({"linear": gptq, "config": OPTIMUM | {"group_size": 32}}, {}, [
        "q_proj.qzeros has shape [2, 16]", "[4, 16]"]),
    "a missing tensor": ({"linear": lambda out, in_: without(gptq(out, in_), "scales"), "config": OPTIMUM}, {}, [
        "q_proj.scales is missing"]),
    "both plain and packed": ({"linear": lambda out, in_: gptq(out, in_) | dense(out, in_), "config": OPTIMUM}, {}, [
        "q_proj.weight", "not part of"]),
    "gptq for Marlin": ({"linear": gptq, "config": OPTIMUM | {"is_marlin_format": True}}, {}, [
        "is_marlin_format is True", "False"]),
    "gptq for BitBLAS": ({"linear": gptq, "config": OPTIMUM | {"checkpoint_format": "bitblas"}}, {}, [
        "checkpoint_format is 'bitblas'", "gptq, gptq_v2", "made from"]),
    "words of 64 bits": ({"linear": gptq, "config": GPTQMODEL | {"pack_dtype": "int64"}}, {}, ["pack_dtype", "int32"]),
    "GPTQModel without a format": ({"linear": gptq, "config": without(GPTQMODEL, "checkpoint_format")}, {}, [
        "nothing says format", "checkpoint_format"]),
    "turned weights": ({"linear": gptq, "config": GPTQMODEL | {"rotation": "hadamard"}}, {}, ["rotation", "hadamard"]),
    "an adapter": ({"linear": gptq, "config": GPTQMODEL | {"adapter": {"name": "lora"}}}, {}, ["adapter", "lora"]),
    "the method marlin": ({"linear": gptq, "config": {"quant_method": "marlin", "group_size": 128}}, {}, [
        "marlin is not served", "gptq checkpoint"]),
    "the method aqlm": ({"linear": dense, "config": {"quant_method": "aqlm", "num_codebooks": 1}}, {}, [
        "aqlm is not served", "--quantize bitsandbytes"]),
    "the method exl2": ({"linear": dense, "config": {"quant_method": "exl2", "bits": 4.0}}, {}, ["exl2 is not served"]),
    "the method eetq": ({"linear": int8, "config": {"quant_method": "eetq", "weights": "int8"}}, {}, ["eetq is not"]),
    "the method hqq": ({"linear": dense, "config": {"quant_method": "hqq"}}, {}, ["hqq is not served"]),
    "gemv_fast": ({"linear": awq, "config": AWQ | {"version": "gemv_fast"}}, {}, [
        "version is 'gemv_fast'", "gemm, gemv", "AutoAWQ"]),
    "llm-awq": ({"linear": awq, "config": AWQ | {"backend": "llm-awq"}}, {}, ["backend is 'llm-awq'", "gemm"]),
    "awq of 8 bits": ({"linear": awq, "config": AWQ | {"bits": 8}}, {}, ["bits is 8", "expected 4"]),
    "awq without a layout": ({"linear": awq, "config": without(AWQ, "version")}, {}, ["format", "gemm or gemv"]),
    "awq without zero_point": ({"linear": awq, "config": without(AWQ, "zero_point")}, {}, ["zero_point"]),
    "bitsandbytes in words": ({"linear": nf4, "config": BNB | {"bnb_4bit_quant_storage": "bfloat16"}}, {}, [
        "bnb_4bit_quant_storage is 'bfloat16'", "uint8"]),
    "bitsandbytes of no kind": ({"linear": nf4, "config": without(BNB, "bnb_4bit_quant_type")}, {}, ["nf4 or fp4"]),
    "bitsandbytes of another kind": ({"linear": nf4, "config": BNB | {"bnb_4bit_quant_type": "fp4"}}, {}, [
        "bitsandbytes__fp4 is missing"]),
    "bitsandbytes 4 and 8": ({"linear": nf4, "config": {"load_in_4bit": True, "load_in_8bit": True}}, {}, ["both"]),
    "bitsandbytes of neither": ({"linear": nf4, "config": {"quant_method": "bitsandbytes"}}, {}, ["neither"]),
    "bitsandbytes with fp16 weights": ({"linear": int8, "config": BNB8 | {"llm_int8_has_fp16_weight": True}}, {}, [
        "llm_int8_has_fp16_weight is True"]),
    "a broken quant_state": ({"linear": lambda out, in_: without(nf4(out, in_), *(n for n in nf4(out, in_) if "state"
        in n)) | {"weight.quant_state.bitsandbytes__nf4={": ("U8", (9,))}, "config": BNB}, {}, ["is not JSON"]),
    "a blocksize of 63": ({"linear": partial(nf4, state=STATE | {"blocksize": 63}), "config": BNB}, {}, [
        "blocksize 63", "power of two"]),
    "W8A8": ({"linear": packed, "config": compressed(INT4 | {"num_bits": 8}, "int-quantized")}, {}, [
        "format is 'int-quantized'", "pack-quantized"]),
    "integer activations": ({"linear": packed, "config": compressed(INT4, group={"input_activations": INT4})}, {}, [
        "input_activations.type is 'int'", "float"]),
    "rounded outputs": ({"linear": packed, "config": compressed(INT4, group={"output_activations": FP8})}, {}, [
        "output_activations"]),
    "sparse weights": ({"linear": packed, "config": compressed(INT4, sparsity_config={"format": "sparse-24-bitmask"})},
        {}, ["sparsity_config", "sparse-24-bitmask"]),
    "transforms": ({"linear": packed, "config": compressed(INT4, transform_config={"config_groups": {"R4": {}}})}, {}, [
        "transform_config", "R4"]),
    "a quantized cache": ({"linear": packed, "config": compressed(INT4, kv_cache_scheme=FP8)}, {}, ["kv_cache_scheme"]),
    "not compressed": ({"linear": packed, "config": compressed(INT4, quantization_status="calibration")}, {}, [
        "quantization_status is 'calibration'", "compressed, frozen"]),
    "marlin-24": ({"linear": packed, "config": compressed(INT4, "marlin-24")}, {}, ["'marlin-24'"]),
    "nvfp4": ({"linear": packed, "config": compressed(INT4, "nvfp4-pack-quantized")}, {}, ["nvfp4-pack-quantized"]),
    "a strategy": ({"linear": packed, "config": compressed(INT4 | {"strategy": "tensor_group"})}, {}, [
        "strategy is 'tensor_group'", "group, channel"]),
    "5 bits of compressed-tensors": ({"linear": packed, "config": compressed(INT4 | {"num_bits": 5})}, {}, [
        "num_bits is 5"]),
    "blocks of integers": ({"linear": packed, "config": compressed(INT4 | {"block_structure": [8, 8]})}, {}, [
        "block_structure is [8, 8]"]),
    "no targets": ({"linear": packed, "config": compressed(INT4, group={"targets": None})}, {}, ["says targets"]),
    "no groups": ({"linear": packed, "config": compressed(INT4, config_groups={})}, {}, ["config_groups"]),
    "a preset by name": ({"linear": packed, "config": compressed(INT4, config_groups={"W4A16": ["Linear"]})}, {}, [
        "config_groups", "W4A16"]),
    "fp8 of two fields": ({"linear": float8_blocks, "config": DEEPSEEK | {"weight_block_size": [128]}}, {}, [
        "weight_block_size is [128]", "[128, 128]"]),
    "fp8 with a scale of another type": ({
        "linear": lambda out, in_: float8(out, in_) | {"weight_scale": ("F64", ())},
        "config": AUTOFP8}, {}, ["weight_scale has dtype F64; expected"]),
    "fp8 of sizes that nobody writes": ({"linear": float8_blocks, "config": DEEPSEEK | {"weight_block_size":
        [144, 128]}}, {}, ["weight_block_size is [144, 128]", "powers of two"]),
    "fp8 blocks that the tensors deny": ({"linear": float8_blocks, "config": DEEPSEEK | {"weight_block_size":
        [64, 128]}}, {}, ["weight_scale_inv has shape [1, 1]", "[2, 1]"]),
    "a pattern that is none": ({"linear": gptq, "config": GPTQMODEL | {"dynamic": {"+:(": {"bits": 8}}}}, {}, [
        "dynamic", "'('", "at 1"]),
    "a pattern that looks back": ({"linear": gptq, "config": GPTQMODEL | {"dynamic": {"(a)\\1": {}}}}, {}, ["\\1"]),
    "a pattern too long": ({"linear": packed, "config": compressed(INT4, ignore=["re:" + "a" * 2000])}, {}, [
        "ignore", "2000 characters"]),
    "rules that are no object": ({"linear": gptq, "config": GPTQMODEL | {"dynamic": ["a"]}}, {}, ["dynamic"]),
    "a rule of 5 bits": ({"linear": gptq, "config": GPTQMODEL | {"dynamic": {".*q_proj": {"bits": 5}}}}, {}, [
        "dynamic['.*q_proj'].bits is 5"]),
    "names that are no names": ({"linear": awq, "config": AWQ | {"modules_to_not_convert": [4]}}, {}, [
        "modules_to_not_convert is [4]", "a list of names"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_known_or_served_is_refused_at_once(case: str, tmp_path: Path) -> None:
    folder, arguments, parts = REFUSED[case]
    write(tmp_path, **folder)
    begin = time.monotonic()
    with pytest.raises(ShardError) as error:
        plan_model(tmp_path, world_size=1, **arguments)
    assert time.monotonic() - begin < 5
    message = str(error.value)
    assert [part for part in parts if part not in message] == [], message
    assert "\n" not in message


def test_a_layer_left_out_by_the_rules_but_packed_is_served_by_its_tensors(tmp_path: Path) -> None:
    plan = plan_model(write(tmp_path, awq, AWQ | {"modules_to_not_convert": ["down_proj"]}), world_size=1)
    assert formats(plan)[DOWN] == A4


def test_the_command_refuses_in_less_than_ten_seconds_without_importing_torch(tmp_path: Path) -> None:
    write(tmp_path, gptq)
    code = (
        "import sys; from text_generation_server import cli\n"
        f"sys.argv = ['server', 'plan', {str(tmp_path)!r}]\n"
        "try:\n    cli.main()\nfinally:\n    sys.stdout.write(str('torch' in sys.modules))"
    )
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, timeout=60,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert time.monotonic() - begin < 10
    assert (done.returncode, done.stdout) == (1, "False")
    (line,) = done.stderr.splitlines()
    assert "--gptq-bits and --gptq-groupsize" in line


def test_planning_a_quantized_model_does_not_import_torch() -> None:
    code = (
        "import sys; from pathlib import Path; from text_generation_server.planning import plan_model\n"
        f"[plan_model(p, world_size=2) for p in Path({str(MODELS)!r}).iterdir()]\n"
        f"plan_model(Path({str(LLAMA)!r}), world_size=2, quantize='fp8'); sys.exit('torch' in sys.modules)"
    )
    environment = {"PYTHONPATH": ":".join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=60).returncode == 0


def test_the_same_settings_twice_in_one_file_are_refused(tmp_path: Path) -> None:
    write(tmp_path, gptq, files={"quantize_config.json": AUTOGPTQ})
    text = json.dumps(AUTOGPTQ)
    (tmp_path / "quantize_config.json").write_text(text.replace("{", '{"bits": 8, ', 1))
    with pytest.raises(ShardError, match='"bits" occurs twice'):
        plan_model(tmp_path, world_size=1)


ODD_VALUES = [
    None,
    True,
    False,
    0,
    -1,
    7,
    2.5,
    10**30,
    "",
    "x",
    [],
    [1],
    ["re:("],
    [["a"], 1],
    {},
    {"a": {}},
    {".*": 1},
]


def odd_settings(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The settings with one of them replaced, on any level, or with one missing."""
    for key, value in values.items():
        yield without(values, key)
        for odd in ODD_VALUES:
            yield values | {key: odd}
        if isinstance(value, dict):
            for changed in odd_settings(value):
                yield values | {key: changed}


@pytest.mark.parametrize("case", DETECTED)
def test_settings_of_any_shape_are_served_or_refused_in_one_line(case: str, tmp_path: Path) -> None:
    folder, _, _ = DETECTED[case]
    write(tmp_path, **folder)
    name = "config.json" if "config" in folder else next(iter(folder.get("files", {"config.json": {}})))
    path, key = tmp_path / name, folder.get("key", "quantization_config")
    values = json.loads(path.read_text())
    settings = list(odd_settings(values[key] if "config" in folder else values))
    for changed in settings if FULL else settings[::7]:
        path.write_text(json.dumps(values | {key: changed} if "config" in folder else changed))
        try:
            line = plan_model(tmp_path, world_size=1).describe_quantization()
        except ShardError as error:
            line = str(error)
        assert "\n" not in line and len(line) < 2000


def test_a_layer_that_the_settings_call_reordered_must_have_its_index() -> None:
    reordered = PackQuantized(4, 32, symmetric=True, reordered=True)
    required = {spec.suffix for spec in reordered.specs(Shape(64, 128)) if not spec.optional}
    assert "weight_g_idx" in required
    assert "act-order" in reordered.name


def test_a_pointer_of_git_lfs_is_told_as_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match="is a pointer of Git LFS"):
        read_index(tmp_path)
