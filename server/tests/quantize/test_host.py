"""What the machine refuses a run, through the command itself: network, room on the disk, the right to write."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

COMMAND = [
    sys.executable, "-m", "text_generation_server.cli", "quantize", str(tiny.LLAMA), "OUTPUT",
    "--num-samples", "6", "--sequence-length", "48", "--num-threads", "1", "--dtype", "float32",
]  # fmt: skip
# A user who is not root has a namespace of his own where he is.
UNSHARE = ["unshare", *([] if os.geteuid() == 0 else ["--map-root-user"])]
TIMEOUT_S = 300

# Its arguments: the folder, one to copy the result to, the command. The disk is full from the moment at which the
# run has made sure that there is room.
DRIVER = """
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path

output, copy, *command = sys.argv[1:]
folder = Path(output)
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "none", output], check=True)
child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
while not (folder / ".quantizing" / "state.json").exists():
    assert child.poll() is None, child.stderr.read()
    time.sleep(0.001)
child.send_signal(signal.SIGSTOP)
ballast = (folder / ".quantizing" / "ballast").open("wb", buffering=0)
size = 1 << 20
while size:
    try:
        ballast.write(bytes(size))
    except OSError:
        size //= 2
child.send_signal(signal.SIGCONT)
said = child.communicate()[1]
ballast.close()
names = sorted(path.name for path in folder.rglob("*") if path.is_file())
os.unlink(ballast.name)
again = subprocess.run(command, stderr=subprocess.PIPE, text=True)
shutil.copytree(output, copy)
print(json.dumps([child.returncode, said, names, again.returncode, again.stderr]))
"""


def run(prefix: list[str], *command: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        environment.pop(name, None)
    return subprocess.run(
        [*prefix, *map(str, command)], env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
    )


def command(output: Path) -> list[str]:
    return [str(output) if part == "OUTPUT" else part for part in COMMAND]


def need(*command: object) -> None:
    done = run([], *command)
    if done.returncode:
        pytest.skip(f"{' '.join(map(str, command))} is refused here: {done.stderr.strip()}")


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("golden") / "out"
    done = run([], *command(output))
    assert done.returncode == 0, done.stderr
    return tiny.files(output)


def test_without_any_network_the_result_is_the_same(golden: dict[str, bytes], tmp_path: Path) -> None:
    """In a namespace that has no interface but a loopback which is down."""
    prefix = [*UNSHARE, "--net"]
    need(*prefix, "true")
    done = run(prefix, *command(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert tiny.files(tmp_path / "out") == golden


def test_a_full_disk_leaves_nothing_half_named_and_the_run_goes_on_when_there_is_room(
    golden: dict[str, bytes], tmp_path: Path
) -> None:
    prefix = [*UNSHARE, "--mount"]
    need(*prefix, "mount", "-t", "tmpfs", "none", tmp_path)
    output, copy = tmp_path / "out", tmp_path / "copy"
    output.mkdir()
    done = run(prefix, sys.executable, "-c", DRIVER, output, copy, *command(output))
    assert done.returncode == 0, done.stderr
    code, said, names, code_again, said_again = json.loads(done.stdout.splitlines()[-1])
    assert code == 1 and "Traceback" not in said
    error = said.splitlines()[-1]
    assert (
        f"{output}: cannot be written: " in error
        and "No space left on device" in error
        and "give the same command again" in error
    )
    assert names == ["ballast", "lock", "state.json"]
    assert code_again == 0, said_again
    assert tiny.files(copy) == golden


def test_a_folder_in_which_nothing_may_be_written_is_refused_at_once(tmp_path: Path) -> None:
    prefix: list[str] = []
    if os.geteuid() == 0:  # to whom permissions mean nothing unless he gives that right up
        prefix = ["setpriv", "--bounding-set", "-dac_override"]
        need(*prefix, "true")
    output = tmp_path / "out"
    output.mkdir(mode=0o555)
    for folder in (output, output / "below"):
        done = run(prefix, *command(folder))
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1].startswith(
            f"error: OUTPUT_DIR {folder}: cannot be written to: Permission denied"
        )
    assert not list(output.iterdir())
