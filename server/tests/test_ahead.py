"""Steps that begin before the ids of those before are known, against the same plans one after another."""

import random
import threading
import time
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import pytest
import torch
from test_runner import BLOCK, EOS, GRAMMARS, MARKS, VOCAB, FakeGroup, FakeModel, admission, runner, work
from text_generation_server.ahead import RunnerAhead
from text_generation_server.batch import StepBatch
from text_generation_server.errors import ShardError
from text_generation_server.faults import Faults
from text_generation_server.health import Health
from text_generation_server.kernels.interface import Drawn, StepWork
from text_generation_server.pb import shard_pb2 as pb
from text_generation_server.runner import Admission, Plan, Result, RowResult
from text_generation_server.sampling.params import SamplingParams
from text_generation_server.sampling.sampler import draw_ids
from text_generation_server.sequences import ProtocolError, SequenceTable
from text_generation_server.service import StepThread, Stream


class Later:
    """A step of a slow device: it is never done before it is waited for."""

    def __init__(self, drawn: Drawn, logits: torch.Tensor) -> None:
        self._drawn, self._logits = drawn, logits

    def logits(self) -> torch.Tensor:
        return self._logits

    def is_done(self) -> bool:
        return False

    def wait(self) -> Drawn:
        return self._drawn


class FakeDevice:
    """Keeps block tables and ids to itself, and takes unknown tokens from there."""

    def __init__(self, model: FakeModel, faults: Faults) -> None:
        self.model, self.tables, self.last = model, dict[tuple[int, int], int](), dict[int, int]()
        self.num_unknown, self.num_kept = 0, 0

    def launch(self, step: StepWork) -> Later:
        for row, place, block in zip(*(part.tolist() for part in step.new_blocks), strict=True):
            self.tables[row, place] = block
        follows = step.follows.tolist()
        known = step.token_ids.tolist()
        ids = [self.last[row] if row >= 0 else token for token, row in zip(known, follows, strict=True)]
        self.num_unknown += int((step.follows >= 0).sum())
        width = -(-int(step.context_lengths.max()) // BLOCK)
        tables = [[self.tables.get((row, at), 0) for at in range(width)] for row in step.rows.tolist()]
        cache: Any = None
        logits = self.model(StepBatch(
            token_ids=torch.tensor(ids),
            positions=torch.from_numpy(step.positions),
            starts=step.starts.tolist(),
            context_lengths=step.context_lengths.tolist(),
            slots=torch.from_numpy(step.slots),
            block_tables=torch.tensor(tables),
            sample_rows=torch.from_numpy(step.starts[1:][step.samples] - 1),
            kv_cache=cache,
        ))  # fmt: skip
        assert logits is not None
        if not len(logits):
            return Later(Drawn(*(np.empty(0, dtype) for dtype in (np.int64, np.float32, np.float32, np.bool_))), logits)
        params = [SamplingParams(r.do_sample, r.temperature, r.top_k, r.top_p) for r in step.requests]
        drawn = draw_ids(logits, logits, params, np.array([r.number for r in step.requests]), None, None)
        self.last.update(zip(step.rows[step.samples].tolist(), drawn.ids.tolist(), strict=True))
        # Of kept rows, ids that mean nothing.
        drawn.ids[step.kept] = 3
        self.num_kept += int(step.kept.sum())
        return Later(drawn, logits[torch.from_numpy(step.kept)])

    def record(self) -> int:
        return 0

    def measure(self) -> int:
        return 0


def ahead(faults: Faults | None = None) -> tuple[RunnerAhead, FakeDevice]:
    model, table, group, cache = FakeModel(), SequenceTable(8, 128, BLOCK, VOCAB), FakeGroup(0), None
    faults = faults or Faults(None, 0)
    device = FakeDevice(model, faults)
    return RunnerAhead(model, group, cache, table, EOS, faults, None, GRAMMARS, steps=device), device


HOW: list[dict[str, Any]] = [
    {},
    {"params": SamplingParams(do_sample=True, seed=3, temperature=1.4, top_k=30, top_p=0.9)},
    {"params": SamplingParams(do_sample=True, seed=4)},
    {"params": SamplingParams(repetition_penalty=1.4)},
    {"params": SamplingParams(top_n=3)},
    {"params": SamplingParams(do_sample=True, seed=5, typical_p=0.8)},
    {"params": SamplingParams(min_new_tokens=3)},
    {"grammar": MARKS},
    {"prompt_logprobs_from": 2},
]


def plans(seed: int, hows: list[dict[str, Any]], count: int = 60) -> list[Plan]:
    """Sequences that come, are computed in pieces, go on and go; blocks are never given twice."""
    rng, made, rows, next_block = random.Random(seed), list[Plan](), dict[int, dict[str, int]](), 1
    for step in range(1, count + 1):
        admit, todo, release = list[Admission](), [], list[int]()
        if len(rows) < 6 and rng.random() < 0.3:
            row = rng.choice([row for row in range(8) if row not in rows])
            prompt = [rng.randrange(7, VOCAB) for _ in range(rng.randrange(1, 14))]
            admit.append(admission(row, prompt, incarnation=step, **rng.choice(hows)))
            rows[row] = {"length": len(prompt), "computed": 0, "blocks": 0, "left": rng.randrange(1, 20), "born": step}
        for row, facts in rows.items():
            known = facts["length"] - facts["computed"]
            size = min(known, rng.randrange(1, 8))
            facts["computed"] += size
            needed = -(-facts["computed"] // BLOCK) - facts["blocks"]
            blocks = list(range(next_block, next_block + needed))
            next_block, facts["blocks"] = next_block + needed, facts["blocks"] + needed
            todo.append(work(row, size, blocks, samples=size == known, incarnation=facts["born"]))
            if size == known:
                facts["length"] += 1
                facts["left"] -= 1
                if not facts["left"]:
                    release.append(row)
        for row in release:
            del rows[row]
        made.append(Plan(1, step, release, admit, todo))
    return made


Rows = list[list[RowResult]]


def both(made: list[Plan], broken: Collection[int] = (), depth: int = 4) -> tuple[Rows, Rows, FakeDevice]:
    """Rows of results one after another, and with steps begun ahead; the device of these."""
    plain, (early, device) = runner(), ahead()
    plain_model: Any = plain.model
    for model in (plain_model, device.model):
        model.broken, model.memory = set(broken), [0] * 4096
    results: list[Result] = []
    for plan in made:
        results += early.begin(plan)
        if depth < len(early.open):
            results += early.finish_but(depth)
        assert len(early.open) <= 4
    results += early.finish_but(0)
    assert [result.step for result in results] == [plan.step for plan in made]
    return [plain.step(plan).rows for plan in made], [result.rows for result in results], device


@pytest.mark.parametrize(("seed", "depth"), [(0, 4), (1, 1), (2, 2), (3, 3), (4, 4), (5, 2)])
@pytest.mark.parametrize("hows", [HOW[:3], HOW], ids=["what a device draws", "everything"])
def test_results_are_those_of_steps_one_after_another(hows: list[dict[str, Any]], seed: int, depth: int) -> None:
    wanted, found, device = both(plans(seed, hows), depth=depth)
    assert found == wanted
    assert device.num_unknown > (10 if len(hows) == 3 else 2)
    assert (device.num_kept > 10) == (len(hows) > 3)


def test_a_row_without_finite_logits_ends_alone_and_where_it_was() -> None:
    made = plans(11, HOW[:3], 80)
    broken = {a.tokens[0] for plan in made for a in plan.admit[:1] if plan.step % 2}
    wanted, found, _ = both(made, broken)
    assert found == wanted
    assert any(row.fault for rows in wanted for row in rows)


def test_a_plan_that_does_not_fit_is_refused() -> None:
    early, _ = ahead()
    early.begin(Plan(1, 1, [], [admission(0, [9, 8, 7])], [work(0, 3, [1])]))
    early.begin(Plan(1, 2, [], [], [work(0)]))
    with pytest.raises(ProtocolError, match="no room"):
        early.begin(Plan(1, 3, [], [], [work(0)]))


class Slow:
    """A shard on whose device no step is done before `done` is set."""

    def __init__(self, breaks: bool = False) -> None:
        self.health, self.breaks, self.left = Health(), breaks, False
        self.done = threading.Event()
        self.open: list[int] = []
        self.began: list[tuple[int, int]] = []  # steps, and how many were open then

    def step(self, plan: Plan) -> list[Result]:
        self.began.append((plan.step, len(self.open)))
        self.open.append(plan.step)
        return [self._end()] if len(self.open) > 2 else []

    @property
    def num_open(self) -> int:
        return len(self.open)

    def finish_if_done(self) -> Result | None:
        if not self.done.is_set():
            return None
        if self.breaks:
            raise RuntimeError("out of memory")
        return self._end()

    def _end(self) -> Result:
        return Result(0, self.open.pop(0), 0, [], 0, 0, 0)

    def leave(self) -> None:
        self.open, self.left = [], True

    def lost(self) -> None:
        return None


def serve(shard: Slow, stream: Stream) -> StepThread:
    config: Any = None
    thread = StepThread(config, Health(), lambda code: None)
    loaded: Any = shard
    thread.load = lambda: loaded  # type: ignore[method-assign]
    thread.stream = stream
    thread.start()
    return thread


def wait_for(what: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not what():
        assert time.monotonic() < until
        time.sleep(0.005)


def end(thread: StepThread) -> None:
    def stop(_: object) -> None:
        raise ShardError("enough")

    thread.commands.put(stop)
    thread.join(10)


def test_a_plan_begins_while_the_step_before_is_open_and_answers_come_in_order() -> None:
    shard, stream = Slow(), Stream()
    thread = serve(shard, stream)
    for step in (1, 2, 3):
        thread.step(stream, pb.StepPlan(step=step).SerializeToString())
    wait_for(lambda: len(shard.began) == 3)
    shard.done.set()
    answers = [stream.get() for _ in range(3)]
    assert [pb.StepResult.FromString(a).step for a in answers if isinstance(a, bytes)] == [1, 2, 3]
    assert shard.began == [(1, 0), (2, 1), (3, 2)]
    end(thread)


def test_open_steps_without_a_stream_are_dropped() -> None:
    shard, stream = Slow(), Stream()
    thread = serve(shard, stream)
    thread.step(stream, pb.StepPlan(step=1).SerializeToString())
    thread.commands.put(lambda _: setattr(thread, "stream", None))
    wait_for(lambda: shard.left)
    assert thread.is_alive()
    end(thread)


def test_a_step_that_fails_while_nobody_waits_ends_its_stream() -> None:
    shard, stream = Slow(breaks=True), Stream()
    shard.done.set()
    thread = serve(shard, stream)
    thread.step(stream, pb.StepPlan(step=1).SerializeToString())
    assert isinstance(stream.get(), RuntimeError)
    wait_for(lambda: shard.left)
    assert thread.stream is None
    end(thread)
