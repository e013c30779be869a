"""The tensors of a checkpoint, read slice by slice when asked for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import CheckpointError
from .index import TensorInfo


class Checkpoint:
    """Every tensor of a model folder by its full name. Files are mapped into memory while this object is open."""

    def __init__(self, index: Mapping[str, TensorInfo], on_read: Callable[[int], None] = lambda num_bytes: None):
        self._index, self._on_read = index, on_read
        self._files: dict[Path, Any] = {}
        self.bytes_read = 0

    def __contains__(self, name: str) -> bool:
        return name in self._index

    def __getitem__(self, name: str) -> "LazyTensor":
        if name not in self._index:
            raise CheckpointError(f"tensor {name} is not in the checkpoint; the configuration says that it must be")
        return LazyTensor(self, self._index[name])

    def close(self) -> None:
        """Gives the mapped files back. What was read stays valid."""
        self._files.clear()

    def read(self, info: TensorInfo, ranges: Mapping[int, range]) -> Tensor:
        """A copy of the tensor, or of `ranges` of its dimensions. Touches the bytes of these only."""
        if info.path not in self._files:
            self._files[info.path] = safe_open(str(info.path), framework="pt")
        stored = self._files[info.path].get_slice(info.name)
        whole = (range(size) for size in info.shape)
        cut = tuple(slice(r.start, r.stop) for r in (ranges.get(dim, r) for dim, r in enumerate(whole)))
        tensor: Tensor = stored[cut] if cut else self._files[info.path].get_tensor(info.name)
        num_bytes = tensor.numel() * tensor.element_size()
        self.bytes_read += num_bytes
        self._on_read(num_bytes)
        # Slices may be views into the mapped file.
        return tensor.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class LazyTensor:
    """A stored tensor that has not been read."""

    checkpoint: Checkpoint
    info: TensorInfo

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    def read(self, ranges: Mapping[int, range] | None = None) -> Tensor:
        """The tensor as stored, or only `ranges` of its dimensions."""
        return self.checkpoint.read(self.info, ranges or {})
