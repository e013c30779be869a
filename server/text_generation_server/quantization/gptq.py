"""GPTQ as AutoGPTQ, GPTQModel, Optimum and TGI's own quantizer write it (Frantar et al. 2022, arXiv:2210.17323)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import CheckpointError
from .format import Decoded, Piece
from .spec import FLOATS, Along, Axis, Cut, Shape, TensorSpec, held_bytes

if TYPE_CHECKING:
    from torch import Tensor

BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Gptq:
    """Codes in int32 words along IN, zero points in words along OUT, scales [groups, out], a group for every feature.

    group_size: features of each group; -1: one group.
    sym: every zero point is 2 ** (bits - 1). The stored ones are used all the same.
    desc_act: groups need not follow each other. `g_idx` decides it alone, and may be missing only without.
    checkpoint_format: `gptq`: stored zero points are one less, modulo 2 ** bits; `gptq_v2`: they are as they are.
    zeros_borrow: the one was subtracted from whole words, as GPTQModel does for 2, 4 and 8 bits: a zero point of 0
        then borrowed from the next in its word. Others subtract from each zero point. Only zero points of 0, which
        symmetric checkpoints do not have, tell the two apart.
    """

    bits: int
    group_size: int
    sym: bool
    desc_act: bool
    checkpoint_format: str = "gptq"
    zeros_borrow: bool = False

    @property
    def name(self) -> str:
        group = "one group" if self.group_size == -1 else f"groups of {self.group_size}"
        asymmetric = "" if self.sym else ", asymmetric"
        return f"{self.checkpoint_format} {self.bits} bits, {group}{asymmetric}{', act-order' if self.desc_act else ''}"

    def specs(self, shape: Shape) -> tuple[TensorSpec, ...]:
        self._check(shape)
        # 2, 4 and 8 bits: GPTQModel fills the last word with zeros, older quantizers refuse other multiples than 32.
        # 32 codes of 3 bits are in three words, and no quantizer writes a part of that.
        features, words = (32, 3) if self.bits == 3 else (32 // self.bits, 1)
        # A feature may be of any group, so that all groups are needed by every cut.
        groups = Axis(Along.NEITHER, elements=self._num_groups(shape))
        return (
            TensorSpec("qweight", (Axis(Along.IN, features, words), Axis(Along.OUT)), ("I32",)),
            TensorSpec("qzeros", (groups, Axis(Along.OUT, features, words)), ("I32",)),
            TensorSpec("scales", (groups, Axis(Along.OUT)), FLOATS),
            TensorSpec("g_idx", (Axis(Along.IN),), ("I32", "I64"), optional=not self.desc_act),
        )

    def decode(self, pieces: Mapping[str, Piece], cut: Cut) -> Decoded:
        from ..kernels.weights import Integer
        from .unpack import check_finite, codes_of_words

        words, scales = pieces["qweight"], pieces["scales"]
        first = cut.columns.start - words.first[0]
        codes = codes_of_words(words.tensor.T, self.bits, range(first, first + len(cut.columns)))
        check_finite(scales.tensor, scales.where)
        return Decoded(Integer(self.bits), codes, scales.tensor.T, self._zeros(pieces, cut), self._groups(pieces, cut))

    def held_bytes(self, shape: Shape, dtype_bytes: int) -> int:
        # An order, and for a cut of it an index of groups, both int64.
        order = 16 * shape.in_ if self.desc_act else 0
        return held_bytes(shape, self.bits, self._num_groups(shape), scale_bytes=2, zero_bytes=1) + order

    def _num_groups(self, shape: Shape) -> int:
        return 1 if self.group_size == -1 else -(-shape.in_ // self.group_size)

    def _zeros(self, pieces: Mapping[str, Piece], cut: Cut) -> Tensor:
        """uint8 [rows, groups]."""
        from .unpack import add_to_fields, all_equal, unpack_words

        stored = pieces["qzeros"]
        # GPTQModel takes the one off each zero point where these lie across words.
        in_words = self.zeros_borrow and self.bits != 3
        words = stored.tensor
        if self.checkpoint_format == "gptq" and in_words:
            words = add_to_fields(words, self.bits)
        zeros = unpack_words(words, self.bits)
        if self.checkpoint_format == "gptq" and not in_words:
            # Stored 2 ** bits - 1 is a zero point of 0 that went round. Readers that do not go round (the first
            # AutoGPTQ, exllama) take 2 ** bits, which no quantizer can have meant.
            zeros = (zeros + 1) & (2**self.bits - 1)
        first = cut.rows.start - stored.first[1]
        zeros = zeros[:, first : first + len(cut.rows)].T
        middle = 2 ** (self.bits - 1)
        lied, other = (middle + 1, "gptq_v2") if self.checkpoint_format == "gptq" else (middle - 1, "gptq")
        # No quantizer that looks for zero points finds the same one everywhere.
        if (self.sym or zeros.numel() >= 64) and all_equal(zeros, lied):
            raise CheckpointError(
                f"{stored.where}: every zero point is {lied} as checkpoint_format {self.checkpoint_format} stores "
                f"them; expected {middle}, as of a symmetric grid; its checkpoint_format must be {other}"
            )
        return zeros

    def _groups(self, pieces: Mapping[str, Piece], cut: Cut) -> Tensor:
        """int64 [columns]."""
        from .unpack import groups_in_order, read_group_index

        in_order = groups_in_order(cut.columns, cut.shape.in_ if self.group_size == -1 else self.group_size)
        if "g_idx" not in pieces:
            # With a last group that is not whole, another size would have as many groups: only sizes that tools write.
            if self.group_size != -1 and cut.shape.in_ % self.group_size and self.group_size & (self.group_size - 1):
                raise CheckpointError(
                    f"{pieces['scales'].where}: groups of {self.group_size} do not divide {cut.shape.in_} features, "
                    "and there is no g_idx that tells the group of each; expected one of them"
                )
            return in_order
        index = pieces["g_idx"]
        groups = read_group_index(index.tensor, self._num_groups(cut.shape), index.where)
        if not self.desc_act and bool(in_order.any()) and not bool(groups.any()):
            raise CheckpointError(
                f"{index.where} puts every feature into group 0, but there are {self._num_groups(cut.shape)} groups; "
                f"expected their order; leave g_idx out if it is feature // {self.group_size}, as some readers assume"
            )
        return groups

    def _check(self, shape: Shape) -> None:
        if self.bits not in BITS:
            raise CheckpointError(f"gptq with {self.bits} bits is not served; expected one of {BITS}")
        if self.group_size != -1 and self.group_size < 1:
            raise CheckpointError(f"gptq with groups of {self.group_size}; expected -1 or a number of features")
        if self.checkpoint_format not in ("gptq", "gptq_v2"):
            raise CheckpointError(f"checkpoint_format is {self.checkpoint_format}; expected gptq or gptq_v2")
        if self.bits == 3 and (shape.in_ % 32 or shape.out % 32):
            raise CheckpointError(
                f"gptq with 3 bits packs 32 features into three words; expected multiples of 32 features, found a "
                f"linear of {shape.in_} to {shape.out}; quantize it with 2, 4 or 8 bits, or leave it as it is"
            )
