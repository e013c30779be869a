"""Draw the tables of `results/`: a picture of each, `<name>-<number>.png`, with a bar for each row and a panel for each column.

A bar is the median, its whisker the range. Where a column is a share of a roof, or a ratio, a line stands at one. Each picture
remembers of which table it is, so only tables that changed are drawn again.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import struct
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent / "results"
# How the table in front of all others begins: the machine, the versions.
ENVIRONMENT = "|  |  |"
NUMBER = r"-?\d[\d,]*(?:\.\d+)?"
CELL = re.compile(rf"({NUMBER}) ?([^\d(]*?)(?: ?\(({NUMBER})–({NUMBER})\))?")
# Requests of a warp: passes / the fewest that would do.
PASSES = re.compile(r"\d+: (\d+) / (\d+)")
RATIOS = ("÷", "of bandwidth", "of the bandwidth", "of what", "of float32", "of a bare")
KEYWORD = b"Table"
PANELS_IN_A_LINE = 5


@dataclass(frozen=True)
class Table:
    """title: of the result, and of the section. rows: cells as they are written."""

    title: str
    text: str
    head: list[str]
    rows: list[list[str]]

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"{self.title}\n{self.text}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Bar:
    """A cell: its number, and the range that stands behind it."""

    value: float
    low: float
    high: float


def tables(path: Path) -> list[Table]:
    """Those of a result, without that of the machine."""
    found, title, section, lines = [], "", "", path.read_text().splitlines()
    at = 0
    while at < len(lines):
        line = lines[at]
        if line.startswith("#"):
            text = line.lstrip("#").strip()
            title, section = (text, "") if line.startswith("# ") else (title, text)
        end = at
        while end < len(lines) and lines[end].startswith("|"):
            end += 1
        if end > at + 2 and line != ENVIRONMENT:
            cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in lines[at:end]]
            heading = f"{title}: {section}" if section else title
            found.append(Table(heading, "\n".join(lines[at:end]), cells[0], cells[2:]))
        at = max(end, at + 1)
    return found


def bars(cell: str) -> dict[str, Bar]:
    """By unit: a cell holds one number, or several that commas divide, each with a unit of its own. Empty: it is no number."""
    if passes := PASSES.fullmatch(cell):
        ratio = int(passes[1]) / max(1, int(passes[2]))
        return {"passes ÷ the fewest": Bar(ratio, ratio, ratio)}
    found = {}
    for part in cell.replace("*", "").split(", "):
        match = CELL.fullmatch(part.strip())
        if match is None:
            return {}
        value, low, high = (float((match[i] or match[1]).replace(",", "")) for i in (1, 3, 4))
        found[match[2].strip()] = Bar(value, low, high)
    return found


def drawn_from(picture: Path) -> str | None:
    """The digest of the table that a picture shows, from its text chunk (PNG 1.2, 4.2.3); None: there is none."""
    if not picture.exists():
        return None
    data, at = picture.read_bytes(), 8
    while at < len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        content = data[at + 8 : at + 8 + size]
        if kind == b"tEXt" and content.startswith(KEYWORD + b"\0"):
            return content.split(b"\0")[1].decode()
        at += size + 12
    return None


def panels(table: Table) -> tuple[list[str], list[tuple[str, list[Bar | None]]]]:
    """What the rows are called, and of each panel the title and a bar for each row."""
    columns = [[bars(row[i]) if i < len(row) else {} for row in table.rows] for i in range(len(table.head))]
    names = [i for i, column in enumerate(columns) if i == 0 or not any(column)]
    labels = [" | ".join(row[i] for i in names if row[i]) for row in table.rows]
    found = []
    for i, column in enumerate(columns):
        if i in names:
            continue
        for unit in dict.fromkeys(unit for cell in column for unit in cell):
            title = f"{table.head[i]}\n{unit}" if unit else table.head[i]
            found.append((title, [cell.get(unit) for cell in column]))
    return labels, found


def draw(table: Table, to: Path) -> None:
    """Writes the picture."""
    labels, parts = panels(table)
    across = min(PANELS_IN_A_LINE, len(parts))
    down = -(-len(parts) // across)
    size = (2.5 + 2.3 * across, down * (1.3 + 0.24 * len(labels)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(down, across, squeeze=False, sharey=True)
    for i, axis in enumerate(axes.flat):
        if i < len(parts):
            _panel(axis, labels, *parts[i])
        else:
            axis.set_axis_off()
    figure.suptitle("\n".join(textwrap.wrap(table.title, 40 * across)), fontsize=10)
    figure.savefig(to, dpi=70, metadata={KEYWORD.decode(): table.digest, "Software": None})


def _panel(axis: Any, labels: list[str], title: str, values: list[Bar | None]) -> None:
    there = [(row, bar) for row, bar in enumerate(values) if bar is not None]
    axis.barh([row for row, _ in there], [bar.value for _, bar in there], color="#4477aa", height=0.7)
    for row, bar in there:
        if bar.low < bar.high:
            axis.plot([bar.low, bar.high], [row, row], color="#222222", linewidth=1)
    if any(word in title for word in RATIOS):
        axis.axvline(1, color="#cc3311", linewidth=1, linestyle="--")
    axis.set_yticks(range(len(labels)), [textwrap.shorten(label, 44) for label in labels], fontsize=7)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.set_title("\n".join(line for part in title.split("\n") for line in textwrap.wrap(part, 26)), fontsize=8)
    axis.tick_params(axis="x", labelsize=7)


def pictures(path: Path) -> dict[Path, Table]:
    """Those that a result has when all are drawn."""
    return {path.with_name(f"{path.stem}-{number}.png"): table for number, table in enumerate(tables(path), 1)}


def draw_result(path: Path) -> int:
    """Draws what has no picture yet, or another one, and removes what no table has any more. Returns how many were drawn."""
    wanted = pictures(path)
    stale = {picture: table for picture, table in wanted.items() if drawn_from(picture) != table.digest}
    for picture, table in stale.items():
        draw(table, picture)
    for left in set(path.parent.glob(f"{path.stem}-*.png")) - set(wanted):
        left.unlink()
    return len(stale)


def main() -> None:
    """Draw what has no picture yet, or another one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", help="names without .md; by default all")
    arguments = parser.parse_args()
    paths = [RESULTS / f"{name}.md" for name in arguments.results] or sorted(RESULTS.glob("*.md"))
    for path in paths:
        if not path.exists():
            parser.error(f"found no {path.name} in {path.parent}, expected a name without .md")
    print(f"{sum(map(draw_result, paths))} pictures drawn")


if __name__ == "__main__":
    main()
