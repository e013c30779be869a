"""Feed-forward layers."""

from torch import Tensor

from ..loading import Loader
from ..quantization.format import Part
from .linear import load_columns, load_row_parallel


class GatedMLP:
    """down(silu(gate(x)) * up(x))"""

    def __init__(self, load: Loader, size: int):
        rows = load.tp.share_evenly(size)
        self.kernels = load.kernels
        self.gate_up = load_columns(load, [Part("gate_proj", (rows,)), Part("up_proj", (rows,))])
        self.down = load_row_parallel(load, "down_proj", load.hidden_size, rows)

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self.kernels.silu_and_mul(self.gate_up(x)))
