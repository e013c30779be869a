"""config.json and the headers of the weights -> what would be loaded, in how much memory. Never imports torch."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from .checkpoint.index import TensorInfo, read_index, read_json
from .checkpoint.model_config import CONFIG_NAME, ModelSettings, check_tokenizer, read_eos_token_ids, read_settings
from .errors import CheckpointError, ConfigError
from .kernels.select import compute_dtype
from .quantization.config import Quantization, read_quantization
from .quantization.dense import Dense
from .quantization.detect import Request
from .quantization.format import StoredLinear
from .quantization.spec import ANY, FLOATS, Shape

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Of layers that differ from the others, in the line about quantization.
_MAX_KINDS = 8


@dataclass(frozen=True)
class ModelPlan:
    """Everything that is known of a model before a weight is read."""

    model_dir: Path
    settings: ModelSettings
    index: Mapping[str, TensorInfo]
    quantization: Quantization
    linears: Mapping[str, StoredLinear]  # by full name
    world_size: int
    dtype: str  # of weights, activations and cache: float32 or bfloat16
    eos_token_ids: tuple[int, ...]
    num_parameters: int
    weight_bytes: int  # as stored
    weight_bytes_per_rank: int  # as held by the rank that holds most
    kv_bytes_per_token_per_rank: int

    def describe_quantization(self) -> str:
        """One line: the method, its settings, where they were found, and which layers differ."""
        by_format: dict[str, list[str]] = {}
        for name, linear in self.linears.items():
            by_format.setdefault(linear.format.name, []).append(name)
        ordered = sorted(by_format, key=lambda format_: (format_ == Dense.name, -len(by_format[format_])))
        exceptions = [f"; {format_}: {_kinds(by_format[format_])}" for format_ in ordered[1:]]
        return self.quantization.describe() + "".join(exceptions)

    def check_tokenizer(self) -> None:
        """Refuses a folder whose tokenizer the router could not read. (A rank needs none.)"""
        check_tokenizer(self.model_dir)

    def summary(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {
            "model_dir": str(self.model_dir),
            "model_type": self.settings.model_type,
            "architecture": self.settings.architecture,
            "world_size": self.world_size,
            "dtype": self.dtype,
            "quantize": self.quantization.method,
            "quantization": self.describe_quantization(),
            "num_layers": self.settings.num_layers,
            "num_parameters": self.num_parameters,
            "weight_bytes": self.weight_bytes,
            "weight_bytes_per_rank": self.weight_bytes_per_rank,
            "kv_bytes_per_token_per_rank": self.kv_bytes_per_token_per_rank,
            "max_positions": self.settings.max_positions,
            "vocab_size": self.settings.vocab_size,
            "eos_token_ids": list(self.eos_token_ids),
        }


def _kinds(names: list[str]) -> str:
    """Layers with the number of the block left out, and how many of each."""
    counts = Counter(re.sub(r"\.\d+\.", ".*.", name) for name in names)
    shown = [kind if count == 1 else f"{kind} ({count})" for kind, count in counts.most_common(_MAX_KINDS)]
    return ", ".join(shown) + (f" and {len(counts) - _MAX_KINDS} more kinds" if len(counts) > _MAX_KINDS else "")


def plan_model(
    model_dir: Path,
    *,
    world_size: int,
    dtype: str | None = None,
    quantize: str | None = None,
    gptq_bits: int | None = None,
    gptq_groupsize: int | None = None,
    device: str = "cpu",
) -> ModelPlan:
    """Checks that the folder can be served by `world_size` shards.

    gptq_bits, gptq_groupsize: of packed tensors of which no file says it.

    Raises:
        ConfigError: a setting or a value of config.json that cannot be served.
        CheckpointError: a file or a tensor that is missing, damaged or of the wrong shape.
    """
    if not model_dir.is_dir():
        raise CheckpointError(f"{model_dir}: no such folder; expected one with config.json and *.safetensors")
    settings = read_settings(model_dir)
    check_shards(settings, world_size)
    eos_token_ids = read_eos_token_ids(model_dir, settings.vocab_size)
    index = read_index(model_dir)
    request = Request(quantize, gptq_bits, gptq_groupsize)
    quantization = read_quantization(model_dir, read_json(model_dir / CONFIG_NAME), index, request)
    chosen = compute_dtype(device, dtype, quantization.method is not None)
    linears = {
        name: StoredLinear(shape, quantization.format_of(name)) for name, shape in linear_shapes(settings).items()
    }
    weights = {name: info for name, info in index.items() if name not in quantization.own_tensors}
    stored = check_tensors(weights, linears, settings, model_dir)
    return ModelPlan(
        model_dir=model_dir,
        settings=settings,
        index=index,
        quantization=quantization,
        linears=linears,
        world_size=world_size,
        dtype=chosen,
        eos_token_ids=eos_token_ids,
        num_parameters=sum(
            prod(shape) for shape in (*linear_shapes(settings).values(), *other_tensors(settings).values())
        ),
        weight_bytes=sum(index[name].num_bytes for name in stored),
        weight_bytes_per_rank=weight_bytes_per_rank(settings, linears, world_size, chosen),
        kv_bytes_per_token_per_rank=(
            2 * settings.num_layers * settings.kv_heads_per_rank(world_size) * settings.head_dim * _BYTES[chosen]
        ),
    )


def linear_shapes(settings: ModelSettings) -> dict[str, Shape]:
    """Every linear of the model by its full name, with its features over all ranks."""
    hidden, size = settings.hidden_size, settings.intermediate_size
    q, kv = settings.num_heads * settings.head_dim, settings.num_kv_heads * settings.head_dim
    layer = {
        "self_attn.q_proj": Shape(q, hidden),
        "self_attn.k_proj": Shape(kv, hidden),
        "self_attn.v_proj": Shape(kv, hidden),
        "self_attn.o_proj": Shape(hidden, q),
        "mlp.gate_proj": Shape(size, hidden),
        "mlp.up_proj": Shape(size, hidden),
        "mlp.down_proj": Shape(hidden, size),
    }
    linears = {f"model.layers.{i}.{name}": shape for i in range(settings.num_layers) for name, shape in layer.items()}
    if not settings.tie_word_embeddings:
        linears["lm_head"] = Shape(settings.vocab_size, hidden)
    return linears


def biased(settings: ModelSettings, linear: str) -> bool:
    """Whether the architecture gives this linear a bias."""
    match linear.rsplit(".", 1)[-1]:
        case "q_proj" | "k_proj" | "v_proj":
            return settings.qkv_bias
        case "o_proj":
            return settings.output_bias
        case "gate_proj" | "up_proj" | "down_proj":
            return settings.mlp_bias
    return False


def other_tensors(settings: ModelSettings) -> dict[str, tuple[int, ...]]:
    """Every tensor that is not a linear's weight (embedding, norms, biases), by name, with its shape."""
    hidden = settings.hidden_size
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (settings.vocab_size, hidden)}
    for i in range(settings.num_layers):
        names = ["input_layernorm", "post_attention_layernorm"]
        tensors |= {f"model.layers.{i}.{name}.weight": (hidden,) for name in names}
        if settings.qk_norm:
            tensors |= {f"model.layers.{i}.self_attn.{n}_norm.weight": (settings.head_dim,) for n in "qk"}
    tensors["model.norm.weight"] = (hidden,)
    linears = linear_shapes(settings)
    return tensors | {f"{name}.bias": (shape.out,) for name, shape in linears.items() if biased(settings, name)}


def weight_bytes_per_rank(
    settings: ModelSettings, linears: Mapping[str, StoredLinear], world_size: int, dtype: str
) -> int:
    """Memory of the weights that rank 0 holds; no rank holds more."""
    kv_rows = settings.kv_heads_per_rank(world_size) * settings.head_dim
    total = 0
    for name, linear in linears.items():
        out, in_ = linear.shape
        match name.rsplit(".", 1)[-1]:
            case "k_proj" | "v_proj":
                out = kv_rows
            case "o_proj" | "down_proj":
                in_ = -(-in_ // world_size)
            case _:
                out = -(-out // world_size)
        total += linear.format.held_bytes(Shape(out, in_), _BYTES[dtype])
    for name, shape in other_tensors(settings).items():
        split = world_size if name == "model.embed_tokens.weight" else 1
        if name.endswith(("k_proj.bias", "v_proj.bias")):
            shape = (kv_rows,)
        elif name.endswith(".bias") and not name.endswith(("o_proj.bias", "down_proj.bias")):
            split = world_size
        total += -(-shape[0] // split) * prod(shape[1:]) * _BYTES[dtype]
    return total


def check_shards(settings: ModelSettings, world_size: int) -> None:
    """Refuses a number of shards over which the heads do not divide. Everything else is cut anywhere."""
    heads, features = settings.num_heads, settings.intermediate_size
    if world_size < 1 or heads % world_size or features < world_size:
        served = (str(size) for size in range(1, heads + 1) if heads % size == 0 and features >= size)
        raise ConfigError(
            f"{heads} attention heads do not divide over {world_size} shards; expected one of {', '.join(served)}"
        )


def check_tensors(
    index: Mapping[str, TensorInfo], linears: Mapping[str, StoredLinear], settings: ModelSettings, where: Path
) -> list[str]:
    """The tensors that the model reads.

    Raises:
        CheckpointError: one is missing, or has another shape or dtype, or there is one that nothing would read.
    """
    others = other_tensors(settings)
    for name, shape in others.items():
        _check_tensor(index, name, shape, FLOATS, where)
    known = set(others)
    for linear, (shape, format_) in ((name, (stored.shape, stored.format)) for name, stored in linears.items()):
        try:
            specs = format_.specs(shape)
        except CheckpointError as error:
            raise CheckpointError(f"{where}: {linear}: {error}") from error
        for spec in specs:
            name = f"{linear}.{spec.suffix}"
            if not spec.optional or name in index:
                found = index[name].shape if name in index else None
                _check_tensor(index, name, spec.shape(shape, found), spec.dtypes, where)
                known.add(name)
        # Some quantizers give every linear a bias.
        if f"{linear}.bias" in index and format_ != Dense():
            _check_tensor(index, f"{linear}.bias", (shape.out,), FLOATS, where)
            known.add(f"{linear}.bias")
    ignored = {"lm_head.weight"} if settings.tie_word_embeddings else set()
    unread = [n for n in index if n not in known and n not in ignored and not n.endswith("rotary_emb.inv_freq")]
    if unread:
        unexpected = (
            f"tensor {unread[0]} is" if len(unread) == 1 else f"tensor {unread[0]} and {len(unread) - 1} more are"
        )
        raise CheckpointError(
            f"{index[unread[0]].path}: {unexpected} not part of a {settings.architecture} as its configuration "
            "describes it; expected no other tensors"
        )
    return [name for name in index if name in known]


def _check_tensor(
    index: Mapping[str, TensorInfo], name: str, shape: tuple[int, ...], dtypes: tuple[str, ...], where: Path
) -> None:
    if name not in index:
        sizes = ", ".join("any" if size == ANY else str(size) for size in shape)
        raise CheckpointError(
            f"{where}: tensor {name} is missing; expected it with shape [{sizes}], as the configuration asks for; "
            "fetch the checkpoint again, or correct the configuration"
        )
    info = index[name]
    if info.shape != shape:
        raise CheckpointError(
            f"{info.path}: tensor {name} has shape {list(info.shape)}; expected {list(shape)}, by config.json and what "
            "is said of quantization; fetch the checkpoint again, or correct what is said"
        )
    if info.dtype not in dtypes:
        raise CheckpointError(f"{info.path}: tensor {name} has dtype {info.dtype}; expected {' or '.join(dtypes)}")
