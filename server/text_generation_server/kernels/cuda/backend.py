"""What runs compiled kernels: a GPU (`driver.py`), or a processor that emulates one (`emulation/emulator.py`)."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from .streams import Streams

# A tensor goes as its address, None as a null pointer, an int as 32 bits, a float as float32, a structure as it is.
Argument = Tensor | int | float | None | ctypes.Structure | ctypes.c_int64


class Module(Protocol):
    """A file of `sources`, compiled with some definitions."""

    def launch(self, kernel: str, grid: tuple[int, int, int], threads: int, shared: int, *arguments: Argument) -> None:
        """Puts a kernel in the current stream. shared: bytes of dynamic shared memory."""
        ...


class Backend(Protocol):
    """A device that runs modules."""

    device: torch.device
    # Of multiprocessors: how many blocks are needed to keep them busy.
    num_processors: int
    # Whether it multiplies bfloat16.
    has_bfloat16: bool

    @property
    def streams(self) -> Streams:
        """In which everything is put."""
        ...

    def module(self, source: str, defines: Mapping[str, int]) -> Module:
        """The same object for the same arguments."""
        ...


def pack(arguments: tuple[Argument, ...]) -> tuple[Any, list[Any]]:
    """An array of pointers to the arguments, as `cuLaunchKernel` wants them, and what must stay alive meanwhile."""
    values: list[Any] = []
    for argument in arguments:
        if argument is None:
            values.append(ctypes.c_void_p(0))
        elif isinstance(argument, Tensor):
            values.append(ctypes.c_void_p(argument.data_ptr()))
        elif isinstance(argument, int):
            values.append(ctypes.c_int32(argument))
        elif isinstance(argument, float):
            values.append(ctypes.c_float(argument))
        else:
            values.append(argument)
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    return pointers, values
