"""What formats of integers in words have in common: words to codes, and the values that no format may hold."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..kernels.codes import pack, packed_bytes, transpose_words, unpack

# The features of AutoAWQ's `gemm` words, low bits first.
_GEMM_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """words int32 [rows, n] -> uint8 [rows, n * 32 / bits]: value i is in the bits from i * bits on, low bits first.

    Values may lie across two words, as those of 3 bits do; n is then a multiple of `bits`.
    """
    return unpack(_bytes_of(words), bits, words.shape[1] * 32 // bits)


def codes_of_words(words: Tensor, bits: int, columns: range) -> Tensor:
    """words as `unpack_words` takes them -> some columns as `kernels.codes.pack` lays them out.

    Bits behind the last column may be those of the next.
    """
    begin, rest = divmod(columns.start * bits, 8)
    if rest:
        return pack(unpack_words(words, bits)[:, columns.start : columns.stop], bits)
    return _bytes_of(words)[:, begin : begin + packed_bytes(len(columns), bits)]


def _bytes_of(words: Tensor) -> Tensor:
    # A copy: dimensions of size 1 count as contiguous with any stride, but no view as bytes is possible then.
    return words.clone(memory_format=torch.contiguous_format).view(torch.uint8).view(len(words), -1)


def codes_of_gemm(words: Tensor) -> Tensor:
    """words int32 [in, out / 8] of AutoAWQ's `gemm` -> [out, in] of 4 bits as `kernels.codes.pack` lays them out."""
    return transpose_words(words, _GEMM_PLACES)


def add_to_fields(words: Tensor, bits: int) -> Tensor:
    """One more in every field of `bits` bits, a carry going into the next field of the word."""
    ones = sum(1 << shift for shift in range(0, 32, bits))
    return words + ones


def groups_in_order(columns: range, group_size: int, first: int = 0) -> Tensor:
    """int64 [columns]: the group of each feature where groups follow each other, counted from the one of `first`."""
    return torch.arange(columns.start, columns.stop) // group_size - first // group_size


def read_group_index(index: Tensor, num_groups: int, where: str) -> Tensor:
    """A stored index [columns] as int64.

    Raises:
        CheckpointError: it names a group that there is not.
    """
    groups = index.long()
    wrong = (groups < 0) | (groups >= num_groups)
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        raise CheckpointError(
            f"{where} puts a feature into group {int(groups[at])}; expected groups from 0 to {num_groups - 1}, as many "
            f"as there are scales; fetch the file again, or quantize the model again"
        )
    return groups


def check_finite(scales: Tensor, where: str) -> None:
    """Refuses scales that would make every product NaN.

    Raises:
        CheckpointError: one is NaN or infinite.
    """
    finite = torch.isfinite(scales)
    if not bool(finite.all()):
        value = float(scales[~finite][0])
        raise CheckpointError(
            f"{where} holds {value}; expected finite scales; fetch the file again, or quantize the model again"
        )


def all_equal(values: Tensor, value: int) -> bool:
    """Whether there are values, and each is this one."""
    return values.numel() > 0 and bool((values == value).all())
