"""What compressed-tensors' settings mean: groups of layers, each with its own scheme. Never imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..checkpoint.index import TensorInfo
from ..errors import ConfigError
from .detect import Settings
from .format import WeightFormat
from .methods import FLOAT8, block_structure, float8, unknown_keys
from .pack_quantized import BITS, PackQuantized
from .patterns import Work
from .rules import Targets

_MIXED = "mixed-precision"
_FLOATS = ("float-quantized", "naive-quantized")
_ELSEWHERE = "serve the weights that it was made from, with --quantize fp8 or bitsandbytes if memory is short"


@dataclass(frozen=True)
class _Group:
    """Layers that are stored alike."""

    targets: Targets
    integers: PackQuantized | None  # None: 8-bit floats
    scale: str | None = None
    block: tuple[int, int] | None = None

    @property
    def summary(self) -> str:
        if self.integers is not None:
            return self.integers.name
        of = {"tensor": "the tensor", "channel": "each output", "block": "blocks"}[self.scale or "block"]
        size = f" of {self.block[0]} x {self.block[1]}" if self.block else ""
        return f"8-bit floats, scales of {of}{size}"


class CompressedMethod:
    """Weights of integers or 8-bit floats; activations are not quantized, whatever the scheme says of floats."""

    flag = "compressed-tensors"
    _KEYS = frozenset({
        "config_groups", "format", "ignore", "quantization_status", "kv_cache_scheme", "sparsity_config",
        "transform_config", "moe_sparsity_config", "global_compression_ratio", "version",
    })  # fmt: skip

    def __init__(self, settings: Settings, index: Mapping[str, TensorInfo]):
        self.index = index
        for key in ("kv_cache_scheme", "transform_config", "moe_sparsity_config"):
            settings.must_be(key, {}, {"config_groups": {}})
        _refuse_sparsity(settings)
        if settings.word("quantization_status", ("compressed", "frozen"), "save the model compressed") is None:
            raise settings.error("quantization_status", "compressed or frozen")
        work = Work()
        self._ignore = Targets(settings, "ignore", work)
        groups = settings.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise settings.error("config_groups", "an object, name to scheme")
        self._groups = [
            group for name in groups if (group := _read_group(settings, name, groups[name], work)) is not None
        ]
        if not self._groups:
            raise settings.error("config_groups", "a group whose weights are quantized")
        self.unknown = unknown_keys(settings, self._KEYS)
        self.summary = "; ".join(dict.fromkeys(group.summary for group in self._groups))

    def is_packed(self, layer: str) -> bool:
        weight = self.index.get(f"{layer}.weight")
        return f"{layer}.weight_packed" in self.index or (weight is not None and weight.dtype in FLOAT8)

    def expected(self, layer: str) -> WeightFormat | None:
        if self._ignore.closeness(layer) is not None:
            return None
        closest = [(c, i) for i, group in enumerate(self._groups) if (c := group.targets.closeness(layer)) is not None]
        return self._format(self._groups[min(closest)[1]], layer) if closest else None

    def applied(self, layer: str) -> WeightFormat:
        is_float = f"{layer}.weight_packed" not in self.index
        fitting = [group for group in self._groups if (group.integers is None) == is_float]
        if len(fitting) != 1:
            raise ConfigError(
                f"{layer} is quantized, but the rules (config_groups, ignore) leave it out, and {len(fitting)} groups "
                "could say how; expected one; name the layer in the targets of its group"
            )
        return self._format(fitting[0], layer)

    def _format(self, group: _Group, layer: str) -> WeightFormat:
        return group.integers or float8(self.index, layer, group.block, group.scale)


def _refuse_sparsity(settings: Settings) -> None:
    sparsity = settings.get("sparsity_config")
    if sparsity is None or sparsity == {}:
        return
    if not isinstance(sparsity, dict) or sparsity.get("format") != "dense":
        raise settings.error(
            "sparsity_config", f"nothing, or format dense: sparse weights are not served; {_ELSEWHERE}"
        )


def _read_group(settings: Settings, name: str, values: Any, work: Work) -> _Group | None:
    """None: the group says nothing of weights."""
    if not isinstance(values, dict):
        raise settings.error("config_groups", f"an object with targets and weights for {name!r}")
    group = settings.nested("config_groups", values, f".{name}")
    if group.get("weights") is None:
        return None
    group.must_be("output_activations", {})
    weights = _table(group, "weights")
    _check_activations(group)
    if "targets" not in group:
        raise group.error("targets", "a list of names, patterns or classes of layers")
    targets = Targets(group, "targets", work)
    format_ = group.get("format") or settings.get("format")
    stated = group if "format" in group else settings
    known = ("pack-quantized", *_FLOATS)
    if format_ is None or format_ == _MIXED or stated.word("format", known, _ELSEWHERE) is None:
        raise stated.error("format", f"one of {', '.join(known)} for the group {name!r}; {_ELSEWHERE}")
    weights.must_be("dynamic", False)
    weights.must_be("scale_dtype", "float16", "bfloat16", "float32", "torch.float16", "torch.bfloat16", "torch.float32")
    if format_.lower() == "pack-quantized":
        return _Group(targets, _integers(weights))
    strategy, block = _floats(weights)
    return _Group(targets, None, strategy, block)


def _table(settings: Settings, key: str) -> Settings:
    values = settings.get(key)
    if not isinstance(values, dict):
        raise settings.error(key, "an object")
    return settings.nested(key, values)


def _check_activations(group: Settings) -> None:
    """Activations of 8-bit floats stay as they are, which is more accurate. Products of integers are something else."""
    if group.get("input_activations") is None:
        return
    activations = _table(group, "input_activations")
    if activations.get("type") != "float":
        raise activations.error(
            "type", f"float, or no input_activations: integer activations are not served; {_ELSEWHERE}"
        )
    if activations.get("num_bits") != 8:
        raise activations.error("num_bits", f"8; {_ELSEWHERE}")


def _integers(weights: Settings) -> PackQuantized:
    if weights.word("type", ("int",), _ELSEWHERE) is None:
        raise weights.error("type", "int")
    symmetric = weights.flag("symmetric")
    if symmetric is None:
        raise weights.error("symmetric", "true or false")
    strategy, group_size = _strategy(weights, ("group", "channel")), weights.get("group_size")
    if strategy == "channel" and group_size in (None, -1):
        size = -1
    elif strategy == "channel":
        raise weights.error("group_size", "-1 or nothing for the strategy channel")
    else:
        size = weights.group_size()
        if size == -1:
            raise weights.error("group_size", "a number of features for the strategy group")
    if "block_structure" in weights:
        raise weights.error("block_structure", "nothing for integers")
    # `group` reorders features, which weight_g_idx says.
    weights.must_be("actorder", False, True, "group", "dynamic", "weight", "static")
    reordered = weights.get("actorder") in (True, "group", "dynamic")
    return PackQuantized(weights.integer("num_bits", BITS), size, symmetric, reordered)


def _floats(weights: Settings) -> tuple[str, tuple[int, int] | None]:
    if weights.word("type", ("float",), _ELSEWHERE) is None:
        raise weights.error("type", "float")
    weights.integer("num_bits", (8,))
    weights.must_be("symmetric", True)
    weights.must_be("group_size", -1)
    weights.must_be("actorder", False, "weight", "static")
    strategy = _strategy(weights, ("tensor", "channel", "block"))
    block = block_structure(weights, "block_structure")
    if (block is not None) != (strategy == "block"):
        raise weights.error("block_structure", "two sizes with the strategy block, and nothing with another")
    return strategy, block


def _strategy(weights: Settings, served: tuple[str, ...]) -> str:
    strategy = weights.word("strategy", served, _ELSEWHERE)
    if strategy is None:
        raise weights.error("strategy", f"one of {', '.join(served)}")
    return strategy
