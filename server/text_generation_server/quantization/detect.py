"""What the files of a model folder say of its quantization, brought together: nothing is assumed. Never imports torch.

Settings come from `quantization_config` or `compression_config` of config.json (transformers), quantize_config.json
(AutoGPTQ, GPTQModel), quant_config.json (AutoAWQ), one-element tensors (TGI's own quantizer) and two flags. All that
speak must agree.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.index import DTYPE_BYTES, TensorInfo, read_json
from ..errors import CheckpointError, ConfigError

CONFIG_FILE, GPTQ_FILE, AWQ_FILE = "config.json", "quantize_config.json", "quant_config.json"
LOOKED_FOR = f"{CONFIG_FILE} (quantization_config, compression_config), {GPTQ_FILE}, {AWQ_FILE}"
# One-element tensors of TGI's own quantizer.
_TGI_TENSORS = {"gptq_bits": "bits", "gptq_groupsize": "group_size", "gptq_sym": "sym"}
# A key that only one method's files have, and the method.
_TELLING = {
    "load_in_4bit": "bitsandbytes", "load_in_8bit": "bitsandbytes", "_load_in_4bit": "bitsandbytes",
    "_load_in_8bit": "bitsandbytes", "config_groups": "compressed-tensors", "w_bit": "awq", "q_group_size": "awq",
    "zero_point": "awq", "desc_act": "gptq", "damp_percent": "gptq", "true_sequential": "gptq",
    "is_marlin_format": "gptq", "weight_block_size": "fp8", "activation_scale_ub": "fbgemm_fp8",
}  # fmt: skip
# The same thing under the names that different tools give it.
_SYNONYMS = {"w_bit": "bits", "q_group_size": "group_size", "method": "quant_method", "checkpoint_format": "format"}
_MAX_SMALL_BYTES = 1 << 16
# Features of a group or a block.
SIZES = range(1, 1 << 20)


@dataclass(frozen=True)
class Request:
    """What the command line says: `--quantize`, `--gptq-bits`, `--gptq-groupsize`."""

    method: str | None = None
    bits: int | None = None
    group_size: int | None = None

    @property
    def gptq(self) -> dict[str, int]:
        named = {"bits": self.bits, "group_size": self.group_size}
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True)
class Source:
    """One place that says something. `keys`: what each key is called in messages, file included."""

    name: str
    values: Mapping[str, Any]
    method: str | None
    keys: Mapping[str, str]
    is_file: bool = True


def find_sources(
    model_dir: Path, config: Mapping[str, Any], index: Mapping[str, TensorInfo], request: Request
) -> list[Source]:
    """Every place that speaks.

    Raises:
        ConfigError: one of them is not what it must be.
        CheckpointError: a file cannot be read.
    """
    sources = [
        _from_json(model_dir / CONFIG_FILE, f"{section}.", config[section])
        for section in ("quantization_config", "compression_config")
        if config.get(section) is not None
    ]
    for name in (GPTQ_FILE, AWQ_FILE):
        path = model_dir / name
        if path.is_file():
            values = read_json(path)
            # TGI and others also find AutoAWQ's settings wrapped as in config.json.
            sources.append(_from_json(path, "", values.get("quantization_config", values)))
    if found := {name: key for name, key in _TGI_TENSORS.items() if name in index}:
        values = {key: read_number(index[name]) for name, key in found.items()}
        keys = {key: f"{index[name].path}: tensor {name}" for name, key in found.items()}
        sources.append(Source("tensors " + ", ".join(found), values, "gptq", keys))
    if request.gptq:
        flags = {"bits": "--gptq-bits", "group_size": "--gptq-groupsize"}
        keys = {key: flags[key] for key in request.gptq}
        sources.append(Source(" ".join(keys.values()), request.gptq, "gptq", keys, is_file=False))
    return [source for source in sources if source.values]


def own_tensors(index: Mapping[str, TensorInfo]) -> set[str]:
    """Tensors that state settings."""
    return _TGI_TENSORS.keys() & index.keys()


def _from_json(path: Path, prefix: str, values: Any) -> Source:
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: {prefix.rstrip('.') or 'the file'} is {values!r}; expected an object")
    stated = {key: values[key] for key in ("quant_method", "method") if values.get(key) is not None}
    for key, value in stated.items():
        if not isinstance(value, str):
            raise ConfigError(f"{path}: {prefix}{key} is {_short(value)}; expected the name of a method")
    if len({value.lower() for value in stated.values()}) > 1:
        raise ConfigError(
            f"{path}: {prefix}quant_method is {values['quant_method']!r}, but {prefix}method is {values['method']!r}; "
            "expected the same"
        )
    method = next((value.lower() for value in stated.values()), None) or _guess(values)
    return Source(path.name, values, method, {key: f"{path}: {prefix}{key}" for key in values})


def _guess(values: Mapping[str, Any]) -> str | None:
    """The method that the keys belong to, if they belong to one alone."""
    if str(values.get("version")).lower() in ("gemm", "gemv", "gemv_fast"):
        return "awq"
    methods = {method for key, method in _TELLING.items() if values.get(key) is not None}
    return methods.pop() if len(methods) == 1 else None


def agreed_method(model_dir: Path, sources: Sequence[Source]) -> str:
    """The method that all sources name, or that their keys belong to.

    Raises:
        ConfigError: they contradict each other, or none tells.
    """
    telling = [source for source in sources if source.method is not None]
    if not telling:
        found = "; ".join(f"{source.name} has {', '.join(sorted(source.values))}" for source in sources)
        raise ConfigError(
            f"{model_dir}: nothing names the method of quantization: {found}; expected a quant_method in one of "
            f"{LOOKED_FOR}; add it"
        )
    first = telling[0]
    for other in telling[1:]:
        if other.method != first.method:
            raise ConfigError(
                f"{model_dir}: {first.name} says that the method of quantization is {first.method}, {other.name} "
                f"that it is {other.method}; expected the same; correct or remove one of them"
            )
    assert first.method is not None
    return first.method


class Settings:
    """The values of all sources under one name each, with typed access. null counts as nothing."""

    def __init__(self, model_dir: Path, method: str, sources: Sequence[Source], synonyms: Mapping[str, str]):
        self.model_dir, self.method = model_dir, method
        self._values: dict[str, Any] = {}
        self._keys: dict[str, str] = {}
        self.names = list(dict.fromkeys(source.name for source in sources))
        for source in sources:
            for key, value in source.values.items():
                if value is not None:
                    self._add(synonyms.get(key, _SYNONYMS.get(key, key)), value, source.keys[key])

    def _add(self, name: str, value: Any, key: str) -> None:
        if name not in self._values:
            self._values[name], self._keys[name] = value, key
        elif _plain(self._values[name]) != _plain(value) and name not in _PROVENANCE:
            raise ConfigError(
                f"{self._keys[name]} is {_short(self._values[name])}, but {key} is {_short(value)}; expected the "
                "same; correct or remove one of them"
            )

    def nested(self, name: str, keys: Mapping[str, Any], inside: str = "") -> Settings:
        """Settings inside one of these."""
        where = self._keys[name] + inside
        source = Source(self.names[0], keys, self.method, {key: f"{where}.{key}" for key in keys})
        return Settings(self.model_dir, self.method, [source], {})

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def get(self, name: str) -> Any:
        return self._values.get(name)

    def where(self, name: str) -> str:
        return self._keys[name]

    def error(self, name: str, expected: str) -> ConfigError:
        if name in self._values:
            return ConfigError(f"{self._keys[name]} is {_short(self._values[name])}; expected {expected}")
        flags = {"bits": "--gptq-bits", "group_size": "--gptq-groupsize"} if self.method == "gptq" else {}
        or_flag = f", or give {flags[name]}" if name in flags else ""
        return ConfigError(
            f"{self.model_dir}: nothing says {name} of the {self.method} weights (found {', '.join(self.names)}; "
            f"looked for {LOOKED_FOR}); expected {expected}; add it there{or_flag}"
        )

    def integer(self, name: str, served: Collection[int]) -> int:
        value = self.get(name)
        if type(value) is not int or value not in served:
            raise self.error(name, _one_of(served))
        return value

    def flag(self, name: str) -> bool | None:
        """True, false, or None if nothing says it."""
        value = self.get(name)
        if value is not None and type(value) is not bool:
            raise self.error(name, "true or false")
        return value

    def group_size(self) -> int:
        """Features of each group; -1: one group."""
        value = self.get("group_size")
        if type(value) is not int or (value != -1 and value not in SIZES):
            raise self.error("group_size", "a number of features, or -1 for one group")
        return value

    def word(self, name: str, served: Collection[str], otherwise: str = "") -> str | None:
        """One of these words, in small letters; None if nothing says it. otherwise: what to do about another."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, str) or value.lower() not in served:
            raise self.error(name, _one_of(served) + (f"; {otherwise}" if otherwise else ""))
        return value.lower()

    def must_be(self, name: str, *neutral: Any) -> None:
        """Refuses a value that would change the meaning of the weights in a way that nothing here implements."""
        if name in self._values and not any(_equal(self._values[name], value) for value in neutral):
            raise self.error(name, f"{' or '.join(map(_short, neutral))}, or nothing: no other value is served")


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(_plain(a) == _plain(b))


# Keys that two files may tell differently: how the weights were made.
_PROVENANCE = frozenset({
    "meta", "tokenizer", "dataset", "damp_percent", "damp_auto_increment", "model_name_or_path", "model_file_base_name",
    "true_sequential", "static_groups", "backend", "batch_size", "pad_token_id", "model_seqlen", "max_input_length",
    "use_cuda_fp16", "use_exllama", "disable_exllama", "exllama_config", "cache_block_outputs", "quantizer", "version",
    "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "cache_examples_on_gpu", "mse", "act_group_aware",
    "inside_layer_modules", "outside_layer_modules", "block_name_to_quantize", "module_name_preceding_first_block",
})  # fmt: skip


def read_number(info: TensorInfo) -> int:
    """The only element of a tensor of integers."""
    if info.num_bytes != DTYPE_BYTES[info.dtype] or info.dtype not in ("I64", "I32", "I16", "I8", "U8", "BOOL"):
        raise CheckpointError(
            f"{info.path}: tensor {info.name} is {info.dtype} of shape {list(info.shape)}; expected one whole number"
        )
    value = int.from_bytes(read_small(info), "little", signed=info.dtype.startswith("I"))
    return bool(value) if info.name == "gptq_sym" and value in (0, 1) else value


def read_small(info: TensorInfo) -> bytes:
    """All of a small tensor that states settings."""
    if info.num_bytes > _MAX_SMALL_BYTES:
        raise CheckpointError(
            f"{info.path}: tensor {info.name} has {info.num_bytes} bytes; expected at most {_MAX_SMALL_BYTES}"
        )
    try:
        with info.path.open("rb") as file:
            file.seek(info.offset)
            return file.read(info.num_bytes)
    except OSError as error:
        raise CheckpointError(f"{info.path}: cannot be read: {error.strerror}") from error


def _plain(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _one_of(values: Collection[Any]) -> str:
    return "one of " + ", ".join(map(str, values)) if len(values) > 1 else str(next(iter(values)))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
