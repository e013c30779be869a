"""The skeleton every decoder-only model shares: embed, run the blocks, normalize, project."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..batch import StepBatch
from ..kernels.interface import CacheSpec, Kernels
from ..layers.block import Block, runs_of
from ..layers.embedding import Head, VocabEmbedding
from ..layers.norm import RMSNorm

# Rows of logits that exist at once where they are only looked at: a chunk of a prompt has hundreds.
SCORED_AT_ONCE = 64


class Decoder:
    """One rank's share of a model."""

    def __init__(
        self,
        embed: VocabEmbedding,
        blocks: Sequence[Block],
        norm: RMSNorm,
        head: Head,
        cache_spec: CacheSpec,
        kernels: Kernels,
    ):
        self.embed, self.blocks, self.norm, self.head = embed, blocks, norm, head
        self.runs = runs_of(blocks, kernels)
        self.cache_spec, self.kernels = cache_spec, kernels
        kernels.prepare(embed.weight.shape[1], cache_spec.head_dim)

    @torch.no_grad()
    def forward(self, batch: StepBatch, on_layer: Callable[[], None] = lambda: None) -> Tensor | None:
        """Writes the step's keys and values; the logits of `batch.sample_rows`, [sampled, vocab] float32, on rank 0.

        Other ranks get None. All ranks must be given the same step. `on_layer` is called after each layer. The logits
        lie where the batch does, wherever the model computes.
        """
        host = batch.token_ids.device
        batch = batch.on(self.kernels.device)
        x = self.embed(batch.token_ids)
        for run in self.runs:
            x = run(x, batch, on_layer)
        if batch.scored_rows is not None:
            for start in range(0, len(batch.scored_rows), SCORED_AT_ONCE):
                rows = batch.scored_rows[start : start + SCORED_AT_ONCE]
                logits = self.head(self.norm(x.index_select(0, rows)))
                if logits is not None and batch.score is not None:
                    batch.score(logits.to(host))
        if not len(batch.sample_rows):
            return torch.empty((0, self.head.vocab_size), dtype=torch.float32) if self.head.tp.rank == 0 else None
        logits = self.head(self.norm(x.index_select(0, batch.sample_rows)))
        return None if logits is None else logits.to(host)
