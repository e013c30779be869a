"""GPTQ's column loop on all cores: a thread takes some of the outputs through all columns (see columns_variant.h)."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from .library import Library, load_library

MOST_COLUMNS = 32


class _Columns(ctypes.Structure):
    """`Columns` of layer.h."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("upper", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("zero", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("errors", ctypes.c_void_p),
        ("num", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("upper_stride", ctypes.c_int64),
        ("grid_stride", ctypes.c_int64),
        ("most", ctypes.c_float),
    )


class NativeColumns:
    """The bits do not depend on the number of threads."""

    def __init__(self, library: Library):
        self._variant = library.variant
        self._round = library.function("round_columns", "ipi")

    @staticmethod
    def takes(weight: Tensor) -> bool:
        """Whether columns like these can be rounded here."""
        return weight.dtype == torch.float32 and weight.device.type == "cpu" and len(weight) <= MOST_COLUMNS

    def round_columns(
        self, weight: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, most: int, codes: Tensor, errors: Tensor
    ) -> None:
        """As `kernels.columns.round_columns`."""
        assert scale.stride() == zero.stride() and scale.stride(1) == upper.stride(1) == 1, "rows are contiguous"
        assert all(x.is_contiguous() for x in (weight, codes, errors)) and self.takes(weight)
        assert upper.dtype == scale.dtype == zero.dtype == errors.dtype == weight.dtype and codes.dtype == torch.uint8
        run = _Columns(
            *(x.data_ptr() for x in (weight, upper, scale, zero, codes, errors)),
            *weight.shape, upper.stride(0), scale.stride(0), most,
        )  # fmt: skip
        self._round(self._variant, ctypes.addressof(run), torch.get_num_threads())


@cache
def usual_columns() -> NativeColumns | None:
    """Of the variant for this processor, if it was built: found once in the life of a process."""
    library = load_library()
    return None if library is None else NativeColumns(library)
