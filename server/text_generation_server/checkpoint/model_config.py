"""What config.json says, read once, in both of its spellings, into settings that the models implement.

transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters`. A key that may be absent has
the default that transformers documents. A value that no code here implements is refused by name: a setting that is
silently ignored is garbage text. (The dtype that a configuration names is not read: the headers of the files say it.)
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import CheckpointError, ConfigError
from .index import read_json

CONFIG_NAME = "config.json"
TOKENIZER_NAME = "tokenizer.json"
# Far beyond any model, and few enough to go through.
MOST_LAYERS, MOST_HEADS = 4096, 65536


@dataclass(frozen=True)
class Rope:
    """Rotary positions: theta, and how frequencies are stretched for longer contexts."""

    theta: float
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    # Of llama3 alone.
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0


@dataclass(frozen=True)
class ModelSettings:
    """A decoder of the Llama family."""

    model_type: str
    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rms_norm_eps: float
    rope: Rope
    # Of each layer: how many positions a query sees, its own included; None: all.
    windows: tuple[int | None, ...]
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    # Queries and keys are normalized per head.
    qk_norm: bool
    tie_word_embeddings: bool

    def kv_heads_per_rank(self, world_size: int) -> int:
        """How many key/value heads each rank keeps: see `layers.attention.Heads.kv_of`."""
        owned = self.num_heads // world_size
        return owned // math.gcd(owned, self.num_heads // self.num_kv_heads)


@dataclass(frozen=True)
class _Family:
    """What transformers assumes of an architecture where config.json is silent."""

    num_kv_heads: int | None  # None: as many as heads
    max_positions: int
    head_dim: int | None = None  # None: hidden size / heads
    qkv_bias: bool | None = None  # None: attention_bias says
    mlp_bias: bool = False  # mlp_bias may say so
    qk_norm: bool = False
    window: Literal["none", "all", "upper"] = "none"  # upper: the layers from max_window_layers on


FAMILIES: Mapping[str, _Family] = {
    "LlamaForCausalLM": _Family(None, 2048, mlp_bias=True),
    "MistralForCausalLM": _Family(8, 131072, qkv_bias=False, window="all"),
    "Qwen2ForCausalLM": _Family(32, 32768, qkv_bias=True, window="upper"),
    "Qwen3ForCausalLM": _Family(32, 32768, head_dim=128, qk_norm=True, window="upper"),
}


class _Reader:
    """config.json with typed access; every error names the file, the key, what was found and what was expected."""

    def __init__(self, path: Path, values: Mapping[str, Any], prefix: str = ""):
        self.path, self.values, self.prefix = path, values, prefix

    def error(self, key: str, expected: str) -> ConfigError:
        found = f"is {self.values[key]!r}" if key in self.values else "is missing"
        return ConfigError(f"{self.path}: {self.prefix}{key} {found}; expected {expected}")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def count(self, key: str, default: int | None = None, least: int = 1, most: int = 1 << 31) -> int:
        """Bounded, for sizes decide how long something takes."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not least <= value <= most:
            raise self.error(key, f"an integer from {least} to {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if type(value) not in (int, float) or not 0 < value < 1e30:  # type: ignore[operator]
            raise self.error(key, "a positive number")
        return float(value)  # type: ignore[arg-type]

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if type(value) is not bool:
            raise self.error(key, "true or false")
        return value

    def text(self, key: str) -> str:
        value = self.values.get(key)
        if not isinstance(value, str) or not value:
            raise self.error(key, "a string")
        return value

    def table(self, key: str) -> "_Reader | None":
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(key, "an object")
        return _Reader(self.path, value, f"{self.prefix}{key}.")

    def must_be(self, key: str, implemented: object) -> None:
        """Refuses any value but the one that is implemented, or null, or nothing."""
        if self.has(key) and self.values[key] != implemented:
            raise self.error(key, f"{implemented!r}, the only value that is implemented")


def read_settings(model_dir: Path) -> ModelSettings:
    """The settings of the model in this folder.

    Raises:
        CheckpointError: there is no config.json, or it is not a JSON object.
        ConfigError: a key is missing, or has a value that no code implements.
    """
    path = model_dir / CONFIG_NAME
    config = _Reader(path, read_json(path))
    architecture = _read_architecture(config)
    family = FAMILIES[architecture]
    _refuse_what_is_not_implemented(config)
    hidden, num_layers = config.count("hidden_size"), config.count("num_hidden_layers", most=MOST_LAYERS)
    num_heads = config.count("num_attention_heads", most=MOST_HEADS)
    num_kv_heads = config.count("num_key_value_heads", family.num_kv_heads or num_heads)
    if num_heads % num_kv_heads:
        raise config.error("num_key_value_heads", f"a divisor of num_attention_heads, which is {num_heads}")
    max_positions = config.count("max_position_embeddings", family.max_positions, least=2)
    attention_bias = config.flag("attention_bias", False) if family.qkv_bias is None else False
    return ModelSettings(
        model_type=config.text("model_type"),
        architecture=architecture,
        vocab_size=config.count("vocab_size"),
        hidden_size=hidden,
        intermediate_size=config.count("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_read_head_dim(config, family, hidden, num_heads),
        max_positions=max_positions,
        rms_norm_eps=config.number("rms_norm_eps", 1e-6),
        rope=_read_rope(config, max_positions),
        windows=_read_windows(config, family, num_layers),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=attention_bias,
        mlp_bias=config.flag("mlp_bias", False) if family.mlp_bias else False,
        qk_norm=family.qk_norm,
        tie_word_embeddings=config.flag("tie_word_embeddings", False),
    )


def _read_architecture(config: _Reader) -> str:
    names = config.values.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise config.error("architectures", f"a list that names one of {', '.join(FAMILIES)}")
    if names[0] not in FAMILIES:
        raise ConfigError(f"{config.path}: {names[0]} is not served; expected one of {', '.join(FAMILIES)}")
    return names[0]


def _refuse_what_is_not_implemented(config: _Reader) -> None:
    config.must_be("hidden_act", "silu")
    config.must_be("pretraining_tp", 1)
    config.must_be("is_encoder_decoder", False)
    config.must_be("add_cross_attention", False)


def _read_head_dim(config: _Reader, family: _Family, hidden: int, num_heads: int) -> int:
    if config.has("head_dim") or family.head_dim:
        head_dim = config.count("head_dim", family.head_dim)
    elif hidden % num_heads:
        raise config.error("hidden_size", f"a multiple of num_attention_heads, which is {num_heads}, or a head_dim")
    else:
        head_dim = hidden // num_heads
    if head_dim % 2:
        raise ConfigError(f"{config.path}: head_dim is {head_dim}; expected an even number, for rotary positions")
    return head_dim


def _read_rope(config: _Reader, max_positions: int) -> Rope:
    parameters, scaling = config.table("rope_parameters"), config.table("rope_scaling")
    if parameters is not None and scaling is not None and parameters.values != scaling.values:
        raise config.error("rope_scaling", "nothing beside rope_parameters, or the same")
    rope = parameters or scaling or _Reader(config.path, {}, "rope_parameters.")
    for where in (config, rope):
        if where.has("partial_rotary_factor") and where.values["partial_rotary_factor"] != 1:
            raise where.error("partial_rotary_factor", "1: every dimension of a head is rotated")
    for nested in ("full_attention", "sliding_attention"):
        if rope.has(nested):
            raise rope.error(nested, "one set of rotary parameters for all layers")
    theta = rope.number("rope_theta", config.number("rope_theta", 10_000.0))
    if rope.has("rope_theta") and config.has("rope_theta") and theta != config.number("rope_theta"):
        raise config.error("rope_theta", f"{theta}, as in {rope.prefix}rope_theta")
    key = "rope_type" if rope.has("rope_type") else "type"
    kind = rope.values.get(key) or "default"
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, "linear", rope.number("factor"))
    if kind == "llama3":
        original = rope.count("original_max_position_embeddings", max_positions)
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if low >= high:
            raise rope.error("low_freq_factor", f"less than high_freq_factor, which is {high}")
        return Rope(theta, "llama3", rope.number("factor"), low, high, original)
    raise rope.error(key, "default, linear or llama3, the kinds that are implemented")


def _read_windows(config: _Reader, family: _Family, num_layers: int) -> tuple[int | None, ...]:
    kinds = _read_layer_types(config, num_layers)
    if family.window == "none":
        if config.has("sliding_window"):
            raise config.error("sliding_window", "null: this architecture attends to every position")
        if kinds is not None and "sliding_attention" in kinds:
            raise config.error("layer_types", "full_attention everywhere: this architecture attends to every position")
        return (None,) * num_layers
    # As in transformers: absent is not null.
    window = None if "sliding_window" in config.values and not config.has("sliding_window") else 4096
    window = config.count("sliding_window", window) if window is not None else None
    if family.window == "all":
        if kinds is not None and len(set(kinds)) != 1:
            raise config.error("layer_types", "the same for every layer of this architecture")
        return (window,) * num_layers
    if not config.flag("use_sliding_window", False):
        window = None
    if kinds is None:
        first = config.values.get("max_window_layers", 28)
        if type(first) is not int or first < 0:
            raise config.error("max_window_layers", "a number of layers")
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if window is None and "sliding_attention" in kinds:
        raise config.error("layer_types", "full_attention everywhere, or use_sliding_window true and a sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _read_layer_types(config: _Reader, num_layers: int) -> list[str] | None:
    kinds = config.values.get("layer_types")
    if kinds is None:
        return None
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in known for kind in kinds):
        raise config.error("layer_types", f"a list of {num_layers} times one of {' or '.join(known)}")
    return kinds


def read_eos_token_ids(model_dir: Path, vocab_size: int) -> tuple[int, ...]:
    """The ids that end an answer: generation_config.json if it names any, else config.json, else the tokenizer's.

    Empty if nobody names one. Raises ConfigError if an id is not in the vocabulary.
    """
    for name in ("generation_config.json", CONFIG_NAME):
        path = model_dir / name
        values = read_json(path) if path.is_file() else {}
        if values.get("eos_token_id") is not None:
            ids = values["eos_token_id"]
            ids = ids if isinstance(ids, list) else [ids]
            if any(type(i) is not int or not 0 <= i < vocab_size for i in ids):
                raise ConfigError(f"{path}: eos_token_id is {ids!r}; expected ids from 0 to {vocab_size - 1}")
            if ids:
                return tuple(dict.fromkeys(ids))
    return _read_eos_of_tokenizer(model_dir, vocab_size)


def check_tokenizer(model_dir: Path) -> None:
    """Refuses a folder without a tokenizer that the router can read.

    Raises:
        CheckpointError: tokenizer.json is missing or is not the JSON of a tokenizer.
    """
    path = model_dir / TOKENIZER_NAME
    if not path.is_file():
        others = [name for name in ("tokenizer.model", "vocab.json", "spiece.model") if (model_dir / name).is_file()]
        hint = f"; convert {others[0]} with transformers' AutoTokenizer and save_pretrained" if others else ""
        raise CheckpointError(f"{path}: no such file; expected the model's tokenizer{hint}")
    model = read_json(path).get("model")
    if not isinstance(model, dict) or "vocab" not in model:
        found = "missing" if model is None else "without a vocab" if isinstance(model, dict) else repr(model)[:80]
        raise CheckpointError(f"{path}: model is {found}; expected a tokenizer as the tokenizers library saves it")


def _read_eos_of_tokenizer(model_dir: Path, vocab_size: int) -> tuple[int, ...]:
    config_path, path = model_dir / "tokenizer_config.json", model_dir / TOKENIZER_NAME
    if not config_path.is_file() or not path.is_file():
        return ()
    token = read_json(config_path).get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    if text is None:
        return ()
    tokenizer = read_json(path)
    added = tokenizer.get("added_tokens")
    ids = {t["content"]: t["id"] for t in added if isinstance(t, dict)} if isinstance(added, list) else {}
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    found = ids.get(text, vocab.get(text) if isinstance(vocab, dict) else None)
    if type(found) is not int or not 0 <= found < vocab_size:
        raise ConfigError(f"{config_path}: eos_token is {text!r}, which {path.name} does not list with a served id")
    return (found,)
