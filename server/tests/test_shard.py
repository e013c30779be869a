"""What a rank measures of itself."""

import torch
from text_generation_server.shard import forget_peak, peak_rss_bytes


def test_a_peak_before_the_measurement_is_forgotten():
    torch.ones(300 << 20, dtype=torch.uint8)
    before = forget_peak()
    assert peak_rss_bytes() - before < 50 << 20
    torch.ones(200 << 20, dtype=torch.uint8)
    assert 190 << 20 <= peak_rss_bytes() - before <= 250 << 20
