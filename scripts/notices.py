"""Prints the notices of the crates that are linked into the programs: names, licences, and each licence's text once.

The wheel carries them (`scripts/wheel.sh`). Python packages, those in an image too, have theirs in their `*.dist-info`.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shipped import crates

NAMES = ("LICENSE", "LICENCE", "COPYING", "COPYRIGHT", "NOTICE", "UNLICENSE")
# Of sources that are compiled in; files of tests and examples are not.
LEFT_OUT = {"tests", "test", "examples", "example", "benches", "fuzz", "doc", "docs", "windows"}
HEAD = """Third-party notices

The programs text-generation-launcher, text-generation-router and text-generation-benchmark contain the crates below,
among them sources in C that some of these carry, and Rust's standard library (MIT OR Apache-2.0). Python packages that
the wheel depends on are no part of it; pip installs each with its own licence, in its *.dist-info folder.
"""


def texts(folder: Path) -> Iterator[str]:
    """The licences and notices of a crate, those of sources inside of it too."""
    for place, inside, names in os.walk(folder):
        inside[:] = sorted(name for name in inside if name not in LEFT_OUT)
        for name in sorted(names):
            # The name itself, or with an end such as -MIT or .md; no file of code.
            if name.upper().startswith(NAMES) and Path(name).suffix in ("", ".md", ".txt", ".MIT", ".APACHE"):
                yield (Path(place) / name).read_text(encoding="utf-8", errors="replace").strip()


def describe(crate: dict[str, Any], numbers: list[int]) -> str:
    makers = ", ".join(crate["authors"]) or "see the repository"
    where = f"texts {', '.join(map(str, numbers))}" if numbers else "no text in the crate: the licence's own, as below"
    lines = [f"{crate['name']} {crate['version']}: {crate['license']} ({where})", f"    by {makers}"]
    return "\n".join([*lines, f"    {crate['repository']}"] if crate["repository"] else lines)


def main() -> None:
    numbered: dict[str, int] = {}
    described = []
    for crate in crates():
        if crate["source"] is not None:
            own = [numbered.setdefault(text, len(numbered) + 1) for text in texts(Path(crate["manifest_path"]).parent)]
            described.append(describe(crate, sorted(set(own))))
    print(HEAD)
    print("\n".join(described))
    for text, number in numbered.items():
        print(f"\n{'-' * 32} text {number} {'-' * 32}\n\n{text}")


if __name__ == "__main__":
    main()
