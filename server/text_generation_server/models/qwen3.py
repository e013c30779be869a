"""Qwen3: Llama with normalized queries and keys."""

from ..checkpoint.model_config import ModelSettings
from ..layers.attention import Positions
from ..layers.norm import HeadNorm
from ..layers.rotary import Rotary
from ..loading import Loader
from . import llama
from .decoder import Decoder


def build(load: Loader, settings: ModelSettings) -> Decoder:
    num_q = len(load.tp.share(settings.num_heads))
    num_kv = settings.kv_heads_per_rank(load.tp.size)

    def normalized(attention: Loader, rotary: Rotary) -> Positions:
        return Positions(rotary, HeadNorm(attention, num_q, num_kv, settings.rms_norm_eps))

    return llama.build(load, settings, normalized)
