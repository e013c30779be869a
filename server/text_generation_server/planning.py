"""config.json and the headers of the weights -> what would be loaded, in how much memory. Never imports torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint.index import TensorInfo, read_index
from .checkpoint.model_config import ModelSettings, read_eos_token_ids, read_settings
from .errors import CheckpointError, ConfigError
from .kernels.select import compute_dtype

_STORED_DTYPES = ("F32", "F16", "BF16")
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ModelPlan:
    """Everything that is known of a model before a weight is read."""

    model_dir: Path
    settings: ModelSettings
    index: Mapping[str, TensorInfo]
    world_size: int
    dtype: str  # of weights, activations and cache: float32 or bfloat16
    eos_token_ids: tuple[int, ...]
    num_parameters: int
    weight_bytes: int  # as stored
    weight_bytes_per_rank: int  # as held by the rank that holds most
    kv_bytes_per_token_per_rank: int

    def summary(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {
            "model_dir": str(self.model_dir),
            "model_type": self.settings.model_type,
            "architecture": self.settings.architecture,
            "world_size": self.world_size,
            "dtype": self.dtype,
            "num_layers": self.settings.num_layers,
            "num_parameters": self.num_parameters,
            "weight_bytes": self.weight_bytes,
            "weight_bytes_per_rank": self.weight_bytes_per_rank,
            "kv_bytes_per_token_per_rank": self.kv_bytes_per_token_per_rank,
            "max_positions": self.settings.max_positions,
            "vocab_size": self.settings.vocab_size,
            "eos_token_ids": list(self.eos_token_ids),
        }


def plan_model(
    model_dir: Path, *, world_size: int, dtype: str | None = None, quantize: str | None = None, device: str = "cpu"
) -> ModelPlan:
    """Checks that the folder can be served by `world_size` shards.

    Raises:
        ConfigError: a setting or a value of config.json that cannot be served.
        CheckpointError: a file or a tensor that is missing, damaged or of the wrong shape.
    """
    if quantize is not None:
        raise ConfigError(f"--quantize {quantize} is not served yet; leave it out to serve the weights as they are")
    chosen = compute_dtype(device, dtype)
    if not model_dir.is_dir():
        raise CheckpointError(f"{model_dir}: no such folder; expected one with config.json and *.safetensors")
    settings = read_settings(model_dir)
    check_shards(settings, world_size)
    eos_token_ids = read_eos_token_ids(model_dir, settings.vocab_size)
    index = read_index(model_dir)
    expected = expected_tensors(settings)
    check_tensors(index, expected, settings, model_dir)
    return ModelPlan(
        model_dir=model_dir,
        settings=settings,
        index=index,
        world_size=world_size,
        dtype=chosen,
        eos_token_ids=eos_token_ids,
        num_parameters=sum(_numel(shape) for shape in expected.values()),
        weight_bytes=sum(index[name].num_bytes for name in expected),
        weight_bytes_per_rank=parameters_per_rank(settings, world_size) * _BYTES[chosen],
        kv_bytes_per_token_per_rank=(
            2 * settings.num_layers * max(1, settings.num_kv_heads // world_size) * settings.head_dim * _BYTES[chosen]
        ),
    )


def expected_tensors(settings: ModelSettings) -> dict[str, tuple[int, ...]]:
    """Every tensor that the model reads, by name, with its shape."""
    hidden, size = settings.hidden_size, settings.intermediate_size
    q, kv = settings.num_heads * settings.head_dim, settings.num_kv_heads * settings.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, q),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (size, hidden),
        "mlp.up_proj.weight": (size, hidden),
        "mlp.down_proj.weight": (hidden, size),
    }
    if settings.qkv_bias:
        layer |= {"self_attn.q_proj.bias": (q,), "self_attn.k_proj.bias": (kv,), "self_attn.v_proj.bias": (kv,)}
    if settings.output_bias:
        layer |= {"self_attn.o_proj.bias": (hidden,)}
    if settings.mlp_bias:
        layer |= {"mlp.gate_proj.bias": (size,), "mlp.up_proj.bias": (size,), "mlp.down_proj.bias": (hidden,)}
    if settings.qk_norm:
        layer |= {f"self_attn.{name}_norm.weight": (settings.head_dim,) for name in "qk"}
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (settings.vocab_size, hidden)}
    for i in range(settings.num_layers):
        tensors |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    tensors["model.norm.weight"] = (hidden,)
    if not settings.tie_word_embeddings:
        tensors["lm_head.weight"] = (settings.vocab_size, hidden)
    return tensors


def parameters_per_rank(settings: ModelSettings, world_size: int) -> int:
    """Weights that rank 0 holds; no rank holds more."""
    q_rows = settings.num_heads // world_size * settings.head_dim
    kv_rows = max(1, settings.num_kv_heads // world_size) * settings.head_dim
    local = {"q_proj": q_rows, "k_proj": kv_rows, "v_proj": kv_rows}
    size, vocab = settings.intermediate_size // world_size, -(-settings.vocab_size // world_size)
    total = 0
    for name, shape in expected_tensors(settings).items():
        module, kind = name.split(".")[-2:]
        if module in local:
            shape = (local[module], *shape[1:])
        elif module in ("gate_proj", "up_proj"):
            shape = (size, *shape[1:])
        elif module in ("embed_tokens", "lm_head"):
            shape = (vocab, *shape[1:])
        elif module in ("o_proj", "down_proj") and kind == "weight":
            shape = (shape[0], q_rows if module == "o_proj" else size)
        total += _numel(shape)
    return total


def check_shards(settings: ModelSettings, world_size: int) -> None:
    """Refuses a number of shards over which heads or features do not divide."""
    for name, count in (("attention heads", settings.num_heads), ("intermediate features", settings.intermediate_size)):
        if world_size < 1 or count % world_size:
            raise ConfigError(
                f"{count} {name} do not divide over {world_size} shards; expected a number that divides {count}"
            )
    kv = settings.num_kv_heads
    if kv % world_size and world_size % kv:
        raise ConfigError(
            f"{kv} key/value heads cannot be shared out to {world_size} shards; expected a divisor or multiple of {kv}"
        )


def check_tensors(
    index: Mapping[str, TensorInfo], expected: Mapping[str, tuple[int, ...]], settings: ModelSettings, where: Path
) -> None:
    """Refuses a checkpoint that lacks a tensor, has one of another shape or dtype, or one that nothing would read."""
    for name, shape in expected.items():
        if name not in index:
            raise CheckpointError(f"{where}: tensor {name} is missing; expected it with shape {list(shape)}")
        info = index[name]
        if info.shape != shape:
            raise CheckpointError(
                f"{info.path}: tensor {name} has shape {list(info.shape)}; expected {list(shape)} from config.json"
            )
        if info.dtype not in _STORED_DTYPES:
            raise CheckpointError(
                f"{info.path}: tensor {name} has dtype {info.dtype}; expected one of {', '.join(_STORED_DTYPES)}"
            )
    ignored = {"lm_head.weight"} if settings.tie_word_embeddings else set()
    unread = [n for n in index if n not in expected and n not in ignored and not n.endswith("rotary_emb.inv_freq")]
    if unread:
        raise CheckpointError(
            f"{index[unread[0]].path}: tensor {unread[0]} and {len(unread) - 1} more are not part of a "
            f"{settings.architecture} as config.json describes it; expected no other tensors"
        )


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
