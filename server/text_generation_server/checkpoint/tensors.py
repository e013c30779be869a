"""The tensors of a checkpoint, read slice by slice when asked for."""

import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from .heap import end_of_reading, give_back_memory, keep_freed_memory
from .index import TensorInfo

# By the names that safetensors headers use.
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16,
    "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32, "I64": torch.int64,
    "U64": torch.uint64, "F64": torch.float64,
}  # fmt: skip

# Of the files' pages, what is in memory at a time beside the copies.
COPIED_BYTES = 16 << 20

# Read before what is free of the heap goes back to the system.
HEAP_BYTES = 1 << 30


class Checkpoint:
    """Every tensor of a model folder by its full name. Files are mapped into memory while this object is open.

    Pages of the mapping are given back as reading goes on: what was read counts once, as the copy that is kept.
    """

    def __init__(self, index: Mapping[str, TensorInfo], on_read: Callable[[int], None] = lambda num_bytes: None):
        self._index, self._on_read = index, on_read
        self._files: dict[Path, mmap.mmap] = {}
        self.bytes_read = 0
        self._touched = 0  # bytes since pages were given back
        self._trimmed_at = 0  # of `bytes_read`
        keep_freed_memory()

    def __contains__(self, name: str) -> bool:
        return name in self._index

    def __getitem__(self, name: str) -> "LazyTensor":
        if name not in self._index:
            raise CheckpointError(f"tensor {name} is not in the checkpoint; the configuration says that it must be")
        return LazyTensor(self, self._index[name])

    def close(self) -> None:
        """Gives the mapped files back. What was read stays valid."""
        for file in self._files.values():
            file.close()
        self._files.clear()
        end_of_reading()

    def read(self, info: TensorInfo, ranges: Mapping[int, range]) -> Tensor:
        """A copy of the tensor, or of `ranges` of its dimensions. Touches the pages of these only."""
        tensor = self._copy(info, ranges) if info.num_bytes else torch.empty(info.shape, dtype=DTYPES[info.dtype])
        num_bytes = tensor.numel() * tensor.element_size()
        self.bytes_read += num_bytes
        if self.bytes_read - self._trimmed_at >= HEAP_BYTES:
            self._trimmed_at = self.bytes_read
            give_back_memory()
        self._on_read(num_bytes)
        return tensor

    def _copy(self, info: TensorInfo, ranges: Mapping[int, range]) -> Tensor:
        file, dtype = self._map(info.path), DTYPES[info.dtype]
        if not info.shape:
            return _rows(file, info, dtype, range(1)).clone()[0]
        wanted = ranges.get(0, range(info.shape[0]))
        shape = [len(ranges.get(dim, range(size))) for dim, size in enumerate(info.shape)]
        tensor = torch.empty(shape, dtype=dtype)
        # Some rows at a time, so that the pages of a file are not in memory as a whole beside the copy.
        row_bytes = info.num_bytes // info.shape[0]
        step = max(1, COPIED_BYTES // row_bytes)
        for first in range(wanted.start, wanted.stop, step):
            rows = range(first, min(first + step, wanted.stop))
            stored = _rows(file, info, dtype, rows)
            for dim, r in ranges.items():
                stored = stored.narrow(dim, r.start, len(r)) if dim else stored
            tensor[rows.start - wanted.start : rows.stop - wanted.start] = stored
            self._touched += len(rows) * row_bytes
            if self._touched >= COPIED_BYTES:
                self._give_back()
        return tensor

    def _give_back(self) -> None:
        for file in self._files.values():
            file.madvise(mmap.MADV_DONTNEED)
        self._touched = 0

    def _map(self, path: Path) -> mmap.mmap:
        if path not in self._files:
            try:
                with path.open("rb") as file:
                    # A private copy that is never written: torch wants memory that it may write.
                    self._files[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        return self._files[path]


def _rows(file: mmap.mmap, info: TensorInfo, dtype: torch.dtype, rows: range) -> Tensor:
    """Some of the tensor's first dimension, in the pages of the file if these are aligned. One row of a scalar."""
    shape = info.shape or (1,)
    size = info.num_bytes // shape[0]
    offset = info.offset + rows.start * size
    # As bytes first: a tensor may begin at any byte of the file.
    data = torch.frombuffer(file, dtype=torch.uint8, offset=offset, count=len(rows) * size)
    return (data if offset % dtype.itemsize == 0 else data.clone()).view(dtype).view(len(rows), *shape[1:])


@dataclass(frozen=True)
class LazyTensor:
    """A stored tensor that has not been read."""

    checkpoint: Checkpoint
    info: TensorInfo

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    @property
    def where(self) -> str:
        """File and name, for messages."""
        return f"{self.info.path}: tensor {self.info.name}"

    def read(self, ranges: Mapping[int, range] | None = None) -> Tensor:
        """The tensor as stored, or only `ranges` of its dimensions."""
        return self.checkpoint.read(self.info, ranges or {})
