"""What changes logits before an id is drawn, over all rows that ask for it at once.

The order is that of TGI: repetition penalty, frequency penalty, (presence penalty, bias,) constraint, temperature.
top_k, top_p and typical_p follow in `sampler.py`, since they need the most probable ids and not all of them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .constraint import Constraint
from .params import SamplingParams


def penalize(
    logits: Tensor, counts: Tensor, generated: Tensor, lengths: Tensor, params: Sequence[SamplingParams]
) -> None:
    """Applies the penalties to `logits` [rows, vocab] in place.

    counts, generated: [rows, vocab] float32, occurrences in prompt and generated ids, and in generated ids alone.
    lengths: [rows] float32, prompt and generated ids. Frequencies are relative to the length, as in TGI.
    """

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32)[:, None]

    repetition = column([p.repetition_penalty for p in params])
    if bool((repetition != 1).any()):
        penalized = torch.where(logits < 0, logits * repetition, logits / repetition)
        logits.copy_(torch.where(counts > 0, penalized, logits))
    frequency = column([p.frequency_penalty for p in params])
    if bool((frequency != 0).any()):
        logits.sub_(frequency * (counts / lengths[:, None]))
    presence = column([p.presence_penalty for p in params])
    if bool((presence != 0).any()):
        logits.sub_(presence * (generated > 0))


def bias(logits: Tensor, biases: Sequence[tuple[int, float]]) -> None:
    """Adds to some of one row's `logits` [vocab], in place."""
    ids = torch.tensor([token_id for token_id, _ in biases], dtype=torch.int64)
    logits.index_add_(0, ids, torch.tensor([value for _, value in biases], dtype=logits.dtype))


def constrain(logits: Tensor, constraint: Constraint) -> None:
    """Leaves one row's `logits` [vocab] of the allowed ids as they are and makes all others impossible, in place."""
    ids = torch.tensor(list(constraint.allowed()), dtype=torch.int64)
    kept = logits[ids]
    logits.fill_(float("-inf"))
    logits[ids] = kept
