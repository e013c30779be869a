"""Measure the products of a model of 1.1 billion parameters: each coding, each instruction set, one row to many.

Weights are random and rotate through enough copies that no cache holds them. Beside each figure stand the roofs of this
processor, measured in the same run: few rows are limited by the bytes of the weight that must be read, many rows by
multiplications. oneDNN (torch's own products of bfloat16) is the peer.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import common
import roofs
import torch
from text_generation_server.config import prepare_environment
from text_generation_server.kernels.cpu.linear import prepack
from text_generation_server.kernels.cpu.native.library import Library
from text_generation_server.kernels.cpu.native.linear import NativeLinear, dense_linear, quantized_linear
from text_generation_server.kernels.weights import Integer, QuantizedWeight, Table

# IN and OUT features: attention, gate or up, down, head.
SHAPES = ((2048, 2048), (2048, 5632), (5632, 2048), (2048, 32000))
GROUP = {"int4": 128, "nf4": 64, "int8": 2048}
ROTATED_BYTES = 160 << 20
ONEDNN = {True: "oneDNN", False: "oneDNN in float32"}
Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Contender:
    """A way to multiply with a weight of some coding. library: None: oneDNN."""

    coding: str
    library: Library | None

    @property
    def name(self) -> str:
        return f"{self.coding}, {self.library.name if self.library else ONEDNN[native_bfloat16()]}"

    def copies(self, in_: int, out: int) -> Iterator[tuple[Product, int]]:
        """The same weight again and again in other memory, with the bytes of one."""
        if self.coding == "bf16":
            dense = (torch.randn(out, in_) * 0.02).bfloat16()
            if self.library is None:
                while True:
                    yield onednn(dense), dense.nbytes
            matmul, size = dense_linear(self.library, dense), dense.nbytes
        else:
            assert self.library is not None
            weight = quantized(self.coding, in_, out)
            matmul, size = quantized_linear(self.library, weight, torch.bfloat16), weight.num_bytes
        while True:
            yield clone(matmul), size


def native_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 on this processor."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def onednn(weight: torch.Tensor) -> Product:
    """oneDNN's product of bfloat16; in float32 where it has none, which is the best it has then."""
    if native_bfloat16():
        return prepack(weight)
    multiply = prepack(weight.float())
    return lambda x: multiply(x.float()).bfloat16()


def quantized(coding: str, in_: int, out: int) -> QuantizedWeight:
    """Random codes and scales."""
    bits = 8 if coding == "int8" else 4
    kind = Integer(bits) if coding != "nf4" else Table(tuple(i / 8 - 1 for i in range(16)))
    group = in_ if coding == "int8" else GROUP[coding]
    packed = torch.randint(0, 256, (out, in_ * bits // 8), dtype=torch.uint8)
    scales = (torch.rand(out, in_ // group) * 0.01).half()
    return QuantizedWeight(kind, in_, packed, scales, None, group, None)


def clone(matmul: NativeLinear) -> NativeLinear:
    """The same product on a copy of its codes."""
    other = copy.copy(matmul)
    codes = matmul.kept[0].clone()
    other.kept = (codes, *matmul.kept[1:])
    other._weight = type(matmul._weight).from_buffer_copy(matmul._weight)
    other._weight.codes = codes.data_ptr()
    other._address = ctypes.addressof(other._weight)
    return other


def seconds_of(products: list[Product], x: torch.Tensor) -> float:
    """Of one call, in rotation: the best of several turns, which take 50 milliseconds or one call each."""
    products[-1](x)
    turns, per_turn, at = [], 1, 0
    begin = time.perf_counter()
    while len(turns) < 3 or time.perf_counter() - begin < 0.05:
        start = time.perf_counter()
        for _ in range(per_turn):
            products[at % len(products)](x)
            at += 1
        turns.append((time.perf_counter() - start) / per_turn)
        if len(turns) == 1:
            per_turn = max(1, min(8, int(0.005 / turns[0])))
        if time.perf_counter() - begin > 0.5:
            break
    return min(turns)


def measure(contenders: list[Contender], rows: list[int], threads: int) -> str:
    """The tables of one number of threads."""
    torch.set_num_threads(threads)
    roof = roofs.measure(threads)
    parts = [f"## {threads} thread(s)\n", roof.table()]
    cells: dict[tuple[str, int, int, int], tuple[float, int]] = {}
    for in_, out in SHAPES:
        for contender in contenders:
            source = contender.copies(in_, out)
            products, held = [], 0
            while held < ROTATED_BYTES:
                product, size = next(source)
                products.append(product)
                held += size
            for count in rows:
                x = torch.randn(count, in_).bfloat16()
                cells[contender.name, in_, out, count] = seconds_of(products, x), size
    for count in rows:
        table = []
        for contender in contenders:
            line: list[object] = [contender.name]
            for in_, out in SHAPES:
                seconds, size = cells[contender.name, in_, out, count]
                operations = 2 * count * in_ * out / seconds
                line.append(
                    f"{seconds * 1e3:.3f} ms, {size / seconds / roof.read:.2f} of bandwidth, {operations / 1e9:.0f} GFLOP/s"
                )
            table.append(line)
        head = [f"{count} row(s)", *(f"{in_} x {out}" for in_, out in SHAPES)]
        parts += ["", common.table(head, table)]
    return "\n".join(parts)


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 512])
    parser.add_argument("--codings", nargs="+", default=["bf16", "int4", "nf4", "int8"])
    parser.add_argument("--sets", nargs="+", help="instruction sets; by default all that this processor executes")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, nargs="+", default=list(dict.fromkeys((1, cores))))
    parser.add_argument("--name", default="products", help="of the result's file (default: %(default)s)")
    parser.add_argument("--print", action="store_true", help="do not write the result's file")
    arguments = parser.parse_args()
    prepare_environment()
    torch.set_grad_enabled(False)
    head = common.environment()
    sets = arguments.sets or [name for name, runs in Library().variants.items() if runs]
    contenders = [
        Contender(coding, library) for coding in arguments.codings for library in [Library(name) for name in sets]
    ]
    if "bf16" in arguments.codings:
        contenders.insert(0, Contender("bf16", None))
    body = "\n\n".join(measure(contenders, arguments.rows, threads) for threads in arguments.threads)
    if arguments.print:
        print(body)
    else:
        common.write_result(arguments.name, "Products, by instruction set", head, body)


if __name__ == "__main__":
    main()
