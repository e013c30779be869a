"""Rotary frequencies equal those of transformers."""

from typing import Any

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from text_generation_server.checkpoint.model_config import Rope
from text_generation_server.layers.rotary import inverse_frequencies

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}


@pytest.mark.parametrize(
    ("rope", "parameters"),
    [
        (Rope(1e4), {"rope_type": "default", "rope_theta": 1e4}),
        (Rope(1e6), {"rope_type": "default", "rope_theta": 1e6}),
        (Rope(1e4, "linear", 2.5), {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}),
        (Rope(5e5, "llama3", 8.0, 1.0, 4.0, 256), {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}),
    ],
    ids=str,
)
def test_frequencies_equal_transformers(rope: Rope, parameters: dict[str, Any]) -> None:
    config = transformers.LlamaConfig(head_dim=64, rope_parameters=parameters, max_position_embeddings=2048)
    want = LlamaRotaryEmbedding(config).inv_freq
    torch.testing.assert_close(inverse_frequencies(rope, 64), want, rtol=1e-6, atol=0)
