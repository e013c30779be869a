"""Calibration text: what is read of files, how it is cut, what is refused."""

import json
import socket
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import tiny
import tokenizers
import transformers
from text_generation_server.errors import ShardError
from text_generation_server.quantize import documents
from text_generation_server.quantize.settings import Sampling
from text_generation_server.quantize.windows import Windows, make_windows

TEXTS = [f"Document {i}: the quick brown fox jumps over the lazy dog {i * 7} times." for i in range(60)]
CHATS = [[{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": text}]
         for i, text in enumerate(TEXTS)]  # fmt: skip
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('unknown role') }}{% endif %}<|{{ message['role'] }}|>{{ message['content'] | trim }}"
    "{{ eos_token }}\n{% endfor %}"
)


def write(path: Path, texts: list[str]) -> Path:
    if path.suffix == ".txt":
        path.write_text("\n%%%%\n".join(texts))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    return path


def model_with_template(folder: Path, place: str) -> Path:
    folder.mkdir()
    settings = json.loads((tiny.LLAMA / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    if place == "file":
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    elif place == "list":
        settings["chat_template"] = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}]
    elif place == "text":
        settings["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_bytes((tiny.LLAMA / "tokenizer.json").read_bytes())
    (folder / "config.json").write_bytes((tiny.LLAMA / "config.json").read_bytes())
    return folder


def cut(dataset: Path | str | None, model: Path = tiny.LLAMA, **sampling: Any) -> Windows:
    opened = documents.open_documents(None if dataset is None else str(dataset), model)
    return make_windows(opened, model, Sampling(**sampling), 2048, 4096)


def stream(texts: list[str], special: bool) -> list[int]:
    tokenizer = tokenizers.Tokenizer.from_file(str(tiny.LLAMA / "tokenizer.json"))
    return [i for text in texts for i in tokenizer.encode(text, add_special_tokens=special).ids]


def pieces(ids: list[int], length: int) -> set[tuple[int, ...]]:
    return {tuple(ids[i : i + length]) for i in range(0, len(ids) - length + 1, length)}


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".parquet"])
def test_texts_of_every_kind_of_file_become_the_same_sequences(kind: str, tmp_path: Path) -> None:
    found = cut(write(tmp_path / f"data{kind}", TEXTS), num_samples=16, length=32)
    expected = pieces(stream(TEXTS, special=True), 32)
    assert len(found.measured) == 16 and len(found.held_back) == 2
    chosen = {tuple(window) for window in [*found.measured, *found.held_back]}
    assert len(chosen) == 18 and chosen <= expected


@pytest.mark.parametrize("place", ["file", "list", "text"])
@pytest.mark.parametrize("kind", ["messages", "conversations", "parquet"])
def test_chats_go_through_the_model_s_template_as_in_transformers(place: str, kind: str, tmp_path: Path) -> None:
    model = model_with_template(tmp_path / "model", place)
    path = tmp_path / ("chats.parquet" if kind == "parquet" else "chats.jsonl")
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"messages": CHATS}), path)
    elif kind == "messages":
        path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    else:
        names = {"user": "human", "assistant": "gpt"}
        turns = [[{"from": names[t["role"]], "value": t["content"]} for t in chat] for chat in CHATS]
        path.write_text("".join(json.dumps({"conversations": t}) + "\n" for t in turns))
    found = cut(path, model, num_samples=8, length=32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    rendered = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in CHATS]
    assert {tuple(window) for window in found.measured} <= pieces(stream(rendered, special=False), 32)


def test_the_seed_decides_and_nothing_else() -> None:
    draws = [cut(None, num_samples=8, length=64, seed=seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] and draws[0].digest == draws[1].digest
    assert draws[0].measured != draws[2].measured and draws[0].digest != draws[2].digest


def test_the_bundled_set_suffices_for_the_usual_run_without_any_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    found = cut(None)
    assert found.length == 2048 and len(found.measured) >= 96 and len(found.held_back) >= 12
    held = {tuple(window) for window in found.held_back}
    assert not held & {tuple(window) for window in found.measured}


REFUSED: list[tuple[str, str | bytes | None, str]] = [
    ("none.txt", None, "no such file; expected a .txt, .jsonl or .parquet file, or one of wikitext2, c4, ptb"),
    ("empty.txt", "", "the file is empty"),
    ("blank.txt", "\n \n%%%%\n\n", "has fewer than 32 tokens; expected at least 64"),
    ("short.txt", "A few words. " * 20, "--num-samples 1"),
    ("data.csv", "a,b", "files of type '.csv' are not read"),
    ("data.jsonl", "{]", "line 1 is not JSON"),
    ("data.jsonl", '{"prompt": "x"}', "the first record has prompt (str); expected 'text'"),
    ("data.jsonl", '{"text": "x"}\n{"text": 3}', "record 2 has no text in 'text'"),
    ("data.jsonl", '{"messages": [{"role": "user", "content": "x"}]}', "has no chat template"),
    ("data.parquet", "no parquet", "cannot be read as parquet"),
    ("latin.txt", b"caf\xe9 " * 400, "is not UTF-8 at byte 3"),
    ("latin.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}', "is not UTF-8 behind line "),
    ("deep.jsonl", "[" * 100_000, "line 1 cannot be read: it is nested too deeply"),
    ("long.jsonl", '{"text": ' + "7" * 6000 + "}", "line 1 cannot be read: a number has too many digits"),
    ("data.jsonl", '{"text": {"a": 1}}', "the first record has text (dict); expected 'text' (a text)"),
    ("data.json", "{}", "files of type '.json' are not read; expected .txt, .jsonl (a JSON value in each line)"),
]


@pytest.mark.parametrize(("name", "content", "said"), REFUSED)
def test_what_holds_no_text_is_refused_in_words(
    name: str, content: str | bytes | None, said: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.write_text(content)
    model = model_with_template(tmp_path / "model", "none")
    with pytest.raises(ShardError) as caught:
        cut(path, model, num_samples=16, length=32)
    assert said in str(caught.value)


def test_what_sets_that_people_collect_have_beside_text_is_passed_over(tmp_path: Path) -> None:
    """A byte order mark, records without text, halves of surrogates, an upper-case name."""
    plain, odd = tmp_path / "plain.jsonl", tmp_path / "odd.JSONL"
    text = "A sentence of some words. " * 40
    plain.write_text(json.dumps({"text": text + "?"}) + "\n")
    lines = [{"text": None}, {"text": text + "\ud800"}, {"text": None}]
    odd.write_bytes("\ufeff".encode() + "".join(json.dumps(line) + "\n" for line in lines).encode())
    model = model_with_template(tmp_path / "model", "none")
    windows = [cut(path, model, num_samples=2, length=32) for path in (odd, plain)]
    assert windows[0].measured == windows[1].measured


def test_a_folder_is_not_called_absent(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="is not a plain file"):
        cut(tmp_path)


def test_a_turn_that_calls_a_tool_needs_no_text(tmp_path: Path) -> None:
    model = model_with_template(tmp_path / "model", "file")
    path = tmp_path / "chats.jsonl"
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    turns = [{"role": "user", "content": "A sentence of some words. " * 40}, call]
    path.write_text(json.dumps({"messages": turns}) + "\n")
    assert cut(path, model, num_samples=2, length=32).measured


def test_a_record_that_the_template_does_not_take_is_refused(tmp_path: Path) -> None:
    model = model_with_template(tmp_path / "model", "file")
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "robot", "content": "x"}]}))
    with pytest.raises(ShardError, match=r"does not take a record of --dataset: unknown role; it begins .*robot"):
        cut(path, model, num_samples=1, length=8)


def test_a_sequence_longer_than_the_model_s_positions_is_refused() -> None:
    with pytest.raises(ShardError, match="--sequence-length 4096 is more than the model's 2048 positions"):
        cut(None, length=4096)
