"""Reads a result back as a server would, and compares it with the model that it was made from, block by block."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .output import Proof
from .recording import Model, Recorded
from .walk import Activations, Pass, drop_block, embed, load_block

# Rows of logits that exist at once.
ROWS = 128


def prove(original: Model, result: Model, windows: Tensor, on_block: Callable[[], None]) -> Proof:
    """Perplexity of both, and the divergence of the second from the first, on windows [sequences, length] int64."""
    models = (original, result)
    activations = [embed(model, windows) for model in models]
    for blocks in zip(*(model.decoder.blocks for model in models), strict=True):
        for model, block, x in zip(models, blocks, activations, strict=True):
            load_block(model, block)
            Pass(model, block, x).forward()
            drop_block(model, block)
        on_block()
    heads = [head for model in models if isinstance(head := _head(model), Recorded)]
    for model, head in zip(models, heads, strict=False):
        head.read(model.checkpoint, model.machine)
    try:
        return _compare(models, activations, windows)
    finally:
        for head in heads:
            head.drop()


def _head(model: Model) -> object:
    head = model.decoder.head.matmul
    return getattr(head, "matmul", head)


@torch.no_grad()
def _compare(models: tuple[Model, Model], activations: list[Activations], windows: Tensor) -> Proof:
    losses = [0.0, 0.0]
    divergence, largest, count = 0.0, 0.0, 0
    for i in range(len(windows)):
        targets = windows[i, 1:]
        for first in range(0, len(targets), ROWS):
            rows = slice(first, min(first + ROWS, len(targets)))
            logs = [_log_probabilities(m, x.values[i, rows]) for m, x in zip(models, activations, strict=True)]
            wanted = targets[rows].to(logs[0].device)[:, None]
            for k, log in enumerate(logs):
                losses[k] -= float(log.gather(1, wanted).sum(dtype=torch.float64))
            kl = F.kl_div(logs[1], logs[0], reduction="none", log_target=True).sum(-1, dtype=torch.float64)
            divergence += float(kl.sum())
            largest = max(largest, float(kl.max()))
            count += len(wanted)
    before, after = (math.exp(min(loss / count, 700.0)) for loss in losses)
    return Proof(count, before, after, max(0.0, divergence / count), largest)


def _log_probabilities(model: Model, hidden: Tensor) -> Tensor:
    """hidden: [rows, hidden], of the last block, on the host. Returns [rows, vocabulary] float32."""
    x = model.decoder.norm(hidden.to(model.machine.device))
    logits = model.decoder.head(x)
    assert logits is not None
    return logits.float().log_softmax(-1)
