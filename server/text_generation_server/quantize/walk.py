"""The walk through a model: one block in memory, the calibration text's activations on the host."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.tensors import Checkpoint
from ..errors import CheckpointError
from ..kernels.offline import Lineage, Machine, add_gram, host_buffer, sequences_batch
from .recording import EnoughError, Model, Recorded, found, owner, read_dense

# Tokens that are computed at once.
STEP_TOKENS = 2048


@dataclass
class Activations:
    """What goes into the next block, for every sequence. values: [sequences, length, hidden], on the host."""

    values: Tensor
    machine: Machine

    @property
    def length(self) -> int:
        return self.values.shape[1]

    @property
    def num_tokens(self) -> int:
        return self.values.shape[0] * self.values.shape[1]

    def steps(self) -> list[range]:
        """The sequences that are computed together."""
        num = max(1, STEP_TOKENS // self.length)
        return [range(i, min(i + num, len(self.values))) for i in range(0, len(self.values), num)]

    def part(self, sequences: range) -> Tensor:
        """[tokens, hidden], on the device, a copy."""
        part = self.values[sequences.start : sequences.stop].flatten(0, 1)
        return part.clone() if self.machine.is_host else part.to(self.machine.device, non_blocking=True)

    def put(self, sequences: range, y: Tensor) -> None:
        self.values[sequences.start : sequences.stop].flatten(0, 1).copy_(y)


def embed(model: Model, windows: Tensor, file: str | None = None) -> Activations:
    """windows: int64 [sequences, length]. file: where activations are kept, if not in memory."""
    hidden = model.plan.settings.hidden_size
    values = host_buffer((*windows.shape, hidden), model.machine.dtype, model.machine, file)
    activations = Activations(values, model.machine)
    for sequences in activations.steps():
        activations.put(sequences, model.decoder.embed(windows[sequences.start : sequences.stop].flatten()))
    return activations


class Pass:
    """Passes of all sequences through one block."""

    def __init__(self, model: Model, block: Any, activations: Activations, on_step: Callable[[], None] = lambda: None):
        self.model, self.block, self.activations, self.on_step = model, block, activations, on_step

    def forward(self) -> None:
        """Replaces the activations by what the block makes of them."""
        for sequences in self.activations.steps():
            self.activations.put(sequences, self._compute(sequences))
            self.on_step()

    def measure(self, targets: Sequence[Recorded], with_means: bool = False) -> dict[Recorded, Moments]:
        """The second moments of the inputs of these products. The pass ends at the last of them."""
        moments = {target: Moments(target, self.model.machine, with_means) for target in targets}
        waiting: set[Recorded] = set()

        def listener(target: Recorded) -> Callable[[Tensor], None]:
            def listen(x: Tensor) -> None:
                moments[target].add(x)
                waiting.discard(target)
                if not waiting:
                    raise EnoughError

            return listen

        for target in targets:
            target.on_input = listener(target)
        try:
            for sequences in self.activations.steps():
                waiting.update(targets)
                with contextlib.suppress(EnoughError):
                    self._compute(sequences)
                self.on_step()
        finally:
            for target in targets:
                target.on_input = None
        for found_moments in moments.values():
            found_moments.check(self.activations.num_tokens)
        return moments

    def trace(self) -> list[Recorded]:
        """The products in the order in which they are called; notes where the input of each comes from."""
        called: list[Recorded] = []
        for recorded in self.model.recorded_in(self.block):
            recorded.on_call = called.append
        self.model.kernels.lineage = Lineage()
        try:
            self._compute(range(1))
        finally:
            self.model.kernels.lineage = None
            for recorded in self.model.recorded_in(self.block):
                recorded.on_call = None
        return called

    @torch.no_grad()
    def _compute(self, sequences: range) -> Tensor:
        batch = sequences_batch(len(sequences), self.activations.length, self.model.kernels)
        y: Tensor = self.block(self.activations.part(sequences), batch)
        return y


class Moments:
    """Sums over the inputs of one product, in float32. `hessian`: x.T @ x; `mean_abs`: of each feature."""

    def __init__(self, recorded: Recorded, machine: Machine, with_means: bool):
        num = recorded.num_inputs
        self.name = recorded.names[0]
        self.hessian = torch.zeros(num, num, dtype=torch.float32, device=machine.device)
        self.mean_abs = torch.zeros(num, dtype=torch.float32, device=machine.device) if with_means else None
        self.num_tokens = 0

    def add(self, x: Tensor) -> None:
        add_gram(self.hessian, x)
        if self.mean_abs is not None:
            self.mean_abs += x.float().abs().sum(0)
        self.num_tokens += len(x)

    def check(self, num_tokens: int) -> None:
        """Sums become means, per token.

        Raises:
            CheckpointError: an input was not finite.
        """
        assert self.num_tokens == num_tokens, "every sequence passes every product once"
        if not bool(torch.isfinite(self.hessian.diagonal()).all()):
            raise CheckpointError(
                f"{self.name}: its inputs are not finite on the calibration text; expected numbers; the weights of the "
                "layers before it are damaged, or overflow in this dtype"
            )
        self.hessian /= num_tokens
        if self.mean_abs is not None:
            self.mean_abs /= num_tokens


def block_prefix(recorded: Sequence[Recorded]) -> str:
    """What the names of all tensors of a block begin with."""
    names = [name.split(".") for one in recorded for name in one.names]
    common: list[str] = []
    for words in zip(*names, strict=False):
        if len(set(words)) > 1:
            break
        common.append(words[0])
    return ".".join(common) + "."


def load_block(model: Model, block: Any) -> None:
    """Brings the weights of its linears to the device."""
    for recorded in model.recorded_in(block):
        recorded.read(model.checkpoint, model.machine)


def drop_block(model: Model, block: Any) -> None:
    """Forgets them."""
    for recorded in model.recorded_in(block):
        recorded.drop()


def load_finished(model: Model, block: Any, done: Checkpoint, formats: Callable[[str], Any]) -> None:
    """Brings a block as it was stored by an earlier run: its linears, and the norms and biases that may have changed.

    formats: how `done` stores the linear of a name.
    """
    machine = model.machine
    for recorded in model.recorded_in(block):
        weights, biases = [], []
        for name in recorded.names:
            weights.append(read_dense(done, name, formats(name)).to(machine.device, machine.dtype))
            if f"{name}.bias" in done:
                biases.append(done[f"{name}.bias"].read().to(machine.device, machine.dtype))
        recorded.weights = weights
        layer = owner(block, recorded)
        if layer.bias is not None and biases:
            layer.bias.copy_(torch.cat(biases))
    for name, tensor in model.tensors.items():
        if name in done and name.startswith(block_prefix(model.recorded_in(block))) and tensor.dim() == 1:
            tensor.copy_(done[name].read())


__all__ = ["Activations", "Moments", "Pass", "block_prefix", "embed", "found", "load_block", "load_finished"]
