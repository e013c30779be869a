"""Dense linears, on oneDNN with prepacked weights where it can, called only with proven numbers of rows."""

import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..interface import Matmul
from .blocks import BlockLinear, block_rows
from .proofs import BASE_ROWS, MAX_PRODUCT, ROW_COUNTS, RowSplitter, cancelling, proven_row_counts

logger = logging.getLogger(__name__)

Multiply = Callable[[Tensor], Tensor]


def prepack(weight: Tensor) -> Multiply:
    """x @ weight.T for what the processor's library multiplies, without any promise about rows."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        kept = weight.clone()
        return lambda x: F.linear(x, kept)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 16)
    pointwise = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: pointwise(x, packed, None, "none", [], "")


class StableLinear:
    """y = x W.T with each row's bits its own."""

    def __init__(self, multiply: Multiply, splitter: RowSplitter, counts: tuple[int, ...]):
        self.multiply, self.splitter, self.counts = multiply, splitter, frozenset(counts)

    def __call__(self, x: Tensor) -> Tensor:
        rows = len(x)
        if rows in self.counts:
            return self.multiply(x)
        pieces = self.splitter.split(rows)
        if sum(pieces) > rows:
            x = F.pad(x, (0, 0, 0, sum(pieces) - rows))
        if len(pieces) == 1:
            return self.multiply(x)[:rows]
        return torch.cat([self.multiply(piece) for piece in torch.split(x, pieces)])[:rows]


class LinearFactory:
    """Prepares linears; what was proven of a shape is remembered."""

    def __init__(self) -> None:
        self.row_stable = True
        self._counts: dict[tuple[str, int, int, torch.dtype, int], tuple[int, ...]] = {}
        self._splitters: dict[tuple[int, ...], RowSplitter] = {}

    def __call__(self, weight: Tensor) -> Matmul:
        if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return self._widened(weight)
        splitter, counts = self._proven("prepacked", len(weight), weight.shape[1], weight.dtype, prepack)
        return StableLinear(prepack(weight), splitter, counts)

    def _widened(self, weight: Tensor) -> Matmul:
        """For bfloat16 where the library has no products of it: blocks are widened to float32 when they are multiplied.

        Sums are in float32 and the result is rounded, as native bfloat16 does. Several times faster than torch's own
        loop, and memory is read half as much as if the weight were kept in float32.
        """
        out, in_ = weight.shape
        block = block_rows(in_, out)
        splitter, _ = self._proven("widened", block, in_, torch.float32, lambda w: lambda x: F.linear(x, w))
        return BlockLinear(lambda rows: weight[rows].float(), out, block, torch.bfloat16, torch.float32, splitter)

    def _proven(
        self, kind: str, out: int, in_: int, dtype: torch.dtype, make: Callable[[Tensor], Multiply]
    ) -> tuple[RowSplitter, tuple[int, ...]]:
        key = (kind, in_, out, dtype, torch.get_num_threads())
        if key not in self._counts:
            most = max(4 * BASE_ROWS, max((c for c in ROW_COUNTS if c * in_ * out <= MAX_PRODUCT), default=0))
            x, probe = cancelling(most, in_, out, dtype)
            multiply = make(probe)
            del probe
            counts = proven_row_counts(multiply, x)
            if not counts:
                self.row_stable, counts = False, (BASE_ROWS,)
                logger.warning("%s linear %d x %d: rows influence each other; replay is not exact", kind, in_, out)
            logger.info("%s linear %d x %d %s: proven at rows %s", kind, in_, out, dtype, list(counts))
            self._counts[key] = counts
        counts = self._counts[key]
        if counts not in self._splitters:
            self._splitters[counts] = RowSplitter(counts)
        return self._splitters[counts], counts
