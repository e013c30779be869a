"""What a run of the quantizer was asked for, checked once. Never imports torch."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError

METHODS = ("gptq", "awq", "bitsandbytes-nf4", "bitsandbytes-fp4", "bitsandbytes", "rtn")
BITS = (2, 3, 4, 8)
GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)
DEFAULT_GROUP = 128
DEFAULT_SAMPLES = 128
DEFAULT_LENGTH = 2048
_SIZES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30,
          "ti": 1 << 40}  # fmt: skip


@dataclass(frozen=True)
class Scheme:
    """How the linears of a model are to be stored.

    group_size: -1: one group. module_bits: (pattern, bits), the first that matches a layer's name holds.
    """

    method: str = "gptq"
    bits: int = 4
    group_size: int = DEFAULT_GROUP
    sym: bool = True
    excluded: tuple[str, ...] = ()
    module_bits: tuple[tuple[str, int], ...] = ()

    def bits_of(self, layer: str) -> int | None:
        """Bits of the layer; None: it is left as it is."""
        if any(matches(pattern, layer) for pattern in self.excluded):
            return None
        return next((bits for pattern, bits in self.module_bits if matches(pattern, layer)), self.bits)

    @property
    def in_gptq_layout(self) -> bool:
        return self.method in ("gptq", "rtn")

    @property
    def checkpoint_format(self) -> str:
        """Of gptq's layout: the one that every reader takes, but with zero points GPTQModel takes the second alone."""
        return "gptq" if self.sym else "gptq_v2"


@dataclass(frozen=True)
class Solver:
    """How codes are found: damping is a share of the mean diagonal of the Hessian, as in GPTQ's `--percdamp`."""

    damping: float = 0.01
    act_order: bool = True
    static_groups: bool = True
    mse: bool = True


@dataclass(frozen=True)
class Sampling:
    """Which text is measured, and how much. `num_samples`: None: as many as there are, at most 128."""

    dataset: str | None = None
    num_samples: int | None = None
    length: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Resources:
    """What a run may use. None: what is there. Sizes in bytes."""

    device: str = "cpu"
    dtype: str | None = None
    num_threads: int | None = None
    max_memory: int | None = None
    max_device_memory: int | None = None


@dataclass(frozen=True)
class Options:
    """Everything that one command says."""

    model_dir: Path
    output_dir: Path
    model_name: str
    scheme: Scheme = field(default_factory=Scheme)
    solver: Solver = field(default_factory=Solver)
    sampling: Sampling = field(default_factory=Sampling)
    resources: Resources = field(default_factory=Resources)
    max_ppl_increase: float | None = None
    overwrite: bool = False
    upload_to: str | None = None

    def __post_init__(self) -> None:
        check(self.scheme, self.solver)
        sampling, resources = self.sampling, self.resources
        if sampling.num_samples is not None and sampling.num_samples < 1:
            raise ConfigError(f"--num-samples is {sampling.num_samples}; expected at least 1")
        if sampling.length is not None and sampling.length < 8:
            raise ConfigError(f"--sequence-length is {sampling.length}; expected at least 8 tokens")
        if not 0 <= sampling.seed < 1 << 63:
            raise ConfigError(f"--seed is {sampling.seed}; expected a number from 0 to 2**63 - 1")
        if resources.dtype not in (None, "float32", "bfloat16"):
            raise ConfigError(f"--dtype is {resources.dtype!r}; expected float32 or bfloat16")
        if resources.num_threads is not None and not 1 <= resources.num_threads <= 1024:
            raise ConfigError(f"--num-threads is {resources.num_threads}; expected 1 to 1024")
        if resources.max_device_memory is not None and resources.device == Resources.device:
            raise ConfigError(
                f"--max-device-memory has no meaning for --device {resources.device}; leave it out, or see --max-memory"
            )
        if self.max_ppl_increase is not None and not 0 <= self.max_ppl_increase < 1e9:
            raise ConfigError(f"--max-ppl-increase is {self.max_ppl_increase}; expected a number of at least 0")

    @property
    def title(self) -> str:
        """What the model is called, without the way to where it lies on this machine."""
        return self.hub_id or self.model_dir.resolve().name

    @property
    def hub_id(self) -> str | None:
        """Of a model that came from the hub."""
        return None if Path(self.model_name).is_dir() else self.model_name

    def making(self) -> dict[str, Any]:
        """Every option that the result depends on, as JSON values."""
        return {
            "scheme": _plain(asdict(self.scheme)),
            "solver": asdict(self.solver) if self.scheme.method == "gptq" else {"mse": self.solver.mse},
            # The text itself is remembered by its tokens.
            "sampling": {key: value for key, value in asdict(self.sampling).items() if key != "dataset"},
        }


def check(scheme: Scheme, solver: Solver) -> None:
    """Refuses what no method makes.

    Raises:
        ConfigError: names the flag, what it says and what it may say.
    """
    method = scheme.method
    if method not in METHODS:
        raise ConfigError(f"--method {method} is unknown; expected one of {', '.join(METHODS)}")
    for flag, bits in (("--bits", scheme.bits), *((f"--module-bits {p}={b}", b) for p, b in scheme.module_bits)):
        if bits not in BITS:
            said = f"{flag} {bits}" if flag == "--bits" else flag
            raise ConfigError(f"{said} is not made; expected one of {', '.join(map(str, BITS))}")
    needed = {"awq": 4, "bitsandbytes": 8, "bitsandbytes-nf4": 4, "bitsandbytes-fp4": 4}.get(method)
    if needed is not None and scheme.bits != needed:
        raise ConfigError(f"--method {method} has {needed} bits, but --bits is {scheme.bits}; leave --bits out")
    if scheme.module_bits and not scheme.in_gptq_layout:
        raise ConfigError(f"--module-bits needs --method gptq or rtn; {method} has one number of bits for all layers")
    if scheme.group_size not in GROUP_SIZES:
        raise ConfigError(
            f"--groupsize {scheme.group_size} is not made; expected one of {', '.join(map(str, GROUP_SIZES))} (-1: one "
            "group for each output)"
        )
    if not 0 < solver.damping <= 1:
        raise ConfigError(f"--percdamp is {solver.damping}; expected more than 0 and at most 1")
    for pattern in (*scheme.excluded, *(pattern for pattern, _ in scheme.module_bits)):
        if not pattern or not pattern.isprintable() or set(pattern) & set("\"'\\()|+^${}"):
            raise ConfigError(
                f"pattern {pattern!r} is not one; expected a layer's name, or the end of one, in which * stands for "
                "anything, ? for one letter and [0-9] for one of several: 'down_proj', 'model.layers.0.*'"
            )


def choose_scheme(
    method: str, bits: int | None, group_size: int | None, sym: bool | None, excluded: list[str],
    module_bits: tuple[tuple[str, int], ...],
) -> Scheme:  # fmt: skip
    """What the flags say, and what is usual for the method where they are silent.

    Raises:
        ConfigError: a flag that the method has no use for.
    """
    if method.startswith("bitsandbytes"):
        _refuse_unused(method, {"--groupsize": group_size, "--sym": sym})
        sym, group_size = True, DEFAULT_GROUP
    usual_bits = 8 if method == "bitsandbytes" else 4
    return Scheme(
        method,
        usual_bits if bits is None else bits,
        DEFAULT_GROUP if group_size is None else group_size,
        method != "awq" if sym is None else sym,
        tuple(excluded),
        module_bits,
    )


def choose_solver(
    method: str, damping: float | None, act_order: bool | None, static_groups: bool | None, mse: bool | None
) -> Solver:
    """As `choose_scheme`."""
    if method != "gptq":
        unused = {"--percdamp": damping, "--act-order": act_order, "--static-groups": static_groups}
        _refuse_unused(method, unused)
        if method != "rtn":
            _refuse_unused(method, {"--mse": mse})
    usual = Solver()
    return Solver(
        usual.damping if damping is None else damping,
        usual.act_order if act_order is None else act_order,
        usual.static_groups if static_groups is None else static_groups,
        usual.mse if mse is None else mse,
    )


def _refuse_unused(method: str, flags: dict[str, Any]) -> None:
    for flag, value in flags.items():
        if value is not None:
            raise ConfigError(f"{flag} has no meaning for --method {method}; leave it out")


def matches(pattern: str, layer: str) -> bool:
    """Whether the pattern (see `--exclude`) means this layer: its full name, or the end of it behind a dot."""
    return fnmatch.fnmatchcase(layer, pattern) or fnmatch.fnmatchcase(layer, f"*.{pattern}")


def as_regex(pattern: str) -> str:
    """The same as a regular expression over full names, as GPTQModel's `dynamic` takes it."""
    body = "".join(
        {"*": ".*", "?": "."}.get(part, part if part.startswith("[") else re.escape(part))
        for part in re.findall(r"\[[^\]]*\]|.", pattern.replace("[!", "[^"))
    )
    return rf"^(.*\.)?{body}$"


def read_module_bits(texts: list[str]) -> tuple[tuple[str, int], ...]:
    """`PATTERN=BITS` of the command line."""
    found = []
    for text in texts:
        pattern, equals, bits = text.rpartition("=")
        if not equals or not bits.isdecimal():
            raise ConfigError(f"--module-bits {text!r} is not PATTERN=BITS; expected for example 'down_proj=8'")
        found.append((pattern, int(bits)))
    return tuple(found)


def read_size(flag: str, text: str | None) -> int | None:
    """A number of bytes: `24GiB`, `24g`, `25769803776`."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?|)b?\s*", text.lower())
    size = int(float(found[1]) * _SIZES[found[2]]) if found else 0
    if size < 1:
        raise ConfigError(f"{flag} {text!r} is not a size; expected for example 24GiB, 16GB or 8589934592")
    return size


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back: lists for tuples."""

    def plain(value: Any) -> Any:
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    return {key: plain(value) for key, value in values.items()}
