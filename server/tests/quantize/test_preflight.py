"""What a run is said to take before it begins."""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import tiny
import torch
from text_generation_server.config import prepare_environment
from text_generation_server.kernels.offline import Machine
from text_generation_server.planning import plan_model
from text_generation_server.quantize import preflight
from text_generation_server.quantize.recording import open_model
from text_generation_server.quantize.settings import Options, Resources, Sampling, Scheme, Solver

GIB = 1 << 30
# Llama 3 8B.
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32, "vocab_size": 128256,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False, "max_position_embeddings": 8192,
    "rope_theta": 500000.0, "torch_dtype": "bfloat16",
}  # fmt: skip


class Apart(Machine):
    """A device with memory of its own, as far as the estimate asks."""

    is_host = False  # type: ignore[assignment]

    def used_bytes(self) -> int:
        return 0

    def wait(self) -> None:
        pass


@pytest.fixture(scope="module")
def eight_billion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of its headers, and a file with holes instead of its weights."""
    folder = tmp_path_factory.mktemp("llama") / "model"
    folder.mkdir()
    hidden, size, kv, vocab = 4096, 14336, 1024, 128256
    shapes = {"model.embed_tokens": [vocab, hidden], "lm_head": [vocab, hidden], "model.norm": [hidden]}
    for block in range(32):
        prefix = f"model.layers.{block}."
        shapes |= {f"{prefix}{norm}": [hidden] for norm in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{prefix}self_attn.{name}_proj": [hidden, hidden] for name in "qo"}
        shapes |= {f"{prefix}self_attn.{name}_proj": [kv, hidden] for name in "kv"}
        shapes |= {f"{prefix}mlp.{name}_proj": [size, hidden] for name in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj"] = [hidden, size]
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[f"{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny.LLAMA / name, folder / name)
    return folder


@pytest.mark.parametrize("method", ["gptq", "awq", "rtn"])
def test_eight_billion_parameters_need_less_than_12_gib_of_a_device_and_24_gib_of_the_host(
    method: str, eight_billion: Path
) -> None:
    plan = plan_model(eight_billion, world_size=1)
    options = Options(
        eight_billion, eight_billion / "out", "8B", Scheme(method, 4, 128, True), Solver(), Sampling(), Resources()
    )
    for kind in (Apart, Machine):
        model = open_model(plan, kind(torch.device("cpu"), torch.bfloat16), 2048)
        need = preflight.estimate(model, options, 128, 16, 2048, 6 * GIB)
        model.close()
        assert need.host < 24 * GIB and need.device < 12 * GIB
        # At least the activations and a block in the type that is computed in.
        assert need.host > 128 * 2048 * 4096 * 2
        assert max(need.host, need.device) > 2 * (2 * 4096**2 + 2 * 1024 * 4096 + 3 * 4096 * 14336)


def test_the_time_that_is_told_is_measured_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice as slow a machine is told twice the time, besides what is done once."""
    model = tiny.make(tmp_path / "model", "llama")
    told = []
    for slowness in (1, 2):
        monkeypatch.setattr(preflight, "_time", lambda work, slowness=slowness: 1.0 * slowness)
        opened = open_model(plan_model(model, world_size=1), Machine(torch.device("cpu"), torch.float32), 48)
        windows = torch.zeros(6, 48, dtype=torch.int64)
        told.append(preflight.seconds(opened, tiny.options(model, tmp_path / "out"), windows, 1, 1))
        opened.close()
    assert told[1] - preflight.ONCE_S == pytest.approx(2 * (told[0] - preflight.ONCE_S))


def test_all_that_a_block_does_is_in_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention too, which is most of it where texts are long and a model is small."""
    model = tiny.make(tmp_path / "model", "llama")
    told = {}
    for forward in (0.0, 10.0):
        for method, resting in (("gptq", 6), ("gptq", 0), ("awq", 0)):
            monkeypatch.setattr(preflight, "_forward_s", lambda model, windows, forward=forward: forward)
            monkeypatch.setattr(preflight, "STEP_TOKENS", 48)
            opened = open_model(plan_model(model, world_size=1), Machine(torch.device("cpu"), torch.float32), 48)
            windows, options = torch.zeros(6, 48, dtype=torch.int64), tiny.options(model, tmp_path / "out", method)
            told[method, resting, forward] = preflight.seconds(opened, options, windows, 1, resting)
            opened.close()
    # Two blocks of six steps, and one step of both models to judge the result.
    for (method, resting), passes in {("gptq", 6): 1.0, ("gptq", 0): 1.6, ("awq", 0): 2.0}.items():
        more = told[method, resting, 10.0] - told[method, resting, 0.0]
        assert more == pytest.approx(2 * (passes * 6 + 2) * 10, rel=0.1)


@pytest.mark.parametrize(
    ("serves", "before", "after"),
    [
        (True, {}, {"OMP_WAIT_POLICY": "PASSIVE"}),
        (False, {}, {"GOMP_SPINCOUNT": "1000"}),
        (False, {"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        (False, {"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
    ],
)
def test_who_computes_alone_does_not_sleep_at_every_barrier(
    serves: bool, before: dict[str, str], after: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(before))
    prepare_environment(serves)
    assert os.environ == after
