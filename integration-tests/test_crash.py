"""A shard, a router or the launcher dies or hangs in the middle; no client notices."""

import contextlib
import os
import random
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import LLAMA
from support.load import Crowd, alone, assert_same, midway, mixed_cases
from support.server import Server, wait_until

# Long enough that each stream has 64 tokens to go when a kill strikes, though some are ahead of others.
LENGTH = 256
CASES = mixed_cases(32, max_new_tokens=LENGTH)


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, list]]:
    """A server and the golden answers of all cases: those of an undisturbed run."""
    faults = tmp_path_factory.mktemp("faults") / "fault"
    flags = ("--dtype", "float32", "--num-shard", str(request.param))
    with Server(LLAMA, *flags, env={"FAULT_FILE": str(faults)}) as server:
        yield server, Crowd(server, CASES).join()


def assert_recovered(server: Server, crowd: Crowd, golden: list, before: dict, emitted: list[int], what: str) -> dict:
    """All streams went on over the same connection, to the same end, in a later generation."""
    answers = crowd.join()
    assert_same(answers, golden, what)
    assert all(len(a.events) > n for a, n in zip(answers, emitted, strict=True))
    after = server.wait_clean()
    assert after["generation"] > before["generation"] and after["epoch"] > before["epoch"]
    return after


@pytest.mark.parametrize("rank", range(2))
def test_a_killed_shard_is_replaced_and_every_stream_goes_on(served: tuple[Server, list], rank: int) -> None:
    server, golden = served
    rng = random.Random(rank)
    before = server.wait_clean()
    if rank >= len(before["ranks"]):
        return  # Of one rank, one kill is as good as another.
    crowd, _ = midway(server, CASES, LENGTH - 64, least=1 + rng.randrange(20))
    time.sleep(rng.random() * 0.05)
    victim = before["ranks"][rank]
    emitted = crowd.num_emitted()
    os.kill(victim["process_id"], signal.SIGKILL)
    after = assert_recovered(server, crowd, golden, before, emitted, f"rank {victim['rank']} killed")
    assert after["ranks"][victim["rank"]]["process_id"] != victim["process_id"]
    survivors = [r for r in before["ranks"] if r["rank"] != victim["rank"]]
    assert all(after["ranks"][r["rank"]]["process_id"] == r["process_id"] for r in survivors), "survivors keep going"


@pytest.mark.parametrize("point", ["all_reduce", "step", "sample"])
def test_a_shard_that_dies_at_a_given_point_changes_nothing(served: tuple[Server, list], point: str) -> None:
    server, golden = served
    before = server.wait_clean()
    if point == "all_reduce" and len(before["ranks"]) == 1:
        return  # One rank reduces nothing.
    rank = len(before["ranks"]) - 1 if point != "sample" else 0
    crowd, emitted = midway(server, CASES, LENGTH - 64)
    fault = Path(server.env["FAULT_FILE"])
    fault.with_suffix(".new").write_text(f"rank={rank} point={point} count=7 action=kill\n")
    fault.with_suffix(".new").rename(fault)
    assert_recovered(server, crowd, golden, before, emitted, f"killed at {point}")
    assert not fault.exists(), "the fault struck"


def test_a_shard_that_hangs_is_replaced_even_if_it_wakes_up_later(served: tuple[Server, list]) -> None:
    server, golden = served
    before = server.wait_clean()
    victim = before["ranks"][-1]
    crowd, emitted = midway(server, CASES, LENGTH - 64)
    process = psutil.Process(victim["process_id"])
    process.suspend()
    wait_until(lambda: not server.is_ready(), 15, "the hang is noticed")
    wait_until(lambda: server.is_ready(), 60, "a replacement serves")
    if process.is_running():
        process.resume()
    assert_recovered(server, crowd, golden, before, emitted, "a hang")


def test_a_pause_of_a_second_is_not_a_hang(served: tuple[Server, list]) -> None:
    server, golden = served
    before = server.wait_clean()
    crowd, _ = midway(server, CASES, LENGTH - 64)
    process = psutil.Process(before["ranks"][0]["process_id"])
    process.suspend()
    time.sleep(1)
    process.resume()
    assert_same(crowd.join(), golden, "a pause")
    assert server.wait_clean()["generation"] == before["generation"]


def test_two_deaths_in_one_answer_change_nothing(served: tuple[Server, list]) -> None:
    server, golden = served
    before = server.wait_clean()
    crowd, emitted = midway(server, CASES, LENGTH - 64)
    os.kill(server.rank_pid(0), signal.SIGKILL)
    wait_until(lambda: server.state()["generation"] > before["generation"] and server.is_ready(), 60, "recovered once")
    grown = crowd.num_emitted()
    wait_until(lambda: all(a > b for a, b in zip(crowd.num_emitted(), grown, strict=True)), 60, "each emitted more")
    os.kill(server.rank_pid(0), signal.SIGKILL)
    assert_recovered(server, crowd, golden, before, emitted, "two deaths")


def test_an_idle_shard_that_dies_is_replaced_and_the_next_request_is_right(served: tuple[Server, list]) -> None:
    server, golden = served
    before = server.wait_clean()
    os.kill(before["ranks"][0]["process_id"], signal.SIGKILL)
    wait_until(lambda: not server.is_ready(), 5, "readiness is false")
    assert server.get("/livez")[0] == 200
    crowd = Crowd(server, CASES[:2])
    assert_same(crowd.join(), golden[:2], "asked while no shard was there")
    wait_until(lambda: server.is_ready(), 60, "ready again")


def test_a_router_killed_between_two_ranks_is_started_again(tmp_path: Path) -> None:
    fault = tmp_path / "router-fault"
    cases = mixed_cases(4, max_new_tokens=40)
    with Server(LLAMA, "--dtype", "float32", "--num-shard", "2", env={"ROUTER_FAULT_FILE": str(fault)}) as server:
        golden = alone(server, cases)
        before = server.wait_clean()
        router = server.router_pid()
        fault.with_suffix(".new").write_text("point=between_ranks count=20 action=kill\n")
        fault.with_suffix(".new").rename(fault)
        # The connection breaks in one way or another.
        with contextlib.suppress(Exception):
            server.stream(cases[0].inputs, **dict(cases[0].parameters))
        assert not fault.exists(), "the router struck itself"
        server.wait_ready()
        assert server.router_pid() != router
        after = server.wait_clean()
        assert [r["process_id"] for r in after["ranks"]] == [r["process_id"] for r in before["ranks"]]
        assert after["epoch"] > before["epoch"]
        assert_same(alone(server, cases), golden, "after the router died")


def test_a_killed_launcher_leaves_nothing_behind() -> None:
    server = Server(LLAMA, "--dtype", "float32", "--num-shard", "2")
    with server:
        server.remember()
        assert server.process is not None
        server.process.kill()
        server.process.wait()
        server.assert_gone(timeout_s=5)


def read_digests(directory: Path) -> list[tuple[str, str]]:
    """(the log a row was sampled after, its raw logits), of every sampled id, as digests."""
    pairs = []
    for path in sorted(directory.iterdir()):
        pairs += [tuple(line.split()) for line in path.read_text().splitlines() if len(line.split()) == 2]
    return pairs


# Four minutes for all of them; `make test-full` runs them all.
BITS = [("bfloat16", 2), ("float32", 1), ("float32", 2), ("bfloat16", 1)]
# Shorter, since one of the ways holds few sequences at a time.
BITS_LENGTH = 192
NUM_BITS = len(BITS) if os.environ.get("FULL") else 2


@pytest.mark.parametrize(("dtype", "num_shard"), BITS[:NUM_BITS])
def test_the_logits_of_a_row_have_the_same_bits_in_all_circumstances(
    dtype: str, num_shard: int, tmp_path: Path
) -> None:
    cases = mixed_cases(32, max_new_tokens=BITS_LENGTH)
    few = cases[:4]
    steps = ("--max-batch-size", "32", "--max-batch-prefill-tokens")
    seen: dict[str, dict[str, str]] = {}
    taken: Counter[tuple[str, str]] = Counter()

    def serve(*flags: str) -> Server:
        common = ("--dtype", dtype, "--num-shard", str(num_shard))
        return Server(LLAMA, *common, *flags, env={"LOGITS_DIGEST_DIR": str(tmp_path)})

    def take(name: str, server: Server) -> None:
        """What was sampled since the last time."""
        server.wait_clean()
        found = Counter(read_digests(tmp_path))
        seen[name] = {}
        for log, digest in found - taken:
            assert seen[name].setdefault(log, digest) == digest, f"{name} alone gives two different rows for one log"
        taken.update(found - taken)

    with serve(*steps, "512") as server:
        golden = alone(server, few)
        take("alone", server)
        assert_same(alone(server, few), golden, "after a prefix hit")
        take("hit", server)
        crowd, _ = midway(server, cases, BITS_LENGTH - 64, least=4)
        os.kill(server.rank_pid(num_shard - 1), signal.SIGKILL)
        assert_same(crowd.join()[: len(few)], golden, "killed")
        take("killed", server)
    with serve(*steps, "32", "--max-batch-total-tokens", "1536", "--max-total-tokens", "512") as server:
        # Another process; chunks of at most 32 tokens among 31 others, and too few blocks for all.
        answers = Crowd(server, cases).join()
        assert_same(answers[: len(few)], golden, "among 31 others, chunked and preempted")
        take("crowd", server)

    rows = defaultdict(set)
    for name in seen:
        for log, digest in seen[name].items():
            rows[log].add(digest)
    different = sum(len(digests) > 1 for digests in rows.values())
    assert not different, f"{different} of {len(rows)} rows have different bits"
    assert len(seen["alone"]) >= len(few) * BITS_LENGTH
    for name in seen:
        assert seen["alone"].keys() <= seen[name].keys(), f"{name} computed all the rows that were computed alone"
