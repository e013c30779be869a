"""Draws the next id of every row. A row's result depends on its own logits, parameters and position alone.

A draw is the inverse of the cumulative distribution at one uniform number, ids in ascending order. Reductions over the
vocabulary run row by row in an order that does not depend on how many rows there are. Nothing sorts the vocabulary.
Kernels that draw ids are preferred; torch's operators serve where there are none.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..kernels.interface import Allowed, Drawn, DrawRequest, DrawsIds, GuidedRows
from .constraint import biases
from .guidance import allowed_by, go_on, guide_rows
from .params import SamplingParams
from .philox import Purpose, uniform

# How many of the most probable ids are looked at first; more only where these are not enough.
FIRST_LOOK = 128


@dataclass(frozen=True)
class Draw:
    """The result for some rows. `top` has an entry for each row: most probable ids and their log-probabilities."""

    ids: NDArray[np.int64]  # [rows]
    logprobs: NDArray[np.float32]  # [rows], under the raw distribution
    top: list[tuple[list[int], list[float]]]
    is_finite: NDArray[np.bool_]  # [rows]; else there is no id to draw, and nothing else of the row means anything


def log_normalizer(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum and log of the sum of exponentials of each row of `logits` [rows, vocab] float32: two of [rows]."""
    # A sum with a single result is split over threads, with other rounding than one of several.
    rows = logits if len(logits) > 1 else torch.cat([logits, logits])
    most = rows.amax(-1)
    total = (rows - most[:, None]).exp_().sum(-1)
    return most[: len(logits)], (most + total.log())[: len(logits)]


def raw_logprobs(logits: Tensor) -> tuple[Tensor, NDArray[np.bool_]]:
    """Log-normalizer of each row, and whether all of its logits are finite. logits: [rows, vocab] float32."""
    most, normalizer = log_normalizer(logits)
    # A NaN or +inf reaches the maximum, -inf the minimum.
    is_finite = torch.isfinite(most) & torch.isfinite(logits.amin(-1))
    return normalizer, is_finite.numpy()


def draw(
    raw: Tensor,
    processed: Tensor,
    params: Sequence[SamplingParams],
    positions: NDArray[np.int64],
    allowed: Allowed | None = None,
    guided: GuidedRows | None = None,
    kernels: DrawsIds | None = None,
) -> Draw:
    """One id for each row.

    raw, processed: [rows, vocab] float32, before and after the processors; they may be the same tensor.
    positions: [rows], the index that the new id will have in its sequence.
    allowed: which ids may be drawn; None: all.
    guided: rows that matchers limit, of which `allowed` says nothing.
    kernels: who draws, if they can; torch does otherwise.
    """
    requests = requests_of(params, positions)
    drawn = kernels.draw_ids(raw, processed, requests, allowed, guided) if kernels is not None else None
    if drawn is None:
        drawn = draw_ids(raw, processed, params, np.array([r.number for r in requests]), allowed, guided)
    wanted = [(i, p.top_n) for i, p in enumerate(params) if p.top_n]
    top: list[tuple[list[int], list[float]]] = [([], [])] * len(params)
    for i, count in wanted:
        top[i] = top_ids(raw[i], float(drawn.normalizers[i]), count)
    return Draw(drawn.ids, drawn.logprobs, top, drawn.is_finite)


def requests_of(params: Sequence[SamplingParams], positions: NDArray[np.int64]) -> list[DrawRequest]:
    """What is asked for each row, with its uniform number."""
    numbers = [0.0] * len(params)
    if any(p.do_sample for p in params):
        seeds, branches = np.array([p.seed for p in params], np.uint64), np.array([p.branch for p in params], np.uint32)
        numbers = uniform(seeds, branches, positions, Purpose.SAMPLE).tolist()
    return [
        DrawRequest(number, p.top_p, p.typical_p, p.top_k, p.temperature, p.do_sample)
        for number, p in zip(numbers, params, strict=True)
    ]


def leave_allowed(logits: Tensor, allowed: Allowed | None) -> Tensor:
    """The logits [rows, vocab], with what may not be drawn made impossible."""
    if allowed is None or not (bound := allowed.of >= 0).any():
        return logits
    left = logits.clone()
    left[torch.from_numpy(bound)] += torch.from_numpy(biases(allowed.words[allowed.of[bound]], logits.shape[1]))
    return left


def draw_ids(
    raw: Tensor,
    processed: Tensor,
    params: Sequence[SamplingParams],
    numbers: NDArray[np.float64],
    allowed: Allowed | None,
    guided: GuidedRows | None,
) -> Drawn:
    """By torch's operators. See `DrawsIds`."""
    normalizer, is_finite = raw_logprobs(raw)
    left = leave_allowed(processed, allowed)
    # Biases and a constraint may together forbid every id; a penalty may overflow.
    if left is not raw:
        is_finite &= torch.isfinite(left.amax(-1)).numpy()
    followed, masks = dict[int, int](), dict[int, NDArray[np.int32]]()
    if guided is not None:
        followed, masks = guide_rows(left, guided, [not p.do_sample for p in params], is_finite)
        left = leave_allowed(left, allowed_by(masks, len(left)))
        is_finite &= torch.isfinite(left.amax(-1)).numpy()
    ids = left.numpy().argmax(-1)
    sampling = [i for i, p in enumerate(params) if p.do_sample and is_finite[i]]
    if sampling:
        ids[sampling] = sample(left[sampling], [params[i] for i in sampling], numbers[sampling])
    ids[list(followed)] = list(followed.values())
    if guided is not None:
        go_on(guided, masks, ids, is_finite)
    drawn = raw.gather(1, torch.from_numpy(ids)[:, None])[:, 0]
    return Drawn(ids, (drawn - normalizer).numpy(), normalizer.numpy(), is_finite)


def top_ids(logits: Tensor, normalizer: float, count: int) -> tuple[list[int], list[float]]:
    """The `count` most probable ids of one row, and those that tie with the last; most probable first, then by id."""
    least = logits.topk(min(count, len(logits))).values[-1]
    ids = (logits >= least).nonzero()[:, 0]
    values = logits[ids]
    order = sorted(range(len(ids)), key=lambda i: (-float(values[i]), int(ids[i])))
    return [int(ids[i]) for i in order], [float(values[i]) - normalizer for i in order]


def sample(logits: Tensor, params: Sequence[SamplingParams], numbers: NDArray[np.float64]) -> NDArray[np.int64]:
    """One id per row, from softmax(logits / temperature) after top_k, top_p and typical_p. logits: [rows, vocab]."""
    temperatures = torch.tensor([p.temperature for p in params], dtype=torch.float32)
    # Weights in float64, relative to the most probable id: a tiny temperature leaves that one.
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperatures[:, None]
    ids = np.empty(len(params), np.int64)
    plain = [i for i, p in enumerate(params) if not p.is_filtered]
    if plain:
        cumulative = scaled[plain].double().exp_().cumsum(-1).numpy()
        for row, i in zip(cumulative, plain, strict=True):
            ids[i] = pick(row, numbers[i])
    filtered = [i for i, p in enumerate(params) if p.is_filtered]
    first_looks = scaled[filtered].topk(min(FIRST_LOOK, scaled.shape[1]), -1) if filtered else None
    for at, i in enumerate(filtered):
        assert first_looks is not None
        look = (first_looks.values[at].numpy(), first_looks.indices[at].numpy())
        candidates, weights = candidates_of(scaled[i], params[i], look)
        ids[i] = candidates[pick(np.cumsum(weights), numbers[i])]
    return ids


def pick(cumulative: NDArray[np.float64], number: float) -> int:
    """The first index whose cumulative weight exceeds `number` in [0, 1) of the total."""
    at = int(np.searchsorted(cumulative, number * cumulative[-1], side="right"))
    # Rounding may reach the total; the last id with any weight is meant.
    return min(at, int(np.searchsorted(cumulative, cumulative[-1], side="left")))


Look = tuple[NDArray[np.float32], NDArray[np.int64]]


def candidates_of(scaled: Tensor, params: SamplingParams, look: Look) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Ids that may be drawn, ascending, and their weights.

    scaled: [vocab], the highest is 0; `look`: its highest ones.
    """
    if params.top_k == 0 and params.top_p >= 1.0:
        values, ids = scaled.numpy(), np.arange(len(scaled))
    else:
        total = float(scaled.double().exp_().cumsum(0)[-1]) if params.top_p < 1.0 and params.top_k == 0 else None
        values, ids = most_probable(scaled, params, look, total)
    weights = np.exp(values.astype(np.float64))
    if params.typical_p < 1.0:
        values, ids, weights = typical(values, ids, weights, params.typical_p)
    order = np.argsort(ids)
    return ids[order], weights[order]


def most_probable(scaled: Tensor, params: SamplingParams, look: Look, total: float | None) -> Look:
    """What top_k and then top_p leave, most probable first, then by id; what ties with the last of top_k stays."""
    values, ids = look
    while True:
        is_all = len(values) == len(scaled)
        order = np.lexsort((ids, -values))
        values, ids = values[order], ids[order]
        kept = int((values > -np.inf).sum())
        if 0 < params.top_k < len(values):
            kept = min(kept, int((values >= values[params.top_k - 1]).sum()))
        # The distribution that top_p sees is what top_k has left, all of it.
        if params.top_p < 1.0 and (total is not None or is_all or kept < len(values)):
            weights = np.cumsum(np.exp(values[:kept].astype(np.float64)))
            mass = weights[-1] if total is None else total
            kept = min(kept, int(np.searchsorted(weights, params.top_p * mass, side="left")) + 1)
        # Enough was seen once something less probable than the last kept one has been.
        if is_all or (kept < len(values) and values[kept - 1] > values[-1]):
            return values[:kept], ids[:kept]
        more = scaled.topk(min(len(values) * 8, len(scaled)))
        values, ids = more.values.numpy(), more.indices.numpy()


def typical(
    values: NDArray[np.float32], ids: NDArray[np.int64], weights: NDArray[np.float64], share: float
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float64]]:
    """The ids whose surprise is closest to the expected one, until they have `share` of the weight; ties stay.

    Locally typical sampling (Meister et al. 2022, arXiv:2202.00666).
    """
    possible = weights > 0
    values, ids, weights = values[possible], ids[possible], weights[possible]
    total = np.cumsum(weights)[-1]
    surprise = np.log(total) - values.astype(np.float64)
    entropy = np.cumsum(weights / total * surprise)[-1]
    distance = np.abs(surprise - entropy)
    count = min(FIRST_LOOK, len(ids))
    while True:
        nearest = np.argpartition(distance, count - 1)[:count] if count < len(ids) else np.arange(len(ids))
        order = nearest[np.lexsort((ids[nearest], distance[nearest]))]
        mass = np.cumsum(weights[order])
        last = distance[order[min(int(np.searchsorted(mass, share * total, side="left")), count - 1)]]
        # Enough was seen once something farther away than the last kept one has been.
        if count == len(ids) or last < distance[order[-1]]:
            chosen = order[distance[order] <= last]
            return values[chosen], ids[chosen], weights[chosen]
        count = min(count * 8, len(ids))
