"""What is served with what: the cases that the tests of the formats prove, and the product that each gets on this code.

The cases are the tests' own parameters, so that the table in the docs cannot promise more than they show.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import test_awq
import test_bitsandbytes
import test_fp8
import test_gptq
import test_pack_quantized
import torch
from makers import awq, gptq, pack_quantized, share
from slices import read, source
from text_generation_server.kernels.cpu.native.library import load_library
from text_generation_server.kernels.cpu.quantized import products
from text_generation_server.kernels.weights import QuantizedWeight
from text_generation_server.quantization.awq import Awq
from text_generation_server.quantization.bitsandbytes import (
    Bitsandbytes4bit,
    Bitsandbytes8bit,
    Quantize4bit,
    Quantize8bit,
)
from text_generation_server.quantization.format import WeightFormat
from text_generation_server.quantization.fp8 import QuantizeFp8
from text_generation_server.quantization.gptq import Gptq
from text_generation_server.quantization.pack_quantized import PackQuantized
from text_generation_server.quantization.spec import Shape
from torch import Tensor

DOCS = Path(__file__).parents[3] / "docs" / "quantization.md"
BEGIN, END = "<!-- written by scripts/support_matrix.py -->", "<!-- end -->"
SIZES = (1, 2, 4)
SHAPE = Shape(32, 2048)
PRODUCTS = products(load_library())
RNG = np.random.default_rng(0)
ORDERS = {
    "absent": "in order", "in order": "in order", "act-order": "act-order", "arbitrary": "any `g_idx`",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """Cases that are served alike: every combination of these values."""

    format: str
    layouts: frozenset[str]
    bits: frozenset[str]
    groups: frozenset[str]
    zero_points: frozenset[str]
    order: frozenset[str]
    products: tuple[str, ...]  # for each of SIZES
    test: str


def rows() -> list[Row]:
    """All cases, those that are served alike together."""
    # Layers are small: more threads only wait for each other.
    torch.set_num_threads(1)
    found = dict.fromkeys([*_gptq(), *_awq(), *_packed(), *_bitsandbytes(), *_float8()])
    return sorted(_together(list(found)), key=lambda row: _rank(row.format))


def _rank(format_: str) -> int:
    order = ("gptq", "awq", "compressed-tensors", "bitsandbytes", "fp8")
    return next(i for i, name in enumerate(order) if format_.startswith(name))


def _row(
    format_: str, bits: int | str, group: int | str, zeros: str, order: str, products: tuple[str, ...], test: Any
) -> Row:
    """format_: its name, and behind a colon its layout."""
    format_, _, layout = format_.partition(":")
    size = "one" if group == -1 else str(group)
    name = f"{Path(test.__code__.co_filename).name}::{test.__name__}"
    sets = (frozenset([value]) for value in (layout, str(bits), size, zeros, order))
    return Row(format_, *sets, products, name)


def _products(tensors: Mapping[str, Tensor], format_: WeightFormat, shape: Shape) -> tuple[str, ...]:
    """What serves the first rank's columns of a row-parallel layer, in bfloat16."""
    names = []
    for size in SIZES:
        weights = read(source(tensors), "layer", format_, shape, columns=share(shape.in_, 0, size))
        assert all(isinstance(weight, QuantizedWeight) for weight in weights)
        (name,) = {
            next(product.name for product in PRODUCTS if product.why_not(weight, torch.bfloat16) is None)
            for weight in weights
            if isinstance(weight, QuantizedWeight)
        }
        names.append(name)
    return tuple(names)


def _zeros(symmetric: bool) -> str:
    return "symmetric" if symmetric else "stored"


def _gptq() -> Iterator[Row]:
    test, known = test_gptq.test_ranks_multiply_with_their_part_of_the_dequantized_weight, dict[Any, tuple[str, ...]]()
    for bits, group, sym, order, version in test_gptq.MATRIX:
        key = (bits, group, sym, order)
        if key not in known:
            layer = gptq(RNG, SHAPE, Gptq(bits, group, sym, order == "act-order"), order)
            known[key] = _products(layer.tensors, layer.format, SHAPE)
        yield _row(f"gptq:{version}", bits, group, _zeros(sym), ORDERS[order], known[key], test)


def _awq() -> Iterator[Row]:
    test = test_awq.test_ranks_multiply_with_their_part_of_the_dequantized_weight
    for version, group, zero_point in test_awq.MATRIX:
        layer = awq(RNG, SHAPE, Awq(4, group, zero_point, version))
        products = _products(layer.tensors, layer.format, SHAPE)
        yield _row(f"awq:{version}", 4, group, _zeros(not zero_point), "in order", products, test)


def _packed() -> Iterator[Row]:
    test = test_pack_quantized.test_ranks_multiply_with_their_part_of_the_weight
    for bits, group, symmetric, order in test_pack_quantized.MATRIX:
        layer = pack_quantized(RNG, SHAPE, PackQuantized(bits, group, symmetric), order)
        products = _products(layer.tensors, layer.format, SHAPE)
        name = "compressed-tensors:pack-quantized"
        yield _row(name, bits, group, _zeros(symmetric), ORDERS[order], products, test)


def _parameters(test: Any, first: str) -> list[Any]:
    """What a test is parametrized with."""
    return next(mark.args[1] for mark in test.pytestmark if mark.name == "parametrize" and mark.args[0][0] == first)


def _bitsandbytes() -> Iterator[Row]:
    shape = Shape(50, 160)
    dense = {"weight": test_bitsandbytes.weight_of(shape)}
    test: Any = test_bitsandbytes.test_parts_of_stored_4_bit_layers_equal_those_of_the_whole_layer
    for kind, nested, block in _parameters(test, "kind"):
        stored, _ = test_bitsandbytes.four_bits(shape, kind, nested, block)
        products = _products(stored, Bitsandbytes4bit(kind, nested, block), shape)
        name = f"4 ({kind}{', nested' if nested else ''})"
        yield _row("bitsandbytes:stored", name, block, "none", "in order", products, test)
    test = test_bitsandbytes.test_parts_of_8_bit_layers_equal_those_of_the_whole_layer
    products = _products(test_bitsandbytes.eight_bits(shape)[0], Bitsandbytes8bit(), shape)
    yield _row("bitsandbytes:stored", 8, -1, "none", "in order", products, test)
    yield _row(_MADE, 8, -1, "none", "in order", _products(dense, Quantize8bit(), shape), test)
    test = test_bitsandbytes.test_parts_quantized_to_4_bits_while_loading_equal_those_of_the_whole_layer
    for kind in next(mark.args[1] for mark in test.pytestmark if mark.args[0] == "kind"):
        products = _products(dense, Quantize4bit(kind), shape)
        yield _row(_MADE, f"4 ({kind})", 64, "none", "in order", products, test)


_MADE = "bitsandbytes:made while loading"


def _float8() -> Iterator[Row]:
    test = test_fp8.test_parts_equal_those_of_the_whole_layer
    for format_, dtype in test_fp8.CASES:
        tensors, expected = test_fp8.layer(format_, dtype)
        products = _products(tensors, format_, Shape(*expected.shape))
        group = {"tensor": "the tensor", "channel": "each output"}.get(format_.scale, "blocks")
        yield _row("fp8:stored", f"8 ({format_.kind})", group, "none", "in order", products, test)
    weight = torch.randn(test_fp8.OUT, test_fp8.IN)
    products = _products({"weight": weight}, QuantizeFp8(), Shape(*weight.shape))
    test = test_fp8.test_while_loading_numbers_become_the_nearest_and_cuts_those_of_the_whole
    yield _row("fp8:made while loading", "8 (e4m3fn)", "each output", "none", "in order", products, test)


_JOINED = ("layouts", "groups", "zero_points", "order", "bits")


def _together(found: list[Row]) -> list[Row]:
    """Rows that differ in one set of values become one, until there are none."""
    for name in (*_JOINED, *_JOINED):
        joined: dict[Row, Row] = {}
        for row in found:
            key = replace(row, **{name: frozenset()})
            values = getattr(row, name) | (getattr(joined[key], name) if key in joined else frozenset())
            joined[key] = replace(row, **{name: values})
        found = list(joined.values())
    return found


def _list(values: frozenset[str]) -> str:
    return ", ".join(sorted(values, key=lambda v: (not v[0].isdigit(), int("0" + "".join(filter(str.isdigit, v))), v)))


def render(found: Sequence[Row]) -> str:
    """The table, in Markdown."""
    head = (
        "Checkpoint",
        "Layout",
        "Bits",
        "Group or block",
        "Zero points",
        "Features",
        *(f"TP {size}" for size in SIZES),
    )
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in found:
        cells = (
            row.format,
            *map(_list, (row.layouts, row.bits, row.groups, row.zero_points, row.order)),
            *row.products,
        )
        lines.append("| " + " | ".join(cells) + " |")
    tests = dict.fromkeys((row.format, row.test) for row in found)
    lines += [
        "",
        "Shown, at 1, 2, 3 and 4 shards, cut by rows and by columns, against float64 or the maker's library, by:",
        "",
    ]
    lines += [f"- {format_}: `server/tests/quantization/{test}`" for format_, test in tests]
    return "\n".join(lines)


def written(text: str, table: str) -> str:
    """The document with this table in the place of its own."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"
