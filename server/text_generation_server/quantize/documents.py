"""Calibration text: documents of a file, of the hub, or those that come with this package. Never imports torch."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError

BUNDLED = Path(__file__).parent / "texts" / "calibration.txt"
SEPARATOR = "%%%%"
# With the mark that some editors write before the first character, or without.
UTF8 = "utf-8-sig"
# A longer text is taken in pieces of about so many characters, cut between lines.
MOST_CHARACTERS = 1 << 20
MAX_TEMPLATE_BYTES = 1 << 20
# How long the hub may take to tell of a file.
HUB_TIMEOUT_S = 10.0
Render = Callable[[list[dict[str, Any]]], str]


@dataclass(frozen=True)
class HubFile:
    """One file of a data set on the hub, in a format that holds no code."""

    repository: str
    path: str
    revision: str
    column: str


# `--dataset` names; the first file of each is far more than is ever used.
HUB = {
    "wikitext2": HubFile("Salesforce/wikitext", "wikitext-2-raw-v1/train-00000-of-00001.parquet", "main", "text"),
    "c4": HubFile("allenai/c4", "en/c4-train.00000-of-01024.json.gz", "main", "text"),
    "ptb": HubFile("ptb-text-only/ptb_text_only", "penn_treebank/train/0000.parquet", "refs/convert/parquet",
                   "sentence"),
}  # fmt: skip


@dataclass(frozen=True)
class Documents:
    """Where texts come from, in words, and the texts. is_chat: rendered by the template, markers and all."""

    source: str
    texts: Callable[[], Iterator[str]]
    is_chat: bool = False


def open_documents(dataset: str | None, model_dir: Path) -> Documents:
    """What `--dataset` names; None: the bundled set. Files are looked at, not read to their end.

    Raises:
        ConfigError: there is no such thing, or it holds no text.
    """
    if dataset is None:
        return Documents("bundled (documentation of free software)", lambda: split(BUNDLED))
    path = Path(dataset)
    if dataset in HUB and not path.exists():
        return _from_hub(dataset)
    if not path.is_file():
        found = "is not a plain file" if path.exists() else "no such file"
        raise ConfigError(
            f"--dataset {dataset!r}: {found}; expected a .txt, .jsonl or .parquet file, or one of "
            f"{', '.join(HUB)} from the hub; leave it out for the set that is bundled"
        )
    if path.stat().st_size == 0:
        raise ConfigError(f"--dataset {dataset}: the file is empty; expected text")
    match path.suffix.lower():
        case ".txt":
            return Documents(path.name, lambda: split(path))
        case ".jsonl":
            return _records(path, dataset, lambda: json_lines(path), model_dir)
        case ".parquet":
            return _records(path, dataset, lambda: parquet_rows(path), model_dir)
    raise ConfigError(
        f"--dataset {dataset}: files of type {path.suffix!r} are not read; expected .txt, .jsonl (a JSON value in each "
        "line), .parquet"
    )


def split(path: Path) -> Iterator[str]:
    """Documents of a plain text; a line with only %%%% separates them."""
    lines: list[str] = []
    size = 0
    try:
        with path.open(encoding=UTF8) as file:
            for line in file:
                is_end = line.rstrip("\n") == SEPARATOR
                if is_end or size > MOST_CHARACTERS:
                    yield "".join(lines)
                    lines, size = [], 0
                if not is_end:
                    lines.append(line)
                    size += len(line)
    except UnicodeDecodeError as error:
        raise ConfigError(f"--dataset {path}: is not UTF-8 at byte {error.start}; expected plain text") from error
    yield "".join(lines)


def json_lines(path: Path) -> Iterator[Any]:
    """One JSON value for each line that is not empty."""
    number = 0
    try:
        with gzip.open(path, "rt", encoding=UTF8) if path.suffix == ".gz" else path.open(encoding=UTF8) as file:
            for line in file:
                number += 1
                if line.strip():
                    yield _json(line, path, number)
    except UnicodeDecodeError as error:
        raise ConfigError(f"--dataset {path}: is not UTF-8 behind line {number}: {error.reason}") from error


def _json(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--dataset {path}: line {number} is not JSON: {error}") from error
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"
        raise ConfigError(f"--dataset {path}: line {number} cannot be read: {reason}") from error


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """One object for each row."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise ConfigError(f"--dataset {path}: cannot be read as parquet: {str(error).splitlines()[0]}") from error


def _records(path: Path, dataset: str, rows: Callable[[], Iterator[Any]], model_dir: Path) -> Documents:
    first = next(rows(), None)
    if first is None:
        raise ConfigError(f"--dataset {dataset}: holds no record; expected text")
    if isinstance(first, str) or (isinstance(first, dict) and isinstance(first.get("text", 0), str | None)):
        return Documents(path.name, lambda: (text_of(row, dataset, i) for i, row in enumerate(rows(), 1)))
    key = next((k for k in ("messages", "conversations") if isinstance(first, dict) and k in first), None)
    if key is None:
        kinds = {key: type(value).__name__ for key, value in first.items()} if isinstance(first, dict) else {}
        found = ", ".join(f"{key} ({kind})" for key, kind in kinds.items()) or type(first).__name__
        raise ConfigError(
            f"--dataset {dataset}: the first record has {found[:100]}; expected 'text' (a text), or 'messages' or "
            "'conversations' (a list of turns)"
        )
    render = read_template(model_dir)
    return Documents(
        path.name, lambda: (render(turns_of(row, key, dataset, i)) for i, row in enumerate(rows(), 1)), is_chat=True
    )


def text_of(row: Any, dataset: str, number: int, column: str = "text") -> str:
    text = row.get(column) if isinstance(row, dict) else row
    # A record without text is common in sets that people collect.
    if text is None and isinstance(row, dict) and column in row:
        return ""
    if not isinstance(text, str):
        raise ConfigError(f"--dataset {dataset}: record {number} has no text in {column!r}; found {str(row)[:80]!r}")
    return text


def turns_of(row: Any, key: str, dataset: str, number: int) -> list[dict[str, Any]]:
    """Turns as templates want them; `from` and `value` (ShareGPT) are understood."""
    turns = row.get(key) if isinstance(row, dict) else None
    if not isinstance(turns, list) or not turns:
        raise ConfigError(f"--dataset {dataset}: record {number} has no list of turns in {key!r}")
    names = {"human": "user", "gpt": "assistant"}
    messages = []
    for turn in turns:
        role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
        content = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
        if isinstance(turn, dict) and content is None and turn.get("tool_calls"):
            messages.append({**turn, "role": role, "content": ""})
            continue
        if not isinstance(role, str) or content is None:
            raise ConfigError(
                f"--dataset {dataset}: record {number} has a turn {str(turn)[:80]!r}; expected role and content"
            )
        messages.append({"role": names.get(role, role), "content": content})
    return messages


def read_template(model_dir: Path) -> Render:
    """The model's own chat template.

    Raises:
        ConfigError: it has none, or it cannot be read.
    """
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    settings_path = model_dir / "tokenizer_config.json"
    settings: Mapping[str, Any] = json.loads(settings_path.read_bytes()) if settings_path.is_file() else {}
    text = _template_text(model_dir, settings)

    def fail(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = fail
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    special = {key: _content(settings.get(key)) for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    try:
        template = environment.from_string(text)
    except jinja2.TemplateError as error:
        raise ConfigError(f"{model_dir}: the chat template cannot be read: {error}") from error

    def render(messages: list[dict[str, Any]]) -> str:
        try:
            return template.render(messages=messages, add_generation_prompt=False, tools=None, **special)
        except jinja2.TemplateError as error:
            raise ConfigError(
                f"{model_dir}: the chat template does not take a record of --dataset: {error}; it begins "
                f"{str(messages)[:100]}"
            ) from error

    return render


def _template_text(model_dir: Path, settings: Mapping[str, Any]) -> str:
    path = model_dir / "chat_template.jinja"
    if path.is_file() and path.stat().st_size <= MAX_TEMPLATE_BYTES:
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        raise ConfigError(
            f"{model_dir}: has no chat template (chat_template.jinja, or chat_template of tokenizer_config.json), but "
            "--dataset holds chat records; expected one; or give plain text"
        )
    return template


def _content(token: Any) -> str:
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")


def _from_hub(name: str) -> Documents:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    file = HUB[name]
    # The library's own error is one of its HTTP client's, whichever that is; so are those of connections.
    errors: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, OSError, LocalEntryNotFoundError)
    name_and_path, kind, revision = (file.repository, file.path), "dataset", file.revision
    unreached: Exception | None = None
    try:
        # Asked once: fetching asks again and again for half a minute where there is no network.
        url = hf_hub_url(*name_and_path, repo_type=kind, revision=revision)
        get_hf_file_metadata(url, timeout=HUB_TIMEOUT_S)
    except errors as error:
        unreached = error
    try:
        is_local = unreached is not None
        path = Path(hf_hub_download(*name_and_path, repo_type=kind, revision=revision, local_files_only=is_local))
    except errors as error:
        reason = unreached or error
        first_line = (str(reason).splitlines() or [type(reason).__name__])[0][:200]
        raise ConfigError(
            f"--dataset {name}: {file.repository} cannot be fetched from the hub, and is not in its cache: "
            f"{first_line}; leave --dataset out for the set that is bundled, or give a file"
        ) from error
    rows = parquet_rows if path.suffix == ".parquet" else json_lines
    return Documents(
        f"{name} ({file.repository}, {file.path})",
        lambda: (text_of(row, name, i, file.column) for i, row in enumerate(rows(path), 1)),
    )
