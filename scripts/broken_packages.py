"""Prints what an installation that broke off left in part, which pip does not see. Takes the path of the lock."""

import csv
import re
import sys
from importlib.metadata import Distribution, distributions
from pathlib import Path


def is_whole(package: Distribution) -> bool:
    """Whether every file that was to be installed is there, in its size."""
    # Not `package.files`, from which newer versions of Python leave out what is missing.
    record = package.read_text("RECORD")
    if not record:
        return False
    for name, _, size in csv.reader(record.splitlines()):
        path = Path(str(package.locate_file(name)))
        # Compiled files are made and dropped at will.
        if path.suffix != ".pyc" and (not path.exists() or (size and int(size) != path.stat().st_size)):
            return False
    return True


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> None:
    site = next(path for path in sys.path if path.endswith("site-packages"))
    lines = (line.split(";")[0].strip() for line in Path(sys.argv[1]).read_text().splitlines())
    locked = {normalized(line.split("==")[0]): line for line in lines if "==" in line}
    for package in distributions(path=[site]):
        # Where even the name was not written yet, the folder has it.
        name, version = Path(str(package._path)).stem.split("-")[:2]  # type: ignore[attr-defined]
        if normalized(name) != "text-generation-server" and not is_whole(package):
            print(locked.get(normalized(name), f"{name}=={version}"))


if __name__ == "__main__":
    main()
