"""Llama, and the models that differ from it only in their settings (Mistral, Qwen2)."""

from collections.abc import Callable

from torch import Tensor

from ..batch import StepBatch
from ..checkpoint.model_config import ModelSettings
from ..kernels.interface import CacheSpec
from ..layers.attention import Attention, Heads, Positions, separate_qkv
from ..layers.block import fused_block
from ..layers.embedding import VocabEmbedding, load_head, tied_head
from ..layers.mlp import GatedMLP
from ..layers.norm import RMSNorm
from ..layers.rotary import Rotary
from ..loading import Loader
from .decoder import Decoder


class Block:
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, load: Loader, settings: ModelSettings, layer: int, heads: Heads, positions: Positions):
        attention = load / "self_attn"
        self.attention_norm = RMSNorm(load / "input_layernorm", settings.rms_norm_eps)
        self.attention = Attention(
            attention, layer, heads, separate_qkv(attention, heads), positions, settings.windows[layer]
        )
        self.mlp_norm = RMSNorm(load / "post_attention_layernorm", settings.rms_norm_eps)
        self.mlp = GatedMLP(load / "mlp", settings.intermediate_size)
        self.fused = fused_block(self.attention_norm, self.attention, self.mlp_norm, self.mlp)

    def __call__(self, x: Tensor, batch: StepBatch) -> Tensor:
        if self.fused is not None and (y := self.fused(x, batch)) is not None:
            return y
        x = x + self.attention(self.attention_norm(x), batch)
        return x + self.mlp(self.mlp_norm(x))


PositionsOf = Callable[[Loader, Rotary], Positions]


def rotated(load: Loader, rotary: Rotary) -> Positions:
    return Positions(rotary)


def build(load: Loader, settings: ModelSettings, positions: PositionsOf = rotated) -> Decoder:
    """`positions` makes what a layer does to its queries and keys, given the loader of its attention."""
    heads, model = Heads(settings.num_heads, settings.num_kv_heads, settings.head_dim), load / "model"
    rotary = Rotary(settings.rope, heads.dim, settings.max_positions, load.kernels)
    embedding = VocabEmbedding(model / "embed_tokens", settings.vocab_size)
    blocks = []
    for i in range(settings.num_layers):
        layer = model / "layers" / i
        blocks.append(Block(layer, settings, i, heads, positions(layer / "self_attn", rotary)))
    tied = settings.tie_word_embeddings
    return Decoder(
        embedding,
        blocks,
        RMSNorm(model / "norm", settings.rms_norm_eps),
        tied_head(load, embedding, settings.vocab_size) if tied else load_head(load, "lm_head", settings.vocab_size),
        CacheSpec(settings.num_layers, settings.kv_heads_per_rank(load.tp.size), heads.dim, load.dtype),
        load.kernels,
    )
