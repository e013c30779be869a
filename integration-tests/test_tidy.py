"""Rules of the house that no compiler checks: the direction of dependencies, module docs, sizes, forbidden words."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Files that were longer when the rule was made may only shrink: path -> lines. Keep it short.
MAX_LINES = 600
LONGER = {
    "launcher/src/supervisor.rs": 800,
    "router/scheduler/tests/simulation/world.rs": 846,
}


def tracked(*patterns: str) -> list[Path]:
    """Files in git, or new and not ignored, that match."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return sorted(ROOT / line for line in listed.splitlines() if (ROOT / line).is_file())


def rust_code(path: Path) -> str:
    """The file without its comments and its trailing unit tests."""
    text = path.read_text().split("#[cfg(test)]\nmod tests")[0]
    return re.sub(r"//[^\n]*", "", text)


# Which module may use which: `crate::x` in a file under router/src/<module>.
ROUTER_USES = {
    "args": set(),
    "chat": set(),
    "control": set(),
    "grammar": {"request"},
    "request": set(),
    "text": set(),
    "telemetry": set(),
    "shards": {"control", "request"},
    "engine": {"args", "control", "request", "shards", "text", "telemetry"},
    "admin": {"control", "engine", "shards"},
    "entry": {"admin", "args", "chat", "control", "engine", "http", "shards", "telemetry", "text"},
    "http": {"chat", "engine", "grammar", "request", "text", "telemetry"},
}


def violations(module: str, code: str) -> list[str]:
    """The modules that `code` names and may not."""
    used = set(re.findall(r"\bcrate::(\w+)", code)) | set(re.findall(r"\btext_generation_router::(\w+)", code))
    return sorted((used & ROUTER_USES.keys()) - ROUTER_USES[module] - {module})


def router_modules() -> list[tuple[str, Path]]:
    source = ROOT / "router" / "src"
    found = []
    for path in tracked("router/src/*.rs", "router/src/**/*.rs"):
        module = path.relative_to(source).parts[0].removesuffix(".rs")
        if module not in ("lib", "main"):
            found.append((module, path))
    return found


def test_the_router_depends_one_way() -> None:
    for module, path in router_modules():
        assert module in ROUTER_USES, f"{path}: a new room needs a line in ROUTER_USES"
        assert not violations(module, rust_code(path)), path


def test_the_rule_of_direction_can_fail() -> None:
    assert violations("http", "use crate::shards::proto;") == ["shards"]
    assert violations("text", "use crate::engine::Engine;") == ["engine"]
    assert violations("engine", "use crate::shards::Shards;") == []


def test_the_scheduler_depends_on_nothing() -> None:
    manifest = tomllib.loads((ROOT / "router/scheduler/Cargo.toml").read_text())
    assert manifest["dependencies"] == {}
    for path in tracked("router/scheduler/src/*.rs"):
        assert not re.search(r"std::(time|thread|net|fs|env|process|io)\b", rust_code(path)), path


def test_protobuf_types_stay_in_their_rooms() -> None:
    for module, path in router_modules():
        if module != "shards":
            assert "shards::proto" not in rust_code(path), path


@pytest.mark.parametrize("path", tracked("*.rs", "**/*.rs"), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_rust_file_says_what_it_is_and_stays_readable(path: Path) -> None:
    text = path.read_text()
    name = str(path.relative_to(ROOT))
    assert text.startswith(("//!", "#!", "#[", "//")) and "//!" in text, f"{name} has no module documentation"
    lines = len(text.split("#[cfg(test)]\nmod tests")[0].splitlines())
    assert lines <= LONGER.get(name, MAX_LINES), f"{name} has {lines} lines without its tests"


# Spelled in pieces, so that this file does not contain them.
FORBIDDEN = [
    r"\bTO" + r"DO\b",
    r"\bFIX" + r"ME\b",
    r"\bXX" + r"X\b",
    r"todo" + r"!\(",
    r"unimplemented" + r"!\(",
    r"\bNot" + r"ImplementedError\b",
    r"#\[ig" + r"nore",
    r"pytest\.mark\.sk" + r"ip\b",
    r"xf" + r"ail",
    r"(?<![\w.])/" + r"work/",
    r"import pick" + r"le",
]


def test_no_file_has_a_forbidden_word() -> None:
    for path in tracked("*.py", "*.rs", "*.sh", "*.toml", "*.md", "Makefile", "*.proto", ".ci/run"):
        text = path.read_text()
        for pattern in FORBIDDEN:
            found = re.search(pattern, text)
            assert found is None, f"{path.relative_to(ROOT)} contains {found.group(0)!r}"


def test_nothing_in_git_is_very_large() -> None:
    for path in tracked():
        assert path.stat().st_size < 20_000_000, path
