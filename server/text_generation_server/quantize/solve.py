"""From a block with its weights, and the text that goes through it, to stored tensors and a row for each layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..kernels.offline import Linearly, Normed, to_host
from ..quantization.bitsandbytes import BLOCK
from ..quantization.format import StoredLinear, WeightFormat
from . import awq, gptq
from .layouts import awq_tensors, gptq_tensors, int8_tensors, nf4_tensors
from .recording import Model, Recorded, owner, read_dense
from .rounding import Codes, Grid, output_error, round_to_nearest
from .settings import Scheme, Solver
from .walk import Moments, Pass

# Of how many outputs of a layer the error is computed.
JUDGED_ROWS = 256
_STORED = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class LayerReport:
    """A row of the report. Errors: of the outputs on the calibration text, relative, squared; before: to nearest."""

    layer: str
    shape: tuple[int, int]
    bits: int
    group_size: int | None
    error_before: float
    error_after: float
    damping: float | None
    seconds: float
    tokens: int

    def row(self) -> dict[str, Any]:
        return {"kind": "layer", **asdict(self)}


@dataclass
class BlockResult:
    """What a finished block is stored as: tensors by full name, of those that are not what they were; and rows."""

    tensors: Tensors
    reports: list[LayerReport]
    in_order: bool = True


class BlockSolver:
    """Quantizes the linears of one block after another.

    formats: of every linear that is quantized. on_layer: told of each finished layer. say: told what is unusual.
    """

    def __init__(
        self,
        model: Model,
        scheme: Scheme,
        solver: Solver,
        formats: Mapping[str, WeightFormat],
        on_layer: Callable[[LayerReport], None],
        say: Callable[[str], None],
    ):
        self.model, self.scheme, self.solver, self.formats = model, scheme, solver, formats
        self.on_layer, self.say = on_layer, say

    def run(self, block: Any, sweep: Pass) -> BlockResult:
        """Leaves the block's linears as a reader of the result will have them; activations are not changed yet."""
        stages = sweep.trace()
        result = BlockResult({}, [])
        wanted = [stage for stage in stages if any(name in self.formats for name in stage.names)]
        if self.scheme.method == "gptq":
            # One after another, each measured behind those that are quantized already.
            for stage in wanted:
                self._solve_gptq(stage, sweep.measure_next(stage), result)
                self.model.machine.trim()
        elif wanted:
            moments = sweep.measure_all(wanted, with_means=self.scheme.method == "awq")
            self.model.machine.trim()
            if self.scheme.method == "awq":
                self._solve_awq(block, wanted, moments, result)
            else:
                for stage in wanted:
                    self._round_stage(stage, moments.pop(stage), result)
                    self.model.machine.trim()
        return result

    # GPTQ ---------------------------------------------------------------------------------------------------------

    def _solve_gptq(self, stage: Recorded, moments: Moments, result: BlockResult) -> None:
        begun = time.monotonic()
        try:
            factor = gptq.factorize(moments.hessian, self.solver.damping, self.solver.act_order)
        except gptq.NotPositiveDefiniteError as error:
            raise CheckpointError(
                f"{stage.names[0]}: the Hessian of its inputs is {error}; expected numbers that are not extreme; "
                "take other calibration text, or leave the layer as it is with --exclude"
            ) from error
        if factor.damping > self.solver.damping:
            self.say(
                f"{stage.names[0]}: the Hessian is not positive definite with damping {self.solver.damping:g}; "
                f"damping raised to {factor.damping:g}"
            )
        by_bits: dict[int, list[int]] = {}
        for i, name in enumerate(stage.names):
            if name in self.formats:
                by_bits.setdefault(self.scheme.bits_of(name) or 0, []).append(i)
        for bits, members in by_bits.items():
            stacked = self._stacked(stage, members)
            weights = torch.split(stacked, [stage.stored[i].shape.out for i in members])
            grid = Grid(bits, self.scheme.sym, self.solver.mse)
            codes = gptq.solve(stacked, factor, grid, self.scheme.group_size, self.solver.static_groups)
            self.model.machine.wait()
            seconds = (time.monotonic() - begun) / len(stage.names)
            first = 0
            for i, weight in zip(members, weights, strict=True):
                part = codes.rows(first, len(weight))
                first += len(weight)
                self._finish(stage, i, weight, part, moments, result, factor.damping, seconds)
            begun = time.monotonic()

    # Round to nearest, and bitsandbytes ---------------------------------------------------------------------------

    def _round_stage(self, stage: Recorded, moments: Moments, result: BlockResult) -> None:
        for i, name in enumerate(stage.names):
            if name not in self.formats:
                continue
            begun = time.monotonic()
            weight = self._original(stage, i)
            if self.scheme.method == "rtn":
                grid = Grid(self.scheme.bits_of(name) or 0, self.scheme.sym, self.solver.mse)
                codes = round_to_nearest(weight, grid, self.scheme.group_size)
                self._finish(stage, i, weight, codes, moments, result, None, time.monotonic() - begun)
            else:
                self._bitsandbytes(stage, i, weight, moments, result)

    def _bitsandbytes(self, stage: Recorded, i: int, weight: Tensor, moments: Moments, result: BlockResult) -> None:
        begun, name, machine = time.monotonic(), stage.names[i], self.model.machine
        stored = self.model.plan.index[f"{name}.weight"].dtype
        # As the library does, from the numbers in the type that they are stored in.
        plain = self.model.checkpoint[f"{name}.weight"].read()
        if self.scheme.method == "bitsandbytes":
            tensors = int8_tensors(plain)
        else:
            tensors = nf4_tensors(plain, self.scheme.method.removeprefix("bitsandbytes-"), _STORED[stored])
        full = {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}
        read = read_dense(InMemory(full), name, StoredLinear(stage.stored[i].shape, self.formats[name]))
        stage.weights[i] = read.to(machine.device, machine.dtype)
        result.tensors |= full
        self._report(stage, i, weight, read.to(machine.device), moments, result, None, time.monotonic() - begun)

    # AWQ ----------------------------------------------------------------------------------------------------------

    def _solve_awq(
        self, block: Any, stages: Sequence[Recorded], moments: Mapping[Recorded, Moments], result: BlockResult
    ) -> None:
        grid, size = Grid(4, self.scheme.sym), self.scheme.group_size
        weights = {(stage, i): self._original(stage, i) for stage in stages for i in range(len(stage.names))}
        originals = {key: weight.clone() for key, weight in weights.items()}
        scaling = _AwqScaling(self, block, weights, result)
        scales = {}
        begun = time.monotonic()
        for stage in stages:
            scales[stage] = scaling.apply(stage, moments[stage], grid, size)
        searched = (time.monotonic() - begun) / max(1, len(weights))
        for stage in stages:
            hessian = awq.scaled_hessian(moments[stage].hessian, scales[stage])
            for i, name in enumerate(stage.names):
                weight = weights[stage, i]
                if name not in self.formats:
                    continue
                begun = time.monotonic()
                codes = awq.solve(weight, hessian, grid, size)
                seconds = searched + time.monotonic() - begun
                self._store(stage, i, codes, result)
                # Back to the inputs as they were: what scaled weights mean to them.
                dense = codes.dequantize() * scaling.row_factors(stage, i)[:, None] / scales[stage]
                self._report(stage, i, originals[stage, i], dense, moments[stage], result, None, seconds)

    def _stacked(self, stage: Recorded, members: Sequence[int]) -> Tensor:
        """float32 [sum of out, in]: some of the matrices one under the other, of which no second copy stays."""
        num = sum(stage.stored[i].shape.out for i in members)
        stacked = torch.empty(num, stage.num_inputs, device=self.model.machine.device)
        first = 0
        for i in members:
            rows = stage.stored[i].shape.out
            stacked[first : first + rows] = self._original(stage, i)
            first += rows
        return stacked

    # Common -------------------------------------------------------------------------------------------------------

    def _original(self, stage: Recorded, i: int) -> Tensor:
        """float32 [out, in] on the device, as the checkpoint has it."""
        dense = read_dense(self.model.checkpoint, stage.names[i], stage.stored[i])
        if not bool(torch.isfinite(dense).all()):
            raise CheckpointError(f"{stage.names[i]}: its weight is not finite; expected numbers; fetch the file again")
        return dense.to(self.model.machine.device)

    def _finish(
        self, stage: Recorded, i: int, weight: Tensor, codes: Codes, moments: Moments, result: BlockResult,
        damping: float | None, seconds: float,
    ) -> None:  # fmt: skip
        self._store(stage, i, codes, result)
        self._report(stage, i, weight, codes.dequantize(), moments, result, damping, seconds)

    def _store(self, stage: Recorded, i: int, codes: Codes, result: BlockResult) -> None:
        name = stage.names[i]
        if not bool(torch.isfinite(codes.scales).all()):
            raise CheckpointError(f"{name}: a scale is not finite in float16; expected weights below 65504")
        stage.weights[i] = codes.dequantize().to(self.model.machine.dtype)
        if self.scheme.method == "awq":
            tensors = awq_tensors(codes)
        else:
            tensors = gptq_tensors(codes, self.scheme.checkpoint_format)
        result.tensors |= {f"{name}.{suffix}": to_host(tensor) for suffix, tensor in tensors.items()}
        result.in_order &= codes.in_order

    def _report(
        self, stage: Recorded, i: int, weight: Tensor, dense: Tensor, moments: Moments, result: BlockResult,
        damping: float | None, seconds: float,
    ) -> None:  # fmt: skip
        rows = torch.linspace(0, len(weight) - 1, min(JUDGED_ROWS, len(weight)), device=weight.device).long()
        weight, hessian = weight[rows], moments.hessian
        norm = max(output_error(weight, hessian), 1e-30)
        bits, size, grouped = self.scheme.bits_of(stage.names[i]) or 0, self.scheme.group_size, True
        if self.scheme.method.startswith("bitsandbytes"):
            grouped, size = False, (BLOCK if bits < 8 else -1)
        nearest = round_to_nearest(weight, Grid(bits, self.scheme.sym), size).dequantize()
        report = LayerReport(
            stage.names[i],
            (stage.stored[i].shape.out, stage.stored[i].shape.in_),
            bits,
            size if grouped else None,
            output_error(nearest - weight, hessian) / norm,
            output_error(dense[rows] - weight, hessian) / norm,
            damping,
            seconds,
            moments.num_tokens,
        )
        result.reports.append(report)
        self.on_layer(report)


class InMemory:
    """Tensors by name, as a checkpoint."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors = tensors

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> InMemoryTensor:
        return InMemoryTensor(name, self.tensors[name])


@dataclass(frozen=True)
class InMemoryTensor:
    """One of them."""

    where: str
    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def read(self, ranges: Mapping[int, range] | None = None) -> Tensor:
        part = self.tensor
        for dim, r in (ranges or {}).items():
            part = part.narrow(dim, r.start, len(r))
        return part.clone(memory_format=torch.contiguous_format)


class _AwqScaling:
    """Moves scales from the inputs of a product into whatever made them: a norm, or rows of a product."""

    def __init__(
        self, solver: BlockSolver, block: Any, weights: dict[tuple[Recorded, int], Tensor], result: BlockResult
    ):
        self.solver, self.block, self.weights, self.result = solver, block, weights, result
        self.model = solver.model
        self._factors: dict[tuple[Recorded, int], Tensor] = {}

    def row_factors(self, stage: Recorded, i: int) -> Tensor:
        """By what the rows were divided, later: [out]."""
        weight = self.weights[stage, i]
        return self._factors.get((stage, i), torch.ones(len(weight), device=weight.device))

    def apply(self, stage: Recorded, moments: Moments, grid: Grid, size: int) -> Tensor:
        """The scale [in] by which the inputs of `stage` are divided from now on; its weights are multiplied."""
        ones = torch.ones(stage.num_inputs, device=moments.hessian.device)
        origin = stage.origin
        if any(name not in self.solver.formats for name in stage.names):
            return ones  # what is left as it is stays exactly so
        if isinstance(origin, Normed) and self._only_reader(stage, origin):
            tie = None
        elif isinstance(origin, Linearly) and self._is_quantized(origin):
            tie = origin.features.to(ones.device)
        else:
            return ones
        stacked = torch.cat([self.weights[stage, i] for i in range(len(stage.names))])
        assert moments.mean_abs is not None
        scale = awq.search_scale(stacked, moments.hessian, moments.mean_abs, grid, size, tie).scale
        if isinstance(origin, Normed):
            scale = self._divide_norm(origin, scale)
        else:
            assert isinstance(origin, Linearly)
            self._divide_rows(origin, scale)
        for i in range(len(stage.names)):
            self.weights[stage, i] = self.weights[stage, i] * scale
        return scale

    def _only_reader(self, stage: Recorded, origin: Normed) -> bool:
        """Whether no other product reads what the norm makes."""
        readers = [one for one in self.model.recorded_in(self.block) if one.origin is origin]
        return readers == [stage]

    def _is_quantized(self, origin: Linearly) -> bool:
        maker = origin.maker
        assert isinstance(maker, Recorded)
        touched = set(origin.features.tolist())
        return all(
            (maker, i) in self.weights and maker.names[i] in self.solver.formats
            for i, rows in maker.rows()
            if touched & set(rows)
        )

    def _divide_norm(self, origin: Normed, scale: Tensor) -> Tensor:
        name = self.model.norm_name(origin.weight)
        stored = self.model.checkpoint[name].read()
        divided = (stored.float() / to_host(scale)).to(stored.dtype)
        self.result.tensors[name] = divided
        # The norm is rounded to the type that it is stored in; the weights make up for exactly what it became.
        real = torch.where(divided == 0, torch.ones_like(to_host(scale)), stored.float() / divided.float())
        origin.weight.copy_(divided)
        return real.to(scale.device)

    def _divide_rows(self, origin: Linearly, scale: Tensor) -> None:
        maker = origin.maker
        assert isinstance(maker, Recorded)
        num = sum(linear.shape.out for linear in maker.stored)
        divisor = torch.ones(num, device=scale.device)
        divisor[origin.features.to(scale.device)] = scale  # tied features have one scale
        layer = owner(self.block, maker)
        for i, rows in maker.rows():
            part = divisor[rows.start : rows.stop]
            if bool((part == 1).all()):
                continue
            self._factors[maker, i] = part
            self.weights[maker, i] = self.weights[maker, i] / part[:, None]
            name = f"{maker.names[i]}.bias"
            if layer.bias is not None and name in self.model.checkpoint:
                stored = self.model.checkpoint[name].read()
                divided = (stored.float() / to_host(part)).to(stored.dtype)
                self.result.tensors[name] = divided
                layer.bias[rows.start : rows.stop].copy_(divided)
