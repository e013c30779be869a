"""The walk through a model: one block in memory, the calibration text's activations on the host."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor

from ..checkpoint.tensors import Checkpoint
from ..errors import CheckpointError
from ..kernels.offline import Lineage, Machine, add_gram, host_buffer, mirror_gram, sequences_batch
from .recording import EnoughError, Model, Recorded, owner, read_dense

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
    """All sequences on their way through one block.

    Their passes are coroutines that rest where a product is measured and go on when it is quantized, so that nothing is
    computed twice. What rests takes memory: only the first `resting` steps do, the others begin anew each time. The
    bits are the same.
    """

    def __init__(self, model: Model, block: Any, activations: Activations, resting: int = 0):
        self.model, self.block, self.activations = model, block, activations
        self._resting: list[greenlet | None] = [None] * min(resting, len(activations.steps()))

    @torch.no_grad()
    def forward(self) -> None:
        """Replaces the activations by what the block makes of them."""
        for number, sequences in enumerate(self.activations.steps()):
            resting = self._resting[number] if number < len(self._resting) else None
            y = self._compute(sequences) if resting is None else resting.switch()
            self.activations.put(sequences, y)
            if resting is not None:
                self._resting[number] = None

    @torch.no_grad()
    def measure_next(self, target: Recorded) -> Moments:
        """The second moments of the inputs of the product. Those before it are what they will stay."""
        moments = Moments(target, self.model.machine, with_means=False)
        main = getcurrent()

        def listen(x: Tensor) -> None:
            moments.add(x)
            if getcurrent() is main:
                raise EnoughError
            main.switch()

        target.on_input = listen
        try:
            for number, sequences in enumerate(self.activations.steps()):
                if number >= len(self._resting):
                    with contextlib.suppress(EnoughError):
                        self._compute(sequences)
                    continue
                if self._resting[number] is None:
                    self._resting[number] = greenlet(partial(self._compute, sequences))
                self._resting[number].switch()  # type: ignore[union-attr]
        finally:
            target.on_input = None
        moments.finish(self.activations.num_tokens)
        return moments

    @torch.no_grad()
    def measure_all(self, targets: Sequence[Recorded], with_means: bool) -> dict[Recorded, Moments]:
        """The moments of several products, none of which is quantized yet."""
        moments = {target: Moments(target, self.model.machine, with_means) for target in targets}

        def listener(target: Recorded) -> Callable[[Tensor], None]:
            def listen(x: Tensor) -> None:
                moments[target].add(x)
                if target is targets[-1]:
                    raise EnoughError

            return listen

        for target in targets:
            target.on_input = listener(target)
        try:
            for sequences in self.activations.steps():
                with contextlib.suppress(EnoughError):
                    self._compute(sequences)
        finally:
            for target in targets:
                target.on_input = None
        for one in moments.values():
            one.finish(self.activations.num_tokens)
        return moments

    def trace(self) -> list[Recorded]:
        """The products in the order in which they are called; notes where the input of each comes from."""
        called: list[Recorded] = []
        for recorded in self.model.recorded_in(self.block):
            recorded.on_call = called.append
        self.model.kernels.lineage = Lineage()
        try:
            with torch.no_grad():
                self._compute(range(1))
        finally:
            self.model.kernels.lineage = None
            for recorded in self.model.recorded_in(self.block):
                recorded.on_call = None
        return called

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

    def finish(self, num_tokens: int) -> None:
        """Sums become means, per token.

        Raises:
            CheckpointError: an input was not finite.
        """
        assert self.num_tokens == num_tokens, "every sequence passes every product once"
        mirror_gram(self.hessian)
        if not bool(torch.isfinite(self.hessian.diagonal()).all()):
            raise CheckpointError(
                f"{self.name}: its inputs are not finite on the calibration text; expected numbers; the weights of the "
                "layers before it are damaged, or overflow in this dtype"
            )
        self.hessian /= num_tokens
        if self.mean_abs is not None:
            self.mean_abs /= num_tokens


def resting_bytes(recorded: Sequence[Recorded], hidden: int, head_dim: int, size: int) -> int:
    """Memory of one token that rests inside a block: what the frames of the pass hold, of `size` bytes an element."""
    widest_in = max(one.num_inputs for one in recorded)
    made = sum(linear.shape.out for linear in recorded[0].stored)
    # Before the output of attention: the residual and its norm, q, k and v, turned or not, and what was attended to.
    # Before the second product of an MLP: the residual and its norm, and what the first one made.
    # With each batch its positions, and what turns queries and keys there, in float32.
    return size * (2 * hidden + max(2 * made + recorded[1].num_inputs, widest_in)) + 8 + 2 * 4 * head_dim


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
