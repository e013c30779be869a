"""Products with packed weights at any number of rows, each row's bits its own (`sources/linear.cu`).

One path serves decoding and prompts. A library's product (dequantized weights, cuBLAS) would be faster for long prompts
on the largest GPUs, but it gives a row other bits than the path for few rows does, and other ones again at other row
counts; then a replay after a crash, another cut of a prompt, or a neighbour would change what is generated. So the path
for few rows also serves many: the same products of 16 places, the same slices, the same order, over tiles of 64 rows.
How many slices a weight has depends on its shape alone.

`library_rows` trades that for speed: from so many rows on, the weight is made into numbers in a scratch buffer and
multiplied by torch. `benchmark/gpu.py` compares both.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import Backend, Module
from .layout import CHUNK, STRIP, PackedWeight

FEW = 8
TILES = (16, 32, 64)
WARPS, STRIPS, STAGES = 4, 2, 3  # of `linear.cu`
# A block of few rows has a warp for each slice.
SLICES = 8
MANY_SLICES, FEW_STRIPS = 16, 160


class _Weight(ctypes.Structure):
    """`Weight` of linear.cu."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("group_of", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("middle", ctypes.c_float),
        ("groups", ctypes.c_int32),
        ("chunks", ctypes.c_int32),
    )


def num_slices(strips: int, chunks: int) -> int:
    """Parts of IN whose sums are added last. More where there are few OUT features to share among multiprocessors."""
    return MANY_SLICES if strips <= FEW_STRIPS and chunks >= 2 * MANY_SLICES else SLICES


def shared_bytes(tile: int) -> int:
    """Of `linear_many_<tile>`: rows under way, and sums of slices."""
    return STAGES * tile * 2 * CHUNK + WARPS * 32 * STRIPS * tile // 8 * 4 * 4


class CudaLinear:
    """y = x W.T for one weight and activations of one dtype."""

    def __init__(
        self, backend: Backend, weight: PackedWeight, dtype: torch.dtype, library_rows: int | None = None
    ) -> None:
        self.weight, self.dtype = weight, dtype
        self._backend, self._library_rows = backend, library_rows
        self._module: Module = backend.module("linear.cu", weight.defines(dtype))
        self._gather: Module | None = None
        if weight.places is not None:
            self._gather = backend.module("elements.cu", {"BF16": int(dtype == torch.bfloat16)})
        self.strips = -(-weight.out_features // STRIP)
        self.slices = num_slices(self.strips, weight.chunks)

        def address(tensor: Tensor | None) -> int | None:
            return None if tensor is None else tensor.data_ptr()

        self._arguments = _Weight(
            address(weight.codes), address(weight.scales), address(weight.zeros), address(weight.group_of),
            address(weight.table), weight.middle, weight.scales.shape[1], weight.chunks,
        )  # fmt: skip

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype != self.dtype or x.ndim != 2 or x.shape[1] != self.weight.in_features:
            found = f"{x.dtype} {list(x.shape)}"
            raise ValueError(f"activations are {found}; expected {self.dtype} [rows, {self.weight.in_features}]")
        if x.device.type != self._backend.device.type:
            raise ValueError(f"activations are on {x.device}; expected {self._backend.device}")
        rows = len(x)
        if rows == 0:
            return x.new_empty(0, self.weight.out_features)
        x = self._by_place(x)
        if self._library_rows is not None and rows >= self._library_rows:
            return F.linear(x, self.dequantize())
        y = x.new_empty(rows, self.weight.out_features)
        if rows <= FEW:
            shared = self.slices * STRIP * FEW * 4
            self._module.launch(
                "linear_few", (self.strips, 1, 1), 32 * self.slices, shared, self._arguments, x, y, rows, y.shape[1]
            )
        else:
            self._many(x, y)
        return y

    def _by_place(self, x: Tensor) -> Tensor:
        """Activations in the order of places, with zeros where there is no feature; rows aligned to 16 bytes."""
        if self._gather is None:
            x = x.contiguous()
            return x if x.data_ptr() % 16 == 0 else x.clone()
        assert self.weight.places is not None
        y = x.new_empty(len(x), len(self.weight.places))
        grid = (-(-y.shape[1] // 256), len(x), 1)
        self._gather.launch("gather", grid, 256, 0, x, x.stride(0), x.stride(1), self.weight.places, y.shape[1], y)
        return y

    def _many(self, x: Tensor, y: Tensor) -> None:
        rows, out = y.shape
        tile = next((t for t in TILES if rows <= t), TILES[-1])
        blocks = -(-self.strips // (WARPS * STRIPS)), -(-rows // tile)
        # Where tiles alone do not keep the multiprocessors busy, slices get blocks of their own. Bits stay the same.
        spread = blocks[0] * blocks[1] < 2 * self._backend.num_processors
        partial = x.new_empty(self.slices, rows, out, dtype=torch.float32) if spread else None
        self._module.launch(
            f"linear_many_{tile}", (*blocks, self.slices if spread else 1), 32 * WARPS, shared_bytes(tile),
            self._arguments, x, y, partial, rows, out, self.slices,
        )  # fmt: skip
        if partial is not None:
            size = ctypes.c_int64(rows * out)
            grid = (-(-rows * out // 256), 1, 1)
            self._module.launch("add_slices", grid, 256, 0, partial, y, size, self.slices)

    def dequantize(self) -> Tensor:
        """The matrix as numbers of the activations' dtype, [out, places] in a scratch buffer."""
        weight = self.weight
        y = torch.empty(weight.out_features, weight.chunks * CHUNK, dtype=self.dtype, device=self._backend.device)
        grid = (-(-weight.chunks // 4), self.strips, 1)
        self._module.launch("dequantize", grid, 128, 0, self._arguments, y, weight.out_features)
        return y
