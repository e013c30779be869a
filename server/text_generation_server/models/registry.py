"""Which module builds which architecture (`architectures[0]` of config.json)."""

from collections.abc import Callable
from importlib import import_module

import torch

from ..checkpoint.model_config import ModelSettings
from ..checkpoint.tensors import Checkpoint
from ..errors import ConfigError
from ..kernels.interface import Kernels
from ..loading import Loader, TensorParallel
from ..planning import ModelPlan
from .decoder import Decoder

MODULES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "llama",
    "Qwen3ForCausalLM": "qwen3",
}


def build(load: Loader, settings: ModelSettings) -> Decoder:
    """Reads this rank's weights and puts the model together."""
    if settings.architecture not in MODULES:
        raise ConfigError(f"architecture {settings.architecture} is not served; expected one of {', '.join(MODULES)}")
    module = import_module(f"..{MODULES[settings.architecture]}", __name__)
    decoder: Decoder = module.build(load, settings)
    return decoder


def load_model(
    plan: ModelPlan, tp: TensorParallel, kernels: Kernels, on_read: Callable[[int], None] = lambda num_bytes: None
) -> Decoder:
    """This rank's share of the planned model. `on_read` is told the bytes of each slice that was read.

    `tp.collectives` is kept by the layers and first used by `Decoder.forward`.
    """
    assert tp.size == plan.world_size, "the plan was made for another number of shards"
    checkpoint = Checkpoint(plan.index, on_read)
    try:
        dtype: torch.dtype = getattr(torch, plan.dtype)
        loader = Loader(checkpoint, plan.linears.__getitem__, tp, kernels, dtype, plan.settings.hidden_size)
        return build(loader, plan.settings)
    finally:
        checkpoint.close()
