"""Grammars over the text of a sequence: JSON schemas and regular expressions, by the library llguidance.

Everything slow happens beside the steps: grammars are compiled by threads of their own, and which ids may come next is
found out while the forward pass runs. What a grammar allows is a function of the ids that were generated.
"""

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import llguidance
import numpy as np
from loguru import logger
from numpy.typing import NDArray

from .constraint import Constraint, GrammarError, set_bits
from .matcher import Limits, Matcher, Vocabulary

T = TypeVar("T")

JSON_SCHEMA, REGEX = "JSON_SCHEMA", "REGEX"

# How much a grammar may cost. The router judges by the same numbers (router/src/grammar/trial.rs).
LIMITS = Limits(
    max_items_in_row=2_000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_lexer_states=20_000,
    max_grammar_size=200_000,
)
# Compiled grammars that are kept, and the bytes of their sources. Those that were not used for longest go first.
MAX_COMPILED = 128
MAX_COMPILED_BYTES = 4 << 20
# The router takes no longer ones.
MAX_SOURCE_BYTES = 64 << 10
# References in a schema may lead deep into each other.
STACK_BYTES = 64 << 20
# Compilation gives way to steps.
NICENESS = 10
# A mask that is expected within this time is found by the step itself, on all cores: to wake a thread and hear from it
# takes longer, and during the forward pass every core is taken. After one that took longer they are found beside the
# steps, until some cheaper ones have come: of a common schema one in ten takes many times the others' time.
AT_ONCE_S = 150e-6
FORGETTING = 0.8
# No grammar within the limits takes as long.
COMPILE_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Grammar:
    """What the text of a sequence must be. `kind` is JSON_SCHEMA or REGEX."""

    kind: str
    source: str


@dataclass(frozen=True)
class Compiled:
    """What sequences begin with. Never advanced: it is copied, with all that its lexer has learnt."""

    matcher: Matcher
    mask_s: float  # what the first mask costs whoever needs it once more


class Grammars:
    """Compiles grammars for the tokenizer of one model, and keeps what was compiled. Its methods return at once."""

    def __init__(
        self, tokenizer_file: Path | None, vocab_size: int, eos_token_ids: Sequence[int], num_threads: int = 1
    ) -> None:
        self._tokenizer_file, self._vocab_size, self._eos = tokenizer_file, vocab_size, sorted(set(eos_token_ids))
        self._compilers = ThreadPoolExecutor(1, thread_name_prefix="grammar", initializer=give_way)
        self._num_fillers = max(1, num_threads)
        self._fillers = ThreadPoolExecutor(self._num_fillers, thread_name_prefix="mask")
        self._tokens: Future[Vocabulary] | None = None
        self._compiled: OrderedDict[Grammar, Future[Compiled]] = OrderedDict()
        self._lock = threading.Lock()

    def warm_up(self) -> "Future[Vocabulary]":
        """Begins to build the table of tokens, if that was not done. It holds Python's lock, for up to a second."""
        with self._lock:
            if self._tokens is None:
                self._tokens = submit(self._compilers, self._build)
            return self._tokens

    def prepare(self, grammar: Grammar) -> "Future[Compiled]":
        """Begins to compile a grammar. The result, or GrammarError, comes later."""
        self.warm_up()
        with self._lock:
            future = self._compiled.get(grammar)
            if future is None:
                future = self._compiled[grammar] = submit(self._compilers, self._compile, grammar)
            self._compiled.move_to_end(grammar)
            while len(self._compiled) > MAX_COMPILED or (
                len(self._compiled) > 1 and sum(len(g.source) for g in self._compiled) > MAX_COMPILED_BYTES
            ):
                self._compiled.popitem(last=False)
        return future

    def constraint(self, grammar: Grammar, generated: Sequence[int]) -> "Guided":
        """The state after the ids generated so far."""
        return Guided(self.prepare(grammar), self._eos, generated)

    def begin(self, constraints: Mapping[int, Constraint]) -> "list[Masks]":
        """Begins to find out which ids may come next in each row, in parts."""
        rows, parts = list(constraints), min(len(constraints), self._num_fillers)
        return [
            Masks({row: constraints[row] for row in rows[part::parts]}, self._vocab_size, self._fillers)
            for part in range(parts)
        ]

    def close(self) -> None:
        """Ends the threads; what they have begun is finished."""
        self._compilers.shutdown(wait=False, cancel_futures=True)
        self._fillers.shutdown(wait=False)

    def _build(self) -> Vocabulary:
        if self._tokenizer_file is None or not self._tokenizer_file.is_file():
            raise GrammarError(f"grammars need a tokenizer.json, and there is none: {self._tokenizer_file}")
        if not self._eos:
            raise GrammarError("the model has no end-of-sequence id to end a grammar with")
        source = self._tokenizer_file.read_text(encoding="utf-8")
        try:
            vocabulary = Vocabulary(self._read(source), self._eos)
        except (ValueError, OSError) as error:
            raise GrammarError(f"{self._tokenizer_file.name} cannot be used for grammars: {error}") from None
        logger.debug("grammars: a table of {} tokens", vocabulary.size)
        return vocabulary

    def _read(self, source: str) -> llguidance.LLTokenizer:
        try:
            return llguidance.LLTokenizer(source, n_vocab=self._vocab_size)
        except ValueError:
            # More tokens than rows of logits: those beyond are never generated.
            return llguidance.LLTokenizer(source)

    def _compile(self, grammar: Grammar) -> Compiled:
        if len(grammar.source.encode()) > MAX_SOURCE_BYTES:
            raise GrammarError(f"the grammar has more than {MAX_SOURCE_BYTES} bytes")
        assert self._tokens is not None
        tokens = self._tokens.result()
        try:
            if grammar.kind == REGEX:
                made = llguidance.LLMatcher.grammar_from_regex(grammar.source)
            else:
                made = llguidance.LLMatcher.grammar_from_json_schema(grammar.source)
        except ValueError as refused:
            raise GrammarError(first_line(str(refused))) from None
        matcher = tokens.matcher(made, LIMITS)
        mask = np.zeros(matcher.mask_words, np.int32)
        # With the first mask the lexer learns most of what it needs, for all copies.
        for _ in range(2):
            begun = time.thread_time()
            matcher.fill(mask)
            took = time.thread_time() - begun
            if (error := matcher.error()) is not None:
                raise GrammarError(first_line(error))
        if not mask.any():
            raise GrammarError("no text satisfies the grammar")
        return Compiled(matcher, took)


def give_way() -> None:
    """Lowers the priority of the calling thread, where threads have one of their own."""
    if hasattr(os, "setpriority"):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def first_line(text: str) -> str:
    """What a client may be told of an error of the library's."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "the grammar cannot be used")[:300]


class Guided:
    """The constraint of one sequence by a grammar."""

    # Of each row of a step something is looked at when nothing is in a core's caches.
    __slots__ = ("_compiled", "_ended", "_matcher", "_pending", "ends", "expected_s")

    def __init__(self, compiled: "Future[Compiled]", eos_token_ids: Sequence[int], generated: Sequence[int]) -> None:
        self._compiled, self.ends = compiled, frozenset(eos_token_ids)
        self._matcher: Matcher | None = None
        self._pending: list[int] = []
        self._ended = False
        self.expected_s = np.inf
        for token_id in generated:
            self.advance(token_id)

    def advance(self, token_id: int) -> None:
        """See `Constraint`. What it leads to is found out when it is needed.

        By an id that does not end the text, the matcher may have been told to go on instead.
        """
        if self._ended or token_id in self.ends:
            self._ended = True
        else:
            self._pending.append(token_id)

    def is_cheap(self) -> bool:
        """Whether the next mask is expected to take but a moment, to judge by those before.

        For the first one it is judged by that of all sequences. What it takes to follow many ids nobody knows.
        """
        if self._ended:
            return True
        if self._matcher is not None:
            return self.expected_s <= AT_ONCE_S
        if self._pending or not self._compiled.done() or self._compiled.exception():
            return False
        return self._compiled.result().mask_s <= AT_ONCE_S

    def fill(self, words: NDArray[np.int32]) -> None:
        """See `Constraint`. Waits for the grammar to be compiled."""
        matcher = self.follow()
        if matcher is None:
            set_bits(words, sorted(self.ends))
            return
        matcher.fill(words)
        if (error := matcher.error()) is not None:
            raise GrammarError(first_line(error))

    def follow(self) -> Matcher | None:
        """Follows the ids of which note was taken. What judges the next one; None: the end is all that is left.

        Raises GrammarError.
        """
        if self._matcher is not None and not self._pending and not self._ended:
            return self._matcher
        if self._ended:
            return None
        if self._matcher is None:
            compiled = self._compiled.result(COMPILE_TIMEOUT_S)
            self._matcher, self.expected_s = compiled.matcher.copy(), compiled.mask_s
        if self._pending:
            del self._pending[: max(0, self._matcher.consume(self._pending))]
            if self._pending:
                error = self._matcher.error() or f"id {self._pending[0]} does not follow the grammar"
                raise GrammarError(first_line(error))
        return self._matcher

    @property
    def mask_words(self) -> int:
        """Of the masks of what `follow` gives."""
        return self._matcher.mask_words if self._matcher is not None else 0

    def took(self, seconds: float) -> None:
        """Takes note of what a mask has cost."""
        before = self.expected_s if self.expected_s < np.inf else 0.0
        self.expected_s = max(seconds, FORGETTING * before)


class Masks:
    """Which ids may come next in some `rows`, found out by the threads of `pool`."""

    def __init__(self, constraints: Mapping[int, Constraint], vocab_size: int, pool: ThreadPoolExecutor) -> None:
        self.rows, self._constraints = list(constraints), list(constraints.values())
        self._words = np.zeros((len(self.rows), -(-vocab_size // 32)), np.int32)
        self.errors: dict[int, str] = {}
        self._filled = submit(pool, self._fill)

    def wait(self) -> NDArray[np.int32]:
        """A bit for each id that may come next, lowest first: [rows, ceil(vocab / 32)].

        All are set in rows that `errors` names.
        """
        self._filled.result()
        return self._words

    def _fill(self) -> None:
        for i, constraint in enumerate(self._constraints):
            # What else the machine does meanwhile says nothing about a grammar.
            before = time.thread_time()
            try:
                constraint.fill(self._words[i])
            except (GrammarError, TimeoutError) as error:
                self._fail(i, str(error) or "the grammar was not compiled in time")
            if isinstance(constraint, Guided):
                constraint.took(time.thread_time() - before)
        for i in np.nonzero(~self._words.any(axis=1))[0].tolist():
            self._fail(i, "the grammar leaves no id to go on with")

    def _fail(self, i: int, cause: str) -> None:
        self.errors[self.rows[i]] = cause
        self._words[i] = -1


def submit(pool: ThreadPoolExecutor, work: Callable[..., T], *arguments: object) -> "Future[T]":
    """Threads take the size of their stack from what is set when they are made, which may be now."""
    before = threading.stack_size(STACK_BYTES)
    try:
        return pool.submit(work, *arguments)
    finally:
        threading.stack_size(before)
