"""What can be known of a model from config.json and the headers, without torch."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import LLAMA, QWEN2
from safetensors.torch import load_file, save_file
from text_generation_server.checkpoint.model_config import read_settings
from text_generation_server.checkpoint.tensors import Checkpoint
from text_generation_server.errors import CheckpointError, ConfigError
from text_generation_server.planning import plan_model


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(LLAMA / name, tmp_path / name)
    return tmp_path


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_the_plan_of_a_model_states_what_its_files_hold() -> None:
    plan = plan_model(LLAMA, world_size=2, dtype="float32")
    stored = load_file(LLAMA / "model.safetensors")
    assert plan.num_parameters == sum(t.numel() for t in stored.values())
    assert plan.weight_bytes == sum(t.numel() * t.element_size() for t in stored.values())
    assert plan.kv_bytes_per_token_per_rank == 2 * 6 * 1 * 64 * 4  # keys and values, layers, heads, dim, bytes
    assert plan.eos_token_ids == (2, 6)
    assert json.loads(json.dumps(plan.summary()))["architecture"] == "LlamaForCausalLM"


def test_planning_does_not_import_torch() -> None:
    code = (
        "import sys; from pathlib import Path; from text_generation_server.planning import plan_model\n"
        f"plan_model(Path({str(QWEN2)!r}), world_size=2); sys.exit('torch' in sys.modules)"
    )
    environment = {"PYTHONPATH": ":".join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"world_size": 3}, "4 attention heads do not divide over 3 shards; expected one of 1, 2, 4"),
        ({"world_size": 0}, "do not divide over 0 shards"),
        ({"quantize": "gptq"}, "--quantize gptq: the weights in .* are not quantized .*leave the flag out"),
        ({"dtype": "float16"}, "--dtype float16 is not served on cpu"),
        ({"dtype": "int7"}, "--dtype int7 is unknown"),
        ({"device": "cuda", "dtype": "float32"}, "--dtype float32 is not served on cuda"),
        ({"device": "tpu"}, "--device tpu is unknown"),
    ],
)
def test_a_setting_that_cannot_be_served_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_model(LLAMA, **({"world_size": 1} | arguments))


@pytest.mark.parametrize(
    ("num_heads", "kv_heads", "world_size", "held"),
    [(12, 2, 4, 1), (12, 4, 2, 2), (12, 3, 2, 3), (12, 3, 6, 1), (12, 2, 3, 2), (12, 4, 3, 4)],
)
def test_a_rank_keeps_the_key_heads_that_its_query_heads_need(
    num_heads: int, kv_heads: int, world_size: int, held: int, copy: Path
) -> None:
    change_config(copy, num_attention_heads=num_heads, num_key_value_heads=kv_heads)
    assert read_settings(copy).kv_heads_per_rank(world_size) == held
    needed = {
        rank: {head * kv_heads // num_heads for head in range(num_heads) if head * world_size // num_heads == rank}
        for rank in range(world_size)
    }
    assert max(map(len, needed.values())) <= held


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        plan_model(tmp_path / "nowhere", world_size=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": 512}, r"gate_proj\.weight has shape \[768, 256\]; expected \[512, 256\]"),
        ({"vocab_size": 5000}, r"embed_tokens\.weight has shape \[4096, 256\]; expected \[5000, 256\]"),
        ({"num_hidden_layers": 7}, r"tensor model\.layers\.6\.input_layernorm\.weight is missing"),
        ({"num_hidden_layers": 5}, r"tensor model\.layers\.5\..* are not part of a LlamaForCausalLM"),
        ({"attention_bias": True}, r"q_proj\.bias is missing"),
        ({"architectures": ["Qwen2ForCausalLM"]}, r"q_proj\.bias is missing"),
    ],
)
def test_a_config_that_does_not_fit_the_tensors_is_refused(changes: dict[str, Any], message: str, copy: Path) -> None:
    change_config(copy, **changes)
    with pytest.raises(CheckpointError, match=message):
        plan_model(copy, world_size=1)


def test_a_tensor_of_integers_is_refused(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].char()
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has dtype I8; expected F32 or F16 or BF16"):
        plan_model(copy, world_size=1)


def test_a_plan_names_every_tensor_of_the_shipped_models() -> None:
    for path in (LLAMA, QWEN2):
        plan = plan_model(path, world_size=1)
        assert sum(i.num_bytes for i in plan.index.values()) == plan.weight_bytes
        assert all(name in Checkpoint(plan.index) for name in plan.index)
