"""The step: admit, compute, sample, agree, advance, release. Knows neither gRPC nor protobuf."""

import hashlib
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .batch import StepBatch
from .distributed import Group
from .faults import Faults
from .kernels.interface import Allowed, DrawsIds, KVCache
from .sampling import processors
from .sampling.constraint import Automaton, Constraint, GrammarError, set_bits
from .sampling.grammar import Grammar, Grammars, Guided, Masks
from .sampling.guidance import Asked, allowed_by, ask
from .sampling.params import SamplingParams
from .sampling.sampler import Draw, draw, raw_logprobs, top_ids
from .sequences import ProtocolError, RowFault, RowState, SequenceTable

NUMERICAL, GRAMMAR, UNSUPPORTED = "NUMERICAL", "GRAMMAR", "UNSUPPORTED"
# What rank 0 tells the others of a row beside its id.
BROKEN, DRAWN, OUT_OF_FORM = 0, 1, 2


@dataclass(frozen=True)
class Admission:
    """A sequence to be taken into a row. `unsupported`: what it asks for and this shard does not serve."""

    row: int
    sequence: int
    incarnation: int
    tokens: Sequence[int]
    num_prompt: int
    cached_len: int
    params: SamplingParams
    automaton: str | None = None
    grammar: Grammar | None = None
    unsupported: str | None = None
    prompt_logprobs_from: int | None = None


@dataclass(frozen=True)
class Work:
    """What one row is to compute: at most `max_query` positions; 1 to `max_ids` ids if that is not 0."""

    row: int
    incarnation: int
    max_query: int
    max_ids: int
    new_blocks: Sequence[int]


@dataclass(frozen=True)
class Plan:
    """A step."""

    epoch: int
    step: int
    release: Sequence[int]
    admit: Sequence[Admission]
    work: Sequence[Work]


@dataclass
class Scores:
    """How probable ids of a prompt were after those before them, in order. `top` has an entry for each, where asked."""

    logprobs: list[float] = field(default_factory=list)
    top: list[tuple[list[int], list[float]]] = field(default_factory=list)


@dataclass
class RowResult:
    """What one row yielded."""

    row: int
    incarnation: int
    computed: int = 0
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: tuple[list[int], list[float]] | None = None
    fault: RowFault | None = None
    prompt: Scores | None = None


@dataclass
class Result:
    """The answer to a plan. `rows` is empty on all ranks but the first."""

    epoch: int
    step: int
    table_digest: int
    rows: list[RowResult]
    forward_us: int
    sample_us: int
    total_us: int


class Model(Protocol):
    """The part of a decoder that a step needs."""

    def __call__(self, batch: StepBatch) -> Tensor | None:
        """Logits [sampled, vocab] float32 on rank 0, None elsewhere."""
        ...


class LogitsDigests:
    """Debugging: a line for every sampled id, `<digest of the log before it> <digest of its raw logits>`."""

    def __init__(self, directory: Path, process_id: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._file = (directory / f"{process_id}.txt").open("a", buffering=1 << 16)

    def note(self, log: NDArray[np.int32], logits: Tensor) -> None:
        def digest(data: bytes) -> str:
            return hashlib.blake2b(data, digest_size=8).hexdigest()

        self._file.write(f"{digest(log.tobytes())} {digest(logits.numpy().tobytes())}\n")

    def flush(self) -> None:
        """What is written survives the process, however it ends."""
        self._file.flush()


class Runner:
    """Runs the plans of one epoch on one rank."""

    def __init__(
        self,
        model: Model,
        group: Group,
        cache: KVCache,
        table: SequenceTable,
        eos_token_ids: Sequence[int],
        faults: Faults,
        digests: LogitsDigests | None = None,
        grammars: Grammars | None = None,
        mark: processors.Watermark | None = None,
        drawing: DrawsIds | None = None,
    ) -> None:
        self.grammars = grammars or Grammars(None, table.vocab_size, eos_token_ids)
        self.model, self.group, self.cache, self.table = model, group, cache, table
        self.eos_token_ids, self.faults, self.digests = eos_token_ids, faults, digests
        self.mark, self.drawing = mark or processors.Watermark(), drawing
        # What a row that is too short may not draw; there is nothing beyond the vocabulary.
        self.ends = np.zeros(-(-table.vocab_size // 32), np.int32)
        beyond = range(table.vocab_size, 32 * len(self.ends))
        set_bits(self.ends, [*(i for i in eos_token_ids if i < table.vocab_size), *beyond])
        # Of rows that are constrained: the constraint, and where its mask is being found out.
        self.begun: dict[int, tuple[Constraint, Masks, int]] = {}
        # What the last step asked of grammars, of which rows, and how many changes of rows there had been.
        self.asked, self.asked_of, self.changes = Asked(None, [], holds=False), (list[int](), 0), 0

    def step(self, plan: Plan) -> Result:
        """Computes a plan. Raises ProtocolError if it does not fit what this rank holds."""
        started = time.monotonic_ns()
        return self.compute(plan, self.take(plan), started)

    def take(self, plan: Plan) -> list[Work]:
        """Admits, and gives rows their blocks. Returns the work of rows without a fault."""
        self.faults.look()
        self.faults.reach("step")
        for admission in plan.admit:
            self.admit(admission)
        if len({work.row for work in plan.work}) != len(plan.work):
            raise ProtocolError(f"step {plan.step} has two works for one row: {[work.row for work in plan.work]}")
        for work in plan.work:
            self.table.check_row(work.row, work.incarnation)
            self.table.add_blocks(work.row, work.new_blocks)
        return [work for work in plan.work if work.row not in self.table.faults]

    def compute(self, plan: Plan, alive: Sequence[Work], started: int) -> Result:
        """Everything from the forward pass on, ids on the host. started: by the monotonic clock, in nanoseconds."""
        sampling = [work.row for work in alive if work.max_ids > 0]
        logits, forwarded, scoring = None, started, Scoring(self.table)
        # Of the others it was done when they were given their last id.
        self.begin_masks([a.row for a in plan.admit])
        if alive:
            logits = self.model(make_batch(self.table, alive, self.cache, scoring))
            forwarded = time.monotonic_ns()
            advance(self.table, alive)
        drawn = self.sample(sampling, logits)
        sampled = time.monotonic_ns()
        computed = self.table.computed[[work.row for work in plan.work]].tolist()
        rows = self.results(plan.work, computed, sampling, drawn, scoring.scores) if self.group.rank == 0 else []
        return self.end(plan, rows, started, forwarded, sampled)

    def end(self, plan: Plan, rows: list[RowResult], started: int, forwarded: int, sampled: int) -> Result:
        """Releases rows, and makes the answer."""
        digest = self.digest(plan)
        for row in plan.release:
            self.table.release(row)
            self.begun.pop(row, None)
            self.changes += 1
        ended = time.monotonic_ns()
        micros = [(b - a) // 1000 for a, b in ((started, forwarded), (forwarded, sampled), (started, ended))]
        return Result(plan.epoch, plan.step, digest, rows, *micros)

    def admit(self, a: Admission) -> None:
        """Takes a sequence; what it asks for and cannot get is an error of its row alone."""
        table = self.table
        self.changes += 1
        table.admit(a.row, a.sequence, a.incarnation, a.tokens, a.num_prompt, a.cached_len)
        state = table.states[a.row] = RowState(a.params, prompt_logprobs_from=a.prompt_logprobs_from)
        if a.unsupported is not None:
            table.faults[a.row] = RowFault(UNSUPPORTED, f"{a.unsupported} is not served by this shard")
            return
        if any(token_id >= table.vocab_size for token_id, _ in a.params.logit_bias):
            table.faults[a.row] = RowFault(UNSUPPORTED, f"logit_bias names an id beyond {table.vocab_size - 1}")
            return
        if a.params.counts_ids and self.group.rank == 0:
            state.counts = table.count_ids(a.row)
        if a.automaton is not None:
            try:
                state.constraint = self.constraint(a.automaton, a.tokens[a.num_prompt :])
            except GrammarError as error:
                table.faults[a.row] = RowFault(GRAMMAR, str(error))
        elif a.grammar is not None and self.group.rank == 0:
            state.constraint = self.grammars.constraint(a.grammar, a.tokens[a.num_prompt :])

    def constraint(self, source: str, generated: Sequence[int]) -> Constraint:
        """The state after the ids generated so far."""
        constraint = Automaton(source, self.eos_token_ids, self.table.vocab_size)
        for token_id in generated:
            constraint.advance(token_id)
        return constraint

    def begin_masks(self, rows: Sequence[int]) -> None:
        """Begins to find out which ids may come next in those rows that are constrained, beside the steps.

        Not where that was done, or takes but a moment. Only rank 0 has to know.
        """
        if self.group.rank != 0:
            return
        states = self.table.states
        missing = {
            row: c
            for row in rows
            if (c := states[row].constraint) is not None
            and not (isinstance(c, Guided) and c.is_cheap())
            and (row not in self.begun or self.begun[row][0] is not c)
        }
        if missing:
            for masks in self.grammars.begin(missing):
                self.begun.update({row: (missing[row], masks, i) for i, row in enumerate(masks.rows)})

    def constrain(self, rows: list[int]) -> tuple[Asked, Allowed | None, dict[int, str]]:
        """Places of `rows` that are guided, what may be drawn at others, and errors of places."""
        if self.asked.holds and self.asked_of == (rows, self.changes):
            return self.asked, None, {}
        states = self.table.states
        bound = [(i, row, c) for i, row in enumerate(rows) if (c := states[row].constraint) is not None]
        # Some may have become dear meanwhile.
        self.begin_masks([row for _, row, _ in bound])
        cheap = [
            (i, c, self.is_too_short(row, states[row]))
            for i, row, c in bound
            if row not in self.begun and isinstance(c, Guided)
        ]
        self.asked, masks, errors = ask(cheap, self.ends)
        self.asked.holds &= len(cheap) == len(bound)
        self.asked_of = list(rows), self.changes
        for i, row, _ in bound:
            if (begun := self.begun.pop(row, None)) is not None:
                _, found, at = begun
                masks[i] = self.lengthen(row, found.wait()[at])
                if row in found.errors:
                    errors[i] = found.errors[row]
        return self.asked, allowed_by(masks, len(rows)), errors

    def sample(self, rows: list[int], logits: Tensor | None) -> Draw | None:
        """Draws on rank 0 and tells the others: one broadcast of ids and states. Appends the ids to the logs."""
        if not rows:
            return None
        drawn, told = None, np.empty((len(rows), 2), np.int64)
        told_already, errors = set[int](), dict[int, str]()
        if self.group.rank == 0:
            assert logits is not None
            assert len(logits) == len(rows)
            if self.faults.reach("sample"):
                logits[0, 0] = float("nan")
            drawn, told_already, errors = self.draw(rows, logits)
            told[:, 0] = drawn.ids
            told[:, 1] = np.where(drawn.is_finite, DRAWN, BROKEN)
            told[list(errors), 1] = OUT_OF_FORM
        self.group.broadcast(torch.from_numpy(told))
        is_drawn = told[:, 1] == DRAWN
        self.table.append(np.array(rows)[is_drawn], told[is_drawn, 0])
        if self.asked.holds and is_drawn.all():
            # Every constraint knows of its id, and none needs a mask that is dear.
            return drawn
        moved: list[int] = []
        for i, (row, (token_id, state)) in enumerate(zip(rows, told.tolist(), strict=True)):
            if state == OUT_OF_FORM:
                self.table.faults[row] = RowFault(GRAMMAR, errors.get(i, "rank 0 says what is wrong"))
                continue
            if state == BROKEN:
                self.table.faults[row] = RowFault(NUMERICAL, "the logits are not finite, or leave no id to draw")
                continue
            constraint = self.table.states[row].constraint
            if constraint is not None:
                moved.append(row)
                if i not in told_already:
                    constraint.advance(token_id)
        # Now, while this thread does what only one thread can do: during the forward pass every core is taken.
        self.begin_masks(moved)
        return drawn

    def draw(self, rows: list[int], raw: Tensor) -> tuple[Draw, set[int], dict[int, str]]:
        """Processes a copy of the logits of those rows that ask for it, and draws from what is allowed.

        Also places of `rows` whose constraints know of the id, and errors of places whose constraint cannot be used.
        """
        states = [self.table.states[row] for row in rows]
        if self.digests is not None:
            for row, logits in zip(rows, raw, strict=True):
                self.digests.note(self.table.log(row), logits)
            self.digests.flush()
        processed = raw
        special = [i for i, s in enumerate(states) if self.is_processed(rows[i], s)]
        if special:
            processed = raw.clone()
            self.process(processed, rows, states, special)
        asked, allowed, errors = self.constrain(rows)
        params = [state.params for state in states]
        drawn = draw(raw, processed, params, self.table.length[rows], allowed, asked.guided, self.drawing)
        told, failed = asked.take_note(drawn.ids, drawn.is_finite)
        return drawn, told, errors | failed

    def is_processed(self, row: int, state: RowState) -> bool:
        """Whether a row's logits are changed before its constraint is looked at."""
        p = state.params
        is_held = state.constraint is None and self.is_too_short(row, state)
        return bool(p.counts_ids or p.logit_bias or p.watermark or is_held)

    def is_too_short(self, row: int, state: RowState) -> bool:
        """Whether a row may not end yet."""
        least = state.params.min_new_tokens
        return least > 0 and int(self.table.length[row] - self.table.num_prompt[row]) < least

    def lengthen(self, row: int, words: NDArray[np.int32]) -> NDArray[np.int32]:
        """A mask [words] without the end, if the row is too short."""
        goes_on = words & ~self.ends
        # A constraint that has come to its end counts more than a least length.
        return goes_on if self.is_too_short(row, self.table.states[row]) and goes_on.any() else words

    def process(self, logits: Tensor, rows: list[int], states: list[RowState], special: list[int]) -> None:
        """Watermarks, penalties, biases and least lengths of the `special` rows of `logits`, in place."""
        for i in special:
            if states[i].params.watermark:
                processors.watermark(logits[i], int(self.table.log(rows[i])[-1]), self.mark)
        changed = [i for i in special if states[i].params.counts_ids or states[i].params.logit_bias]
        if changed:
            params = [states[i].params for i in changed]
            processors.change(
                logits, changed, params, [states[i].counts for i in changed],
                [int(self.table.length[rows[i]]) for i in changed], self.drawing,
            )  # fmt: skip
        for i in special:
            if states[i].constraint is None and self.is_too_short(rows[i], states[i]):
                processors.forbid(logits[i], self.eos_token_ids)

    def results(
        self,
        asked: Sequence[Work],
        computed: Sequence[int],
        sampling: list[int],
        drawn: Draw | None,
        scores: Mapping[int, Scores],
    ) -> list[RowResult]:
        """One for each work, in order. computed: how far its row is computed then."""
        at = {row: i for i, row in enumerate(sampling)}
        results = []
        for work, until in zip(asked, computed, strict=True):
            result = RowResult(work.row, work.incarnation, until)
            result.fault = self.table.faults.get(work.row)
            result.prompt = scores.get(work.row)
            if result.fault is None and drawn is not None and work.row in at:
                i = at[work.row]
                result.ids, result.logprobs = [int(drawn.ids[i])], [float(drawn.logprobs[i])]
                result.top = drawn.top[i] if drawn.top[i][0] else None
            results.append(result)
        return results

    def digest(self, plan: Plan) -> int:
        """Of what this rank's own table says of the rows of the plan."""
        rows = np.array([work.row for work in plan.work], np.int64)
        facts = struct.pack("<QQ", plan.epoch, plan.step) + self.table.facts(rows, plan.step)
        return int.from_bytes(hashlib.blake2b(facts, digest_size=8).digest(), "little")


class Scoring:
    """The log-probabilities of the ids of prompts that a step computes, for the rows that want them."""

    def __init__(self, table: SequenceTable) -> None:
        self.table = table
        self.scores: dict[int, Scores] = {}
        self._wanted: list[tuple[int, int]] = []  # row and place of the id that each token of `rows` predicts
        self._next = 0

    def rows(self, works: Sequence[Work], starts: NDArray[np.int64]) -> Tensor | None:
        """Indices of the step's tokens whose logits tell of an id that is wanted; None if there is none.

        starts: [rows + 1], where the tokens of each work begin.
        """
        table, indices = self.table, []
        for i, work in enumerate(works):
            state = table.states.get(work.row)
            if state is None or state.prompt_logprobs_from is None:
                continue
            computed, count = int(table.computed[work.row]), int(starts[i + 1] - starts[i])
            first = max(computed + 1, state.prompt_logprobs_from)
            last = min(computed + count, int(table.num_prompt[work.row]) - 1)
            for place in range(first, last + 1):
                indices.append(int(starts[i]) + place - 1 - computed)
                self._wanted.append((work.row, place))
        return torch.tensor(indices, dtype=torch.int64) if indices else None

    def score(self, logits: Tensor) -> None:
        """Takes the logits [n, vocab] float32 of the next n of the tokens."""
        normalizers, _ = raw_logprobs(logits)
        for row_logits, normalizer in zip(logits, normalizers.tolist(), strict=True):
            row, place = self._wanted[self._next]
            self._next += 1
            scores = self.scores.setdefault(row, Scores())
            token_id = int(self.table.tokens[row, place])
            scores.logprobs.append(float(row_logits[token_id]) - normalizer)
            if top_n := self.table.states[row].params.top_n:
                scores.top.append(top_ids(row_logits, normalizer, top_n))


class Layout(NamedTuple):
    """Where the tokens of a step are: of each row, and of each token."""

    rows: NDArray[np.int64]  # [rows]: of the table
    samples: NDArray[np.bool_]  # [rows]
    starts: NDArray[np.int64]  # [rows + 1]
    ends: NDArray[np.int64]  # [rows]: positions once they are computed
    owner: NDArray[np.int64]  # [tokens]: which row
    positions: NDArray[np.int64]  # [tokens]


def lay_out(table: SequenceTable, works: Sequence[Work]) -> Layout:
    """Raises ProtocolError if rows have other tokens than they are asked for, or no room for them."""
    rows = np.array([work.row for work in works], np.int64)
    known = table.length[rows] - table.computed[rows]
    asked = np.array([work.max_query for work in works], np.int64)
    samples = np.array([work.max_ids > 0 for work in works], np.bool_)
    counts = np.minimum(known, asked)
    if (counts < 1).any() or ((counts == known) != samples).any():
        raise ProtocolError(f"rows {rows.tolist()}: {known.tolist()} known ids, asked for {asked.tolist()}")
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    owner = np.repeat(np.arange(len(rows)), counts)
    positions = table.computed[rows][owner] + np.arange(starts[-1]) - starts[owner]
    ends = table.computed[rows] + counts
    if (ends > table.num_blocks[rows] * table.block_size).any():
        raise ProtocolError(f"rows {rows.tolist()} have no room for {counts.tolist()} more positions")
    return Layout(rows, samples, starts, ends, owner, positions)


def make_batch(table: SequenceTable, works: Sequence[Work], cache: KVCache, scoring: Scoring) -> StepBatch:
    """The rows' next tokens and their places in the cache."""
    rows, samples, starts, ends, owner, positions = lay_out(table, works)
    tables = table.block_table[rows, : max(1, int(table.num_blocks[rows].max()))].astype(np.int64)
    slots = tables[owner, positions // table.block_size] * table.block_size + positions % table.block_size
    return StepBatch(
        token_ids=torch.from_numpy(table.tokens[rows[owner], positions].astype(np.int64)),
        positions=torch.from_numpy(positions),
        starts=starts.tolist(),
        context_lengths=ends.tolist(),
        slots=torch.from_numpy(slots),
        block_tables=torch.from_numpy(tables),
        sample_rows=torch.from_numpy(starts[1:][samples] - 1),
        kv_cache=cache,
        scored_rows=scoring.rows(works, starts),
        score=scoring.score,
    )


def advance(table: SequenceTable, works: Sequence[Work]) -> None:
    """Takes note of what a step has computed."""
    for work in works:
        known = int(table.length[work.row] - table.computed[work.row])
        table.computed[work.row] += min(known, work.max_query)
