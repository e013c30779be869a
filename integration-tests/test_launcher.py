"""Starting, refusing to start, and ending."""

import contextlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import LLAMA, QWEN2
from support.load import Crowd, assert_same, mixed_cases
from support.server import BINARIES, Server, free_port, wait_until


def refusal(
    model: Path | str, *flags: str, env: dict[str, str] | None = None, timeout_s: float = 10
) -> tuple[int, str]:
    """Exit code and output of a launcher that must refuse to start in time."""
    command = [str(BINARIES / "text-generation-launcher"), "--model-id", str(model), "--port", str(free_port()), *flags]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_s, env=os.environ | (env or {}), check=False
    )
    return done.returncode, done.stdout + done.stderr


def edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        for key, value in changes.items():
            if value is None:
                del config[key]
            else:
                config[key] = value
        (model / "config.json").write_text(json.dumps(config))

    return edit


def edit_header(edit: Callable[[dict], None]) -> Callable[[Path], None]:
    """Changes the header of model.safetensors and leaves its data as it is."""

    def apply(model: Path) -> None:
        path = model / "model.safetensors"
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        edit(header)
        raw = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(raw)) + raw + content[8 + length :])

    return apply


def rename_tensor(header: dict) -> None:
    header["model.layers.3.mlp.nothing.weight"] = header.pop("model.layers.3.mlp.up_proj.weight")


def reshape_tensor(header: dict) -> None:
    header["model.layers.2.self_attn.q_proj.weight"]["shape"].reverse()
    header["model.norm.weight"]["shape"] = [128, 2]


BROKEN = {
    "no config": (lambda m: (m / "config.json").unlink(), ["config.json"]),
    "config is not JSON": (lambda m: (m / "config.json").write_text("{"), ["config.json"]),
    "unsupported architecture": (
        edit_config(architectures=["PerceiverForMaskedLM"], model_type="perceiver"),
        ["PerceiverForMaskedLM", "LlamaForCausalLM"],
    ),
    "unimplemented activation": (edit_config(hidden_act="quick_gelu"), ["hidden_act", "quick_gelu", "silu"]),
    "unimplemented rotary type": (edit_config(rope_scaling={"rope_type": "spiral", "factor": 2.0}), ["spiral"]),
    "missing key": (edit_config(hidden_size=None), ["hidden_size", "config.json"]),
    "size that does not fit": (
        edit_config(intermediate_size=1024),
        ["mlp.gate_proj.weight", "768", "1024", "config.json"],
    ),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), ["safetensors"]),
    "truncated weights": (
        lambda m: os.truncate(m / "model.safetensors", (m / "model.safetensors").stat().st_size - 1),
        ["model.safetensors"],
    ),
    "missing tensor": (edit_header(rename_tensor), ["model.layers.3.mlp.up_proj.weight"]),
    "tensor of the wrong shape": (edit_header(reshape_tensor), ["model.norm.weight", "128"]),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), ["tokenizer.json"]),
    "tokenizer is none": (
        lambda m: (m / "tokenizer.json").write_text("{}"),
        ["tokenizer.json: model is missing", "as the tokenizers library saves it"],
    ),
    "tokenizer of an unknown kind": (
        lambda m: (m / "tokenizer.json").write_text('{"model": {"type": "Nothing", "vocab": {}}}'),
        ["tokenizer.json: cannot be read as a tokenizer", "expected the tokenizer.json of the model"],
    ),
    "tokenizer left by Git LFS": (
        lambda m: (m / "tokenizer.json").write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
        ),
        ["tokenizer.json", "is a pointer of Git LFS", "git lfs pull"],
    ),
    "chat template that is none": (
        lambda m: (m / "chat_template.jinja").write_text("\n{% for %}"),
        ["chat_template.jinja, line 2 of its chat template"],
    ),
    "tokenizer's settings are not JSON": (
        lambda m: (m / "tokenizer_config.json").write_text("{"),
        ["tokenizer_config.json: is not JSON"],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_folder_is_refused_by_name(name: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(LLAMA, model)
    harm, words = BROKEN[name]
    harm(model)
    code, output = refusal(model)
    assert code == 1, output
    lines = output.splitlines()
    assert any(all(word in line for word in words) for line in lines), f"no line with {words} in:\n{output}"
    assert "Traceback" not in output and "panicked" not in output, output
    assert "rank 0" not in output.lower(), "refused before a rank is spawned"
    assert output.count("error: ") == 1, output


@pytest.mark.parametrize(
    ("flag", "content", "words"),
    [
        ("--chat-template", None, ["cannot be read: No such file", "expected a file with a template of Jinja"]),
        ("--chat-template", "{% for %}", ["line 1 of its chat template"]),
        ("--tokenizer-config-path", None, ["cannot be read: No such file", "like a model's tokenizer_config.json"]),
        ("--tokenizer-config-path", "[]", ["is not a JSON object"]),
        ("--api-key-file", None, ["cannot be read: No such file", "expected a file of keys, one a line"]),
        ("--api-key-file", "good\nb\x01d\n", ["line 2: expected a text without control characters"]),
    ],
)
@pytest.mark.parametrize("output_flags", [(), ("--json-output",)], ids=["text", "json"])
def test_a_file_that_the_router_reads_is_refused_before_anything_is_started(
    flag: str, content: str | None, words: list[str], output_flags: tuple[str, ...], tmp_path: Path
) -> None:
    file = tmp_path / "file"
    if content is not None:
        file.write_text(content)
    code, output = refusal(LLAMA, flag, str(file), *output_flags)
    assert code == 1, output
    lines = [line for line in output.splitlines() if f"{flag} {file}" in line]
    assert len(lines) == 1 and all(word in lines[0] for word in words), output
    assert "rank 0" not in output.lower() and "Traceback" not in output, output


def test_a_missing_model_folder_is_refused(tmp_path: Path) -> None:
    code, output = refusal(tmp_path / "nothing-here")
    assert code == 1 and "nothing-here" in output, output


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (("--num-shard", "3"), 1, ["4 attention heads", "3 shards"]),
        (("--num-shard", "0"), 2, ["num-shard"]),
        (("--max-input-tokens", "10", "--max-total-tokens", "5"), 2, ["max-input-tokens"]),
        (("--max-concurrent-requests", "0"), 2, ["max-concurrent-requests"]),
        (("--validation-workers", "0"), 2, ["validation-workers"]),
        (("--quantize", "gptq"), 1, ["--quantize gptq", "not quantized", "leave the flag out"]),
        (("--dtype", "float16"), 1, ["float16"]),
        (("--no-such-flag",), 2, ["no-such-flag"]),
        (("--lora-adapters", "x"), 2, ["--lora-adapters", "not served yet"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_flags_that_cannot_be_served_are_refused(flags: tuple[str, ...], code: int, words: list[str]) -> None:
    found, output = refusal(LLAMA, *flags)
    assert found != 0, output
    assert found == code, output
    assert all(word in output for word in words), output


def test_gpus_that_are_not_there_are_refused_before_anything_starts() -> None:
    code, output = refusal(LLAMA, "--device", "cuda", env={"CUDA_VISIBLE_DEVICES": "-1"})
    assert code == 1, output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: --device cuda: the NVIDIA driver ")
    assert "use --device cpu" in line
    assert "run directory" not in output


@pytest.mark.parametrize("value", ["abc", "0", "-1"])
def test_an_environment_variable_out_of_range_is_refused(value: str) -> None:
    code, output = refusal(LLAMA, env={"MAX_CONCURRENT_REQUESTS": value})
    assert code == 2 and "max-concurrent-requests" in output, output


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [str(BINARIES / "text-generation-launcher"), "--model-id", str(LLAMA), "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    assert done.returncode == 1 and str(port) in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("options", "cause"), [("size=16k", "No space left on device"), ("ro", "Read-only file system")]
)
def test_a_place_for_sockets_that_has_no_room_is_refused(options: str, cause: str) -> None:
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], check=False).returncode != 0:
        pytest.skip("no mount namespaces here")
    launcher = [str(BINARIES / "text-generation-launcher"), "--model-id", str(LLAMA), "--port", str(free_port())]
    # Paths of sockets are short.
    with tempfile.TemporaryDirectory(prefix="tgs-") as place:
        # What is left there is gone with the mount, so it is listed.
        small = f'mount -t tmpfs -o {options} tmpfs {place} && "$@"; code=$?; find {place} -mindepth 1; exit $code'
        command = ["unshare", "-rm", "sh", "-c", small, "sh", *launcher, "--shard-uds-path", f"{place}/run"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and f"cannot be made: {cause}" in line and "docker run --tmpfs /tmp" in line, line
    assert "rank 0" not in done.stdout and f"{place}/run-" not in done.stdout, done.stdout


def test_help_tells_every_flag_with_its_environment_variable() -> None:
    done = subprocess.run(
        [str(BINARIES / "text-generation-launcher"), "--help"], capture_output=True, text=True, check=True
    )
    for flag in ("--model-id", "--num-shard", "--max-concurrent-requests", "--port", "--dtype"):
        assert flag in done.stdout
        assert f"[env: {flag[2:].replace('-', '_').upper()}=" in done.stdout


def test_sigterm_drains_and_loses_no_stream() -> None:
    cases = mixed_cases(32, max_new_tokens=150)
    with Server(LLAMA, "--dtype", "float32", "--num-shard", "2") as server:
        golden = Crowd(server, cases).join()
        crowd = Crowd(server, cases)
        wait_until(lambda: min(crowd.num_emitted()) >= 1, 60, "all streams emitted")
        server.remember()
        assert server.process is not None
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not server.is_ready(), 1, "readiness is false")
        assert_same(crowd.join(), golden, "while draining")
        assert server.process.wait(30) == 0


def test_a_stream_longer_than_the_grace_ends_with_an_error_event() -> None:
    with Server(LLAMA, "--dtype", "float32", "--graceful-termination-timeout", "1") as server:
        crowd = Crowd(server, mixed_cases(8, 1800))
        wait_until(lambda: min(crowd.num_emitted()) >= 1, 60, "all streams emitted")
        started = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - started < 1 + 4
        for thread in crowd.threads:
            thread.join(10)
        assert not crowd.failures, crowd.failures
        assert all(answer.error is not None for answer in crowd.answers)


@pytest.mark.parametrize("moment", ["at once", "while loading", "serving"])
def test_ctrl_c_ends_everything_at_every_phase(moment: str) -> None:
    server = Server(QWEN2, "--num-shard", "2", wait=moment == "serving")
    with server:
        assert server.process is not None
        if moment == "at once":
            # Before its first line it has started nothing, and a signal may simply end it.
            wait_until(server.log, 20, "the launcher runs")
        if moment == "while loading":
            wait_until(lambda: "rank 0" in server.log().lower(), 20, "a rank was started")
        server.remember()
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(20) == 0, server.log()


def test_a_start_that_stalls_tells_phase_and_stacks(tmp_path: Path) -> None:
    fault = tmp_path / "fault"
    fault.write_text("rank=0 point=load count=1 action=stall\n")
    with Server(LLAMA, "--startup-stall-timeout", "5", env={"FAULT_FILE": str(fault)}, wait=False) as server:
        assert server.process is not None
        assert server.process.wait(40) == 1
        log = server.log()
        assert "no progress for 5 s" in log and "rank 0: importing" in log, log
        assert "Thread" in log and ".py" in log, log


def test_a_shard_that_dies_at_every_start_ends_the_launcher(tmp_path: Path) -> None:
    fault = tmp_path / "fault"
    fault.write_text("rank=0 point=load count=1 action=kill times=100\n")
    with Server(LLAMA, env={"FAULT_FILE": str(fault)}, wait=False) as server:
        assert server.process is not None
        assert server.process.wait(60) == 1
        log = server.log()
        assert "signal 9" in log.lower() or "sigkill" in log.lower(), log
        assert "lost 3 times" in log, log


def test_secrets_do_not_appear_in_arguments_or_logs() -> None:
    secret = "hf_secret_value_for_this_test"
    with Server(LLAMA, env={"HF_TOKEN": secret}) as server:
        server.generate("A list is a", max_new_tokens=2)
        server.remember()
        for pid in server.known:
            with contextlib.suppress(OSError):
                assert secret.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
        assert secret not in server.log()


def test_sockets_belong_to_their_owner_alone() -> None:
    with Server(LLAMA) as server:
        directory = server.run_directory()
        assert directory.stat().st_mode & 0o777 == 0o700
        for path in directory.iterdir():
            if path.is_socket():
                assert path.stat().st_mode & 0o777 == 0o600, path
