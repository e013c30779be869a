"""A launcher in a process group of its own, and the ways to look at it."""

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

ROOT = Path(__file__).resolve().parent.parent.parent
BINARIES = ROOT / ".venv" / "bin"
JSON_HEADERS = {"Content-Type": "application/json"}


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def wait_until(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """The first true value of `condition`; fails with `what` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what}")
        time.sleep(0.02)
    return value


@dataclass
class Answer:
    """What one streamed request brought."""

    events: list[dict[str, Any]] = field(default_factory=list)
    comments: int = 0
    error: dict[str, Any] | None = None

    @property
    def tokens(self) -> list[dict[str, Any]]:
        return [event["token"] for event in self.events]

    @property
    def ids(self) -> list[int]:
        return [token["id"] for token in self.tokens]

    @property
    def text(self) -> str:
        return "".join(token["text"] for token in self.tokens if not token["special"])

    @property
    def generated_text(self) -> str | None:
        return self.events[-1]["generated_text"]

    @property
    def finish_reason(self) -> str:
        return str(self.events[-1]["details"]["finish_reason"])

    def same_as(self, other: "Answer") -> bool:
        """Equal in ids, text, log-probabilities and the reason of the end."""
        return self.error is other.error is None and self.events == other.events


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=10)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(10)
        self.sock.connect(str(self.path))


def command_of(process: psutil.Process) -> list[str]:
    """Its command line; nothing of a process that has ended in the meantime."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


class Server:
    """`with Server(model, *flags) as server`: started and ready, then drained and gone without a trace."""

    def __init__(
        self,
        model: Path | str,
        *flags: str,
        env: dict[str, str] | None = None,
        wait: bool = True,
        port: int | None = None,
    ) -> None:
        self.port = port or free_port()
        self.scratch = Path(tempfile.mkdtemp(prefix="tgs-"))
        self.log_path = self.scratch / "log"
        self.flags = list(flags)
        self.model = model
        self.env = env or {}
        self.wait = wait
        self.process: subprocess.Popen[bytes] | None = None
        self.known: dict[int, float] = {}

    def __enter__(self) -> Self:
        self.start()
        try:
            if self.wait:
                self.wait_ready()
        except BaseException:
            self.kill_everything()
            print(self.log())
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self.process is not None and self.process.poll() is None:
                code = self.stop()
                assert kind is not None or code == 0, f"the launcher ended with {code}"
            if kind is None:
                self.assert_gone()
        finally:
            self.kill_everything()
            if kind is not None:
                print(self.log()[-20_000:])
            shutil.rmtree(self.scratch, ignore_errors=True)

    def start(self) -> None:
        command = [str(BINARIES / "text-generation-launcher"), "--model-id", str(self.model), "--port", str(self.port)]
        command += ["--hostname", "127.0.0.1", "--shard-uds-path", str(self.scratch / "run"), *self.flags]
        environment = {k: v for k, v in os.environ.items() if k not in ("PORT", "HOSTNAME")} | self.env
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    # Looking at it ------------------------------------------------------------------------------------------------

    def get(self, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def is_ready(self) -> bool:
        try:
            return self.get("/readyz")[0] == 200
        except OSError:
            return False

    def wait_ready(self, timeout_s: float = 90) -> None:
        def ready() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, f"the launcher ended with {self.process.returncode}:\n{self.log()}"
            return self.is_ready()

        wait_until(ready, timeout_s, "the server is ready")
        self.remember()

    def remember(self) -> None:
        """Takes note of all descendants, to tell later whether one is left."""
        if self.process is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    self.known[child.pid] = child.create_time()

    def run_directory(self) -> Path:
        found = [path for path in self.scratch.iterdir() if path.name.startswith("run") and path.is_dir()]
        assert len(found) == 1, found
        return found[0]

    def state(self) -> dict[str, Any]:
        """The admin endpoint's view: blocks, permits, queue, running, epoch, ranks."""
        sockets = list(self.run_directory().glob("admin*"))
        assert len(sockets) == 1, sockets
        connection = UnixConnection(sockets[0])
        try:
            connection.request("GET", "/state")
            response = connection.getresponse()
            assert response.status == 200, response.read()
            value: dict[str, Any] = json.loads(response.read())
            return value
        finally:
            connection.close()

    def rank_pid(self, rank: int) -> int:
        return int(self.state()["ranks"][rank]["process_id"])

    def router_pid(self) -> int:
        assert self.process is not None
        children = psutil.Process(self.process.pid).children()
        routers = [c.pid for c in children if "text-generation-router" in " ".join(command_of(c)[:1])]
        assert len(routers) == 1, [command_of(c) for c in children]
        return routers[0]

    @contextlib.contextmanager
    def unharmed(self) -> Iterator[None]:
        """Behind it: the same processes, the same answer as before, all blocks and permits."""

        def facts() -> tuple[Any, ...]:
            state = self.wait_clean()
            canary = self.generate("In the beginning", max_new_tokens=4)
            assert self.get("/health")[0] == 200
            return self.router_pid(), state["epoch"], [rank["process_id"] for rank in state["ranks"]], canary["details"]

        before = facts()
        yield
        assert facts() == before

    def wait_clean(self, timeout_s: float = 5) -> dict[str, Any]:
        """The state once nothing runs: every block and permit is back, no rank holds a row."""

        def clean() -> dict[str, Any] | None:
            state = self.state()
            blocks, permits = state["blocks"], state["permits"]
            rows = sum(rank["live_rows"] or 0 for rank in state["ranks"])
            idle = state["queue"] == state["running"] == rows == 0
            whole = blocks["free"] + blocks["cached"] == blocks["total"] and blocks["pinned"] == 0
            return state if idle and whole and permits["free"] == permits["total"] else None

        try:
            state: dict[str, Any] = wait_until(clean, timeout_s, "clean")
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.state()}") from None
        return state

    # Asking it ----------------------------------------------------------------------------------------------------

    def post(self, path: str, body: Any, headers: dict[str, str] = JSON_HEADERS) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            raw = body if isinstance(body, bytes | str) else json.dumps(body)
            connection.request("POST", path, raw, headers)
            response = connection.getresponse()
            content = response.read()
            return response.status, json.loads(content) if content else None
        finally:
            connection.close()

    def generate(self, inputs: str, **parameters: Any) -> dict[str, Any]:
        parameters.setdefault("details", True)
        status, answer = self.post("/generate", {"inputs": inputs, "parameters": parameters})
        assert status == 200, answer
        result: dict[str, Any] = answer
        return result

    def stream(self, inputs: str, *, on_event: Callable[[Answer], None] | None = None, **parameters: Any) -> Answer:
        """One streamed request, to its end."""
        parameters.setdefault("details", True)
        answer = Answer()
        for kind, value in self.raw_stream(inputs, parameters):
            if kind == "comment":
                answer.comments += 1
            elif "error" in value:
                answer.error = value
            else:
                answer.events.append(value)
            if on_event is not None:
                on_event(answer)
        return answer

    def raw_stream(self, inputs: str, parameters: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=180)
        try:
            body = json.dumps({"inputs": inputs, "parameters": parameters})
            connection.request("POST", "/generate_stream", body, JSON_HEADERS)
            response = connection.getresponse()
            assert response.status == 200, response.read()
            for line in response:
                if line.startswith(b"data:"):
                    yield "data", json.loads(line[5:])
                elif line.startswith(b":"):
                    yield "comment", line
                else:
                    assert line.strip() == b"", line
        finally:
            connection.close()

    # Ending it ----------------------------------------------------------------------------------------------------

    def stop(self, timeout_s: float = 30) -> int:
        """SIGTERM to the launcher; its exit code."""
        assert self.process is not None
        self.remember()
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)

    def alive(self) -> list[str]:
        """Descendants seen earlier that still run."""
        left = []
        for pid, created in self.known.items():
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE:
                    left.append(f"{pid} {' '.join(process.cmdline())[:120]}")
        return left

    def assert_gone(self, timeout_s: float = 5) -> None:
        """No process, socket or run directory is left."""
        wait_until(lambda: not self.alive(), timeout_s, f"gone: {self.alive()}")

        def leftovers() -> list[Path]:
            return [path for path in self.scratch.iterdir() if path.name.startswith("run")]

        wait_until(lambda: not leftovers(), timeout_s, f"run directory removed: {leftovers()}")

    def kill_everything(self) -> None:
        self.remember()
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pid, created in self.known.items():
            with contextlib.suppress(psutil.NoSuchProcess):
                if psutil.Process(pid).create_time() == created:
                    os.kill(pid, signal.SIGKILL)
