"""What the quantizer computes with, against float64 and the reference kernels."""

import pytest
import torch
from text_generation_server.errors import ConfigError
from text_generation_server.kernels.interface import AttentionOptions
from text_generation_server.kernels.offline import OfflineKernels, add_gram, machine, mirror_gram, sequences_batch

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [5, 256, 700, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_moments_are_those_of_float64_and_symmetric(size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(size)
    parts = [torch.randn(40, size, generator=generator).to(dtype) for _ in range(3)]
    total = torch.zeros(size, size)
    for part in parts:
        add_gram(total, part)
    mirror_gram(total)
    x = torch.cat(parts).double()
    torch.testing.assert_close(total.double(), x.T @ x, atol=1e-4, rtol=1e-4)
    assert torch.equal(total, total.T)


@pytest.mark.parametrize("window", [None, 5, 100])
def test_attention_is_causal_within_each_sequence_and_its_window(window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3 * 20, heads, 8, generator=generator) for heads in (4, 2, 2))
    kernels = OfflineKernels(CPU)
    batch = sequences_batch(3, 20, kernels)
    kernels.store_kv(k, v, 0, batch)
    found = kernels.attention(q, 0, batch, AttentionOptions(0.3, window))
    at = torch.arange(20)
    hidden = (at > at[:, None]) | (at <= at[:, None] - (window or 20))
    for i in range(3):
        rows = slice(20 * i, 20 * (i + 1))
        heads = [x[rows].double().repeat_interleave(4 // x.shape[1], 1).transpose(0, 1) for x in (q, k, v)]
        scores = (heads[0] @ heads[1].mT * 0.3).masked_fill(hidden, float("-inf"))
        expected = (scores.softmax(-1) @ heads[2]).transpose(0, 1).flatten(1)
        torch.testing.assert_close(found[rows].double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("device", "said"),
    [("gpu", "--device gpu is unknown; expected cpu, cuda or cuda:N"), ("meta", "--device meta is not served"),
     ("cuda:99", "--device cuda:99: torch .* sees")],
)  # fmt: skip
def test_devices_that_are_not_there_are_refused(device: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        machine(device, None)
