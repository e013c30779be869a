"""Which linears are quantized, into which format, and the settings that say so to readers. Never imports torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import CheckpointError
from ..quantization.awq import Awq
from ..quantization.bitsandbytes import OUTLIER_THRESHOLD, Bitsandbytes4bit, Bitsandbytes8bit
from ..quantization.format import WeightFormat
from ..quantization.gptq import Gptq
from ..quantization.spec import Shape
from .settings import Scheme, Solver, as_regex, matches

HEAD = "lm_head"


def format_of(scheme: Scheme, layer: str) -> WeightFormat | None:
    """How the layer will be stored; None: as it is."""
    bits = scheme.bits_of(layer)
    if bits is None or layer == HEAD:
        return None
    match scheme.method:
        case "gptq" | "rtn":
            # What holds for any order of groups; it is known when the codes are.
            return Gptq(bits, scheme.group_size, scheme.sym, desc_act=True, checkpoint_format=scheme.checkpoint_format)
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
            # The head is always left as it is, also where it is the embedding and no linear.
            known = [*linears, HEAD] if flag == "--exclude" else [name for name in linears if name != HEAD]
            if not any(matches(pattern, name) for name in known):
                some = ", ".join(list(linears)[:7])
                raise CheckpointError(
                    f"{flag} {pattern!r} means no layer that can be quantized; expected some of {some}, ..."
                )
    return formats


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
            "zero_point": not scheme.sym, "modules_to_not_convert": list(dense) or None, **_rules(scheme),
        }  # fmt: skip
    order = {"desc_act": not in_order, "checkpoint_format": scheme.checkpoint_format}
    config: dict[str, Any] = {
        "quant_method": "gptq", "bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.sym,
        **order, "pack_dtype": "int32", "lm_head": False,
        "true_sequential": True, "meta": {"quantizer": [maker]},
    }  # fmt: skip
    if scheme.method == "gptq":
        config |= {"damp_percent": solver.damping, "static_groups": solver.static_groups}
        config["meta"] |= {"act_order": solver.act_order, "mse": solver.mse}
    else:
        config["meta"] |= {"method": "round to nearest", "mse": solver.mse}
    return config | _rules(scheme)


def _rules(scheme: Scheme) -> dict[str, Any]:
    """`dynamic`: what GPTQModel reads about single layers, and nothing else."""
    rules: dict[str, Any] = {f"-:{as_regex(pattern)}": {} for pattern in scheme.excluded}
    rules |= {f"+:{as_regex(pattern)}": {"bits": bits} for pattern, bits in scheme.module_bits}
    return {"dynamic": rules} if rules else {}


def _bitsandbytes_config(scheme: Scheme, dense: Sequence[str], compute_dtype: str) -> dict[str, Any]:
    four = scheme.method != "bitsandbytes"
    config: dict[str, Any] = {
        "quant_method": "bitsandbytes", "load_in_4bit": four, "load_in_8bit": not four, "_load_in_4bit": four,
        "_load_in_8bit": not four, "llm_int8_threshold": OUTLIER_THRESHOLD, "llm_int8_has_fp16_weight": False,
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
