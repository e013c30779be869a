"""Pushing a result to a hub, and fetching text from one: a stand-in on loopback, asked by the real library."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import tiny
from standin_hub import Hub

FEW = ["--num-samples", "2", "--sequence-length", "32", "--num-threads", "1", "--method", "rtn"]


def command(hub: Hub, output: Path, *more: str, home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "text_generation_server.cli", "quantize", str(tiny.MODELS / "docs-qwen2-4m"),
         str(output), *FEW, *more],
        env={**os.environ, "PYTHONPATH": ":".join(sys.path), "HF_HOME": str(home), **hub.environment},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result that is not uploaded, and what is left to do is that alone."""
    output = tmp_path_factory.mktemp("finished") / "out"
    with Hub() as hub:
        done = command(hub, output, home=output.parent)
    assert done.returncode == 0, done.stderr
    return output


def test_an_upload_that_breaks_off_is_taken_up_and_sends_nothing_twice(finished: Path, tmp_path: Path) -> None:
    local = {p.name: p.read_bytes() for p in finished.iterdir()}
    with Hub(refuse_after=2) as hub:
        failed = command(hub, finished, "--upload-to-model-id", "me/model", home=tmp_path)
        assert failed.returncode == 1 and "Traceback" not in failed.stderr
        assert "the hub did not take it" in failed.stderr and f"complete in {finished}" in failed.stderr
        assert hub.commits == 0 and hub.files == {}
        hub.refuse_after = None
        done = command(hub, finished, "--upload-to-model-id", "me/model", home=tmp_path)
        assert done.returncode == 0, done.stderr
        assert hub.files == local
        assert hub.commits == 1 and len(hub.sent) == len(set(hub.sent))
        assert hub.token == "Bearer hf_standin"
    assert {p.name: p.read_bytes() for p in finished.iterdir()} == local


def test_a_hub_that_is_not_there_leaves_the_result_as_it_is(finished: Path, tmp_path: Path) -> None:
    with Hub() as hub:
        pass
    failed = command(hub, finished, "--upload-to-model-id", "me/model", home=tmp_path)
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert "the hub did not take it" in failed.stderr


def test_a_result_that_is_too_bad_is_kept_but_not_uploaded(finished: Path, tmp_path: Path) -> None:
    with Hub() as hub:
        done = command(hub, finished, "--upload-to-model-id", "me/model", "--max-ppl-increase", "0", home=tmp_path)
        assert done.returncode == 1 and "more than --max-ppl-increase 0 allows" in done.stderr
        assert hub.files == {} and json.loads(done.stdout)["proof"]["increase"] > 0


def test_a_data_set_of_the_hub_is_fetched_and_one_that_cannot_be_is_named(tmp_path: Path) -> None:
    table = io.BytesIO()
    text = [f"Sentence {i} of a text that is long enough to be cut into pieces." for i in range(200)]
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), table)
    with Hub() as hub:
        hub.datasets["wikitext-2-raw-v1/train-00000-of-00001.parquet"] = table.getvalue()
        done = command(hub, tmp_path / "out", "--dataset", "wikitext2", home=tmp_path)
        assert done.returncode == 0, done.stderr
        run = json.loads((tmp_path / "out" / "quantization_report.jsonl").read_text().splitlines()[0])
        assert run["text"]["source"].startswith("wikitext2 (Salesforce/wikitext")
        failed = command(hub, tmp_path / "other", "--dataset", "ptb", home=tmp_path)
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert "--dataset ptb: ptb-text-only/ptb_text_only cannot be fetched from the hub" in failed.stderr
