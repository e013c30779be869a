"""What survives a crash: finished parts of a result, under their final names in a folder inside the output folder.

A file there is complete: it is written under another name, flushed to the disk, then renamed. When all is there, the
files move into the output folder, config.json last, so that no half result can be taken for a model.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from ..errors import CheckpointError, ConfigError

FOLDER = ".quantizing"
STATE, LOCK, COMPLETE = "state.json", "lock", "complete"
REPORT = "quantization_report.jsonl"
# The flags behind what is remembered of a run.
_FLAGS = {
    "scheme.method": "--method", "scheme.bits": "--bits", "scheme.group_size": "--groupsize", "scheme.sym": "--sym",
    "scheme.excluded": "--exclude", "scheme.module_bits": "--module-bits", "solver.damping": "--percdamp",
    "solver.act_order": "--act-order", "solver.static_groups": "--static-groups", "solver.mse": "--mse",
    "sampling.num_samples": "--num-samples", "sampling.length": "--sequence-length",
    "sampling.seed": "--seed", "machine.device": "--device", "machine.threads": "--num-threads",
    "machine.dtype": "--dtype", "machine.torch": "the version of torch",
    "machine.version": "the version of this server",
    "data": "the calibration text", "text": "the calibration text", "model": "the model",
}  # fmt: skip


def write_durably(path: Path, write: Callable[[Path], None]) -> None:
    """`write` makes the file under another name; it gets its own when it is safe on the disk."""
    partial = path.with_name(path.name + ".partial")
    try:
        # Some writers make files that nobody else may read; a model is often served by another user.
        partial.touch()
        mode = partial.stat().st_mode
        write(partial)
        with partial.open("rb+") as file:
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        partial.rename(path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """As `write_durably`."""

    def write(partial: Path) -> None:
        partial.write_text(text, encoding="utf-8")

    write_durably(path, write)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_output(model_dir: Path, output_dir: Path, overwrite: bool) -> None:
    """Refuses an output folder that is the model's, is not empty, or cannot be written to. Leaves nothing there.

    Raises:
        ConfigError: says which, and what to do.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise ConfigError(f"OUTPUT_DIR {output_dir}: is a file; expected a folder, or nothing")
    missing = not output_dir.exists()
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe = output_dir / f"{FOLDER}.probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"OUTPUT_DIR {output_dir}: cannot be written to: {error.strerror}") from error
    if output_dir.resolve() == model_dir.resolve():
        raise ConfigError(f"OUTPUT_DIR {output_dir}: is the folder of the model; expected another one")
    if missing:
        output_dir.rmdir()
        return
    staging = output_dir / FOLDER
    others = sorted(p.name for p in output_dir.iterdir() if p.name not in (FOLDER, "lost+found"))
    if not others or (staging / COMPLETE).exists():
        return
    if not overwrite:
        raise ConfigError(
            f"OUTPUT_DIR {output_dir}: is not empty (it holds {', '.join(others[:4])}); expected an empty folder; take "
            "another one, or --overwrite to replace what an earlier run left"
        )
    ours = {REPORT, *result_files(output_dir)}
    if foreign := [name for name in others if name not in ours or (output_dir / name).is_dir()]:
        raise ConfigError(
            f"OUTPUT_DIR {output_dir}: holds {', '.join(foreign[:4])}, which is not what a run leaves; "
            "--overwrite removes results alone; take another folder"
        )


def finished_run(output_dir: Path) -> dict[str, Any] | None:
    """What the report of a finished result says of its run; None: there is none."""
    if not (output_dir / "config.json").is_file():
        return None
    return report_line(output_dir, "run")


def report_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; none at all if it is not there, or is not such a file."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, RecursionError):
        return []
    return lines if all(isinstance(line, dict) for line in lines) else []


def report_line(output_dir: Path, kind: str) -> dict[str, Any] | None:
    """The first line of that kind of a result's report; None: there is none, or no such report."""
    return next((line for line in report_lines(output_dir / REPORT) if line.get("kind") == kind), None)


def result_files(output_dir: Path) -> dict[str, int]:
    """What a finished result consists of beside its report, and the bytes of each file, as the report has it."""
    files = (report_line(output_dir, "proof") or {}).get("files")
    if not isinstance(files, dict) or not all(_is_plain(n) and isinstance(size, int) for n, size in files.items()):
        return {}
    return files


def _is_plain(name: object) -> bool:
    """Of a file in the folder, and in no other."""
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In words, what two runs do not have in common."""
    old, new = _flat(then), _flat(now)
    found = []
    for key in dict.fromkeys([*old, *new]):
        if old.get(key) != new.get(key):
            top = key if key in _FLAGS else key.split(".")[0]
            name = _FLAGS.get(top, key)
            detail = f": {_short(old.get(key))} then, {_short(new.get(key))} now" if key in _FLAGS else ""
            if top == "model":
                detail = f" ({key.removeprefix('model.')})"
            found.append(f"{name}{detail}")
    return list(dict.fromkeys(found))


class Staging:
    """The folder, held by one process."""

    def __init__(self, output_dir: Path, fingerprint: Mapping[str, Any], overwrite: bool):
        """Begins, or takes up what the same command left.

        Raises:
            ConfigError: another process works there, or another command did; names what differs.
        """
        self.output_dir, self.folder = output_dir, output_dir / FOLDER
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock: IO[str] = (self.folder / LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise ConfigError(f"OUTPUT_DIR {output_dir}: another process quantizes into it; wait for its end") from None
        if overwrite:
            self._clear()
        with contextlib.ExitStack() as stack:
            stack.callback(self.close)
            self._begin(fingerprint)
            stack.pop_all()

    def _begin(self, fingerprint: Mapping[str, Any]) -> None:
        state = self.folder / STATE
        self.drop_scratch()
        self.resumed = state.is_file()
        if self.resumed:
            then = next(iter(report_lines(state)), {})
            if then.get("kind") != fingerprint.get("kind"):
                raise ConfigError(
                    f"OUTPUT_DIR {self.output_dir}: {FOLDER}/{STATE} does not say what run it is of; give --overwrite "
                    "to begin anew"
                )
            if changed := differences(then, fingerprint):
                raise ConfigError(
                    f"OUTPUT_DIR {self.output_dir}: holds an unfinished run that differs in {'; '.join(changed)}; give "
                    "the same command to go on with it, or --overwrite to begin anew"
                )
        else:
            write_text(state, json.dumps(fingerprint) + "\n")

    def _clear(self) -> None:
        names = {REPORT, *result_files(self.output_dir)}
        if self.is_complete:
            names |= set(self._published())
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()
        for name in names:
            (self.output_dir / name).unlink(missing_ok=True)

    @property
    def is_complete(self) -> bool:
        return (self.folder / COMPLETE).exists()

    def path(self, name: str) -> Path:
        return self.folder / name

    def has(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def scratch(self, name: str, num_bytes: int) -> str:
        """A file of so many bytes, all of them reserved; `drop_scratch` removes it."""
        path = self.folder / f"{name}.partial"
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        return str(path)

    def drop_scratch(self) -> None:
        for partial in self.folder.glob("*.partial"):
            partial.unlink()

    def publish(self, names: list[str]) -> None:
        """Moves the files into the output folder; the last of them makes it a model. Can be taken up."""
        if not self.is_complete:
            write_text(self.folder / COMPLETE, json.dumps(names))
        names = self._published()
        absent = [name for name in names if not self.has(name) and not (self.output_dir / name).is_file()]
        if not names or absent:
            raise ConfigError(
                f"OUTPUT_DIR {self.output_dir}: {', '.join(absent[:4]) or f'what {FOLDER}/{COMPLETE} names'} is not "
                "there though the run was finished; give --overwrite to begin anew"
            )
        for name in names:
            if self.has(name):
                (self.folder / name).rename(self.output_dir / name)
        sync_folder(self.output_dir)
        self.close()
        shutil.rmtree(self.folder)
        sync_folder(self.output_dir)

    def _published(self) -> list[str]:
        """Names of the files of the result that move; none if that cannot be read."""
        try:
            names = json.loads((self.folder / COMPLETE).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return []
        return names if isinstance(names, list) and all(_is_plain(name) for name in names) else []

    def close(self) -> None:
        self._lock.close()


def free_bytes(folder: Path) -> int:
    """Of the disk that the folder, or the nearest of its parents that exists, is on."""
    while not folder.exists():
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be looked at: {error.strerror}") from error


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
