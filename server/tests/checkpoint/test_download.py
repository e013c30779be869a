"""A model is fetched from a hub, here a stand-in, by the hub's own client; what goes wrong is said in one line."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import MODELS
from standin_hub import Hub
from test_cli import refusal, run

LLAMA = MODELS / "docs-llama-7m"
NAME = "someone/small-model"


@pytest.fixture
def hub() -> Iterator[Hub]:
    """With the shipped model and two files that a server does not read."""
    with Hub() as hub:
        files = {path.name: path.read_bytes() for path in LLAMA.iterdir() if path.is_file()}
        hub.models[NAME] = files | {"pytorch_model.bin": b"a pickle", "modeling.py": b"raise SystemExit"}
        yield hub


def download(hub: Hub, cache: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run("download-weights", NAME, *flags, **hub.environment | {"HF_HUB_CACHE": str(cache)} | environment)


def test_what_a_server_reads_is_fetched_once(hub: Hub, tmp_path: Path) -> None:
    done = download(hub, tmp_path)
    assert done.returncode == 0, done
    folder = Path(json.loads(done.stdout)["model_dir"])
    assert hub.token == "Bearer hf_standin"
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (LLAMA / name).read_bytes()
    assert not {"pytorch_model.bin", "modeling.py"} & set(hub.fetched)
    before = len(hub.fetched)
    assert json.loads(download(hub, tmp_path).stdout) == {"model_dir": str(folder)}
    assert len(hub.fetched) == before
    offline = run("plan", NAME, HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path))
    assert offline.returncode == 0, offline


def test_what_the_hub_does_not_have_is_said(hub: Hub, tmp_path: Path) -> None:
    assert "no revision 'v9'" in refusal(download(hub, tmp_path, "--revision", "v9"))
    other = run("download-weights", "someone/else", **hub.environment, HF_HUB_CACHE=str(tmp_path))
    assert "no such model (or asks for a token: HF_TOKEN)" in refusal(other)


def test_a_hub_that_does_not_answer_is_said(hub: Hub, tmp_path: Path) -> None:
    for unreachable in ({"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HTTP_PROXY": "http://127.0.0.1:9", "NO_PROXY": ""}):
        line = refusal(download(hub, tmp_path, **unreachable))
        assert "the hub cannot be asked: " in line and "behind a proxy, set HTTPS_PROXY" in line
        assert "fetch the model elsewhere" in line
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written_is_said(hub: Hub) -> None:
    line = refusal(download(hub, Path("/dev/null/cache")))
    assert "cache /dev/null/cache cannot be written: Not a directory" in line and "--huggingface-hub-cache" in line
    # There a folder cannot be made, which the system says in other words.
    assert "cannot be written: No such file or directory" in refusal(download(hub, Path("/proc/1/cache")))
    assert not hub.fetched


def test_a_user_without_a_home_is_told_what_to_set(hub: Hub, tmp_path: Path) -> None:
    """As in a container with `--user` of a number that nobody has there."""
    code = """
import os, sys
from pathlib import Path
import pwd
pwd.getpwuid = {}.__getitem__  # whoever asks is told that there is no such user
os.environ.pop("HOME", None)
try:
    Path("~").expanduser()
except RuntimeError:
    from text_generation_server.cli import app
    app(sys.argv[1:])
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "XDG_"))}
    for command in (["download-weights", NAME], ["quantize", NAME, str(tmp_path / "made")]):
        done = subprocess.run([sys.executable, "-c", code, *command], env=environment | hub.environment,
                              capture_output=True, text=True, timeout=60, check=False)  # fmt: skip
        line = refusal(done)
        assert "this user has no home folder" in line and "HUGGINGFACE_HUB_CACHE" in line and "HOME" in line
    assert not hub.fetched and not list(tmp_path.iterdir())


def test_a_full_disk_is_said_before_anything_is_fetched(hub: Hub, tmp_path: Path) -> None:
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], check=False).returncode != 0:
        pytest.skip("no mount namespaces here")
    command = [sys.executable, "-m", "text_generation_server.cli", "download-weights", NAME]
    # What is left there is gone with the mount, so it is listed.
    small = f'mount -t tmpfs -o size=3m tmpfs {tmp_path} && "$@"; code=$?; find {tmp_path} -mindepth 1; exit $code'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", small, "sh", "env", *(f"{k}={v}" for k, v in hub.environment.items()),
         f"HF_HUB_CACHE={tmp_path}", *command],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    line = refusal(done)
    assert f"cache {tmp_path} has no room for it: 13.9 MB are to be fetched, 3." in line
    assert "make room there, or name another folder: --huggingface-hub-cache" in line
    assert not hub.fetched
    assert download(hub, tmp_path).returncode == 0
