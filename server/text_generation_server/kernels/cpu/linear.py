"""Dense linears, on oneDNN with prepacked weights where it can, called only with proven numbers of rows."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..interface import Matmul
from ..weights import DenseRows, as_tensor
from .blocks import block_linear
from .native.library import Library
from .native.linear import dense_linear, dense_why_not
from .proofs import Multiply, Proofs, RowSplitter


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

    def __init__(self, multiply: Multiply, splitter: RowSplitter):
        self.multiply, self.splitter = multiply, splitter

    def __call__(self, x: Tensor) -> Tensor:
        rows = len(x)
        if rows in self.splitter.counts:
            return self.multiply(x)
        pieces = self.splitter.split(rows)
        if sum(pieces) > rows:
            x = F.pad(x, (0, 0, 0, sum(pieces) - rows))
        if len(pieces) == 1:
            return self.multiply(x)[:rows]
        return torch.cat([self.multiply(piece) for piece in torch.split(x, pieces)])[:rows]


class LinearFactory:
    """Prepares dense linears."""

    def __init__(self, proofs: Proofs, library: Library | None) -> None:
        self._proofs, self._library = proofs, library

    def __call__(self, rows: Tensor | DenseRows) -> Matmul:
        if self._library is not None and dense_why_not(self._library, rows.dtype) is None:
            return dense_linear(self._library, rows)
        weight = as_tensor(rows, torch.device("cpu"))
        out, in_ = weight.shape
        if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            # Blocks are widened to float32 when they are multiplied: sums are in float32 and the result is rounded, as
            # native bfloat16 does. Several times faster than torch's own loop, and half of the memory of float32.
            def widened(rows: slice) -> Tensor:
                return weight[rows].float()

            return block_linear(widened, (out, in_), weight.dtype, torch.float32, self._proofs)
        return StableLinear(prepack(weight), self._proofs("prepacked", in_, out, weight.dtype, prepack))
