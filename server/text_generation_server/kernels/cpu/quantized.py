"""Products with quantized weights, each row's bits its own: see `proofs.py`."""

import logging
import re

import torch
import torch.nn.functional as F
from torch import Tensor

from ..interface import Matmul
from ..weights import QuantizedWeight
from .proofs import BASE_ROWS, MAX_PRODUCT, ROW_COUNTS, RowSplitter, cancelling, proven_row_counts

logger = logging.getLogger(__name__)

# Values of a block of rows made into numbers at once: 1 MB of float32, which stays in a core's own cache.
BLOCK_VALUES = 1 << 18


class DequantizedLinear:
    """y = x W.T, the rows of W made into numbers block by block. Serves every weight."""

    name = "dequantize and multiply"

    def __init__(self, weight: QuantizedWeight, block: int, dtype: torch.dtype, splitter: RowSplitter):
        self.weight, self.block, self.dtype, self.splitter = weight, block, dtype, splitter

    def __call__(self, x: Tensor) -> Tensor:
        if self.weight.order is not None:
            x = x.index_select(1, self.weight.order)
        rows, dtype = len(x), x.dtype
        pieces = self.splitter.split(rows)
        x = F.pad(x.to(self.dtype), (0, 0, 0, sum(pieces) - rows))
        y = x.new_empty(len(x), self.weight.out_features)
        for first in range(0, self.weight.out_features, self.block):
            block = slice(first, first + self.block)
            weight = self.weight.dequantize(block).to(self.dtype)
            # The last block is filled up: the number of columns may change the order of sums.
            weight = F.pad(weight, (0, 0, 0, self.block - len(weight)))
            y[:, block] = torch.cat([F.linear(piece, weight) for piece in torch.split(x, pieces)])[
                :, : y.shape[1] - first
            ]
        return y[:rows].to(dtype)


class QuantizedLinearFactory:
    """Chooses the product for each weight; what was proven of a shape is remembered."""

    def __init__(self) -> None:
        self.row_stable = True
        self._splitters: dict[tuple[int, int, torch.dtype, int], RowSplitter] = {}
        self._told: set[str] = set()

    def __call__(self, weight: QuantizedWeight, dtype: torch.dtype, label: str) -> Matmul:
        # As dense weights: products of the rounded values in float32 where the processor has no bfloat16.
        native = dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        computed = dtype if native else torch.float32
        block = max(16, BLOCK_VALUES // weight.in_features // 16 * 16)
        product = DequantizedLinear(weight, block, computed, self._splitter(weight.in_features, block, computed))
        self._tell(label, weight, product.name)
        return product

    def _tell(self, label: str, weight: QuantizedWeight, product: str) -> None:
        kind = re.sub(r"\.\d+\.", ".*.", label)
        if kind not in self._told:
            self._told.add(kind)
            logger.info("%s: %s, %d x %d: %s", kind, weight.coding, weight.in_features, weight.out_features, product)

    def _splitter(self, in_: int, out: int, dtype: torch.dtype) -> RowSplitter:
        key = (in_, out, dtype, torch.get_num_threads())
        if key not in self._splitters:
            most = max(4 * BASE_ROWS, max((c for c in ROW_COUNTS if c * in_ * out <= MAX_PRODUCT), default=0))
            x, w = (t.to(dtype) for t in cancelling(most, in_, out))
            counts = proven_row_counts(lambda rows: F.linear(rows, w), x)
            if not counts:
                self.row_stable, counts = False, (BASE_ROWS,)
                logger.warning("quantized linear %d x %d: rows influence each other; replay is not exact", in_, out)
            self._splitters[key] = RowSplitter(counts)
        return self._splitters[key]
