"""A block of a decoder as one operation, or several of them, where the kernels offer that."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..batch import StepBatch
from ..kernels.interface import BlockParts, FusedBlock, FusesBlocks, Kernels, Norm
from .attention import Attention
from .mlp import GatedMLP
from .norm import HeadNorm, RMSNorm
from .rotary import Rotary

# Blocks that are computed before anybody is told of one, and tokens of a step up to which that does not take long.
BLOCKS_AT_ONCE, TOKENS_AT_ONCE = 8, 16


@dataclass(frozen=True)
class Fused:
    """A block as the kernels compute it at once. A call that gives None has done nothing: single operations must do."""

    block: FusedBlock
    rotary: Rotary

    def __call__(self, x: Tensor, batch: StepBatch) -> Tensor | None:
        return self.block(x, *self.rotary.factors(batch), batch)


class Block(Protocol):
    """What a decoder is made of; `fused`: the same at once, where the kernels offer that."""

    @property
    def fused(self) -> Fused | None: ...

    def __call__(self, x: Tensor, batch: StepBatch) -> Tensor: ...


class Run:
    """Blocks that follow each other; of a short step one operation, since what lies between them costs as much."""

    def __init__(self, blocks: Sequence[Block], kernels: Kernels):
        self.blocks = blocks
        fused = [block.fused for block in blocks if block.fused is not None]
        alike = len(fused) == len(blocks) > 1 and all(each.rotary is fused[0].rotary for each in fused)
        joined = (
            kernels.join_blocks([each.block for each in fused]) if alike and isinstance(kernels, FusesBlocks) else None
        )
        self.joined = None if joined is None else Fused(joined, fused[0].rotary)

    def __call__(self, x: Tensor, batch: StepBatch, on_layer: Callable[[], None]) -> Tensor:
        """x: [tokens, hidden]. `on_layer` is called once for each block."""
        if self.joined is not None and len(batch.positions) <= TOKENS_AT_ONCE:
            y = self.joined(x, batch)
            if y is not None:
                for _ in self.blocks:
                    on_layer()
                return y
        for block in self.blocks:
            x = block(x, batch)
            on_layer()
        return x


def runs_of(blocks: Sequence[Block], kernels: Kernels) -> list[Run]:
    """All blocks, in runs that are short enough for a watchdog."""
    return [Run(blocks[at : at + BLOCKS_AT_ONCE], kernels) for at in range(0, len(blocks), BLOCKS_AT_ONCE)]


def fused_block(attention_norm: RMSNorm, attention: Attention, mlp_norm: RMSNorm, mlp: GatedMLP) -> Fused | None:
    """x + attention(norm(x)), then x + mlp(norm(x)), with the bits of the single operations."""
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
        collectives=tp.collectives if tp.size > 1 else None,
    ))  # fmt: skip
    return None if block is None else Fused(block, attention.positions.rotary)
