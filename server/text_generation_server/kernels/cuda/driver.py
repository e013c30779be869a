"""Loads cubins and launches their kernels through the CUDA driver's own interface, on torch's current stream.

The driver is loaded with ctypes; calls and constants as in the CUDA driver API manual. No GPU has run this file: its
tests use a driver that only writes down what it is told.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Mapping
from pathlib import Path

import torch

from ...errors import ConfigError
from .backend import Argument, pack
from .compile import compiled

logger = logging.getLogger(__name__)

_MAJOR, _MINOR, _PROCESSORS = 75, 76, 16  # CU_DEVICE_ATTRIBUTE_*
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
STATIC_LIMIT = 48 << 10  # more shared memory must be asked for
LEAST_CAPABILITY = (7, 5)
LIBRARY = "libcuda.so.1"


class DriverError(ConfigError):
    """The driver is missing, has no GPU, or refused a call."""


class Driver:
    """libcuda, opened and initialized.

    Raises:
        DriverError: there is no driver, or it has no GPU.
    """

    def __init__(self, library: str | None = None) -> None:
        try:
            self._library = ctypes.CDLL(library or LIBRARY)
        except OSError as error:
            raise DriverError(f"the NVIDIA driver was not found ({error})") from None
        self.call("cuInit", 0)
        count = ctypes.c_int()
        self.call("cuDeviceGetCount", ctypes.byref(count))
        if count.value < 1:
            raise DriverError("the NVIDIA driver sees no GPU")
        self.num_devices = count.value

    def call(self, name: str, *arguments: object) -> None:
        """Raises DriverError with the driver's name of what went wrong."""
        code = getattr(self._library, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(code, ctypes.byref(text))
            raise DriverError(f"{name} failed: {(text.value or b'').decode() or code}")

    def attribute(self, device: int, which: int) -> int:
        value = ctypes.c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(value), which, device)
        return value.value

    def capability(self, device: int) -> tuple[int, int]:
        return self.attribute(device, _MAJOR), self.attribute(device, _MINOR)


class Gpu:
    """One GPU as a `Backend`.

    Raises:
        DriverError: there is no such GPU, or it is older than any that our kernels compile for.
    """

    def __init__(self, index: int = 0, driver: Driver | None = None, cache: Path | None = None) -> None:
        self.driver = driver or Driver()
        if not 0 <= index < self.driver.num_devices:
            raise DriverError(f"GPU {index} of {self.driver.num_devices} was asked for")
        self.capability = self.driver.capability(index)
        if self.capability < LEAST_CAPABILITY:
            raise DriverError(
                f"GPU {index} has compute capability {self.capability}; at least {LEAST_CAPABILITY} is needed"
            )
        self.device = torch.device("cuda", index)
        self.num_processors = self.driver.attribute(index, _PROCESSORS)
        self.has_bfloat16 = self.capability >= (8, 0)
        self.architecture = "sm_{}{}".format(*self.capability)
        self._cache = cache
        self._modules: dict[tuple[str, tuple[tuple[str, int], ...]], GpuModule] = {}
        self._context = ctypes.c_void_p()
        # The context that torch uses as well.
        self.driver.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), index)
        self._current = threading.local()

    def module(self, source: str, defines: Mapping[str, int]) -> GpuModule:
        key = (source, tuple(sorted(defines.items())))
        if key not in self._modules:
            self.use()
            self._modules[key] = GpuModule(self, compiled(source, defines, self.architecture, self._cache).code)
        return self._modules[key]

    def use(self) -> None:
        """Makes the context this thread's current one."""
        if not getattr(self._current, "is_set", False):
            self.driver.call("cuCtxSetCurrent", self._context)
            self._current.is_set = True

    def stream(self) -> int:
        return torch.cuda.current_stream(self.device).cuda_stream


class GpuModule:
    """A cubin in the memory of a GPU."""

    def __init__(self, gpu: Gpu, code: bytes) -> None:
        self._gpu = gpu
        self._module = ctypes.c_void_p()
        gpu.driver.call("cuModuleLoadData", ctypes.byref(self._module), code)
        self._functions: dict[str, ctypes.c_void_p] = {}
        self._allowed: dict[str, int] = {}

    def launch(self, kernel: str, grid: tuple[int, int, int], threads: int, shared: int, *arguments: Argument) -> None:
        self._gpu.use()
        function = self._function(kernel)
        if shared > self._allowed.get(kernel, STATIC_LIMIT):
            self._gpu.driver.call("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, shared)
            self._allowed[kernel] = shared
        pointers, _kept = pack(arguments)
        stream = ctypes.c_void_p(self._gpu.stream())
        self._gpu.driver.call("cuLaunchKernel", function, *grid, threads, 1, 1, shared, stream, pointers, None)

    def _function(self, kernel: str) -> ctypes.c_void_p:
        if kernel not in self._functions:
            function = ctypes.c_void_p()
            self._gpu.driver.call("cuModuleGetFunction", ctypes.byref(function), self._module, kernel.encode())
            self._functions[kernel] = function
        return self._functions[kernel]
