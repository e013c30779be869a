"""A block of a decoder as one operation, where the kernels offer that."""

from collections.abc import Callable

from torch import Tensor

from ..batch import StepBatch
from ..kernels.interface import BlockParts, FusesBlocks, Norm
from .attention import Attention
from .mlp import GatedMLP
from .norm import HeadNorm, RMSNorm


def fused_block(
    attention_norm: RMSNorm, attention: Attention, mlp_norm: RMSNorm, mlp: GatedMLP
) -> Callable[[Tensor, StepBatch], Tensor | None] | None:
    """x + attention(norm(x)), then x + mlp(norm(x)), with the bits of the single operations.

    None, here or from a call: the single operations must do.
    """
    kernels, qk_norm, tp = attention.kernels, attention.positions.qk_norm, attention.output.tp
    if not isinstance(kernels, FusesBlocks):
        return None
    if not (qk_norm is None or isinstance(qk_norm, HeadNorm)):
        return None
    if any(linear.bias is not None for linear in (attention.output, mlp.gate_up, mlp.down)):
        return None
    block = kernels.fuse_block(BlockParts(
        layer=attention.layer,
        attention_norm=Norm(attention_norm.weight, attention_norm.eps),
        qkv=attention.qkv.matmul,
        qkv_bias=attention.qkv.bias,
        head_norm=None if qk_norm is None else Norm(qk_norm.weight, qk_norm.eps),
        output=attention.output.matmul,
        mlp_norm=Norm(mlp_norm.weight, mlp_norm.eps),
        gate_up=mlp.gate_up.matmul,
        down=mlp.down.matmul,
        num_heads=attention.num_q,
        num_kv_heads=attention.num_kv,
        head_dim=attention.dim,
        options=attention.options,
        all_reduce=tp.collectives.all_reduce if tp.size > 1 else None,
    ))  # fmt: skip
    if block is None:
        return None
    rotary = attention.positions.rotary
    return lambda x, batch: block(x, *rotary.factors(batch), batch)
