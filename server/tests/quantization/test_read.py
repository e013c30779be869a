"""The one slicer: parts of any rank equal the same parts of the whole, for tensors laid out in any declared way."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch
from makers import Kept, matrix_of
from text_generation_server.errors import CheckpointError
from text_generation_server.kernels.codes import pack
from text_generation_server.kernels.weights import Integer, QuantizedWeight
from text_generation_server.quantization import read
from text_generation_server.quantization.dense import Dense
from text_generation_server.quantization.format import Decoded, Part, Piece, StoredLinear, WeightFormat
from text_generation_server.quantization.read import lay_out_groups, read_weight
from text_generation_server.quantization.spec import Along, Axis, Cut, Shape, TensorSpec, held_bytes
from torch import Tensor

IN, OUT, GROUP = 72, 96, 16


@dataclass(frozen=True)
class Packed:
    """A made-up format: an int64 word holds four IN features; scales of groups of 16; an index over IN."""

    name = "packed"

    def specs(self, shape: Shape) -> tuple[TensorSpec, ...]:
        return (
            TensorSpec("words", (Axis(Along.IN, 4), Axis(Along.OUT)), ("I64",)),
            TensorSpec("scales", (Axis(Along.NEITHER, elements=-(-IN // GROUP)), Axis(Along.OUT)), ("F32",)),
            TensorSpec("index", (Axis(Along.IN),), ("I64",)),
        )

    def decode(self, pieces: Mapping[str, Piece], cut: Cut) -> Decoded:
        words = pieces["words"].tensor.T
        codes = torch.stack([(words >> shift) & 15 for shift in (0, 4, 8, 12)], -1).flatten(1).to(torch.uint8)
        skipped = cut.columns.start - pieces["words"].first[0]
        codes = codes[:, skipped : skipped + len(cut.columns)]
        return Decoded(Integer(4), pack(codes, 4), pieces["scales"].tensor.T, None, pieces["index"].tensor)

    def held_bytes(self, shape: Shape, dtype_bytes: int) -> int:
        return held_bytes(shape, 4, -(-shape.in_ // GROUP), 4)


@dataclass(frozen=True)
class Layer:
    """One stored linear and its weight in float64."""

    tensors: dict[str, Kept]
    weight: Tensor


def dense(name: str, order: str) -> Layer:
    g = torch.Generator().manual_seed(sum(map(ord, name)))
    weight = torch.randn(OUT, IN, generator=g)
    return Layer({f"layer.{name}.weight": Kept(weight, name)}, weight.double())


def packed(name: str, order: str) -> Layer:
    g = torch.Generator().manual_seed(sum(map(ord, name)))
    codes = torch.randint(0, 16, (OUT, IN), generator=g)
    scales = torch.rand(-(-IN // GROUP), OUT, generator=g)
    index = torch.arange(IN) // GROUP
    if order == "shuffled":
        index = index[torch.randperm(IN, generator=torch.Generator().manual_seed(7))]
    words = (codes.view(OUT, -1, 4) << torch.tensor([0, 4, 8, 12])).sum(-1).T
    weight = (codes.double() - 8) * scales.T.double()[:, index]
    tensors = {"words": words, "scales": scales, "index": index}
    return Layer({f"layer.{name}.{key}": Kept(t, f"{name}.{key}") for key, t in tensors.items()}, weight)


Make = Callable[[str, str], Layer]
CASES: list[tuple[Make, WeightFormat, str]] = [
    (dense, Dense(), "kept"),
    (packed, Packed(), "kept"),
    (packed, Packed(), "shuffled"),
]


def matrix(weights: list[Tensor | QuantizedWeight]) -> Tensor:
    return torch.from_numpy(matrix_of(weights))


@pytest.mark.parametrize(("make", "format_", "order"), CASES)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("chunk", [1, 1 << 23])
def test_merged_columns_equal_the_rows_of_the_layers(
    make: Make, format_: WeightFormat, order: str, size: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "CHUNK_VALUES", chunk)
    monkeypatch.setattr(read, "CHUNK_ROWS", 8)
    layers = {name: make(name, order) for name in "qk"}
    source = layers["q"].tensors | layers["k"].tensors
    stored = StoredLinear(Shape(OUT, IN), format_)
    for rank in range(size):
        rows = range(OUT * rank // size, OUT * (rank + 1) // size)
        pieces = (range(rows.start, rows.start + 3), range(rows.start + 3, rows.stop))
        linears = [(Part("q", (rows,)), stored), (Part("k", pieces), stored)]
        weights = read_weight(source, "layer.", linears, None, torch.float32)
        assert len(weights) == 1, "parts that are stored alike are one matrix"
        expected = torch.cat([layers[name].weight[rows.start : rows.stop] for name in "qk"])
        torch.testing.assert_close(matrix(weights), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("make", "format_", "order"), CASES)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7])
def test_a_cut_may_fall_anywhere_inside_words_and_groups(
    make: Make, format_: WeightFormat, order: str, size: int
) -> None:
    layer = make("o", order)
    for rank in range(size):
        columns = range(IN * rank // size, IN * (rank + 1) // size)
        linears = [(Part("o", (range(OUT),)), StoredLinear(Shape(OUT, IN), format_))]
        weights = read_weight(layer.tensors, "layer.", linears, columns, torch.float32)
        expected = layer.weight[:, columns.start : columns.stop]
        torch.testing.assert_close(matrix(weights), expected, rtol=1e-6, atol=1e-6)


def test_only_the_bytes_of_a_slice_are_read_and_an_index_once() -> None:
    layer = packed("o", "kept")
    linears = [(Part("o", (range(8, 24), range(40, 48))), StoredLinear(Shape(OUT, IN), Packed()))]
    read_weight(layer.tensors, "layer.", linears, range(10, 30), torch.float32)
    # Features 8 to 32 are in six words.
    assert layer.tensors["layer.o.words"].elements_read == 6 * 24
    assert layer.tensors["layer.o.index"].elements_read == 20
    assert layer.tensors["layer.o.scales"].elements_read == 5 * 24


def test_parts_that_are_stored_differently_become_matrices_of_their_own() -> None:
    layers = {"q": packed("q", "kept"), "k": packed("k", "shuffled"), "v": dense("v", "kept")}
    source = {name: kept for layer in layers.values() for name, kept in layer.tensors.items()}
    formats = {"q": Packed(), "k": Packed(), "v": Dense()}
    linears = [(Part(n, (range(OUT),)), StoredLinear(Shape(OUT, IN), f)) for n, f in formats.items()]
    weights = read_weight(source, "layer.", linears, None, torch.float32)
    assert len(weights) == 3
    expected = torch.cat([layer.weight for layer in layers.values()])
    torch.testing.assert_close(matrix(weights), expected, rtol=1e-6, atol=1e-6)


def test_a_tensor_of_another_shape_is_refused_by_name() -> None:
    layer = packed("o", "kept")
    layer.tensors["layer.o.scales"].tensor = torch.rand(4, OUT)
    linears = [(Part("o", (range(OUT),)), StoredLinear(Shape(OUT, IN), Packed()))]
    with pytest.raises(CheckpointError, match=r"o\.scales has shape \[4, 96\]; expected \[5, 96\]"):
        read_weight(layer.tensors, "layer.", linears, None, torch.float32)


@pytest.mark.parametrize(
    ("group_of", "ordered", "groups", "select"),
    [
        ([0, 0, 0, 0, 1, 1, 1, 1], True, 4, [0, 1]),
        ([0, 0, 0, 0, 1, 1], True, 4, [0, 1]),  # the last group is shorter
        ([0, 0, 1, 1, 1, 1], True, 2, [0, 1, 1]),  # the first was cut
        ([3, 3, 3], True, 3, [3]),
        ([1, 0, 1, 0], False, 2, [0, 1]),
    ],
)
def test_groups_become_regular_where_they_can(
    group_of: list[int], ordered: bool, groups: int, select: list[int]
) -> None:
    order, size, chosen = lay_out_groups(torch.tensor(group_of))
    assert (order is None) == ordered
    assert size == groups
    assert chosen.tolist() == select


def test_groups_that_begin_anywhere_are_kept_as_an_index() -> None:
    group_of = torch.tensor([0] * 101 + [1] * 3 + [2] * 97)
    order, index, chosen = lay_out_groups(group_of)
    assert order is None
    assert isinstance(index, Tensor)
    assert index.tolist() == group_of.tolist()
    assert chosen.tolist() == [0, 1, 2]
