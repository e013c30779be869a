"""Every served architecture with every method, from a dense folder to one that transformers and the server agree on."""

import os
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import tiny
import torch
import transformers
from harness import Log, Shard, load
from safetensors.torch import load_file
from text_generation_server.kernels.reference.kernels import ReferenceKernels
from text_generation_server.loading import Alone, TensorParallel
from text_generation_server.planning import plan_model
from text_generation_server.quantize.documents import open_documents
from text_generation_server.quantize.settings import METHODS
from text_generation_server.quantize.windows import make_windows

FULL = bool(os.environ.get("FULL"))
# Of each architecture the two methods that need calibration, of one all.
CASES = [
    (architecture, method)
    for architecture in tiny.CONFIGS
    for method in METHODS
    if FULL or method in ("gptq", "awq") or architecture == "qwen2"
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for architecture in tiny.CONFIGS:
        tiny.make(folder / architecture, architecture)
    return folder


@pytest.mark.parametrize(("architecture", "method"), CASES)
def test_the_result_is_the_model_in_fewer_bits(architecture: str, method: str, models: Path, tmp_path: Path) -> None:
    source, output = models / architecture, tmp_path / "out"
    outcome = tiny.run(source, output, method)
    plan = plan_model(output, world_size=2)
    plan.check_tokenizer()
    assert plan.quantization.method == ("gptq" if method == "rtn" else method)
    windows = make_windows(open_documents(None, source), source, tiny.FEW, 128, 4096).held_back
    result = tiny.dequantized(output)
    original = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    assert outcome.proof is not None
    assert outcome.proof["perplexity_before"] == pytest.approx(tiny.perplexity(original, windows), rel=1e-4)
    assert outcome.proof["perplexity_after"] == pytest.approx(tiny.perplexity(result, windows), rel=1e-4)
    with torch.no_grad():
        ids = torch.tensor([windows[0]])
        logs = [model(ids).logits[0, :-1].log_softmax(-1).double() for model in (original, result)]
    divergence = float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())
    assert 0 < divergence < 0.2
    if len(windows) == 1:
        assert outcome.proof["kl_mean"] == pytest.approx(divergence, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes-nf4", "bitsandbytes"])
def test_the_server_computes_what_transformers_does_with_the_result(
    method: str, models: Path, tmp_path: Path, kernels: object
) -> None:
    tiny.run(models / "llama", tmp_path / "out", method)
    ids = list(range(5, 45))
    shard = Shard(load(tmp_path / "out", TensorParallel(0, 1, Alone()), ReferenceKernels()))
    log = Log(ids, [0, 1, 2])
    shard.step([(log, len(ids))], sample_all=True)
    with torch.no_grad():
        expected = tiny.dequantized(tmp_path / "out")(torch.tensor([ids])).logits[0]
    found = torch.stack([log.logits[i + 1] for i in range(len(ids))])
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("method", ["bitsandbytes-nf4", "bitsandbytes-fp4"])
def test_transformers_loads_what_bitsandbytes_would_have_made(method: str, models: Path, tmp_path: Path) -> None:
    source = models / "llama"
    tiny.run(source, tmp_path / "out", method)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    kind = method.removeprefix("bitsandbytes-")
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=torch.float32
    )
    made = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, quantization_config=settings, device_map="cpu"
    )
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, made(ids).logits, atol=1e-4, rtol=1e-3)


def test_eight_bits_are_those_of_bitsandbytes(models: Path, tmp_path: Path) -> None:
    tiny.run(models / "qwen3", tmp_path / "out", "bitsandbytes")
    source = load_file(models / "qwen3" / "model.safetensors")
    made = load_file(tmp_path / "out" / "model-00002-of-00004.safetensors")
    layers = [name.removesuffix(".SCB") for name in made if name.endswith(".SCB")]
    assert len(layers) == 7
    for layer in layers:
        codes, absmax, _ = bnb.int8_vectorwise_quant(source[f"{layer}.weight"].half())
        assert torch.equal(made[f"{layer}.weight"], codes) and torch.equal(made[f"{layer}.SCB"], absmax)


def test_calibrated_methods_are_better_than_rounding_and_say_so(models: Path, tmp_path: Path) -> None:
    for method in ("gptq", "awq"):
        tiny.run(models / "qwen3", tmp_path / method, method)
        rows = tiny.report(tmp_path / method, "layer")
        assert len(rows) == 14
        better = [row for row in rows if row["error_after"] < row["error_before"]]
        assert len(better) >= 12, method
        assert (tmp_path / method / "quantization_error.png").read_bytes().startswith(b"\x89PNG")


def test_exclusions_and_other_bits_hold(models: Path, tmp_path: Path) -> None:
    scheme = tiny.Scheme("gptq", 3, 32, True, ("layers.0.mlp.*",), (("v_proj", 8), ("layers.1.mlp.up_proj", 2)))
    tiny.run(models / "llama", tmp_path / "out", scheme=scheme)
    formats = {name: linear.format.name for name, linear in plan_model(tmp_path / "out", world_size=1).linears.items()}
    kinds = {name: format_.split(",")[0] for name, format_ in formats.items()}
    assert kinds["model.layers.0.mlp.up_proj"] == kinds["lm_head"] == "not quantized"
    assert kinds["model.layers.0.self_attn.v_proj"] == "gptq 8 bits"
    assert kinds["model.layers.1.mlp.up_proj"] == "gptq 2 bits"
    assert kinds["model.layers.1.mlp.down_proj"] == "gptq 3 bits"


@pytest.mark.parametrize("method", ["awq", "bitsandbytes-nf4"])
def test_exclusions_hold_where_names_are_listed(method: str, models: Path, tmp_path: Path) -> None:
    scheme = tiny.Scheme(method, 4, 32, method != "awq", ("o_proj", "model.layers.1.mlp.gate_proj"))
    outcome = tiny.run(models / "llama", tmp_path / "out", scheme=scheme)
    linears = plan_model(tmp_path / "out", world_size=1).linears
    dense = sorted(name for name, linear in linears.items() if linear.format.name == "not quantized")
    assert dense == ["lm_head", "model.layers.0.self_attn.o_proj", "model.layers.1.mlp.gate_proj",
                     "model.layers.1.self_attn.o_proj"]  # fmt: skip
    assert outcome.proof is not None and outcome.proof["kl_mean"] < 0.2


def test_others_may_read_the_result_as_far_as_the_umask_allows(models: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        tiny.run(models / "qwen2", tmp_path / "out", "rtn")
    finally:
        os.umask(before)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "out").iterdir()} == {
        path.name: "0o640" for path in (tmp_path / "out").iterdir()
    }
