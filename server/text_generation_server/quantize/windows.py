"""From documents to the token sequences that go through the model: some to measure with, others to judge the result."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from .documents import Documents
from .settings import DEFAULT_LENGTH, DEFAULT_SAMPLES, Sampling

# For each so many sequences that are measured, one is held back.
MEASURED_PER_HELD = 8
# More text than this many times what is needed is not read.
SURPLUS = 4
LEAST_SAMPLES = 1


@dataclass(frozen=True)
class Windows:
    """Sequences of one length that do not overlap. digest: of the ids."""

    measured: list[list[int]]
    held_back: list[list[int]]
    length: int
    source: str

    @property
    def digest(self) -> str:
        text = json.dumps([self.measured, self.held_back], separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def make_windows(documents: Documents, model_dir: Path, sampling: Sampling, max_positions: int, vocab: int) -> Windows:
    """Joins the tokenized documents, cuts them into sequences, and draws by the seed.

    Raises:
        ConfigError: there is too little text; says how much there is.
    """
    if sampling.length is not None and sampling.length > max_positions:
        raise ConfigError(f"--sequence-length {sampling.length} is more than the model's {max_positions} positions")
    length = sampling.length or min(DEFAULT_LENGTH, max_positions)
    wanted = sampling.num_samples or DEFAULT_SAMPLES
    total = wanted + held_back(wanted)
    windows = list(_cut(documents, model_dir, length, total * SURPLUS))
    found = len(windows)
    if sampling.num_samples is None and found < total:
        wanted = _measured_of(found)
    if wanted < LEAST_SAMPLES or found < wanted + held_back(wanted):
        raise ConfigError(_too_short(sampling, documents, found, length, total))
    wrong = next((i for window in windows for i in window if not 0 <= i < vocab), None)
    if wrong is not None:
        raise ConfigError(f"{model_dir}: the tokenizer gives id {wrong}; the model has ids from 0 to {vocab - 1}")
    random.Random(sampling.seed).shuffle(windows)
    rest = windows[wanted : wanted + held_back(wanted)]
    return Windows(windows[:wanted], rest, length, documents.source)


def held_back(measured: int) -> int:
    """How many sequences judge a result that so many have measured."""
    return -(-measured // MEASURED_PER_HELD)


def _measured_of(found: int) -> int:
    """The most that can be measured with, of so many sequences."""
    return next((n for n in range(found, 0, -1) if n + held_back(n) <= found), 0)


def _too_short(sampling: Sampling, documents: Documents, found: int, length: int, total: int) -> str:
    if not found:
        return (
            f"--dataset: {documents.source} has fewer than {length} tokens; expected at least {2 * length}; take a "
            f"shorter --sequence-length, or more text"
        )
    most = _measured_of(found)
    do = f"--num-samples {most}" if most else "more text"
    if sampling.num_samples is None:
        return (
            f"--dataset: {documents.source} makes {found} sequence of {length} tokens; expected at least 2; take {do}"
        )
    return (
        f"--num-samples {sampling.num_samples}: {documents.source} makes {found} sequences of {length} tokens; "
        f"expected {total} ({total - sampling.num_samples} are held back to judge the result); take {do}, a shorter "
        f"--sequence-length, or more text"
    )


def _cut(documents: Documents, model_dir: Path, length: int, most: int) -> Iterator[list[int]]:
    encode = read_tokenizer(model_dir, special=not documents.is_chat)
    ids: list[int] = []
    for text in documents.texts():
        if not text.strip():
            continue
        # Texts without the line ends that separate them; a template's own line ends belong to the chat.
        ids += encode(text if documents.is_chat else text.strip("\n"))
        whole = len(ids) // length
        for first in range(0, whole * length, length):
            yield ids[first : first + length]
            most -= 1
            if not most:
                return
        ids = ids[whole * length :]


def read_tokenizer(model_dir: Path, special: bool) -> Callable[[str], list[int]]:
    """special: whether the tokenizer adds its own tokens, such as one for the beginning."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(text: str) -> list[int]:
        # JSON can hold halves of pairs of surrogates, which are no characters.
        whole = text.encode("utf-8", "replace").decode("utf-8")
        ids: list[int] = tokenizer.encode(whole, add_special_tokens=special).ids
        return ids

    return encode
