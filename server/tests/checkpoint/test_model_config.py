"""config.json in both spellings, its defaults as in transformers, and the values that are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from text_generation_server.checkpoint.model_config import FAMILIES, Rope, read_eos_token_ids, read_settings
from text_generation_server.errors import CheckpointError, ConfigError

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 100, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "hidden_act": "silu",
}  # fmt: skip
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
REMOVED = object()


def write(folder: Path, changes: dict[str, Any], base: dict[str, Any] = LLAMA) -> Path:
    values = {k: v for k, v in (base | changes).items() if v is not REMOVED}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def of(architecture: str) -> dict[str, Any]:
    return {"architectures": [architecture], "model_type": architecture.removesuffix("ForCausalLM").lower()}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}),
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_parameters": {"rope_theta": 5e5}}),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}},
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}},
        ),
        ({"torch_dtype": "float16"}, {"dtype": "float16"}),
    ],
)
def test_both_spellings_give_the_same_settings(old: dict[str, Any], new: dict[str, Any], tmp_path: Path) -> None:
    assert read_settings(write(tmp_path, old)) == read_settings(write(tmp_path, new))


@pytest.mark.parametrize("architecture", FAMILIES)
def test_absent_keys_have_the_defaults_of_transformers(architecture: str, tmp_path: Path) -> None:
    heads = {"num_attention_heads": 32, "hidden_size": 512}
    settings = read_settings(write(tmp_path, of(architecture) | heads))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert settings.num_kv_heads == config.num_key_value_heads
    assert settings.head_dim == (getattr(config, "head_dim", None) or 512 // 32)
    assert settings.max_positions == config.max_position_embeddings
    assert settings.rms_norm_eps == config.rms_norm_eps
    assert settings.rope == Rope(config.rope_parameters["rope_theta"])
    assert settings.tie_word_embeddings == config.tie_word_embeddings
    assert settings.windows == ((config.sliding_window if architecture == "MistralForCausalLM" else None),) * 4


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        (of("MistralForCausalLM") | {"sliding_window": None}, [None] * 4),
        (of("MistralForCausalLM") | {"sliding_window": 7}, [7] * 4),
        (of("Qwen2ForCausalLM") | {"sliding_window": 7, "max_window_layers": 2}, [None] * 4),
        (
            of("Qwen2ForCausalLM") | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 3},
            [None, None, None, 7],
        ),
        (
            of("Qwen3ForCausalLM")
            | {
                "use_sliding_window": True,
                "sliding_window": 9,
                "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
            },
            [9, None, None, 9],
        ),
    ],
)
def test_windows_are_those_of_transformers(changes: dict[str, Any], windows: list[int | None], tmp_path: Path) -> None:
    changes = changes | {"num_key_value_heads": 2}
    assert list(read_settings(write(tmp_path, changes)).windows) == windows


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": REMOVED}, "hidden_size is missing; expected an integer from 1 to 2147483648"),
    ({"hidden_size": 0}, "hidden_size is 0"),
    ({"hidden_size": "64"}, "hidden_size is '64'"),
    ({"hidden_size": True}, "hidden_size is True"),
    ({"hidden_size": 62}, "hidden_size is 62; expected a multiple of num_attention_heads"),
    ({"vocab_size": REMOVED}, "vocab_size is missing"),
    ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
    ({"num_key_value_heads": 3}, "num_key_value_heads is 3; expected a divisor"),
    ({"head_dim": 15}, "head_dim is 15; expected an even"),
    ({"model_type": REMOVED}, "model_type is missing"),
    ({"architectures": REMOVED}, "architectures is missing"),
    ({"architectures": []}, "architectures is []"),
    ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not served; expected one of LlamaForCausalLM"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; expected 'silu'"),
    ({"pretraining_tp": 2}, "pretraining_tp is 2"),
    ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    ({"attention_bias": "yes"}, "attention_bias is 'yes'"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor is 0.5"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.type is 'dynamic'; expected default, linear"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling.rope_type is 'yarn'"),
    ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type is 'longrope'"),
    ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor is missing"),
    ({"rope_parameters": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor is 4.0"),
    ({"rope_parameters": {"full_attention": {}}}, "rope_parameters.full_attention"),
    ({"rope_parameters": 3}, "rope_parameters is 3; expected an object"),
    ({"rope_theta": -1}, "rope_theta is -1"),
    ({"num_hidden_layers": 1_000_000_000}, "num_hidden_layers is 1000000000; expected an integer from 1 to 4096"),
    ({"num_attention_heads": 1 << 40}, "num_attention_heads is 1099511627776; expected an integer from 1 to 65536"),
    ({"max_position_embeddings": 1}, "max_position_embeddings is 1; expected an integer from 2 to"),
    ({"rope_theta": 2e4, "rope_parameters": {"rope_theta": 1e4}}, "rope_theta is 20000.0; expected 10000.0"),
    ({"rope_scaling": {"type": "linear"}, "rope_parameters": {"rope_type": "default"}}, "rope_scaling is"),
    ({"sliding_window": 5}, "sliding_window is 5; expected null"),
    (of("Qwen2ForCausalLM") | {"num_key_value_heads": 2, "layer_types": ["full_attention"]}, "layer_types is"),
    (of("Qwen2ForCausalLM") | {"num_key_value_heads": 2, "layer_types": ["sliding_attention"] * 4}, "layer_types is"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_a_value_that_no_code_implements_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        read_settings(write(tmp_path, changes))
    assert message in str(error.value)
    assert "config.json" in str(error.value)


@pytest.mark.parametrize("content", ["", "[]", "{", "nul"])
def test_a_config_that_is_not_an_object_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_settings(tmp_path)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        read_settings(tmp_path)


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer", "ids"),
    [
        ([2, 6, 2], 3, "<end>", (2, 6)),
        (7, 3, "<end>", (7,)),
        (None, 3, "<end>", (3,)),
        (None, [3, 4], None, (3, 4)),
        ([], None, {"content": "<end>"}, (9,)),
        (None, None, "<end>", (9,)),
        (None, None, "b", (1,)),
        (None, None, None, ()),
    ],
)
def test_end_ids_come_from_the_first_file_that_names_any(
    generation: Any, config: Any, tokenizer: Any, ids: tuple[int, ...], tmp_path: Path
) -> None:
    write(tmp_path, {"eos_token_id": config})
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": tokenizer}))
    vocabulary = {"added_tokens": [{"content": "<end>", "id": 9}], "model": {"vocab": {"a": 0, "b": 1}}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(vocabulary))
    assert read_eos_token_ids(tmp_path, 100) == ids


@pytest.mark.parametrize("ids", [100, -1, "2", [1, None], True])
def test_an_end_id_outside_the_vocabulary_is_refused(ids: Any, tmp_path: Path) -> None:
    write(tmp_path, {"eos_token_id": ids})
    with pytest.raises(ConfigError, match="eos_token_id"):
        read_eos_token_ids(tmp_path, 100)
