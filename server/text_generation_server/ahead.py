"""Steps that begin before the ids of the one before are known here, where a device draws and keeps them.

A step of rows whose ids the device can draw is put into its stream and answered later, in order. A step with a row that
needs the host waits for all before it, and is waited for itself: of rows with a grammar or penalties the host is given
the logits, and draws; with scores of prompts it is computed as anywhere else.
For one rank: several would have to agree on when each of them learns an id.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .kernels.interface import DeviceSteps, Launched, StepWork
from .runner import NUMERICAL, Admission, Plan, Result, Runner, Work, advance, lay_out
from .sampling.sampler import Draw, requests_of
from .sequences import ProtocolError, RowFault

# Begun and not answered: as many as the router sends ahead at most.
MOST_OPEN = 4


@dataclass
class Open:
    """A step that has begun."""

    plan: Plan
    launched: Launched | None  # None: there was nothing to compute
    sampling: NDArray[np.int64]  # rows that draw
    kept: NDArray[np.bool_]  # which of them the host draws for
    lengths: NDArray[np.int64]  # of their logs before
    computed: list[int]  # of the rows of the plan
    spoil: bool  # a fault on demand: its first row is to have no finite logits
    started: int
    begun: int


class RunnerAhead(Runner):
    """A runner that may have some steps open."""

    def __init__(self, *arguments: Any, steps: DeviceSteps, **others: Any) -> None:
        super().__init__(*arguments, **others)
        self.steps = steps
        self.open: deque[Open] = deque()
        num_rows = len(self.table.length)
        # The place of the last id in a row's log, if it is not known here; and how many of its blocks the device knows.
        self.special: set[int] = set()  # rows that may need the host in some step
        self.stopped: dict[int, int] = {}  # how far a row was computed when it was found to have a fault
        self.unknown, self.known_blocks = np.full(num_rows, -1, np.int64), np.zeros(num_rows, np.int64)

    def begin(self, plan: Plan) -> list[Result]:
        """Begins a step. Returns the results that are there, in order.

        Raises:
            ProtocolError: the plan does not fit what this rank holds.
        """
        waits = bool(plan.admit) or any(self.needs_host(work) for work in plan.work if work.row in self.special)
        results = self.finish_but(0 if waits else MOST_OPEN - 1)
        started = time.monotonic_ns()
        alive = self.take(plan)
        if any(self.needs_scores(work.row) for work in alive if work.row in self.special):
            return [*results, self.compute(plan, alive, started)]
        self.begin_masks([a.row for a in plan.admit])
        step = self.launch(plan, alive, started)
        self.open.append(step)
        return [*results, self.finish()] if step.kept.any() else results

    def is_done(self) -> bool:
        """Whether `finish` would not wait."""
        return self.open[0].launched is None or self.open[0].launched.is_done()

    def finish(self) -> Result:
        """Waits for the oldest open step, and takes note of its ids."""
        step = self.open.popleft()
        drawn = None
        if step.launched is not None:
            found = step.launched.wait()
            is_finite = found.is_finite.copy()
            if step.spoil:
                is_finite[:1] = False
            drawn = Draw(found.ids, found.logprobs, [([], [])] * len(found.ids), is_finite)
            self.note(step, drawn)
            if step.kept.any():
                self.draw_kept(step, drawn)
        waited = time.monotonic_ns()
        computed = step.computed
        if self.stopped:
            computed = [self.stopped.get(w.row, count) for w, count in zip(step.plan.work, computed, strict=True)]
        results = self.results(step.plan.work, computed, step.sampling.tolist(), drawn, {})
        return self.end(step.plan, results, step.started, step.begun, waited)

    def finish_but(self, count: int) -> list[Result]:
        """Results of all open steps but the newest `count`."""
        results = []
        while len(self.open) > count:
            results.append(self.finish())
        return results

    def admit(self, a: Admission) -> None:
        super().admit(a)
        self.unknown[a.row], self.known_blocks[a.row] = -1, 0
        self.stopped.pop(a.row, None)
        # A row that the host need not draw for at first is none later on.
        if self.is_kept(a.row) or a.prompt_logprobs_from is not None or self.digests is not None:
            self.special.add(a.row)
        else:
            self.special.discard(a.row)

    def needs_scores(self, row: int) -> bool:
        """Whether the host must see the logits of more than the ids that the row draws."""
        state, table = self.table.states[row], self.table
        return self.digests is not None or (
            state.prompt_logprobs_from is not None and bool(table.computed[row] < table.num_prompt[row])
        )

    def needs_host(self, work: Work) -> bool:
        """Whether what the row asks for can only be done with its ids and its logits at hand."""
        row, table = work.row, self.table
        state = table.states.get(row)
        if state is None or row in table.faults:
            return False
        return self.needs_scores(row) or (work.max_ids > 0 and self.is_kept(row))

    def is_kept(self, row: int) -> bool:
        """Whether the host draws the row's next id."""
        state = self.table.states[row]
        p = state.params
        return state.constraint is not None or p.top_n > 0 or p.typical_p < 1.0 or self.is_processed(row, state)

    def draw_kept(self, step: Open, drawn: Draw) -> None:
        """Draws the ids that the device does not, into `drawn`."""
        assert step.launched is not None
        places = np.flatnonzero(step.kept)
        ours = self.sample(step.sampling[places].tolist(), step.launched.logits())
        assert ours is not None
        drawn.ids[places], drawn.logprobs[places] = ours.ids, ours.logprobs
        drawn.is_finite[places] = ours.is_finite
        for at, top in zip(places.tolist(), ours.top, strict=True):
            drawn.top[at] = top

    def launch(self, plan: Plan, alive: Sequence[Work], started: int) -> Open:
        """Puts a step into the device's stream."""
        table, launched, lengths = self.table, None, np.empty(0, np.int64)
        sampling = np.array([work.row for work in alive if work.max_ids > 0], np.int64)
        kept = np.array([row in self.special and self.is_kept(row) for row in sampling.tolist()], np.bool_)
        spoil = len(sampling) > 0 and not kept.any() and self.faults.reach("sample")
        if alive:
            lengths = table.length[sampling]
            if (lengths >= table.tokens.shape[1]).any():
                full = sampling[lengths >= table.tokens.shape[1]]
                raise ProtocolError(f"rows {full.tolist()} are at their last position")
            launched = self.steps.launch(self.work(alive, sampling, kept))
            advance(table, alive)
            table.length[sampling[~kept]] += 1
            self.unknown[sampling[~kept]] = lengths[~kept]
        computed = table.computed[[work.row for work in plan.work]].tolist()
        return Open(plan, launched, sampling, kept, lengths, computed, spoil, started, time.monotonic_ns())

    def work(self, alive: Sequence[Work], sampling: NDArray[np.int64], kept: NDArray[np.bool_]) -> StepWork:
        """The step as the device is told of it. sampling: rows that draw; kept: which of them do so here."""
        table, layout = self.table, lay_out(self.table, alive)
        row_of = layout.rows[layout.owner]
        blocks = table.block_table[row_of, layout.positions // table.block_size].astype(np.int64)
        grown = layout.rows[self.known_blocks[layout.rows] < table.num_blocks[layout.rows]].tolist()
        new = [(row, at) for row in grown for at in range(self.known_blocks[row], table.num_blocks[row])]
        rows, places = np.array(new, np.int64).reshape(-1, 2).T
        self.known_blocks[layout.rows] = table.num_blocks[layout.rows]
        return StepWork(
            token_ids=table.tokens[row_of, layout.positions].astype(np.int64),
            follows=np.where(layout.positions == self.unknown[row_of], row_of, -1),
            positions=layout.positions,
            slots=blocks * table.block_size + layout.positions % table.block_size,
            starts=layout.starts,
            context_lengths=layout.ends,
            rows=layout.rows,
            samples=layout.samples,
            requests=requests_of([table.states[row].params for row in sampling.tolist()], table.length[sampling]),
            kept=kept,
            new_blocks=(rows, places, table.block_table[rows, places].astype(np.int64)),
        )

    def note(self, step: Open, drawn: Draw) -> None:
        """Writes the device's ids into the logs, as far as their rows have no fault."""
        table = self.table
        ids, is_finite_of = drawn.ids.tolist(), drawn.is_finite.tolist()
        for i in np.flatnonzero(~step.kept).tolist():
            row, at, token_id, is_finite = int(step.sampling[i]), int(step.lengths[i]), ids[i], is_finite_of[i]
            if self.unknown[row] == at:
                self.unknown[row] = -1
            if row in table.faults:
                continue
            if is_finite:
                table.tokens[row, at] = token_id
            else:
                table.faults[row] = RowFault(NUMERICAL, "the logits are not finite, or leave no id to draw")
                self.stopped[row] = at
