"""Our own products: a weight is brought into their layout (see linear.h), and multiplied at any number of rows."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...codes import pack
from ...weights import Coding, DenseRows, Float8, Integer, QuantizedWeight, Table
from .library import FLOATS, Library
from .pages import own_memory

logger = logging.getLogger(__name__)

COLUMNS, STEP = 32, 8
# Values of a dense weight that are read at a time.
READ_VALUES = 1 << 20
E4M3 = 7
_DENSE = {torch.float32: 0, torch.bfloat16: 1}


class _Weight(ctypes.Structure):
    """`Weight` of linear.h."""

    _fields_ = (
        ("coding", ctypes.c_int32),
        ("scale_type", ctypes.c_int32),
        ("out_features", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("steps", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("codes", ctypes.c_void_p),
        ("group_ends", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("places", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("middle", ctypes.c_float),
        ("outlier_threshold", ctypes.c_float),
    )


def why_not(library: Library, kind: Coding | torch.dtype) -> str | None:
    """What speaks against it for codes, or dense numbers, of a kind: that it was seen to compute something else."""
    if kind not in library.against:
        worst = _error(library, kind)
        reason = None if worst <= _TOLERANCE else f"{library.name} is wrong by {worst:.1e} on this processor"
        if reason is not None:
            logger.error("native kernels, %s: %s; they are not used for it", kind, reason)
        library.against[kind] = reason
    return library.against[kind]


# Of a product in float32, relative to the same in float64.
_TOLERANCE = 1e-5
# What rounding to bfloat16 may add, of results and of numbers in a table; and what 8 bits of activations may.
_ROUNDING, _EIGHT_BITS = 2.0**-8, 1e-2


def _error(library: Library, kind: Coding | torch.dtype) -> float:
    """Of small products, relative to float64, beyond what is tolerated; infinite if rows depend on each other."""
    generator = torch.Generator().manual_seed(7)
    out, in_, group, rows = 40, 72, 24, 60
    x = torch.randn(rows, in_, generator=generator)
    if isinstance(kind, torch.dtype):
        dense = torch.randn(out, in_, generator=generator).to(kind)
        return _product_error(
            dense_linear(library, dense), dense, x.to(kind), 0 if kind == torch.float32 else _ROUNDING
        )
    most = 120 if isinstance(kind, Float8) else 2**kind.bits  # of 8-bit floats, finite ones
    codes = torch.randint(0, most, (out, in_), generator=generator, dtype=torch.uint8)
    scales = torch.rand(out, in_ // group, generator=generator) + 0.5
    zeros = None
    if isinstance(kind, Integer):
        zeros = torch.randint(0, 2**kind.bits, scales.shape, generator=generator, dtype=torch.uint8)
    weight = QuantizedWeight(kind, in_, pack(codes, kind.bits), scales, zeros, group, None)
    numbers = weight.dequantize()
    error = _product_error(quantized_linear(library, weight, torch.float32), numbers, x, 0)
    eight = isinstance(kind, Integer)
    dots, tolerated = (library.dots_of_codes, _EIGHT_BITS) if eight else (library.dots_of_numbers, _ROUNDING)
    if dots:
        matmul = quantized_linear(library, weight, torch.bfloat16)
        error = max(error, _product_error(matmul, numbers, x.bfloat16(), tolerated))
    return error


def _product_error(matmul: NativeLinear, numbers: Tensor, x: Tensor, tolerated: float) -> float:
    """numbers: [out, in], what `matmul` multiplies x with."""
    y, wanted = matmul(x), x.double() @ numbers.double().T
    if any(not torch.equal(matmul(x[first : first + n]), y[first : first + n]) for n in (1, 2, 3) for first in (0, 5)):
        return float("inf")
    error = float(torch.linalg.norm(y.double() - wanted) / torch.linalg.norm(wanted))
    return max(0.0, error - tolerated)


class NativeLinear:
    """y = x W.T, each row's bits its own, for any number of rows and of threads."""

    def __init__(self, library: Library, weight: _Weight, kept: tuple[Tensor, ...], dtype: torch.dtype):
        """kept: the tensors that `weight` points into."""
        self.kept, self.dtype = kept, dtype
        self._variant, self._type = library.variant, FLOATS[dtype]
        self._weight, self._address = weight, ctypes.addressof(weight)
        self._in, self._out = weight.in_features, weight.out_features
        self._threads = torch.get_num_threads()
        self._multiply = library.function("multiply", "pipilpi")

    @property
    def address(self) -> int:
        """Of the weight, as the library knows it."""
        return self._address

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype != self.dtype or x.ndim != 2 or x.shape[1] != self._in or x.device.type != "cpu":
            found = f"{x.dtype} {list(x.shape)} on {x.device}"
            raise ValueError(f"activations are {found}; expected {self.dtype} [rows, {self._in}] on cpu")
        x = x.contiguous()
        y = torch.empty(len(x), self._out, dtype=x.dtype)
        self._multiply(self._address, self._variant, x.data_ptr(), self._type, len(x), y.data_ptr(), self._threads)
        return y


def dense_why_not(library: Library, dtype: torch.dtype) -> str | None:
    """What speaks against our own product of dense weights."""
    if dtype not in _DENSE:
        return f"weights are {dtype}".replace("torch.", "")
    if dtype == torch.bfloat16 and not library.dots_of_numbers and torch.cpu._is_amx_tile_supported():
        return "oneDNN multiplies bfloat16 by tiles"
    return why_not(library, dtype)


def dense_linear(library: Library, weight: Tensor | DenseRows) -> NativeLinear:
    """weight: [out, in] float32 or bfloat16, as the activations will be. Few of the rows are read at a time."""
    weight = DenseRows.of(weight) if isinstance(weight, Tensor) else weight
    in_ = weight.in_features
    places = _places(torch.arange(in_), [in_]) if in_ % STEP else None
    form = _Form(_DENSE[weight.dtype], weight.out_features, in_, [in_], places, places)

    rows = max(COLUMNS, READ_VALUES // max(1, in_) // COLUMNS * COLUMNS)
    parts = (range(first, min(first + rows, weight.out_features)) for first in range(0, weight.out_features, rows))
    return _linear(library, form, (weight.read(part).detach() for part in parts), weight.dtype)


def quantized_linear(library: Library, weight: QuantizedWeight, dtype: torch.dtype) -> NativeLinear:
    """For activations of `dtype`, in the order of the features themselves."""
    groups = weight.groups if isinstance(weight.groups, Tensor) else torch.arange(weight.in_features) // weight.groups
    order = torch.argsort(groups, stable=True)  # the place of each code; the groups follow each other
    sizes = torch.bincount(groups, minlength=weight.scales.shape[1]).tolist()
    coding, scales, zeros = _coding(library, weight.coding), weight.scales, weight.zeros
    middle = 2 ** (weight.coding.bits - 1) if isinstance(weight.coding, Integer) else 0
    # Many formats store zero points that say nothing.
    zeros = None if zeros is None or bool((zeros == middle).all()) else zeros
    places = sources = None
    if (
        weight.order is not None
        or any(size % STEP for size in sizes)
        or not torch.equal(order, torch.arange(len(order)))
    ):
        sources = _places(order, sizes)
        places = sources if weight.order is None else _places(weight.order[order], sizes)
    if coding == E4M3:
        scales = scales.float() * 256  # numbers come out of float16 that much too small
    form = _Form(
        coding, weight.out_features, weight.in_features, sizes, places, sources, scales, zeros, middle,
        weight.coding.values if isinstance(weight.coding, Table) else None, weight.outlier_threshold,
    )  # fmt: skip
    return _linear(library, form, [weight.packed], dtype)


@dataclass(frozen=True)
class _Form:
    """What a weight is made of, besides its codes.

    sizes: features of each group. places: int32, the feature of the activations at each place; sources: where its code
    lies in a row. None: as they are.
    """

    coding: int
    out_features: int
    in_features: int
    sizes: list[int]
    places: Tensor | None
    sources: Tensor | None
    scales: Tensor | None = None
    zeros: Tensor | None = None
    middle: int = 0
    table: tuple[float, ...] | None = None
    outlier_threshold: float = 0.0


def _linear(library: Library, form: _Form, parts: Iterable[Tensor], dtype: torch.dtype) -> NativeLinear:
    """parts: rows one after another, whole panels but for the last: codes as `pack` lays them out, or numbers."""
    ends = torch.tensor([-(-size // STEP) for size in form.sizes]).cumsum(0).to(torch.int32)
    steps = int(ends[-1])
    panel_bytes = steps * library.step_bytes(form.coding)
    # A load may reach a little beyond the last step.
    packed = own_memory(-(-form.out_features // COLUMNS) * panel_bytes + 64)
    weight = _Weight(
        form.coding, 0, form.out_features, form.in_features, steps, len(ends), packed.data_ptr(), ends.data_ptr()
    )
    kept = [packed, ends]

    def keep(tensor: Tensor) -> int:
        kept.append(tensor)
        return tensor.data_ptr()

    if form.scales is not None:
        weight.scale_type, weight.middle = FLOATS[form.scales.dtype], form.middle
        weight.scales = keep(_panels(form.scales))
    if form.zeros is not None:
        weight.zeros = keep(_panels(form.zeros))
    if form.places is not None:
        weight.places = keep(form.places)
    if form.table is not None:
        weight.table = keep(torch.tensor(form.table, dtype=torch.float32))
    weight.outlier_threshold = form.outlier_threshold
    pack_rows = library.function("pack", "pplplpi")
    sources = None if form.sources is None else form.sources.data_ptr()
    first = 0
    for part in parts:
        part = part.contiguous()
        row_bytes = part.shape[1] * part.element_size()
        to = packed.data_ptr() + first // COLUMNS * panel_bytes
        pack_rows(ctypes.addressof(weight), part.data_ptr(), row_bytes, sources, len(part), to, torch.get_num_threads())
        first += len(part)
    return NativeLinear(library, weight, tuple(kept), dtype)


def _coding(library: Library, coding: Coding) -> int:
    """`Coding` of linear.h."""
    match coding:
        case Integer(bits):
            return {2: 2, 3: 3, 4: 4, 8: 5}[bits]
        case Table():
            return library.table_coding
        case Float8(kind):
            return {"e4m3fn": E4M3, "e5m2": 8}[kind]


def _places(order: Tensor, sizes: list[int]) -> Tensor:
    """int32: `order`, of which groups have `sizes`, each filled up to whole steps with -1."""
    parts = torch.split(order, sizes)
    return torch.cat([F.pad(part, (0, -len(part) % STEP), value=-1) for part in parts]).to(torch.int32)


def _panels(values: Tensor) -> Tensor:
    """[out, groups] -> [panels, groups, COLUMNS], filled up with zeros."""
    values = F.pad(values, (0, 0, 0, -len(values) % COLUMNS))
    return values.view(-1, COLUMNS, values.shape[1]).transpose(1, 2).contiguous()
