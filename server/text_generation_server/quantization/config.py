"""Which format stores which layer: found in the checkpoint's own files, checked against `--quantize`. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..checkpoint.index import TensorInfo
from ..errors import ConfigError
from .bitsandbytes import Quantize4bit, Quantize8bit
from .compressed import CompressedMethod
from .dense import Dense
from .detect import LOOKED_FOR, Request, Settings, Source, agreed_method, find_sources, own_tensors
from .format import WeightFormat
from .fp8 import QuantizeFp8
from .methods import AwqMethod, BitsandbytesMethod, Fp8Method, GptqMethod, Method
from .rules import HEAD
from .unserved import packed_tensor, refuse_packed, refuse_unserved

# Values of `--quantize` that quantize a dense checkpoint while it is loaded.
ON_THE_FLY: Mapping[str, WeightFormat] = {
    "bitsandbytes": Quantize8bit(),
    "bitsandbytes-nf4": Quantize4bit("nf4"),
    "bitsandbytes-fp4": Quantize4bit("fp4"),
    "fp8": QuantizeFp8(),
}
SERVED = ("awq", "compressed-tensors", "gptq", *ON_THE_FLY)
_METHODS: Mapping[str, Callable[[Settings, Mapping[str, TensorInfo]], Method]] = {
    "gptq": GptqMethod, "awq": AwqMethod, "bitsandbytes": BitsandbytesMethod, "fp8": Fp8Method,
    "fbgemm_fp8": Fp8Method, "compressed-tensors": CompressedMethod,
}  # fmt: skip
# Keys that mean something else in the files of one method.
_SYNONYMS = {"awq": {"version": "format"}}


class Quantization(Protocol):
    """How the linears of a checkpoint are stored, or are to be quantized while they are loaded."""

    @property
    def method(self) -> str | None:
        """The name that `--quantize` takes; None: the weights are not quantized."""
        ...

    @property
    def own_tensors(self) -> frozenset[str]:
        """Tensors of the checkpoint that state settings."""
        ...

    def describe(self) -> str:
        """One line: method, settings and where they were found."""
        ...

    def format_of(self, layer: str) -> WeightFormat:
        """The format of the linear with this full name.

        Raises:
            ConfigError: its tensors contradict the settings.
        """
        ...


@dataclass(frozen=True)
class Unquantized:
    """Every linear is stored as it is."""

    method = None
    own_tensors = frozenset[str]()

    def describe(self) -> str:
        return "weights are not quantized"

    def format_of(self, layer: str) -> WeightFormat:
        return Dense()


@dataclass(frozen=True)
class OnTheFly:
    """Every linear is stored as it is, and all but the head are quantized while they are loaded."""

    method: str
    own_tensors = frozenset[str]()

    def describe(self) -> str:
        return f"{self.method}: {ON_THE_FLY[self.method].name} (--quantize)"

    def format_of(self, layer: str) -> WeightFormat:
        return Dense() if layer == HEAD else ON_THE_FLY[self.method]


@dataclass(frozen=True)
class Prequantized:
    """The settings say how layers are stored, and the tensors that exist prove it of each."""

    rules: Method
    sources: Sequence[str]
    index: Mapping[str, TensorInfo]
    own_tensors: frozenset[str]

    @property
    def method(self) -> str:
        return self.rules.flag

    def describe(self) -> str:
        names = [repr(name)[1:-1][:40] for name in self.rules.unknown[:8]]
        more = f" and {len(self.rules.unknown) - 8} more" if len(self.rules.unknown) > 8 else ""
        unknown = f"; unknown keys without effect: {', '.join(names)}{more}" if names else ""
        return f"{self.method}: {self.rules.summary} ({', '.join(self.sources)}{unknown})"

    def format_of(self, layer: str) -> WeightFormat:
        expected, packed = self.rules.expected(layer), self.rules.is_packed(layer)
        if packed:
            return expected or self.rules.applied(layer)
        # One module may have been left as it is. What is missing altogether is missed as the settings say it.
        return Dense() if expected is None or f"{layer}.weight" in self.index else expected


def read_quantization(
    model_dir: Path, config: Mapping[str, Any], index: Mapping[str, TensorInfo], request: Request
) -> Quantization:
    """What the files of the folder say, or what `--quantize` asks for. Nothing is assumed.

    Raises:
        ConfigError: they contradict each other, or say something that is not served, or nothing where they must.
        CheckpointError: a file cannot be read.
    """
    if request.method is not None:
        refuse_unserved(request.method, f"--quantize {request.method}")
        if request.method not in SERVED:
            raise ConfigError(f"--quantize {request.method} is unknown; expected one of {', '.join(SERVED)}")
    sources = find_sources(model_dir, config, index, request)
    if not sources or not any(source.is_file for source in sources):
        return _without_files(model_dir, index, request, sources)
    return _from_sources(model_dir, index, request, sources)


def _without_files(
    model_dir: Path, index: Mapping[str, TensorInfo], request: Request, sources: Sequence[Source]
) -> Quantization:
    """No file says anything; flags may, of packed tensors."""
    if sources and any(name.endswith(".qweight") for name in index):
        return _from_sources(model_dir, index, request, sources)
    refuse_packed(model_dir, index)
    if sources:
        raise ConfigError(
            f"{model_dir}: {sources[0].name} is given, but the checkpoint has no .qweight tensors; leave it out to "
            "serve the weights as they are"
        )
    if request.method is None:
        return Unquantized()
    if request.method not in ON_THE_FLY:
        raise ConfigError(
            f"--quantize {request.method}: the weights in {model_dir} are not quantized (looked for {LOOKED_FOR} and "
            f"packed tensors); expected a {request.method} checkpoint; leave the flag out to serve the weights as they "
            f"are, or give one of {', '.join(ON_THE_FLY)} to quantize them while they are loaded"
        )
    return OnTheFly(request.method)


def _from_sources(
    model_dir: Path, index: Mapping[str, TensorInfo], request: Request, sources: Sequence[Source]
) -> Quantization:
    name = agreed_method(model_dir, sources)
    places = ", ".join(dict.fromkeys(source.name for source in sources))
    refuse_unserved(name, f"{model_dir}: {places}")
    if name not in _METHODS:
        raise ConfigError(
            f"{model_dir}: {places}: the method of quantization is {name}, which is unknown; expected one of "
            f"{', '.join(_METHODS)}; serve the weights that it was made from"
        )
    settings = Settings(model_dir, name, sources, _SYNONYMS.get(name, {}))
    method = _METHODS[name](settings, index)
    if request.method not in (None, method.flag):
        raise ConfigError(
            f"--quantize {request.method}, but {places} in {model_dir} says that the weights are {method.flag}: "
            f"{method.summary}; leave the flag out, or give --quantize {method.flag}"
        )
    if packed_tensor(index) is None:
        raise ConfigError(
            f"{model_dir}: {places} says that the weights are {method.flag} ({method.summary}), but no tensor is "
            "packed so; expected quantized weights; remove the settings to serve the weights as they are"
        )
    return Prequantized(method, settings.names, index, frozenset(own_tensors(index)))
