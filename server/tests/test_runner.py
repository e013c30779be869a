"""The step, with a model that is a function of what it finds in a simulated cache through the batch it is given."""

import hashlib
import random
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from text_generation_server.batch import StepBatch
from text_generation_server.faults import Faults
from text_generation_server.runner import (
    GRAMMAR,
    NUMERICAL,
    UNSUPPORTED,
    Admission,
    LogitsDigests,
    Plan,
    Result,
    RowResult,
    Runner,
    Work,
)
from text_generation_server.sampling.grammar import REGEX, Grammar, Grammars, Guided
from text_generation_server.sampling.guidance import Asked
from text_generation_server.sampling.params import SamplingParams
from text_generation_server.sequences import ProtocolError, SequenceTable
from tokenizers import Tokenizer
from torch import Tensor

VOCAB, BLOCK, EOS = 60, 4, [2, 6]
SAMPLING = SamplingParams(do_sample=True, seed=5, temperature=1.5, repetition_penalty=1.3, frequency_penalty=0.4)


def logits_after(log: list[int]) -> Tensor:
    """What the model says of a sequence: [VOCAB], a function of all its ids in order."""
    seed = int.from_bytes(hashlib.sha256(bytes(log)).digest()[:6], "little")
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))


def greedy(prompt: list[int], count: int) -> list[int]:
    log = list(prompt)
    for _ in range(count):
        log.append(int(logits_after(log).argmax()))
    return log[len(prompt) :]


class FakeModel:
    """Stores ids in slots and reads every context back through the block tables."""

    def __init__(self, rank: int = 0) -> None:
        self.rank, self.memory = rank, [0] * 1024
        self.chunks: list[list[int]] = []  # per step, tokens of each row
        self.broken: set[int] = set()  # prompts that begin with one of these give NaN

    def __call__(self, batch: StepBatch) -> Tensor | None:
        for token_id, slot in zip(batch.token_ids.tolist(), batch.slots.tolist(), strict=True):
            self.memory[slot] = token_id
        self.chunks.append(np.diff(batch.starts).tolist())
        sampled, rows = set(batch.sample_rows.tolist()), []
        for row, end in enumerate(batch.starts[1:]):
            start, length = batch.starts[row], batch.context_lengths[row]
            assert batch.positions[start:end].tolist() == list(range(length - (end - start), length))
            if end - 1 in sampled:
                blocks = batch.block_tables[row].tolist()
                context = [self.memory[blocks[at // BLOCK] * BLOCK + at % BLOCK] for at in range(length)]
                rows.append(logits_after(context))
                if context[0] in self.broken:
                    rows[-1][7] = float("nan")
        if batch.scored_rows is not None and batch.score is not None and self.rank == 0:
            owner = np.repeat(np.arange(len(batch.starts) - 1), np.diff(batch.starts))
            for token in batch.scored_rows.tolist():
                blocks = batch.block_tables[owner[token]].tolist()
                places = range(int(batch.positions[token]) + 1)
                context = [self.memory[blocks[at // BLOCK] * BLOCK + at % BLOCK] for at in places]
                batch.score(logits_after(context)[None])
        return (torch.stack(rows) if rows else torch.empty(0, VOCAB)) if self.rank == 0 else None


@dataclass
class FakeGroup:
    """Rank 0 leaves in `wire` what the other rank takes, step by step."""

    rank: int
    wire: list[Tensor] = field(default_factory=list)

    def broadcast(self, x: Tensor) -> None:
        if self.rank == 0:
            self.wire.append(x.clone())
        else:
            x.copy_(self.wire.pop(0))


TOKENIZER = Tokenizer.from_file(str(Path(__file__).parents[2] / "models/docs-llama-7m/tokenizer.json"))
# Of its tokens, the first sixty: those that are special, and then single characters.
GRAMMARS = Grammars(Path(__file__).parents[2] / "models/docs-llama-7m/tokenizer.json", VOCAB, EOS)
MARKS = Grammar(REGEX, "[!-+]([!-+][,-/]){3,}")
MANY = Grammar(REGEX, "([!-<]{2}[&-Z]){3,9}")


def runner(rank: int = 0, wire: list[Tensor] | None = None, digests: LogitsDigests | None = None) -> Runner:
    table = SequenceTable(8, 128, BLOCK, VOCAB)
    group: Any = FakeGroup(rank, [] if wire is None else wire)
    cache: Any = None
    return Runner(FakeModel(rank), group, cache, table, EOS, Faults(None, rank), digests, GRAMMARS)


def admission(row: int, tokens: list[int], num_prompt: int | None = None, **other: Any) -> Admission:
    other.setdefault("params", SamplingParams())
    other.setdefault("incarnation", 1)
    return Admission(
        row=row, sequence=row, tokens=tokens, num_prompt=num_prompt or len(tokens), **({"cached_len": 0} | other)
    )


def work(row: int, max_query: int = 1, blocks=(), *, samples: bool = True, incarnation: int = 1) -> Work:
    return Work(row, incarnation, max_query, int(samples), list(blocks))


def step(runner: Runner, *works: Work, admit=(), release=(), number: int = 1) -> list[RowResult]:
    return runner.step(Plan(1, number, list(release), list(admit), list(works))).rows


def blocks_of(row: int) -> list[int]:
    """Enough blocks for 64 positions, others for every row."""
    return [row * 16 + i for i in reversed(range(16))]


def generate(runner: Runner, count: int, **sequence: Any) -> list[int]:
    """Ids of one sequence in row 0, alone, a step each; released with the last."""
    first = admission(0, **sequence)
    ids = step(runner, work(0, 99, blocks_of(0), incarnation=first.incarnation), admit=[first])[0].ids
    for i in range(1, count):
        release = [0] if i == count - 1 else []
        ids += step(runner, work(0, incarnation=first.incarnation), release=release)[0].ids
    return ids


def test_a_sequence_yields_what_the_model_says_of_its_whole_log():
    assert generate(runner(), 20, tokens=[5, 7, 9]) == greedy([5, 7, 9], 20)


@pytest.mark.parametrize("sizes", [[1, 1, 1], [2, 3, 5], [9, 1], [4, 4, 2]], ids=str)
def test_a_prompt_in_chunks_yields_the_same(sizes):
    prompt, run = list(range(10, 10 + sum(sizes))), runner()
    admit = [admission(0, prompt)]
    for i, size in enumerate(sizes):
        is_last = i == len(sizes) - 1
        (result,) = step(run, work(0, size, blocks_of(0) if i == 0 else (), samples=is_last), admit=admit)
        assert (result.computed, len(result.ids)) == (sum(sizes[: i + 1]), int(is_last))
        admit = []
    assert run.model.chunks == [[size] for size in sizes]
    assert result.ids == greedy(prompt, 1)


def test_rows_of_several_sequences_do_not_mix():
    run, prompts = runner(), [[5, 7, 9], [8], [30, 31, 32, 33, 34, 35]]
    works = [work(row, 99, blocks_of(row)) for row in range(3)]
    ids = [r.ids for r in step(run, *works, admit=[admission(row, p) for row, p in enumerate(prompts)])]
    for order in ([2, 0, 1], [1, 2, 0], [0, 1, 2]):
        for result in step(run, *(work(row) for row in order)):
            ids[result.row] += result.ids
    assert ids == [greedy(prompt, 4) for prompt in prompts]


def test_cached_positions_are_read_and_not_computed():
    run, prompt = runner(), list(range(10, 22))
    step(run, work(0, 99, [3, 4, 5]), admit=[admission(0, prompt)])
    (result,) = step(run, work(1, 99, [3, 4, 7]), admit=[admission(1, prompt, cached_len=8)])
    assert run.model.chunks[-1] == [4]
    assert (result.ids, result.computed) == (greedy(prompt, 1), 12)


def test_logprobs_and_most_probable_ids_come_with_the_ids():
    params = SamplingParams(top_n=3)
    (result,) = step(runner(), work(0, 99, [0, 1]), admit=[admission(0, [5, 7, 9], params=params)])
    expected = logits_after([5, 7, 9]).double().log_softmax(-1).topk(3)
    assert result.top is not None
    assert result.top[0] == expected.indices.tolist()
    np.testing.assert_allclose([*result.logprobs, *result.top[1]], expected.values[[0, 0, 1, 2]].numpy(), atol=1e-5)


@pytest.mark.parametrize(
    "params", [SamplingParams(), SAMPLING, replace(SAMPLING, top_p=0.9, presence_penalty=0.3)], ids=str
)
def test_a_log_admitted_again_at_any_point_goes_on_alike(params):
    whole = generate(runner(), 12, tokens=[5, 7, 9], params=params)
    for emitted in range(1, 12):
        again = generate(
            runner(), 12 - emitted, tokens=[5, 7, 9, *whole[:emitted]], num_prompt=3, params=params, incarnation=2
        )
        assert again == whole[emitted:]


LETTERS = '{"start": 0, "transitions": [[0, 20, 1], [0, 21, 1], [1, 30, 0], [1, 31, 2], [1, 32, 0]], "final": [1]}'


@pytest.mark.parametrize("params", [SamplingParams(), SAMPLING], ids=["greedy", "sampled"])
def test_a_constraint_is_kept_through_a_second_admission(params):
    whole = generate(runner(), 12, tokens=[5, 7, 9], params=params, automaton=LETTERS)
    ended = next((i for i, token_id in enumerate(whole) if token_id in EOS), len(whole))
    assert all(token_id in ((20, 21) if i % 2 == 0 else (30, 31, 32)) for i, token_id in enumerate(whole[:ended]))
    assert set(whole[ended:]) <= set(EOS)
    log = [5, 7, 9, *whole[:5]]
    again = generate(runner(), 7, tokens=log, num_prompt=3, params=params, automaton=LETTERS, incarnation=2)
    assert again == whole[5:]


@pytest.mark.parametrize("params", [SamplingParams(), SAMPLING, SamplingParams(min_new_tokens=20)], ids=str)
def test_a_grammar_is_followed_and_kept_through_a_second_admission(params):
    whole = generate(runner(), 24, tokens=[5, 7, 9], params=params, grammar=MARKS)
    text = TOKENIZER.decode([token_id for token_id in whole if token_id not in EOS])
    prefix = re.fullmatch("[!-+]([!-+][,-/])*[!-+]?", text)
    assert prefix, text
    if params.min_new_tokens:
        assert not set(whole[:20]) & set(EOS)
    for emitted in (1, 5, 13):
        log = [5, 7, 9, *whole[:emitted]]
        again = generate(runner(), 24 - emitted, tokens=log, num_prompt=3, params=params, grammar=MARKS, incarnation=2)
        assert again == whole[emitted:]


TRIED = [
    SamplingParams(),
    SamplingParams(top_n=3),
    SamplingParams(repetition_penalty=1.3, min_new_tokens=9),
    SamplingParams(logit_bias=((10, 50.0), (11, -1000.0)), frequency_penalty=0.5, top_n=2),
    replace(SAMPLING, min_new_tokens=9),
]


@pytest.mark.parametrize("params", TRIED, ids=str)
def test_what_needs_no_mask_yields_what_masks_would_have_left(params, monkeypatch):
    """Ids, log-probabilities and the most probable ids, with all of them masked beside the steps and without."""

    def answers() -> list[tuple[list[int], list[float], Any]]:
        run, rows_of_all = runner(), []
        for number in range(24):
            first = [admission(row, [5 + row, 7, 9], params=params, grammar=MANY) for row in range(3)]
            blocks = [blocks_of(row) for row in range(3)] if number == 0 else [[]] * 3
            works = [work(row, 99 if number == 0 else 1, blocks[row]) for row in range(3)]
            rows = step(run, *works, admit=first if number == 0 else (), number=number + 1)
            rows_of_all += [(row.ids, row.logprobs, row.top) for row in rows]
        return rows_of_all

    guided: list[Guided] = []
    take_note = Asked.take_note
    monkeypatch.setattr(
        Asked, "take_note", lambda asked, *of: (guided.extend(asked.constraints), take_note(asked, *of))[1]
    )
    monkeypatch.setattr(Guided, "is_cheap", lambda self: True)
    at_once = answers()
    count = len(guided)
    assert count > 9
    monkeypatch.setattr(Guided, "is_cheap", lambda self: False)
    assert answers() == at_once
    assert len(guided) == count


@pytest.mark.parametrize("seed", range(6))
def test_rows_that_come_and_go_yield_what_each_yields_alone(seed, monkeypatch):
    """What was asked of grammars in one step serves the next one, but not where a row is another one's by now."""
    draw, kinds = random.Random(seed), [MARKS, MANY, Grammar(REGEX, "[!-+]{5}"), None]
    sequences = [
        (
            [draw.randrange(3, VOCAB) for _ in range(3)],
            draw.choice([SamplingParams(), SAMPLING, SamplingParams(min_new_tokens=6)]),
            draw.choice(kinds),
            draw.randrange(2, 14),
        )
        for _ in range(14)
    ]
    alone = [
        generate(runner(), count, tokens=tokens, params=params, grammar=grammar)
        for tokens, params, grammar, count in sequences
    ]
    # Of some rows a mask is dear now and then.
    monkeypatch.setattr(Guided, "is_cheap", lambda constraint: draw.random() < 0.98)
    run, waiting, running, found = (
        runner(),
        list(range(len(sequences))),
        dict[int, int](),
        [list[int]() for _ in sequences],
    )
    for number in range(1, 200):
        admit, new = [], set[int]()
        for row in range(4):
            if row not in running and waiting and draw.random() < 0.8:
                running[row] = waiting.pop(0)
                tokens, params, grammar, _ = sequences[running[row]]
                admit.append(admission(row, tokens, params=params, grammar=grammar, incarnation=running[row] + 1))
                new.add(row)
        # Some rows may rest in a step.
        rows = [row for row in sorted(running) if row in new or draw.random() < 0.95]
        release = [row for row in rows if len(found[running[row]]) + 1 == sequences[running[row]][3]]
        works = [
            work(row, 99 if row in new else 1, blocks_of(row) if row in new else (), incarnation=running[row] + 1)
            for row in rows
        ]
        for row, result in zip(rows, step(run, *works, admit=admit, release=release, number=number), strict=True):
            assert result.fault is None
            found[running[row]] += result.ids
        for row in release:
            del running[row]
        if not running and not waiting:
            break
    assert found == alone


def test_all_ranks_leave_out_a_row_whose_grammar_fails_on_the_first():
    wire: list[Tensor] = []
    first, second = runner(0, wire), runner(1, wire)
    admit = [admission(0, [5, 6, 7], grammar=Grammar(REGEX, "(")), admission(1, [8, 9])]
    works = [work(0, 99, blocks_of(0)), work(1, 99, blocks_of(1))]
    results = [run.step(Plan(1, 1, [], admit, works)) for run in (first, second)]
    assert results[0].table_digest == results[1].table_digest
    assert [set(run.table.faults) for run in (first, second)] == [{0}, {0}]
    assert results[0].rows[1].ids == greedy([8, 9], 1)


def good_neighbour(run: Runner, *works: Work, **plan: Any) -> list[RowResult]:
    """Runs the works beside a healthy row 1, which must not notice."""
    log = run.table.log(1).tolist() if run.table.is_held[1] else [8, 9]
    admit = [*plan.pop("admit", ()), *([] if run.table.is_held[1] else [admission(1, log)])]
    *rows, healthy = step(run, *works, work(1, 99, () if run.table.is_held[1] else blocks_of(1)), admit=admit, **plan)
    assert healthy.fault is None
    assert healthy.ids == greedy(log, 1)
    return rows


BROKEN_GRAMMAR = '{"start": 0, "transitions": [[0, 20, 0]], "final": []}'
FAULTS = [
    ({"unsupported": "an adapter"}, UNSUPPORTED, "an adapter is not served"),
    ({"params": SamplingParams(logit_bias=((VOCAB, 1.0),))}, UNSUPPORTED, f"an id beyond {VOCAB - 1}"),
    ({"automaton": "{"}, GRAMMAR, "not JSON"),
    ({"automaton": BROKEN_GRAMMAR, "tokens": [5, 20, 33], "num_prompt": 1}, GRAMMAR, "id 33 does not follow"),
    ({"tokens": [40, 1, 2]}, NUMERICAL, "not finite"),
    ({"grammar": Grammar(REGEX, "(")}, GRAMMAR, "invalid regex"),
    ({"grammar": MARKS, "tokens": [5, 20, 0], "num_prompt": 1}, GRAMMAR, "does not follow the grammar"),
    ({"automaton": BROKEN_GRAMMAR, "params": SamplingParams(logit_bias=((20, float("-inf")),))}, NUMERICAL, "no id"),
]


@pytest.mark.parametrize(("wrong", "kind", "message"), FAULTS, ids=lambda value: str(value)[:60])
def test_a_fault_is_its_rows_alone_and_is_repeated_until_the_release(wrong, kind, message):
    run = runner()
    run.model.broken = {40}
    admit = [admission(0, **({"tokens": [5, 6, 7]} | wrong))]
    for number in range(3):
        (result,) = good_neighbour(run, work(0, 99, blocks_of(0) if number == 0 else ()), admit=admit)
        admit = []
        assert result.fault is not None
        assert (result.fault.kind, result.ids, result.logprobs) == (kind, [], [])
        assert message in result.fault.message
    good_neighbour(run, release=[0])
    (result,) = good_neighbour(run, work(0, 99, blocks_of(0)), admit=[admission(0, [5, 6, 7], incarnation=1)])
    assert (result.fault, result.ids) == (None, greedy([5, 6, 7], 1))


def test_a_step_of_faulty_rows_alone_does_not_ask_the_model():
    run = runner()
    (result,) = step(run, work(0, 3, [0]), admit=[admission(0, [1, 2, 3], unsupported="an adapter")])
    assert result.fault is not None
    assert run.model.chunks == []


def test_a_plan_without_rows_is_answered_and_releases():
    run = runner()
    step(run, work(0, 99, [0, 1]), admit=[admission(0, [5, 7])])
    assert step(run, release=[0]) == []
    assert run.table.num_held == 0


def test_a_release_takes_effect_after_the_work_of_its_plan():
    run = runner()
    (first,) = step(run, work(0, 99, [0, 1]), admit=[admission(0, [5, 7])])
    (second,) = step(run, work(0), release=[0])
    assert first.ids + second.ids == greedy([5, 7], 2)
    assert run.table.num_held == 0


WRONG_PLANS = [
    ([work(3)], "row 3 does not hold incarnation 1"),
    ([work(0, incarnation=2)], "row 0 does not hold incarnation 2"),
    ([work(0), work(0)], "two works for one row"),
    ([work(0, samples=False)], "known ids, asked for"),
    ([work(0, 0)], "known ids, asked for"),
    ([work(0), work(1, 2)], "known ids, asked for"),
]


@pytest.mark.parametrize(("works", "message"), WRONG_PLANS, ids=str)
def test_a_plan_that_does_not_fit_the_table_is_refused(works, message):
    run = runner()
    step(run, work(0, 99, [0, 1]), work(1, 3, [4, 5], samples=False), admit=[admission(0, [5]), admission(1, [5] * 8)])
    with pytest.raises(ProtocolError, match=message):
        step(run, *works)


def test_a_position_without_a_block_is_refused():
    run = runner()
    with pytest.raises(ProtocolError, match=r"rows \[0\] have no room"):
        step(run, work(0, 99, [0]), admit=[admission(0, [5] * 5)])


def both_ranks(plans: list[Plan], corrupt: int | None = None) -> list[tuple[Result, Result]]:
    """Results of two ranks; before the plan with index `corrupt`, one block id of rank 1 is changed."""
    wire: list[Tensor] = []
    ranks = [runner(rank, wire) for rank in range(2)]
    results = []
    for i, plan in enumerate(plans):
        if i == corrupt:
            ranks[1].table.block_table[0, 0] += 1
        results.append((ranks[0].step(plan), ranks[1].step(plan)))
    return results


def two_rank_plans(count: int) -> list[Plan]:
    admit = [admission(0, [5, 7, 9], params=SAMPLING, automaton=LETTERS), admission(1, [40], params=SamplingParams())]
    first = Plan(1, 1, [], admit, [work(0, 99, blocks_of(0)), work(1, 99, blocks_of(1))])
    return [first, *(Plan(1, number, [], [], [work(1), work(0)]) for number in range(2, count + 1))]


def test_ranks_follow_the_first_and_agree():
    for first, second in both_ranks(two_rank_plans(20)):
        assert first.table_digest == second.table_digest
        assert len(first.rows) == 2
        assert second.rows == []


def test_digests_differ_from_step_to_step():
    assert len({first.table_digest for first, _ in both_ranks(two_rank_plans(20))}) == 20


def test_a_corrupted_table_is_seen_within_a_few_steps():
    results = both_ranks(two_rank_plans(60), corrupt=3)
    assert all(first.table_digest == second.table_digest for first, second in results[:3])
    assert any(first.table_digest != second.table_digest for first, second in results[3:])


def test_a_line_is_written_for_every_sampled_id(tmp_path: Path):
    ids = generate(runner(digests=LogitsDigests(tmp_path, 123)), 5, tokens=[5, 7, 9])
    lines = [line.split() for line in (tmp_path / "123.txt").read_text().splitlines()]

    def digest(data: bytes) -> str:
        return hashlib.blake2b(data, digest_size=8).hexdigest()

    logs = [[5, 7, 9, *ids[:i]] for i in range(5)]
    assert lines == [
        [digest(np.array(log, np.int32).tobytes()), digest(logits_after(log).numpy().tobytes())] for log in logs
    ]


@pytest.mark.parametrize("seed", range(40))
def test_any_schedule_of_chunks_neighbours_and_preemptions_yields_the_same(seed):
    choose = random.Random(seed)
    prompts = [[5, 7, 9, 11, 13, 15, 17], [21], [31, 32, 33, 34, 35, 36, 37, 38, 39, 41, 42, 43]]
    params = [SamplingParams(), replace(SAMPLING, seed=seed), replace(SAMPLING, seed=seed, branch=1, top_k=9)]
    expected = [generate(runner(), 6, tokens=p, params=q) for p, q in zip(prompts, params, strict=True)]
    run = runner()
    logs, incarnation = [list(p) for p in prompts], [0, 0, 0]
    for _ in range(1000):
        open_rows = [row for row in range(3) if len(logs[row]) < len(prompts[row]) + 6]
        if not open_rows:
            break
        admits, works, releases = [], [], []
        for row in choose.sample(open_rows, choose.randint(1, len(open_rows))):
            blocks: list[int] = []
            if not run.table.is_held[row]:
                incarnation[row] += 1
                admits.append(
                    admission(row, logs[row], len(prompts[row]), params=params[row], incarnation=incarnation[row])
                )
                blocks = blocks_of(row)
            known = len(logs[row]) - (int(run.table.computed[row]) if not blocks else 0)
            query = choose.randint(1, known)
            works.append(work(row, query, blocks, samples=query == known, incarnation=incarnation[row]))
            if choose.random() < 0.15:
                releases.append(row)
        for result in step(run, *works, admit=admits, release=releases):
            logs[result.row] += result.ids
    assert [log[len(p) :] for log, p in zip(logs, prompts, strict=True)] == expected


def scores_of(prompt: list[int]) -> list[float]:
    """Log-probability of every id of a prompt but the first, in float64."""
    logs = [logits_after(prompt[:at]).double().log_softmax(-1) for at in range(1, len(prompt))]
    return [float(log[token_id]) for log, token_id in zip(logs, prompt[1:], strict=True)]


@pytest.mark.parametrize("chunk", [1, 3, 5, 99])
def test_a_prompts_logprobs_are_those_of_the_model_however_it_is_cut(chunk: int) -> None:
    prompt, a = [5, 9, 13, 44, 2, 30, 31, 8], runner()
    params = SamplingParams(top_n=2)
    got: list[float] = []
    tops: list[tuple[list[int], list[float]]] = []
    for start in range(0, len(prompt), chunk):
        samples = start + chunk >= len(prompt)
        admit = [admission(0, prompt, params=params, prompt_logprobs_from=1)] if start == 0 else []
        blocks = blocks_of(0) if start == 0 else []
        row = step(a, work(0, chunk if not samples else 99, blocks, samples=samples), admit=admit)[0]
        if row.prompt is not None:
            got += row.prompt.logprobs
            tops += row.prompt.top
    assert got == pytest.approx(scores_of(prompt), abs=1e-5)
    best = [logits_after(prompt[:at]).topk(2).indices.tolist() for at in range(1, len(prompt))]
    assert [ids for ids, _ in tops] == best
    assert step(a, work(0))[0].prompt is None


def test_prompt_logprobs_begin_where_they_are_asked_for_and_cost_others_nothing() -> None:
    prompt, a = [5, 9, 13, 44], runner()
    admit = [admission(0, prompt, prompt_logprobs_from=3), admission(1, prompt)]
    asked, other = step(a, work(0, 9, blocks_of(0)), work(1, 9, blocks_of(1)), admit=admit)
    assert asked.prompt is not None
    assert asked.prompt.logprobs == pytest.approx(scores_of(prompt)[2:], abs=1e-5)
    assert other.prompt is None
    assert asked.ids == other.ids == greedy(prompt, 1)


def test_no_sequence_ends_before_it_is_long_enough() -> None:
    bias = SamplingParams(logit_bias=((EOS[0], 90.0),))
    assert generate(runner(), 3, tokens=[4, 8], params=bias)[0] == EOS[0]
    ids = generate(runner(), 4, tokens=[4, 8], params=replace(bias, min_new_tokens=3))
    assert not set(ids[:3]) & set(EOS)
    assert ids[3] == EOS[0]
