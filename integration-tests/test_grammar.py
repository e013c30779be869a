"""Answers of a given form, from the real server: valid by another's judgement, whatever else runs, whatever dies."""

import json
import os
import re
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest
from conftest import LLAMA
from support.load import Case, Crowd, alone, assert_same, midway, mixed_cases
from support.server import Server

# Short texts, so that a model that knows nothing of JSON comes to an end.
WORD = {"type": "string", "maxLength": 8}
PERSON = {
    "type": "object",
    "properties": {
        "name": WORD,
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 3},
        "home": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/place"}]},
    },
    "required": ["name", "age", "tags", "home"],
    "additionalProperties": False,
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"city": WORD, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["city", "zip"],
            "additionalProperties": False,
        }
    },
}
SCHEMAS: dict[str, Any] = {
    "person": PERSON,
    "list": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 2, "maxItems": 4},
    "choice": {"oneOf": [{"const": "yes"}, {"const": "no"}, {"type": "boolean"}]},
    "date": {
        "type": "object",
        "properties": {"at": {"type": "string", "format": "date"}, "by": {"type": "string", "format": "uuid"}},
        "required": ["at", "by"],
        "additionalProperties": False,
    },
}
REGEXES = [
    r"(25[0-5]|2[0-4]\d|1?\d?\d)(\.(25[0-5]|2[0-4]\d|1?\d?\d)){3}",
    r"[A-Z][a-z]{2,9}(, [A-Z][a-z]{2,9}){1,3}\.",
]
MESSAGES = [{"role": "user", "content": "In the beginning"}]
PLACE = {"type": "object", "properties": {"city": {"$ref": "#/$defs/w"}}, "required": ["city"], "$defs": {"w": WORD}}
TOOLS = [
    {"type": "function", "function": {"name": "look", "parameters": PLACE | {"additionalProperties": False}}},
    {"type": "function", "function": {"name": "wait", "parameters": {"type": "object", "additionalProperties": False}}},
]


FULL = bool(os.environ.get("FULL"))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("template") / "chat.jinja"
    file.write_text("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}<|assistant|>")
    return file


@pytest.fixture(scope="module")
def server(template: Path) -> Iterator[Server]:
    with Server(LLAMA, "--dtype", "float32", "--chat-template", str(template)) as server:
        yield server


@pytest.fixture(scope="module")
def server_tp2(template: Path) -> Iterator[Server]:
    with Server(LLAMA, "--dtype", "float32", "--chat-template", str(template), "--num-shard", "2") as server:
        yield server


def chat(server: Server, **fields: Any) -> dict[str, Any]:
    body = {"model": "tgi", "messages": MESSAGES, "max_tokens": 400, "temperature": 0.8, "seed": 3} | fields
    status, answer = server.post("/v1/chat/completions", body)
    assert status == 200, answer
    choice: dict[str, Any] = answer["choices"][0]
    return choice


@pytest.mark.parametrize("name", SCHEMAS)
def test_answers_are_json_of_the_schema(server: Server, name: str) -> None:
    schema = SCHEMAS[name]
    wanted = {"type": "json_schema", "json_schema": {"name": name, "strict": True, "schema": schema}}
    for fields in ({"temperature": 0}, {"seed": 1}, {"seed": 2, "presence_penalty": 1.5, "min_tokens": 5}):
        choice = chat(server, response_format=wanted, **fields)
        assert choice["finish_reason"] == "stop", choice
        jsonschema.validate(json.loads(choice["message"]["content"]), schema)
    grammar = {"type": "json", "value": schema}
    text = server.generate("In the", max_new_tokens=400, grammar=grammar)["generated_text"]
    jsonschema.validate(json.loads(text), schema)
    server.wait_clean()


def test_the_example_of_tgis_documentation_is_answered_with_its_fields_and_no_others(server: Server) -> None:
    # Neither says that it is an object.
    animals = {
        "properties": {
            "location": {"type": "string", "maxLength": 20},
            "activity": {"type": "string", "maxLength": 20},
            "animals_seen": {"type": "integer", "minimum": 1, "maximum": 5},
            "animals": {"type": "array", "items": {"type": "string", "maxLength": 10}, "maxItems": 3},
            "home": {"properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]},
        },
        "required": ["location", "activity", "animals_seen", "animals", "home"],
    }
    fields = animals["properties"].keys()  # type: ignore[attr-defined]
    inputs = "I saw a puppy a cat and a raccoon during my bike ride in the park"
    for seed in range(4):
        sampled = {"do_sample": True, "seed": seed, "repetition_penalty": 1.3, "max_new_tokens": 400}
        for grammar in ({"type": "json", "value": animals}, {"type": "json", "value": json.dumps(animals)}):
            answer = json.loads(server.generate(inputs, grammar=grammar, **sampled)["generated_text"])
            jsonschema.validate(answer, animals)
            assert isinstance(answer, dict)
            assert (answer.keys(), answer["home"].keys()) == (fields, {"city"})
        told = {"type": "json_schema", "json_schema": {"name": "animals", "schema": animals}}
        # Here the schema lets it go on with fields of its own.
        assert chat(server, response_format=told, seed=seed)["message"]["content"].startswith("{")


@pytest.mark.parametrize("regex", REGEXES)
def test_answers_match_the_expression(server: Server, regex: str) -> None:
    for seed in range(3):
        options = {"do_sample": True, "seed": seed, "max_new_tokens": 200, "stop": ["\n"]}
        answer = server.generate("Their names are", grammar={"type": "regex", "value": regex}, **options)
        assert re.fullmatch(regex, answer["generated_text"]), answer["generated_text"]
        assert answer["details"]["finish_reason"] == "eos_token"


def test_a_text_that_is_cut_short_begins_as_the_form_wants(server: Server) -> None:
    for grammar in ({"type": "json", "value": PERSON}, {"type": "regex", "value": r"\{.*"}):
        answer = server.generate("In the", max_new_tokens=1, grammar=grammar)
        assert answer["details"]["finish_reason"] == "length"
        assert answer["generated_text"].startswith("{")
    stopped = server.generate("In the", max_new_tokens=50, stop=["name"], grammar={"type": "json", "value": PERSON})
    assert stopped["generated_text"].endswith("name")
    assert stopped["details"]["finish_reason"] == "stop_sequence"


@pytest.mark.parametrize("choice", ["required", "look", {"type": "function", "function": {"name": "wait"}}], ids=str)
def test_a_forced_call_has_valid_arguments(server: Server, choice: Any) -> None:
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
    for seed in range(2):
        answer = chat(server, tools=TOOLS, tool_choice=choice, seed=seed)
        (call,) = answer["message"]["tool_calls"]
        name = call["function"]["name"]
        assert choice == "required" or name in str(choice)
        jsonschema.validate(json.loads(call["function"]["arguments"]), schemas[name])
        assert answer["finish_reason"] == "tool_calls"


def bound_cases(count: int) -> list[Case]:
    """Every second one has a form, sampled and greedy; the forms do not end, so that there is time to strike."""
    people = {"type": "array", "items": {"$ref": "#/$defs/person"}, "minItems": 50}
    definitions = PERSON["$defs"] | {"person": {k: v for k, v in PERSON.items() if k != "$defs"}}
    endless = [
        {"type": "json", "value": people | {"$defs": definitions}},
        {"type": "regex", "value": r"([a-z]{1,9}[ ,][A-Z][a-z]+\. )+#"},
    ]
    cases = []
    for i, case in enumerate(mixed_cases(count, max_new_tokens=96)):
        grammar = {"grammar": endless[i // 2 % 2]} if i % 2 else {}
        parameters = dict(mixed_cases(count, 96)[i // 2].parameters) | grammar
        cases.append(Case(case.inputs, tuple(parameters.items())))
    return cases


@pytest.mark.parametrize("name", ["server", "server_tp2"])
def test_neighbours_and_a_killed_shard_change_nothing_in_the_middle_of_a_form(
    request: pytest.FixtureRequest, name: str
) -> None:
    server: Server = request.getfixturevalue(name)
    cases = bound_cases(6)
    golden = alone(server, cases)
    before = server.wait_clean()
    crowd, _ = midway(server, cases, most=90, least=9)
    os.kill(before["ranks"][0]["process_id"], signal.SIGKILL)
    assert_same(crowd.join(), golden, "together, and a kill")
    assert server.wait_clean()["generation"] > before["generation"]


def test_preemption_in_the_middle_of_a_form_changes_nothing(template: Path) -> None:
    cases = bound_cases(10)
    flags = ["--max-batch-total-tokens", "768", "--max-total-tokens", "512"]
    with Server(LLAMA, "--dtype", "float32", "--chat-template", str(template), *flags) as small:
        golden = alone(small, cases)
        assert (
            b"\ntgi_preemptions 0\n" in small.get("/metrics")[1] or b"tgi_preemptions" not in small.get("/metrics")[1]
        )
        assert_same(Crowd(small, cases).join(), golden, "with preemption")
        counted = re.search(rb"^tgi_preemptions (\d+)$", small.get("/metrics")[1], re.MULTILINE)
        assert counted is not None
        assert int(counted[1]) > 0, "nothing was preempted: the pool is not too small"
        small.wait_clean()


def test_several_answers_and_the_best_of_several_keep_to_the_form(server: Server) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    body = {"model": "tgi", "messages": MESSAGES, "max_tokens": 400, "n": 3, "seed": 5, "response_format": wanted}
    status, answer = server.post("/v1/chat/completions", body)
    assert status == 200, answer
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert len(set(texts)) > 1
    for text in texts:
        jsonschema.validate(json.loads(text), PERSON)
    grammar = {"type": "regex", "value": REGEXES[0]}
    best = server.generate("At", max_new_tokens=60, best_of=2, do_sample=True, grammar=grammar)
    others = best["details"]["best_of_sequences"]
    for text in [best["generated_text"], *(other["generated_text"] for other in others)]:
        assert re.fullmatch(REGEXES[0], text), text
    assert len(others) == 1


HOSTILE = [
    {"type": "regex", "value": "(a{1000}){1000}"},
    {"type": "regex", "value": "(?=a)b"},
    {"type": "regex", "value": r"[^\s\S]"},
    {"type": "json", "value": {"enum": []}},
    {"type": "json", "value": {"type": "integer", "multipleOf": 1_000_003}},
    {"type": "json", "value": {"enum": [f"value {i}" for i in range(100_000)]}},
    {"type": "json", "value": {"type": "object", "properties": {f"p{i}": WORD for i in range(900)}}},
    {"type": "json", "value": {"$ref": "file:///etc/passwd"}},
]


def test_hostile_grammars_are_refused_at_once_and_streams_go_on(server: Server) -> None:
    golden = server.stream("In the beginning", max_new_tokens=200, ignore_eos_token=True)
    crowd = Crowd(server, [Case("In the beginning", (("max_new_tokens", 200), ("ignore_eos_token", True)))])
    shard = psutil.Process(server.state()["ranks"][0]["process_id"])
    before = shard.memory_info().rss
    times = []
    for grammar in HOSTILE:
        begun = time.monotonic()
        status, answer = server.post("/generate", {"inputs": "a", "parameters": {"grammar": grammar}})
        assert status == 422, answer
        assert "`grammar`: " in answer["error"]
        times.append(time.monotonic() - begun)
    # Each within a second where nothing else wants the processor.
    assert max(times) < 3
    assert statistics.median(times) < 0.5
    assert_same(crowd.join(), [golden], "under attack")
    assert shard.memory_info().rss - before < 64 << 20
    server.wait_clean()


def test_an_expression_that_is_slow_to_follow_holds_up_nobody_else(server: Server) -> None:
    """What another library would write out as an automaton of sixteen thousand states, and backtracking never ends."""
    case = Case("In the beginning", (("max_new_tokens", 200), ("ignore_eos_token", True)))
    golden = alone(server, [case])
    pids = [server.router_pid(), server.state()["ranks"][0]["process_id"]]
    before = [psutil.Process(pid).memory_info().rss for pid in pids]
    crowd = Crowd(server, [case])
    for regex in ("[ab]*a[ab]{13}", "(x+x+)+y", "(.*a){12}"):
        begun = time.monotonic()
        grammar = {"type": "regex", "value": regex}
        body = {"inputs": "a", "parameters": {"grammar": grammar, "max_new_tokens": 40}}
        status, answer = server.post("/generate", body)
        assert status in (200, 422, 424), answer
        # Forty tokens of an answer are in it.
        assert time.monotonic() - begun < 5, regex
        begun = time.monotonic()
        assert server.get("/health")[0] == 200
        assert time.monotonic() - begun < 1
    assert_same(crowd.join(), golden, "beside slow expressions")
    for pid, rss in zip(pids, before, strict=True):
        assert psutil.Process(pid).memory_info().rss - rss < 64 << 20
    server.wait_clean()


def test_many_different_schemas_leave_little_behind(server: Server) -> None:
    """A thousand with `FULL=1`."""
    processes = [psutil.Process(pid) for pid in (server.router_pid(), server.state()["ranks"][0]["process_id"])]

    def memory() -> int:
        return sum(process.memory_info().rss for process in processes)

    def files() -> tuple[Any, ...]:
        """What they have written to disks, the files that they hold open, and those of the run directory."""
        written = [process.io_counters().write_bytes for process in processes]
        opened = [sorted(file.path for file in process.open_files()) for process in processes]
        return written, opened, sorted(server.run_directory().rglob("*"))

    def ask(numbers: range) -> None:
        for n in numbers:
            schema = {"type": "object", "properties": {f"key{n}": WORD}, "required": [f"key{n}"]}
            server.generate("a", max_new_tokens=2, grammar={"type": "json", "value": schema})

    ask(range(20))
    before, on_disk = memory(), files()
    each = 250 if FULL else 100
    threads = [threading.Thread(target=ask, args=(range(1000 * i, 1000 * i + each),)) for i in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert memory() - before < (256 if FULL else 128) << 20
    assert files() == on_disk
