"""The launcher, the router and a rank on an emulated GPU, with a driver that has GPUs only on paper. With `FULL=1`."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import LLAMA
from support import server
from support.server import ROOT, Server, wait_until

FLAGS = (
    "--device", "cuda", "--cuda-graphs", "1,2,4",
    "--max-total-tokens", "200", "--max-concurrent-requests", "8", "--max-batch-prefill-tokens", "64",
)  # fmt: skip
SAMPLED = {"max_new_tokens": 16, "do_sample": True, "seed": 7, "top_p": 0.95}


@pytest.fixture
def on_paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of programs whose shards have an emulated GPU."""
    for name in ("text-generation-launcher", "text-generation-router"):
        (tmp_path / name).write_bytes((server.BINARIES / name).read_bytes())
        (tmp_path / name).chmod(0o755)
    source = ROOT / "server" / "tests" / "kernels" / "cuda" / "fake_driver.cpp"
    subprocess.run(["c++", "-O1", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", source], check=True)
    command = f"{sys.executable} {ROOT / 'integration-tests' / 'support' / 'emulated_shard.py'} {tmp_path / 'compiled'}"
    shard = tmp_path / "text-generation-server"
    shard.write_text(f'#!/bin/sh\nLD_LIBRARY_PATH={tmp_path} exec {command} "$@"\n')
    shard.chmod(0o755)
    monkeypatch.setattr(server, "BINARIES", tmp_path)


@pytest.mark.skipif(not os.environ.get("FULL"), reason="takes a minute: FULL=1")
def test_a_rank_on_a_gpu_serves_and_no_answer_notices_its_death(on_paper: None) -> None:
    prompt, found = "In the beginning God created", dict[str, Any]()
    with Server(LLAMA, *FLAGS, wait=False) as running:
        running.wait_ready(180)
        assert "GPU 0: NVIDIA Paper 0" in running.log()
        assert "recorded steps of 3 sizes" in running.log()
        wanted = running.generate(prompt, **SAMPLED)
        others = {
            "greedy": {"max_new_tokens": 12},
            "penalized": {"max_new_tokens": 12, "repetition_penalty": 1.3},
            "grammar": {"max_new_tokens": 12, "grammar": {"type": "regex", "value": "[a-z ]+"}},
            "sampled": SAMPLED,
        }

        def ask(name: str) -> None:
            found[name] = running.generate(prompt, **others[name])

        threads = [threading.Thread(target=ask, args=(name,)) for name in others]
        for thread in threads:
            thread.start()
        wait_until(lambda: running.state()["running"] == 4, 30, "all requests are running")
        os.kill(running.rank_pid(0), signal.SIGKILL)
        for thread in threads:
            thread.join(180)
        assert found["sampled"]["generated_text"] == wanted["generated_text"]
        for name, how in others.items():
            assert running.generate(prompt, **how)["generated_text"] == found[name]["generated_text"], name
