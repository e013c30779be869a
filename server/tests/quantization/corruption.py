"""What can happen to a quantized layer's files: for every format at least 300 mutations, each refused or served right.

A format registers with a `Case`. `mutations` makes the files, `outcome` plans and loads them as the server does:
the headers are checked with `check_tensors`, the weights read with `read_weight`, whole and cut.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from makers import Matrix, matrix_of, share
from safetensors.torch import save_file
from text_generation_server.checkpoint.index import INDEX_NAME, read_index
from text_generation_server.checkpoint.model_config import read_settings
from text_generation_server.checkpoint.tensors import Checkpoint
from text_generation_server.errors import CheckpointError, ConfigError
from text_generation_server.kernels.reference.kernels import ReferenceKernels
from text_generation_server.kernels.weights import QuantizedWeight
from text_generation_server.planning import check_tensors
from text_generation_server.quantization.format import Part, StoredLinear, WeightFormat
from text_generation_server.quantization.read import read_weight
from text_generation_server.quantization.spec import Shape
from torch import Tensor

Tensors = dict[str, Tensor]
Reference = Callable[[WeightFormat, Mapping[str, Tensor], Shape], Matrix]
MODEL = Path(__file__).parents[3] / "models" / "docs-llama-7m"
FLIPS = 30  # of bits of each tensor
HEADER_FLIPS = 50
DTYPES = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int32, torch.int64,
    torch.bool, torch.float8_e4m3fn,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A small layer in some format, and the float64 weight that any tensors of the format mean.

    reference: may raise what it likes if the tensors mean nothing; values that mean nothing are NaN.
    relatives: the same shape with other settings: what a configuration that lies says, and what a merged layer's
        other part may be.
    """

    format: WeightFormat
    shape: Shape
    make_tensors: Callable[[np.random.Generator], Tensors]
    reference: Reference
    relatives: tuple[Case, ...] = ()

    def __str__(self) -> str:
        return self.format.name


@dataclass(frozen=True)
class Stored:
    """One linear: what the configuration says of it, and its tensors."""

    format: WeightFormat
    tensors: Tensors


@dataclass(frozen=True)
class Mutation:
    """A checkpoint of one linear `o`, or of two that are merged, in one file or more."""

    label: str
    linears: Mapping[str, Stored]
    # What the second file holds too, and what is done to the first one's bytes.
    twice: tuple[str, ...] = ()
    damage: Callable[[bytes], bytes] | None = None
    index: Mapping[str, str] | None = None
    names: tuple[str, ...] = field(default=())  # of tensors, one of which a refusal must name


def mutations(case: Case, rng: np.random.Generator) -> Iterator[Mutation]:
    tensors = case.make_tensors(rng)
    yield Mutation("nothing", {"o": Stored(case.format, tensors)})
    for name, tensor in tensors.items():
        for what, changed in _of_tensor(tensor, rng):
            yield _changed(case, tensors, f"{name}: {what}", {name: changed}, name)
        rest = {key: value for key, value in tensors.items() if key != name}
        yield Mutation(f"{name}: missing", {"o": Stored(case.format, rest)}, names=(name,))
        yield _changed(case, tensors, f"{name}: renamed", {name + "s": tensor}, name, without=name)
        yield Mutation(f"{name}: twice", {"o": Stored(case.format, tensors)}, twice=(name,), names=(name,))
        wrong_file = {f"o.{key}": "a.safetensors" for key in tensors} | {f"o.{name}": "b.safetensors"}
        yield Mutation(
            f"{name}: index names another file", {"o": Stored(case.format, tensors)}, index=wrong_file, names=(name,)
        )
    for first in tensors:
        for second in tensors:
            if first < second:
                swapped = {first: tensors[second], second: tensors[first]}
                yield _changed(case, tensors, f"{first} and {second}: swapped", swapped, first, second)
    for relative in case.relatives:
        yield Mutation(f"configuration says {relative}", {"o": Stored(relative.format, tensors)})
        others = relative.make_tensors(rng)
        for name in tensors.keys() & others.keys():
            yield _changed(case, tensors, f"{name}: of {relative}", {name: others[name]}, name)
        merged = {"q": Stored(case.format, tensors)}
        yield Mutation(f"merged with {relative}", merged | {"k": Stored(relative.format, others)})
        yield Mutation(f"merged with {relative}, as it is not told", merged | {"k": Stored(case.format, others)})
    yield from _of_file(case, tensors, rng)


def _changed(
    case: Case, tensors: Tensors, label: str, changes: Tensors, *names: str, without: str | None = None
) -> Mutation:
    kept = {key: value for key, value in tensors.items() if key != without}
    return Mutation(label, {"o": Stored(case.format, kept | changes)}, names=names)


def _of_tensor(tensor: Tensor, rng: np.random.Generator) -> Iterator[tuple[str, Tensor]]:
    for dim in range(tensor.dim()):
        yield f"one less along {dim}", tensor.narrow(dim, 0, tensor.shape[dim] - 1)
        yield f"half along {dim}", tensor.narrow(dim, 0, tensor.shape[dim] // 2)
        yield f"one more along {dim}", torch.cat([tensor, tensor.narrow(dim, 0, 1)], dim)
        yield f"permuted along {dim}", tensor.index_select(dim, torch.from_numpy(rng.permutation(tensor.shape[dim])))
        yield f"moved along {dim}", tensor.roll(1, dim)
    yield "transposed", tensor.permute(*reversed(range(tensor.dim())))
    yield "flat", tensor.flatten()
    yield "one dimension more", tensor[None]
    yield "one value", tensor.flatten()[:1]
    yield "empty", tensor[:0]
    for dtype in DTYPES:
        if dtype != tensor.dtype:
            yield f"converted to {dtype}", tensor.double().to(dtype)
            if dtype.itemsize == tensor.dtype.itemsize and dtype != torch.bool:
                yield f"bits read as {dtype}", tensor.contiguous().view(dtype)
    yield "all zeros", torch.zeros_like(tensor)
    yield "all ones", _of_bytes(tensor, np.full(_num_bytes(tensor), 255, np.uint8))
    yield "random bytes", _of_bytes(tensor, rng.integers(0, 256, _num_bytes(tensor), np.uint8))
    if tensor.is_floating_point() and tensor.dtype.itemsize > 1:
        info = torch.finfo(tensor.dtype)
        specials = (float("nan"), float("inf"), float("-inf"), 0.0, -1.0, info.max, info.tiny, info.smallest_normal / 2)
    else:
        specials = (0, 1, -1, 2, 127) if tensor.dtype != torch.uint8 else (0, 1, 255)
    for value in specials:
        for _ in range(2):
            changed = tensor.clone()
            changed.view(-1)[int(rng.integers(tensor.numel()))] = value
            yield f"a value of {value}", changed
    for _ in range(FLIPS):
        data = _bytes_of(tensor)
        bit = int(rng.integers(8 * len(data)))
        data[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit} flipped", _of_bytes(tensor, data)


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _bytes_of(tensor: Tensor) -> np.ndarray:
    return tensor.reshape(-1).view(torch.uint8).numpy().copy()


def _of_bytes(tensor: Tensor, data: np.ndarray) -> Tensor:
    return torch.from_numpy(data).view(tensor.dtype).view(tensor.shape)


def _of_file(case: Case, tensors: Tensors, rng: np.random.Generator) -> Iterator[Mutation]:
    linears = {"o": Stored(case.format, tensors)}

    def cut(less: int) -> Callable[[bytes], bytes]:
        return lambda data: data[: max(0, len(data) - less)]

    def flip(place: float) -> Callable[[bytes], bytes]:
        def damaged(data: bytes) -> bytes:
            bit = int(place * 8 * (8 + int.from_bytes(data[:8], "little")))
            return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]

        return damaged

    for less in (1, 2, 3, 100, 1000):
        yield Mutation(f"file: {less} bytes less", linears, damage=cut(less))
    yield Mutation("file: nothing left", linears, damage=lambda data: b"")
    yield Mutation("file: the header alone", linears, damage=lambda d: d[: 8 + int.from_bytes(d[:8], "little")])
    yield Mutation("file: bytes more", linears, damage=lambda data: data + b"\0\0")
    yield Mutation("file: a page", linears, damage=lambda data: b"<html>not found</html>")
    for _ in range(HEADER_FLIPS):
        yield Mutation("file: a bit of the header flipped", linears, damage=flip(float(rng.random())))


def outcome(mutation: Mutation, case: Case, folder: Path) -> str:
    """`served`, or the message that refuses it.

    Raises:
        AssertionError: it was served, but is not what the reference makes of the tensors.
    """
    _write(mutation, folder)
    expected = {name: _meaning(stored, case) for name, stored in mutation.linears.items()}
    try:
        index = read_index(folder)
        linears = {name: StoredLinear(case.shape, stored.format) for name, stored in mutation.linears.items()}
        settings = replace(
            read_settings(MODEL), num_layers=0, vocab_size=2, hidden_size=2, windows=(), tie_word_embeddings=True
        )
        check_tensors(index, linears, settings, folder)
        checkpoint = Checkpoint(index)
        for rows, columns in _cuts(case.shape):
            parts = [(Part(name, (rows,)), linear) for name, linear in linears.items()]
            weights = read_weight(checkpoint, "", parts, columns, torch.float32)
            wanted = np.concatenate([matrix[rows.start : rows.stop] for matrix in expected.values()])
            _check(weights, wanted[:, columns.start : columns.stop])
        _check_product(weights, wanted[:, columns.start : columns.stop])
        checkpoint.close()
    except (CheckpointError, ConfigError) as refusal:
        return str(refusal)
    return "served"


def _write(mutation: Mutation, folder: Path) -> None:
    for old in folder.glob("*"):
        old.unlink()
    whole = {f"{n}.{key}": t for n, stored in mutation.linears.items() for key, t in stored.tensors.items()}
    others = {"model.embed_tokens.weight": torch.ones(2, 2), "model.norm.weight": torch.ones(2)}
    path = folder / "a.safetensors"
    save_file({key: tensor.contiguous().clone() for key, tensor in (whole | others).items()}, path)
    if mutation.twice:
        save_file(
            {f"o.{name}": whole[f"o.{name}"].contiguous().clone() for name in mutation.twice}, folder / "b.safetensors"
        )
    if mutation.damage:
        path.write_bytes(mutation.damage(path.read_bytes()))
    if mutation.index:
        save_file({"unused": torch.ones(1)}, folder / "b.safetensors")
        weight_map = dict.fromkeys(others, "a.safetensors") | dict(mutation.index)
        (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


def _meaning(stored: Stored, case: Case) -> Matrix:
    """What the tensors mean under the format they are said to have; NaN, which nothing equals, if they mean nothing."""
    nothing = np.full(case.shape, np.nan)
    try:
        with np.errstate(all="ignore"):
            matrix = case.reference(stored.format, stored.tensors, case.shape)
    except (AssertionError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return nothing
    return matrix if matrix.shape == case.shape else nothing


def _cuts(shape: Shape) -> Iterator[tuple[range, range]]:
    yield range(shape.out), range(shape.in_)
    yield share(shape.out, 1, 3), share(shape.in_, 1, 3)


def _check(weights: Sequence[Tensor | QuantizedWeight], expected: Matrix) -> None:
    assert np.isfinite(expected).all(), "served, but the tensors mean nothing"
    np.testing.assert_allclose(matrix_of(weights), expected, rtol=1e-6, atol=1e-30)


def _check_product(weights: Sequence[Tensor | QuantizedWeight], expected: Matrix) -> None:
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, expected.shape[1])))
    kernels = ReferenceKernels()
    products = [
        kernels.linear(w.double())(x) if isinstance(w, Tensor) else kernels.quantized_linear(w, x.dtype, "o")(x)
        for w in weights
    ]
    bound = 1e-5 * np.abs(x.numpy()) @ np.abs(expected).T + 1e-30
    assert (np.abs(torch.cat(products, -1).numpy() - x.numpy() @ expected.T) <= bound).all()


@dataclass
class Verdict:
    """What became of a case's mutations."""

    counts: dict[str, int] = field(default_factory=lambda: {"served": 0, "refused": 0})
    failures: list[str] = field(default_factory=list)

    def judge(self, case: Case, seed: int, folder: Path) -> None:
        """Counts the mutations of a seed, and notes those that are served wrong or refused without the words."""
        for mutation in mutations(case, np.random.default_rng(seed)):
            try:
                message = outcome(mutation, case, folder)
            except AssertionError as wrong:
                self.failures.append(f"{mutation.label}: served wrong: {' '.join(str(wrong).split())[:200]}")
                continue
            self.counts["served" if message == "served" else "refused"] += 1
            missing = None if message == "served" else complaint(mutation, message, folder)
            if missing:
                self.failures.append(f"{mutation.label}: refused, but {missing}: {message}")


def complaint(mutation: Mutation, message: str, folder: Path) -> str | None:
    """What a refusal fails to say; None: it names the file or the linear, the tensor, and what was expected."""
    if not message.startswith(str(folder)) and not re.search(r"linear of|groups of", message):
        return "names no file"
    if mutation.names and not any(name in message for name in mutation.names):
        return f"names none of {mutation.names}"
    if not re.search(r"expected|remove one|fetch it again|says it is here|is not JSON|occurs twice", message):
        return "does not say what was expected"
    return None
