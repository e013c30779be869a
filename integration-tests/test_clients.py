"""The official clients find what they expect: `openai` and `huggingface_hub`, against a server of the small model.

PyPI's `text-generation` 0.7.0 wants a huggingface_hub before 1.0 and cannot be installed beside what the shards need:
`support/text_generation_client.py` runs it in an environment of its own.
"""

import asyncio
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pydantic
import pytest
from conftest import LLAMA
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import HfHubHTTPError, ValidationError
from openai.types.chat import ChatCompletionMessageFunctionToolCall
from support.server import Server

KEY = "a key of the tests"
TEMPLATE = (
    "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MESSAGES: Any = [{"role": "user", "content": "In the beginning"}]
TOOLS: Any = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
GREEDY: Any = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder: Path = tmp_path_factory.mktemp("template")
    (folder / "chat.jinja").write_text(TEMPLATE)
    flags = ["--dtype", "float32", "--chat-template", str(folder / "chat.jinja"), "--max-client-batch-size", "8"]
    with Server(LLAMA, *flags, env={"API_KEY": KEY}) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key=KEY, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def hub(server: Server) -> InferenceClient:
    return InferenceClient(f"http://127.0.0.1:{server.port}", token=KEY, timeout=60)


def test_a_chat_is_the_same_streamed_or_not(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tgi", messages=MESSAGES, **GREEDY)
    choice = whole.choices[0]
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12
    chunks = list(
        client.chat.completions.create(
            model="tgi", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    deltas = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(delta.delta.content or "" for delta in deltas) == choice.message.content
    assert [delta.delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["length"]
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_choices_differ_and_a_seed_repeats_them(client: openai.OpenAI) -> None:
    def texts() -> list[str | None]:
        answer = client.chat.completions.create(
            model="tgi", messages=MESSAGES, n=3, seed=11, max_tokens=12, temperature=1.5
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.message.content for choice in answer.choices]

    first = texts()
    assert len(set(first)) == 3
    assert texts() == first


def test_log_probabilities_add_up_to_the_text(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tgi", messages=MESSAGES, logprobs=True, top_logprobs=3, **GREEDY
    ).choices[0]
    assert answer.logprobs is not None
    tokens = answer.logprobs.content or []
    assert b"".join(bytes(token.bytes or []) for token in tokens).decode() == answer.message.content
    for token in tokens:
        assert len(token.top_logprobs) == 3
        # Greedy: nothing is more probable than what was taken.
        assert token.top_logprobs[0].logprob == token.logprob <= 0


def test_stop_strings_are_cut_off(client: openai.OpenAI) -> None:
    text = client.chat.completions.create(model="tgi", messages=MESSAGES, **GREEDY).choices[0].message.content or ""
    stop = text[3:6]
    stopped = client.chat.completions.create(model="tgi", messages=MESSAGES, stop=stop, **GREEDY).choices[0]
    assert stopped.message.content == text[: text.index(stop)]
    assert stopped.finish_reason == "stop"


def test_biases_and_penalties_change_what_is_said(client: openai.OpenAI) -> None:
    def ids(**options: Any) -> list[int]:
        answer = client.chat.completions.create(
            model="tgi",
            messages=MESSAGES,
            temperature=0,
            max_tokens=40,
            extra_body={"return_token_ids": True, "ignore_eos": True},
            **options,
        )
        found: list[int] = (answer.choices[0].model_extra or {})["token_ids"]
        return found

    assert ids(logit_bias={"300": 100}) == ids(logit_bias={"300": 20}) == [300] * 40
    # Each time that 300 was said costs 2 more, at last 78; that it was said at all costs 2 once.
    assert ids(logit_bias={"300": 20}, frequency_penalty=2) != [300] * 40
    assert ids(logit_bias={"300": 100}, presence_penalty=2) == [300] * 40


def test_tools_may_be_left_alone_and_must_exist(client: openai.OpenAI) -> None:
    for choice in ("auto", "none"):
        answer = client.chat.completions.create(
            model="tgi", messages=MESSAGES, tools=TOOLS, tool_choice=choice, **GREEDY
        )
        assert answer.choices[0].finish_reason == "length"
        assert answer.choices[0].message.tool_calls is None
    named: Any = {"type": "function", "function": {"name": "absent"}}
    with pytest.raises(openai.UnprocessableEntityError, match="not found"):
        client.chat.completions.create(model="tgi", messages=MESSAGES, tools=TOOLS, tool_choice=named, **GREEDY)


LOOK: Any = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 8},
                "days": {"type": "integer", "minimum": 1, "maximum": 30},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look"}}], ids=str)
def test_a_call_that_is_forced_is_read_whole_and_in_pieces(client: openai.OpenAI, choice: Any) -> None:
    options: Any = {"model": "tgi", "messages": MESSAGES, "tools": [LOOK], "tool_choice": choice, "temperature": 0}
    whole = client.chat.completions.create(max_tokens=200, **options).choices[0]
    assert whole.finish_reason == "tool_calls"
    (call,) = whole.message.tool_calls or []
    assert isinstance(call, ChatCompletionMessageFunctionToolCall)
    assert call.function.name == "look"
    jsonschema.validate(json.loads(call.function.arguments), LOOK["function"]["parameters"])
    chunks = client.chat.completions.create(max_tokens=200, stream=True, **options)
    deltas = [piece for chunk in chunks for piece in chunk.choices[0].delta.tool_calls or []]
    assert {delta.index for delta in deltas} == {0}
    assert [delta.function.name for delta in deltas if delta.function and delta.function.name] == ["look"]
    assert len([delta.id for delta in deltas if delta.id]) == 1
    arguments = "".join(delta.function.arguments or "" for delta in deltas if delta.function)
    assert arguments == call.function.arguments


def test_a_strict_schema_is_kept_to_and_parsed(client: openai.OpenAI) -> None:
    class Place(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="forbid")
        city: str = pydantic.Field(max_length=8)
        days: int = pydantic.Field(ge=1, le=30)

    parsed = client.chat.completions.parse(
        model="tgi", messages=MESSAGES, response_format=Place, max_tokens=200, temperature=0
    )
    assert parsed.choices[0].message.parsed is not None
    jsonschema.validate(json.loads(parsed.choices[0].message.content or ""), Place.model_json_schema())
    schema: Any = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": {"enum": []}}}
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        client.chat.completions.create(model="tgi", messages=MESSAGES, response_format=schema)
    assert "response_format" in str(refused.value)


def test_the_asynchronous_client_gets_the_same(server: Server, client: openai.OpenAI) -> None:
    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key=KEY, max_retries=0, timeout=60) as other:
            asked = [other.chat.completions.create(model="tgi", messages=MESSAGES, **GREEDY) for _ in range(3)]
            texts = [answer.choices[0].message.content or "" for answer in await asyncio.gather(*asked)]
            stream = await other.chat.completions.create(model="tgi", messages=MESSAGES, stream=True, **GREEDY)
            return [*texts, "".join([chunk.choices[0].delta.content or "" async for chunk in stream])]

    assert len(set(asyncio.run(main()))) == 1


def test_a_marked_text_has_no_id_but_green_ones() -> None:
    import torch
    from transformers import WatermarkLogitsProcessor

    with Server(LLAMA, "--dtype", "float32", "--watermark-gamma", "0.25", env={"WATERMARK_DELTA": "80"}) as server:
        prompt = "In the beginning"
        plain = server.generate(prompt, max_new_tokens=24, ignore_eos_token=True, decoder_input_details=True)
        marked = server.generate(prompt, max_new_tokens=24, ignore_eos_token=True, watermark=True)
    processor = WatermarkLogitsProcessor(4096, "cpu", greenlist_ratio=0.25, bias=1.0)
    before = plain["details"]["prefill"][-1]["id"]

    def num_green(ids: list[int]) -> int:
        pairs = zip([before, *ids], ids, strict=False)
        rows = [processor(torch.tensor([[0, last]]), torch.zeros(1, 4096))[0] for last, _ in pairs]
        return sum(int(row[token_id]) for row, token_id in zip(rows, ids, strict=True))

    ids = [token["id"] for token in marked["details"]["tokens"]]
    assert num_green(ids) == 24
    assert num_green([token["id"] for token in plain["details"]["tokens"]]) < 20


def test_completions_take_lists_ids_and_echo(client: openai.OpenAI) -> None:
    prompts = ["The function returns", "In the beginning"]
    both = client.completions.create(model="tgi", prompt=prompts, **GREEDY)
    assert [choice.index for choice in both.choices] == [0, 1]
    alone = [client.completions.create(model="tgi", prompt=prompt, **GREEDY).choices[0].text for prompt in prompts]
    assert [choice.text for choice in both.choices] == alone
    ids = (
        client.completions.create(model="tgi", prompt=prompts[0], extra_body={"return_token_ids": True}, **GREEDY)
        .choices[0]
        .model_extra
        or {}
    )
    again = client.completions.create(model="tgi", prompt=ids["prompt_token_ids"], **GREEDY)
    assert again.choices[0].text == alone[0]
    chunks = client.completions.create(model="tgi", prompt=prompts[1], stream=True, echo=True, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in chunks) == prompts[1] + alone[1]


def test_the_score_of_a_prompt_is_that_of_transformers(client: openai.OpenAI) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompt = "The function returns the number of items in the list"
    scored = client.completions.create(model="tgi", prompt=prompt, echo=True, logprobs=1, max_tokens=0)
    logprobs = scored.choices[0].logprobs
    assert logprobs is not None
    assert scored.choices[0].text == prompt
    model = AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(LLAMA)(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        all_logprobs = model(ids).logits[0].log_softmax(-1)
    expected = all_logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()
    assert logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None
    assert logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-3)
    best = [max(top.values()) for top in (logprobs.top_logprobs or [])[1:] if top]
    assert best == pytest.approx(all_logprobs[:-1].amax(-1).tolist(), abs=1e-3)


def test_errors_become_the_exceptions_that_the_client_has_for_them(server: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4", messages=MESSAGES)
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        client.chat.completions.create(model="tgi", messages=MESSAGES, top_p=2)
    assert refused.value.param == "top_p"
    stranger = openai.OpenAI(base_url=client.base_url, api_key="another", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    assert [model.id for model in client.models.list()] == [client.models.list().data[0].id]
    assert (
        client.models.retrieve("tgi-is-none".replace("tgi-is-none", client.models.list().data[0].id)).object == "model"
    )
    assert KEY not in server.log()


def test_the_clients_of_the_hub_read_every_field(hub: InferenceClient) -> None:
    options: Any = {"max_new_tokens": 8, "decoder_input_details": True, "top_n_tokens": 2, "details": True}
    whole = hub.text_generation("In the beginning", **options)
    assert whole.details is not None
    assert len(whole.details.tokens) == whole.details.generated_tokens == 8
    # The first token of a prompt follows nothing.
    assert (whole.details.prefill[0].id, whole.details.prefill[0].logprob) == (1, None)
    assert all(token.logprob < 0 for token in whole.details.prefill[1:])
    assert all(len(top) >= 2 for top in whole.details.top_tokens or [])
    events = list(hub.text_generation("In the beginning", max_new_tokens=8, details=True, stream=True))
    # The client asks `/`, which repeats the prompt.
    text = "In the beginning" + "".join(event.token.text for event in events)
    assert text == whole.generated_text == events[-1].generated_text
    best = hub.text_generation("In the", max_new_tokens=4, best_of=2, do_sample=True, details=True)
    assert best.details is not None
    assert len(best.details.best_of_sequences or []) == 1
    chat = hub.chat_completion(MESSAGES, max_tokens=6, temperature=0.01)
    assert chat.choices[0].message.role == "assistant"
    pieces = hub.chat_completion(MESSAGES, max_tokens=6, temperature=0.01, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in pieces)
    assert text == chat.choices[0].message.content


def test_the_clients_of_the_hub_raise_what_the_server_refuses(hub: InferenceClient) -> None:
    with pytest.raises(ValidationError, match="max_new_tokens"):
        hub.text_generation("a", max_new_tokens=10**6)
    with pytest.raises(HfHubHTTPError):
        hub.chat_completion(MESSAGES, max_tokens=4, top_p=2)
    grammar = {"type": "json", "value": LOOK["function"]["parameters"]}
    text = hub.text_generation("In the", max_new_tokens=200, grammar=grammar, return_full_text=False)
    jsonschema.validate(json.loads(text), LOOK["function"]["parameters"])


def test_the_asynchronous_client_of_the_hub_streams(server: Server) -> None:
    async def main() -> str:
        hub = AsyncInferenceClient(f"http://127.0.0.1:{server.port}", token=KEY)
        tokens = await hub.text_generation("In the beginning", max_new_tokens=5, stream=True)
        return "".join([token async for token in tokens])

    assert asyncio.run(main())

    async def chat() -> tuple[str, str]:
        hub = AsyncInferenceClient(f"http://127.0.0.1:{server.port}", token=KEY)
        options: Any = {"max_tokens": 5, "temperature": 0.01, "seed": 1}
        whole = await hub.chat_completion(MESSAGES, **options)
        chunks = await hub.chat_completion(MESSAGES, stream=True, **options)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])
        return whole.choices[0].message.content or "", text

    whole, streamed = asyncio.run(chat())
    assert whole == streamed


def test_metrics_are_what_a_client_counts(server: Server, client: openai.OpenAI) -> None:
    def counted() -> dict[str, float]:
        connection_text = client.with_options(base_url=f"http://127.0.0.1:{server.port}").get("/metrics", cast_to=str)
        lines = [line.rsplit(" ", 1) for line in connection_text.splitlines() if line and line[0] != "#"]
        return {name: float(value) for name, value in lines}

    before = counted()
    for _ in range(3):
        client.chat.completions.create(model="tgi", messages=MESSAGES, **GREEDY)
    after = counted()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["tgi_request_count"] == grown["tgi_request_success"] == 3
    assert grown["tgi_request_generated_tokens_sum"] == 36
    assert grown["tgi_request_time_to_first_token_duration_count"] == 3
    assert grown["tgi_request_inter_token_duration_count"] == 33
    assert grown["tgi_prefix_hit_tokens"] >= 0
    assert json.dumps(sorted(name for name in after if "state=" in name)).count("tgi_kv_blocks") == 3


def test_times_and_tokens_of_the_metrics_are_those_that_a_client_measures(
    server: Server, client: openai.OpenAI
) -> None:
    """Within five in a hundred, with several clients at once."""
    of_metrics = (
        "tgi_request_count", "tgi_request_success", "tgi_request_input_length_sum",
        "tgi_request_generated_tokens_sum", "tgi_request_duration_sum", "tgi_request_inter_token_duration_sum",
    )  # fmt: skip

    def counted() -> list[float]:
        text = client.with_options(base_url=f"http://127.0.0.1:{server.port}").get("/metrics", cast_to=str)
        lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if line and line[0] != "#")
        return [float(lines.get(name, 0)) for name in of_metrics]

    def ask(n: int) -> list[float]:
        options: Any = {"max_tokens": 400 + 40 * n, "extra_body": {"ignore_eos": True}, "temperature": 0}
        begun = time.monotonic()
        chunks = client.chat.completions.create(
            model="tgi", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **options
        )
        at, usage = [], None
        for chunk in chunks:
            at.append(time.monotonic())
            usage = chunk.usage or usage
        assert usage is not None
        return [1, 1, usage.prompt_tokens, usage.completion_tokens, at[-1] - begun, at[-1] - at[0]]

    ask(0)
    off = []
    # Where other work holds up this client, its own times are longer than the server's: not three times in a row.
    for _ in range(3):
        before = counted()
        with ThreadPoolExecutor(4) as pool:
            measured = [sum(values) for values in zip(*pool.map(ask, range(4)), strict=True)]
        told = [after - value for after, value in zip(counted(), before, strict=True)]
        assert measured[:4] == told[:4]
        off.append(max(abs(its - mine) / mine for mine, its in zip(measured, told, strict=True)))
        if off[-1] <= 0.05:
            return
    raise AssertionError(
        f"times differ by {off}: {dict(zip(of_metrics, zip(measured, told, strict=True), strict=True))}"
    )
