"""Quantized layers and what they mean in float64, from the formats' descriptions alone: nothing here is the server's.

A `Layer` has its stored tensors, and its weight as it follows from the codes that were packed. `*_matrix` unpacks
tensors, whatever they hold, into a weight; features of groups that do not exist become NaN.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from text_generation_server.kernels.interface import Kernels
from text_generation_server.kernels.weights import QuantizedWeight
from text_generation_server.quantization.awq import Awq
from text_generation_server.quantization.format import Part, StoredLinear, WeightFormat
from text_generation_server.quantization.gptq import Gptq
from text_generation_server.quantization.pack_quantized import PackQuantized
from text_generation_server.quantization.read import read_weight
from text_generation_server.quantization.spec import Shape
from torch import Tensor

FULL = bool(os.environ.get("FULL"))
Matrix = NDArray[np.float64]
Ints = NDArray[np.int64]
# Where AutoAWQ puts the features of a word, low bits first.
GEMM_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass
class Layer:
    shape: Shape
    format: WeightFormat
    tensors: dict[str, Tensor]
    weight: Matrix


@dataclass
class Kept:
    """A stored tensor in memory that counts what is read of it."""

    tensor: Tensor
    where: str
    elements_read: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def read(self, ranges: Mapping[int, range] | None = None) -> Tensor:
        part = self.tensor
        for dim, r in (ranges or {}).items():
            part = part.narrow(dim, r.start, len(r))
        self.elements_read += part.numel()
        return part.clone()


def pack(values: Ints, bits: int, axis: int) -> Tensor:
    """int32 words: value i along `axis` is in the bits from i * bits on, low bits first; the last word is filled up."""
    moved = np.moveaxis(values, axis, -1)
    stream = ((moved[..., None] >> np.arange(bits)) & 1).astype(np.uint8).reshape(*moved.shape[:-1], -1)
    stream = np.pad(stream, [(0, 0)] * (stream.ndim - 1) + [(0, -stream.shape[-1] % 32)])
    words = np.packbits(stream, axis=-1, bitorder="little").view("<i4")
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(words, -1, axis)))


def unpack(words: Tensor, bits: int, axis: int, num: int) -> Ints:
    """The first `num` values."""
    data = np.ascontiguousarray(np.moveaxis(words.numpy(), axis, -1))
    stream = np.unpackbits(data.view(np.uint8), axis=-1, bitorder="little")[..., : num * bits].astype(np.int64)
    values = (stream.reshape(*stream.shape[:-1], num, bits) << np.arange(bits)).sum(-1)
    return np.moveaxis(values, -1, axis)


def pack_gemm(values: Ints) -> Tensor:
    """[n, out] -> int32 [n, out / 8]."""
    words = np.zeros((values.shape[0], values.shape[1] // 8), np.int64)
    for place, feature in enumerate(GEMM_ORDER):
        words |= values[:, feature::8] << (4 * place)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


def unpack_gemm(words: Tensor) -> Ints:
    data = words.numpy().astype(np.int64) & 0xFFFFFFFF
    values = np.zeros((data.shape[0], data.shape[1] * 8), np.int64)
    for place, feature in enumerate(GEMM_ORDER):
        values[:, feature::8] = (data >> (4 * place)) & 15
    return values


def random_scales(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype = torch.float16) -> Tensor:
    """Between 0.001 and 0.1, some negative."""
    values = np.exp(rng.uniform(np.log(0.001), np.log(0.1), shape)) * rng.choice([1, 1, 1, -1], shape)
    return torch.from_numpy(values).to(dtype)


def random_zeros(rng: np.random.Generator, shape: tuple[int, ...], bits: int, sym: bool) -> Ints:
    if sym:
        return np.full(shape, 2 ** (bits - 1), np.int64)
    return rng.integers(0, 2**bits, shape)


def number_of_groups(in_: int, group_size: int) -> int:
    return 1 if group_size == -1 else -(-in_ // group_size)


def random_index(rng: np.random.Generator, in_: int, group_size: int, kind: str) -> Ints:
    """int64 [in]: `in order`; `act-order`: the same, shuffled; `arbitrary`: any feature in any group."""
    index = np.arange(in_) // (in_ if group_size == -1 else group_size)
    if kind == "act-order":
        return rng.permutation(index)
    return rng.integers(0, index[-1] + 1, in_) if kind == "arbitrary" else index


def combine(codes: Ints, zeros: Ints, scales: Tensor, index: Ints) -> Matrix:
    """codes [out, in]; zeros, scales [out, groups]."""
    scale = scales.double().numpy()
    valid = (index >= 0) & (index < scale.shape[1])
    where = np.where(valid, index, 0)
    with np.errstate(invalid="ignore", over="ignore"):
        weight = (codes - zeros[:, where]) * scale[:, where]
    weight[:, ~valid] = np.nan
    return weight


def gptq(
    rng: np.random.Generator, shape: Shape, format_: Gptq, index: str = "in order", dtype: torch.dtype = torch.float16
) -> Layer:
    """index: as of `random_index`, or `absent`: in order, and there is no g_idx."""
    groups = number_of_groups(shape.in_, format_.group_size)
    codes = rng.integers(0, 2**format_.bits, shape)
    zeros = random_zeros(rng, (shape.out, groups), format_.bits, format_.sym)
    scales = random_scales(rng, (shape.out, groups), dtype)
    g_idx = random_index(rng, shape.in_, format_.group_size, index)
    stored = zeros
    if format_.checkpoint_format == "gptq" and not format_.zeros_borrow:
        stored = (zeros - 1) % 2**format_.bits
    qzeros = pack(stored.T, format_.bits, 1)
    if format_.zeros_borrow:
        words = qzeros.numpy().astype(np.int64) - sum(1 << i for i in range(0, 32, format_.bits))
        qzeros = torch.from_numpy((words & 0xFFFFFFFF).astype(np.uint32).view(np.int32))
    tensors = {"qweight": pack(codes.T, format_.bits, 0), "qzeros": qzeros, "scales": scales.T.contiguous()}
    if index != "absent":
        tensors["g_idx"] = torch.from_numpy(g_idx.astype(np.int32))
    return Layer(shape, format_, tensors, combine(codes, zeros, scales, g_idx))


def gptq_matrix(format_: WeightFormat, tensors: Mapping[str, Tensor], shape: Shape) -> Matrix:
    assert isinstance(format_, Gptq) and not format_.zeros_borrow
    codes = unpack(tensors["qweight"], format_.bits, 0, shape.in_).T
    zeros = unpack(tensors["qzeros"], format_.bits, 1, shape.out).T
    if format_.checkpoint_format == "gptq":
        zeros = (zeros + 1) % 2**format_.bits
    in_order = np.arange(shape.in_) // (shape.in_ if format_.group_size == -1 else format_.group_size)
    return combine(codes, zeros, tensors["scales"].mT, tensors["g_idx"].numpy() if "g_idx" in tensors else in_order)


def gemv_width(in_: int, group_size: int) -> int:
    """Words of zero points in a row, AutoAWQ's `calculate_zeros_width`; groups of 16 as in GPTQModel."""
    multiple = {16: 8, 32: 4, 64: 2}.get(group_size, 1)
    words = -(-(in_ // group_size) // 8)
    return -(-words // multiple) * multiple


def awq(rng: np.random.Generator, shape: Shape, format_: Awq, dtype: torch.dtype = torch.float16) -> Layer:
    size = shape.in_ if format_.group_size == -1 else format_.group_size
    groups = shape.in_ // size
    codes = rng.integers(0, 16, shape)
    zeros = random_zeros(rng, (shape.out, groups), 4, not format_.zero_point)
    scales = random_scales(rng, (shape.out, groups), dtype)
    weight = combine(codes, zeros, scales, np.arange(shape.in_) // size)
    if format_.version == "gemm":
        tensors = {"qweight": pack_gemm(codes.T), "qzeros": pack_gemm(zeros.T), "scales": scales.T.contiguous()}
    else:
        width = gemv_width(shape.in_, size)
        padding = [(0, 0), (0, width * 8 - groups)]
        tensors = {
            "qweight": pack(codes, 4, 1),
            "qzeros": pack(np.pad(zeros, padding), 4, 1),
            "scales": torch.nn.functional.pad(scales, (0, width * 8 - groups)),
        }
    return Layer(shape, format_, tensors, weight)


def awq_matrix(format_: WeightFormat, tensors: Mapping[str, Tensor], shape: Shape) -> Matrix:
    assert isinstance(format_, Awq)
    size = shape.in_ if format_.group_size == -1 else format_.group_size
    scales = tensors["scales"].mT if format_.version == "gemm" else tensors["scales"]
    zeros = np.full(scales.shape, 8, np.int64)
    if format_.version == "gemm":
        codes = unpack_gemm(tensors["qweight"]).T
        if "qzeros" in tensors:
            zeros = unpack_gemm(tensors["qzeros"]).T
    else:
        codes = unpack(tensors["qweight"], 4, 1, shape.in_)
        if "qzeros" in tensors:
            zeros = unpack(tensors["qzeros"], 4, 1, scales.shape[1])
    return combine(codes, zeros, scales, np.arange(shape.in_) // size)


def pack_quantized(
    rng: np.random.Generator,
    shape: Shape,
    format_: PackQuantized,
    index: str = "absent",
    dtype: torch.dtype = torch.float16,
) -> Layer:
    groups = number_of_groups(shape.in_, format_.group_size)
    codes = rng.integers(0, 2**format_.bits, shape)
    zeros = random_zeros(rng, (shape.out, groups), format_.bits, format_.symmetric)
    scales = random_scales(rng, (shape.out, groups), dtype)
    g_idx = random_index(rng, shape.in_, format_.group_size, index)
    tensors = {
        "weight_packed": pack(codes, format_.bits, 1),
        "weight_scale": scales,
        "weight_shape": torch.tensor(shape),
    }
    if not format_.symmetric:
        tensors["weight_zero_point"] = pack(zeros, format_.bits, 0)
    if index != "absent":
        tensors["weight_g_idx"] = torch.from_numpy(g_idx.astype(np.int32))
    return Layer(shape, format_, tensors, combine(codes, zeros, scales, g_idx))


def pack_quantized_matrix(format_: WeightFormat, tensors: Mapping[str, Tensor], shape: Shape) -> Matrix:
    assert isinstance(format_, PackQuantized)
    codes = unpack(tensors["weight_packed"], format_.bits, 1, shape.in_)
    scales = tensors["weight_scale"]
    zeros = np.full(scales.shape, 2 ** (format_.bits - 1), np.int64)
    if not format_.symmetric:
        zeros = unpack(tensors["weight_zero_point"], format_.bits, 0, shape.out)
    if tuple(tensors["weight_shape"].tolist()) != shape:
        return np.full(shape, np.nan)
    in_order = np.arange(shape.in_) // (shape.in_ if format_.group_size == -1 else format_.group_size)
    index = tensors["weight_g_idx"].numpy() if "weight_g_idx" in tensors else in_order
    return combine(codes, zeros, scales, index)


def matrix_of(weights: Sequence[Tensor | QuantizedWeight]) -> Matrix:
    """[out, in] float64 with the features of IN in their own order."""
    rows = []
    for weight in weights:
        if isinstance(weight, Tensor):
            rows.append(weight.double())
            continue
        values = weight.dequantize().double()
        rows.append(values if weight.order is None else values[:, torch.argsort(weight.order)])
    return torch.cat(rows).numpy()


def read(
    layers: Mapping[str, Layer], rows: Sequence[range], columns: range | None = None
) -> list[Tensor | QuantizedWeight]:
    """The rows of each layer, merged, as a rank reads them."""
    source = {
        f"layer.{name}.{key}": Kept(tensor, f"model.safetensors: tensor layer.{name}.{key}")
        for name, layer in layers.items()
        for key, tensor in layer.tensors.items()
    }
    linears = [(Part(name, tuple(rows)), StoredLinear(layer.shape, layer.format)) for name, layer in layers.items()]
    return read_weight(source, "layer.", linears, columns, torch.float32)


def share(total: int, rank: int, size: int) -> range:
    return range(total * rank // size, total * (rank + 1) // size)


def error(
    weights: Sequence[Tensor | QuantizedWeight], expected: Matrix, kernels: Kernels, dtype: torch.dtype, rows: int = 3
) -> float:
    """The norm of what a product with random rows in `dtype` is off, relative to that of the product in float64."""
    rng = np.random.default_rng(expected.shape[1])
    x = torch.from_numpy(rng.standard_normal((rows, expected.shape[1]))).to(dtype)
    outputs = []
    for weight in weights:
        assert isinstance(weight, QuantizedWeight)
        outputs.append(kernels.quantized_linear(weight, dtype, "layer")(x).double())
    y, right = torch.cat(outputs, -1).numpy(), x.double().numpy() @ expected.T
    return float(np.linalg.norm(y - right) / np.linalg.norm(right))


def check_cuts(layers: Mapping[str, Layer], kernels: Kernels, sizes: Sequence[int], merged: int | None = None) -> None:
    """Every rank's rows of all layers, and its columns of the first, are those of the whole weights.

    merged: how many matrices the layers must have become.
    """
    first = next(iter(layers.values()))
    out, in_ = first.shape
    for size in sizes:
        for rank in range(size):
            # Two ranges, as of a rank with query heads that are not neighbours.
            rows = share(out, rank, size)
            middle = rows.start + len(rows) // 3
            pieces = tuple(r for r in (range(rows.start, middle), range(middle, rows.stop)) if r)
            weights = read(layers, pieces)
            assert merged is None or len(weights) == merged
            expected = np.concatenate([layer.weight[rows.start : rows.stop] for layer in layers.values()])
            assert error(weights, expected, kernels, torch.float64) < 1e-5
            columns = share(in_, rank, size)
            weights = read({"o": first}, [range(out)], columns)
            expected = first.weight[:, columns.start : columns.stop]
            assert error(weights, expected, kernels, torch.float64) < 1e-5
