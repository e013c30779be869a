"""Which format stores which layer: found in the checkpoint's own files, checked against `--quantize`. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..checkpoint.index import TensorInfo
from ..errors import ConfigError
from .dense import Dense
from .format import WeightFormat


class Quantization(Protocol):
    """How the linears of a checkpoint are stored, or are to be quantized while they are loaded."""

    @property
    def method(self) -> str | None:
        """The name that `--quantize` takes; None: the weights are not quantized."""
        ...

    def describe(self) -> str:
        """One line: method, settings and where they were found."""
        ...

    def format_of(self, layer: str) -> WeightFormat:
        """The format of the linear with this full name."""
        ...


@dataclass(frozen=True)
class Unquantized:
    """Every linear is stored as it is."""

    method = None

    def describe(self) -> str:
        return "weights are not quantized"

    def format_of(self, layer: str) -> WeightFormat:
        return Dense()


def read_quantization(
    model_dir: Path, config: Mapping[str, Any], index: Mapping[str, TensorInfo], requested: str | None
) -> Quantization:
    """What the files of the folder say, or what `--quantize` asks for.

    Raises:
        ConfigError: they contradict each other, or say something that is not served, or nothing where they must.
    """
    if requested is not None:
        raise ConfigError(f"--quantize {requested} is not served yet; leave it out to serve the weights as they are")
    quantization = config.get("quantization_config") or config.get("compression_config")
    if quantization is not None:
        raise ConfigError(f"{model_dir / 'config.json'}: quantized checkpoints are not served yet")
    return Unquantized()
