"""Names of layers are matched as the libraries that write them do, and no pattern makes the server wait."""

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.utils.match import match_targets
from hypothesis import given, settings
from hypothesis import strategies as st
from text_generation_server.errors import ConfigError
from text_generation_server.quantization.detect import Settings, Source
from text_generation_server.quantization.patterns import MAX_WORK, Pattern, Work
from text_generation_server.quantization.rules import Skipped, Targets
from transformers.quantizers.quantizers_utils import should_convert_module

NAMES = [
    f"model.layers.{i}.{name}"
    for i in (0, 1, 2, 11, 21)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.gate", "mlp.down_proj")
] + ["lm_head", "model.embed_tokens"]


def matches(pattern: str, name: str) -> bool:
    return Pattern(pattern, "here", Work()).matches(name)


# As GPTQModel's and llm-compressor's documentation, and published checkpoints, write them.
PUBLISHED = [
    r".*\.18\..*gate.*", r".*\.(?:0|1|2)\..*", r"model\.layers\.\d+\.mlp\.(?:gate|up)_proj$", r".*lm_head",
    r"^lm_head$",
    r".*self_attn\.[qk]_proj", r"(?!.*mlp).*", r".*(?=down).*", r"model\.layers\.(1[0-9]|2[0-9])\..*", r"\w+$",
    r".*\.[^.]*gate\b", r"model.layers.1{2}.*", r".*\.layers\.\d{2,}\..*?proj", "", "a|", r"model|lm_head", r"[]x]",
    r"[^\d.]+\.", r"[a-]m_head|lm_hea[b-d]", r"(?P<block>model)\.e", r"\Alm_head\Z", r"x{,3}lm", "a{b}", "{b",
    r"m+o*?d??",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PUBLISHED)
def test_published_patterns_match_as_in_python(pattern: str) -> None:
    assert [matches(pattern, name) for name in NAMES] == [bool(re.match(pattern, name)) for name in NAMES]


@st.composite
def patterns(draw: st.DrawFn, depth: int = 3) -> str:
    if depth == 0:
        return draw(st.sampled_from(["a", "b", ".", r"\.", "[ab]", "[^a]", r"\w", r"\b", "^", "$", r"\d"]))
    part = patterns(depth=depth - 1)
    kind = draw(st.sampled_from(["one", "two", "or", "repeat", "look", "not"]))
    a = draw(part)
    match kind:
        case "two":
            return a + draw(part)
        case "or":
            return f"(?:{a}|{draw(part)})"
        case "repeat":
            return f"(?:{a})" + draw(st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{,2}", "{2,}", "*?"]))
        case "look":
            return f"(?={a})"
        case "not":
            return f"(?!{a})"
    return a


@settings(max_examples=150, deadline=None, derandomize=True)
@given(patterns(), st.text("ab.1", max_size=7))
def test_any_pattern_ends_where_a_match_of_python_can_end(pattern: str, name: str) -> None:
    ends = Pattern(pattern, "here", Work()).ends(name)
    # Python tells one end; every other is asked for by what must lie around it.
    compiled = {
        end: re.compile(rf"(?:{pattern})(?<![\s\S]{{{end + 1}}})(?<=[\s\S]{{{end}}})") for end in range(len(name) + 1)
    }
    assert ends == {end for end, asked in compiled.items() if (found := asked.match(name)) and found.end() == end}


@pytest.mark.parametrize(
    "pattern", [r"(a+)+$", r"(a|a)*$", r"(.*.*.*.*.*.*.*.*.*.*)=", r"(?:a?){60}a{60}$", r"((((a*)*)*)*)*b"]
)
def test_a_pattern_that_python_would_not_finish_is_matched_at_once(pattern: str) -> None:
    begin = time.thread_time()
    assert not matches(pattern, "a" * 45 + "!")
    assert time.thread_time() - begin < 2


def test_patterns_that_cost_too_much_together_are_refused() -> None:
    work = Work()
    slow = [Pattern(".*" * 400 + "x", "here", work) for _ in range(100)]
    begin = time.thread_time()
    with pytest.raises(ConfigError, match="take too long to match"):
        [pattern.matches(f"model.layers.{i}.self_attn.q_proj") for pattern in slow for i in range(80)]
    assert work.left < 0 < MAX_WORK
    assert time.thread_time() - begin < 5


@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        ("(", "at 1"), (")", "nothing opened"), ("[a", "end"), ("*a", "repetition of nothing"), ("{2}", "of nothing"),
        ("a**", "repetition"),
        ("a++", "repetition"), (r"(a)\1", r"\1"), ("(?<=a)b", "(?<="), ("(?i)a", "(?i)"), ("(?P=a)", "(?P="),
        ("a{3,2}", "count"), ("a{2000}", "count"), ("(" * 30 + ")" * 30, "groups in each other"),
        ("[b-a]", "backwards"),
        ("a" * 1001, "1001 characters"), ("\\", "end"), ("(?P<a", "end of its name"),
    ],
)  # fmt: skip
def test_what_is_no_pattern_or_cannot_be_bounded_is_refused(pattern: str, what: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(what)) as error:
        Pattern(pattern, "config.json: ignore", Work())
    assert "config.json: ignore" in str(error.value)


def rules(**values: Any) -> Settings:
    return Settings(Path("m"), "x", [Source("config.json", values, "x", {key: key for key in values})], {})


SKIPPED = [
    ["lm_head"], ["gate"], ["model.layers.1"], ["mlp.gate"], ["model.layers.*.mlp"], ["proj"],
    ["model.layers.[12].mlp", "q_proj"], [r"model\.layers\.1"], ["model"], ["self_attn"], [], ["layers.0"],
    [r"model\.layers\.(?:0|11)"], ["k_proj", "model.layers.21.mlp.down_proj"],
]  # fmt: skip


@pytest.mark.parametrize("skipped", SKIPPED, ids=str)
def test_modules_are_skipped_as_transformers_does(skipped: list[str]) -> None:
    found = Skipped(rules(modules=skipped), ("modules",))
    assert [name in found for name in NAMES] == [not should_convert_module(name, skipped) for name in NAMES]


TARGETS = [
    ["Linear"], ["re:.*q_proj"], ["lm_head", "re:model.*gate$"], ["Embedding"], ["re:^model\\.layers\\.1\\..*"],
    ["model.layers.0.mlp.gate", "Linear"], ["mlp.gate"], [],
]  # fmt: skip


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_targets_are_those_of_compressed_tensors(targets: list[str]) -> None:
    linear = torch.nn.Linear(1, 1)
    found = Targets(rules(targets=targets), "targets", Work())
    for name in NAMES:
        closest = next(iter(match_targets(name, linear, targets)), None)
        kind = None if closest is None else 1 if closest.startswith("re:") else 0 if closest == name else 2
        assert found.closeness(name) == kind, name


def test_a_list_of_every_layer_of_a_large_model_is_matched_quickly() -> None:
    names = [f"model.layers.{i}.mlp.experts.{j}.gate_proj" for i in range(60) for j in range(100)]
    begin = time.thread_time()
    skipped = Skipped(rules(modules=names), ("modules",))
    assert sum(f"model.layers.{i}.self_attn.q_proj" in skipped for i in range(60)) == 0
    assert names[17] in skipped
    assert time.thread_time() - begin < 5


@pytest.mark.parametrize("value", ["lm_head", [1], {"a": 1}, [["a"], "b"], [""]], ids=str)
def test_names_that_are_no_list_of_names_are_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"modules is .* expected a list of names"):
        Skipped(rules(modules=value), ("modules",))
