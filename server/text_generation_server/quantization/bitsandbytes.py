"""What bitsandbytes makes: 4-bit codes in blocks over all rows, and 8-bit rows. Stored, or made while loading."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from .format import Decoded, Piece
from .spec import ANY, FLOATS, Along, Axis, Cut, Shape, TensorSpec, held_bytes

if TYPE_CHECKING:
    from torch import Tensor

# Blocks whose absmax are quantized together.
NESTED_BLOCK = 256
# Of blocks that are quantized while loading.
BLOCK = 64
# Of activations of LLM.int8, where nothing else is said: transformers' default.
OUTLIER_THRESHOLD = 6.0
STATE = "weight.quant_state.bitsandbytes__"
LAYOUTS = ("row", "col32", "col_turing", "col_ampere")


@dataclass(frozen=True)
class Bitsandbytes4bit:
    """nf4 or fp4 as transformers stores them: w = table[code] * absmax[block], blocks flat over OUT * IN.

    nested: the absmax are 8-bit codes themselves, absmax = nested table[code] * nested absmax + offset.
    The table is the file's. Products are float32 and not rounded to the dtype that the file names.
    """

    kind: str
    nested: bool = False
    block_size: int = BLOCK

    @property
    def name(self) -> str:
        return f"bitsandbytes {self.kind}, blocks of {self.block_size}{', nested absmax' if self.nested else ''}"

    def specs(self, shape: Shape) -> tuple[TensorSpec, ...]:
        per_block = (Axis(Along.FLAT, self.block_size),)
        nested = (
            TensorSpec("weight.absmax", per_block, ("U8",)),
            TensorSpec("weight.nested_absmax", (Axis(Along.FLAT, self.block_size * NESTED_BLOCK),), ("F32",)),
            TensorSpec("weight.nested_quant_map", (Axis(Along.NEITHER, elements=256),), ("F32",)),
        )
        plain = (TensorSpec("weight.absmax", per_block, FLOATS),)
        return (
            TensorSpec("weight", (Axis(Along.FLAT, 2), Axis(Along.NEITHER)), ("U8",)),
            TensorSpec("weight.quant_map", (Axis(Along.NEITHER, elements=16),), ("F32",)),
            TensorSpec(STATE + self.kind, (Axis(Along.NEITHER, elements=ANY),), ("U8",)),
            *(nested if self.nested else plain),
        )

    def decode(self, pieces: Mapping[str, Piece], cut: Cut) -> Decoded:
        from ..kernels.codes import pack
        from ..kernels.weights import Table
        from .blocks import TABLES, check_scales, scales_of_blocks, split_nibbles

        state = self._read_state(pieces[STATE + self.kind], cut.shape)
        table = pieces["weight.quant_map"]
        check_scales(table.tensor, 1.0, table.where)
        values = tuple(table.tensor.tolist())
        if not all(abs(a - b) < 1e-4 for a, b in zip(values, TABLES[self.kind], strict=True)):
            raise CheckpointError(
                f"{table.where} is {_short([round(value, 4) for value in values])}; expected the table of {self.kind}, "
                "which bitsandbytes takes whatever a file says; make the checkpoint again or fetch its files again"
            )
        absmax = pieces["weight.absmax"]
        scales = self._plain_absmax(pieces, state)
        made_of = " with weight.nested_quant_map and weight.nested_absmax" if self.nested else ""
        check_scales(scales, max(map(abs, values)), f"{absmax.where}{made_of} times weight.quant_map")
        scales, group_of = scales_of_blocks(scales, absmax.first[0] // self.block_size, self.block_size, cut)
        flat = cut.along(Along.FLAT)
        skipped = flat.start - pieces["weight"].first[0]
        codes = split_nibbles(pieces["weight"].tensor.view(-1))[skipped : skipped + len(flat)]
        columns = slice(cut.columns.start, cut.columns.stop)
        return Decoded(Table(values), pack(codes.view(len(cut.rows), -1)[:, columns], 4), scales, None, group_of)

    def _plain_absmax(self, pieces: Mapping[str, Piece], state: Mapping[str, Any]) -> Tensor:
        """float32 [blocks] of the piece."""
        import torch

        from .blocks import check_scales

        absmax, first = pieces["weight.absmax"].tensor, pieces["weight.absmax"].first[0] // self.block_size
        if not self.nested:
            return absmax.float()
        table, outer = pieces["weight.nested_quant_map"], pieces["weight.nested_absmax"]
        check_scales(table.tensor, 1.0, table.where)
        check_scales(outer.tensor, 1.0, outer.where)
        blocks = torch.arange(first, first + len(absmax)) // NESTED_BLOCK
        scale = outer.tensor[blocks - outer.first[0] // self.block_size // NESTED_BLOCK]
        return (table.tensor[absmax.int()] * scale).add_(torch.tensor(state["nested_offset"], dtype=torch.float32))

    def _read_state(self, piece: Piece, shape: Shape) -> dict[str, Any]:
        """The facts beside the tensors. All must be what the configuration and the other tensors say."""
        state = _parse_state(piece)
        expected: dict[str, tuple[Any, ...]] = {
            "quant_type": (self.kind,),
            "blocksize": (self.block_size,),
            "dtype": ("float16", "bfloat16", "float32"),
            "shape": ([shape.out, shape.in_],),
        }
        if self.nested:
            expected |= {"nested_blocksize": (NESTED_BLOCK,), "nested_dtype": ("float32",)}
        wanted = {*expected, "nested_offset"} if self.nested else set(expected)
        if state.keys() != wanted:
            raise CheckpointError(f"{piece.where} says {_short(sorted(state))}; expected {', '.join(sorted(wanted))}")
        for key, allowed in expected.items():
            # 64.0 and true are not what is written.
            if json.dumps(state[key]) not in map(json.dumps, allowed):
                said = " or ".join(map(json.dumps, allowed))
                raise CheckpointError(
                    f"{piece.where} says {key} {_short(state[key])}; expected {said} as in the configuration and the "
                    f"other tensors; make the checkpoint again or fetch all its files again"
                )
        offset = state.get("nested_offset", 0.0)
        if type(offset) not in (int, float) or not abs(offset) < 3e38:
            raise CheckpointError(f"{piece.where} says nested_offset {_short(offset)}; expected a finite number")
        return state

    def held_bytes(self, shape: Shape, dtype_bytes: int) -> int:
        group = math.gcd(self.block_size, shape.in_)
        # Rows of models are multiples of 8; others are cuts, most of whose groups are whole blocks.
        groups = shape.in_ // group if shape.in_ % 8 == 0 else -(-shape.in_ // self.block_size) + 1
        return held_bytes(shape, 4, groups, 4)


def _parse_state(piece: Piece) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a name occurs twice")
        return dict(pairs)

    try:
        state = json.loads(bytes(piece.tensor.tolist()), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{piece.where} is not JSON: {error}; expected bitsandbytes' quant_state") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{piece.where} is {_short(state)}; expected bitsandbytes' quant_state, a JSON object")
    return state


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


@dataclass(frozen=True)
class Bitsandbytes8bit:
    """LLM.int8 as transformers stores it: w = int8 * SCB[row] / 127.

    outlier_threshold: see `QuantizedWeight`. 0: no activation is an outlier.
    """

    outlier_threshold: float = OUTLIER_THRESHOLD

    @property
    def name(self) -> str:
        return f"bitsandbytes 8 bits, one scale for each output{_say_outliers(self.outlier_threshold)}"

    def specs(self, shape: Shape) -> tuple[TensorSpec, ...]:
        return (
            TensorSpec("weight", (Axis(Along.OUT), Axis(Along.IN)), ("I8",)),
            TensorSpec("SCB", (Axis(Along.OUT),), ("F32",)),
            TensorSpec("weight_format", (), ("U8",), optional=True, other_axes=((Axis(Along.NEITHER),),)),
        )

    def decode(self, pieces: Mapping[str, Piece], cut: Cut) -> Decoded:
        import torch

        from .blocks import check_scales

        if "weight_format" in pieces:
            _check_layout(pieces["weight_format"])
        absmax = pieces["SCB"]
        check_scales(absmax.tensor, 2.0, absmax.where)
        codes = pieces["weight"].tensor.view(torch.uint8) ^ 128
        return _by_row(codes, absmax.tensor, self.outlier_threshold)

    def held_bytes(self, shape: Shape, dtype_bytes: int) -> int:
        return held_bytes(shape, 8, 1, 4)


def _check_layout(piece: Piece) -> None:
    number = int(piece.tensor.item())
    if number:
        layout = LAYOUTS[number] if number < len(LAYOUTS) else f"number {number}"
        raise CheckpointError(
            f"{piece.where}: the weight is laid out as {layout}; expected row; "
            f"save it again with a bitsandbytes that writes rows"
        )


def _say_outliers(threshold: float) -> str:
    return f", outliers from {threshold:g}" if threshold else ""


def _by_row(codes: Tensor, absmax: Tensor, outlier_threshold: float) -> Decoded:
    """codes: uint8 [rows, columns], 128 standing for zero; absmax: float32 [rows]."""
    import torch

    from ..kernels.weights import Integer

    group_of = torch.zeros(codes.shape[1], dtype=torch.int64)
    return Decoded(Integer(8), codes, (absmax / 127)[:, None], None, group_of, outlier_threshold)


@dataclass(frozen=True)
class Quantize4bit:
    """A dense weight, rounded while it is loaded to what bitsandbytes makes of the whole layer: nf4 or fp4.

    The absmax stay float32. Quantized absmax save 0.4 bits of each weight in a file, but need the mean of the whole
    layer, and in memory scales are plain in any case.
    """

    kind: str

    @property
    def name(self) -> str:
        return f"quantized to {self.kind} while loading, blocks of {BLOCK}"

    def specs(self, shape: Shape) -> tuple[TensorSpec, ...]:
        if shape.in_ % BLOCK == 0:
            axes = (Axis(Along.OUT), Axis(Along.IN, reach=BLOCK))
        else:
            # Blocks run over the rows: so many rows begin and end with a block.
            axes = (Axis(Along.OUT, reach=BLOCK // math.gcd(BLOCK, shape.in_)), Axis(Along.IN, reach=shape.in_))
        return (TensorSpec("weight", axes, FLOATS),)

    def decode(self, pieces: Mapping[str, Piece], cut: Cut) -> Decoded:
        import torch

        from ..kernels.codes import pack
        from ..kernels.weights import Table
        from .blocks import TABLES, check_scales, round_to_table, scales_of_blocks

        values, (first_row, first_column), where = pieces["weight"]
        table = torch.tensor(TABLES[self.kind], dtype=torch.float32)
        is_end = first_row + len(values) == cut.shape.out
        codes, absmax = round_to_table(values.view(-1), table, BLOCK, is_end)
        check_scales(absmax, 1.0, where)
        # Seen as a matrix of what was read, whose rows begin with a block or follow each other without a gap.
        rows = range(cut.rows.start - first_row, cut.rows.stop - first_row)
        columns = range(cut.columns.start - first_column, cut.columns.stop - first_column)
        read = Cut(Shape(len(values), values.shape[1]), rows, columns)
        scales, group_of = scales_of_blocks(absmax, 0, BLOCK, read)
        codes = codes.view(values.shape)[rows.start : rows.stop, columns.start : columns.stop]
        return Decoded(Table(tuple(table.tolist())), pack(codes, 4), scales, None, group_of)

    def held_bytes(self, shape: Shape, dtype_bytes: int) -> int:
        return Bitsandbytes4bit(self.kind).held_bytes(shape, dtype_bytes)


@dataclass(frozen=True)
class Quantize8bit:
    """A dense weight, rounded while it is loaded to what LLM.int8 makes of the whole layer: see `Bitsandbytes8bit`."""

    outlier_threshold: float = OUTLIER_THRESHOLD

    @property
    def name(self) -> str:
        return f"quantized to 8 bits while loading, one scale for each output{_say_outliers(self.outlier_threshold)}"

    def specs(self, shape: Shape) -> tuple[TensorSpec, ...]:
        return (TensorSpec("weight", (Axis(Along.OUT), Axis(Along.IN, reach=shape.in_)), FLOATS),)

    def decode(self, pieces: Mapping[str, Piece], cut: Cut) -> Decoded:
        from .blocks import check_scales, round_rows_to_int8

        values, _, where = pieces["weight"]
        codes, absmax = round_rows_to_int8(values, cut.columns)
        check_scales(absmax, 1.0, f"{where}, rounded to float16 as LLM.int8 does,")
        return _by_row(codes, absmax, self.outlier_threshold)

    def held_bytes(self, shape: Shape, dtype_bytes: int) -> int:
        return held_bytes(shape, 8, 1, 4)
