"""Prints what the Rust programs are built from, as CycloneDX 1.5: the normal dependencies that cargo resolved."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = {"text-generation-launcher", "text-generation-router", "text-generation-benchmark"}


def main() -> None:
    command = [
        "cargo",
        "metadata",
        "--locked",
        "--format-version",
        "1",
        "--filter-platform",
        "x86_64-unknown-linux-gnu",
    ]
    metadata = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)
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
    components = []
    for package in sorted((packages[key] for key in reached), key=lambda p: (p["name"], p["version"])):
        name, version = package["name"], package["version"]
        component = {"type": "library", "name": name, "version": version, "purl": f"pkg:cargo/{name}@{version}"}
        if package["license"]:
            component["licenses"] = [{"expression": package["license"].replace("/", " OR ")}]
        components.append(component)
    json.dump(
        {"bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1, "components": components}, sys.stdout, indent=1
    )


if __name__ == "__main__":
    main()
