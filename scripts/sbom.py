"""Prints what is shipped as CycloneDX 1.5.

`sbom.py rust`: the crates in the programs; `sbom.py python`: the packages that the wheel wants.
"""

import json
import sys

from shipped import crates, packages


def component(ecosystem: str, name: str, version: str, licence: str | None) -> dict[str, object]:
    """licence: an expression of SPDX, if that is what the maker gives."""
    found = {"type": "library", "name": name, "version": version, "purl": f"pkg:{ecosystem}/{name}@{version}"}
    return {**found, "licenses": [{"expression": licence}]} if licence else {**found}


def main() -> None:
    if sys.argv[1:] == ["rust"]:
        # The slash is how Cargo wrote OR before it knew SPDX.
        found = [(p["name"], p["version"], (p["license"] or "").replace("/", " OR ")) for p in crates()]
        components = [component("cargo", *each) for each in found]
    elif sys.argv[1:] == ["python"]:
        named = [(p.metadata["Name"].lower().replace("_", "-"), p) for p in packages()]
        components = [component("pypi", name, p.version, p.metadata.get("License-Expression")) for name, p in named]
    else:
        sys.exit("usage: sbom.py rust|python")
    bom = {"bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1, "components": components}
    json.dump(bom, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
