"""Whatever is sent, the answer is 200 or a refusal in JSON, the processes stay, every block and permit comes back.

Against the built router with a real shard. schemathesis searches the routes by what the server's own description says
of them, for a few seconds; for longer:

    FUZZ_SECONDS=600 FUZZ_EXAMPLES=2000 pytest integration-tests/test_hostile_input.py -k description
"""

import http.client
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest
from conftest import LLAMA
from schemathesis.specs.openapi.definitions import OPENAPI_31
from support.opened import Opened
from support.server import JSON_HEADERS, Server

SECONDS = int(os.environ.get("FUZZ_SECONDS", "20"))
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "25"))
# Answers are short, so that what is searched is what requests are made of.
LIMITS = ["--max-total-tokens", "96", "--max-concurrent-requests", "8"]
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}<|assistant|>"
BOM = b"\xef\xbb\xbf"
ROUTES = [
    "/", "/generate", "/generate_stream", "/tokenize", "/chat_tokenize", "/v1/chat/completions", "/v1/completions",
    "/invocations", "/vertex", "/v2/models/m/versions/1/infer",
]  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    template: Path = tmp_path_factory.mktemp("template") / "chat.jinja"
    template.write_text(TEMPLATE)
    with Server(LLAMA, "--dtype", "float32", "--chat-template", str(template), *LIMITS) as server:
        yield server


@pytest.fixture(autouse=True)
def nothing_is_lost(server: Server) -> Iterator[None]:
    with server.unharmed():
        yield


def ask(server: Server, path: str, body: bytes) -> tuple[int, str, bytes]:
    """Status, content type and content."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        connection.request("POST", path, body, JSON_HEADERS)
        response = connection.getresponse()
        return response.status, response.headers.get("content-type", ""), response.read()
    finally:
        connection.close()


def assert_refused_or_answered(found: tuple[int, str, bytes], path: str, what: str) -> int:
    status, kind, content = found
    assert status == 200 or 400 <= status < 500, f"{path} {what}: {status} {content[:300]!r}"
    if status != 200:
        assert kind == "application/json", (path, what, kind)
        body = json.loads(content)
        assert len(content) <= 2048
        assert set(body) == {"error", "error_type"}, (path, what, body)
        if path.startswith("/v1/"):
            assert set(body["error"]) == {"message", "type", "param", "code"}, (path, what, body)
        for inside in ("Traceback", "panicked", ".rs:", "0x7f"):
            assert inside not in content.decode(), (path, what, body)
    return status


def test_no_request_that_the_description_allows_or_forbids_is_a_fault_of_the_server(
    server: Server, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"http://127.0.0.1:{server.port}/api-doc/openapi.json"]
    # That every answer is one that the description tells of, too: status, type and content.
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command += ["--checks", checks, "--phases", "examples,coverage,fuzzing", "--mode", "all"]
    command += ["--max-examples", str(EXAMPLES), "--max-time", str(SECONDS), "--seed", "1", "--request-timeout", "30"]
    command += ["--generation-database", "none", "--no-color", "--warnings", "off"]
    # How many of its own inventions it throws away says nothing about the server.
    command += ["--suppress-health-check", "filter_too_much,too_slow"]
    # What it finds it writes down where it runs.
    timeout = SECONDS + 90
    searched = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, cwd=tmp_path)
    output = searched.stdout + searched.stderr
    assert searched.returncode == 0, output[-6000:]
    tested = re.search(r"(\d+) generated", output)
    assert tested is not None, output[-2000:]
    assert int(tested[1]) > 100, output[-2000:]


def test_the_description_is_one_by_the_rules_of_openapi(server: Server) -> None:
    document = json.loads(server.get("/api-doc/openapi.json")[1])
    assert document["openapi"].startswith("3.1.")
    jsonschema.Draft202012Validator(OPENAPI_31).validate(document)


def is_json(text: bytes) -> bool:
    """By Python's parser, within what is JSON by RFC 8259."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    try:
        json.loads(text.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError):
        return False
    return not text.startswith(BOM)


def json_like(draw: random.Random) -> bytes:
    """JSON, or what is left of it after a few of its bytes were changed."""

    def value(depth: int) -> Any:
        kinds = [None, True, 0, -1, 1e300, 18446744073709551616, "", "é🙂", "\u0000", "a" * draw.randint(0, 40)]
        if depth and draw.random() < 0.5:
            several = [value(depth - 1) for _ in range(draw.randint(0, 3))]
            return several if draw.random() < 0.5 else {f"k{i}": one for i, one in enumerate(several)}
        return draw.choice(kinds)

    text = json.dumps({"inputs": value(1), "parameters": value(3)}, ensure_ascii=draw.random() < 0.5).encode()
    pieces = [*rb', ] { " \ \u12 \ud800 1. 01 - nul'.split(), b"\x00", b"\xff", BOM]
    for _ in range(draw.randint(0, 3)):
        at = draw.randrange(len(text) + 1)
        text = text[:at] + draw.choice(pieces) + text[at + draw.randint(0, 2) :]
    return text


# What breaks the grammar of RFC 8259, rule by rule.
NOT_JSON = [
    *rb"""{ } [ ] [1 [1, [1,] [,1] [1,,2] ["a" {"a"} {"a":} {"a":1,} {a:1} {1:1} {'a':1} {"a":1}} [1]] nul True NaN
    Infinity -Infinity +1 01 -01 1. .1 1e 1e+ 0x10 1_0 --1 " "a 'a' "\" "\x41" "\u12" "\u12g4" /**/{} {}//""".split(),
    *[b"", b" ", b"[1 2]", b'{"a" 1}', b'{"a":1 "b":2}', b"- 1", b'"\t"', b'"\n"', b'"\x00"', b'"\xff"', b'"\xc0\xaf"'],
    *[b'"\xed\xa0\x80"', BOM + b"{}", b"{}\x00", b"\x0c{}", b"[" * 100_000, b'{"a":' * 100_000],
]


@pytest.mark.parametrize("path", ROUTES)
def test_what_is_no_json_is_400_everywhere(server: Server, path: str) -> None:
    for body in NOT_JSON:
        assert not is_json(body) or len(body) > 1000
        status = assert_refused_or_answered(ask(server, path, body), path, str(body[:30]))
        assert status == 400, (path, body[:30], status)


def test_bodies_with_a_few_changed_bytes_are_answered_or_refused(server: Server) -> None:
    draw = random.Random(7)
    for n in range(400):
        body, path = json_like(draw), draw.choice(ROUTES)
        status = assert_refused_or_answered(ask(server, path, body), path, f"{n}: {body!r}")
        assert is_json(body) or status == 400, (path, body, status)


def apart(text: str) -> list[str]:
    return text.split()


def naughty_strings() -> list[str]:
    """Strings that have broken programs: by kind, made here."""
    marks = apart("</s> <s> <|im_start|>system <|eot_id|> [INST] <think> [TOOL_CALLS] <tool_call> [DONE]")
    words = apart("undefined null NaN true -0 1e400 0xffffffff NULL None \\ \\\\ \\n %s%n %00 ../../../../etc/passwd")
    injected = [
        *apart("{{7*7}} ${7*7} <script>alert(1)</script> $(reboot) `id` file:///etc/passwd ![](http://127.0.0.1:9/)"),
        *["{% for i in range(10**9) %}a{% endfor %}", "'; DROP TABLE x; --", "() { :; }; echo", "data: [DONE]\n\n"],
    ]
    blanks = " \t\n\r\u00a0\u2003\u2028\u2029\u200b\u3000\ufeff\x00\x1b\x7f\ufffe\uffff\ue000\U0010ffff"
    letters = [
        *apart("é ß ﬀ Ω≈ç√∫ 田中さん 울란바토르 הָיְתָה الكل 🙂 👨‍👩‍👧‍👦 🇺🇳 1️⃣ 👩🏽‍🚒 𝕋𝕙𝕖 ⓣⓗⓔ ɐʇ İi ǅ"),
        *["e\u0301" * 9, "\u202etxet\u202c", "\u2066a\u2069", "\u0600\u06dd", "\r\n"],
    ]
    long = ["a" * 3000, " " * 3000, "\n" * 3000, "🙂" * 800, "e" + "\u0301" * 3000, "a\u0000" * 500]
    return [*marks, *words, *injected, *blanks, *letters, *long]


def bodies(text: str) -> Iterator[tuple[str, Any]]:
    """A text in every place that takes one."""
    yield "/generate", {"inputs": text, "parameters": {"max_new_tokens": 1, "return_full_text": True}}
    yield "/generate", {"inputs": "a", "parameters": {"max_new_tokens": 2, "stop": [text]}}
    yield "/generate_stream", {"inputs": text, "parameters": {"max_new_tokens": 1}}
    yield "/tokenize", {"inputs": text}
    messages = [{"role": "user", "content": text}]
    yield "/v1/chat/completions", {"messages": messages, "max_tokens": 1}
    yield "/chat_tokenize", {"messages": [{"role": text, "content": text}]}
    yield "/v1/completions", {"prompt": text, "max_tokens": 1, "echo": True}
    yield "/v1/chat/completions", {"messages": messages, "model": text, "max_tokens": 1}
    tool = {"type": "function", "function": {"name": text, "description": text}}
    yield "/v1/chat/completions", {"messages": messages, "tools": [tool], "max_tokens": 1}
    yield "/generate", {"inputs": "a", "parameters": {"max_new_tokens": 1, "grammar": {"type": "regex", "value": text}}}
    yield "/generate", {"inputs": "a", "parameters": {"adapter_id": text}}


@pytest.mark.parametrize("part", range(4))
def test_naughty_strings_come_back_as_they_were_or_are_refused(server: Server, part: int) -> None:
    for text in naughty_strings()[part::4]:
        for path, body in bodies(text):
            found = ask(server, path, json.dumps(body).encode())
            status = assert_refused_or_answered(found, path, repr(text[:40]))
            if status != 200:
                continue
            if path == "/generate" and body["inputs"] == text and body["parameters"].get("return_full_text"):
                assert json.loads(found[2])["generated_text"].startswith(text)
            if path == "/v1/completions":
                assert json.loads(found[2])["choices"][0]["text"].startswith(text)
            if path == "/tokenize":
                tokens = json.loads(found[2])
                stops = [token["stop"] for token in tokens if token["text"]]
                assert not stops or max(stops) <= len(text.encode())


def test_a_body_that_is_no_object_or_has_a_field_twice_is_422(server: Server) -> None:
    for path in ROUTES:
        for body in (b"[]", b'["a"]', b"7", b"null", b'"a"', b"true"):
            assert assert_refused_or_answered(ask(server, path, body), path, str(body)) == 422, (path, body)
    for body in (b'{"inputs":"a","inputs":"b"}', b'{"inputs":"a","parameters":{"seed":1,"seed":2}}'):
        assert assert_refused_or_answered(ask(server, "/generate", body), "/generate", str(body)) == 422


CHAT, COMPLETIONS, GENERATE = "/v1/chat/completions", "/v1/completions", "/generate"
SAID: dict[str, Any] = {"messages": [{"role": "user", "content": "In the"}], "max_tokens": 3, "temperature": 0}
PROMPT: dict[str, Any] = {"prompt": "In the", "max_tokens": 3, "temperature": 0}


def sent(server: Server, path: str, fields: dict[str, Any]) -> tuple[int, Any]:
    """What a request of the least that its route wants, and these fields, is answered."""
    body = {CHAT: SAID, COMPLETIONS: PROMPT, GENERATE: {"inputs": "In the"}}[path] | fields
    found = ask(server, path, json.dumps(body).encode())
    status = assert_refused_or_answered(found, path, str(fields)[:80])
    return status, json.loads(found[2]) if found[2][:1] == b"{" else {}


def metrics(server: Server) -> dict[str, float]:
    """The value of every series, named with its labels; of the buckets none."""
    lines = server.get("/metrics")[1].decode().splitlines()
    series = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#") and "_bucket{" not in line)
    return {name: float(value) for name, value in series}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_number_of_answers_beyond_the_limit_is_refused_at_once_and_costs_nothing(server: Server, path: str) -> None:
    """Row 24: with room for 8 at once."""
    router = psutil.Process(server.router_pid())
    assert sent(server, path, {"n": 9})[0] == 422
    before = router.memory_info().rss
    for n in (0, 9, 129, 1_000_000, 4294967296, -1, 1.5, "2"):
        times = []
        for _ in range(5):
            begun = time.monotonic()
            status, body = sent(server, path, {"n": n})
            times.append(time.monotonic() - begun)
            assert status == 422, (n, body)
            assert body["error"]["param"] == "n", (n, body)
        # Other work on the machine may hold up one of them.
        assert min(times) <= 0.010, (n, times)
    assert router.memory_info().rss - before < 4 << 20
    status, body = sent(server, path, {"n": 2})
    assert status == 200
    assert [choice["index"] for choice in body["choices"]] == [0, 1]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_bias_for_what_is_no_id_or_beyond_the_limit_is_refused(server: Server, path: str) -> None:
    """Row 26. The model has 4,096 ids."""
    for biases in (
        {"191222": -100}, {"4096": 1}, {"AI": -100}, {"-1": 1}, {"1.0": 1}, {"": 1}, [[1, 1]], [], "1", {"5": 101},
        {"5": -100.5}, {"5": "1"}, {"5": None}, {"4294967301": 1},
    ):  # fmt: skip
        status, body = sent(server, path, {"logit_bias": biases})
        assert status == 422, (biases, body)
        assert body["error"]["param"].startswith("logit_bias"), (biases, body)
    for biases in ({"4095": -100}, {"0": 100}, {}, None):
        assert sent(server, path, {"logit_bias": biases})[0] == 200, biases


def test_the_name_of_a_model_is_never_a_path_and_never_a_label(server: Server, tmp_path: Path) -> None:
    """Row 29: files that such names lead to are opened by nobody."""
    adapter = tmp_path / "adapter_config.json"
    adapter.write_text("{}")
    names = [
        "../../../../etc/passwd", "../" * 20 + str(adapter).lstrip("/"), str(adapter), str(tmp_path), f"file://{adapter}",
        "nobody/knows-this", "a" * 1_000_000, "",
    ]  # fmt: skip
    asked = [(path, {"model": name}, 404) for path in (CHAT, COMPLETIONS) for name in names]
    asked += [(GENERATE, {"parameters": {"adapter_id": name}}, 422) for name in names if name]
    for path, field, status in ((CHAT, {"model": "x"}, 404), (GENERATE, {"parameters": {"adapter_id": "x"}}, 422)):
        assert sent(server, path, field)[0] == status
    before = set(metrics(server))
    with Opened(tmp_path) as opened:
        for path, field, status in asked:
            found, body = sent(server, path, field)
            assert found == status, (path, str(field)[:80], body)
            assert len(json.dumps(body)) < 1024
        assert opened.names() == []
        # That it would be seen.
        adapter.read_text()
        assert opened.names() == [adapter.name]
    assert set(metrics(server)) == before


def test_prompts_of_which_one_is_refused_are_all_refused_and_none_runs(server: Server) -> None:
    """Row 30: at most 4 prompts."""
    assert sent(server, COMPLETIONS, {"prompt": ["In the", "And"]})[0] == 200
    server.wait_clean()

    def work() -> dict[str, float]:
        counted = ("tgi_batch_inference_count", "tgi_request_generated_tokens", "tgi_request_success")
        return {name: value for name, value in metrics(server).items() if name.startswith(counted)}

    before = work()
    assert len(before) > 2
    for prompt in (
        [], ["a"] * 5, ["a", ""], ["", "a"], "", [""], [[]], [[1], []], ["a", None], ["a", 5],
        [[1], [5000]], ["a", "b" * 5000], [1, -1], [1, 1.5], {"a": 1}, 7,
    ):  # fmt: skip
        for stream in (False, True):
            status, body = sent(server, COMPLETIONS, {"prompt": prompt, "stream": stream})
            assert status in (413, 422), (str(prompt)[:80], body)
    assert work() == before


def test_fields_that_contradict_each_other_or_are_of_another_type_are_refused(server: Server) -> None:
    """Row 31."""
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    both: list[dict[str, Any]] = [
        {"stream": "true"}, {"stream": 1}, {"stream": []}, {"stream_options": {"include_usage": True}},
        {"stream": False, "stream_options": {"include_usage": True}}, {"stream": True, "stream_options": True},
        {"stream": True, "stream_options": {"include_usage": "yes"}},
    ]  # fmt: skip
    of_chats: list[dict[str, Any]] = [
        {"response_format": []}, {"response_format": "json"}, {"response_format": {}},
        {"response_format": {"type": "yaml"}}, {"response_format": {"type": None}},
        {"response_format": {"type": "json_object"}, "tools": [tool]},
    ]  # fmt: skip
    for path, refused in ((CHAT, both + of_chats), (COMPLETIONS, both)):
        for fields in refused:
            status, body = sent(server, path, fields)
            assert status == 422, (path, fields, body)
    for path in (CHAT, COMPLETIONS):
        absent = {"stream": None, "stream_options": None}
        assert sent(server, path, absent)[0] == 200
        assert sent(server, path, {"stream": True, "stream_options": {"include_usage": True}})[0] == 200
    assert sent(server, CHAT, {"response_format": None, "tools": None})[0] == 200
