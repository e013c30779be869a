"""The searches of AWQ against every choice tried out on the inputs themselves, in float64."""

import numpy as np
import paper
import pytest
import torch
from text_generation_server.quantize import awq
from text_generation_server.quantize.rounding import Grid

GRID, SIZE = Grid(4, False), 32


def inputs(num: int = 96, tokens: int = 300) -> tuple[paper.Matrix, paper.Matrix]:
    """Inputs with a few large channels, and a weight."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((tokens, num)) * np.exp(1.5 * rng.standard_normal(num))
    return x, rng.standard_normal((48, num)) * 0.05


def moments(x: paper.Matrix) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(x.T @ x / len(x)), torch.from_numpy(np.abs(x).mean(0))


def loss(x: paper.Matrix, weight: paper.Matrix, scale: paper.Matrix) -> float:
    """Equation 4: of the outputs, with inputs divided and weights multiplied by the scale."""
    made = paper.rounded(weight * scale, 4, SIZE, False)
    return float(np.square((x / scale) @ made.T - x @ weight.T).sum() / len(x))


def candidates(x: paper.Matrix, weight: paper.Matrix) -> list[paper.Matrix]:
    importance = np.abs(x).mean(0)
    groups = np.abs(weight).reshape(len(weight), -1, SIZE)
    spread = (groups / groups.max(-1, keepdims=True)).mean(0).reshape(-1)
    found = [np.ones(x.shape[1])]
    for ratio in np.arange(20) / 20:
        for scale in (importance**ratio / (spread ** (1 - ratio) + 1e-4), importance**ratio):
            found.append(scale / np.sqrt(scale.max() * scale.min()))
    return found


def test_the_scale_found_is_the_best_of_all_that_are_tried() -> None:
    x, weight = inputs()
    found = awq.search_scale(torch.from_numpy(weight), *moments(x), GRID, SIZE, None)
    best = min(loss(x, weight, scale) for scale in candidates(x, weight))
    assert found.error == pytest.approx(best, rel=1e-4)
    assert loss(x, weight, found.scale.numpy()) == pytest.approx(best, rel=1e-4)
    assert best < 0.8 * loss(x, weight, np.ones(x.shape[1]))


def test_features_that_one_output_makes_have_one_scale() -> None:
    x, weight = inputs()
    tie = torch.arange(96) // 32 * 16 + torch.arange(96) % 16
    scale = awq.search_scale(torch.from_numpy(weight), *moments(x), GRID, SIZE, tie).scale
    for value in tie.unique():
        assert len(scale[tie == value].unique()) == 1
    assert len(scale.unique()) > 10


def test_each_group_is_clipped_as_disturbs_its_outputs_least() -> None:
    x, weight = inputs()
    clipped = awq.clip(torch.from_numpy(weight), moments(x)[0], GRID, SIZE).numpy()
    for first in range(0, 96, SIZE):
        part, of = weight[:, first : first + SIZE], x[:, first : first + SIZE]
        most = np.abs(part).max(1, keepdims=True)
        tried = [np.clip(part, -most * share, most * share) for share in 1 - np.arange(11) / 20]
        losses = np.stack([np.square(of @ (paper.rounded(t, 4, -1, False) - part).T).sum(0) for t in tried])
        limits = np.stack([np.abs(t).max(1) for t in tried])
        best = limits[losses.argmin(0), np.arange(len(part))]
        np.testing.assert_allclose(np.abs(clipped[:, first : first + SIZE]).max(1), best, rtol=1e-9)


def test_scaled_moments_are_those_of_scaled_inputs() -> None:
    x, _ = inputs()
    scale = np.exp(np.random.default_rng(2).standard_normal(96))
    found = awq.scaled_hessian(moments(x)[0], torch.from_numpy(scale)).numpy()
    np.testing.assert_allclose(found, moments(x / scale)[0].numpy(), rtol=1e-9)
