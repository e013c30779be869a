"""The one slicer: parts of any rank equal the same parts of the whole, for tensors laid out in any declared way."""

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from text_generation_server.errors import CheckpointError
from text_generation_server.kernels.interface import Kernels, Matmul
from text_generation_server.kernels.reference.kernels import ReferenceKernels
from text_generation_server.quantization.dense import Dense
from text_generation_server.quantization.format import Along, Axis, Merge, Part, Region, Stored, TensorSpec, read_weight
from text_generation_server.quantization.registry import format_for

IN, OUT = 64, 96


@dataclass
class Kept:
    """A stored tensor that counts what is read of it."""

    tensor: Tensor
    elements_read: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def read(self, ranges: Mapping[int, range] | None = None) -> Tensor:
        cut = (ranges or {}).items()
        part = self.tensor
        for dim, r in cut:
            part = part.narrow(dim, r.start, len(r))
        self.elements_read += part.numel()
        return part.clone()


@dataclass(frozen=True)
class Packed:
    """A made-up format: words of four IN features, a scale per group of 16, an index over IN, a scale of the whole."""

    specs = (
        TensorSpec("words", (Axis(Along.IN, 4), Axis(Along.OUT))),
        TensorSpec("scales", (Axis(Along.IN, 16), Axis(Along.OUT))),
        TensorSpec("index", (Axis(Along.IN),)),
        TensorSpec("whole", (), Merge.PER_PART),
    )

    def decode(self, stored: Mapping[str, Stored]) -> Mapping[str, Stored]:
        return stored

    def matmul(self, tensors: Mapping[str, Tensor], region: Region, kernels: Kernels) -> Matmul:
        words = tensors["words"].repeat_interleave(4, 0) * tensors["scales"].repeat_interleave(16, 0)
        weight = words * tensors["whole"].repeat_interleave(torch.tensor(region.out_sizes))
        return kernels.linear(weight[torch.argsort(tensors["index"])].T.contiguous())


def store(name: str) -> dict[str, Kept]:
    g = torch.Generator().manual_seed(sum(map(ord, name)))
    tensors = {
        "weight": torch.randn(OUT, IN, generator=g, dtype=torch.float64),
        "words": torch.randn(IN // 4, OUT, generator=g, dtype=torch.float64),
        "scales": torch.randn(IN // 16, OUT, generator=g, dtype=torch.float64),
        "index": torch.arange(IN),
        "whole": torch.randn((), generator=g, dtype=torch.float64),
    }
    return {f"layer.{name}.{suffix}": Kept(t) for suffix, t in tensors.items()}


FORMATS = [Dense(), Packed()]
KERNELS = ReferenceKernels()


@pytest.mark.parametrize("format_", FORMATS, ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_merged_columns_equal_the_unsharded_layers(format_: Dense | Packed, size: int) -> None:
    source, x = store("q") | store("k"), torch.randn(5, IN, dtype=torch.float64)
    whole = {}
    for name in "qk":
        part = Part(name, (range(OUT),))
        weight = read_weight(source, "layer.", format_, [part])
        whole[name] = format_.matmul(weight, Region((OUT,), None, torch.float64), KERNELS)(x)
    for rank in range(size):
        rows = range(rank * OUT // size, (rank + 1) * OUT // size)
        parts = [Part("q", (rows,)), Part("k", (range(8), rows))]
        weight = read_weight(source, "layer.", format_, parts)
        y = format_.matmul(weight, Region(tuple(p.size for p in parts), None, torch.float64), KERNELS)(x)
        mine = slice(rows.start, rows.stop)
        want = torch.cat((whole["q"][:, mine], whole["k"][:, :8], whole["k"][:, mine]), -1)
        torch.testing.assert_close(y, want)


@pytest.mark.parametrize("format_", FORMATS, ids=str)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_row_shards_sum_to_the_whole_layer(format_: Dense | Packed, size: int) -> None:
    source, x, part = store("o"), torch.randn(5, IN, dtype=torch.float64), Part("o", (range(OUT),))
    region = Region((OUT,), None, torch.float64)
    whole = format_.matmul(read_weight(source, "layer.", format_, [part]), region, KERNELS)(x)
    total = torch.zeros_like(whole)
    for rank in range(size):
        columns = range(rank * IN // size, (rank + 1) * IN // size)
        weight = read_weight(source, "layer.", format_, [part], columns)
        region = Region((OUT,), columns, torch.float64)
        total += format_.matmul(weight, region, KERNELS)(x[:, columns.start : columns.stop])
    torch.testing.assert_close(total, whole)


def test_a_shard_boundary_inside_an_element_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"o\.scales: features 0 to 8 cut through an element of 16"):
        read_weight(store("o"), "layer.", Packed(), [Part("o", (range(OUT),))], range(8))


def test_only_the_elements_of_a_slice_are_read() -> None:
    source = store("o")
    read_weight(source, "layer.", Dense(), [Part("o", (range(8, 16),))], range(32))
    assert source["layer.o.weight"].elements_read == 8 * 32


def test_parts_whose_common_tensor_differs_are_refused() -> None:
    source = store("q") | store("k")
    source["layer.k.index"].tensor = torch.arange(IN).flip(0)
    with pytest.raises(CheckpointError, match="q, k: index differs"):
        read_weight(source, "layer.", Packed(), [Part("q", (range(OUT),)), Part("k", (range(OUT),))])


def test_every_layer_of_a_served_checkpoint_is_dense() -> None:
    assert format_for("model.layers.0.mlp.down_proj") == Dense()
