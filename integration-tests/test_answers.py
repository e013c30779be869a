"""What the server answers, compared with transformers and with itself in other circumstances."""

import http.client
import json
import random
import re
import threading
from pathlib import Path

import pytest
from conftest import LLAMA, QWEN2
from support.load import Crowd, alone, assert_same, mixed_cases
from support.server import Server, wait_until
from tokenizers import Tokenizer


def references(model: Path) -> list[dict[str, object]]:
    return json.loads((model / "reference.json").read_text())["greedy"]


def assert_greedy_tokens(server: Server, model: Path) -> None:
    decode = Tokenizer.from_file(str(model / "tokenizer.json")).decode
    for reference in references(model):
        expected = reference["generated_ids"]
        answer = server.stream(reference["prompt"], max_new_tokens=len(expected), ignore_eos_token=True)
        assert answer.ids == expected, reference["prompt"]
        assert answer.generated_text == decode(expected)
        assert answer.text == answer.generated_text


@pytest.mark.parametrize("fixture", ["llama", "llama_tp2"])
def test_greedy_tokens_of_llama_equal_those_of_transformers(fixture: str, request: pytest.FixtureRequest) -> None:
    assert_greedy_tokens(request.getfixturevalue(fixture), LLAMA)


@pytest.mark.parametrize("num_shard", ["1", "2"])
def test_greedy_tokens_of_qwen2_equal_those_of_transformers(num_shard: str) -> None:
    with Server(QWEN2, "--dtype", "float32", "--num-shard", num_shard) as server:
        assert_greedy_tokens(server, QWEN2)


@pytest.mark.parametrize("fixture", ["llama", "llama_tp2"])
def test_32_requests_at_once_equal_the_same_requests_alone(fixture: str, request: pytest.FixtureRequest) -> None:
    server = request.getfixturevalue(fixture)
    cases = mixed_cases(32, max_new_tokens=16)
    golden = alone(server, cases)
    assert_same(Crowd(server, cases).join(), golden, "32 at once")
    server.wait_clean()


def test_a_streamed_answer_equals_the_same_answer_in_one_piece(llama: Server) -> None:
    for case in mixed_cases(8, max_new_tokens=24):
        streamed = llama.stream(case.inputs, **dict(case.parameters))
        whole = llama.generate(case.inputs, **dict(case.parameters))
        assert streamed.text == streamed.generated_text == whole["generated_text"]
        assert streamed.tokens == whole["details"]["tokens"]
        assert streamed.finish_reason == whole["details"]["finish_reason"] == "length"
        assert [event["index"] for event in streamed.events] == list(range(1, 25))


def test_the_full_text_begins_with_the_prompt(llama: Server) -> None:
    short = llama.generate("A list is a", max_new_tokens=5)
    full = llama.generate("A list is a", max_new_tokens=5, return_full_text=True)
    assert full["generated_text"] == "A list is a" + short["generated_text"]


def test_a_seed_gives_the_same_answer_again_and_another_seed_another(llama: Server) -> None:
    sample = {"do_sample": True, "temperature": 1.0, "max_new_tokens": 40}
    first, again, other = (llama.generate("The function returns", seed=seed, **sample) for seed in (5, 5, 6))
    assert first == again
    assert first["generated_text"] != other["generated_text"]
    assert first["details"]["seed"] == 5
    unseeded = llama.generate("The function returns", **sample)
    repeated = llama.generate("The function returns", seed=unseeded["details"]["seed"], **sample)
    assert unseeded == repeated


def test_a_stop_string_may_end_anywhere(llama: Server) -> None:
    prompt, length = "To install the package, run", 60
    whole = llama.generate(prompt, max_new_tokens=length, ignore_eos_token=True)["generated_text"]
    rng = random.Random(3)
    for _ in range(12):
        start = rng.randrange(4, len(whole) - 6)
        stop = whole[start : start + rng.randrange(1, 6)]
        expected = whole[: whole.index(stop) + len(stop)]
        answer = llama.stream(prompt, max_new_tokens=length, ignore_eos_token=True, stop=[stop, "never this"])
        assert answer.generated_text == expected == answer.text
        assert answer.finish_reason == "stop_sequence"
    llama.wait_clean()


def test_an_end_token_that_only_the_generation_config_names_ends_the_answer(llama: Server) -> None:
    config = json.loads((LLAMA / "config.json").read_text())
    generation = json.loads((LLAMA / "generation_config.json").read_text())
    (only_there,) = set(generation["eos_token_id"]) - {config["eos_token_id"]}
    prompt = "<|user|>What is a list?<|assistant|>"
    answer = llama.stream(prompt, max_new_tokens=200)
    assert answer.finish_reason == "eos_token"
    assert answer.ids[-1] == only_there
    assert answer.tokens[-1]["special"]
    ignoring = llama.stream(prompt, max_new_tokens=len(answer.ids) + 5, ignore_eos_token=True)
    assert ignoring.ids[: len(answer.ids)] == answer.ids
    assert ignoring.finish_reason == "length"


def test_truncate_keeps_the_last_tokens(llama: Server) -> None:
    tokenizer = Tokenizer.from_file(str(LLAMA / "tokenizer.json"))
    first, second = (
        f"{start} In the beginning God created" for start in ("some words,", "and others that are dropped,")
    )
    assert tokenizer.encode(first).ids[-4:] == tokenizer.encode(second).ids[-4:]
    answers = [llama.stream(prompt, max_new_tokens=8, truncate=4) for prompt in (first, second)]
    assert [answer.events[-1]["details"]["input_length"] for answer in answers] == [4, 4]
    assert_same(answers[:1], answers[1:], "what was dropped has no effect")


def test_a_prompt_longer_than_a_step_gives_the_same_answer(llama: Server) -> None:
    prompt = " ".join(["In the beginning God created the heaven and the earth."] * 12)
    golden = llama.stream(prompt, max_new_tokens=20)
    with Server(LLAMA, "--dtype", "float32", "--max-batch-prefill-tokens", "16", "--max-batch-size", "8") as server:
        answer = server.stream(prompt, max_new_tokens=20)
    assert golden.events[-1]["details"]["input_length"] > 4 * 16
    assert_same([answer], [golden], "chunked prefill")


def test_a_long_prompt_is_read_in_parts_while_others_go_on(llama: Server) -> None:
    """So that nobody waits for it; what follows it is the same."""

    def steps_with_prompts() -> int:
        found = re.search(
            r'^tgi_batch_inference_count\{method="prefill"\} (\d+)$', llama.get("/metrics")[1].decode(), re.M
        )
        return int(found.group(1)) if found else 0

    prompt = " ".join(f"Section {number} is about lists and functions." for number in range(45))
    llama.generate("A list is a", max_new_tokens=20, ignore_eos_token=True)
    llama.generate("The function returns" * 20, max_new_tokens=1)
    endless = {"max_new_tokens": 900, "ignore_eos_token": True}
    texts = ("A list is a", "To install", "The function")
    streams = [threading.Thread(target=llama.stream, args=(text,), kwargs=endless) for text in texts]
    for stream in streams:
        stream.start()
    wait_until(lambda: "tgi_batch_current_size 3" in llama.get("/metrics")[1].decode(), 10, "three streams")
    before = steps_with_prompts()
    beside_others = llama.generate(prompt, max_new_tokens=8, decoder_input_details=True)
    parts = steps_with_prompts() - before
    assert all(stream.is_alive() for stream in streams)
    for stream in streams:
        stream.join()
    assert 300 < len(beside_others["details"]["prefill"]) < 512
    assert parts > 3
    assert llama.generate(prompt, max_new_tokens=8, decoder_input_details=True) == beside_others
    llama.wait_clean()


def test_aborts_at_random_points_return_everything(llama: Server) -> None:
    rng = random.Random(11)
    victim = mixed_cases(1, max_new_tokens=200)
    golden = alone(llama, victim)
    crowd = Crowd(llama, victim)

    def abort_one(i: int) -> None:
        stream = llama.raw_stream("A list is a", {"max_new_tokens": 500, "ignore_eos_token": True, "seed": i})
        for _ in range(rng.randrange(0, 12)):
            next(stream)
        stream.close()

    threads = [threading.Thread(target=abort_one, args=(i,)) for i in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert_same(crowd.join(), golden, "while others were aborted")
    llama.wait_clean()


def test_a_dropped_connection_ends_an_answer_in_one_piece_too(llama: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", llama.port)
    body = {"inputs": "A list is a", "parameters": {"max_new_tokens": 1900, "ignore_eos_token": True}}
    connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
    wait_until(lambda: llama.state()["running"] == 1, 5, "it runs")
    before = llama.state()["steps"]
    connection.close()
    after = llama.wait_clean()["steps"]
    assert after - before < 1000, "the answer was computed to its end"


def test_prompts_with_a_common_beginning_share_blocks_and_answers_stay_the_same(llama: Server) -> None:
    stem = " ".join(["And the LORD said unto Moses, speak unto the children."] * 6)
    before = llama.wait_clean()["blocks"]["cached"]
    golden = llama.stream(stem, max_new_tokens=30)
    cached = llama.wait_clean()["blocks"]["cached"]
    assert cached > before
    assert_same([llama.stream(stem, max_new_tokens=30)], [golden], "after a prefix hit")
    assert llama.wait_clean()["blocks"]["cached"] == cached, "nothing new was kept: it was shared"


def test_a_pool_too_small_for_all_preempts_and_changes_nothing() -> None:
    cases = mixed_cases(16, max_new_tokens=40)
    with Server(LLAMA, "--dtype", "float32", "--max-batch-total-tokens", "640", "--max-total-tokens", "512") as server:
        golden = alone(server, cases)
        assert_same(Crowd(server, cases).join(), golden, "with preemption")
        assert server.wait_clean()["blocks"]["total"] <= 40
