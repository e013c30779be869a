"""`make run`'s script: the answer that it shows is the server's that it has started."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import LLAMA, ROOT
from support.server import Server, free_port

SCRIPT = [sys.executable, ROOT / "scripts" / "run.py", "--model", LLAMA]


def test_the_answer_of_another_server_is_not_shown(llama: Server) -> None:
    done = subprocess.run([*SCRIPT, "--port", str(llama.port)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and "in use; choose another one" in done.stderr, done
    assert "Try it yourself" not in done.stdout and "Serving until" not in done.stdout, done.stdout


def test_whoever_else_listens_is_not_asked_to_speak_http(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = subprocess.run([*SCRIPT, "--port", str(port)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "in use" in done.stderr, done


@pytest.mark.parametrize("key", ["a key", ""])
def test_a_server_with_a_key_answers_its_own_script(key: str) -> None:
    port = free_port()
    command = [*SCRIPT, "--port", str(port)]
    with subprocess.Popen(command, env=os.environ | {"API_KEY": key}, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        said = []
        for line in run.stdout:
            said.append(line)
            if line.startswith("Serving until"):
                break
        run.send_signal(signal.SIGTERM)
        rest, _ = run.communicate(timeout=60)
    text = "".join(said)
    assert run.returncode == 0, text + rest
    (answer,) = [line for line in said if line.startswith("In the beginning God created")]
    assert len(answer) > 60, answer
    assert ("Bearer $API_KEY" in text) == bool(key)
