"""What a run will take of memory, disk and time, told before it begins; a run that would not fit is refused."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ConfigError
from ..kernels.offline import Machine
from . import awq
from .progress import anonymous_bytes, duration, gib
from .recording import Model, Recorded
from .rounding import CHUNK_VALUES, SHRINK, Grid
from .settings import Options
from .solve import JUDGED_ROWS as MOST_JUDGED
from .walk import STEP_TOKENS, Pass, drop_block, embed, load_block, resting_bytes

CGROUP = Path("/sys/fs/cgroup")
# Left to the rest of the machine, as a share of what is free.
RESERVE = 0.05
# Beside the weights, for files that are small.
SMALL_FILES = 64 << 20
FLOAT = 4
# Of a piece of a weight, while its grids are searched.
SEARCH_COPIES = 6
# All that is done with a weight besides products and trying ranges, as so many ranges tried: it is read, turned,
# rounded column by column, made a number again, judged, packed and stored.
RANGES_OF_THE_REST = 20
# Weights on which trying ranges is timed, and how long anything is timed.
TIMED_WEIGHTS, TIMED_S = 1 << 18, 0.2
# How much longer factors and triangular solutions take than products of as many operations.
FACTORS = 2.0
# What is done once.
ONCE_S = 2.0
# Of the libraries that multiply.
BUFFERS = 32 << 20


@dataclass(frozen=True)
class Need:
    """Bytes. activations: of the calibration text between two blocks, part of `host`."""

    host: int
    device: int  # 0 where the host computes
    disk: int
    activations: int
    # Of the steps of a pass that rest in a block: how many there are, and what one takes. Not part of the others.
    steps: int = 0
    step: int = 0

    def line(self, machine: Machine, seconds: float) -> str:
        """For people."""
        device = "" if machine.is_host else f"{gib(self.device)} of {machine.name}, "
        return f"estimate: {device}{gib(self.host)} of host memory, {gib(self.disk)} of disk, about {duration(seconds)}"


@dataclass(frozen=True)
class Fit:
    """How a run fits: what it needs then, whether activations are kept on the disk, and how many steps rest."""

    need: Need
    spill: bool
    resting: int


def estimate(model: Model, options: Options, num_sequences: int, num_held: int, length: int, stored: int) -> Need:
    """stored: bytes of the result's weights. num_held: sequences that judge the result."""
    machine, settings = model.machine, model.plan.settings
    size = machine.dtype.itemsize
    block = model.recorded_in(model.decoder.blocks[0])
    tokens = max(1, STEP_TOKENS // length) * length
    activations = num_sequences * length * settings.hidden_size * size
    # The host sums moments in float32, of copies where it computes in another type.
    copied = FLOAT * tokens if machine.is_host and size < FLOAT else 0
    step_bytes = _step_bytes(block, size, tokens, settings.hidden_size)
    measuring = step_bytes + copied * max(one.num_inputs for one in block)
    walk = activations + _block_bytes(block, options.scheme.method, size, measuring)
    vocabulary = settings.vocab_size * settings.hidden_size * size
    head = 0 if settings.tie_word_embeddings else 2 * vocabulary
    # Two models at once: their embeddings (one is there already), heads and activations, and a few rows of logits.
    proof = (
        2 * num_held * length * settings.hidden_size * size + vocabulary + head + 6 * 128 * settings.vocab_size * FLOAT
    )
    proof = max(proof, proof - head + _weights(block, size) + step_bytes)
    writing = 2 * max(_weights(block, FLOAT) // 8, vocabulary)
    base = anonymous_bytes() + BUFFERS
    disk = stored + SMALL_FILES
    steps, step = 0, tokens * resting_bytes(block, settings.hidden_size, settings.head_dim, size)
    if options.scheme.method == "gptq":
        steps = -(-num_sequences // max(1, STEP_TOKENS // length))
    if machine.is_host:
        return Need(base + max(walk, proof, writing), 0, disk, activations, steps, step)
    on_device = machine.used_bytes() + max(walk - activations, proof)
    return Need(base + max(activations, proof) + writing, on_device, disk, activations, steps, step)


def _weights(block: Sequence[Recorded], size: int) -> int:
    return size * sum(linear.shape.out * linear.shape.in_ for one in block for linear in one.stored)


def _step_bytes(block: Sequence[Recorded], size: int, tokens: int, hidden: int) -> int:
    """Activations inside a block while one step is computed."""
    widest = max(sum(linear.shape.out for linear in one.stored) for one in block)
    # The residual, its norm in float32 and in the type of the model; what the widest product makes, twice.
    return tokens * (hidden * (2 * size + 2 * FLOAT) + 2 * widest * size)


def _block_bytes(block: Sequence[Recorded], method: str, size: int, step: int) -> int:
    """step: while a step is measured."""
    weights = _weights(block, size)
    moments = [FLOAT * one.num_inputs**2 for one in block]
    if method == "gptq":
        return weights + max(
            # Beside the moments: four matrices of their size while they are factorized, one afterwards.
            m + max(step, 4 * m, m + _solve_bytes(one, method))
            for one, m in zip(block, moments, strict=True)
        )
    kept = 2 * _weights(block, FLOAT) if method == "awq" else 0
    worst = max(
        _solve_bytes(one, method) + (m if method == "awq" else 0) for one, m in zip(block, moments, strict=True)
    )
    return weights + sum(moments) + max(step, kept + worst)


def _solve_bytes(one: Recorded, method: str) -> int:
    """While the linears of one input are rounded: copies of the weight in float32, codes, pieces of the search."""
    sizes = [linear.shape.out * linear.shape.in_ for linear in one.stored]
    pieces = SEARCH_COPIES * FLOAT * min(CHUNK_VALUES, max(sizes))
    copies = {"gptq": 3, "awq": 5}.get(method)
    if copies is not None:
        return copies * FLOAT * sum(sizes) + (pieces if method == "gptq" else 0)
    return 4 * FLOAT * max(sizes)


def seconds(model: Model, options: Options, measured: Tensor, num_held: int, resting: int) -> float:
    """How long it will take: a block is tried now with what goes through it at once, and so are products.

    measured: int64 [sequences, length]. num_held: sequences that judge the result. resting: steps that rest in a block.
    """
    at_once = max(1, STEP_TOKENS // measured.shape[1])
    steps = -(-len(measured) // at_once)
    forward = _forward_s(model, measured[:at_once])
    # Once to measure and once on into the next block; gptq rests in between. Steps that may not rest go through the
    # first part of a block again for each of its products.
    passes = 1 + 0.6 * (1 - resting / steps) if options.scheme.method == "gptq" else 2
    proof = 2 * forward * -(-num_held // at_once)
    blocks = len(model.decoder.blocks)
    return blocks * (passes * steps * forward + proof + 1.2 * _rounding_s(model, options, measured.numel())) + ONCE_S


def _forward_s(model: Model, windows: Tensor) -> float:
    """Of the first block, for a step."""
    block = model.decoder.blocks[0]
    load_block(model, block)
    try:
        activations = embed(model, windows)
        begun = activations.values.clone()

        def forward() -> None:
            activations.values.copy_(begun)
            Pass(model, block, activations).forward()
            model.machine.wait()

        return _time(forward)
    finally:
        drop_block(model, block)
        model.machine.trim()


def _rounding_s(model: Model, options: Options, tokens: int) -> float:
    """Of a block, besides its passes: from the number of operations, and the speed of products."""
    machine, method = model.machine, options.scheme.method
    block = model.recorded_in(model.decoder.blocks[0])
    sizes = [(sum(linear.shape.out for linear in one.stored), one.num_inputs) for one in block]
    weights = sum(out * in_ for out, in_ in sizes)
    # Of the second moments, which are symmetric, little more than a half is computed.
    moments = 2.0 * tokens * 0.6 * sum(in_**2 for _, in_ in sizes)
    # The error of each layer, twice; and what the method does with the moments, in float32.
    judged = [min(out, MOST_JUDGED * len(one.stored)) for (out, _), one in zip(sizes, block, strict=True)]
    solving = sum(4.0 * rows * in_**2 for rows, (_, in_) in zip(judged, sizes, strict=True))
    tried = 0
    if method == "gptq":
        solving += sum(in_**2 * out + FACTORS * in_**3 for out, in_ in sizes)
    if method == "awq":
        tried = len(awq.CLIPS)
        scales = 2 * len(awq.RATIOS)
        solving += sum(scales * 2.0 * min(out, awq.JUDGED_ROWS) * in_**2 for out, in_ in sizes)
        size = options.scheme.group_size
        solving += sum(tried * 2.0 * out * in_ * (in_ if size == -1 else size) for out, in_ in sizes)
    elif options.scheme.in_gptq_layout and options.solver.mse:
        tried = len(SHRINK)
    each = weights * (tried + RANGES_OF_THE_REST) * _tried_s() if machine.is_host else 0.0
    plain = _speed(machine, torch.float32)
    # On the host the moments are summed by products of float32.
    return moments / (plain if machine.is_host else _speed(machine, machine.dtype)) + solving / plain + each


def _speed(machine: Machine, dtype: torch.dtype) -> float:
    """Operations per second of products, here and now."""
    x = torch.ones(1024, 1024, dtype=dtype, device=machine.device)

    def multiply() -> None:
        x @ x
        machine.wait()

    return 2 * 1024**3 / _time(multiply)


def _tried_s() -> float:
    """Seconds of the host for one weight in one range that is tried, here and now."""
    weight = torch.arange(TIMED_WEIGHTS, dtype=torch.float32).sin_().view(-1, 8, 128)
    grid = Grid(4, sym=True, search=True)
    return _time(lambda: grid.fit(weight)) / (TIMED_WEIGHTS * len(SHRINK))


def _time(work: Callable[[], object]) -> float:
    """The fewest seconds that it takes: what another process takes away in between is not the machine's."""
    begun, best = time.monotonic(), float("inf")
    while (now := time.monotonic()) < begun + TIMED_S or best == float("inf"):
        work()
        best = min(best, time.monotonic() - now)
    return best


def check_fits(need: Need, options: Options, machine: Machine, free_disk: int) -> Fit:
    """How to run so that it fits.

    Raises:
        ConfigError: it does not fit in any way; names what is there and what is needed.
    """
    limits = options.resources
    host, host_from = (limits.max_memory, "--max-memory") if limits.max_memory else (available_bytes(), "free")
    if need.disk > free_disk:
        raise ConfigError(
            f"OUTPUT_DIR {options.output_dir}: the result needs {gib(need.disk)}, {gib(free_disk)} is free on that "
            "disk; make room, or take another"
        )
    if not machine.is_host:
        device, device_from = machine.free_bytes() + machine.used_bytes(), "free"
        if limits.max_device_memory:
            device, device_from = limits.max_device_memory, "--max-device-memory"
        if need.device > device:
            raise ConfigError(
                f"this needs {gib(need.device)} of memory of {machine.name}, {gib(device)} is {device_from}; use "
                "--device cpu, or exclude the widest layers (--exclude down_proj)"
            )
        resting = _rest(need, device - need.device, is_told=limits.max_device_memory is not None)
        need = replace(need, device=need.device + resting * need.step)
    spill = need.host > host
    if spill:
        need = _spilled(need, host, host_from, free_disk)
    if machine.is_host:
        resting = _rest(need, host - need.host, is_told=limits.max_memory is not None)
        need = replace(need, host=need.host + resting * need.step)
    return Fit(need, spill, resting)


def _rest(need: Need, free: int, is_told: bool) -> int:
    """How many steps may rest; those that may not are computed several times.

    is_told: the limit is the user's; else a half of what is free is left to others.
    """
    free = int(free * (1 - RESERVE)) if is_told else free // 2
    return max(0, min(need.steps, free // max(1, need.step)))


def _spilled(need: Need, host: int, host_from: str, free_disk: int) -> Need:
    on_disk = need.host - need.activations
    if on_disk <= host and need.disk + need.activations <= free_disk:
        return replace(need, host=on_disk, disk=need.disk + need.activations)
    raise ConfigError(
        f"this needs {gib(need.host)} of host memory ({gib(on_disk)} with activations on the disk, which then needs "
        f"{gib(need.disk + need.activations)} free of {gib(free_disk)}); {gib(host)} is {host_from}; take fewer "
        "--num-samples, a shorter --sequence-length, or a machine with more memory"
    )


def available_bytes() -> int:
    """Memory that this process may still take, beside what it has: of the machine, or of its cgroup."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    if limit is not None and used is not None:
        free = min(free, limit - used)
    return anonymous_bytes() + int(free * (1 - RESERVE))


def _cgroup(name: str) -> int | None:
    try:
        text = (CGROUP / name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def usable_cores() -> int:
    """Cores that this process may run on, and that its cgroup gives it time for."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = (CGROUP / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return max(1, min(cores, int(quota) // int(period))) if quota.isdecimal() else cores
