"""What a rank measures of itself, and what it does with a device that fails."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import LLAMA
from text_generation_server.config import ServeConfig
from text_generation_server.errors import ShardError
from text_generation_server.health import Health
from text_generation_server.planning import plan_model
from text_generation_server.service import StepThread, Stream
from text_generation_server.shard import Limits, Shard, forget_peak, peak_rss_bytes


def test_a_peak_before_the_measurement_is_forgotten():
    torch.ones(300 << 20, dtype=torch.uint8)
    before = forget_peak()
    assert peak_rss_bytes() - before < 50 << 20
    torch.ones(200 << 20, dtype=torch.uint8)
    assert 190 << 20 <= peak_rss_bytes() - before <= 250 << 20


def test_a_step_need_not_wait_until_everything_was_looked_through(tmp_path: Path):
    config = ServeConfig(
        model_dir=LLAMA, rank=0, world_size=1, uds_path=tmp_path / "s", num_threads=1, memory_bytes=1 << 30,
        dtype="float32", quantize=None, gptq_bits=None, gptq_groupsize=None, device="cpu", instruction_set=None,
        kernel_cache=None, exit_with_stdin=False, logits_digest_dir=None, fault_file=tmp_path / "fault",
        recorded_sizes=(),
    )  # fmt: skip
    shard = Shard(config, plan_model(LLAMA, world_size=1, dtype="float32"), Health())
    assert shard.join(1, str(tmp_path / "rendezvous"), 5, lambda: True)
    gc.unfreeze()
    before = len(gc.get_objects())
    try:
        shard.allocate(8, Limits(block_size=16, max_running=4, max_step_tokens=32, max_total_tokens=64))
        assert len(gc.get_objects()) < before / 10
    finally:
        gc.unfreeze()


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
