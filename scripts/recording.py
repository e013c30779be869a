"""Types `make run` in a terminal of its own; what stands there after the answer becomes docs/first-answer.svg."""

import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
COLUMNS, TIMEOUT_S = 118, 300
LAST = "Serving until Ctrl-C."


def type_and_read(command: list[str]) -> str:
    """What the terminal shows from the start to the line that says it serves; then Ctrl-C is pressed."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "NO_COLOR": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=follower, stdout=follower, stderr=follower, env=environment, start_new_session=True
    )
    os.close(follower)
    shown, deadline = b"", time.monotonic() + TIMEOUT_S
    while LAST.encode() not in shown and time.monotonic() < deadline:
        shown += os.read(leader, 65536)
    os.killpg(process.pid, signal.SIGINT)
    while process.poll() is None:
        try:
            os.read(leader, 65536)
        except OSError:
            break
    return shown.decode(errors="replace").replace("\r\n", "\n")


def main() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    # What the log says afterwards belongs to nobody's first look.
    shown, serving, _ = type_and_read(["make", "--no-print-directory", "run", f"PORT={port}"]).partition(LAST)
    if not serving:
        sys.exit(f"no answer within {TIMEOUT_S} s:\n{shown}")
    shown += serving
    # The port that was free is not the one that readers will see; the log's middle says less than its ends.
    lines = shown.replace(str(port), "3000").replace(str(ROOT), "~/text-generation").splitlines()
    log = [line for line in lines if re.match(r"(\w+( \d+)? \| )?\d{4}-\d\d-\d\dT", line)]
    skipped = set(log[3:-2])
    kept = [line for line in lines if line not in skipped]
    if skipped:
        kept.insert(kept.index(log[2]) + 1, f"  ... {len(skipped)} more lines of the log ...")
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    console.print(Text("$ make run", style="bold"))
    console.print(Text("\n".join(kept)))
    # No font from elsewhere: what the reader has is good enough.
    picture = re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title="make run"), flags=re.DOTALL)
    (ROOT / "docs" / "first-answer.svg").write_text(picture.replace("Fira Code", "monospace"))


if __name__ == "__main__":
    main()
