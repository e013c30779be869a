"""Weights of 8-bit floats with scales for the tensor, for each output or for blocks. Stored, or made while loading."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import CheckpointError
from .format import Decoded, Piece
from .spec import FLOATS, Along, Axis, Cut, Shape, TensorSpec, held_bytes

# Of each kind: the name in safetensors headers, the largest number, and the code (without its sign) of the first of
# those that are not finite.
KINDS = {"e4m3fn": ("F8_E4M3", 448.0, 0x7F), "e5m2": ("F8_E5M2", 57344.0, 0x7C)}
# What quantizers write of activations and of the cache, which are not rounded here: nothing is made of them.
OF_ACTIVATIONS = ("input_scale", "activation_scale")
OF_CACHE = ("k_scale", "v_scale", "output_scale")


@dataclass(frozen=True)
class Fp8:
    """w = code * scale, also where the scale is called `weight_scale_inv`.

    scale: `tensor` [], [1] or [1, 1]; `channel` [OUT, 1] or [OUT]; `block` [ceil(OUT / block[0]), ceil(IN / block[1])].
    input_scale: the file may have scales of activations. They are not used, nor those of the cache (`k_scale`,
    `v_scale`): activations and cache keep the dtype that is computed in, which is more accurate.
    """

    scale: str
    block: tuple[int, int] = (128, 128)
    kind: str = "e4m3fn"
    scale_suffix: str = "weight_scale"
    input_scale: bool = False

    @property
    def name(self) -> str:
        of = {"tensor": "the tensor", "channel": "each output", "block": f"blocks of {self.block[0]} x {self.block[1]}"}
        return f"fp8 {self.kind}, scales of {of[self.scale]}"

    def specs(self, shape: Shape) -> tuple[TensorSpec, ...]:
        unread = (*OF_CACHE, *(OF_ACTIVATIONS if self.input_scale else ()))
        return (
            TensorSpec("weight", (Axis(Along.OUT), Axis(Along.IN)), (KINDS[self.kind][0],)),
            self._scale_spec(),
            *(TensorSpec(suffix, (), FLOATS, True, ((Axis(Along.NEITHER),),), is_read=False) for suffix in unread),
        )

    def _scale_spec(self) -> TensorSpec:
        match self.scale:
            case "tensor":
                one = Axis(Along.NEITHER)
                return TensorSpec(self.scale_suffix, (), FLOATS, other_axes=((one,), (one, one)))
            case "channel":
                per_row = (Axis(Along.OUT), Axis(Along.NEITHER))
                return TensorSpec(self.scale_suffix, per_row, FLOATS, other_axes=(per_row[:1],))
            case _:
                blocks = (Axis(Along.OUT, self.block[0]), Axis(Along.IN, self.block[1]))
                return TensorSpec(self.scale_suffix, blocks, (*FLOATS, "F8_E8M0"))

    def decode(self, pieces: Mapping[str, Piece], cut: Cut) -> Decoded:
        import torch

        from ..kernels.weights import Float8
        from .blocks import check_scales

        weight, scale = pieces["weight"], pieces[self.scale_suffix]
        codes = weight.tensor.view(torch.uint8)
        _, largest, not_finite = KINDS[self.kind]
        if codes.numel() and int((codes & 0x7F).amax()) >= not_finite:
            raise CheckpointError(f"{weight.where} holds NaN or infinity; expected finite codes; fetch it again")
        scales = scale.tensor.float() if scale.tensor.itemsize == 1 else scale.tensor
        check_scales(scales, largest, scale.where)
        group_of = torch.zeros(len(cut.columns), dtype=torch.int64)
        match self.scale:
            case "tensor":
                scales = scales.view(1, 1).expand(len(cut.rows), 1)
            case "channel":
                scales = scales.view(-1, 1)
            case _:
                first_row, first_column = scale.first
                rows = torch.arange(cut.rows.start - first_row, cut.rows.stop - first_row) // self.block[0]
                columns = torch.arange(cut.columns.start - first_column, cut.columns.stop - first_column)
                scales, group_of = scales[rows], columns // self.block[1]
        return Decoded(Float8(self.kind), codes, scales, None, group_of)

    def held_bytes(self, shape: Shape, dtype_bytes: int) -> int:
        return held_bytes(shape, 8, -(-shape.in_ // self.block[1]) if self.scale == "block" else 1, 4)


@dataclass(frozen=True)
class QuantizeFp8:
    """A dense weight, rounded while it is loaded to e4m3fn with one scale for each output: its absmax / 448."""

    name = "quantized to fp8 while loading, one scale for each output"

    def specs(self, shape: Shape) -> tuple[TensorSpec, ...]:
        return (TensorSpec("weight", (Axis(Along.OUT), Axis(Along.IN, reach=shape.in_)), FLOATS),)

    def decode(self, pieces: Mapping[str, Piece], cut: Cut) -> Decoded:
        import torch

        from ..kernels.weights import Float8
        from .blocks import check_scales, round_rows_to_float8

        values, _, where = pieces["weight"]
        codes, scales = round_rows_to_float8(values, cut.columns)
        check_scales(scales, KINDS["e4m3fn"][1], where)
        group_of = torch.zeros(len(cut.columns), dtype=torch.int64)
        return Decoded(Float8("e4m3fn"), codes, scales[:, None], None, group_of)

    def held_bytes(self, shape: Shape, dtype_bytes: int) -> int:
        return held_bytes(shape, 8, 1, 4)
