"""A run that is killed, stopped, or finds the disk full goes on where it was, to the same bytes."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from loguru import logger
from text_generation_server.errors import ShardError
from text_generation_server.quantize import run as run_module
from text_generation_server.quantize.settings import Scheme, Solver

STAGED = ".quantizing"
# What is waited for comes, or its process ends; a machine that does much else may take long.
PATIENCE_S = 900
FULL = bool(os.environ.get("FULL"))


class Child:
    """A process that quantizes the trained model of six blocks; forked, so that torch need not be imported again."""

    def __init__(self, output: Path, limit: int | None = None, blocks: int | None = None):
        """limit: bytes that a file may have. blocks: after so many the process waits to be ended."""
        self.said = output.parent / f"{output.name}.log"
        self._process = multiprocessing.get_context("fork").Process(target=self._run, args=(output, limit, blocks))
        self._process.start()

    def _run(self, output: Path, limit: int | None, blocks: int | None) -> None:
        with self.said.open("w") as file:
            logger.remove()
            logger.add(file, format="{message}")
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            if blocks is not None:
                wait_after(output, blocks)
            try:
                tiny.run(tiny.LLAMA, output, scheme=Scheme("gptq", 4, 128, True))
            except ShardError as error:
                print(f"error: {error}", file=file, flush=True)
                os._exit(error.exit_code)
            file.flush()
            os._exit(0)

    def send(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def finish(self, code: int = 0) -> str:
        self._process.join(PATIENCE_S)
        said = self.said.read_text()
        assert self._process.exitcode == code, said
        return said

    def wait_for_blocks(self, output: Path, count: int) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while len(list((output / STAGED).glob("rows-*.jsonl"))) < count:
            assert self._process.is_alive() and time.monotonic() < deadline, self.said.read_text()
            time.sleep(0.002)


def wait_after(output: Path, blocks: int) -> None:
    """In a process that is to be killed: it must not be done before, however late the signal comes."""
    original = run_module.Progress.ends_block

    def ends_block(self: Any) -> None:
        original(self)
        while len(list((output / STAGED).glob("rows-*.jsonl"))) >= blocks:
            signal.pause()

    run_module.Progress.ends_block = ends_block  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def golden_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("golden") / "out"
    Child(output).finish()
    return output


@pytest.fixture(scope="module")
def golden(golden_folder: Path) -> dict[str, bytes]:
    return tiny.files(golden_folder)


def test_the_memory_that_a_run_takes_is_what_it_said_before(golden_folder: Path) -> None:
    memory = tiny.report(golden_folder, "proof")[0]["memory"]
    assert memory["host_peak"] == pytest.approx(memory["host_estimate"], rel=0.15)


def test_a_killed_run_goes_on_at_the_first_unfinished_block_to_the_same_bytes(
    golden: dict[str, bytes], tmp_path: Path
) -> None:
    output, blocks = tmp_path / "out", sorted(random.Random(time.time()).sample(range(1, 6), 2))
    for count in blocks:
        child = Child(output, blocks=count + 1)
        child.wait_for_blocks(output, count)
        child.send(signal.SIGKILL)
        child.finish(-signal.SIGKILL)
        assert not (output / "config.json").exists()
    stored = len(list((output / STAGED).glob("rows-*.jsonl")))
    said = Child(output).finish()
    assert f"going on: {stored} of 6 blocks are stored" in said, blocks
    assert tiny.files(output) == golden, blocks
    assert not (output / STAGED).exists()


def test_ctrl_c_ends_cleanly_and_says_how_to_go_on(golden: dict[str, bytes], tmp_path: Path) -> None:
    """Through the command itself."""
    output = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "text_generation_server.cli", "quantize", str(tiny.LLAMA), str(output), "--num-samples",
         "6", "--sequence-length", "48", "--num-threads", "1", "--dtype", "float32"],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    deadline = time.monotonic() + PATIENCE_S
    while not list((output / STAGED).glob("model-*.safetensors")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=PATIENCE_S)[1]
    assert process.returncode == 130 and "Traceback" not in said
    assert "stopped; " in said and "the same command goes on" in said
    assert not list((output / STAGED).glob("*.partial")) and not (output / "config.json").exists()
    Child(output).finish()
    assert tiny.files(output) == golden


def open_when_read(pipe: Path, reader: subprocess.Popen[str]) -> int:
    """The end for writing, as soon as somebody reads."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            assert reader.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_before_it_began_it_says_so(number: signal.Signals, tmp_path: Path) -> None:
    """While it waits for its text, a pipe that nobody writes to."""
    text = tmp_path / "text.jsonl"
    os.mkfifo(text)
    program = (
        "import sys, pathlib\nfrom text_generation_server.quantize import documents\n"
        "documents.BUNDLED = pathlib.Path(sys.argv.pop())\n"
        "from text_generation_server.cli import main\nmain()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, "quantize", str(tiny.LLAMA), str(tmp_path / "out"), str(text)],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    writer = open_when_read(text, process)
    process.send_signal(number)
    said = process.communicate(timeout=PATIENCE_S)[1]
    os.close(writer)
    assert process.returncode == 130 and said.count("\n") == 1, said
    assert said.startswith("error: stopped; nothing was changed; give the same command again")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_while_modules_are_loaded_it_ends_at_once(number: signal.Signals, tmp_path: Path) -> None:
    """A module that swallows what is raised while it is loaded, as extension modules do, must not swallow the end."""
    program = (
        "import os, sys\n"
        "class Swallows:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch':\n"
        "            try:\n                os.kill(os.getpid(), int(os.environ['NUMBER']))\n"
        "            except BaseException: pass\n"
        "sys.meta_path.insert(0, Swallows())\n"
        "from text_generation_server.cli import main\nmain()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "quantize", str(tiny.LLAMA), str(tmp_path / "out"), "--num-samples", "2",
         "--sequence-length", "32"],
        stderr=subprocess.PIPE, text=True, timeout=PATIENCE_S,
        env={**os.environ, "PYTHONPATH": ":".join(sys.path), "NUMBER": str(int(number))},
    )  # fmt: skip
    assert done.returncode == 130, done.stderr
    assert done.stderr == ("error: stopped; nothing was changed; give the same command again to begin, or to go on\n")
    assert not (tmp_path / "out").exists()


def test_a_file_that_cannot_be_written_leaves_nothing_half_named(golden: dict[str, bytes], tmp_path: Path) -> None:
    """Blocks are smaller than the limit, the embedding is not."""
    output = tmp_path / "out"
    sizes = {name: len(data) for name, data in golden.items() if name.endswith(".safetensors")}
    limit = sorted(sizes.values())[-3] + 1
    said = Child(output, limit=limit).finish(1)
    assert f"{output}: cannot be written" in said and "Traceback" not in said
    assert sorted(path.name for path in (output / STAGED).glob("model-*")) == sorted(sizes)[1:-1]
    assert not list(output.rglob("*.partial"))
    Child(output).finish()
    assert tiny.files(output) == golden


def test_the_same_command_again_says_that_all_is_there(golden: dict[str, bytes], tmp_path: Path) -> None:
    tiny.run(tiny.LLAMA, tmp_path / "out")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    tiny.run(tiny.LLAMA, tmp_path / "out")
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda staged: (staged / "model-00003-of-00008.safetensors").write_bytes(b"cut"),
        lambda staged: (staged / "model-00003-of-00008.safetensors").unlink(),
        lambda staged: flip_a_bit(staged / "model-00003-of-00008.safetensors"),
        lambda staged: (staged / "rows-00001.jsonl").write_text(""),
        lambda staged: (staged / "rows-00001.jsonl").write_text('{"a": 1}\n{]'),
    ],
    ids=["cut", "missing", "a bit", "no rows", "no JSON"],
)
def test_a_stored_block_that_is_damaged_is_made_again(
    damage: Callable[[Path], object], golden: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, scheme = tmp_path / "out", Scheme("gptq", 4, 128, True)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(run_module.StoppedError, match="4 of 6 blocks"):
            tiny.run(tiny.LLAMA, output, scheme=scheme)
    damage(output / STAGED)
    said: list[str] = []
    sink = logger.add(lambda message: said.append(message.record["message"]))
    tiny.run(tiny.LLAMA, output, scheme=scheme)
    logger.remove(sink)
    assert "block 2 is not as it was stored; it and those behind it are made again" in said
    assert "going on: 1 of 6 blocks are stored" in said
    assert tiny.files(output) == golden


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("content", ["", "{]", "{}", "[1]", "[" * 100_000], ids=["empty", "cut", "{}", "[1]", "deep"])
def test_a_damaged_state_says_what_to_do(content: str, unfinished: tuple[Path, Path], tmp_path: Path) -> None:
    model, output = unfinished[0], tmp_path / "out"
    shutil.copytree(unfinished[1], output)
    (output / STAGED / "state.json").write_text(content)
    (output / STAGED / "folder").mkdir()
    with pytest.raises(ShardError, match=r"does not say what run it is of; give --overwrite to begin anew"):
        tiny.run(model, output)
    tiny.run(model, output, overwrite=True)
    assert (output / "config.json").exists() and not (output / STAGED).exists()


@pytest.mark.parametrize("content", ["", "{]", "[]", '["../../x"]', '["config.json", "/etc/passwd"]', '["absent"]'])
def test_a_list_of_files_that_is_damaged_loses_nothing(
    content: str, unfinished: tuple[Path, Path], tmp_path: Path
) -> None:
    model, output = unfinished[0], tmp_path / "out"
    shutil.copytree(unfinished[1], output)
    (output / STAGED / "complete").write_text(content)
    before = sorted(path.name for path in (output / STAGED).iterdir())
    with pytest.raises(ShardError, match=r"is not there though the run was finished; give --overwrite"):
        tiny.run(model, output)
    assert sorted(path.name for path in (output / STAGED).iterdir()) == before
    tiny.run(model, output, overwrite=True)
    assert (output / "config.json").exists() and not (output / STAGED).exists()


def stop_after(monkeypatch: pytest.MonkeyPatch, blocks: int) -> None:
    """The next run ends as if Ctrl-C were pressed when so many blocks are stored."""
    original, calls = run_module.Progress.ends_block, iter(range(blocks - 1))

    def ends_block(self: Any) -> None:
        original(self)
        if next(calls, None) is None:
            raise KeyboardInterrupt

    monkeypatch.setattr(run_module.Progress, "ends_block", ends_block)


CHANGES: list[tuple[Callable[[Any], Any], str]] = [
    (lambda o: replace(o, scheme=Scheme("gptq", 3, 32, True)), "--bits: 4 then, 3 now"),
    (lambda o: replace(o, scheme=Scheme("gptq", 4, 64, True)), "--groupsize: 32 then, 64 now"),
    (lambda o: replace(o, scheme=Scheme("rtn", 4, 32, True)), '--method: "gptq" then, "rtn" now'),
    (lambda o: replace(o, solver=Solver(damping=0.05)), "--percdamp: 0.01 then, 0.05 now"),
    (lambda o: replace(o, sampling=replace(o.sampling, seed=1)), "--seed: 0 then, 1 now; the calibration text"),
    (lambda o: replace(o, resources=replace(o.resources, num_threads=2)), "--num-threads: 1 then, 2 now"),
]


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("unfinished")
    tiny.make(folder / "model", "qwen2")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(run_module.StoppedError, match="1 of 2 blocks"):
            tiny.run(folder / "model", folder / "out")
    return folder / "model", folder / "out"


@pytest.mark.parametrize(("change", "named"), CHANGES, ids=[named for _, named in CHANGES])
def test_another_option_is_refused_by_name(
    change: Callable[[Any], Any], named: str, unfinished: tuple[Path, Path]
) -> None:
    with pytest.raises(ShardError) as caught:
        tiny.quantize(change(tiny.options(*unfinished)))
    assert named in str(caught.value) and "--overwrite" in str(caught.value)


def test_another_model_is_refused_and_overwrite_begins_anew(unfinished: tuple[Path, Path], tmp_path: Path) -> None:
    model, output = unfinished
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"unused": 1}))
    with pytest.raises(ShardError, match=r"differs in the model \(config.json\)"):
        tiny.run(model, output)
    tiny.run(model, output, overwrite=True)
    tiny.run(model, tmp_path / "fresh")
    assert tiny.files(output) == tiny.files(tmp_path / "fresh")


METHODS = ("awq", "bitsandbytes-fp4", "bitsandbytes", "rtn")
PAIRS = [(m, a) for i, m in enumerate(METHODS) for j, a in enumerate(tiny.CONFIGS) if FULL or j == i % 2 * 3]


@pytest.mark.parametrize(("method", "architecture"), PAIRS)
def test_every_method_goes_on_to_the_same_bytes(
    method: str, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.make(tmp_path / "model", architecture)
    tiny.run(model, tmp_path / "whole", method)
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(run_module.StoppedError):
            tiny.run(model, tmp_path / "parts", method)
    tiny.run(model, tmp_path / "parts", method)
    assert tiny.files(tmp_path / "parts") == tiny.files(tmp_path / "whole")


def test_what_memory_is_left_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.make(tmp_path / "model", "mistral")
    tiny.run(model, tmp_path / "memory")
    real = run_module.preflight.check_fits
    for spill, resting in ((True, 0), (True, 1), (False, 0)):
        fit = {"spill": spill, "resting": resting}
        monkeypatch.setattr(run_module.preflight, "check_fits", lambda *a, fit=fit: replace(real(*a), **fit))
        tiny.run(model, tmp_path / f"{spill}{resting}")
        assert tiny.files(tmp_path / f"{spill}{resting}") == tiny.files(tmp_path / "memory"), fit


def test_two_processes_cannot_work_in_one_folder(unfinished: tuple[Path, Path], tmp_path: Path) -> None:
    model = unfinished[0]
    held = run_module.Staging(tmp_path, {}, overwrite=False)
    with pytest.raises(ShardError, match="another process quantizes into it"):
        tiny.run(model, tmp_path)
    held.close()
