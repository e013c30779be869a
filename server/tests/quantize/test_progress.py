"""What is told while a run goes on, on a terminal and elsewhere, and what memory it is said to take."""

import inspect
import io
import os
import re
import subprocess
import sys

import pytest
from loguru import logger
from text_generation_server.cli import quantize
from text_generation_server.logs import set_up
from text_generation_server.quantize.progress import MemoryWatch, Progress, duration, gib


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def tell(progress: Progress) -> None:
    with progress:
        progress.starts_block(2, 1)
        progress.layer("model.layers.2.mlp.down_proj", 0.02, 0.004, 1.5)
        progress.say("damping raised")
        progress.ends_block()


def test_a_terminal_shows_block_layer_errors_time_left_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    with MemoryWatch() as watch:
        tell(Progress(6, watch))
    shown = terminal.getvalue()
    for part in (
        "block 3 of 6",
        "2.mlp.down_proj",
        "2.00e-02",
        "4.00e-03",
        "1.5 s",
        " left",
        "of memory",
        "damping raised",
    ):
        assert part in shown


def test_lines_of_the_log_stand_above_the_display(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    set_up("INFO", json_output=False, rank=None)
    with MemoryWatch() as watch, Progress(6, watch):
        logger.info("kernels")
    logger.remove()
    # A line that begins where the display was wiped away.
    assert re.search(r"\x1b\[[0-9;?]*[A-Za-z]\d{4}-\d\d-\d\dT[0-9:.]+ INFO    kernels\n", terminal.getvalue()), repr(
        terminal.getvalue()
    )


def test_elsewhere_there_is_a_line_for_each_layer_and_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(message.record["message"]))
    with MemoryWatch() as watch:
        tell(Progress(6, watch))
    logger.remove(sink)
    assert lines[0] == "  model.layers.2.mlp.down_proj: error 4.00e-03 (to nearest 2.00e-02), 1.5 s"
    assert lines[1] == "damping raised"
    assert lines[2].startswith("block 3 of 6 is stored; ") and " left, " in lines[2]


def test_the_watch_sees_memory_that_is_given_back_again() -> None:
    with MemoryWatch() as watch:
        before = watch.peak
        held = bytearray(b"x" * (200 << 20))
        while watch.peak < before + len(held):
            pass
        del held
    assert watch.peak < before + (300 << 20)


def test_times_and_sizes_are_told_in_words() -> None:
    assert [duration(s) for s in (3.2, 119, 600, 36000)] == ["3 s", "119 s", "10 min", "10.0 h"]
    assert [gib(b) for b in (1 << 20, 1 << 28, 12 << 30)] == ["1 MiB", "0.25 GiB", "12.00 GiB"]


def test_comparing_is_told_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with MemoryWatch() as watch, Progress(2, watch) as progress:
        progress.starts_block(1, 0)
        progress.compares()
        progress.say("a line, above which the display is written anew")
    assert "comparing: block 1 of 2; " in terminal.getvalue()


def test_help_of_80_columns_names_every_option() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "text_generation_server.cli", "quantize", "--help"],
        env={**os.environ, "PYTHONPATH": ":".join(sys.path), "COLUMNS": "80", "PYTHONIOENCODING": "ascii"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    options = {parameter.replace("_", "-") for parameter in inspect.signature(quantize).parameters}
    for option in options - {"model-id", "output-dir"}:
        assert f"--{option}" in done.stdout, option
    assert "130 after Ctrl-C" in " ".join(done.stdout.split())
