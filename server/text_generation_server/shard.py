"""The state of one rank between steps: a loaded model, and in each epoch a group, a cache and a table.

Everything here runs on the step thread. Imports torch.
"""

import gc
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from loguru import logger
from torch import Tensor

from .ahead import RunnerAhead
from .batch import StepBatch
from .config import ServeConfig
from .distributed import Group
from .errors import ConfigError
from .faults import Faults
from .health import Health, Phase
from .kernels.interface import DeviceSteps, DrawsIds, HoldsMemory, KVCache, RunsAhead, StepRoom
from .kernels.select import select_kernels
from .loading import TensorParallel
from .meeting import meet, part
from .models.registry import load_model
from .planning import ModelPlan
from .runner import LogitsDigests, Plan, Result, Runner, Scoring, Work, make_batch
from .sampling.grammar import Grammars
from .sampling.processors import Watermark
from .sequences import SequenceTable

# The probe of the warm-up runs at most so many tokens; what it needs is scaled to the real size of a step.
MAX_PROBE_TOKENS = 512
# Ranks that have met are all there: connecting them takes no time.
FORM_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Limits:
    """What an epoch may be asked for at most. `block_size` and the last two in tokens."""

    block_size: int
    max_running: int
    max_step_tokens: int
    max_total_tokens: int


class Shard:
    """One rank."""

    def __init__(self, config: ServeConfig, plan: ModelPlan, health: Health) -> None:
        self.config, self.plan, self.health = config, plan, health
        self.faults = Faults(config.fault_file, config.rank)
        self.faults.look()
        self.faults.reach("load")
        torch.set_num_threads(config.num_threads)
        torch.set_grad_enabled(False)
        self.group = Group(config.rank, config.world_size, self.faults)
        kernels = select_kernels(config.device, config.instruction_set, config.kernel_cache, config.rank)
        if isinstance(kernels, HoldsMemory):
            self.check_fits(kernels.available_bytes(config.memory_bytes))
        logger.info("quantization: {}", self.plan.describe_quantization())
        health.total = self.plan.weight_bytes_per_rank
        health.enter(Phase.LOADING, "loading weights")
        report = Reporter(health)
        tp = TensorParallel(config.rank, config.world_size, self.group)
        self.model = load_model(self.plan, tp, kernels, report.on_read)
        self.kernels = kernels
        self.memory: HoldsMemory = kernels if isinstance(kernels, HoldsMemory) else HostMemory()
        settings = self.plan.settings
        self.grammars = Grammars(
            plan.model_dir / "tokenizer.json", settings.vocab_size, plan.eos_token_ids, max(1, config.num_threads // 2)
        )
        if config.rank == 0:
            # Now, when nobody waits for tokens: it holds Python's lock.
            self.grammars.warm_up()
        self.cache: KVCache | None = None
        self.runner: Runner | None = None
        self.epoch: int | None = None
        self.digests = None
        if config.logits_digest_dir is not None and config.rank == 0:
            self.digests = LogitsDigests(config.logits_digest_dir, os.getpid())
        health.done = health.total
        logger.info(
            "loaded {} ({}, {} parameters, {:.1f} MB on this rank) with {} threads",
            self.plan.settings.architecture, self.plan.dtype, self.plan.num_parameters,
            self.plan.weight_bytes_per_rank / 1e6, config.num_threads,
        )  # fmt: skip

    def check_fits(self, available: int) -> None:
        """Raises ConfigError if the weights do not fit on the device, before one is read."""
        if (weights := self.plan.weight_bytes_per_rank) > available:
            raise ConfigError(
                f"the weights of rank {self.config.rank} take {weights / 1e6:.1f} MB, and {available / 1e6:.1f} MB are "
                "free on its device within the budget; end what else uses it, or use more shards or a smaller model"
            )

    def leave(self) -> None:
        """Drops the epoch: sequences, cache and group. Peers that wait for this rank get an error."""
        self.runner = self.cache = self.epoch = None
        self.health.num_rows = 0
        self.group.close()

    def join(self, epoch: int, rendezvous: str, timeout_s: float, is_wanted: Callable[[], bool]) -> bool:
        """Forms the group of an epoch. Returns False if it was no longer wanted while other ranks were missing."""
        self.leave()
        self.health.enter(Phase.JOINING, f"joining epoch {epoch}")
        self.group.waits = True
        try:
            if not meet(rendezvous, self.config.rank, self.config.world_size, timeout_s, is_wanted):
                self.health.enter(Phase.LOADED, f"gave up joining epoch {epoch}, waiting for the next")
                return False
            self.group.form(rendezvous, FORM_TIMEOUT_S)
        finally:
            self.group.waits = False
        part(rendezvous, self.config.rank)
        self.epoch = epoch
        return True

    def forward(self, batch: StepBatch) -> Tensor | None:
        """The model, counting layers for the watchdog."""
        return self.model.forward(batch, self._on_layer)

    def _on_layer(self) -> None:
        self.health.progress += 1

    def measure_blocks(self, limits: Limits) -> int:
        """How many blocks fit beside the weights and what a step needs, but no more than the limits can use."""
        self.health.enter(Phase.WARMING_UP, "measuring how much fits")
        num_tokens = min(limits.max_step_tokens, MAX_PROBE_TOKENS, limits.max_total_tokens)
        before = self.memory.peak_bytes(forget=True)
        probed = self.probe(num_tokens, limits.block_size)
        peak = self.memory.peak_bytes() - before - probed
        activations = max(0, peak) * max(1, -(-limits.max_step_tokens // num_tokens))
        available = self.memory.available_bytes(self.config.memory_bytes)
        free = available - activations - self.recorded_bytes(limits)
        block_bytes = self.model.cache_spec.bytes_per_token * limits.block_size
        useful = limits.max_running * -(-limits.max_total_tokens // limits.block_size)
        blocks = max(0, min(free // block_bytes, useful))
        logger.info(
            "memory: {:.1f} MB for this rank, {:.1f} MB left, {:.1f} MB for a step, {} blocks of {} tokens ({:.1f} MB)",
            self.config.memory_bytes / 1e6, available / 1e6, (available - free) / 1e6, blocks, limits.block_size,
            blocks * block_bytes / 1e6,
        )  # fmt: skip
        return blocks

    def recorded_bytes(self, limits: Limits) -> int:
        """What the device needs for steps that are recorded."""
        cache = self.kernels.new_kv_cache(self.model.cache_spec, 1, limits.block_size)
        steps = self.new_steps(cache, limits)
        return 0 if steps is None else steps.measure()

    def probe(self, num_tokens: int, block_size: int) -> int:
        """Computes one prompt of that length, and forgets it. Returns the bytes that its cache took."""
        num_blocks = -(-num_tokens // block_size)
        cache = self.kernels.new_kv_cache(self.model.cache_spec, num_blocks, block_size)
        table = SequenceTable(1, num_tokens + 1, block_size, self.plan.settings.vocab_size)
        table.admit(0, 0, 1, [0] * num_tokens, num_tokens, 0)
        table.add_blocks(0, range(num_blocks))
        self.forward(make_batch(table, [Work(0, 1, num_tokens, 1, ())], cache, Scoring(table)))
        return num_tokens * self.model.cache_spec.bytes_per_token

    def allocate(self, num_blocks: int, limits: Limits) -> None:
        """The cache and the table of this epoch. Raises ConfigError if they do not fit."""
        self.runner = self.cache = None
        block_bytes = self.model.cache_spec.bytes_per_token * limits.block_size
        if num_blocks * block_bytes + self.plan.weight_bytes_per_rank > self.config.memory_bytes:
            raise ConfigError(
                f"{num_blocks} blocks of {block_bytes} bytes and {self.plan.weight_bytes_per_rank} bytes of weights do "
                f"not fit in the {self.config.memory_bytes} bytes of rank {self.config.rank}; lower the limits"
            )
        self.health.enter(Phase.WARMING_UP, "allocating the cache")
        self.cache = self.kernels.new_kv_cache(self.model.cache_spec, num_blocks, limits.block_size)
        # Releases take effect after a step's work, so a plan may admit while it releases as many.
        num_rows, vocab_size = 2 * limits.max_running, self.plan.settings.vocab_size
        table = SequenceTable(num_rows, limits.max_total_tokens, limits.block_size, vocab_size)
        parts = (
            self.forward,
            self.group,
            self.cache,
            table,
            self.plan.eos_token_ids,
            self.faults,
            self.digests,
            self.grammars,
            Watermark(self.config.watermark_gamma, self.config.watermark_delta),
            self.kernels if isinstance(self.kernels, DrawsIds) else None,
        )
        if (steps := self.new_steps(self.cache, limits)) is None:
            self.runner = Runner(*parts)
        else:
            self.health.enter(Phase.WARMING_UP, "recording steps")
            logger.info("recorded steps of {} sizes", steps.record())
            self.runner = RunnerAhead(*parts, steps=steps)
        # What is there now stays: looking through all of it takes as long as a step, which streams would notice.
        gc.unfreeze()
        gc.collect()
        gc.freeze()
        self.health.enter(Phase.SERVING, "serving")

    def lost(self) -> str | None:
        """Why nothing more can be computed in this process; None: the next epoch can begin."""
        return self.memory.lost()

    def new_steps(self, cache: KVCache, limits: Limits) -> DeviceSteps | None:
        """Steps that may begin ahead, where the device has such and no other rank has to agree."""
        if self.group.size > 1 or not isinstance(self.kernels, RunsAhead):
            return None
        max_blocks = -(-limits.max_total_tokens // limits.block_size)
        sizes = [size for size in self.config.recorded_sizes if size <= limits.max_running]
        room = StepRoom(2 * limits.max_running, max_blocks, limits.max_total_tokens, sizes)
        return self.kernels.new_steps(self.forward, cache, room)

    def step(self, plan: Plan) -> list[Result]:
        """Begins a plan of this epoch. Returns the results that are there, in order; most often the plan's own."""
        assert self.runner is not None
        ahead = self.runner if isinstance(self.runner, RunnerAhead) else None
        results = [self.runner.step(plan)] if ahead is None else ahead.begin(plan)
        for result in results:
            self._note(result)
        return results

    def _note(self, result: Result) -> None:
        assert self.runner is not None
        self.health.num_rows = self.runner.table.num_held
        self.health.step = result.step

    @property
    def num_open(self) -> int:
        """Steps that have begun and are not answered."""
        return len(self.runner.open) if isinstance(self.runner, RunnerAhead) else 0

    def finish_if_done(self) -> Result | None:
        """The result of the oldest open step, if it need not be waited for."""
        assert isinstance(self.runner, RunnerAhead)
        if not self.runner.is_done():
            return None
        result = self.runner.finish()
        self._note(result)
        # What was recorded counts no layers.
        self.health.progress += 1
        return result


class Reporter:
    """Counts what was loaded, and logs each tenth of it."""

    def __init__(self, health: Health) -> None:
        self._health, self._next = health, 0.1

    def on_read(self, num_bytes: int) -> None:
        health = self._health
        health.done += num_bytes
        health.progress += 1
        if health.total and health.done >= self._next * health.total:
            logger.debug("loading: {:.0f} % of {:.1f} MB", 100 * health.done / health.total, health.total / 1e6)
            self._next += 0.1


class HostMemory:
    """Implements `HoldsMemory` for what computes in this process's own memory."""

    def available_bytes(self, budget_bytes: int) -> int:
        return budget_bytes - rss_bytes()

    def peak_bytes(self, forget: bool = False) -> int:
        return forget_peak() if forget else peak_rss_bytes()

    def lost(self) -> str | None:
        return None


def rss_bytes() -> int:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_rss_bytes() -> int:
    """The most that was resident since `forget_peak`, or since the process began."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))


def forget_peak() -> int:
    """Begins the peak anew, which loading has raised; returns where it begins."""
    # Not every container lets a process do this: then only what goes beyond the old peak is seen.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_rss_bytes()
