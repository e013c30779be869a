"""Drives real shard processes over gRPC without a router: joins, warms up, and runs plans made by hand."""

import os
import queue
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from text_generation_server.pb import shard_pb2 as pb
from text_generation_server.pb.shard_pb2_grpc import ShardStub

ROOT = Path(__file__).resolve().parent.parent.parent
LLAMA = ROOT / "models" / "docs-llama-7m"
QWEN2 = ROOT / "models" / "docs-qwen2-4m"
BLOCK_SIZE = 16
GREEDY = pb.Sampling(temperature=1, top_p=1, typical_p=1, repetition_penalty=1)
GIGABYTE = 1 << 30


class Process:
    """One rank."""

    def __init__(self, model: Path, rank: int, size: int, folder: Path, *flags: str, env: dict[str, str] | None = None) -> None:
        self.socket = folder / f"rank-{rank}-{time.monotonic_ns()}"
        command = [sys.executable, "-m", "text_generation_server.cli", "serve", str(model), "--uds-path", str(self.socket)]
        command += ["--rank", str(rank), "--world-size", str(size), "--memory-bytes", str(2 * GIGABYTE), "--exit-with-stdin"]
        self.log = folder / f"log-{rank}"
        with self.log.open("ab") as log:
            self.popen = subprocess.Popen(
                [*command, *flags], stdin=subprocess.PIPE, stdout=log, stderr=log, env=os.environ | (env or {})
            )
        self.channel = grpc.insecure_channel(f"unix:{self.socket}")
        self.stub = ShardStub(self.channel)

    def health(self, timeout_s: float = 5) -> pb.HealthReply:
        return self.stub.Health(pb.HealthRequest(), timeout=timeout_s, wait_for_ready=True)

    def wait_loaded(self, timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while self.health(timeout_s).phase < pb.HealthReply.LOADED:
            assert self.popen.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def kill(self) -> None:
        self.channel.close()
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()
        if self.popen.stdin is not None:
            self.popen.stdin.close()


@dataclass
class Shards:
    """All ranks of a model. `with Shards(...) as shards`."""

    model: Path
    size: int = 1
    flags: tuple[str, ...] = ("--dtype", "float32")
    env: dict[str, str] = field(default_factory=dict)
    max_running: int = 8
    max_total_tokens: int = 1024
    num_blocks: int = 128
    processes: list[Process] = field(default_factory=list)
    epoch: int = 0
    step: int = 0

    def __enter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix="tgs-"))
        self.processes = [self.process(rank) for rank in range(self.size)]
        try:
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end_streams()
        for process in self.processes:
            process.kill()

    def process(self, rank: int) -> Process:
        return Process(self.model, rank, self.size, self.folder, *self.flags, env=self.env)

    def replace(self, rank: int) -> None:
        """Kills a rank and starts it anew."""
        self.processes[rank].kill()
        self.processes[rank] = self.process(rank)

    def all(self, method: str, requests: list[Any], timeout_s: float = 60) -> list[Any]:
        calls = [
            getattr(p.stub, method).future(request, timeout=timeout_s)
            for p, request in zip(self.processes, requests, strict=True)
        ]
        return [call.result() for call in calls]

    def start(self, num_blocks: int | None = None) -> None:
        """Joins a new epoch, allocates, and opens the streams."""
        for process in self.processes:
            process.wait_loaded()
        self.epoch = 1 + max(p.health().epoch for p in self.processes)
        rendezvous = str(self.folder / f"rendezvous-{self.epoch}")
        joins = [
            pb.JoinRequest(epoch=self.epoch, rank=r, world_size=self.size, rendezvous=rendezvous) for r in range(self.size)
        ]
        self.all("Join", joins)
        self.warm_up(num_blocks or self.num_blocks)
        self.queues: list[queue.Queue[pb.StepPlan | None]] = [queue.Queue() for _ in self.processes]
        self.streams = [p.stub.Run(iterate(q)) for p, q in zip(self.processes, self.queues, strict=True)]

    def warm_up(self, num_blocks: int) -> list[int]:
        request = pb.WarmupRequest(
            epoch=self.epoch,
            block_size=BLOCK_SIZE,
            max_running=self.max_running,
            max_step_tokens=256,
            max_total_tokens=self.max_total_tokens,
            num_blocks=num_blocks,
        )
        return [reply.num_blocks for reply in self.all("Warmup", [request] * self.size)]

    def end_streams(self) -> None:
        for q in getattr(self, "queues", []):
            q.put(None)

    def send(self, **plan: Any) -> None:
        """A plan to every rank."""
        self.step += 1
        for q in self.queues:
            q.put(pb.StepPlan(epoch=self.epoch, step=self.step, **plan))

    def receive(self) -> list[pb.RowResult]:
        """The next result of every rank; they must agree. Rank 0's rows."""
        results = [next(stream) for stream in self.streams]
        assert len({(r.epoch, r.step, r.table_digest) for r in results}) == 1, results
        assert all(not r.rows for r in results[1:])
        return list(results[0].rows)

    def run(self, **plan: Any) -> list[pb.RowResult]:
        self.send(**plan)
        return self.receive()

    def stop(self, rank: int) -> None:
        os.kill(self.processes[rank].popen.pid, signal.SIGSTOP)


def iterate(q: "queue.Queue[pb.StepPlan | None]") -> Iterator[pb.StepPlan]:
    while (plan := q.get()) is not None:
        yield plan


def admit(row: int, tokens: list[int], num_prompt: int | None = None, **other: Any) -> pb.Admit:
    other.setdefault("sampling", GREEDY)
    other.setdefault("incarnation", 1)
    return pb.Admit(row=row, sequence=100 + row, tokens=tokens, num_prompt=num_prompt or len(tokens), **other)


def work(row: int, max_query: int, blocks: list[int] = [], *, samples: bool = True, incarnation: int = 1) -> pb.Work:  # noqa: B006
    new_blocks = [pb.Blocks(ids=blocks)]
    return pb.Work(row=row, incarnation=incarnation, max_query=max_query, max_ids=int(samples), new_blocks=new_blocks)


def generate(shards: Shards, row: int, tokens: list[int], blocks: list[int], count: int, **other: Any) -> list[int]:
    """Ids of one sequence, one step each, alone; the row is released with the last step."""
    ids: list[int] = []
    (first,) = shards.run(admit=[admit(row, tokens, **other)], work=[work(row, len(tokens), blocks)])
    ids += first.ids
    for i in range(count - 1):
        (result,) = shards.run(work=[work(row, 1)], release=[row] if i == count - 2 else [])
        assert not result.HasField("error"), result
        ids += result.ids
    return ids
