"""What a rank measures of itself, and what it does with a device that fails."""

from typing import Any

import pytest
import torch
from text_generation_server.errors import ShardError
from text_generation_server.health import Health
from text_generation_server.service import StepThread, Stream
from text_generation_server.shard import forget_peak, peak_rss_bytes


def test_a_peak_before_the_measurement_is_forgotten():
    torch.ones(300 << 20, dtype=torch.uint8)
    before = forget_peak()
    assert peak_rss_bytes() - before < 50 << 20
    torch.ones(200 << 20, dtype=torch.uint8)
    assert 190 << 20 <= peak_rss_bytes() - before <= 250 << 20


class Failing:
    """A shard whose steps fail, and whose device does for ever if `why` says so."""

    def __init__(self, why: str | None) -> None:
        self.why, self.health = why, Health()

    num_open = 0

    def step(self, plan: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def leave(self) -> None:
        self.has_left = True

    def lost(self) -> str | None:
        return self.why


@pytest.mark.parametrize("why", [None, "an illegal memory access was encountered"])
def test_a_step_that_fails_ends_the_stream_and_one_that_loses_the_device_the_process_too(why: str | None):
    config: Any = None
    thread, stream, shard = StepThread(config, Health(), lambda code: None), Stream(), Failing(why)
    given: Any = shard
    thread.stream = stream
    thread.step(stream, b"")
    command = thread.commands.get()
    if why is None:
        command(given)
    else:
        with pytest.raises(ShardError, match="can no longer use its device: an illegal memory access"):
            command(given)
    assert isinstance(stream.get(), RuntimeError)
    assert stream.is_closed
    assert shard.has_left
