"""Which layers a checkpoint's settings speak of, as the libraries that write them match names. Never imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .detect import Settings
from .patterns import Pattern, Work

# A list of names has one for every layer at most; regular expressions are few.
MAX_RULES = 20_000
MAX_PATTERNS = 1000
# The output head: what the libraries leave as it is unless they are told otherwise.
HEAD = "lm_head"


def read_names(settings: Settings, key: str) -> list[str]:
    """A list of names, or of lists of names."""
    value = settings.get(key)
    if isinstance(value, list) and value and all(isinstance(item, list) for item in value):
        value = [name for part in value for name in part]
    elif value is not None and not isinstance(value, list):
        raise settings.error(key, "a list of names")
    names: list[str] = []
    for item in value or []:
        if not isinstance(item, str) or not item:
            raise settings.error(key, "a list of names")
        names.append(item)
    if len(names) > MAX_RULES:
        raise settings.error(key, f"at most {MAX_RULES} names")
    return names


def compile_patterns(settings: Settings, key: str, texts: Sequence[str], work: Work) -> list[Pattern]:
    """Regular expressions of the setting `key`."""
    if len(texts) > MAX_PATTERNS:
        raise settings.error(key, f"at most {MAX_PATTERNS} patterns")
    return [Pattern(text, settings.where(key), work) for text in texts]


class Skipped:
    """Layers that transformers leaves as they are: by the start of a name up to a dot, as a pattern, or its end."""

    def __init__(self, settings: Settings, keys: Sequence[str], *, also_inside: bool = False):
        self._names = frozenset[str]()
        self._patterns: list[Pattern] = []
        self._inside: list[str] = []
        work = Work()
        for key in keys:
            names = read_names(settings, key)
            self._names |= frozenset(names)
            self._inside += names if also_inside else []
            # Plain names, of which there may be thousands, need no pattern: a dot is meant as a dot.
            texts = [name for name in names if not set(name) <= _PLAIN]
            self._patterns += compile_patterns(settings, key, texts, work) if texts else []

    def __bool__(self) -> bool:
        return bool(self._names)

    def __contains__(self, layer: str) -> bool:
        words = layer.split(".")
        starts = [".".join(words[:n]) for n in range(1, len(words) + 1)]
        if any(start in self._names or start + "." in self._names for start in starts) or layer.endswith(self._ends):
            return True
        # AutoAWQ: anywhere in the name.
        if any(name in layer for name in self._inside):
            return True
        return any(_at_boundary(layer, end) for pattern in self._patterns for end in pattern.ends(layer))

    @cached_property
    def _ends(self) -> tuple[str, ...]:
        return tuple(self._names)


_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.")


def _at_boundary(layer: str, end: int) -> bool:
    return end == len(layer) or layer[end] == "." or (end > 0 and layer[end - 1] == ".")


class Targets:
    """Layers as compressed-tensors names them: exactly, by a pattern after `re:`, or by their class."""

    def __init__(self, settings: Settings, key: str, work: Work):
        names = read_names(settings, key)
        texts = [name.removeprefix("re:") for name in names if name.startswith("re:")]
        self.names = frozenset(name for name in names if not name.startswith("re:"))
        self.patterns = compile_patterns(settings, key, texts, work) if texts else []

    def closeness(self, layer: str) -> int | None:
        """How closely a linear layer is meant: 0 by its name, 1 by a pattern, 2 by its class; None: not at all."""
        if layer in self.names:
            return 0
        if any(pattern.matches(layer) for pattern in self.patterns):
            return 1
        return 2 if "Linear" in self.names else None


@dataclass(frozen=True)
class Override:
    """One rule of GPTQModel's `dynamic`: layers that match differ in these settings, or are not quantized."""

    pattern: Pattern
    settings: Settings | None  # None: not quantized


def read_dynamic(settings: Settings) -> list[Override]:
    """The rules in their order, of which the first that matches holds. `+:` or nothing: differs. `-:`: is skipped."""
    rules = settings.get("dynamic")
    if rules is None:
        return []
    if not isinstance(rules, dict):
        raise settings.error("dynamic", "an object, pattern to settings")
    work, overrides = Work(), []
    texts = [text.removeprefix("-:").removeprefix("+:") for text in rules]
    patterns = compile_patterns(settings, "dynamic", texts, work)
    for (text, values), pattern in zip(rules.items(), patterns, strict=True):
        skipped = text.startswith("-:") or values is False
        if not skipped and not isinstance(values, dict):
            raise settings.error("dynamic", f"an object of settings, or false, for {text!r}")
        overrides.append(Override(pattern, None if skipped else _inside(settings, text, values)))
    return overrides


def _inside(settings: Settings, text: str, values: dict[str, Any]) -> Settings:
    return settings.nested("dynamic", values, f"[{text!r}]")
