"""Grammars over the text of a sequence: JSON schemas and regular expressions, by the library llguidance.

Everything slow happens beside the steps: grammars are compiled by threads of their own, and which ids may come next is
found out while the forward pass runs. What a grammar allows is a function of the ids that were generated.
"""

import math
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

T = TypeVar("T")

JSON_SCHEMA, REGEX = "JSON_SCHEMA", "REGEX"

# How much a grammar may cost. The router judges by the same numbers (router/src/grammar/trial.rs).
LIMITS = llguidance.LLParserLimits(
    max_items_in_row=2_000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_lexer_states=20_000,
    max_grammar_size=200_000,
    precompute_large_lexemes=False,
    verbose_errors=False,
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
# A mask that is expected within this time is found at once, together with others up to so much: to wake a thread and
# hear from it takes longer, and during the forward pass every core is taken. After one that took longer they are found
# beside the steps, until some cheaper ones have come: of a common schema one in ten takes many times the others' time.
AT_ONCE_S, ALL_AT_ONCE_S = 150e-6, 500e-6
FORGETTING = 0.8
# Whether one id may come next costs a small part of a mask, and what is wanted is mostly among the most probable: so
# many are tried. Where all are refused the next ones are likely to be, too: then some masks are found before the next
# try, twice as many after each refusal in a row.
MAX_TRIES = 4
FIRST_PAUSE, LONGEST_PAUSE = 2, 16
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

    matcher: llguidance.LLMatcher
    first: NDArray[np.int32]  # the mask of the first id, 32 ids a word
    mask_s: float  # what that mask costs whoever needs it once more


class Grammars:
    """Compiles grammars for the tokenizer of one model, and keeps what was compiled. Its methods return at once."""

    def __init__(
        self, tokenizer_file: Path | None, vocab_size: int, eos_token_ids: Sequence[int], num_threads: int = 1
    ) -> None:
        self._tokenizer_file, self._vocab_size, self._eos = tokenizer_file, vocab_size, sorted(set(eos_token_ids))
        self._compilers = ThreadPoolExecutor(1, thread_name_prefix="grammar", initializer=give_way)
        self._num_fillers = max(1, num_threads)
        self._fillers = ThreadPoolExecutor(self._num_fillers, thread_name_prefix="mask")
        self._tokens: Future[llguidance.LLTokenizer] | None = None
        self._compiled: OrderedDict[Grammar, Future[Compiled]] = OrderedDict()
        self._lock = threading.Lock()

    def warm_up(self) -> "Future[llguidance.LLTokenizer]":
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
        """Begins to find out which ids may come next in each row, in parts; at once where that takes but a moment."""
        at_once: dict[int, Constraint] = {}
        beside: dict[int, Constraint] = {}
        expected = 0.0
        for row, constraint in constraints.items():
            each = constraint.expects() if isinstance(constraint, Guided) else np.inf
            is_quick = each <= AT_ONCE_S and expected + each <= ALL_AT_ONCE_S
            (at_once if is_quick else beside)[row] = constraint
            expected += each if is_quick else 0.0
        rows, parts = list(beside), min(len(beside), self._num_fillers)
        # These first: they are worked on meanwhile.
        begun = [
            Masks({row: beside[row] for row in rows[part::parts]}, self._vocab_size, self._fillers)
            for part in range(parts)
        ]
        if at_once:
            begun.append(Masks(at_once, self._vocab_size, None))
        return begun

    def close(self) -> None:
        """Ends the threads; what they have begun is finished."""
        self._compilers.shutdown(wait=False, cancel_futures=True)
        self._fillers.shutdown(wait=False)

    def _build(self) -> llguidance.LLTokenizer:
        if self._tokenizer_file is None or not self._tokenizer_file.is_file():
            raise GrammarError(f"grammars need a tokenizer.json, and there is none: {self._tokenizer_file}")
        if not self._eos:
            raise GrammarError("the model has no end-of-sequence id to end a grammar with")
        source = self._tokenizer_file.read_text(encoding="utf-8")
        try:
            tokens = llguidance.LLTokenizer(source, n_vocab=self._vocab_size, eos_token=self._eos)
        except ValueError:
            # More tokens than rows of logits: those beyond are never generated.
            try:
                tokens = llguidance.LLTokenizer(source, eos_token=self._eos)
            except ValueError as error:
                raise GrammarError(f"{self._tokenizer_file.name} cannot be used for grammars: {error}") from None
        logger.debug("grammars: a table of {} tokens", tokens.vocab_size)
        return tokens

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
        except ValueError as error:
            raise GrammarError(first_line(str(error))) from None
        matcher = llguidance.LLMatcher(tokens, made, log_level=0, limits=LIMITS)
        # The first mask of all copies: the lexer learns most of what it needs with it.
        mask = np.zeros(-(-tokens.vocab_size // 32), np.int32)
        if not matcher.is_error():
            matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if matcher.is_error():
            raise GrammarError(first_line(matcher.get_error()))
        if not mask.any():
            raise GrammarError("no text satisfies the grammar")
        begun = time.thread_time()
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        return Compiled(matcher, mask, time.thread_time() - begun)


def give_way() -> None:
    """Lowers the priority of the calling thread, where threads have one of their own."""
    if hasattr(os, "setpriority"):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def first_line(text: str) -> str:
    """What a client may be told of an error of the library's."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "the grammar cannot be used")[:300]


class Guided:
    """The constraint of one sequence by a grammar."""

    def __init__(self, compiled: "Future[Compiled]", eos_token_ids: Sequence[int], generated: Sequence[int]) -> None:
        self._compiled, self._eos = compiled, list(eos_token_ids)
        self._matcher: llguidance.LLMatcher | None = None
        self._first = np.zeros(0, np.int32)  # mask
        self._is_at_start = True
        self._pending: list[int] = []
        self._ended = False
        self._tried: int | None = None  # followed already, before note was taken of it
        self.expected_s = np.inf
        self._pause = self._masks_to_try = 0
        for token_id in generated:
            self.advance(token_id)

    def advance(self, token_id: int) -> None:
        """See `Constraint`. What it leads to is found out when it is needed."""
        tried, self._tried = self._tried, None
        if token_id == tried:
            return
        assert tried is None, "an id was tried, and another one drawn"
        if self._ended or token_id in self._eos:
            self._ended = True
        else:
            self._pending.append(token_id)

    def expects(self) -> float:
        """Seconds that the next mask takes, to judge by those before, and by that of all sequences for the first."""
        if self._matcher is not None or self._pending or not self._compiled.done() or self._compiled.exception():
            return self.expected_s
        return min(self.expected_s, self._compiled.result().mask_s)

    def can_try(self) -> bool:
        """Whether to call `most_probable`. While masks are dear, they are rather found beside the steps."""
        return not self._masks_to_try and not self._ended and self.expects() <= AT_ONCE_S

    def most_probable(self, logits: NDArray[np.float32], token_id: int) -> int | None:
        """The id of the highest of `logits` [vocab] that may come next, as a mask would leave it; the first of equals.

        token_id: the highest of all.

        If there is one, `advance` has to be called with it. None: only a mask tells, as at an end, after an error, and
        where several of the highest are refused.
        """
        try:
            matcher = self.follow()
        except GrammarError:
            # Who asks for the mask hears of it.
            return None
        if matcher is None:
            return None
        for turn in range(MAX_TRIES):
            if turn:
                logits = logits.copy() if turn == 1 else logits
                logits[token_id] = -np.inf
                token_id = int(logits.argmax())
            if token_id in self._eos or not math.isfinite(logits[token_id]):
                return None
            if matcher.try_consume_tokens([token_id]):
                self._tried, self._pause, self._is_at_start = token_id, 0, False
                return token_id
        self._pause = self._masks_to_try = min(max(2 * self._pause, FIRST_PAUSE), LONGEST_PAUSE)
        return None

    def fill(self, words: NDArray[np.int32]) -> None:
        """See `Constraint`. Waits for the grammar to be compiled."""
        self._masks_to_try = max(0, self._masks_to_try - 1)
        matcher = self.follow()
        if matcher is None:
            set_bits(words, self._eos)
        elif self._is_at_start:
            copy_words(self._first, words)
        elif len(self._first) == len(words):
            # The library clears what was there.
            matcher.unsafe_compute_mask_ptr(words.__array_interface__["data"][0], words.nbytes)
        else:
            mask = np.zeros_like(self._first)
            matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            copy_words(mask, words)
        self.check()

    def follow(self) -> llguidance.LLMatcher | None:
        """Follows the ids of which note was taken. What the mask is to be had of; None: the end is all that is left."""
        if self._ended:
            return None
        if self._matcher is None:
            compiled = self._compiled.result(COMPILE_TIMEOUT_S)
            self._matcher, self._first = compiled.matcher.deep_copy(), compiled.first
            self.expected_s = compiled.mask_s
        if self._pending:
            self._is_at_start = False
            del self._pending[: self._matcher.try_consume_tokens(self._pending)]
            if self._pending and not self._matcher.is_error():
                raise GrammarError(f"id {self._pending[0]} does not follow the grammar")
        return self._matcher

    def took(self, seconds: float) -> None:
        """Takes note of what a mask has cost."""
        before = self.expected_s if self.expected_s < np.inf else 0.0
        self.expected_s = max(seconds, FORGETTING * before)

    def check(self) -> None:
        """Raises GrammarError if the matcher has come to grief."""
        if self._matcher is not None and self._matcher.is_error():
            raise GrammarError(first_line(self._matcher.get_error()))


def copy_words(mask: NDArray[np.int32], words: NDArray[np.int32]) -> None:
    """A mask of as many ids as the tokenizer has, for as many as there are logits."""
    shared = min(mask.shape[-1], words.shape[-1])
    words[..., :shared], words[..., shared:] = mask[..., :shared], 0


class Masks:
    """Which ids may come next in some `rows`, found out beside the caller, or by it if there is no pool."""

    def __init__(self, constraints: Mapping[int, Constraint], vocab_size: int, pool: ThreadPoolExecutor | None) -> None:
        self.rows, self._constraints = list(constraints), list(constraints.values())
        self._words = np.zeros((len(self.rows), -(-vocab_size // 32)), np.int32)
        self.errors: dict[int, str] = {}
        self._filled: Future[None] | None = None
        if pool is None:
            self._fill()
        else:
            self._filled = submit(pool, self._fill)

    def wait(self) -> NDArray[np.int32]:
        """A bit for each id that may come next, lowest first: [rows, ceil(vocab / 32)].

        All are set in rows that `errors` names.
        """
        if self._filled is not None:
            self._filled.result()
        return self._words

    def _fill(self) -> None:
        own, before = time.thread_time(), time.perf_counter()
        for i, constraint in enumerate(self._constraints):
            try:
                constraint.fill(self._words[i])
            except (GrammarError, TimeoutError) as error:
                self._fail(i, str(error) or "the grammar was not compiled in time")
            now = time.perf_counter()
            if isinstance(constraint, Guided):
                # What else the machine does meanwhile says nothing about a grammar. To ask for this thread's own time
                # is a system call.
                took = now - before
                constraint.took(took if took <= AT_ONCE_S else min(took, time.thread_time() - own))
            before = now
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
