"""What is asked of torch's CUDA runtime, against one that only writes down what it is told; and memory by it."""

from typing import Any

import numpy as np
import pytest
import torch
from text_generation_server.errors import ConfigError
from text_generation_server.kernels.cuda.emulation.emulator import EmulatedStreams, Emulator
from text_generation_server.kernels.cuda.kernels import CudaKernels
from text_generation_server.kernels.cuda.streams import TorchStreams
from text_generation_server.kernels.interface import CacheSpec, HoldsMemory


class Paper:
    """A stand-in for torch.cuda."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.broken = False

    def set_device(self, device: torch.device) -> None:
        self.calls.append(f"device {device}")

    def empty_cache(self) -> None:
        self.calls.append("empty cache")

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self.calls.append(f"forget {device}")

    def max_memory_reserved(self, device: torch.device) -> int:
        return 70

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return 500, 1000

    def memory_reserved(self, device: torch.device) -> int:
        return 300

    def synchronize(self, device: torch.device) -> None:
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be ...")

    def graph_pool_handle(self) -> str:
        self.calls.append("pool")
        return "pool"

    def graph(self, graph: Any, pool: str) -> Any:
        assert pool == "pool"
        paper = self

        class Capture:
            def __enter__(self) -> None:
                paper.calls.append("capture")

            def __exit__(self, *_: object) -> None:
                paper.calls.append("captured")

        return Capture()

    def CUDAGraph(self) -> Any:
        paper = self

        class Graph:
            def replay(self) -> None:
                paper.calls.append("replay")

        return Graph()

    def Event(self) -> Any:
        paper = self

        class Event:
            def record(self) -> None:
                paper.calls.append("record")

            def query(self) -> bool:
                paper.calls.append("query")
                return False

            def synchronize(self) -> None:
                paper.calls.append("synchronize")

        return Event()


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> Paper:
    made, empty = Paper(), torch.empty

    def pinned(*shape: Any, pin_memory: bool = False, **how: Any) -> torch.Tensor:
        if pin_memory:
            made.calls.append("pinned")
        return empty(*shape, **how)

    monkeypatch.setattr("torch.cuda", made)
    monkeypatch.setattr("torch.empty", pinned)
    return made


def test_copies_go_through_pinned_memory_and_end_with_an_event(paper: Paper) -> None:
    streams = TorchStreams(torch.device("cuda", 1))
    values, there = np.arange(5), torch.zeros(5, dtype=torch.int64)
    streams.upload(values, there)
    values[:] = 0
    assert there.tolist() == [0, 1, 2, 3, 4]
    fetched = streams.fetch(there)
    assert not fetched.is_done()
    assert fetched.wait().tolist() == [0, 1, 2, 3, 4]
    assert paper.calls == ["device cuda:1", "pinned", "pinned", "record", "query", "synchronize"]


def test_graphs_share_a_pool(paper: Paper) -> None:
    streams = TorchStreams(torch.device("cuda", 0))
    first, second = (streams.record(lambda: paper.calls.append("work")) for _ in range(2))
    second.replay()
    first.replay()
    once = ["capture", "work", "captured"]
    assert paper.calls == ["device cuda:0", "pool", *once, *once, "replay", "replay"]


def test_what_is_available_is_left_of_the_budget_and_free_on_the_device(paper: Paper) -> None:
    backend: Any = Emulator.__new__(Emulator)
    backend.streams = TorchStreams(torch.device("cuda", 0))
    kernels = CudaKernels(backend)
    assert isinstance(kernels, HoldsMemory)
    assert [kernels.available_bytes(budget) for budget in (400, 900, 200)] == [100, 500, 0]
    assert kernels.peak_bytes(forget=True) == 70
    assert paper.calls.count("forget cuda:0") == 1


def test_a_device_that_fails_for_ever_says_why(paper: Paper) -> None:
    streams = TorchStreams(torch.device("cuda", 0))
    assert streams.lost() is None
    paper.broken = True
    assert streams.lost() == "CUDA error: an illegal memory access was encountered"


def test_a_cache_that_does_not_fit_is_refused_with_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    backend: Any = Emulator.__new__(Emulator)

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a capacity of ...")

    kernels = CudaKernels(backend)
    monkeypatch.setattr("torch.empty", full)
    with pytest.raises(ConfigError, match=r"a cache of 7 blocks of 16 tokens .*: CUDA out of memory; lower"):
        kernels.new_kv_cache(CacheSpec(1, 1, 64, torch.bfloat16), 7, 16)


def test_the_emulated_recording_holds_operations_and_memory_not_python() -> None:
    streams, x, y = EmulatedStreams(), torch.ones(3), torch.zeros(3)
    factor = 2.0

    def work() -> None:
        z = (x * factor).view(3)
        y.copy_(z + 1)

    graph = streams.record(work)
    factor = 100.0
    x.fill_(5.0)
    graph.replay()
    assert y.tolist() == [11.0] * 3
    for what in (lambda: y.sum().item(), lambda: torch.tensor([1]), lambda: streams.upload(np.zeros(1, np.int64), y)):
        with pytest.raises(RuntimeError, match="cannot be recorded"):
            streams.record(what)
