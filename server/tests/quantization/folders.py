"""Model folders of one tiny Llama, whose linears are stored in the way that is asked for. All tensors are zeros."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HIDDEN, MIDDLE, VOCAB = 128, 256, 64
LINEARS = {
    "model.layers.0.self_attn.q_proj": (HIDDEN, HIDDEN),
    "model.layers.0.self_attn.k_proj": (HIDDEN, HIDDEN),
    "model.layers.0.self_attn.v_proj": (HIDDEN, HIDDEN),
    "model.layers.0.self_attn.o_proj": (HIDDEN, HIDDEN),
    "model.layers.0.mlp.gate_proj": (MIDDLE, HIDDEN),
    "model.layers.0.mlp.up_proj": (MIDDLE, HIDDEN),
    "model.layers.0.mlp.down_proj": (HIDDEN, MIDDLE),
}
Q, K, DOWN, HEAD = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.k_proj",
    "model.layers.0.mlp.down_proj",
    "lm_head",
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": MIDDLE,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I8": 1,
    "U8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "BOOL": 1,
}
Tensors = dict[str, tuple[str, tuple[int, ...]]]  # dtype and shape by name


def dense(out: int, in_: int) -> Tensors:
    return {"weight": ("F16", (out, in_))}


def gptq(out: int, in_: int, bits: int = 4, group: int = 64, index: bool = True) -> Tensors:
    groups = 1 if group == -1 else in_ // group
    tensors: Tensors = {
        "qweight": ("I32", (in_ * bits // 32, out)),
        "qzeros": ("I32", (groups, out * bits // 32)),
        "scales": ("F16", (groups, out)),
    }
    return tensors | ({"g_idx": ("I32", (in_,))} if index else {})


def awq(out: int, in_: int, group: int = 64) -> Tensors:
    return {
        "qweight": ("I32", (in_, out // 8)),
        "qzeros": ("I32", (in_ // group, out // 8)),
        "scales": ("F16", (in_ // group, out)),
    }


def awq_gemv(out: int, in_: int) -> Tensors:
    """One group of 128 to a word."""
    words = -(-in_ // 128 // 8)
    return {
        "qweight": ("I32", (out, in_ // 8)),
        "qzeros": ("I32", (out, words)),
        "scales": ("F16", (out, words * 8)),
    }


def packed(out: int, in_: int, bits: int = 4, group: int = 64) -> Tensors:
    groups = 1 if group == -1 else in_ // group
    return {
        "weight_packed": ("I32", (out, in_ * bits // 32)),
        "weight_scale": ("BF16", (out, groups)),
        "weight_shape": ("I64", (2,)),
    }


def float8(out: int, in_: int, scale: tuple[int, ...] = (), suffix: str = "weight_scale") -> Tensors:
    return {"weight": ("F8_E4M3", (out, in_)), suffix: ("F32", scale)}


def float8_rows(out: int, in_: int) -> Tensors:
    return float8(out, in_, (out, 1))


def float8_blocks(out: int, in_: int) -> Tensors:
    return float8(out, in_, (-(-out // 128), -(-in_ // 128)), "weight_scale_inv")


STATE = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16"}


def nf4(out: int, in_: int, state: Mapping[str, Any] = STATE) -> Tensors:
    text = json.dumps(dict(state) | {"shape": [out, in_]})
    return {
        "weight": ("U8", (out * in_ // 2, 1)),
        "weight.absmax": ("F32", (-(-out * in_ // state["blocksize"]),)),
        "weight.quant_map": ("F32", (16,)),
        f"weight.quant_state.bitsandbytes__{state['quant_type']}={text}": ("U8", (len(text),)),
    }


def nested(out: int, in_: int) -> Tensors:
    blocks = out * in_ // 64
    return nf4(out, in_) | {
        "weight.absmax": ("U8", (blocks,)),
        "weight.nested_absmax": ("F32", (-(-blocks // 256),)),
        "weight.nested_quant_map": ("F32", (256,)),
    }


def int8(out: int, in_: int) -> Tensors:
    return {"weight": ("I8", (out, in_)), "SCB": ("F32", (out,)), "weight_format": ("U8", ())}


def write(
    folder: Path, linear: Any, config: Mapping[str, Any] | None = None, *, files: Mapping[str, Any] | None = None,
    others: Mapping[str, Any] | None = None, extra: Tensors | None = None, key: str = "quantization_config",
) -> Path:  # fmt: skip
    """A folder whose linears are stored as `linear(out, in)` says, and those named in `others` as these say."""
    tensors: Tensors = {
        "model.embed_tokens.weight": ("F16", (VOCAB, HIDDEN)),
        "model.norm.weight": ("F16", (HIDDEN,)),
        "model.layers.0.input_layernorm.weight": ("F16", (HIDDEN,)),
        "model.layers.0.post_attention_layernorm.weight": ("F16", (HIDDEN,)),
    }
    for name, (out, in_) in (LINEARS | {HEAD: (VOCAB, HIDDEN)}).items():
        stored = (others or {}).get(name, dense if name == HEAD else linear)
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in stored(out, in_).items()}
    write_tensors(folder / "model.safetensors", tensors | (extra or {}))
    quantization = {} if config is None else {key: config}
    (folder / "config.json").write_text(json.dumps(CONFIG | quantization))
    for name, values in (files or {}).items():
        (folder / name).write_text(json.dumps(values))
    return folder


def write_tensors(path: Path, tensors: Tensors) -> None:
    """A safetensors file of zeros; what follows `=` in a name is the tensor's content instead."""
    header: dict[str, Any] = {}
    data = b""
    for name, (dtype, shape) in tensors.items():
        name, _, content = name.partition("=")
        size = math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + size]}
        number = content.lstrip("-").isdigit()
        raw = int(content).to_bytes(size, "little", signed=True) if number else content.encode()
        data += raw.ljust(size, b"\0")
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
