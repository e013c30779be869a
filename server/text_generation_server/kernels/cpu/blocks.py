"""Linears whose weight becomes numbers block by block, in a processor's own cache, when it is multiplied."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .proofs import Proofs, RowSplitter

# Values of a block for each thread: enough that starting an operation costs little, few enough to stay in a core's own
# cache.
BLOCK_VALUES = 1 << 19


class BlockLinear:
    """y = x W.T of `dtype`.

    make: rows of W as they are multiplied, in `computed` [rows, in]. The splitter is of products with a whole block.
    """

    def __init__(
        self,
        make: Callable[[slice], Tensor],
        out_features: int,
        block: int,
        dtype: torch.dtype,
        computed: torch.dtype,
        splitter: RowSplitter,
    ):
        self.make, self.out_features, self.block = make, out_features, block
        self.dtype, self.computed, self.splitter = dtype, computed, splitter

    def __call__(self, x: Tensor) -> Tensor:
        rows, out = len(x), self.out_features
        pieces = self.splitter.split(rows)
        x = x.to(self.computed)
        if sum(pieces) > rows:
            x = F.pad(x, (0, 0, 0, sum(pieces) - rows))
        inputs = torch.split(x, pieces)
        y = torch.empty(rows, out, dtype=self.dtype)
        for first in range(0, out, self.block):
            weight = self.make(slice(first, first + self.block))
            wanted = len(weight)
            weight = F.pad(weight, (0, 0, 0, self.block - wanted)) if wanted < self.block else weight
            products = [F.linear(piece, weight) for piece in inputs]
            product = products[0] if len(products) == 1 else torch.cat(products)
            y[:, first : first + wanted] = product[:rows, :wanted]
        return y


def block_linear(
    make: Callable[[slice], Tensor], shape: Sequence[int], dtype: torch.dtype, computed: torch.dtype, proofs: Proofs
) -> BlockLinear:
    """shape: OUT and IN features; see `BlockLinear`."""
    out, in_ = shape
    # All blocks have as many rows: another number may mean another order of sums.
    block = max(16, min(torch.get_num_threads() * BLOCK_VALUES // in_, out + 15) // 16 * 16)
    splitter = proofs("blocks", in_, block, computed, lambda w: lambda x: F.linear(x, w))
    return BlockLinear(make, out, block, dtype, computed, splitter)
