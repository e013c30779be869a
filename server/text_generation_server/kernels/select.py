"""From the name of a device to its kernels and its dtype. Importing this does not import torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError
from .cpu.features import computes_bfloat16

if TYPE_CHECKING:
    from .interface import Kernels


def compute_dtype(device: str, requested: str | None, quantized: bool) -> str:
    """The dtype of weights, activations and cache: what was asked for, else the fastest that is safe on the device.

    Where weights are quantized that is bfloat16 on every processor: the products with packed integers take no other.

    Raises:
        ConfigError: the device, or the dtype on this device, is not served.
    """
    _check_device(device)
    if device == "cuda":
        if requested not in (None, "float16", "bfloat16"):
            raise ConfigError(f"--dtype {requested} is not served on cuda; use --dtype bfloat16 or float16")
        return requested or "bfloat16"
    if requested is None:
        return "bfloat16" if quantized or computes_bfloat16() else "float32"
    if requested == "float16":
        raise ConfigError(
            "--dtype float16 is not served on cpu: no processor multiplies it natively, and it overflows where "
            "bfloat16 does not; use --dtype float32 or bfloat16 (float16 checkpoints are converted)"
        )
    if requested not in ("float32", "bfloat16"):
        raise ConfigError(f"--dtype {requested} is unknown; expected float32 or bfloat16")
    return requested


def select_kernels(
    device: str, instruction_set: str | None = None, kernel_cache: Path | None = None, index: int = 0
) -> Kernels:
    """The kernels of a device. On processors it proves what it can of their row stability, so it takes a moment.

    instruction_set: of our own kernels for processors; by default the best that this one executes.
    kernel_cache: where kernels for GPUs are kept that were compiled; by default in the user's cache.
    index: which of the GPUs that this process sees.

    Raises:
        ConfigError: the device is unknown, or this machine has none.
    """
    _check_device(device)
    if device == "cuda":
        from .cuda.driver import Gpu
        from .cuda.kernels import CudaKernels
        from .cuda.libcuda import DriverError

        try:
            return CudaKernels(Gpu(index, cache=kernel_cache))
        except DriverError as error:
            raise ConfigError(f"--device cuda: {error}") from None
    from .cpu.kernels import CpuKernels

    return CpuKernels(instruction_set)


def _check_device(device: str) -> None:
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"--device {device} is unknown; expected cpu or cuda")
