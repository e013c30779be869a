"""Grammars over text, on the shipped tokenizer: judged by jsonschema, by `re` and by llguidance's Python interface."""

import json
import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jsonschema
import llguidance
import numpy as np
import pytest
import torch
from conftest import INSTRUCTION_SETS
from numpy.typing import NDArray
from text_generation_server.kernels.cpu.kernels import CpuKernels
from text_generation_server.sampling import grammar as grammar_module
from text_generation_server.sampling.constraint import GrammarError
from text_generation_server.sampling.grammar import JSON_SCHEMA, REGEX, Grammar, Grammars, Guided, Masks
from text_generation_server.sampling.guidance import allowed_by, ask
from text_generation_server.sampling.params import SamplingParams
from text_generation_server.sampling.sampler import draw
from tokenizers import Tokenizer
from torch import Tensor

MODEL = Path(__file__).parents[3] / "models" / "docs-llama-7m"
TOKENIZER = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
VOCAB, EOS = 4096, 2
DIGIT = TOKENIZER.encode("7", add_special_tokens=False).ids[-1]
# What the router writes into every schema.
TAKEN = {"whitespace_pattern": r"\x20"}


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(MODEL / "tokenizer.json", VOCAB, [EOS])


def of_schema(schema: dict) -> Grammar:
    return Grammar(JSON_SCHEMA, json.dumps({**schema, "x-guidance": TAKEN}))


def allowed(constraint: Guided, vocab: int = VOCAB) -> list[int]:
    words = np.zeros(-(-vocab // 32), np.int32)
    constraint.fill(words)
    return ids_of(words, vocab)


def ids_of(words: NDArray[np.int32], vocab: int = VOCAB) -> list[int]:
    return np.nonzero(np.unpackbits(words.view(np.uint8), bitorder="little")[:vocab])[0].tolist()


def written(constraint: Guided, seed: int, most: int = 600) -> list[int]:
    """Ids drawn evenly from those that are allowed, and the end where it may come, up to the end."""
    draw, ids = random.Random(seed), []
    while len(ids) < most:
        ways = allowed(constraint)
        ids.append(EOS if EOS in ways and draw.random() < 0.5 else draw.choice(ways))
        constraint.advance(ids[-1])
        if ids[-1] == EOS:
            return ids
    raise AssertionError(f"no end after {most} ids: {TOKENIZER.decode(ids)[-200:]!r}")


WORD = {"type": "string", "maxLength": 6}
SCHEMAS = {
    "object": {
        "type": "object",
        "properties": {
            "name": WORD,
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "ok": {"type": "boolean"},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "array": {"type": "array", "items": {"type": "number", "minimum": -5, "maximum": 5}, "minItems": 1, "maxItems": 3},
    "enum": {"enum": ["red", "green", 7, None, {"a": [1]}]},
    "anyOf": {
        "anyOf": [
            {"type": "null"},
            {"type": "object", "properties": {"k": {"const": "v"}}, "required": ["k"], "additionalProperties": False},
        ]
    },
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    "recursive": {
        "$ref": "#/$defs/tree",
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {
                    "v": {"enum": [1, 2]},
                    "l": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 1},
                },
                "required": ["v"],
                "additionalProperties": False,
            }
        },
    },
    "date": {"type": "string", "format": "date-time"},
}
REGEXES = [
    r"(25[0-5]|2[0-4]\d|1?\d?\d)(\.(25[0-5]|2[0-4]\d|1?\d?\d)){3}",
    r"[a-z]{2,8}@[a-z]{2,5}\.(com|org)",
    "",
    "ä|ö|日本",
    r"(\+49|0)[1-9][0-9]{3,7}",
]


@pytest.mark.parametrize("name", SCHEMAS)
def test_whatever_is_drawn_is_json_of_the_schema(grammars, name):
    for seed in range(5):
        ids = written(grammars.constraint(of_schema(SCHEMAS[name]), []), seed)
        jsonschema.validate(json.loads(TOKENIZER.decode(ids)), SCHEMAS[name])


@pytest.mark.parametrize("regex", REGEXES)
def test_whatever_is_drawn_matches_the_expression(grammars, regex):
    for seed in range(5):
        ids = written(grammars.constraint(Grammar(REGEX, regex), []), seed)
        # Digits of other alphabets match in both.
        assert re.fullmatch(regex, TOKENIZER.decode(ids)), ids


class Judge:
    """Judges each id by itself through the library's Python interface, which the server does not use for that."""

    tokens = llguidance.LLTokenizer((MODEL / "tokenizer.json").read_text(), n_vocab=VOCAB, eos_token=[EOS])

    def __init__(self, form: Grammar) -> None:
        make = llguidance.LLMatcher
        made = make.grammar_from_regex if form.kind == REGEX else make.grammar_from_json_schema
        self.matcher = llguidance.LLMatcher(self.tokens, made(form.source))

    def allowed(self) -> list[int]:
        if self.matcher.is_stopped():
            return [EOS]
        return [i for i in range(VOCAB) if self.matcher.validate_tokens([i]) == 1]

    def advance(self, token_id: int) -> None:
        assert self.matcher.consume_token(token_id)


FORCED = Grammar(REGEX, "[a-c](under no circumstances|undertaking)[.]")


@pytest.mark.parametrize("form", [*map(of_schema, SCHEMAS.values()), FORCED], ids=lambda form: form.source[:40])
def test_an_id_is_allowed_if_its_text_is_at_every_step_and_after_any_replay(grammars, form):
    """Where the grammar leaves no choice of the text, too: how it is cut into tokens is the model's choice."""
    judge = Judge(form)
    ids = written(grammars.constraint(form, []), 1)
    stepwise = grammars.constraint(form, [])
    for at, token_id in enumerate(ids):
        expected = judge.allowed()
        assert allowed(stepwise) == allowed(grammars.constraint(form, ids[:at])) == expected, at
        stepwise.advance(token_id)
        judge.advance(token_id)


def test_the_end_is_allowed_where_the_text_may_end_and_alone_where_it_must(grammars):
    one = TOKENIZER.encode("1", add_special_tokens=False).ids
    constraint = grammars.constraint(Grammar(REGEX, "[0-9]{1,2}"), [])
    assert EOS not in allowed(constraint)
    constraint.advance(one[0])
    assert {EOS} < set(allowed(constraint))
    constraint.advance(one[0])
    assert allowed(constraint) == [EOS]
    constraint.advance(EOS)
    constraint.advance(17)
    assert allowed(constraint) == [EOS]


def test_an_id_that_does_not_follow_is_an_error_that_names_it(grammars):
    with pytest.raises(GrammarError, match="id 300 does not follow"):
        allowed(grammars.constraint(Grammar(REGEX, "[0-9]+"), [300]))


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar(REGEX, "("), "invalid regex"),
        (Grammar(REGEX, r"[^\s\S]"), "NoExtension|no text"),
        (Grammar(JSON_SCHEMA, "{"), "expected"),
        (of_schema({"type": "strnig"}), "Invalid type"),
        (of_schema({"$ref": "file:///etc/passwd"}), "retriev"),
        (Grammar(REGEX, "a" * 70_000), "more than 65536 bytes"),
    ],
    ids=str,
)
def test_a_grammar_that_cannot_be_used_is_an_error_with_a_reason(grammars, grammar, message):
    with pytest.raises(GrammarError, match=message):
        grammars.prepare(grammar).result()
    with pytest.raises(GrammarError, match=message):
        allowed(grammars.constraint(grammar, []))


def test_a_model_without_tokenizer_or_end_has_no_grammars(tmp_path):
    for nothing, message in [
        (Grammars(tmp_path / "tokenizer.json", VOCAB, [EOS]), "need a tokenizer.json"),
        (Grammars(None, VOCAB, [EOS]), "need a tokenizer.json"),
        (Grammars(MODEL / "tokenizer.json", VOCAB, []), "no end-of-sequence id"),
    ]:
        with pytest.raises(GrammarError, match=message):
            allowed(nothing.constraint(Grammar(REGEX, "a"), []))


def test_fewer_rows_of_logits_than_tokens_leave_the_others_out():
    few = Grammars(MODEL / "tokenizer.json", 70, [EOS])
    ways = allowed(few.constraint(Grammar(REGEX, "(.|\n)+"), []), 70)
    assert ways
    assert max(ways) < 70


def test_what_is_compiled_is_kept_within_bounds(grammars, monkeypatch):
    monkeypatch.setattr(grammar_module, "MAX_COMPILED", 5)
    first = grammars.prepare(Grammar(REGEX, "x0"))
    assert grammars.prepare(Grammar(REGEX, "x0")) is first
    for i in range(12):
        grammars.prepare(Grammar(REGEX, f"x{i}")).result()
    assert len(grammars._compiled) == 5
    monkeypatch.setattr(grammar_module, "MAX_COMPILED_BYTES", 4)
    grammars.prepare(Grammar(REGEX, "abc")).result()
    assert list(grammars._compiled) == [Grammar(REGEX, "abc")]


class Slow:
    """A constraint that takes its time, or fails."""

    def __init__(self, seconds: float, fails: bool = False) -> None:
        self.seconds, self.fails = seconds, fails

    def fill(self, words: NDArray[np.int32]) -> None:
        time.sleep(self.seconds)
        if self.fails:
            raise GrammarError("too bad")
        words[0] = 1

    def advance(self, token_id: int) -> None: ...


def found(begun: Sequence[Masks]) -> tuple[dict[int, NDArray[np.int32]], dict[int, str]]:
    """The masks and the errors of all rows."""
    words = {row: mask for masks in begun for row, mask in zip(masks.rows, masks.wait(), strict=True)}
    return words, {row: cause for masks in begun for row, cause in masks.errors.items()}


def test_masks_are_found_beside_the_caller_and_an_error_is_its_rows_alone(grammars):
    started = time.monotonic()
    begun = grammars.begin({3: Slow(0.5), 5: Slow(0, fails=True), 9: Slow(0)})
    assert time.monotonic() - started < 0.4
    words, errors = found(begun)
    assert errors == {5: "too bad"}
    assert {row: len(ids_of(mask)) for row, mask in words.items()} == {3: 1, 5: VOCAB, 9: 1}
    assert ids_of(words[3]) == [0]


@pytest.mark.parametrize("threads", [1, 3])
def test_several_threads_find_the_masks_of_several_rows_at_a_time(threads):
    grammars = Grammars(MODEL / "tokenizer.json", VOCAB, [EOS], threads)
    started = time.monotonic()
    words, errors = found(grammars.begin({row: Slow(0.3, fails=row == 4) for row in range(6)}))
    took = time.monotonic() - started
    assert took > 1.7 if threads == 1 else took < 1.5
    assert list(errors) == [4]
    assert sorted(words) == list(range(6))
    grammars.close()


@pytest.mark.parametrize("vocab", [VOCAB, 70])
def test_masks_of_many_rows_are_those_of_each_alone(vocab):
    grammars = Grammars(MODEL / "tokenizer.json", vocab, [EOS])
    forms = [Grammar(REGEX, "(.|\n)+[.]")]
    rows: list[tuple[Grammar, list[int]]] = [(form, log) for form in forms for log in ([], [EOS])]
    if vocab == VOCAB:
        forms += [of_schema(SCHEMAS["object"]), Grammar(REGEX, "[0-9]{3}")]
        rows = [(form, log) for form in forms for log in ([], written(grammars.constraint(form, []), 4)[:-1], [EOS])]
    constraints = {7 + i: grammars.constraint(*row) for i, row in enumerate(rows)}
    words, errors = found(grammars.begin(constraints))
    assert not errors
    for i, row in enumerate(rows):
        assert ids_of(words[7 + i], vocab) == allowed(grammars.constraint(*row), vocab)
    grammars.close()


def test_masks_are_cheap_until_one_was_dear_and_after_some_that_were_not(grammars):
    """A costly one must not hold up the steps, but once."""
    form = Grammar(REGEX, "[0-9]{300}")
    assert not grammars.constraint(form, [DIGIT]).is_cheap(), "nobody knows what it takes to follow what there was"
    grammars.prepare(form).result()
    digits = grammars.constraint(form, [])
    for _ in range(200):
        digits.took(1e-6)
    digits.follow()
    assert digits.is_cheap()
    digits.took(0.01)
    assert not digits.is_cheap()
    turns = 0
    while not digits.is_cheap():
        digits.took(1e-6)
        turns += 1
    assert 5 < turns < 40
    digits.advance(EOS)
    assert digits.is_cheap(), "the end is all that is left"
    assert not grammars.constraint(Grammar(REGEX, "("), []).is_cheap()


def test_what_a_mask_takes_is_the_time_of_its_own_thread(grammars, monkeypatch):
    """A machine that does other things meanwhile does not make a form a costly one."""
    digits = grammars.constraint(Grammar(REGEX, "[0-9]{300}"), [])
    follow = Guided.follow
    monkeypatch.setattr(Guided, "follow", lambda constraint: (time.sleep(0.05), follow(constraint))[1])
    found(grammars.begin({1: digits}))
    assert digits.expected_s < 0.02


FORMS = [of_schema(schema) for schema in SCHEMAS.values()]
FORMS += [Grammar(REGEX, "(.|\n)+"), Grammar(REGEX, "(never|nearly)( (never|nearly)){9}"), Grammar(REGEX, r"\w{1,30}#")]


@pytest.fixture(scope="module", params=INSTRUCTION_SETS)
def kernels(request) -> CpuKernels:
    return CpuKernels(request.param)


@dataclass
class Outcome:
    """By place: ids and their log-probabilities where there are any, errors, and rows that leave nothing to draw."""

    ids: dict[int, int]
    logprobs: dict[int, float]
    errors: dict[int, str]
    nothing: list[int]


def guided(kernels: CpuKernels, logits: NDArray[np.float32], *rows: tuple[Guided, SamplingParams, bool]) -> Outcome:
    """Of rows that have a constraint, whose text may not end yet if so said."""
    ends = np.zeros(-(-logits.shape[1] // 32), np.int32)
    ends[EOS // 32] |= 1 << EOS % 32
    asked, masks, errors = ask(((i, constraint, goes_on) for i, (constraint, _, goes_on) in enumerate(rows)), ends)
    raw, positions = torch.from_numpy(logits), np.arange(len(rows)) + 7
    params = [params for _, params, _ in rows]
    drawn = draw(raw, processed_of(raw), params, positions, allowed_by(masks, len(rows)), asked.guided, kernels)
    told, failed = asked.take_note(drawn.ids, drawn.is_finite)
    assert told == {i for i in range(len(rows)) if i not in errors | failed | masks and drawn.is_finite[i]}
    errors |= failed
    good = [i for i in range(len(rows)) if i not in errors and drawn.is_finite[i]]
    ids, logprobs = ({i: of[i] for i in good} for of in (drawn.ids.tolist(), drawn.logprobs.tolist()))
    return Outcome(ids, logprobs, errors, np.nonzero(~drawn.is_finite)[0].tolist())


def processed_of(raw: Tensor) -> Tensor:
    """As biases would leave them: raw logits are finite, and some ids impossible."""
    return raw.masked_fill(raw == IMPOSSIBLE, -torch.inf)


def drawn_from(logits: NDArray[np.float32], ways: list[int], params: SamplingParams, place: int) -> tuple[int, float]:
    """By torch's operators, from those of one row that are left."""
    raw, left = torch.from_numpy(logits[place : place + 1]), torch.full((1, logits.shape[1]), -torch.inf)
    left[0, ways] = processed_of(raw)[0, ways]
    drawn = draw(raw, left, [params], np.array([place + 7]))
    return int(drawn.ids[0]), float(drawn.logprobs[0])


IMPOSSIBLE = np.float32(-1e30)
GREEDY, BY_CHANCE = SamplingParams(), SamplingParams(do_sample=True, seed=5, top_k=9, temperature=9.0)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.source[:40])
def test_what_is_drawn_is_drawn_from_what_is_allowed(grammars, kernels, form):
    """Whatever is most probable: ids that follow, ids that do not, the end, equals, and what is impossible.

    Four rows at a time: the most probable and one by chance, and the same where the text may not end yet.
    """
    random, steps = np.random.default_rng(3), 0
    for seed in range(2):
        log = written(grammars.constraint(form, []), seed)
        judge = Judge(form)
        kinds = [(GREEDY, False), (GREEDY, True), (BY_CHANCE, False), (BY_CHANCE, True)]
        for at, token_id in enumerate(log[:24]):
            ways = judge.allowed()
            goes_on = [way for way in ways if way != EOS] or ways
            logits = random.integers(0, 40, (4, VOCAB)).astype(np.float32)
            logits[:, random.choice(ways, min(2, len(ways)), replace=False)] += random.integers(0, 50)
            impossible = random.choice(VOCAB, 2000, replace=False)
            logits[:, impossible] = IMPOSSIBLE
            logits[:2, token_id] = 1000.0
            rows = [grammars.constraint(form, log[:at]) for _ in kinds]
            found = guided(kernels, logits, *((row, *kind) for row, kind in zip(rows, kinds, strict=True)))
            assert not found.errors
            lefts = [goes_on if is_too_short else ways for _, is_too_short in kinds]
            assert found.nothing == [i for i, left in enumerate(lefts) if (logits[i, left] == IMPOSSIBLE).all()]
            assert found.ids[0] == token_id
            for place, (params, _) in enumerate(kinds):
                if place in found.nothing:
                    continue
                expected, logprob = drawn_from(logits, lefts[place], params, place)
                assert found.ids[place] == expected
                assert found.logprobs[place] == pytest.approx(logprob, rel=1e-5, abs=1e-4)
                # The matcher has gone on by it.
                if at % 4 == 0:
                    assert allowed(rows[place]) == allowed(grammars.constraint(form, [*log[:at], expected]))
            steps += 1
            if token_id == EOS:
                break
            judge.advance(token_id)
    assert steps > 4


@pytest.mark.parametrize("by", [GREEDY, BY_CHANCE], ids=["greedy", "by chance"])
@pytest.mark.parametrize("vocab", [VOCAB, 4001, 70])
def test_refused_ids_numbers_that_are_none_and_errors_are_each_rows_own(grammars, kernels, vocab, by):
    few = grammars if vocab == VOCAB else Grammars(MODEL / "tokenizer.json", vocab, [EOS])
    form = Grammar(REGEX, "[!-+]{300}")
    rows = [few.constraint(form, []) for _ in range(5)] + [few.constraint(form, [EOS])]
    ways = allowed(few.constraint(form, []), vocab)
    logits = np.arange(6 * vocab, dtype=np.float32).reshape(6, vocab) % 61
    logits[0, ways[0]] = 50
    logits[1, ways[1]] = np.nan
    logits[2, ways] = IMPOSSIBLE
    logits[3, ways[2]] = np.inf
    logits[4] = 7
    found = guided(kernels, logits, *((row, by, False) for row in rows))
    assert not found.errors
    assert found.nothing == [1, 2, 3]
    for place in (0, 4, 5):
        left = ways if place < 5 else [EOS]
        assert found.ids[place] == drawn_from(logits, left, by, place)[0]
        assert found.ids[place] in left
    wrong = few.constraint(Grammar(REGEX, "[!-+]{2}"), [ways[0], ways[0], ways[0]])
    again = guided(kernels, logits[:2], (wrong, by, False), (rows[0], by, False))
    assert list(again.errors) == [0]
    assert "does not follow" in again.errors[0]
    assert again.nothing == [1], "its row of the logits is not finite"
    if few is not grammars:
        few.close()


def test_a_row_whose_ids_are_all_impossible_leaves_nothing_to_draw(grammars, kernels):
    """Biases may forbid what the grammar asks for; the row's matcher stays where it was."""
    form = Grammar(REGEX, "[0-9]{300}")
    raw = torch.zeros(2, VOCAB)
    processed = raw.clone()
    ways = allowed(grammars.constraint(form, []))
    processed[0, ways] = -torch.inf
    ends = np.zeros(VOCAB // 32, np.int32)
    for params in (GREEDY, BY_CHANCE):
        rows = [grammars.constraint(form, []) for _ in range(2)]
        asked, *_ = ask(((i, row, False) for i, row in enumerate(rows)), ends)
        drawn = draw(raw, processed, [params] * 2, np.arange(2), None, asked.guided, kernels)
        assert drawn.is_finite.tolist() == [False, True]
        assert asked.take_note(drawn.ids, drawn.is_finite) == ({1}, {})
        assert int(drawn.ids[1]) in ways
        assert allowed(rows[0]) == ways


def test_a_matcher_that_fails_is_the_error_of_its_row(grammars, kernels):
    """A step that costs more than it may: the library says so and goes no further."""
    form = Grammar(REGEX, "[0-9]{300}")
    rows = [grammars.constraint(form, []) for _ in range(2)]
    matcher = rows[0].follow()
    assert matcher.consume([VOCAB + 7]) == -1, "an id that is none puts a matcher into an error"
    logits = np.zeros((2, VOCAB), np.float32)
    for params in (GREEDY, BY_CHANCE):
        found = guided(kernels, logits, (rows[0], params, False), (rows[1], params, False))
        assert list(found.errors) == [0]
        assert "out of range" in found.errors[0]
        assert list(found.ids) == [1]


def test_a_mask_that_was_dear_is_noticed(grammars, kernels):
    """Ids that are judged one by one say nothing about it."""
    form = Grammar(REGEX, r"([ab]*a[ab]{13}|(\w{1,60}\s\w{1,60}[^,]{0,40}){30}|(.*a.*b.*c.*d){9})+#")
    grammars.prepare(form).result()
    row = grammars.constraint(form, [])
    row.follow()
    row.expected_s = 0.0
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, DIGIT] = 9
    assert guided(kernels, logits, (row, GREEDY, False)).ids == {0: DIGIT}
    assert row.expected_s == 0.0
    guided(kernels, logits, (row, BY_CHANCE, False))
    assert row.expected_s > 0.0


def test_an_id_that_does_not_follow_is_the_error_of_its_row(grammars):
    digits = Grammar(REGEX, "[0-9]+")
    words, errors = found(grammars.begin({1: grammars.constraint(digits, []), 2: grammars.constraint(digits, [300])}))
    assert list(errors) == [2]
    assert "does not follow" in errors[2]
    assert ids_of(words[1]) == allowed(grammars.constraint(digits, []))


def test_a_compilation_does_not_hold_up_who_asks(grammars):
    names = [f"k{i}" for i in range(900)]
    many = of_schema({"type": "object", "properties": dict.fromkeys(names, WORD), "required": names})
    started = time.monotonic()
    grammars.prepare(many)
    assert time.monotonic() - started < 0.2


@pytest.fixture(scope="module", autouse=True)
def no_threads_are_left(grammars) -> Iterator[None]:
    yield
    grammars.close()
