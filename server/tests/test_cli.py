"""The command line as a user and the launcher see it: help, plan, refusals, exit codes."""

import inspect
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open
from step_client import LLAMA, QWEN2, ROOT
from text_generation_server import cli
from text_generation_server.config import read_sizes
from text_generation_server.errors import ConfigError

COMMANDS = {"serve": cli.serve, "plan": cli.plan, "devices": cli.devices, "download-weights": cli.download_weights}
PLAN_FACTS = {
    "model_dir", "model_type", "architecture", "dtype", "num_parameters", "weight_bytes", "weight_bytes_per_rank",
    "kv_bytes_per_token_per_rank", "max_positions", "vocab_size", "eos_token_ids",
}  # fmt: skip


def run(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "text_generation_server.cli", *map(str, arguments)],
        cwd=ROOT / "server",
        env=os.environ | {"COLUMNS": "200", "NO_COLOR": "1"} | env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a command that was refused."""
    assert done.returncode == 1, done
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_names_every_option(command):
    text = run(command, "--help").stdout
    for name in inspect.signature(COMMANDS[command]).parameters:
        expected = {"model_id": "model_id", "as_json": "--json"}.get(name, "--" + name.replace("_", "-"))
        assert expected in text, name


def test_sizes_of_cuda_graphs_are_numbers_or_none(tmp_path):
    assert read_sizes("1,2, 64") == (1, 2, 64)
    assert read_sizes("0") == ()
    assert 1 in read_sizes(None)
    with pytest.raises(ConfigError, match="--cuda-graphs is 'a,b', expected numbers"):
        read_sizes("a,b")
    for sizes in ("2,0", "-1", "5000"):
        refused = run("serve", LLAMA, "--uds-path", tmp_path / "s", "--cuda-graphs", sizes)
        assert f"--cuda-graphs is {sizes}, expected numbers of rows from 1 to 1024" in refusal(refused)


def test_the_help_names_every_command():
    text = run("--help").stdout
    assert all(command in text for command in COMMANDS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "tokenizer.json: no such file; expected the model's tokenizer; convert tokenizer.model"),
        ("", "tokenizer.json: is not JSON"),
        ("{}", "tokenizer.json: model is missing; expected a tokenizer"),
        ('{"model": {}}', "tokenizer.json: model is without a vocab"),
    ],
)
def test_a_plan_refuses_a_folder_whose_tokenizer_cannot_be_read(content, message, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(LLAMA, folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").touch()
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
    assert message in refusal(run("plan", folder, "--json"))


@pytest.mark.parametrize(
    ("model", "dtype", "world_size"), [(LLAMA, "float32", 1), (LLAMA, "bfloat16", 2), (QWEN2, "float32", 2)]
)
def test_a_plan_is_one_json_object_of_plain_facts(model, dtype, world_size):
    done = run("plan", model, "--num-shard", world_size, "--dtype", dtype, "--json")
    facts = json.loads(done.stdout)
    assert facts.keys() >= PLAN_FACTS
    assert all(value is None or isinstance(value, (str, int, list)) for value in facts.values())
    config = json.loads((model / "config.json").read_text())
    width = {"float32": 4, "bfloat16": 2}[dtype]
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    kv_numbers = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim
    tensors = [t for path in model.glob("*.safetensors") for t in stored_sizes(path)]
    assert facts["model_dir"] == str(model)
    assert facts["dtype"] == dtype
    assert facts["num_parameters"] == sum(tensors)
    assert facts["weight_bytes"] == 2 * sum(tensors)
    assert facts["kv_bytes_per_token_per_rank"] == kv_numbers * width // world_size
    assert (
        sum(tensors) * width / world_size
        <= facts["weight_bytes_per_rank"]
        <= sum(tensors) * width * 1.01 / world_size + 40_000
    )
    assert facts["vocab_size"] == config["vocab_size"]
    assert facts["eos_token_ids"] == [2, 6]


def stored_sizes(path: Path) -> list[int]:
    with safe_open(path, "numpy") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 - not a dict
    return [shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes]


def test_a_plan_for_people_has_a_line_for_each_fact():
    lines = run("plan", LLAMA).stdout.splitlines()
    assert {line.split()[0] for line in lines} >= PLAN_FACTS


def test_a_plan_imports_no_torch_and_takes_less_than_two_seconds():
    program = (
        "import sys, time, text_generation_server.cli as cli\n"
        "started = time.process_time()\n"
        f"cli.app(['plan', {str(LLAMA)!r}, '--json'], standalone_mode=False)\n"
        "print('torch' in sys.modules, time.process_time() - started, file=sys.stderr)\n"
    )
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT / "server", capture_output=True, text=True, check=True
    )
    has_torch, seconds = done.stderr.split()
    assert has_torch == "False"
    assert float(seconds) < 1
    # Others may be using the machine.
    assert time.monotonic() - started < 10


def broken(tmp_path: Path, **config: object) -> Path:
    """A copy of the shipped model with another configuration."""
    folder = tmp_path / "model"
    shutil.copytree(LLAMA, folder)
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stored | config))
    return folder


def without_tensors(tmp_path: Path) -> Path:
    folder = broken(tmp_path)
    (folder / "model.safetensors").unlink()
    return folder


BROKEN = [
    (lambda path: path / "absent", ["absent", "no such folder"]),
    (lambda path: broken(path, architectures=["MambaForCausalLM"], model_type="mamba"), ["mamba"]),
    (lambda path: broken(path, num_hidden_layers=7), ["model.layers.6", "missing"]),
    (lambda path: broken(path, hidden_act="mish"), ["hidden_act", "mish"]),
    (without_tensors, ["safetensors"]),
]


@pytest.mark.parametrize("command", ["serve", "plan"])
@pytest.mark.parametrize(("make", "words"), BROKEN)
def test_a_model_that_cannot_be_served_ends_with_one_line_that_names_it(tmp_path, command, make, words):
    flags = ["--uds-path", tmp_path / "socket", "--memory-bytes", 1 << 30] if command == "serve" else ["--json"]
    line = refusal(run(command, make(tmp_path), *flags))
    assert all(word.lower() in line.lower() for word in words), line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rank", 2, "--world-size", 2], "--rank 2 is not below --world-size 2"),
        (["--num-threads", 0], "--num-threads is 0"),
        (["--memory-bytes", 0], "--memory-bytes is 0"),
        (["--dtype", "int3"], "--dtype is 'int3'"),
        (["--device", "tpu"], "--device is 'tpu'"),
        (["--device", "cuda", "--dtype", "float32"], "--dtype float32 is not served on cuda"),
        (["--quantize", "gptq"], "--quantize gptq: the weights in"),
        (["--logger-level", "LOUD"], "--logger-level is 'LOUD', expected one of TRACE"),
        (["--uds-path", "/tmp/" + "x" * 110], "longer than the 107 bytes"),
        (["--world-size", 3], "4 attention heads do not divide over 3 shards"),
    ],
    ids=str,
)
def test_a_setting_that_cannot_be_served_ends_with_one_line(tmp_path, flags, message):
    socket = [] if "--uds-path" in flags else ["--uds-path", tmp_path / "socket"]
    assert message in refusal(run("serve", LLAMA, *socket, *flags))


def test_heads_that_do_not_divide_are_refused_by_the_plan():
    assert "4 attention heads do not divide over 3 shards" in refusal(run("plan", LLAMA, "--num-shard", 3, "--json"))


def test_a_socket_that_cannot_be_made_ends_with_one_line(tmp_path):
    assert "absent/socket" in refusal(run("serve", LLAMA, "--uds-path", tmp_path / "absent" / "socket"))


@pytest.mark.parametrize(
    "flags", [[], ["--trust-remote-code"], ["--revision", "main", "--logger-level", "ERROR"]], ids=str
)
def test_download_weights_passes_a_folder_through(flags):
    done = run("download-weights", LLAMA, *flags)
    assert (done.returncode, json.loads(done.stdout)) == (0, {"model_dir": str(LLAMA)})


@pytest.mark.parametrize(
    "model_id", ["", "a/b/c", "../secret", "a//b", "a b", "/nonexistent", ".hidden/x", "https://x/y"]
)
def test_what_is_neither_a_folder_nor_an_id_is_refused(model_id):
    assert "not the form of a hub id" in refusal(run("download-weights", model_id))


def test_offline_says_so(tmp_path):
    line = refusal(run("download-weights", "someone/some-model", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path)))
    assert "someone/some-model" in line
    assert "HF_HUB_OFFLINE" in line


def test_a_model_that_was_never_downloaded_is_not_asked_for_by_plan(tmp_path):
    line = refusal(run("plan", "someone/some-model", HF_HOME=str(tmp_path)))
    assert "download-weights" in line


def test_flags_are_environment_variables_as_well():
    facts = json.loads(run("plan", "--json", MODEL_ID=str(LLAMA), NUM_SHARD="2", DTYPE="bfloat16").stdout)
    assert (facts["world_size"], facts["dtype"]) == (2, "bfloat16")
