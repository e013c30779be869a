"""What a user can get wrong is refused at once, in one line that says what to do."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from loguru import logger
from safetensors.torch import load_file, save_file
from text_generation_server.errors import ShardError
from text_generation_server.quantize.settings import (
    Options,
    Sampling,
    Scheme,
    as_regex,
    choose_scheme,
    choose_solver,
    matches,
    read_module_bits,
    read_size,
)


def cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "text_generation_server.cli", "quantize", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.make(tmp_path / "model", "llama")


def test_what_is_not_served_or_quantized_already_is_refused_in_under_five_seconds(tmp_path: Path) -> None:
    bloom = tmp_path / "bloom"
    bloom.mkdir()
    (bloom / "config.json").write_text(json.dumps({"architectures": ["BloomForCausalLM"], "model_type": "bloom"}))
    for folder, said in (
        (tmp_path / "none", f"error: MODEL_ID '{tmp_path}/none': no such folder"),
        (bloom, "BloomForCausalLM is not served; expected one of LlamaForCausalLM, MistralForCausalLM"),
        (tiny.MODELS / "docs-llama-7m-gptq-4bit-g128", "is quantized already (gptq: 4 bits, groups of 128"),
    ):
        begun = time.monotonic()
        done = cli(folder, tmp_path / "out")
        assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr
        assert time.monotonic() - begun < 5
    assert not (tmp_path / "out").exists()


def test_output_folders_that_cannot_be_used_are_refused(model: Path, tmp_path: Path) -> None:
    used = tmp_path / "used"
    used.mkdir()
    (used / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("")
    for output, said in (
        (used, "is not empty (it holds notes.txt)"),
        (tmp_path / "file", "is a file"),
        (model, "is the folder of the model"),
        (tmp_path / "file" / "below", "cannot be written to"),
    ):
        with pytest.raises(ShardError) as caught:
            tiny.run(model, output)
        assert said in str(caught.value)
    with pytest.raises(ShardError, match="which is not what a run leaves"):
        tiny.run(model, used, overwrite=True)
    assert (used / "notes.txt").read_text() == "mine"


def test_overwrite_replaces_a_result(model: Path, tmp_path: Path) -> None:
    tiny.run(model, tmp_path / "out", "rtn")
    with pytest.raises(ShardError, match=r'holds a finished result that differs in --method: "rtn" then, "awq" now'):
        tiny.run(model, tmp_path / "out", "awq")
    tiny.run(model, tmp_path / "out", "awq", overwrite=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["quant_method"] == "awq"


def test_overwrite_removes_results_and_nothing_else(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    tiny.run(model, output, "rtn")
    for name in ("notes.txt", "experiments.json", "LICENSE.mine", "adapter.safetensors"):
        (output / name).write_text("mine")
        with pytest.raises(ShardError, match=f"holds {name}, which is not what a run leaves"):
            tiny.run(model, output, "awq", overwrite=True)
        assert (output / name).read_text() == "mine"
        (output / name).unlink()
    (output / "quantization_report.jsonl").write_text("{]")
    with pytest.raises(ShardError, match=r"which is not what a run leaves"):
        tiny.run(model, output, "awq", overwrite=True)


@pytest.mark.parametrize("name", ["model-00002-of-00004.safetensors", "tokenizer.json"])
def test_a_finished_result_that_is_damaged_is_not_called_finished(name: str, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    tiny.run(model, output, "rtn")
    said = f"{name} is missing or is not as it was written; give --overwrite"
    (output / name).write_bytes((output / name).read_bytes()[:-3])
    with pytest.raises(ShardError, match=said):
        tiny.run(model, output, "rtn")
    (output / name).unlink()
    with pytest.raises(ShardError, match=said):
        tiny.run(model, output, "rtn")
    report = output / "quantization_report.jsonl"
    report.write_text("".join(report.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ShardError, match=r"quantization_report.jsonl is missing or is not as it was written"):
        tiny.run(model, output, "rtn")


def test_text_with_fewer_tokens_than_a_layer_has_inputs_is_told(model: Path, tmp_path: Path) -> None:
    for sampling, told in ((tiny.FEW, False), (Sampling(num_samples=2, length=32), True)):
        said: list[str] = []
        sink = logger.add(lambda message, said=said: said.append(message.record["message"]))
        tiny.run(model, tmp_path / f"out-{told}", sampling=sampling)
        logger.remove(sink)
        assert any("fewer than the widest layer has inputs (128)" in line for line in said) == told


def test_activations_that_are_not_finite_name_the_layer(model: Path, tmp_path: Path) -> None:
    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.post_attention_layernorm.weight"][3] = float("inf")
    save_file(tensors, path)
    with pytest.raises(ShardError, match=r"model.layers.1.mlp.gate_proj: its inputs are not finite"):
        tiny.run(model, tmp_path / "out")


def test_a_weight_that_is_not_finite_is_named(model: Path, tmp_path: Path) -> None:
    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(tensors, path)
    with pytest.raises(ShardError, match=r"model.layers.0.mlp.down_proj: its weight is not finite"):
        tiny.run(model, tmp_path / "out")


def test_damping_that_had_to_be_raised_is_said_and_recorded(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tries = torch.linalg.cholesky_ex, iter([1, 1])

    def fails_twice(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        factor, info = real(matrix)
        return factor, info + next(tries, 0)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", fails_twice)
    said: list[str] = []
    sink = logger.add(lambda message: said.append(message.record["message"]))
    tiny.run(model, tmp_path / "out")
    logger.remove(sink)
    assert [line for line in said if "damping raised" in line] == [
        "model.layers.0.self_attn.q_proj: the Hessian is not positive definite with damping 0.01; "
        "damping raised to 0.16"
    ]
    damping = [row["damping"] for row in tiny.report(tmp_path / "out", "layer")]
    assert damping[:3] == [0.16] * 3 and set(damping[3:]) == {0.01}
    assert "| 0.16 |" in (tmp_path / "out" / "README.md").read_text()


def test_what_does_not_fit_into_memory_or_on_the_disk_is_refused_before_it_begins(model: Path, tmp_path: Path) -> None:
    resources = tiny.Resources(num_threads=1, max_memory=50 << 20)
    with pytest.raises(ShardError, match=r"this needs .* of host memory .*; 50 MiB is --max-memory; take fewer"):
        tiny.run(model, tmp_path / "out", resources=resources)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("text_generation_server.quantize.run.free_bytes", lambda _: 1 << 20)
        with pytest.raises(ShardError, match=r"the result needs .*, 1 MiB is free on that disk"):
            tiny.run(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_model_is_refused(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    tensors = load_file(model / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:100].clone()
    save_file(tensors, model / "model.safetensors")
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(ShardError, match=r"the tokenizer gives id .*; the model has ids from 0 to 99"):
        tiny.run(model, tmp_path / "out")


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        (Scheme("gptq", 3, 32, excluded=("nothing",)), "--exclude 'nothing' means no layer"),
        (Scheme("gptq", 3, 32, module_bits=(("lm_head", 8),)), "--module-bits 'lm_head' means no layer that can be"),
        (Scheme("gptq", 3, 32, module_bits=(("head", 8),)), "--module-bits 'head' means no layer"),
        (Scheme("gptq", 4, 32, excluded=("*",)), "every linear is excluded"),
        (Scheme("awq", 4, 1024, sym=False), "awq has whole groups only"),
    ],
)
def test_schemes_that_do_not_fit_the_model_are_refused(scheme: Scheme, said: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ShardError) as caught:
        tiny.run(model, tmp_path / "out", scheme=scheme)
    assert said in str(caught.value)


OPTIONS = [
    (lambda: choose_scheme("ggml", None, None, None, [], ()), "--method ggml is unknown; expected one of gptq, awq"),
    (lambda: choose_scheme("gptq", 5, None, None, [], ()), "--bits 5 is not made; expected one of 2, 3, 4, 8"),
    (lambda: choose_scheme("awq", 3, None, None, [], ()), "--method awq has 4 bits, but --bits is 3"),
    (lambda: choose_scheme("gptq", 4, 100, None, [], ()), "--groupsize 100 is not made"),
    (lambda: choose_scheme("bitsandbytes", None, 64, None, [], ()), "--groupsize has no meaning for --method bits"),
    (lambda: choose_scheme("awq", None, None, None, [], (("x", 4),)), "--module-bits needs --method gptq or rtn"),
    (lambda: choose_scheme("gptq", 4, None, None, ["a(b"], ()), "pattern 'a(b' is not one"),
    (lambda: choose_solver("awq", 0.1, None, None, None), "--percdamp has no meaning for --method awq"),
    (lambda: choose_solver("awq", None, None, None, True), "--mse has no meaning for --method awq"),
    (lambda: choose_solver("gptq", 0.0, None, None, None), "--percdamp is 0.0"),
    (lambda: read_module_bits(["down_proj"]), "--module-bits 'down_proj' is not PATTERN=BITS"),
    (lambda: read_size("--max-memory", "much"), "--max-memory 'much' is not a size"),
    (lambda: read_size("--max-memory", "0"), "--max-memory '0' is not a size"),
    (lambda: choose_scheme("gptq", 4, None, None, [], (("x", 5),)), "--module-bits x=5 is not made; expected one of 2"),
]


@pytest.mark.parametrize(("make", "said"), OPTIONS, ids=[said[:30] for _, said in OPTIONS])
def test_options_that_nothing_makes_are_refused(make: object, said: str) -> None:
    def options() -> None:
        made = make()  # type: ignore[operator]
        if isinstance(made, Scheme):
            Options(Path("a"), Path("b"), "a", made)
        Options(Path("a"), Path("b"), "a", solver=made)  # type: ignore[arg-type]

    with pytest.raises(ShardError) as caught:
        options()
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("sampling", "said"),
    [
        (Sampling(num_samples=0), "--num-samples"),
        (Sampling(length=4), "--sequence-length"),
        (Sampling(seed=-1), "--seed"),
    ],
)
def test_numbers_out_of_range_are_refused(sampling: Sampling, said: str) -> None:
    with pytest.raises(ShardError, match=said):
        Options(Path("a"), Path("b"), "a", sampling=sampling)


def test_memory_of_a_device_that_is_not_used_is_refused() -> None:
    with pytest.raises(ShardError, match="--max-device-memory has no meaning for --device cpu"):
        Options(Path("a"), Path("b"), "a", resources=tiny.Resources(max_device_memory=1 << 30))


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_the_head_may_be_excluded_though_it_always_is(architecture: str, tmp_path: Path) -> None:
    """Also where it is the embedding (qwen2's here)."""
    model = tiny.make(tmp_path / "model", architecture)
    tiny.run(model, tmp_path / "out", scheme=Scheme("rtn", 4, 32, excluded=("lm_head",)))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["bits"] == 4


def test_sizes_are_read_as_people_write_them() -> None:
    texts = {"24GiB": 24 << 30, "24gib": 24 << 30, "1.5 GB": 1_500_000_000, "512m": 512_000_000, "12345": 12345}
    assert {text: read_size("--max-memory", text) for text in texts} == texts


def test_patterns_mean_the_same_as_the_expressions_that_are_stored() -> None:
    import re

    layers = [f"model.layers.{i}.{part}" for i in (0, 1, 11) for part in ("mlp.down_proj", "self_attn.q_proj")]
    for pattern in ("down_proj", "layers.1.*", "model.layers.[0-1].mlp.*", "*q_proj", "layers.?.mlp.down_proj", "proj"):
        stored = re.compile(as_regex(pattern))
        assert [matches(pattern, layer) for layer in layers] == [bool(stored.match(layer)) for layer in layers], pattern


def test_a_folder_without_a_tokenizer_is_refused(model: Path, tmp_path: Path) -> None:
    (model / "tokenizer.json").unlink()
    with pytest.raises(ShardError, match=r"tokenizer.json: no such file"):
        tiny.run(model, tmp_path / "out")
    shutil.rmtree(model)
    with pytest.raises(ShardError, match="no such folder"):
        tiny.run(model, tmp_path / "out")
