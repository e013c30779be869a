"""Loads cubins and launches their kernels through the CUDA driver's own interface, on torch's current stream.

Calls and constants as in the CUDA driver API manual. No GPU has run this file: its tests use a driver that only writes
down what it is told.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch

from .backend import Argument, pack
from .compile import compiled
from .libcuda import LEAST_CAPABILITY, Driver, DriverError, multiplies_bfloat16, too_old
from .streams import TorchStreams

logger = logging.getLogger(__name__)

_PROCESSORS = 16  # CU_DEVICE_ATTRIBUTE_*
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
STATIC_LIMIT = 48 << 10  # more shared memory must be asked for


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
            raise too_old(f"GPU {index}", self.capability)
        self.device = torch.device("cuda", index)
        self.num_processors = self.driver.attribute(index, _PROCESSORS)
        self.has_bfloat16 = multiplies_bfloat16(self.capability)
        self.architecture = "sm_{}{}".format(*self.capability)
        self._cache = cache
        self._modules: dict[tuple[str, tuple[tuple[str, int], ...]], GpuModule] = {}
        self._context = ctypes.c_void_p()
        # The context that torch uses as well.
        self.driver.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), index)
        self._current = threading.local()

    @cached_property
    def streams(self) -> TorchStreams:
        return TorchStreams(self.device)

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
