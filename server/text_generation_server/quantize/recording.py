"""Models whose linears can be looked at and replaced: the server's own model code, given a loader that reads no weight.

A model is built as for serving. Its linears are `Recorded`: their weights come and go block by block, their inputs can
be measured, and a pass can end at one of them. So every architecture that is served can be quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint.tensors import Checkpoint
from ..kernels.interface import Matmul
from ..kernels.offline import Linearly, Machine, Normed, OfflineKernels, in_order
from ..layers.linear import Linear, RowParallel
from ..loading import Alone, Loader, TensorParallel
from ..models.decoder import Decoder
from ..models.registry import build
from ..planning import ModelPlan
from ..quantization.format import Part, Source, StoredLinear
from ..quantization.read import read_weight

TWO_DIMENSIONS = 2


class EnoughError(Exception):
    """Ends a pass through a block at the linear that is measured."""


@dataclass(eq=False)
class Recorded:
    """The matrices of one product, which all see the same input: q, k and v, or gate and up, or one.

    on_input: given every input [tokens, in] before it is multiplied. origin: where the input came from, once traced.
    """

    names: tuple[str, ...]
    stored: tuple[StoredLinear, ...]
    kernels: OfflineKernels
    weights: list[Tensor] = field(default_factory=list)
    on_input: Callable[[Tensor], None] | None = None
    on_call: Callable[[Recorded], None] | None = None
    origin: object | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.on_call is not None:
            self.on_call(self)
        if self.kernels.lineage is not None:
            self.origin = self.kernels.lineage.source(x)
        if self.on_input is not None:
            self.on_input(x)
        made = [F.linear(x, weight) for weight in self.weights]
        y = made[0] if len(made) == 1 else torch.cat(made, -1)
        if self.kernels.lineage is not None:
            self.kernels.lineage.note(y, self)
        return y

    @property
    def num_inputs(self) -> int:
        return self.stored[0].shape.in_

    def rows(self) -> Iterator[tuple[int, range]]:
        """Which of the matrices, and its rows among all."""
        first = 0
        for i, linear in enumerate(self.stored):
            yield i, range(first, first + linear.shape.out)
            first += linear.shape.out

    def read(self, checkpoint: Checkpoint, machine: Machine) -> None:
        """Brings the weights from the checkpoint, dequantized, to the device, in the dtype that is computed in."""
        self.weights = [
            read_dense(checkpoint, name, linear).to(machine.device, machine.dtype)
            for name, linear in zip(self.names, self.stored, strict=True)
        ]

    def drop(self) -> None:
        self.weights = []


def read_dense(checkpoint: Source, name: str, linear: StoredLinear) -> Tensor:
    """A stored linear as float [out, in] on the host, dequantized as a server reads it."""
    parts = [(Part(name, (range(linear.shape.out),)), linear)]
    dtype = torch.float32
    weights = read_weight(checkpoint, "", parts, None, dtype)
    return torch.cat([w if isinstance(w, Tensor) else in_order(w) for w in weights])


@dataclass(frozen=True)
class RecordingLoader(Loader):
    """Makes every linear a `Recorded`, and remembers which tensor of the checkpoint is which."""

    recorded: list[Recorded] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def matmul(self, parts: Sequence[Part], columns: range | None = None) -> Matmul:
        names = tuple(self.prefix + part.name for part in parts)
        stored = tuple(self.linear_of(name) for name in names)
        assert isinstance(self.kernels, OfflineKernels)
        self.recorded.append(Recorded(names, stored, self.kernels))
        return self.recorded[-1]

    def tensor(self, name: str, rows: range | None = None) -> Tensor:
        lazy = self.checkpoint[self.prefix + name]
        tensor = lazy.read().to(self.dtype)
        # The embedding is only looked up: it stays on the host.
        if len(tensor.shape) < TWO_DIMENSIONS:
            tensor = tensor.to(self.kernels.device)
        self.tensors[self.prefix + name] = tensor
        return tensor


@dataclass(frozen=True)
class Model:
    """A model without the weights of its linears."""

    plan: ModelPlan
    decoder: Decoder
    checkpoint: Checkpoint
    kernels: OfflineKernels
    machine: Machine
    recorded: Sequence[Recorded]
    tensors: Mapping[str, Tensor]  # all others, by full name

    def close(self) -> None:
        self.checkpoint.close()

    def recorded_in(self, block: object) -> list[Recorded]:
        """The products of a block, in the order in which they were made."""
        return found(block, Recorded)

    def norm_name(self, weight: Tensor) -> str:
        return next(name for name, tensor in self.tensors.items() if tensor is weight)


def open_model(plan: ModelPlan, machine: Machine, num_positions: int) -> Model:
    """Reads everything but the linears. num_positions: of the longest sequence that will be computed."""
    kernels = OfflineKernels(machine.device)
    checkpoint = Checkpoint(plan.index)
    loader = RecordingLoader(
        checkpoint, plan.linears.__getitem__, TensorParallel(0, 1, Alone()), kernels, machine.dtype,
        plan.settings.hidden_size,
    )  # fmt: skip
    settings = replace(plan.settings, max_positions=min(plan.settings.max_positions, num_positions))
    decoder = build(loader, settings)
    return Model(plan, decoder, checkpoint, kernels, machine, loader.recorded, loader.tensors)


def found(root: object, kind: type) -> list[Any]:
    """Every object of this kind inside of another, in the order of attributes; each once."""
    seen: set[int] = set()
    results: list[Any] = []

    def visit(value: object) -> None:
        if id(value) in seen or isinstance(value, Tensor | OfflineKernels | StoredLinear):
            return
        seen.add(id(value))
        if isinstance(value, kind):
            results.append(value)
        if isinstance(value, list | tuple):
            for item in value:
                visit(item)
        elif type(value).__module__.startswith(__package__.rsplit(".", 1)[0]):
            for item in vars(value).values() if hasattr(value, "__dict__") else ():
                visit(item)

    visit(root)
    return results


def owner(block: object, matmul: Recorded) -> Linear | RowParallel:
    """The layer of the block that multiplies with it, and holds its bias."""
    layers: list[Linear | RowParallel] = found(block, Linear) + found(block, RowParallel)
    return next(layer for layer in layers if layer.matmul is matmul)


__all__ = ["EnoughError", "Linearly", "Model", "Normed", "Recorded", "found", "open_model", "owner", "read_dense"]
