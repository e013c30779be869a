"""Dense linears on oneDNN with prepacked weights, called only with proven numbers of rows."""

import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .proofs import BASE_ROWS, MAX_PRODUCT, ROW_COUNTS, RowSplitter, cancelling, proven_row_counts

logger = logging.getLogger(__name__)

Multiply = Callable[[Tensor], Tensor]


def prepack(weight: Tensor) -> Multiply:
    """x @ weight.T for float32 or bfloat16, without any promise about rows.

    Where the processor's library has no bfloat16, the weight is kept in float32: products of the rounded values are
    summed in float32 and the result is rounded, as native bfloat16 does, several times faster than torch's own loop.
    """
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        wide = prepack(weight.float())
        return lambda x: wide(x.float()).bfloat16()
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
        self._counts: dict[tuple[int, int, torch.dtype, int], tuple[int, ...]] = {}
        self._splitters: dict[tuple[int, ...], RowSplitter] = {}

    def __call__(self, weight: Tensor) -> StableLinear:
        counts = self._proven(weight)
        if counts not in self._splitters:
            self._splitters[counts] = RowSplitter(counts)
        return StableLinear(prepack(weight), self._splitters[counts], counts)

    def _proven(self, weight: Tensor) -> tuple[int, ...]:
        out, in_ = weight.shape
        key = (in_, out, weight.dtype, torch.get_num_threads())
        if key not in self._counts:
            most = max(4 * BASE_ROWS, max((c for c in ROW_COUNTS if c * in_ * out <= MAX_PRODUCT), default=0))
            x, probe = cancelling(most, in_, out)
            counts = proven_row_counts(prepack(probe.to(weight.dtype)), x.to(weight.dtype))
            if not counts:
                self.row_stable, counts = False, (BASE_ROWS,)
                logger.warning("linear %d x %d: rows influence each other; replay is not exact", in_, out)
            logger.info("linear %d x %d %s: proven at rows %s", in_, out, weight.dtype, list(counts))
            self._counts[key] = counts
        return self._counts[key]
