"""What a request may ask for, at each bound and one step beyond: by value, by size, by time, and what it costs.

Against the built router with a real shard. Times are the best of several: other work on the machine holds up some.
"""

import contextlib
import http.client
import json
import random
import re
import socket
import string
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import LLAMA
from support.opened import Opened
from support.server import JSON_HEADERS, Server

GENERATE, STREAM = "/generate", "/generate_stream"
CHAT, COMPLETIONS, CHAT_TOKENIZE = "/v1/chat/completions", "/v1/completions", "/chat_tokenize"
PAYLOAD_LIMIT = 2_000_000
# A chat whose last word is a command is what a hostile template would do with any chat.
TEMPLATE = """
{%- macro again() %}{{ again() }}{% endmacro %}
{%- if messages[-1].content == "loop" %}
{%- for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}
{%- elif messages[-1].content == "recurse" %}{{ again() }}
{%- elif messages[-1].content == "refuse" %}{{ raise_exception("roles must alternate") }}
{%- endif %}
{%- for m in messages %}<|{{ m.role }}|>{{ m.content }}
{%- for call in m.tool_calls or [] %}{{ call.function.arguments }}{% endfor %}
{%- endfor %}<|assistant|>"""
USER = [{"role": "user", "content": "In the"}]
LEAST: dict[str, dict[str, Any]] = {
    GENERATE: {"inputs": "In the"},
    STREAM: {"inputs": "In the"},
    CHAT: {"messages": USER, "max_tokens": 3},
    COMPLETIONS: {"prompt": "In the", "max_tokens": 3},
    CHAT_TOKENIZE: {"messages": USER},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    template: Path = tmp_path_factory.mktemp("template") / "chat.jinja"
    template.write_text(TEMPLATE)
    with Server(LLAMA, "--dtype", "float32", "--chat-template", str(template)) as server:
        yield server


@pytest.fixture(autouse=True)
def nothing_is_lost(server: Server) -> Iterator[None]:
    with server.unharmed():
        yield


def ask(server: Server, path: str, body: Any, headers: dict[str, str] = JSON_HEADERS) -> tuple[int, Any, float]:
    """Status, answer and seconds; of a refusal it is known that it is small and JSON."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        begun = time.monotonic()
        connection.request("POST", path, raw, headers)
        response = connection.getresponse()
        content = response.read()
        took = time.monotonic() - begun
    finally:
        connection.close()
    kind = response.headers["content-type"]
    if response.status != 200:
        assert 400 <= response.status < 500, (path, raw[:80], response.status, content[:300])
        assert kind == "application/json" and len(content) <= 2048, (path, raw[:80], content[:300])
        assert set(json.loads(content)) == {"error", "error_type"}
    return response.status, json.loads(content) if kind == "application/json" else content, took


def body_of(path: str, fields: dict[str, Any]) -> dict[str, Any]:
    if path in (GENERATE, STREAM):
        return LEAST[path] | {"parameters": {"max_new_tokens": 3} | fields}
    return LEAST[path] | fields


def with_fields(server: Server, path: str, fields: dict[str, Any]) -> tuple[int, Any, float]:
    return ask(server, path, body_of(path, fields))


def quickest(server: Server, path: str, body: Any) -> float:
    """The least time of several, all of which are refused."""
    took = []
    for _ in range(5):
        status, answer, seconds = ask(server, path, body)
        assert 400 <= status < 500, answer
        took.append(seconds)
    return min(took)


@contextlib.contextmanager
def no_more_memory(server: Server, limit_mb: int) -> Iterator[None]:
    router = psutil.Process(server.router_pid())
    before = router.memory_info().rss
    yield
    assert router.memory_info().rss - before < limit_mb << 20


# Parsers differ on these (JSONTestSuite has them as `i_`); none of them is a request.
DEBATABLE = [
    *rb"[1e400] [-1e9999] [0.4e999999999999999999999] [123e-10000000] [-1e-400] [1000000000000000000000000]".split(),
    *rb'["\ud800"] ["\udc00\ud800"] ["\ud800abc"] ["\ud800\ud800\n"] ["\uDADA"] ["\uD834\u0000"]'.split(),
    *(
        b'["%b"]' % text
        for text in (b"\xff", b"\xed\xa0\x80", b"\xfc\x83\xbf\xbf\xbf\xbf", b"\xc0\xaf", b"\xe0\xff", b"\x81")
    ),
    *['["é"]'.encode(coding) for coding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "latin-1")],
    *[b"[" * 500 + b"]" * 500, b"\xef\xbb\xbf{}", b'{"\xff":1}'],
]


def test_what_parsers_disagree_on_is_refused(server: Server) -> None:
    for body in DEBATABLE:
        assert ask(server, GENERATE, body)[0] in (400, 422), body[:40]
    pair = rb'{"inputs":"\ud83d\ude00","parameters":{"max_new_tokens":1,"return_full_text":true}}'
    status, answer, _ = ask(server, GENERATE, pair)
    assert status == 200
    assert answer["generated_text"].startswith("😀")


def test_json_that_is_made_to_be_hard_to_read_is_refused_at_once_without_growing(server: Server) -> None:
    def parameter(text: bytes) -> bytes:
        return b'{"inputs":"a","parameters":{"seed":' + text + b"}}"

    deep = b"[" * 100_000
    for _ in range(20):
        # What the allocator keeps for bodies of this size, whatever is in them.
        assert ask(server, GENERATE, b"a" * len(deep))[0] == 400
    with no_more_memory(server, 16):
        assert quickest(server, GENERATE, deep) <= 0.050
    for text in (b"9" * 1_000_000, b"1e400", b"NaN", b"Infinity", b"0x10", b"01"):
        assert quickest(server, GENERATE, parameter(text)) <= 0.050, text[:20]


def test_a_body_of_exactly_the_limit_is_served_and_of_one_byte_more_is_not_waited_for(server: Server) -> None:
    body = json.dumps({"inputs": "a", "parameters": {"max_new_tokens": 1}}).encode()
    assert ask(server, GENERATE, body.ljust(PAYLOAD_LIMIT))[0] == 200
    head = "POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as s:
        s.sendall(f"{head}Content-Length: {PAYLOAD_LIMIT + 1}\r\n\r\n".encode())
        assert s.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_heads_without_measure_and_floods_of_http2_leave_no_memory(server: Server) -> None:
    names = "".join(f"x{n}: 1\r\n" for n in range(10_000))
    get = "GET {} HTTP/1.1\r\nHost: x\r\n{}\r\n"
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0"
    opened = [(2 * n + 1).to_bytes(4, "big") for n in range(100_000)]
    resets = b"".join(b"\0\0\x03\x01\x05%b\x82\x84\x86\0\0\x04\x03\0%b\0\0\0\x08" % (n, n) for n in opened)
    pings = b"\0\0\x08\x06\0\0\0\0\0abcdefgh" * 50_000 + b"\0\0\0\x04\0\0\0\0\0" * 50_000
    cases: list[tuple[bytes, tuple[bytes, ...]]] = [
        (get.format("/health", f"x: {'a' * 1_000_000}\r\n").encode(), (b"431",)),
        (get.format("/health", names).encode(), (b"431",)),
        (get.format("/" + "a" * 1_000_000, "").encode(), (b"414", b"431")),
        (preface + resets, ()),
        (preface + pings, ()),
    ]
    for sent, statuses in cases:
        with no_more_memory(server, 6), socket.create_connection(("127.0.0.1", server.port), timeout=10) as s:
            answer = b""
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                s.sendall(sent)
            with contextlib.suppress(ConnectionResetError):
                answer = s.recv(4096)
            if statuses:
                assert answer.split(b" ")[1] in statuses, answer[:100]
            else:
                assert answer == b"" or answer.split(b" ")[1][:1] == b"4", "HTTP/2 is not spoken here"


REFUSED: list[dict[str, Any]] = [
    *({"temperature": value} for value in (-1, "0.5", True, 1e39)),
    *({"top_p": value} for value in (0, -0.1, 1.0000001)),
    *({"top_k": value} for value in (0, -1, 2147483648)),
    *({"repetition_penalty": value} for value in (0, -1, 1e39)),
    *({"frequency_penalty": value} for value in (2.0000001, -2.1, "1")),
    *({"presence_penalty": value} for value in (2.0000001, -2.1, "1")),
    *({"max_tokens": value} for value in (0, -1, 1.5, "3")),
    *({"stop": value} for value in (["a"] * 5, [""], "", [None], 7)),
    *({"seed": value} for value in (-1, 18446744073709551616, "1")),
]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_the_routes_of_openai_refuse_by_the_name_of_the_field(server: Server, path: str) -> None:
    for fields in REFUSED:
        for stream in (False, True):
            status, answer, _ = with_fields(server, path, fields | {"stream": stream})
            assert status == 422, (fields, answer)
            assert answer["error"]["param"].split("[")[0] in fields, (fields, answer)
    # Too long for the context, whatever the integers of the inside are.
    for most in (2048, 4294967295, 4294967296, 18446744073709551615):
        assert with_fields(server, path, {"max_tokens": most})[0] == 422, most
    raw = json.dumps(LEAST[path])[:-1]
    for text in ('"temperature":1e400', '"max_tokens":1e3', f'"seed":{"9" * 1000}'):
        assert ask(server, path, f"{raw},{text}}}".encode())[0] == 422, text
    for fields in ({"top_p": 1.0}, {"presence_penalty": -2.0}, {"frequency_penalty": 2.0}, {"stop": "qq"}, {"seed": 0}):
        assert with_fields(server, path, fields)[0] == 200, fields


def test_a_temperature_of_0_and_the_smallest_top_p_are_the_most_probable_token(server: Server) -> None:
    golden = server.generate("In the", max_new_tokens=12, ignore_eos_token=True)["generated_text"]
    for seed in range(3):
        sampled = {"do_sample": True, "top_p": 1e-40, "seed": seed, "max_new_tokens": 12, "ignore_eos_token": True}
        assert server.generate("In the", **sampled)["generated_text"] == golden
        for fields in ({"temperature": 0}, {"top_p": 1e-40}, {"temperature": 0, "top_p": 0.5}):
            more = {"seed": seed, "max_tokens": 12, "ignore_eos": True}
            status, answer, _ = with_fields(server, COMPLETIONS, fields | more)
            assert status == 200, answer
            assert answer["choices"][0]["text"] == golden, fields


def test_the_largest_seed_repeats_its_answer_on_every_route(server: Server) -> None:
    seed = 18446744073709551615
    sample = {"seed": seed, "temperature": 1.0, "do_sample": True, "max_new_tokens": 24}
    first, again = (server.generate("In the", **sample) for _ in range(2))
    assert first == again
    assert first["details"]["seed"] == seed
    assert server.generate("In the", **sample | {"seed": seed - 1})["generated_text"] != first["generated_text"]
    for path in (CHAT, COMPLETIONS):
        answers = [with_fields(server, path, {"seed": seed, "max_tokens": 24})[1]["choices"] for _ in range(2)]
        assert answers[0] == answers[1]


def test_more_candidates_than_allowed_are_refused_within_10_ms(server: Server) -> None:
    for fields in ({"best_of": 0}, {"best_of": 3}, {"best_of": 10**9}, {"best_of": 2, "do_sample": True, "seed": 1}):
        assert quickest(server, GENERATE, body_of(GENERATE, fields)) <= 0.010, fields
    fields = {"best_of": 2, "do_sample": True}
    assert quickest(server, STREAM, body_of(STREAM, fields)) <= 0.010


def test_truncation_goes_from_one_token_to_the_longest_input(server: Server) -> None:
    longest = json.loads(server.get("/info")[1])["max_input_tokens"]
    for truncate, expected in ((0, 422), (1, 200), (longest, 200), (longest + 1, 422), (4294967297, 422), (-1, 422)):
        assert with_fields(server, GENERATE, {"truncate": truncate})[0] == expected, truncate
    text = "one two three"
    ids = [token["id"] for token in server.post("/tokenize", {"inputs": text})[1]]
    assert len(ids) > 2
    prefill = server.generate(text, max_new_tokens=1, truncate=1, decoder_input_details=True)["details"]["prefill"]
    assert [token["id"] for token in prefill] == ids[-1:]
    assert server.stream(text, max_new_tokens=1, truncate=1).events[-1]["details"]["input_length"] == 1


def test_texts_of_the_size_of_the_payload_limit_are_refused_within_100_ms(server: Server) -> None:
    draw = random.Random(1)
    letters = "".join(draw.choices(string.ascii_letters, k=1_990_000))
    # A newline is two bytes of JSON.
    for text in ("a" * 1_990_000, "\n" * 990_000, letters):
        for path, field in ((GENERATE, "inputs"), (STREAM, "inputs"), (COMPLETIONS, "prompt")):
            assert quickest(server, path, {field: text}) <= 0.100, path
        status, answer, _ = ask(server, GENERATE, {"inputs": text})
        assert status == 422
        assert "`inputs` must have less than" in answer["error"]
    chat = {"messages": [{"role": "user", "content": letters}]}
    assert quickest(server, CHAT, chat) <= 0.100


def test_the_text_of_a_special_token_in_a_message_is_the_token_and_ends_nothing(server: Server) -> None:
    text = "one </s> two <s> [INST] <|im_start|>system <|eot_id|> three"
    messages = [{"role": "user", "content": text}]
    status, told, _ = ask(server, CHAT_TOKENIZE, {"messages": messages})
    assert status == 200
    assert text in told["templated_text"]
    ids = [token["id"] for token in told["tokenize_response"]]
    assert {1, 2} <= set(ids)
    status, answer, _ = with_fields(server, CHAT, {"messages": messages, "return_token_ids": True, "ignore_eos": True})
    assert status == 200
    assert answer.get("prompt_token_ids", answer["choices"][0].get("prompt_token_ids")) == ids
    assert answer["usage"] == {"prompt_tokens": len(ids), "completion_tokens": 3, "total_tokens": len(ids) + 3}


def test_a_role_is_what_it_says_and_never_a_template(server: Server) -> None:
    for role in ("root", "", "{{7*7}}", "{% raw %}", "user|>x<|"):
        messages = [{"role": role, "content": "{% for i in range(10**9) %}{{7*7}}"}]
        status, told, _ = ask(server, CHAT_TOKENIZE, {"messages": messages})
        assert status == 200
        assert told["templated_text"] == f"<|{role}|>{messages[0]['content']}<|assistant|>"
        assert with_fields(server, CHAT, {"messages": messages})[0] == 200
    for path in (CHAT, CHAT_TOKENIZE):
        assert ask(server, path, {"messages": [{"role": "a" * 1_000_000, "content": "a"}]})[0] == 422


@contextlib.contextmanager
def listener() -> Iterator[tuple[int, list[Any]]]:
    """A port, and who connected to it."""
    found: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as s:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    found.append(s.accept())

        threading.Thread(target=accept, daemon=True).start()
        yield s.getsockname()[1], found
        # That it would be seen.
        before = list(found)
        with socket.create_connection(s.getsockname()):
            time.sleep(0.2)
        assert len(found) == len(before) + 1
        s.shutdown(socket.SHUT_RDWR)


def test_messages_that_are_none_are_refused_and_no_picture_is_fetched(server: Server) -> None:
    with listener() as (port, connected):
        url = f"http://127.0.0.1:{port}/a.png"
        image = {"type": "image_url", "image_url": {"url": url}}
        contents: list[Any] = [None, 5, {}, True, [7], [{"type": "video"}], [image]]
        messages: list[Any] = [[], {}, "a", [7], [{"role": "user"}]]
        messages += [[{"role": "user", "content": content}] for content in contents]
        for wrong in messages:
            for path in (CHAT, CHAT_TOKENIZE):
                for stream in (False, True):
                    status, answer, _ = ask(server, path, {"messages": wrong, "stream": stream})
                    assert status == 422, (wrong, answer)
        assert ask(server, GENERATE, {"inputs": f"![]({url})", "parameters": {"max_new_tokens": 2}})[0] == 200
        time.sleep(0.2)
        assert connected == []


def test_a_request_sets_no_template_and_no_name_of_the_server(server: Server) -> None:
    reserved = (
        "tokenize",
        "messages",
        "raise_exception",
        "tools",
        "add_generation_prompt",
        "bos_token",
        "strftime_now",
    )
    refused: list[dict[str, Any]] = [{"chat_template_kwargs": {name: []}} for name in reserved]
    for fields in [*refused, {"chat_template": "{{7*7}}"}, {"chat_template_kwargs": 7}, {"chat_template_kwargs": []}]:
        assert with_fields(server, CHAT, fields)[0] == 422, fields
        assert quickest(server, CHAT, body_of(CHAT, fields)) <= 0.050, fields
    assert with_fields(server, CHAT, {"chat_template_kwargs": {"enable_thinking": False}})[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_template_that_would_never_end_fails_its_own_request_only(server: Server, stream: bool) -> None:
    golden = server.stream("In the beginning", max_new_tokens=60, ignore_eos_token=True)
    for word in ("loop", "recurse", "refuse"):
        fields = {"messages": [{"role": "user", "content": word}], "stream": stream}
        status, answer, _ = with_fields(server, CHAT, fields)
        assert (status, answer["error_type"]) == (422, "template_error"), (word, answer)
        assert word != "refuse" or answer["error"]["message"] == "Template error: roles must alternate"
        assert quickest(server, CHAT, body_of(CHAT, fields)) <= 0.200, word
        assert with_fields(server, COMPLETIONS, {})[0] == with_fields(server, CHAT, {})[0] == 200
    assert server.stream("In the beginning", max_new_tokens=60, ignore_eos_token=True).same_as(golden)


def tool(parameters: Any, name: str = "f") -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": name, "parameters": parameters}}]


def test_tools_that_are_none_and_choices_of_none_are_refused(server: Server) -> None:
    for parameters in ("x", None, [], {"type": "strnig"}, {"properties": {"a": {"type": 7}}}):
        for choice in ("auto", "none", "required"):
            status, answer, _ = with_fields(server, CHAT, {"tools": tool(parameters), "tool_choice": choice})
            assert status == 422, (parameters, choice, answer)
            assert answer["error"]["param"].startswith("tools[0]"), answer
    unclosed = tool({"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}})
    status, answer, _ = with_fields(server, CHAT, {"tools": unclosed, "tool_choice": "required"})
    assert status == 422
    assert "/properties/a" in answer["error"]["message"]
    sound = tool({"type": "object", "properties": {}})
    missing = {"type": "function", "function": {"name": "missing"}}
    for choice in ("missing", missing, 7, {}, [], True):
        status, answer, _ = with_fields(server, CHAT, {"tools": sound, "tool_choice": choice})
        assert status == 422, (choice, answer)
    for fields in ({}, {"tools": []}, {"tools": None}):
        assert with_fields(server, CHAT, fields | {"tool_choice": "required"})[0] == 422


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_an_expression_in_a_tool_that_is_none_is_refused_whatever_the_choice(server: Server, choice: str) -> None:
    unclosed = tool({"properties": {"a": {"pattern": "("}}})
    status, answer, _ = with_fields(server, CHAT, {"tools": unclosed, "tool_choice": choice})
    assert status == 422, answer


def test_arguments_in_the_history_may_be_anything_and_break_nothing(server: Server) -> None:
    deep = '{"a":' * 2000 + "1" + "}" * 2000
    for arguments, expected in (("{", 200), ({"a": 1}, 200), ('{"a": 1}', 200), ("a" * 1_000_000, 422), (deep, 422)):
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        said = {"role": "assistant", "content": None, "tool_calls": [call]}
        messages = [*USER, said, {"role": "tool", "tool_call_id": "1", "content": "x"}]
        status, answer, _ = with_fields(server, CHAT, {"messages": messages})
        assert status == expected, (str(arguments)[:40], answer)


def test_the_depth_of_a_schema_is_bounded(server: Server) -> None:
    def raw(begin: str, depth: int, end: str) -> bytes:
        schema = begin * depth + '{"type":"string"}' + end * depth
        head = '{"inputs":"a","parameters":{"max_new_tokens":4,"grammar":{"type":"json","value":'
        return f"{head}{schema}}}}}}}".encode()

    for begin, end in (('{"items":', "}"), ('{"type":"object","required":["a"],"properties":{"a":', "}}")):
        assert ask(server, GENERATE, raw(begin, 60, end))[0] == 200
        for depth in (130, 5000):
            # Deeper than JSON is read here at all.
            status, answer, _ = ask(server, GENERATE, raw(begin, depth, end))
            assert (status, answer["error_type"]) == (422, "validation"), answer
            assert "nested deeper than 127 levels" in answer["error"]
        text = begin * 5000 + "{}" + end * 5000
        assert with_fields(server, GENERATE, {"grammar": {"type": "json", "value": text}})[0] == 422


def test_what_a_schema_refers_to_elsewhere_is_neither_fetched_nor_opened(server: Server, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text('{"type": "string"}')
    with listener() as (port, connected), Opened(tmp_path) as opened:
        for reference in (f"http://127.0.0.1:{port}/", f"file://{tmp_path}/schema.json", f"{tmp_path}/schema.json"):
            schema = {"type": "object", "properties": {"a": {"$ref": reference}}, "required": ["a"]}
            for value in (schema, {"$ref": reference}):
                status, answer, _ = with_fields(server, GENERATE, {"grammar": {"type": "json", "value": value}})
                assert status == 422, answer
                assert "`grammar`: " in answer["error"]
            wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
            assert with_fields(server, CHAT, {"response_format": wanted})[0] == 422
            assert with_fields(server, CHAT, {"tools": tool(schema), "tool_choice": "required"})[0] == 422
        time.sleep(0.2)
        assert connected == []
        assert opened.names() == []


def test_a_refusal_of_a_stream_has_its_own_status_on_every_route(server: Server) -> None:
    refused: list[tuple[str, dict[str, Any]]] = [
        ("/", {"inputs": "", "stream": True}),
        ("/", {"inputs": "a", "stream": True, "parameters": {"temperature": 0}}),
        (STREAM, {"inputs": "a", "parameters": {"max_new_tokens": 4096}}),
        (STREAM, {"inputs": "a", "parameters": {"grammar": {"type": "regex", "value": "("}}}),
        (CHAT, {"messages": USER, "stream": True, "max_tokens": 4096}),
        (CHAT, {"messages": USER, "stream": True, "tool_choice": "required"}),
        (COMPLETIONS, {"prompt": "", "stream": True}),
        (COMPLETIONS, {"prompt": "a " * 4000, "stream": True}),
        ("/invocations", {"inputs": "", "stream": True}),
    ]
    for path, body in refused:
        status, answer, _ = ask(server, path, body)
        assert status == 422, (path, body, answer)


def test_what_a_client_accepts_does_not_turn_a_stream_into_a_list(server: Server) -> None:
    headers = JSON_HEADERS | {"Accept": "application/json"}
    for path, body in ((STREAM, {"inputs": "a"}), (CHAT, LEAST[CHAT] | {"stream": True})):
        status, content, _ = ask(server, path, body, headers)
        assert status == 200
        assert re.match(rb'data: ?\{"', content), content[:80]
