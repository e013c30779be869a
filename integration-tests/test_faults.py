"""What goes wrong is told in words, once, and harms nobody else."""

import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from conftest import LLAMA
from support.load import Crowd, alone, assert_same, mixed_cases
from support.server import Server, command_of, wait_until

HUGE = json.dumps({"inputs": "a" * 1_900_000, "parameters": {"max_new_tokens": 2, "truncate": 10}})


def test_huge_prompts_with_truncate_hold_up_nobody_else(llama: Server) -> None:
    answers: list[tuple[int, float]] = []

    def ask() -> None:
        status, _ = llama.post("/generate", HUGE)
        answers.append((status, time.monotonic()))

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(16)]
    for thread in threads:
        thread.start()
    # All of them have been read and wait for a tokenizer.
    permits = llama.state()["permits"]["total"]
    wait_until(lambda: llama.state()["permits"]["free"] <= permits - 12, 20, "the huge ones wait")
    waits = []
    for _ in range(3):
        started = time.monotonic()
        llama.generate("A list is a", max_new_tokens=2)
        waits.append(time.monotonic() - started)
    small_done = time.monotonic()
    for thread in threads:
        thread.join(120)
    assert [status for status, _ in answers] == [200] * 16
    assert sum(at > small_done for _, at in answers) >= 8, "the small ones were answered among the huge ones"
    assert max(waits) < 1, waits


def test_a_frozen_rank_alone_is_replaced_also_when_the_router_notices_first() -> None:
    flags = ("--dtype", "float32", "--num-shard", "2", "--step-timeout", "2")
    with Server(LLAMA, *flags) as server:
        cases = mixed_cases(4, 200)
        golden = alone(server, cases)
        before = server.wait_clean()
        crowd = Crowd(server, cases)
        wait_until(lambda: min(crowd.num_emitted()) >= 1, 60, "all streams emitted")
        psutil.Process(before["ranks"][1]["process_id"]).suspend()
        assert_same(crowd.join(), golden, "rank 1 frozen")
        after = server.wait_clean()
        assert after["ranks"][0]["process_id"] == before["ranks"][0]["process_id"], server.log()
        assert after["ranks"][1]["process_id"] != before["ranks"][1]["process_id"]


def test_a_killed_rank_is_no_error_of_the_router_and_told_in_words() -> None:
    with Server(LLAMA, "--dtype", "float32", "--num-shard", "2") as server:
        crowd = Crowd(server, mixed_cases(2, 200))
        wait_until(lambda: min(crowd.num_emitted()) >= 1, 60, "all streams emitted")
        os.kill(server.rank_pid(1), signal.SIGKILL)
        crowd.join()
        lines = [line for line in server.log().splitlines() if line.startswith("router |")]
        assert not [line for line in lines if " ERROR " in line or "h2" in line], lines
        told = [line for line in lines if " WARN " in line and "the shards failed" in line]
        assert len(told) <= 1 and all("as it does when the process dies" in line or "rank 0" in line for line in told)


def test_answers_that_are_cut_off_are_counted_and_startupz_says_that_the_server_drains() -> None:
    with Server(LLAMA, "--dtype", "float32", "--graceful-termination-timeout", "1") as server:
        crowd = Crowd(server, mixed_cases(3, 1900))
        wait_until(lambda: min(crowd.num_emitted()) >= 1, 60, "all streams emitted")
        assert server.process is not None
        server.remember()
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not server.is_ready(), 1, "readiness is false")
        status, phase = server.get("/startupz")
        assert (status, json.loads(phase)["phase"].split(";")[0]) == (200, "draining"), phase
        answers = crowd.join(20)
        assert server.process.wait(20) == 0
        cut = [answer for answer in answers if answer.error is not None]
        assert cut and all("cut off after the 1 s" in answer.error["error"] for answer in cut if answer.error)
        warnings = [line for line in server.log().splitlines() if "requests are cut off" in line and "WARN" in line]
        assert len(warnings) == 1 and f"requests={len(cut)}" in warnings[0], warnings
        assert "CutOff" in server.log()


def test_a_second_ctrl_c_ends_every_stream_with_an_error_event() -> None:
    with Server(LLAMA, "--dtype", "float32") as server:
        crowd = Crowd(server, mixed_cases(3, 1900))
        wait_until(lambda: min(crowd.num_emitted()) >= 1, 60, "all streams emitted")
        assert server.process is not None
        server.remember()
        server.process.send_signal(signal.SIGINT)
        wait_until(lambda: not server.is_ready(), 1, "it drains")
        server.process.send_signal(signal.SIGINT)
        started = time.monotonic()
        assert server.process.wait(20) == 0
        assert time.monotonic() - started < 4
        answers = crowd.join(10)
        assert all(answer.error and "told to end at once" in answer.error["error"] for answer in answers), answers


def test_a_start_with_a_frozen_rank_tells_its_state() -> None:
    with Server(LLAMA, "--num-shard", "2", "--startup-stall-timeout", "5", wait=False) as server:
        assert server.process is not None
        launcher = psutil.Process(server.process.pid)

        def rank_1() -> list[psutil.Process]:
            children = [(child, " ".join(command_of(child))) for child in launcher.children()]
            return [child for child, line in children if " serve " in line and "--rank 1" in line]

        wait_until(rank_1, 20, "rank 1 was started")[0].suspend()
        assert server.process.wait(60) == 1
        assert "rank 1: no stack, process state T (stopped)" in server.log(), server.log()
        assert "rank 0: no stack" not in server.log()


def test_a_model_whose_tokenizer_the_router_cannot_read_is_refused_at_once_and_once(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(LLAMA, model)
    # What a plan, which knows JSON but not tokenizers, cannot tell.
    (model / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {}}}))
    with Server(model, wait=False) as server:
        assert server.process is not None
        assert server.process.wait(60) == 1
        log = server.log()
        assert len(re.findall(r"^error: .*tokenizer\.json: cannot be read as a tokenizer", log, re.MULTILINE)) == 1, log
        assert log.count("tokenizer.json: cannot be read") == 1 and "rank 0" not in log, log


@pytest.mark.parametrize("level", ["info", "debug"])
def test_in_json_every_process_logs_in_one_schema(level: str) -> None:
    with Server(LLAMA, "--dtype", "float32", "--json-output", "--log-level", level) as server:
        server.generate("A list is a", max_new_tokens=2)
        server.post("/generate", {"inputs": ""})
        os.kill(server.rank_pid(0), signal.SIGUSR1)
        wait_until(lambda: "Thread" in server.log(), 5, "the stack of a rank")
        assert server.stop() == 0
        lines = [json.loads(line) for line in server.log().splitlines()]
    assert {line["process"] for line in lines} == {"launcher", "router", "rank 0"}
    for line in lines:
        assert all(isinstance(line[key], str) for key in ("timestamp", "level", "message", "process")), line
        assert not any(isinstance(value, dict) for value in line.values()), line
        assert line["level"] in ("ERROR", "WARN", "INFO", "DEBUG", "TRACE"), line
    assert ("DEBUG" in {line["level"] for line in lines if line["process"] == "router"}) == (level == "debug")
