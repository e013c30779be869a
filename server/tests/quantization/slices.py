"""Serves stored tensors slice by slice, as ranks do, and shows what came of them as numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from makers import Kept, matrix_of, share
from text_generation_server.checkpoint.index import read_index
from text_generation_server.checkpoint.tensors import DTYPES, Checkpoint
from text_generation_server.errors import CheckpointError
from text_generation_server.kernels.interface import Kernels
from text_generation_server.kernels.weights import QuantizedWeight
from text_generation_server.quantization.format import Part, Source, StoredLinear, WeightFormat
from text_generation_server.quantization.read import read_weight
from text_generation_server.quantization.spec import Shape
from torch import Tensor

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def source(tensors: Mapping[str, Tensor], layer: str = "layer") -> dict[str, Kept]:
    """Tensors by suffix as the tensors of `layer`."""
    return {f"{layer}.{suffix}": Kept(t, f"file: tensor {layer}.{suffix}") for suffix, t in tensors.items()}


def read(
    tensors: Source, name: str, format_: WeightFormat, shape: Shape, rows: range | None = None,
    columns: range | None = None,
) -> list[Tensor | QuantizedWeight]:  # fmt: skip
    """Some rows or columns of one linear."""
    part = Part(name, (range(shape.out) if rows is None else rows,))
    return read_weight(tensors, "", [(part, StoredLinear(shape, format_))], columns, torch.float32)


def numbers(weights: list[Tensor | QuantizedWeight]) -> Tensor:
    """float64 [out, in] with the features of IN in their own order."""
    return torch.from_numpy(matrix_of(weights))


def served(tensors: Mapping[str, Tensor], format_: WeightFormat, shape: Shape) -> Tensor:
    """The whole of a linear given by its tensors by suffix, float64 [out, in]."""
    return numbers(read(source(tensors), "layer", format_, shape))


def cuts(shape: Shape) -> Iterator[tuple[range | None, range | None]]:
    """Rows and columns of every rank of 1 to 4."""
    for size in (1, 2, 3, 4):
        for rank in range(size):
            yield share(shape.out, rank, size), None
            yield None, share(shape.in_, rank, size)


def check_cuts(
    tensors: Mapping[str, Tensor], format_: WeightFormat, expected: Tensor, compare: Callable[[Tensor, Tensor], None]
) -> None:
    """Every part of the layer is that part of `expected` [out, in]."""
    shape = Shape(*expected.shape)
    for rows, columns in cuts(shape):
        part = numbers(read(source(tensors), "layer", format_, shape, rows, columns))
        want = expected if rows is None else expected[rows.start : rows.stop]
        compare(part, want if columns is None else want[:, columns.start : columns.stop])


def same(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert torch.equal(found, expected.double())


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-6, atol=0)


def check_declared(tensors: Mapping[str, Tensor], format_: WeightFormat, shape: Shape) -> None:
    """A format's declaration has exactly these tensors, with their shapes and dtypes."""
    specs = {spec.suffix: spec for spec in format_.specs(shape)}
    assert tensors.keys() <= specs.keys()
    assert {suffix for suffix, spec in specs.items() if not spec.optional} <= tensors.keys()
    for suffix, tensor in tensors.items():
        assert specs[suffix].shape(shape, tuple(tensor.shape)) == tuple(tensor.shape)
        assert NAMES[tensor.dtype] in specs[suffix].dtypes


def tensors_of(folder: Path) -> tuple[Checkpoint, dict[str, dict[str, Tensor]]]:
    """A checkpoint, and all tensors of its linears by the linear's name and suffix."""
    checkpoint = Checkpoint(read_index(folder))
    linears: dict[str, dict[str, Tensor]] = {}
    for name in read_index(folder):
        if "_proj." in name:
            prefix, suffix = name.split("_proj.")
            linears.setdefault(f"{prefix}_proj", {})[suffix] = checkpoint[name].read()
    return checkpoint, linears


def check_products(
    kernels: Kernels, tensors: Mapping[str, Tensor], format_: WeightFormat, expected: Tensor, dtype: torch.dtype
) -> None:
    """x W.T of one row and of several, against float64, relative to the largest result."""
    x = torch.randn(5, expected.shape[1], generator=torch.Generator().manual_seed(3)).to(dtype)
    (weight,) = read(source(tensors), "layer", format_, Shape(*expected.shape))
    assert isinstance(weight, QuantizedWeight)
    product = kernels.quantized_linear(weight, dtype, "layer")
    want = x.double() @ expected.double().T
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype] * want.abs().max()
    for rows in (slice(0, 1), slice(0, 5)):
        found = product(x[rows])
        assert found.dtype == dtype
        assert (found.double() - want[rows]).abs().max() <= tolerance


def refusal(tensors: Mapping[str, Tensor], format_: WeightFormat, shape: Shape) -> str:
    """What is said when the linear is read."""
    try:
        served(tensors, format_, shape)
    except CheckpointError as error:
        return str(error)
    return "served"
