"""What the README tells people to type, typed."""

import json
import re
import shlex
import subprocess

import pytest
from conftest import ROOT
from support.server import Server

README = (ROOT / "README.md").read_text()


def curl_lines() -> list[str]:
    """Every curl command of the README, in a block of shell or in a table."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith("curl ")] + re.findall(r"`(curl [^`]*)`", README)


CURL_LINES = curl_lines()


def test_the_readme_has_lines_to_try() -> None:
    assert len(CURL_LINES) >= 4 and any("--unix-socket" in line for line in CURL_LINES), CURL_LINES


@pytest.mark.parametrize("line", CURL_LINES)
def test_a_curl_line_of_the_readme_works(llama: Server, line: str) -> None:
    words = shlex.split(line.replace(":3000/", f":{llama.port}/"))
    words = [word.replace("RUN_DIRECTORY", str(llama.run_directory())) for word in words]
    done = subprocess.run([*words, "-sS", "--fail"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    answers = [line.removeprefix("data: ") for line in done.stdout.splitlines() if line.strip()]
    assert answers and all(isinstance(json.loads(answer), dict) for answer in answers), done.stdout


@pytest.mark.parametrize("path", re.findall(r"`(?:GET )?(/[a-z_]+)`", README))
def test_a_route_of_the_readme_is_there(llama: Server, path: str) -> None:
    assert llama.get(path)[0] in (200, 405), path
