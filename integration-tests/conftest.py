"""Fixtures: the built binaries on the shipped models."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.server import Server

ROOT = Path(__file__).resolve().parent.parent
LLAMA = ROOT / "models" / "docs-llama-7m"
QWEN2 = ROOT / "models" / "docs-qwen2-4m"


@pytest.fixture(scope="session")
def llama() -> Iterator[Server]:
    """A server of the small Llama in float32, one rank."""
    with Server(LLAMA, "--dtype", "float32") as server:
        yield server


@pytest.fixture(scope="session")
def llama_tp2() -> Iterator[Server]:
    """A server of the small Llama in float32, two ranks."""
    with Server(LLAMA, "--dtype", "float32", "--num-shard", "2") as server:
        yield server
