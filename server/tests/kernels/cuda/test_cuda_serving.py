"""A whole rank on an emulated GPU: loading, warm-up, steps that begin ahead, recorded or not."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from emulated import emulator
from harness import LLAMA, MODELS
from text_generation_server import shard as shard_module
from text_generation_server.ahead import RunnerAhead
from text_generation_server.config import ServeConfig
from text_generation_server.errors import ConfigError
from text_generation_server.health import Health
from text_generation_server.kernels.cuda.emulation.emulator import EmulatedStreams
from text_generation_server.kernels.cuda.kernels import CudaKernels
from text_generation_server.kernels.cuda.steps import contexts_of
from text_generation_server.planning import plan_model
from text_generation_server.runner import Admission, Plan, Result, RowResult, Runner, Work
from text_generation_server.sampling.grammar import REGEX, Grammar
from text_generation_server.sampling.params import SamplingParams
from text_generation_server.shard import Limits, Shard
from tokenizers import Tokenizer

LIMITS = Limits(block_size=16, max_running=4, max_step_tokens=32, max_total_tokens=300)


def started(folder: Path, sizes: tuple[int, ...], model: Path = LLAMA) -> Shard:
    """A rank of a model on the device that `select_kernels` finds. sizes: those that are recorded."""
    config = ServeConfig(
        model_dir=model, rank=0, world_size=1, uds_path=folder / "s", num_threads=1, memory_bytes=1 << 30,
        dtype="bfloat16", quantize=None, gptq_bits=None, gptq_groupsize=None, device="cuda", instruction_set=None,
        kernel_cache=None, exit_with_stdin=False, logits_digest_dir=None, fault_file=folder / "fault",
        recorded_sizes=sizes,
    )  # fmt: skip
    shard = Shard(config, plan_model(model, world_size=1, dtype="bfloat16", device="cuda"), Health())
    assert shard.join(1, str(folder / "rendezvous"), 5, lambda: True)
    return shard


@pytest.fixture
def start(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Shard]:
    """Starts a rank on an emulated GPU."""
    kernels = CudaKernels(emulator(pytestconfig))
    monkeypatch.setattr(shard_module, "select_kernels", lambda *_: kernels)
    return partial(started, tmp_path)


def answers(shard: Shard, plans: list[Plan]) -> list[Result]:
    results = []
    for plan in plans:
        results += shard.step(plan)
    while shard.num_open:
        if (result := shard.finish_if_done()) is not None:
            results.append(result)
    return results


def admission(row: int, tokens: list[int], params: SamplingParams, **other: Any) -> Admission:
    return Admission(row, row, 1, tokens, len(tokens), 0, params, **other)


def served(prompts: list[list[int]], hows: list[dict[str, Any]], count: int) -> list[Plan]:
    """All prompts at once, the first of them in two parts; then ids one by one."""
    admit = [admission(i, ids, **how) for i, (ids, how) in enumerate(zip(prompts, hows, strict=True))]
    blocks = [list(range(4 * i, 4 * i + -(-len(ids) // 16))) for i, ids in enumerate(prompts)]
    first = [Work(0, 1, 3, 0, blocks[0])]
    first += [Work(i, 1, len(ids), 1, blocks[i]) for i, ids in enumerate(prompts) if i]
    plans = [Plan(1, 1, [], admit, first)]
    lengths = [len(ids) for ids in prompts]
    for step in range(2, count + 2):
        works = []
        for i in range(len(prompts)):
            if step > 2 or i:
                lengths[i] += 1
            new = [blocks[i][0] + (lengths[i] - 1) // 16] if (lengths[i] - 1) % 16 == 0 and lengths[i] > 16 else []
            works.append(Work(i, 1, lengths[0] - 3 if step == 2 and not i else 1, 1, new))
        plans.append(Plan(1, step, [], [], works))
    return plans


def rows_of(results: list[Result]) -> list[list[RowResult]]:
    return [result.rows for result in results]


def check_ids(results: list[Result], references: list[dict[str, Any]]) -> None:
    """Ids and log-probabilities are those of transformers in float32, up to where two ids are as likely in bfloat16."""
    num_alike, num_ids = 0, 0
    for i, reference in enumerate(references):
        found = [row for step in rows_of(results) for row in step if row.row == i and row.ids]
        num_ids += len(found)
        for row, token_id, logprob in zip(found, reference["generated_ids"], reference["logprobs"], strict=False):
            assert row.logprobs[0] == pytest.approx(logprob, abs=0.15)
            if row.ids[0] != token_id:
                break
            num_alike += 1
    assert num_alike >= 0.6 * num_ids > 0


@pytest.mark.parametrize("name", ["docs-llama-7m", "docs-llama-7m-gptq-4bit-g128"])
def test_ids_are_those_of_transformers(name: str, start: Callable[..., Shard]) -> None:
    shard = start((1, 2), MODELS / name)
    # Of everything that the memory has, as many blocks as the limits can use.
    assert shard.measure_blocks(LIMITS) == 4 * 19
    shard.allocate(4 * 19, LIMITS)
    assert isinstance(shard.runner, RunnerAhead)
    chosen = json.loads((MODELS / name / "reference.json").read_text())["greedy"][:2]
    results = answers(shard, served([r["prompt_ids"] for r in chosen], [{"params": SamplingParams()}] * 2, 6))
    check_ids(results, chosen)
    assert shard.health.step == 7
    assert shard.health.num_rows == 2


PROMPTS = [[1, 706, 271, 3057, 939, 1367, 1395], [1, 300, 271], list(range(300, 317))]
DEVICE = [
    {"params": SamplingParams()},
    {"params": SamplingParams(do_sample=True, seed=3, temperature=1.3, top_k=40, top_p=0.9)},
    {"params": SamplingParams(do_sample=True, seed=4)},
]


def test_recorded_steps_give_the_bits_of_others_and_of_steps_one_after_another(start: Callable[..., Shard]) -> None:
    found = []
    for sizes in ((1, 4), ()):
        shard = start(sizes)
        shard.allocate(16, LIMITS)
        found.append(rows_of(answers(shard, served(PROMPTS, DEVICE, 5))))
    assert found[0] == found[1]
    shard = start(())
    shard.allocate(16, LIMITS)
    ahead = shard.runner
    assert isinstance(ahead, RunnerAhead)
    plain = Runner(shard.forward, shard.group, ahead.cache, ahead.table, (2, 6), shard.faults)
    one_by_one = [plain.step(plan).rows for plan in served(PROMPTS, DEVICE, 5)]
    # Sums of exponentials are in another order there.
    assert [[(row.ids, row.computed) for row in step] for step in one_by_one] == [
        [(row.ids, row.computed) for row in step] for step in found[0]
    ]
    for step, others in zip(one_by_one, found[0], strict=True):
        for row, other in zip(step, others, strict=True):
            assert row.logprobs == pytest.approx(other.logprobs, abs=2e-5)


def test_rows_that_need_the_host_are_drawn_there_beside_others(start: Callable[..., Shard]) -> None:
    shard = start((1, 4))
    shard.allocate(16, LIMITS)
    hows = [
        {"params": SamplingParams(top_n=2), "prompt_logprobs_from": 1},
        {"params": SamplingParams(repetition_penalty=1.3)},
        {"params": SamplingParams(), "grammar": Grammar(REGEX, "[a-c]{20}")},
    ]
    results = rows_of(answers(shard, served(PROMPTS, hows, 4)))
    assert all(row.fault is None for step in results for row in step)
    assert sum(len(row.prompt.logprobs) for step in results for row in step if row.prompt) == len(PROMPTS[0]) - 1
    assert results[-1][0].top is not None
    tokenizer = Tokenizer.from_file(str(LLAMA / "tokenizer.json"))
    texts = [tokenizer.decode(row.ids) for step in results for row in step if row.row == 2]
    assert set("".join(texts).replace(" ", "")) <= set("abc")


def test_logits_that_are_not_finite_end_their_row_alone(start: Callable[..., Shard], tmp_path: Path) -> None:
    shard = start((1, 4))
    shard.allocate(16, LIMITS)
    wanted = rows_of(answers(shard, served(PROMPTS, DEVICE, 3)))
    shard.allocate(16, LIMITS)
    (tmp_path / "fault").write_text("rank=0 point=sample count=2 action=nan\n")
    found = rows_of(answers(shard, served(PROMPTS, DEVICE, 3)))
    assert [step[0].fault is None for step in found] == [True, False, False, False]
    assert [step[1:] for step in found] == [step[1:] for step in wanted]


def test_what_recorded_steps_take_is_taken_from_the_cache(start: Callable[..., Shard]) -> None:
    shard = start((1, 2))

    class Shrinking(EmulatedStreams):
        """A device that has a megabyte less each time that something was recorded."""

        def memory(self) -> tuple[int, int]:
            return 40_000_000 - 1_000_000 * self.num_records, 0

    blocks = []
    backend: Any = shard.kernels._backend  # type: ignore[attr-defined]
    old = backend.streams
    try:
        for sizes in ((), (1, 2)):
            shard.config = replace(shard.config, recorded_sizes=sizes)
            backend.streams = Shrinking()
            blocks.append(shard.measure_blocks(replace(LIMITS, max_running=1000)))
    finally:
        backend.streams = old
    block_bytes = shard.model.cache_spec.bytes_per_token * 16
    assert blocks[0] == 40_000_000 // block_bytes
    # Two are recorded to learn what they take, and are gone; as many will be.
    assert blocks[1] == (40_000_000 - 2_000_000) // block_bytes


def test_weights_that_do_not_fit_on_the_device_are_refused_before_they_are_read(
    start: Callable[..., Shard], pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emulator(pytestconfig).streams, "total_bytes", 13_000_000)
    with pytest.raises(ConfigError, match=r"rank 0 take 13\.6 MB, and 13\.0 MB are free on its device"):
        start(())


def test_contexts_grow_until_the_longest() -> None:
    assert contexts_of(300) == [300]
    assert contexts_of(2048) == [1024, 2048]
    assert contexts_of(131072) == [1024, 4096, 16384, 65536, 131072]
