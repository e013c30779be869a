"""Real shard processes behind real sockets: what the router may rely on."""

import json
import signal
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from step_client import GREEDY, LLAMA, QWEN2, Process, Sequence_, Shards, admit, generate, work
from text_generation_server.pb import shard_pb2 as pb

PROMPT = [1, 706, 271, 3057, 939, 1367, 1395]
OTHERS = [[1, 300 + i, 271, *range(500 + i, 500 + 2 * i)] for i in range(7)]
SAMPLED = pb.Sampling(
    do_sample=True, temperature=1.2, top_k=60, top_p=0.95, typical_p=1, repetition_penalty=1.2, frequency_penalty=0.3,
    seed=1 << 40,
)  # fmt: skip
PLAIN = pb.Sampling(do_sample=True, temperature=0.9, top_p=1, typical_p=1, repetition_penalty=1, seed=77)
# Two ids after each other, and after the second one perhaps the end.
LETTERS = {
    "start": 0,
    "transitions": [[0, 20, 1], [0, 21, 1], [1, 30, 0], [1, 31, 2], [1, 32, 0], [2, 9, 0]],
    "final": [2],
}
TOY = pb.Grammar(kind=pb.Grammar.AUTOMATON, source=json.dumps(LETTERS))


GROUPS: dict[str, tuple[Path, int, str]] = {
    "llama-1": (LLAMA, 1, "float32"),
    "llama-2": (LLAMA, 2, "float32"),
    "qwen2-1": (QWEN2, 1, "float32"),
    "qwen2-2": (QWEN2, 2, "float32"),
    "llama-2-bfloat16": (LLAMA, 2, "bfloat16"),
}


@pytest.fixture(scope="module")
def park() -> Iterator[dict[str, Shards]]:
    """The groups of processes that the tests share, by name, as far as they have been asked for."""
    shards: dict[str, Shards] = {}
    yield shards
    for group in shards.values():
        group.__exit__(None, None, None)


@pytest.fixture
def fresh(park) -> Callable[[str], Shards]:
    """A group by its name, in a new epoch, whatever a test before has left."""

    def start(name: str) -> Shards:
        if name not in park:
            park[name] = Shards(*GROUPS[name])
        park[name].start()
        park[name].forget_digests()
        return park[name]

    return start


def mixed(base: int = 0) -> list[Sequence_]:
    """Greedy, sampled, constrained: one of each kind, and neighbours."""
    return [
        Sequence_(base, PROMPT),
        Sequence_(base + 1, PROMPT, {"sampling": SAMPLED}),
        Sequence_(base + 2, OTHERS[2], {"sampling": PLAIN}),
        Sequence_(base + 3, OTHERS[6], {"sampling": SAMPLED, "grammar": TOY}),
        Sequence_(base + 4, OTHERS[1], {"grammar": TOY}),
    ]


def ids_of(sequences: list[Sequence_]) -> list[list[int]]:
    return [s.ids for s in sequences]


def undisturbed(shards: Shards, count: int) -> list[list[int]]:
    """What the mixed sequences yield, each alone, one plan at a time."""
    sequences = mixed()
    for sequence in sequences:
        generate(shards, [sequence], count)
    return ids_of(sequences)


def assert_digests_agree(shards: Shards) -> None:
    """The same log had the same logits, to the bit, whenever and wherever it was computed."""
    known: dict[str, str] = {}
    digests = shards.digests()
    for log, logits in digests:
        assert known.setdefault(log, logits) == logits
    assert len(known) < len(digests), "nothing was computed twice, so nothing was compared"


def assert_obeys(ids: list[int]) -> None:
    """The ids follow LETTERS, and after an end there are only ends."""
    ways = {(state, token_id): following for state, token_id, following in LETTERS["transitions"]}
    state = 0
    for at, token_id in enumerate(ids):
        if state == 2 and token_id in (2, 6):
            assert set(ids[at:]) <= {2, 6}
            return
        assert (state, token_id) in ways, (state, token_id)
        state = ways[state, token_id]


def refused(call: Callable[[], Any], code: grpc.StatusCode, message: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert (caught.value.code(), message in caught.value.details()) == (code, True), caught.value


# --- numbers


@pytest.mark.parametrize(
    ("name", "model"), [("llama-1", LLAMA), ("llama-2", LLAMA), ("qwen2-1", QWEN2), ("qwen2-2", QWEN2)]
)
def test_greedy_ids_and_logprobs_of_eight_mixed_sequences_are_those_of_transformers(fresh, name, model):
    references = json.loads((model / "reference.json").read_text())["greedy"]
    sequences = [Sequence_(row, r["prompt_ids"]) for row, r in enumerate(references)]
    generate(fresh(name), sequences, 64, depth=2)
    for sequence, reference in zip(sequences, references, strict=True):
        count = len(reference["generated_ids"])
        assert sequence.ids[:count] == reference["generated_ids"]
        assert sequence.logprobs[:count] == pytest.approx(reference["logprobs"], abs=1e-3)


@pytest.mark.parametrize("name", ["llama-1", "llama-2", "qwen2-1", "llama-2-bfloat16"])
def test_chunks_neighbours_depth_and_preemption_change_no_bit(fresh, name):
    shards = fresh(name)
    expected = undisturbed(shards, 24)
    together = mixed()
    generate(shards, together, 24, depth=2)
    assert ids_of(together) == expected
    preempted = mixed(3)[::-1]
    for count in (1, 7, 16):
        generate(shards, preempted, count, depth=2)
    assert ids_of(preempted[::-1]) == expected
    assert {s.incarnation for s in preempted} == {3}
    (chunked,) = [Sequence_(2, OTHERS[6], {"sampling": SAMPLED, "grammar": TOY})]
    steps = [chunked.admit()]
    for _ in range(len(OTHERS[6]) // 4):
        (result,) = shards.run(
            admit=steps, work=[chunked.first(4, samples=False) if steps else chunked.next(4, samples=False)]
        )
        chunked.take(result)
        steps = []
    (result,) = shards.run(work=[chunked.next(4)], release=[2])
    chunked.take(result)
    assert chunked.ids == expected[3][:1]
    assert_digests_agree(shards)


def test_a_prompt_computed_after_cached_blocks_yields_the_same(fresh):
    shards, prompt = fresh("llama-2"), [1, *range(100, 139)]
    (first,) = shards.run(admit=[admit(0, prompt)], work=[work(0, 64, [5, 6, 7])])
    (second,) = shards.run(admit=[admit(1, prompt, cached_len=32)], work=[work(1, 64, [5, 6, 9])], release=[0, 1])
    assert (second.ids, second.logprobs, second.computed) == (first.ids, first.logprobs, 40)
    assert_digests_agree(shards)


def test_a_constraint_is_obeyed_at_depth_two(fresh):
    sequences = mixed()
    generate(fresh("llama-2"), sequences, 40, depth=2)
    for sequence in sequences[3:]:
        assert_obeys(sequence.ids)


# --- faults of one row


def test_a_row_that_is_not_finite_ends_alone(fresh):
    shards = fresh("llama-2")
    first, second = Sequence_(0, PROMPT), Sequence_(1, OTHERS[2])
    alone = Sequence_(1, OTHERS[2])
    generate(shards, [alone], 6)
    shards.fault("rank=0 point=sample count=3 action=nan")
    healthy = []
    for i in range(6):
        if i == 0:
            shards.send(admit=[first.admit(), second.admit()], work=[first.first(), second.first()])
        else:
            shards.send(work=[first.next(), second.next()])
        broken, fine = shards.receive()
        healthy += fine.ids
        assert broken.HasField("error") == (i >= 2)
        assert (broken.error.kind == pb.RowError.NUMERICAL, len(broken.ids)) == ((True, 0) if i >= 2 else (False, 1))
    assert healthy == alone.ids


@pytest.mark.parametrize(
    ("other", "kind", "message"),
    [
        ({"grammar": pb.Grammar(kind=pb.Grammar.REGEX, source="(")}, pb.RowError.GRAMMAR, "invalid regex"),
        ({"grammar": pb.Grammar(kind=pb.Grammar.JSON_SCHEMA, source="[]")}, pb.RowError.GRAMMAR, ""),
        ({"grammar": pb.Grammar(kind=pb.Grammar.AUTOMATON, source="{")}, pb.RowError.GRAMMAR, "not JSON"),
        ({"adapter": "french"}, pb.RowError.UNSUPPORTED, "adapter"),
        ({"spans": [pb.Span(start=0, len=1)]}, pb.RowError.UNSUPPORTED, "not text"),
        ({"sampling": pb.Sampling(do_sample=True)}, pb.RowError.UNSUPPORTED, "temperature"),
    ],
    ids=str,
)
def test_what_is_not_served_is_an_error_of_its_row(fresh, other, kind, message):
    shards = fresh("llama-1")
    rows = shards.run(
        admit=[admit(0, PROMPT, **other), admit(1, PROMPT)], work=[work(0, 9, [0]), work(1, 9, [1])], release=[0, 1]
    )
    assert (rows[0].error.kind, message in rows[0].error.message) == (kind, True), rows[0]
    assert len(rows[1].ids) == 1
    assert not rows[1].HasField("error")


def test_a_grammar_is_made_ready_or_refused_before_it_is_admitted(fresh):
    (process,) = fresh("llama-1").processes
    schema = json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}})
    for kind, source, error in [
        (pb.Grammar.JSON_SCHEMA, schema, ""),
        (pb.Grammar.REGEX, "[ab]+", ""),
        (pb.Grammar.REGEX, "(?=a)b", "invalid regex"),
        (pb.Grammar.JSON_SCHEMA, '{"enum": []}', "Unsatisfiable"),
        (pb.Grammar.AUTOMATON, "{", ""),
    ]:
        reply = process.stub.Prepare(pb.Grammar(kind=kind, source=source), timeout=20)
        assert error in reply.error
        assert bool(reply.error) == bool(error), reply


# --- epochs


def test_epochs_only_rise_and_calls_belong_to_the_current_one(fresh):
    shards = fresh("llama-1")
    (process,), epoch = shards.processes, shards.epoch
    for lower in (epoch, epoch - 1, 0):
        refused(
            lambda e=lower: process.stub.Join(shards.join_request(e, 0)),
            grpc.StatusCode.FAILED_PRECONDITION,
            f"epoch {lower} is not above {epoch}",
        )
    wrong_rank = pb.JoinRequest(epoch=epoch + 1, rank=1, world_size=2, rendezvous="x")
    refused(lambda: process.stub.Join(wrong_rank), grpc.StatusCode.INVALID_ARGUMENT, "this is rank 0 of 1, not 1 of 2")
    for wrong in (epoch - 1, epoch + 1):
        refused(lambda e=wrong: shards.warm_up(8, e), grpc.StatusCode.FAILED_PRECONDITION, f"Warmup of epoch {wrong}")
    refused(lambda: next(process.stub.Run(iter([]))), grpc.StatusCode.FAILED_PRECONDITION, "has a stream already")
    # None of this has harmed the stream.
    generate(shards, [Sequence_(0, PROMPT)], 2)


def test_a_plan_of_another_epoch_ends_the_stream(fresh):
    shards = fresh("llama-1")
    shards.epoch += 1
    shards.send(admit=[admit(0, PROMPT)], work=[work(0, 9, [0])])
    refused(shards.receive, grpc.StatusCode.INTERNAL, f"a plan of epoch {shards.epoch} on a stream of epoch")
    shards.start()
    generate(shards, [Sequence_(0, PROMPT)], 2)


def test_run_comes_after_join_and_warmup(fresh):
    shards = fresh("llama-1")
    (process,) = shards.processes
    shards.join()
    refused(lambda: next(process.stub.Run(iter([]))), grpc.StatusCode.FAILED_PRECONDITION, "after Join and Warmup")


@pytest.mark.parametrize("how", ["end_streams", "cancel_streams"])
def test_a_stream_that_ends_drops_everything_and_the_next_join_works(fresh, how):
    shards = fresh("llama-2")
    sequences = mixed()
    shards.run(admit=[s.admit() for s in sequences], work=[s.first() for s in sequences])
    assert [p.health().num_rows for p in shards.processes] == [5, 5]
    assert {p.health().phase for p in shards.processes} == {pb.HealthReply.SERVING}
    getattr(shards, how)()
    for process in shards.processes:
        assert process.wait_for(pb.HealthReply.LOADED, timeout_s=10).num_rows == 0
    refused(lambda: shards.warm_up(8), grpc.StatusCode.FAILED_PRECONDITION, "but this rank has joined None")
    shards.start()
    generate(shards, [Sequence_(0, PROMPT)], 2)


def test_a_join_that_waits_for_a_rank_gives_way_to_a_higher_one(fresh):
    shards = fresh("llama-2")
    lonely = shards.processes[0].stub.Join.future(shards.join_request(shards.epoch + 1, 0))
    shards.processes[0].wait_for(pb.HealthReply.JOINING, timeout_s=10)
    started = time.monotonic()
    shards.join(timeout_s=10)
    assert time.monotonic() - started < 5
    refused(lonely.result, grpc.StatusCode.FAILED_PRECONDITION, "was overtaken by")


def test_a_join_whose_caller_is_gone_is_given_up(fresh):
    shards = fresh("llama-2")
    lonely = shards.processes[0].stub.Join.future(shards.join_request(shards.epoch + 1, 0))
    shards.processes[0].wait_for(pb.HealthReply.JOINING, timeout_s=10)
    lonely.cancel()
    assert "gave up joining" in shards.processes[0].wait_for(pb.HealthReply.LOADED, timeout_s=10).detail


def test_a_block_id_that_only_one_rank_was_told_is_seen_at_once(fresh):
    shards = fresh("llama-2")
    for rank, q in enumerate(shards.queues):
        q.put(pb.StepPlan(epoch=shards.epoch, step=1, admit=[admit(0, PROMPT)], work=[work(0, 9, [rank])]))
    first, second = (next(stream) for stream in shards.streams)
    assert first.table_digest != second.table_digest


# --- death


def test_a_rank_killed_inside_a_collective_is_replaced_and_all_sequences_go_on_alike(fresh):
    shards = fresh("llama-2")
    expected = undisturbed(shards, 24)
    sequences = mixed()
    generate(shards, sequences, 5, depth=2)
    survivor = shards.processes[0].popen.pid
    # Thirteen sums to a step: the fourth step from now, in the middle of the layers.
    shards.fault("rank=1 point=all_reduce count=45 action=kill")
    with pytest.raises(grpc.RpcError):
        generate(shards, sequences, 19, depth=2)
    assert 5 < len(sequences[0].ids) < 24
    started = time.monotonic()
    shards.processes[0].wait_for(pb.HealthReply.LOADED, timeout_s=10)
    assert time.monotonic() - started < 10
    assert shards.processes[1].popen.wait(10) == -signal.SIGKILL
    shards.replace(1)
    shards.start()
    assert shards.processes[0].health().process_id == survivor
    generate(shards, sequences, 24 - len(sequences[0].ids), depth=2)
    assert ids_of(sequences) == expected
    for sequence in sequences[3:]:
        assert_obeys(sequence.ids)
    assert_digests_agree(shards)


def test_a_new_process_draws_the_same_ids(fresh, park):
    expected = undisturbed(fresh("llama-1"), 12)
    park["llama-1"].replace(0)
    sequences = mixed()
    generate(fresh("llama-1"), sequences, 12, depth=2)
    assert ids_of(sequences) == expected


def test_a_rank_that_waits_for_one_without_a_plan_is_released_by_the_end_of_the_streams(fresh):
    shards = fresh("llama-2")
    process_ids = [p.popen.pid for p in shards.processes]
    shards.queues[0].put(pb.StepPlan(epoch=shards.epoch, step=1, admit=[admit(0, PROMPT)], work=[work(0, 9, [0])]))
    deadline = time.monotonic() + 10
    while not (shards.processes[0].health().busy and shards.processes[0].health().waits):
        assert time.monotonic() < deadline
    assert not shards.processes[1].health().waits, "it has nothing to do"
    shards.cancel_streams()
    for process in shards.processes:
        process.wait_for(pb.HealthReply.LOADED, timeout_s=10)
    shards.start()
    generate(shards, [Sequence_(0, PROMPT)], 2)
    assert [p.popen.pid for p in shards.processes] == process_ids


def test_a_rank_that_waits_for_one_that_hangs_says_so_and_the_other_does_not(fresh, park):
    shards = fresh("llama-2")
    shards.fault("rank=1 point=all_reduce count=3 action=stall")
    shards.send(admit=[admit(0, PROMPT)], work=[work(0, 9, [0])])
    deadline = time.monotonic() + 10
    while not shards.processes[0].health().waits:
        assert time.monotonic() < deadline
    time.sleep(0.2)
    assert [(p.health().busy, p.health().waits) for p in shards.processes] == [(True, True), (True, False)]
    shards.cancel_streams()
    shards.processes[1].popen.kill()
    shards.replace(1)


def test_an_exception_on_one_rank_ends_both_streams_and_both_join_again(fresh):
    shards = fresh("llama-2")
    shards.fault("rank=1 point=all_reduce count=3 action=raise")
    shards.send(admit=[admit(0, PROMPT)], work=[work(0, 9, [0])])
    for stream in shards.streams:
        refused(lambda s=stream: next(s), grpc.StatusCode.INTERNAL, "")
    shards.start()
    generate(shards, [Sequence_(0, PROMPT)], 2)


# --- size, facts, signals


def test_memory_bounds_the_blocks(fresh):
    shards = fresh("llama-2")
    shards.join()
    measured = shards.warm_up(0)
    # Of two gigabytes there is more than eight sequences of 256 positions can use.
    assert measured == [8 * 256 // 16] * 2
    # Six layers, keys and values, one head of 64 numbers of four bytes on each rank.
    too_many = 2 * (1 << 30) // (6 * 2 * 64 * 4 * 16) + 1
    refused(lambda: shards.warm_up(too_many), grpc.StatusCode.RESOURCE_EXHAUSTED, "do not fit in the")


@pytest.mark.parametrize(
    ("name", "model", "dtype"), [("qwen2-2", QWEN2, "float32"), ("llama-2-bfloat16", LLAMA, "bfloat16")]
)
def test_a_shard_describes_its_model(fresh, name, model, dtype):
    config = json.loads((model / "config.json").read_text())
    replies = fresh(name).all("Describe", [pb.DescribeRequest()] * 2)
    for rank, reply in enumerate(replies):
        assert (reply.rank, reply.world_size, reply.device, reply.dtype) == (rank, 2, "cpu", dtype)
        assert (reply.model_type, reply.architecture) == (config["model_type"], config["architectures"][0])
        assert (reply.vocab_size, reply.max_positions) == (config["vocab_size"], config["max_position_embeddings"])
        # The ids that generation_config.json names, not config.json.
        assert list(reply.eos_token_ids) == [2, 6]
        width = {"float32": 4, "bfloat16": 2}[dtype]
        assert reply.kv_bytes_per_token == 2 * config["num_hidden_layers"] * 1 * 64 * width
        assert reply.num_cache_groups == 1
        assert reply.row_stable


def test_progress_counts_layers_and_the_step_is_the_last_completed_one(fresh):
    shards = fresh("llama-2")
    before = shards.processes[0].health()
    generate(shards, [Sequence_(0, PROMPT)], 3)
    after = shards.processes[0].health()
    assert after.progress - before.progress >= 3 * 6
    assert (after.step, after.epoch, after.busy, after.num_rows) == (shards.step, shards.epoch, False, 0)


@pytest.fixture
def starting(tmp_path) -> Iterator[Process]:
    """A process that has just been started."""
    process = Process(LLAMA, 0, 1, tmp_path)
    yield process
    process.kill()


def test_health_answers_before_torch_is_imported(starting):
    started = time.monotonic()
    health = starting.health()
    assert health.phase == pb.HealthReply.IMPORTING
    assert health.process_id == starting.popen.pid
    # A second on an idle machine.
    assert time.monotonic() - started < 5
    refused(lambda: starting.stub.Describe(pb.DescribeRequest()), grpc.StatusCode.UNAVAILABLE, "not loaded yet")
    assert stat.S_IMODE(starting.socket.stat().st_mode) == 0o600


def test_signals_print_the_stacks_of_all_threads_while_modules_are_imported(starting):
    starting.health()
    # A reader of stacks that does not hold the interpreter's lock dies of one in thirty.
    for _ in range(200):
        starting.popen.send_signal(signal.SIGUSR1)
        time.sleep(0.005)
    deadline = time.monotonic() + 10
    while "most recent call last" not in (log := starting.log.read_text()) or "service.py" not in log:
        assert time.monotonic() < deadline, log
        time.sleep(0.02)
    assert "MainThread" in log
    assert starting.popen.poll() is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_end_ends_a_process_that_loads(starting, number):
    starting.health()
    starting.popen.send_signal(number)
    assert starting.popen.wait(10) == 0


def test_the_end_of_standard_input_ends_the_process(starting):
    starting.health()
    starting.popen.stdin.close()
    assert starting.popen.wait(10) == 0


def test_sigterm_ends_a_rank_that_waits_in_a_collective(fresh):
    shards = fresh("llama-2")
    shards.queues[0].put(pb.StepPlan(epoch=shards.epoch, step=1, admit=[admit(0, PROMPT)], work=[work(0, 9, [0])]))
    time.sleep(0.5)
    shards.processes[0].popen.terminate()
    assert shards.processes[0].popen.wait(10) == 0
    shards.replace(0)


def test_a_greedy_row_needs_no_option_but_the_neutral_ones(fresh):
    sequences = [Sequence_(0, PROMPT, {"sampling": GREEDY}), Sequence_(1, PROMPT)]
    generate(fresh("llama-1"), sequences, 3)
    assert sequences[0].ids == sequences[1].ids
