"""What the measuring scripts share: processes that end with the script, the load generator, tables and result files."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import select
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark" / "results"
BENCHMARK = ROOT / "target" / "release" / "text-generation-benchmark"
ROUTER = ROOT / "target" / "release" / "text-generation-router"
SHIPPED_MODEL = ROOT / "models" / "docs-llama-7m"

# Where rustup puts cargo, which is on nobody's path until the next login.
os.environ["PATH"] += f"{os.pathsep}{Path.home() / '.cargo' / 'bin'}"

Report = dict[str, Any]


class MeasureError(Exception):
    """A measurement that cannot be made or trusted, in words."""


def build(*packages: str) -> None:
    """Build the release binaries of these packages."""
    arguments = [argument for package in packages for argument in ("-p", package)]
    subprocess.run(["cargo", "build", "--release", *arguments], cwd=ROOT, check=True, timeout=3600)


class Server:
    """A child process that is stopped, killed if need be, when the `with` block ends."""

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
        speaks: bool = True,
    ) -> None:
        """Start `command`; its standard input is a pipe that ends with this process.

        Its errors go to `log`, if given. Its output is read with `read_line` if it `speaks`, else it goes to `log` too.
        """
        self.command = [str(word) for word in command]
        self._log_path = log
        self._log = log.open("wb") if log else None
        self.process = subprocess.Popen(
            self.command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if speaks else self._log,
            stderr=self._log,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process.stdin:
            with contextlib.suppress(BrokenPipeError):  # of one that is gone
                self.process.stdin.close()
        self.process.terminate()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(timeout=20)
        if self._log:
            self._log.close()

    def read_line(self, timeout_s: float) -> str:
        """Return the next line of its standard output; raise `MeasureError` if there is none in time."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], timeout_s)
        line = self.process.stdout.readline().decode() if ready else ""
        if not line:
            raise MeasureError(f"{self.command[0]}: found no line of output after {timeout_s:.0f} s{self.last_words()}")
        return line.strip()

    def write_line(self, line: str) -> None:
        """Write a line to its standard input; raise `MeasureError` if it is gone."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            status = self.process.wait(timeout=20)
            raise MeasureError(f"{self.command[0]} is gone, exit status {status}{self.last_words()}") from None

    def last_words(self) -> str:
        """Return the last lines of its log, for an error message."""
        lines = self._log_path.read_text(errors="replace").splitlines() if self._log_path else []
        return "\n".join(["", *lines[-5:]])

    def wait_until_healthy(self, url: str, timeout_s: float) -> None:
        """Ask `url` until it answers 200; raise `MeasureError` if the process ends or the time is over."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                status = self.process.returncode
                raise MeasureError(
                    f"{shlex.join(self.command)}: ended with {status} before it was healthy{self.last_words()}"
                )
            try:
                with urllib.request.urlopen(url, timeout=2) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        raise MeasureError(f"{url}: not healthy after {timeout_s:.0f} s{self.last_words()}")


def null_server(*options: str) -> Server:
    """Start a null server that lives as long as this process."""
    return Server([BENCHMARK, "null-server", "--exit-with-stdin", *options])


def router_alone(port: int, router: Path, *options: str, router_options: Sequence[str] = ()) -> Server:
    """Start a router with a stub shard; its first line of output names its address and process id."""
    command: list[str | Path] = [
        BENCHMARK,
        "router-alone",
        "--exit-with-stdin",
        "--router",
        router,
        "--port",
        str(port),
        *options,
    ]
    return Server([*command, "--", *router_options])


def listening(server: Server, timeout_s: float = 60.0) -> list[str]:
    """Return the words after "listening on": the address, and whatever the command adds."""
    line = server.read_line(timeout_s)
    if not line.startswith("listening on "):
        raise MeasureError(f"{server.command[0]}: found {line!r}, expected 'listening on ADDRESS'")
    return line.split()[2:]


def load(address: str, *options: str, timeout_s: float = 600.0, may_fail: bool = False) -> Report:
    """Run the load generator and return its report; raise `MeasureError` if a request failed that may not."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        command: list[str | Path] = [BENCHMARK, "load", "--address", address, "--json", path, *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False)
        if not path.exists():
            raise MeasureError(f"load: ended with {done.returncode}: {done.stderr.strip()}")
        report: Report = json.loads(path.read_text())
    if report["failed"] and not (may_fail and report["requests"]):
        raise MeasureError(f"load of {address}: {report['failed']} requests failed: {report['errors']}")
    return report


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Return the median, and the range in parentheses if there are several values."""
    median = f"{statistics.median(values):,.{digits}f}"
    return median if len(values) == 1 else f"{median} ({min(values):,.{digits}f}–{max(values):,.{digits}f})"


def times(runs: Sequence[Report], name: str, column: str = "p50_ms") -> str:
    """Return the spread of a time that reports of `load` tell, or a dash where none does."""
    values: list[float] = [run[name][column] for run in runs if name in run]
    return spread(values, 1) if values else "–"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _package(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor_fields() -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields


def processor_flags() -> set[str]:
    """Return the names of what the processor can do."""
    return set(_processor_fields().get("flags", "").split())


def processor() -> str:
    """Return the processor's name and the vector instructions that matter here."""
    fields, flags = _processor_fields(), processor_flags()
    known = ["avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8"]
    return f"{fields.get('model name', 'unknown')} ({', '.join(flag for flag in known if flag in flags)})"


def command_line() -> str:
    """Return how this script was called, with paths of the repository as seen from its root."""
    return shlex.join(["python", *sys.argv]).replace(f"{ROOT}/", "")


def environment() -> str:
    """Return the table that stands above every result: versions, processor, cores, command."""
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "status", "--porcelain", "--", ".", ":!benchmark/results")
    memory_kib = int(Path("/proc/meminfo").read_text().split()[1])
    rows = [
        ("date", datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")),
        ("commit", commit + (" and uncommitted changes" if changed else "")),
        ("command", f"`{command_line()}`"),
        ("processor", processor()),
        ("cores used", f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}"),
        ("memory", f"{memory_kib / 2**20:.1f} GiB"),
        ("kernel", os.uname().release),
        ("rustc", _output("rustc", "--version")),
        ("python", sys.version.split()[0]),
        ("torch", _package("torch")),
        ("transformers", _package("transformers")),
        ("load average before", f"{os.getloadavg()[0]:.2f}"),
    ]
    return table(["", ""], rows)


def write_result(name: str, title: str, head: str, body: str) -> Path:
    """Write `benchmark/results/<name>.md`, print its body and return its path. `head` is `environment()` before the run."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.md"
    path.write_text(f"# {title}\n\n{head}\n\n{body}\n")
    print(f"\n{body}\n\nwritten to {path.relative_to(ROOT)}")
    import draw  # here, as matplotlib would weigh on the time and the memory of processes that are measured

    draw.draw_result(path)
    return path


def verdict(name: str, found: float, limit: float, unit: str) -> str:
    """Return a sentence that says whether `found` is within `limit`."""
    return f"**{name}: {found:.3g} {unit}, limit {limit:g} {unit}: {'held' if found <= limit else 'NOT HELD'}.**"
