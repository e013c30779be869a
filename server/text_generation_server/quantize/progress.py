"""What is told while a run goes on: a live display on a terminal, plain lines elsewhere; and what memory it took."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from loguru import logger
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

# Layers that the live display shows.
SHOWN = 12
STATUS = Path("/proc/self/status")


def anonymous_bytes() -> int:
    """Memory of this process that no file stands behind."""
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem")) * 1024


class MemoryWatch:
    """The most memory that the process has had since the watch began, looked at many times a second."""

    PERIOD_S = 0.02

    def __init__(self) -> None:
        self.peak = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self.PERIOD_S):
            self.peak = max(self.peak, anonymous_bytes())


class Progress:
    """Told of steps of work; shows block, layer, error, elapsed, remaining, memory, on standard error."""

    def __init__(self, num_blocks: int, watch: MemoryWatch):
        self.console = Console(file=sys.stderr)
        self.num_blocks, self.watch = num_blocks, watch
        self.begun = time.monotonic()
        self._block, self._first_block, self._rows = 0, 0, list[tuple[str, str, str, str]]()
        # What goes on where no block is quantized.
        self._phase: str | None = "looking at the model and at this machine"
        self._compared = 0
        self._live: Live | None = None
        self._block_begun = self.begun

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=4, get_renderable=self._render, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._live is not None:
            self._live.console.print(Text(text))
        else:
            logger.info(text)

    def starts_block(self, number: int, first: int) -> None:
        """number: from 0; first: where this run began."""
        self._block, self._first_block, self._phase = number, first, None
        self._block_begun = time.monotonic()

    def layer(self, name: str, before: float, after: float, seconds: float) -> None:
        short = name.split(".", 2)[-1] if name.count(".") > 2 else name
        row = (short, f"{before:.2e}", f"{after:.2e}", f"{seconds:.1f} s")
        self._rows = [*self._rows, row][-SHOWN:]
        if self._live is None:
            self.say(f"  {name}: error {after:.2e} (to nearest {before:.2e}), {seconds:.1f} s")

    def ends_block(self) -> None:
        if self._live is None:
            self.say(f"block {self._block + 1} of {self.num_blocks} is stored; {self._times(self._block + 1)}")

    def compares(self) -> None:
        """The result with the model, behind the next block."""
        self._compared += 1
        self._phase = f"comparing: block {self._compared} of {self.num_blocks}"
        if self._live is None:
            self.say(self._phase)

    def _times(self, done: int) -> str:
        elapsed = time.monotonic() - self.begun
        walked = done - self._first_block
        left = elapsed / walked * (self.num_blocks - done) if walked > 0 else None
        remaining = "" if left is None else f", {duration(left)} left"
        return f"{duration(elapsed)}{remaining}, {gib(self.watch.peak)} of memory at most"

    def _render(self) -> Table | Text:
        if self._phase is not None:
            elapsed = duration(time.monotonic() - self.begun)
            return Text(f"{self._phase}; {elapsed}, {gib(self.watch.peak)} of memory at most")
        title = Text(f"block {self._block + 1} of {self.num_blocks}: {self._times(self._block)}", no_wrap=True)
        table = Table(title=title, expand=False, min_width=min(self.console.width, len(title)))
        for heading in ("layer", "error if rounded to nearest", "error", "time"):
            table.add_column(heading, justify="left" if heading == "layer" else "right")
        for row in self._rows:
            table.add_row(*row)
        return table


def duration(seconds: float) -> str:
    """`95 s`, `12 min`, `3.4 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def gib(num_bytes: float) -> str:
    """`1.50 GiB`, `65 MiB`, `900 bytes`."""
    if num_bytes < 1 << 20:
        return f"{num_bytes:.0f} bytes"
    return f"{num_bytes / (1 << 30):.2f} GiB" if num_bytes >= 1 << 28 else f"{num_bytes / (1 << 20):.0f} MiB"
