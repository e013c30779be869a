"""Pushing a result to a hub, and fetching text from one: a stand-in on loopback, asked by the real library."""

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import tiny
from standin_hub import Hub

QUANTIZE = [
    "-m", "text_generation_server.cli", "quantize", str(tiny.MODELS / "docs-qwen2-4m"),
    "--num-samples", "2", "--sequence-length", "32", "--num-threads", "1", "--method", "rtn",
]  # fmt: skip


def python(hub: Hub, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The library reads its environment once, as it is imported."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": ":".join(sys.path), "HF_HOME": str(home), **hub.environment},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def push(hub: Hub, home: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    program = (
        "import sys; from pathlib import Path; from text_generation_server.quantize.upload import upload\n"
        "try:\n    print(upload(Path(sys.argv[1]), 'me/model'))\n"
        "except ValueError as error:\n    sys.exit(f'error: {error}')"
    )
    return python(hub, home, "-c", program, str(folder))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "out"
    tiny.run(tiny.make(output.parent / "model", "qwen2"), output, "rtn")
    return output


def test_an_upload_that_breaks_off_is_taken_up_and_sends_nothing_twice(finished: Path, tmp_path: Path) -> None:
    local = {p.name: p.read_bytes() for p in finished.iterdir()}
    with Hub(refuse_after=2) as hub:
        failed = push(hub, tmp_path, finished)
        assert failed.returncode == 1 and "Traceback" not in failed.stderr
        assert "the hub did not take it" in failed.stderr and f"complete in {finished}" in failed.stderr
        assert hub.commits == 0 and hub.files == {}
        hub.refuse_after = None
        done = push(hub, tmp_path, finished)
        assert done.returncode == 0, done.stderr
        assert hub.files == local
        assert hub.commits == 1 and len(hub.sent) == len(set(hub.sent))
        assert hub.token == "Bearer hf_standin"
    assert {p.name: p.read_bytes() for p in finished.iterdir()} == local


def test_a_hub_that_is_not_there_leaves_the_result_as_it_is(finished: Path, tmp_path: Path) -> None:
    with Hub() as hub:
        pass
    failed = push(hub, tmp_path, finished)
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert "the hub did not take it" in failed.stderr and finished.is_dir()


def test_a_result_that_is_too_bad_is_kept_but_not_uploaded(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    monkeypatch.setattr("text_generation_server.quantize.run.upload", lambda folder, name: sent.append(name))
    model = finished.parent / "model"
    for limit, too_bad in ((0.0, True), (1e6, False)):
        outcome = tiny.run(model, finished, "rtn", max_ppl_increase=limit, upload_to="me/model")
        assert outcome.too_bad == too_bad
    assert sent == ["me/model"] and (finished / "config.json").exists()


def wikitext() -> bytes:
    """A file of the hub's, as parquet."""
    table = io.BytesIO()
    text = [f"Sentence {i} of a text that is long enough to be cut into pieces." for i in range(200)]
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), table)
    return table.getvalue()


def test_the_command_takes_text_from_the_hub_and_pushes_its_result(tmp_path: Path) -> None:
    with Hub() as hub:
        hub.datasets["wikitext-2-raw-v1/train-00000-of-00001.parquet"] = wikitext()
        output = tmp_path / "out"
        more = ["--dataset", "wikitext2", "--upload-to-model-id", "me/model"]
        done = python(hub, tmp_path, *QUANTIZE, str(output), *more)
        assert done.returncode == 0, done.stderr
        assert hub.files == {p.name: p.read_bytes() for p in output.iterdir()}
        assert tiny.report(output, "run")[0]["text"]["source"].startswith("wikitext2 (Salesforce/wikitext")
        failed = python(hub, tmp_path, *QUANTIZE, str(tmp_path / "other"), "--dataset", "ptb")
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert "--dataset ptb: ptb-text-only/ptb_text_only cannot be fetched from the hub" in failed.stderr
    assert "the set that is bundled" in failed.stderr


def test_a_hub_that_is_not_there_is_asked_once(tmp_path: Path) -> None:
    with Hub() as hub:
        pass
    begun = time.monotonic()
    failed = python(hub, tmp_path, *QUANTIZE, str(tmp_path / "out"), "--dataset", "wikitext2")
    # The library itself would ask for 25 seconds.
    assert time.monotonic() - begun < 15
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1
    assert failed.stderr.startswith("error: --dataset wikitext2: Salesforce/wikitext cannot be fetched from the hub")
    assert not (tmp_path / "out").exists()


def test_text_that_was_fetched_before_needs_no_hub(tmp_path: Path) -> None:
    with Hub() as hub:
        hub.datasets["wikitext-2-raw-v1/train-00000-of-00001.parquet"] = wikitext()
        first = python(hub, tmp_path, *QUANTIZE, str(tmp_path / "first"), "--dataset", "wikitext2")
    assert first.returncode == 0, first.stderr
    second = python(hub, tmp_path, *QUANTIZE, str(tmp_path / "second"), "--dataset", "wikitext2")
    assert second.returncode == 0, second.stderr
    assert tiny.files(tmp_path / "first") == tiny.files(tmp_path / "second")
