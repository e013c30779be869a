"""NVIDIA's driver, by ctypes: what is asked of it before anything else is loaded, and how calls fail. No torch here.

Calls and constants as in the CUDA driver API manual. No GPU has run this file.
"""

from __future__ import annotations

import ctypes
import importlib.util
import runpy
from dataclasses import dataclass
from pathlib import Path

from ...errors import ConfigError

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_*
_NAME_BYTES = 256
LEAST_CAPABILITY = (7, 5)
LIBRARY = "libcuda.so.1"
# Of the driver, by name: what is called here and in `driver.py`.
FUNCTIONS = (
    "cuInit", "cuGetErrorName", "cuDeviceGetCount", "cuDeviceGetName", "cuDeviceGetAttribute",
    "cuDevicePrimaryCtxRetain", "cuDevicePrimaryCtxRelease_v2", "cuCtxSetCurrent", "cuMemGetInfo_v2",
    "cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute", "cuLaunchKernel",
)  # fmt: skip
OTHER_GPUS = "name others by CUDA_VISIBLE_DEVICES"
ADVICE = "install NVIDIA's driver, give a container its GPUs (`--gpus all`), or use --device cpu"


class DriverError(ConfigError):
    """The driver is missing, has no GPU, or refused a call."""


class Driver:
    """libcuda, opened and initialized. What it shows obeys CUDA_VISIBLE_DEVICES.

    Raises:
        DriverError: there is no driver, or it has no GPU.
    """

    def __init__(self, library: str | None = None) -> None:
        try:
            self._library = ctypes.CDLL(library or LIBRARY)
        except OSError as error:
            raise DriverError(f"the NVIDIA driver was not found ({error}); {ADVICE}") from None
        if missing := [name for name in FUNCTIONS if not hasattr(self._library, name)]:
            path = library or LIBRARY
            raise DriverError(f"{path} is no NVIDIA driver that is served: it has no {missing[0]}; {ADVICE}")
        try:
            self.call("cuInit", 0)
            count = ctypes.c_int()
            self.call("cuDeviceGetCount", ctypes.byref(count))
        except DriverError as error:
            raise DriverError(f"the NVIDIA driver sees no usable GPU ({error}); {ADVICE}") from None
        if count.value < 1:
            raise DriverError(f"the NVIDIA driver sees no GPU (see CUDA_VISIBLE_DEVICES); {ADVICE}")
        self.num_devices = count.value

    def call(self, name: str, *arguments: object) -> None:
        """Raises DriverError with the driver's name of what went wrong."""
        code = getattr(self._library, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(code, ctypes.byref(text))
            raise DriverError(f"{name} failed: {(text.value or b'').decode() or f'error {code}'}")

    def attribute(self, device: int, which: int) -> int:
        value = ctypes.c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(value), which, device)
        return value.value

    def capability(self, device: int) -> tuple[int, int]:
        return self.attribute(device, _MAJOR), self.attribute(device, _MINOR)

    def name(self, device: int) -> str:
        text = ctypes.create_string_buffer(_NAME_BYTES)
        self.call("cuDeviceGetName", text, _NAME_BYTES, device)
        return text.value.decode(errors="replace")

    def memory(self, device: int) -> tuple[int, int]:
        """Bytes of a GPU that are free, and all of them. Takes a moment: the driver tells it to a context alone."""
        context, free, total = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        try:
            self.call("cuCtxSetCurrent", context)
            self.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        finally:
            self.call("cuDevicePrimaryCtxRelease_v2", device)
        return free.value, total.value


def check_torch(version: Path | None = None) -> None:
    """Looks whether torch is built for CUDA, without importing it. version: its `version.py`, which holds facts alone.

    Raises:
        DriverError: it is built for processors alone.
    """
    if version is None:
        spec = importlib.util.find_spec("torch")
        assert spec is not None and spec.origin is not None, "torch is installed with the server"
        version = Path(spec.origin).with_name("version.py")
    facts = runpy.run_path(str(version))
    if facts["cuda"] is None:
        raise DriverError(
            f"torch {facts['__version__']} is built for processors alone; install the default build of torch "
            "(`make install` without TORCH_INDEX_URL), or use --device cpu"
        )


@dataclass(frozen=True)
class VisibleGpu:
    """A GPU that a rank could have. Sizes in bytes."""

    index: int
    name: str
    capability: tuple[int, int]
    free_bytes: int
    total_bytes: int
    has_bfloat16: bool


def visible_gpus(count: int | None = None, driver: Driver | None = None) -> list[VisibleGpu]:
    """What the first `count` of the visible GPUs offer; all of them if None.

    Raises:
        DriverError: there are not as many, or one is older than any that our kernels compile for.
    """
    driver = driver or Driver()
    if count is not None and count < 1:
        raise DriverError(f"--num-shard {count}; expected at least 1")
    if count is not None and count > driver.num_devices:
        seen = f"the NVIDIA driver shows {driver.num_devices} (see CUDA_VISIBLE_DEVICES)"
        raise DriverError(f"--num-shard {count} needs as many GPUs, {seen}; use --num-shard {driver.num_devices}")
    gpus = []
    for index in range(driver.num_devices if count is None else count):
        name, capability = driver.name(index), driver.capability(index)
        if capability < LEAST_CAPABILITY:
            raise too_old(f"GPU {index} ({name})", capability)
        try:
            free, total = driver.memory(index)
        except DriverError as error:
            raise DriverError(
                f"GPU {index} ({name}) cannot be used: {error}; end what uses it, or {OTHER_GPUS}"
            ) from None
        gpus.append(VisibleGpu(index, name, capability, free, total, multiplies_bfloat16(capability)))
    return gpus


def multiplies_bfloat16(capability: tuple[int, int]) -> bool:
    return capability >= (8, 0)


def too_old(what: str, capability: tuple[int, int]) -> DriverError:
    found, least = (".".join(map(str, pair)) for pair in (capability, LEAST_CAPABILITY))
    return DriverError(f"{what} has compute capability {found}; at least {least} is needed")
