"""Limits, errors and small endpoints, by table. Every refusal leaves a stream that runs meanwhile as it is."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import LLAMA
from support.load import Crowd, assert_same, mixed_cases
from support.server import JSON_HEADERS, Server, wait_until

BIG = 4294967296

REFUSED_PARAMETERS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": -1},
    {"temperature": "0.5"},
    {"temperature": True},
    {"temperature": 1e39},
    {"top_p": 0},
    {"top_p": -0.1},
    {"top_p": 1.0},
    {"top_p": 1.0000001},
    {"typical_p": 0},
    {"typical_p": 1.0},
    {"top_k": 0},
    {"top_k": -1},
    {"top_k": 1.5},
    {"repetition_penalty": 0},
    {"repetition_penalty": -1},
    {"repetition_penalty": 1e39},
    {"frequency_penalty": 2.0000001},
    {"frequency_penalty": -2.5},
    {"max_new_tokens": 0},
    {"max_new_tokens": -1},
    {"max_new_tokens": 1.5},
    {"max_new_tokens": BIG},
    {"max_new_tokens": BIG - 1},
    {"stop": ["a", "b", "c", "d", "e"]},
    {"stop": [""]},
    {"stop": [None]},
    {"stop": "a"},
    {"seed": -1},
    {"seed": 18446744073709551616},
    {"truncate": 0},
    {"truncate": 100000},
    {"details": "yes"},
    {"best_of": 0},
    {"best_of": 3},
    {"best_of": 2, "seed": 1, "do_sample": True},
    {"adapter_id": "../../../../etc/passwd"},
    {"grammar": {"type": "regex", "value": "("}},
    {"top_n_tokens": 6},
]

ACCEPTED_PARAMETERS: list[dict[str, Any]] = [
    {},
    {"temperature": None, "top_k": None, "top_p": None, "stop": None, "seed": None, "do_sample": None},
    {"temperature": 0.01},
    {"top_p": 1e-40, "do_sample": True},
    {"top_k": 2147483647, "do_sample": True},
    {"seed": 18446744073709551615, "do_sample": True},
    {"frequency_penalty": 2.0},
    {"frequency_penalty": -2.0},
    {"truncate": 1},
    {"stop": ["a", "b", "c", "d"]},
    {"best_of": 1},
    {"watermark": False, "decoder_input_details": False},
    {"watermark": True, "do_sample": True},
    {"decoder_input_details": True, "top_n_tokens": 5},
    {"best_of": 2, "do_sample": True},
    {"nobody_knows_this": 1},
]

# Found in TGI, in the order in which it looks: with two of them wrong, the first is told.
TOLD: list[tuple[str, dict[str, Any], str]] = [
    ("/generate_stream", {"best_of": 2, "do_sample": True}, "`best_of` != 1 is not supported when streaming tokens"),
    (
        "/generate_stream",
        {"decoder_input_details": True},
        "`decoder_input_details` == true is not supported when streaming tokens",
    ),
    ("/generate", {"best_of": 3, "do_sample": True}, "`best_of` must be > 0 and <= 2. Given: 3"),
    ("/generate", {"best_of": 2}, "you must use sampling when `best_of` is > 1"),
    ("/generate", {"temperature": 0}, "`temperature` must be strictly positive"),
    ("/generate", {"repetition_penalty": 0}, "`repetition_penalty` must be strictly positive"),
    ("/generate", {"frequency_penalty": 2.5}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ("/generate", {"top_p": 1.0}, "`top_p` must be > 0.0 and < 1.0"),
    ("/generate", {"typical_p": 0}, "`typical_p` must be > 0.0 and < 1.0"),
    ("/generate", {"top_k": 0}, "`top_k` must be strictly positive"),
    ("/generate", {"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
    ("/generate", {"stop": ["a"] * 5}, "`stop` supports up to 4 stop sequences. Given: 5"),
    ("/generate", {"best_of": 2, "do_sample": True, "seed": 1}, "`seed` must not be set when `best_of` > 1"),
    ("/generate", {"top_n_tokens": 6}, "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
    ("/generate", {"truncate": 0}, "`truncate` must be strictly positive and less than 2047. Given: 0"),
    (
        "/generate",
        {"max_new_tokens": 2048},
        "`inputs` tokens + `max_new_tokens` must be <= 2048. Given: 5 `inputs` tokens and 2048 `max_new_tokens`",
    ),
]

MALFORMED: list[tuple[bytes, int]] = [
    (b"", 400),
    (b'{"inputs":"hi"', 400),
    (b'{"inputs":"a"} x', 400),
    (b'\xef\xbb\xbf{"inputs":"a"}', 400),
    (b'{"inputs":"a",}', 400),
    (b'{"inputs":"\xff"}', 400),
    (b'{"inputs":"a","parameters":{"seed":' + b"9" * 100_000 + b"}}", 422),
    (b'{"inputs":"a","parameters":{"temperature":NaN}}', 400),
    (b'{"inputs":"a","parameters":{"seed":01}}', 400),
    (b"[" * 100_000, 400),
    (b'["hi"]', 422),
    (b'"hi"', 422),
    (b"7", 422),
    (b"null", 422),
    (b"{}", 422),
    (b'{"inputs":5}', 422),
    (b'{"inputs":""}', 422),
    (b'{"inputs":"a","parameters":[]}', 422),
]


def assert_json_error(body: Any) -> None:
    """The shape of every native error: two strings, small, without the inside of the server."""
    assert set(body) == {"error", "error_type"}, body
    text = json.dumps(body)
    assert len(text) <= 2048 and "Traceback" not in text and "panicked" not in text and ".rs" not in text, text


@pytest.fixture(scope="module", autouse=True)
def undisturbed(llama: Server) -> Any:
    """Streams that run while the others are refused stay as they are; afterwards everything is back."""
    cases = mixed_cases(2, max_new_tokens=800)
    golden = Crowd(llama, cases).join()
    crowd = Crowd(llama, cases)
    yield
    assert_same(crowd.join(), golden, "while requests were refused")
    llama.wait_clean()


@pytest.fixture(scope="module", autouse=True)
def slow_client(llama: Server) -> Iterator[Callable[[], tuple[bytes, float]]]:
    """Begins a head and sends no more; what it is answered, and after how long. It waits while other tests run."""
    answer = bytearray()
    ended = []
    started = time.monotonic()

    def send_and_wait() -> None:
        with socket.create_connection(("127.0.0.1", llama.port), timeout=30) as s:
            s.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\n")
            while chunk := s.recv(4096):
                answer.extend(chunk)
        ended.append(time.monotonic())

    thread = threading.Thread(target=send_and_wait, daemon=True)
    thread.start()

    def wait() -> tuple[bytes, float]:
        thread.join(30)
        return bytes(answer), ended[0] - started

    yield wait
    thread.join(30)


@pytest.mark.parametrize("parameters", REFUSED_PARAMETERS, ids=str)
@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_a_parameter_out_of_range_is_refused(llama: Server, parameters: dict[str, Any], path: str) -> None:
    status, body = llama.post(path, {"inputs": "A list is a", "parameters": parameters})
    assert status == 422, body
    assert_json_error(body)
    assert body["error_type"] == "validation"


def test_refusals_have_the_words_of_tgi_in_its_order(llama: Server) -> None:
    for n, (path, parameters, text) in enumerate(TOLD):
        # Each with the next one that is refused by another field on the same route; a `temperature` asks for sampling.
        taken = {*parameters, *(("temperature", "top_p", "top_k", "typical_p") if parameters == {"best_of": 2} else ())}
        beside = [more for route, more, _ in TOLD[n + 1 :] if route == path and not set(more) & taken]
        for added in [{}, *beside[:1]]:
            status, body = llama.post(path, {"inputs": "A list is a", "parameters": parameters | added})
            assert (status, body["error"]) == (422, f"Input validation error: {text}"), (parameters, added)
    status, body = llama.post("/generate", {"inputs": ""})
    assert (status, body["error"]) == (422, "Input validation error: `inputs` cannot be empty")


@pytest.mark.parametrize("parameters", ACCEPTED_PARAMETERS, ids=str)
def test_a_parameter_at_its_limit_is_accepted(llama: Server, parameters: dict[str, Any]) -> None:
    status, body = llama.post("/generate", {"inputs": "A list is a", "parameters": {"max_new_tokens": 3} | parameters})
    assert status == 200, body


@pytest.mark.parametrize(("raw", "expected"), MALFORMED, ids=lambda v: str(v)[:40])
def test_a_malformed_body_is_refused(llama: Server, raw: bytes, expected: int) -> None:
    status, body = llama.post("/generate", raw)
    assert status == expected, body
    assert_json_error(body)


def test_the_length_limit_is_exact(llama: Server) -> None:
    limit = json.loads(llama.get("/info")[1])["max_total_tokens"]
    prompt = "In the beginning God created"
    length = llama.stream(prompt, max_new_tokens=1).events[-1]["details"]["input_length"]
    status, body = llama.post("/generate", {"inputs": prompt, "parameters": {"max_new_tokens": limit - length + 1}})
    assert status == 422 and str(limit) in body["error"], body
    answer = llama.generate(prompt, max_new_tokens=limit - length, stop=["e"])
    assert answer["details"]["finish_reason"] in ("stop_sequence", "eos_token")


def test_a_huge_text_is_refused_quickly(llama: Server) -> None:
    for text in ("a" * 1_900_000, "\n" * 900_000):
        started = time.monotonic()
        status, body = llama.post("/generate", {"inputs": text})
        assert status == 422, body
        assert_json_error(body)
        assert time.monotonic() - started < 2


def test_a_body_beyond_the_limit_is_413(llama: Server) -> None:
    status, body = llama.post("/generate", {"inputs": "a" * 2_100_000})
    assert status == 413
    assert_json_error(body)


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("POST", "/generate", {"Content-Type": "text/plain"}, 415),
        ("POST", "/generate", {}, 415),
        ("GET", "/generate", {}, 405),
        ("DELETE", "/health", {}, 405),
        ("GET", "/nothing", {}, 404),
        ("POST", "/v1/nothing", JSON_HEADERS, 404),
    ],
)
def test_every_rejection_is_json(llama: Server, method: str, path: str, headers: dict[str, str], status: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", llama.port, timeout=10)
    connection.request(method, path, b'{"inputs":"a"}' if method == "POST" else None, headers)
    response = connection.getresponse()
    assert response.status == status
    assert_json_error(json.loads(response.read()))
    connection.close()


def test_unicode_survives_the_way_there_and_back(llama: Server) -> None:
    for text in ("é🙂 naïve", "\u202e\u2066 bidi", "👨‍👩‍👧‍👦" * 20, "\x00\x01", "\ufffd\uffff"):
        answer = llama.generate(text, max_new_tokens=2, return_full_text=True)
        assert answer["generated_text"].startswith(text)


def test_the_small_endpoints_answer(llama: Server) -> None:
    for path in ("/", "/health", "/livez", "/readyz", "/startupz", "/ping"):
        assert llama.get(path)[0] == 200, path
    info = json.loads(llama.get("/info")[1])
    assert info["router"] == "text-generation-router"
    assert info["max_input_tokens"] < info["max_total_tokens"] == 2048
    metrics = llama.get("/metrics")[1].decode()
    for name in ("tgi_request_count", "tgi_request_success", "tgi_queue_size", "tgi_batch_current_size"):
        assert name in metrics, name


def test_the_root_route_answers_with_a_list_or_a_stream(llama: Server) -> None:
    status, body = llama.post("/", {"inputs": "A list is a", "parameters": {"max_new_tokens": 3}})
    assert status == 200 and isinstance(body, list) and len(body) == 1
    assert body[0]["generated_text"].startswith("A list is a")


def test_beyond_the_concurrency_limit_a_request_is_refused_at_once() -> None:
    with Server(LLAMA, "--max-concurrent-requests", "4") as server:
        crowd = Crowd(server, mixed_cases(4, max_new_tokens=250))
        wait_until(lambda: server.state()["permits"]["free"] == 0, 10, "all permits are taken")
        for path in ("/generate", "/generate_stream"):
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
            connection.request("POST", path, b'{"inputs":"a"}', JSON_HEADERS)
            response = connection.getresponse()
            body = json.loads(response.read())
            assert response.status == 429 and int(response.headers["Retry-After"]) >= 1
            assert body == {"error": "Model is overloaded", "error_type": "overloaded"}
            connection.close()
        crowd.join()
        assert server.wait_clean()["permits"]["free"] == 4


def test_a_client_that_sends_its_head_too_slowly_is_told_so(
    slow_client: Callable[[], tuple[bytes, float]],
) -> None:
    answer, seconds = slow_client()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 "), answer
    assert_json_error(json.loads(body))
    assert 9 < seconds < 20
