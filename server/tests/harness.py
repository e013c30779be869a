"""Drives a model without a router: logs of ids, paged blocks, any chunking."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from text_generation_server.batch import StepBatch
from text_generation_server.kernels.interface import Exchange, Kernels
from text_generation_server.loading import Alone, Collectives, TensorParallel
from text_generation_server.models.decoder import Decoder
from text_generation_server.models.registry import load_model
from text_generation_server.planning import plan_model
from torch import Tensor

MODELS = Path(__file__).parents[2] / "models"
LLAMA, QWEN2 = MODELS / "docs-llama-7m", MODELS / "docs-qwen2-4m"


class ThreadGroup:
    """Collectives between threads of one process; sums in rank order."""

    def __init__(self, size: int):
        self.size = size
        self._barrier = threading.Barrier(size, timeout=60)
        self._box: list[Tensor] = [torch.empty(0)] * size

    def exchange(self, rank: int, x: Tensor) -> list[Tensor]:
        self._box[rank] = x
        self._barrier.wait()
        out = list(self._box)
        self._barrier.wait()
        return out

    def abort(self) -> None:
        self._barrier.abort()


@dataclass
class ThreadCollectives:
    group: ThreadGroup
    rank: int

    def all_reduce(self, x: Tensor) -> Tensor:
        first, *others = self.group.exchange(self.rank, x)
        total = first.clone()
        for other in others:
            total += other
        self.group.exchange(self.rank, x)
        return total

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        return torch.cat(self.group.exchange(self.rank, x), dim)

    def exchange(self) -> Exchange | None:
        return None

    def gather_to_first(self, x: Tensor) -> Tensor | None:
        y = self.all_gather(x)
        return y if self.rank == 0 else None


def run_ranks(size: int, work: Callable[[TensorParallel], object]) -> list[object]:
    """Calls `work` for every rank, each in a thread; returns what they return, or raises what the first raised."""
    if size == 1:
        return [work(TensorParallel(0, 1, Alone()))]
    group = ThreadGroup(size)
    results: list[object] = [None] * size
    errors: list[BaseException] = []

    def go(rank: int) -> None:
        collectives: Collectives = ThreadCollectives(group, rank)
        try:
            results[rank] = work(TensorParallel(rank, size, collectives))
        except BaseException as error:
            errors.append(error)
            group.abort()

    threads = [threading.Thread(target=go, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return results


def load(path: Path, tp: TensorParallel, kernels: Kernels, dtype: str = "float32") -> Decoder:
    return load_model(plan_model(path, world_size=tp.size, dtype=dtype), tp, kernels)


@dataclass
class Log:
    """A log of ids and how far it is computed."""

    ids: list[int]
    blocks: list[int]
    computed: int = 0
    logits: dict[int, Tensor] = field(default_factory=dict)  # by length of the log


class Shard:
    """One rank's model and cache."""

    def __init__(self, decoder: Decoder, num_blocks: int = 256, block_size: int = 16):
        self.decoder, self.size = decoder, block_size
        self.cache = decoder.kernels.new_kv_cache(decoder.cache_spec, num_blocks, block_size)

    def step(
        self, work: Sequence[tuple[Log, int]], sample_all: bool = False, on_layer: Callable[[], None] = lambda: None
    ) -> None:
        """Computes the next positions of each sequence, so many; keeps the logits of rows at the end of their log."""
        starts, ids, positions, slots, sampled, owners = [0], [], [], [], [], []
        for sequence, count in work:
            for position in range(sequence.computed, sequence.computed + count):
                ids.append(sequence.ids[position])
                positions.append(position)
                slots.append(sequence.blocks[position // self.size] * self.size + position % self.size)
                if sample_all or position + 1 == len(sequence.ids):
                    sampled.append(len(ids) - 1)
                    owners.append((sequence, position + 1))
            starts.append(len(ids))
            sequence.computed += count
        width = max(-(-s.computed // self.size) for s, _ in work)
        tables = [(s.blocks[: -(-s.computed // self.size)] + [0] * width)[:width] for s, _ in work]
        batch = StepBatch(
            token_ids=torch.tensor(ids),
            positions=torch.tensor(positions),
            starts=starts,
            context_lengths=[s.computed for s, _ in work],
            slots=torch.tensor(slots),
            block_tables=torch.tensor(tables),
            sample_rows=torch.tensor(sampled, dtype=torch.int64),
            kv_cache=self.cache,
        )
        logits = self.decoder.forward(batch, on_layer)
        if logits is not None:
            for (sequence, length), row in zip(owners, logits, strict=True):
                sequence.logits[length] = row.clone()
