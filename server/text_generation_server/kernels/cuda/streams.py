"""What is asked of torch's CUDA runtime beyond tensors: memory, pinned copies, events, graphs; whether the GPU lives.

One thin interface, so that tests can put something else in its place. No GPU has run this file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .libcuda import DriverError


class Fetched(Protocol):
    """A copy to the host that was put into the stream."""

    def is_done(self) -> bool: ...

    def wait(self) -> Tensor:
        """The copy, on the host. Raises what went wrong on the device."""
        ...


class Graph(Protocol):
    """Work that was recorded, to be done again on the same memory."""

    def replay(self) -> None: ...


class Streams(Protocol):
    """The current stream of one device, in which everything happens in order."""

    def upload(self, values: NDArray[np.int64], into: Tensor) -> None:
        """Puts a copy of `values` into a tensor of as many int64; the array may change at once."""
        ...

    def fetch(self, tensor: Tensor) -> Fetched:
        """Puts a copy to the host into the stream: of what the tensor holds then."""
        ...

    def record(self, work: Callable[[], None]) -> Graph:
        """What `work` puts into the stream, which is not done now. All graphs share one pool of memory."""
        ...

    def memory(self) -> tuple[int, int]:
        """Bytes of the device that are free, and that this process's tensors hold."""
        ...

    def peak_bytes(self, forget: bool = False) -> int:
        """The most that tensors held since it was forgotten. forget: begin anew, first."""
        ...

    def lost(self) -> str | None:
        """Why the device can no longer be used by this process; None: it can."""
        ...


class _Copy:
    def __init__(self, tensor: Tensor) -> None:
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record()

    def is_done(self) -> bool:
        return bool(self._event.query())

    def wait(self) -> Tensor:
        self._event.synchronize()
        return self._host


class TorchStreams:
    """Implements `Streams`. Made on the thread that computes.

    Raises:
        DriverError: torch cannot use the device, though the driver can.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        try:
            torch.cuda.set_device(device)
            torch.cuda.mem_get_info(device)
        except (RuntimeError, AssertionError) as error:
            first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DriverError(
                f"--device cuda: torch {torch.__version__}, built for CUDA {torch.version.cuda}, cannot use {device}: "
                f"{first_line}; update NVIDIA's driver, or use --device cpu"
            ) from None
        self._pool: Any = None

    def upload(self, values: NDArray[np.int64], into: Tensor) -> None:
        # Torch gives pinned memory out again only after the copies from it.
        staged = torch.empty(len(values), dtype=torch.int64, pin_memory=True)
        staged.numpy()[:] = values
        into.copy_(staged, non_blocking=True)

    def fetch(self, tensor: Tensor) -> Fetched:
        return _Copy(tensor)

    def record(self, work: Callable[[], None]) -> Graph:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            work()
        return graph

    def memory(self) -> tuple[int, int]:
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self._device)[0]), int(torch.cuda.memory_reserved(self._device))

    def peak_bytes(self, forget: bool = False) -> int:
        if forget:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
        return int(torch.cuda.max_memory_reserved(self._device))

    def lost(self) -> str | None:
        try:
            torch.cuda.synchronize(self._device)
        except RuntimeError as error:
            return str(error).strip().split("\n")[0]
        return None
