"""Steps whose ids stay on the device: one copy of integers there, the model, the draw, one copy of results back.

What comes next waits for nothing: a token that the host does not know yet is taken from where it was drawn to. Steps of
rows with one token each are recorded as CUDA graphs, for some numbers of rows and lengths of contexts; rows that are
missing are computed with nothing in them and written nowhere. All sizes give a row the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...batch import Singles, StepBatch
from ..interface import Drawn, KVCache, StepRoom, StepWork
from .backend import Backend
from .sampling import RESULT_WORDS, WORDS, draw, drawn_of, words_of
from .streams import Fetched, Graph

# Contexts for which graphs are recorded, the next one so many times longer: blocks of threads without work leave at
# once, but even that takes time.
SHORTEST, LONGER = 1024, 4
# Rows of a recorded step whose logits the host can have.
MOST_KEPT = 8

Ints = NDArray[np.int64]


class Inputs(NamedTuple):
    """What goes to the device, each a run of int64: of a host array, or of its copy."""

    token_ids: Tensor  # [tokens]
    follows: Tensor  # [tokens]
    positions: Tensor  # [tokens]
    slots: Tensor  # [tokens]
    sample_tokens: Tensor  # [sampled]: which tokens' logits are wanted
    sample_rows: Tensor  # [sampled]: of the table
    requests: Tensor  # [sampled * WORDS]
    places: Tensor  # [new blocks]: in the table of blocks, flat
    blocks: Tensor  # [new blocks]
    kept: Tensor  # [kept]: which of the sampled rows


def split(flat: Tensor, tokens: int, sampled: int, new_blocks: int, kept: int) -> Inputs:
    """Views of a flat tensor."""
    return Inputs(*torch.split(flat, [tokens] * 4 + [sampled] * 2 + [WORDS * sampled] + [new_blocks] * 2 + [kept]))


class CudaLaunched:
    """Implements `Launched`."""

    def __init__(self, fetched: Fetched, rows: int, logits: Fetched | None, kept: int) -> None:
        self._fetched, self._rows, self._logits, self._kept = fetched, rows, logits, kept
        self.is_done = fetched.is_done

    def wait(self) -> Drawn:
        return drawn_of(self._fetched.wait()[: self._rows].numpy())

    def logits(self) -> Tensor:
        assert self._logits is not None
        return self._logits.wait()[: self._kept]


@dataclass(frozen=True)
class Recorded:
    """A graph with the memory that it reads and writes."""

    flat: Tensor
    results: Tensor
    logits: Tensor  # of rows that are kept, MOST_KEPT at most
    graph: Graph


class CudaSteps:
    """Implements `DeviceSteps`."""

    def __init__(
        self, backend: Backend, forward: Callable[[StepBatch], Tensor | None], cache: KVCache, room: StepRoom
    ) -> None:
        self._backend, self._forward, self._cache, self._room = backend, forward, cache, room

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=backend.device)

        # One row more than there are: for what is missing in a recorded step.
        self._tables, self._last = zeros(room.num_rows + 1, room.max_blocks), zeros(room.num_rows + 1)
        self._sizes, self._contexts = sorted(set(room.sizes)), contexts_of(room.max_positions)
        self._graphs: dict[tuple[int, int], Recorded] = {}
        self._kept: Tensor | None = None  # shared by all graphs

    def record(self) -> int:
        # The largest first: the others find room in what it leaves in the pool.
        for size in reversed(self._sizes):
            for longest in reversed(self._contexts):
                self._graphs[size, longest] = self._record(size, longest)
        return len(self._graphs)

    def measure(self) -> int:
        if not self._sizes:
            return 0
        free = [self._backend.streams.memory()[0]]
        kept = []
        for size in (self._sizes[-1], self._sizes[0]):
            kept.append(self._record(size, self._contexts[-1]))
            free.append(self._backend.streams.memory()[0])
        return max(0, free[0] - free[1] + (len(self._sizes) * len(self._contexts) - 1) * max(0, free[1] - free[2]))

    def launch(self, work: StepWork) -> CudaLaunched:
        recorded, fetch, kept = self._recorded_for(work), self._backend.streams.fetch, int(work.kept.sum())
        if recorded is None:
            results, logits = self._eager(work)
        else:
            self._backend.streams.upload(self._padded(work, len(recorded.results)), recorded.flat)
            recorded.graph.replay()
            results, logits = recorded.results, recorded.logits[:kept]
        return CudaLaunched(fetch(results), len(work.requests), fetch(logits) if kept else None, kept)

    def _recorded_for(self, work: StepWork) -> Recorded | None:
        rows, longest = len(work.rows), int(work.context_lengths.max())
        if len(work.token_ids) != rows or not work.samples.all() or work.kept.sum() > MOST_KEPT:
            return None
        size = next((size for size in self._sizes if rows <= size and len(work.new_blocks[0]) <= size), None)
        context = next((context for context in self._contexts if longest <= context), None)
        return None if size is None or context is None else self._graphs.get((size, context))

    def _places(self, work: StepWork) -> tuple[Ints, Ints]:
        rows, places, blocks = work.new_blocks
        return rows * self._room.max_blocks + places, blocks

    def _eager(self, work: StepWork) -> tuple[Tensor, Tensor]:
        sample_tokens = work.starts[1:][work.samples] - 1
        requests = words_of(work.requests).ravel()
        parts = (
            work.token_ids, work.follows, work.positions, work.slots, sample_tokens, work.rows[work.samples], requests,
            *self._places(work), np.flatnonzero(work.kept),
        )  # fmt: skip
        flat = torch.empty(sum(map(len, parts)), dtype=torch.int64, device=self._backend.device)
        self._backend.streams.upload(np.concatenate(parts), flat)
        inputs = split(flat, len(work.token_ids), len(sample_tokens), len(parts[-2]), len(parts[-1]))
        return self._compute(inputs, work, None)

    def _compute(self, inputs: Inputs, work: StepWork | None, singles: Singles | None) -> tuple[Tensor, Tensor]:
        """Results [sampled, RESULT_WORDS] and logits [kept, vocab] on the device.

        One of `work` and `singles` says how rows are made up.
        """
        drawn = self._last.index_select(0, inputs.follows.clamp_min(0))
        if len(inputs.places):
            self._tables.view(-1).index_copy_(0, inputs.places, inputs.blocks)
        logits = self._forward(StepBatch(
            token_ids=torch.where(inputs.follows < 0, inputs.token_ids, drawn),
            positions=inputs.positions,
            starts=() if work is None else work.starts.tolist(),
            context_lengths=() if work is None else work.context_lengths.tolist(),
            slots=inputs.slots,
            block_tables=self._tables,
            sample_rows=inputs.sample_tokens,
            kv_cache=self._cache,
            table_rows=None if work is None else work.rows,
            singles=singles,
        ))  # fmt: skip
        if not len(inputs.sample_rows):
            return inputs.slots.new_empty(0, RESULT_WORDS), inputs.slots.new_empty(0, 0)
        assert logits is not None
        results = draw(self._backend, logits, inputs.requests.view(-1, WORDS))
        self._last.index_copy_(0, inputs.sample_rows, results[:, 0])
        return results, logits.index_select(0, inputs.kept)

    def _record(self, size: int, longest: int) -> Recorded:
        flat = torch.zeros((8 + WORDS) * size + MOST_KEPT, dtype=torch.int64, device=self._backend.device)
        self._backend.streams.upload(self._padded(None, size), flat)
        results = torch.zeros(size, RESULT_WORDS, dtype=torch.int64, device=self._backend.device)
        inputs = split(flat, size, size, size, MOST_KEPT)
        singles = Singles(inputs.sample_rows, longest)

        # Kernels are loaded when they are first used, which cannot be recorded.
        _, kept = self._compute(inputs, None, singles)
        if self._kept is None:
            self._kept = torch.zeros_like(kept)
        logits = self._kept

        def work() -> None:
            found, kept = self._compute(inputs, None, singles)
            results.copy_(found)
            logits.copy_(kept)

        return Recorded(flat, results, logits, self._backend.streams.record(work))

    def _padded(self, work: StepWork | None, size: int) -> Ints:
        """Inputs of a recorded step. What is missing writes nothing but the row that is nobody's."""
        nobody = self._room.num_rows
        flat = np.zeros((8 + WORDS) * size + MOST_KEPT, np.int64)
        ids, follows, positions, slots, tokens, rows = flat[: 6 * size].reshape(6, size)
        requests = flat[6 * size : (6 + WORDS) * size].reshape(size, WORDS)
        places, blocks = flat[(6 + WORDS) * size : -MOST_KEPT].reshape(2, size)
        follows[:], slots[:], rows[:], places[:] = -1, -1, nobody, nobody * self._room.max_blocks
        tokens[:] = np.arange(size)
        if work is not None:
            count, (new_places, new_blocks) = len(work.rows), self._places(work)
            ids[:count], follows[:count], positions[:count] = work.token_ids, work.follows, work.positions
            slots[:count], rows[:count], requests[:count] = work.slots, work.rows, words_of(work.requests)
            places[: len(new_places)], blocks[: len(new_blocks)] = new_places, new_blocks
            kept = np.flatnonzero(work.kept)
            flat[len(flat) - MOST_KEPT :][: len(kept)] = kept
        return flat


def contexts_of(max_positions: int) -> list[int]:
    """Lengths of contexts for which graphs are recorded."""
    contexts = [min(SHORTEST, max_positions)]
    while contexts[-1] < max_positions:
        contexts.append(min(contexts[-1] * LONGER, max_positions))
    return contexts
