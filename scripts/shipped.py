"""What is shipped beside our own sources: crates that are linked into the programs, packages that the wheel wants."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = {"text-generation-launcher", "text-generation-router", "text-generation-benchmark"}
PACKAGE = "text-generation-server"


def cargo() -> str:
    """Where it is: on the path, or where rustup puts it, which is on the path of nobody until the next login."""
    found = shutil.which("cargo") or shutil.which("cargo", path=os.fspath(Path.home() / ".cargo" / "bin"))
    return found or sys.exit("cargo was not found, on the PATH or in ~/.cargo/bin: `make install` sets it up")


def crates() -> list[dict[str, Any]]:
    """Cargo's metadata of each crate that is linked into a program, by name; ours are among them."""
    platform = "x86_64-unknown-linux-gnu"
    command = [cargo(), "metadata", "--locked", "--format-version", "1", "--filter-platform", platform]
    metadata = json.loads(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout)
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    packages = {package["id"]: package for package in metadata["packages"]}
    waiting = [key for key, package in packages.items() if package["name"] in PROGRAMS]
    reached: set[str] = set()
    while waiting:
        key = waiting.pop()
        if key not in reached:
            reached.add(key)
            kinds = {dep["pkg"]: {kind["kind"] for kind in dep["dep_kinds"]} for dep in nodes[key]["deps"]}
            waiting += [dependency for dependency, of in kinds.items() if None in of]
    return sorted((packages[key] for key in reached), key=lambda p: (p["name"], p["version"]))


def packages() -> list[importlib.metadata.Distribution]:
    """Each Python package that pip installs with the wheel, by name, as it is installed here; the wheel among them."""
    from packaging.requirements import Requirement

    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = [(PACKAGE, "")]
    asked: set[tuple[str, str]] = set()
    while waiting:
        name, extra = waiting.pop()
        name = re.sub(r"[-_.]+", "-", name).lower()
        if (name, extra) in asked:
            continue
        asked.add((name, extra))
        found[name] = importlib.metadata.distribution(name)
        for text in found[name].requires or []:
            wanted = Requirement(text)
            if wanted.marker is None or wanted.marker.evaluate({"extra": extra}):
                waiting += [(wanted.name, each) for each in ("", *wanted.extras)]
    return [found[name] for name in sorted(found)]
