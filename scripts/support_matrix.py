"""Writes the support matrix of docs/quantization.md: what the tests of the weight formats show, and what serves it."""

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1] / "server" / "tests"
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "quantization")]

from matrix import DOCS, render, rows, written  # noqa: E402

if __name__ == "__main__":
    DOCS.write_text(written(DOCS.read_text(), render(rows())))
