"""Token embedding and output head, both split over the vocabulary. Any vocabulary splits over any number of ranks."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.interface import EmbedsShares, Matmul
from ..loading import Loader
from ..quantization.format import Part
from .linear import load_columns


class VocabEmbedding:
    """Rows of the embedding; a rank contributes zeros for ids that it does not own."""

    def __init__(self, load: Loader, vocab_size: int):
        self.kernels, self.tp = load.kernels, load.tp
        self.sums_at_once = load.kernels if isinstance(load.kernels, EmbedsShares) else None
        self.owned = load.tp.share_unevenly(vocab_size)
        # A rank that owns nothing keeps one row, so that there is something to look up and mask.
        self.weight = load.tensor("weight", self.owned if self.owned else range(1))

    def __call__(self, token_ids: Tensor) -> Tensor:
        """token_ids: [tokens] int64. Returns [tokens, hidden]."""
        if self.tp.size == 1:
            return self.kernels.embedding(self.weight, token_ids)
        if self.sums_at_once is not None:
            summed = self.sums_at_once.embed_share(self.weight, self.owned, token_ids, self.tp.collectives)
            if summed is not None:
                return summed
        local = token_ids - self.owned.start
        mine = (local >= 0) & (local < len(self.owned))
        y = self.kernels.embedding(self.weight, local * mine)
        return self.tp.collectives.all_reduce(y.masked_fill_(~mine[:, None], 0))


class Head:
    """Logits of the rows that are sampled."""

    def __init__(self, load: Loader, vocab_size: int, matmul: Matmul):
        self.tp, self.vocab_size, self.matmul = load.tp, vocab_size, matmul
        self.padding = -(-vocab_size // load.tp.size) - len(load.tp.share_unevenly(vocab_size))
        self.owns_none = not load.tp.share_unevenly(vocab_size)

    def __call__(self, x: Tensor) -> Tensor | None:
        """x: [sampled, hidden]. Returns [sampled, vocab] float32 on rank 0, None elsewhere."""
        if self.tp.size == 1:
            return self.matmul(x).float()
        # Ranks exchange tensors of one shape.
        local = x.new_zeros(len(x), 0) if self.owns_none else self.matmul(x)
        if self.padding:
            local = F.pad(local, (0, self.padding))
        logits = self.tp.collectives.gather_to_first(local)
        return None if logits is None else logits[:, : self.vocab_size].to(torch.float32, copy=False).contiguous()


def load_head(load: Loader, name: str, vocab_size: int) -> Head:
    """A head with a weight of its own."""
    owned = load.tp.share_unevenly(vocab_size)
    return Head(load, vocab_size, load_columns(load, [Part(name, (owned if owned else range(1),))]))


def tied_head(load: Loader, embedding: VocabEmbedding, vocab_size: int) -> Head:
    """A head that multiplies with the embedding. The weight is read once."""
    return Head(load, vocab_size, load.kernels.linear(embedding.weight))
