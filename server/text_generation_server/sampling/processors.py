"""What changes logits before an id is drawn, over all rows that ask for it at once.

The order is that of TGI: watermark, repetition penalty, frequency penalty, (presence and count penalties, bias, least
length,) constraint, temperature.
top_k, top_p and typical_p follow in `sampler.py`, since they need the most probable ids and not all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.interface import DrawsIds, Penalties
from .params import SamplingParams

WATERMARK_KEY = 15485863


@dataclass(frozen=True)
class Watermark:
    """How a text is marked: `gamma`, the share of ids that are raised, and `delta`, by how much. Defaults are TGI's."""

    gamma: float = 0.5
    delta: float = 2.0


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
    count = column([p.count_penalty for p in params])
    if bool((count != 0).any()):
        logits.sub_(count * generated)


def change(
    logits: Tensor,
    rows: Sequence[int],
    params: Sequence[SamplingParams],
    counts: Sequence[Tensor | None],
    lengths: Sequence[int],
    kernels: DrawsIds | None = None,
) -> None:
    """Applies penalties, then biases, to `rows` of `logits` [.., vocab] in place.

    params, counts, lengths: of each of these rows; counts: [2, vocab] where params count ids, as `penalize` takes them.
    kernels: who does it, if they can; torch does otherwise.
    """
    asked = [
        Penalties(
            c if p.counts_ids else None, length, p.repetition_penalty, p.frequency_penalty, p.presence_penalty,
            p.count_penalty, p.logit_bias,
        )
        for p, c, length in zip(params, counts, lengths, strict=True)
    ]  # fmt: skip
    if kernels is not None and kernels.penalize(logits, rows, asked):
        return
    counting = [i for i, how in enumerate(asked) if how.counts is not None]
    if counting:
        stacked = torch.stack([c for i in counting if (c := asked[i].counts) is not None])  # [rows, 2, vocab]
        where = [rows[i] for i in counting]
        part = logits[where]
        of_rows = torch.tensor([float(lengths[i]) for i in counting])
        penalize(part, stacked[:, 0], stacked[:, 1], of_rows, [params[i] for i in counting])
        logits[where] = part
    for row, how in zip(rows, asked, strict=True):
        if how.bias:
            bias(logits[row], how.bias)


def bias(logits: Tensor, biases: Sequence[tuple[int, float]]) -> None:
    """Adds to some of one row's `logits` [vocab], in place."""
    ids = torch.tensor([token_id for token_id, _ in biases], dtype=torch.int64)
    logits.index_add_(0, ids, torch.tensor([value for _, value in biases], dtype=logits.dtype))


def forbid(logits: Tensor, token_ids: Sequence[int]) -> None:
    """Makes some ids of one row's `logits` [vocab] impossible, in place."""
    logits[torch.tensor(list(token_ids), dtype=torch.int64)] = float("-inf")


def watermark(logits: Tensor, previous_id: int, mark: Watermark) -> None:
    """Raises the logits of the green share of one row's `logits` [vocab], in place; the id before chooses which.

    Kirchenbauer et al. 2023, arXiv:2301.10226, with the seed of TGI.
    """
    generator = torch.Generator().manual_seed(WATERMARK_KEY * previous_id)
    green = torch.randperm(len(logits), generator=generator)[: int(mark.gamma * len(logits))]
    logits[green] += mark.delta
