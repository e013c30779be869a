"""AWQ as AutoAWQ and GPTQModel write it, in its `gemm` and `gemv` layouts (Lin et al. 2023, arXiv:2306.00978)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import CheckpointError
from .format import Decoded, Piece
from .spec import FLOATS, Along, Axis, Cut, Shape, TensorSpec, held_bytes

if TYPE_CHECKING:
    from torch import Tensor

BITS = 4
PER_WORD = 32 // BITS
# By how many words AutoAWQ rounds up the zero points of a row in `gemv`; 16 as GPTQModel. From 128 on: 1.
_GEMV_WORDS = {16: 8, 32: 4, 64: 2}


@dataclass(frozen=True)
class Awq:
    """Eight 4-bit codes in an int32 word, zero points alike. Scales and zero points follow the groups of IN.

    gemm: words along OUT, each with its features in the order 0 2 4 6 1 3 5 7; scales [groups, out].
    gemv: words along IN, in order; scales [out, groups], and the groups of a row filled up to whole words
        (and these to two, four or eight for groups of 64, 32 or 16), filled with zeros.
    group_size: -1: one group.
    zero_point: false: zero points may be missing and are 8; both libraries write them for either layout.
    """

    bits: int
    group_size: int
    zero_point: bool
    version: str = "gemm"

    @property
    def name(self) -> str:
        group = "one group" if self.group_size == -1 else f"groups of {self.group_size}"
        return f"awq {self.version} {self.bits} bits, {group}{'' if self.zero_point else ', symmetric'}"

    def specs(self, shape: Shape) -> tuple[TensorSpec, ...]:
        self._check(shape)
        size = self._size(shape)
        if self.version == "gemm":
            groups, words = Axis(Along.IN, size), Axis(Along.OUT, PER_WORD)
            qweight = (Axis(Along.IN), words)
            qzeros, scales = (groups, words), (groups, Axis(Along.OUT))
        else:
            num_words = self._padded_words(shape)
            qweight = (Axis(Along.OUT), Axis(Along.IN, PER_WORD))
            qzeros = (Axis(Along.OUT), Axis(Along.NEITHER, elements=num_words))
            scales = (Axis(Along.OUT), Axis(Along.NEITHER, elements=num_words * PER_WORD))
        return (
            TensorSpec("qweight", qweight, ("I32",)),
            TensorSpec("qzeros", qzeros, ("I32",), optional=not self.zero_point),
            TensorSpec("scales", scales, FLOATS),
        )

    def decode(self, pieces: Mapping[str, Piece], cut: Cut) -> Decoded:
        return self._decode_gemm(pieces, cut) if self.version == "gemm" else self._decode_gemv(pieces, cut)

    def held_bytes(self, shape: Shape, dtype_bytes: int) -> int:
        groups = -(-shape.in_ // self._size(shape))
        return held_bytes(shape, BITS, groups, scale_bytes=2, zero_bytes=1)

    def _decode_gemm(self, pieces: Mapping[str, Piece], cut: Cut) -> Decoded:
        from ..kernels.codes import unpack
        from ..kernels.weights import Integer
        from .unpack import check_finite, codes_of_gemm, groups_in_order

        words, scales = pieces["qweight"], pieces["scales"]
        first = cut.rows.start - words.first[1]
        rows = slice(first, first + len(cut.rows))
        zeros = None
        if "qzeros" in pieces:
            stored = pieces["qzeros"].tensor
            zeros = unpack(codes_of_gemm(stored)[rows], BITS, len(stored))
        check_finite(scales.tensor, scales.where)
        groups = groups_in_order(cut.columns, self._size(cut.shape), scales.first[0])
        return Decoded(Integer(BITS), codes_of_gemm(words.tensor)[rows], scales.tensor.T, zeros, groups)

    def _decode_gemv(self, pieces: Mapping[str, Piece], cut: Cut) -> Decoded:
        from ..kernels.weights import Integer
        from .unpack import codes_of_words, groups_in_order, unpack_words

        words, stored = pieces["qweight"], pieces["scales"]
        first = cut.columns.start - words.first[1]
        codes = codes_of_words(words.tensor, BITS, range(first, first + len(cut.columns)))
        num_groups = cut.shape.in_ // self._size(cut.shape)
        scales = self._unpadded(stored, num_groups)
        zeros = unpack_words(pieces["qzeros"].tensor, BITS)[:, :num_groups] if "qzeros" in pieces else None
        return Decoded(Integer(BITS), codes, scales, zeros, groups_in_order(cut.columns, self._size(cut.shape)))

    def _unpadded(self, stored: Piece, num_groups: int) -> Tensor:
        """The scales without what fills them up, which alone tells how many groups there are."""
        from .unpack import check_finite

        scales, padding = stored.tensor[:, :num_groups], stored.tensor[:, num_groups:]
        check_finite(stored.tensor, stored.where)
        # Quantizers write no scale of 0, AutoAWQ's smallest is 1e-5 / 15.
        if bool(padding.any()) or not bool(scales.any(0).all()):
            used = int((stored.tensor != 0).any(0).sum())
            raise CheckpointError(
                f"{stored.where} has {used} groups whose scales are not all zero; expected {num_groups} and then zeros "
                f"for groups of {self.group_size}; is group_size in the configuration right?"
            )
        return scales

    def _size(self, shape: Shape) -> int:
        return shape.in_ if self.group_size == -1 else self.group_size

    def _padded_words(self, shape: Shape) -> int:
        words = -(-(shape.in_ // self._size(shape)) // PER_WORD)
        multiple = _GEMV_WORDS.get(self._size(shape), 1)
        return -(-words // multiple) * multiple

    def _check(self, shape: Shape) -> None:
        linear = f"a linear of {shape.in_} to {shape.out}"
        if self.bits != BITS:
            raise CheckpointError(f"awq with {self.bits} bits is not served; expected {BITS}")
        if self.version not in ("gemm", "gemv"):
            raise CheckpointError(f"awq in the layout {self.version} is not served; expected gemm or gemv")
        if self.group_size != -1 and self.group_size < 1:
            raise CheckpointError(f"awq with groups of {self.group_size}; expected -1 or a number of features")
        if shape.in_ % self._size(shape):
            raise CheckpointError(f"awq has whole groups only; found {linear}, whose groups are of {self.group_size}")
        packed = shape.out if self.version == "gemm" else shape.in_
        if packed % PER_WORD or shape.out % PER_WORD:
            raise CheckpointError(
                f"awq packs {PER_WORD} features into a word; expected multiples of it, found {linear}"
            )
        size = self._size(shape)
        if self.version == "gemv" and size < 128 and size not in _GEMV_WORDS:
            raise CheckpointError(
                f"awq gemv with groups of {size}; expected 128 or more, or one of {', '.join(map(str, _GEMV_WORDS))}"
            )
