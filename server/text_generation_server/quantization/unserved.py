"""What is known by name and not served, and what to do instead; what packed tensors look like. Never imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..checkpoint.index import TensorInfo
from ..errors import ConfigError
from .detect import LOOKED_FOR

_ORIGINAL = (
    "serve the weights that it was made from, with --quantize bitsandbytes, bitsandbytes-nf4 or fp8 if memory is short"
)
_OTHERS = "take a gptq or awq checkpoint of the same model"
_FROM_GPTQ = "serve the gptq checkpoint that it was made from"
# As quant_method or --quantize name them, in small letters.
UNSERVED = {
    "aqlm": _ORIGINAL, "auto-round": "export it again as auto_gptq or auto_awq", "bitblas": _FROM_GPTQ,
    "bitnet": _ORIGINAL, "deepspeedfp": _ORIGINAL, "eetq": f"{_ORIGINAL} (bitsandbytes also has 8 bits)",
    "exl2": _OTHERS, "exl3": _OTHERS,
    "experts_int8": _ORIGINAL, "fp_quant": _ORIGINAL, "fouroversix": _ORIGINAL, "gguf": _ORIGINAL, "higgs": _ORIGINAL,
    "hqq": _ORIGINAL, "intel/auto-round": "export it again as auto_gptq or auto_awq", "llm-awq": "make it again with "
    "AutoAWQ's version gemm", "marlin": _FROM_GPTQ, "marlin-24": _ORIGINAL, "modelopt": _ORIGINAL, "mxfp4": _ORIGINAL,
    "mxfp8": _ORIGINAL, "nvfp4": _ORIGINAL, "qqq": _ORIGINAL, "quanto": _ORIGINAL, "quark": _ORIGINAL,
    "sinq": _ORIGINAL, "spqr": _ORIGINAL, "torchao": _ORIGINAL, "vptq": _ORIGINAL,
}  # fmt: skip

_ADD = f"expected the settings in one of {LOOKED_FOR}; add the file that the quantizer wrote"
# The end of a tensor's name, what it belongs to, and what to do if no file says more.
_PACKED = {
    ".qweight": ("gptq or awq", f"{_ADD}, or, for gptq with g_idx, give --gptq-bits and --gptq-groupsize"),
    ".weight_packed": ("compressed-tensors", _ADD),
    ".absmax": ("bitsandbytes 4-bit", _ADD),
    ".SCB": ("bitsandbytes 8-bit", _ADD),
    ".B": ("marlin", _FROM_GPTQ),
    ".B_24": ("marlin", _ORIGINAL),
    ".q_weight": ("exl2", UNSERVED["exl2"]),
    ".trellis": ("exl3", UNSERVED["exl3"]),
    ".codebooks": ("aqlm", _ORIGINAL),
    ".W_q": ("hqq", _ORIGINAL),
    ".qweight_scales": ("eetq", UNSERVED["eetq"]),
}
_PACKED_DTYPES = ("U8", "I8", "F8_E4M3", "F8_E5M2", "I32")


def refuse_unserved(method: str, what: str) -> None:
    """`what` names the method so.

    Raises:
        ConfigError: it is one that is known and not served.
    """
    if method.lower() in UNSERVED:
        raise ConfigError(f"{what}: {method} is not served; {UNSERVED[method.lower()]}")


def packed_tensor(index: Mapping[str, TensorInfo]) -> tuple[TensorInfo, str, str] | None:
    """A tensor that is not a plain number for every weight, what it belongs to, and what to do about it."""
    for name, info in index.items():
        for suffix, (kind, advice) in _PACKED.items():
            if name.endswith(suffix):
                return info, f"{kind} weights", advice
        if name.endswith(".weight") and len(info.shape) > 1 and info.dtype in _PACKED_DTYPES:
            return info, f"weights of dtype {info.dtype}", _ADD
    return None


def refuse_packed(model_dir: Path, index: Mapping[str, TensorInfo]) -> None:
    """Refuses packed tensors of which no file says what they are.

    Raises:
        ConfigError: there is one.
    """
    found = packed_tensor(index)
    if found is None:
        return
    info, kind, advice = found
    raise ConfigError(
        f"{model_dir}: tensor {info.name} in {info.path.name} belongs to {kind}, but no file says how they are stored; "
        f"looked for {LOOKED_FOR}; {advice}"
    )
