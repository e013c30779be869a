"""Settings of a shard: what the command line says, checked once and passed down as one frozen value."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from .errors import ConfigError

DTYPES = ("float32", "bfloat16", "float16")
DEVICES = ("cpu", "cuda")
# Of rows whose steps are recorded as CUDA graphs, if nothing else is said.
RECORDED_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
MOST_RECORDED = 1024
LEVELS = ("TRACE", "DEBUG", "INFO", "WARNING", "ERROR")


@dataclass(frozen=True)
class ServeConfig:
    """How one rank serves. Sizes in bytes."""

    model_dir: Path
    rank: int
    world_size: int
    uds_path: Path
    num_threads: int
    memory_bytes: int
    dtype: str | None
    quantize: str | None
    gptq_bits: int | None
    gptq_groupsize: int | None
    device: str
    instruction_set: str | None
    kernel_cache: Path | None
    exit_with_stdin: bool
    logits_digest_dir: Path | None
    fault_file: Path | None
    watermark_gamma: float = 0.5
    watermark_delta: float = 2.0
    # Numbers of rows of which a device's steps are recorded.
    recorded_sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.world_size < 1 or not 0 <= self.rank < self.world_size:
            raise ConfigError(f"--rank {self.rank} is not below --world-size {self.world_size}")
        if self.num_threads < 1:
            raise ConfigError(f"--num-threads is {self.num_threads}, at least 1 is needed")
        if self.memory_bytes < 1:
            raise ConfigError(f"--memory-bytes is {self.memory_bytes}, a positive number is needed")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"--dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        if not 0 < self.watermark_gamma <= 1:
            raise ConfigError(f"--watermark-gamma is {self.watermark_gamma}, expected a share above 0 and up to 1")
        if not math.isfinite(self.watermark_delta):
            raise ConfigError(f"--watermark-delta is {self.watermark_delta}, expected a number")
        if self.device not in DEVICES:
            raise ConfigError(f"--device is {self.device!r}, expected one of {', '.join(DEVICES)}")
        if any(not 0 < size <= MOST_RECORDED for size in self.recorded_sizes):
            sizes = ",".join(map(str, self.recorded_sizes))
            raise ConfigError(f"--cuda-graphs is {sizes}, expected numbers of rows from 1 to {MOST_RECORDED}, or 0")
        if len(str(self.uds_path).encode()) > 107:
            raise ConfigError(f"--uds-path {self.uds_path} is longer than the 107 bytes of a Unix socket's name")


def read_sizes(text: str | None) -> tuple[int, ...]:
    """Numbers of rows with commas between; 0: none. None: those that are usual."""
    if text is None:
        return RECORDED_SIZES
    try:
        sizes = tuple(int(word) for word in text.split(",") if word.strip())
    except ValueError:
        raise ConfigError(f"--cuda-graphs is {text!r}, expected numbers with commas between, or 0") from None
    return () if sizes == (0,) else sizes


def prepare_environment(serves: bool = True) -> None:
    """Settings of libraries that read the environment once, as they are loaded. A user's own setting wins."""
    if serves:
        # Threads that spin at barriers steal the processor from other ranks, the router and each other: a step of 12 ms
        # took 140 ms on two busy cores.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    elif "OMP_WAIT_POLICY" not in os.environ:
        # Who computes alone would lose up to a half of its time by sleeping at once, and as much by spinning for long
        # where another process wants the processor too.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
