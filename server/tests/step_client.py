"""Drives real shard processes over gRPC without a router: joins, warms up, and runs plans made by hand."""

import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
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

    def __init__(self, model: Path, rank: int, size: int, folder: Path, *flags: str) -> None:
        self.rank = rank
        self.socket = folder / f"rank-{rank}-{time.monotonic_ns()}"
        self.log = folder / f"log-{rank}"
        command = [
            sys.executable,
            "-m",
            "text_generation_server.cli",
            "serve",
            str(model),
            "--uds-path",
            str(self.socket),
        ]
        command += ["--rank", str(rank), "--world-size", str(size), "--memory-bytes", str(2 * GIGABYTE)]
        with self.log.open("ab") as log:
            # The folder that this starts in is the first where packages are looked for.
            self.popen = subprocess.Popen(
                [*command, "--exit-with-stdin", *flags],
                cwd=ROOT / "server",
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
            )
        # By default gRPC waits ever longer for a socket that is not there yet.
        backoff = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 100)]
        self.channel = grpc.insecure_channel(f"unix:{self.socket}", backoff)
        self.stub = ShardStub(self.channel)

    def health(self, timeout_s: float = 10) -> pb.HealthReply:
        return self.stub.Health(pb.HealthRequest(), timeout=timeout_s, wait_for_ready=True)

    def wait_for(self, *phases: int, timeout_s: float = 90) -> pb.HealthReply:
        """The first health in one of the phases."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            assert self.popen.poll() is None, self.log.read_text()
            try:
                health = self.health(1)
            except grpc.RpcError:
                continue
            if health.phase in phases:
                return health
            time.sleep(0.02)
        raise AssertionError(f"rank {self.rank} did not come to {phases}\n{self.log.read_text()}")

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
    dtype: str = "float32"
    flags: tuple[str, ...] = ()
    max_running: int = 8
    max_total_tokens: int = 256
    num_blocks: int = 160
    processes: list[Process] = field(default_factory=list)
    queues: list["queue.Queue[pb.StepPlan | None]"] = field(default_factory=list)
    epoch: int = 0
    step: int = 0

    def __post_init__(self) -> None:
        """Starts the processes; `start` waits for them."""
        self.folder = Path(tempfile.mkdtemp(prefix="tgs-"))
        self.fault_file, self.digest_dir = self.folder / "fault", self.folder / "digests"
        self.processes = [self.process(rank) for rank in range(self.size)]

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end_streams()
        for process in self.processes:
            process.kill()
        shutil.rmtree(self.folder)

    def process(self, rank: int) -> Process:
        flags = [
            "--dtype",
            self.dtype,
            "--fault-file",
            str(self.fault_file),
            "--logits-digest-dir",
            str(self.digest_dir),
        ]
        return Process(self.model, rank, self.size, self.folder, *flags, *self.flags)

    def replace(self, rank: int) -> None:
        """Kills a rank and starts it anew."""
        self.processes[rank].kill()
        self.processes[rank] = self.process(rank)

    def all(self, method: str, requests: Sequence[Any], timeout_s: float = 60) -> list[Any]:
        calls = [
            getattr(p.stub, method).future(request, timeout=timeout_s)
            for p, request in zip(self.processes, requests, strict=True)
        ]
        return [call.result() for call in calls]

    def start(self) -> None:
        """Joins a new epoch, which ends what there was, allocates, and opens the streams."""
        self.end_streams()
        self.fault_file.unlink(missing_ok=True)
        for process in self.processes:
            process.wait_for(*range(pb.HealthReply.LOADED, pb.HealthReply.FAILED))
        self.join()
        self.warm_up(self.num_blocks)
        self.open_streams()

    def join(self, timeout_s: float = 60) -> None:
        self.epoch = 1 + max(p.health().epoch for p in self.processes)
        self.all("Join", [self.join_request(self.epoch, rank) for rank in range(self.size)], timeout_s)

    def join_request(self, epoch: int, rank: int) -> pb.JoinRequest:
        rendezvous = str(self.folder / f"rendezvous-{epoch}")
        return pb.JoinRequest(epoch=epoch, rank=rank, world_size=self.size, rendezvous=rendezvous)

    def warm_up(self, num_blocks: int, epoch: int | None = None) -> list[int]:
        request = pb.WarmupRequest(
            epoch=self.epoch if epoch is None else epoch,
            block_size=BLOCK_SIZE,
            max_running=self.max_running,
            max_step_tokens=256,
            max_total_tokens=self.max_total_tokens,
            num_blocks=num_blocks,
        )
        return [reply.num_blocks for reply in self.all("Warmup", [request] * self.size)]

    def open_streams(self) -> None:
        self.queues = [queue.Queue() for _ in self.processes]
        self.streams = [p.stub.Run(iterate(q)) for p, q in zip(self.processes, self.queues, strict=True)]

    def end_streams(self) -> None:
        for q in self.queues:
            q.put(None)

    def cancel_streams(self) -> None:
        """As if the router had died."""
        for stream in self.streams:
            stream.cancel()
        self.end_streams()

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

    def fault(self, line: str) -> None:
        """What a rank does to itself from its next step on, see faults.py."""
        waiting = self.fault_file.with_suffix(".new")
        waiting.write_text(line)
        waiting.rename(self.fault_file)

    def forget_digests(self) -> None:
        """Empties the files; processes that write append to them."""
        for path in self.digest_dir.glob("*"):
            os.truncate(path, 0)

    def digests(self) -> list[tuple[str, str]]:
        """(digest of a log, digest of the logits after it) of every id that was sampled by any process so far."""
        lines = [line.split() for path in self.digest_dir.iterdir() for line in path.read_text().splitlines()]
        return [(log, logits) for log, logits in lines]


def iterate(q: "queue.Queue[pb.StepPlan | None]") -> Iterator[pb.StepPlan]:
    while (plan := q.get()) is not None:
        yield plan


def admit(row: int, tokens: Sequence[int], num_prompt: int | None = None, **other: Any) -> pb.Admit:
    other.setdefault("sampling", GREEDY)
    other.setdefault("incarnation", 1)
    return pb.Admit(row=row, sequence=100 + row, tokens=tokens, num_prompt=num_prompt or len(tokens), **other)


def work(
    row: int, max_query: int, blocks: Sequence[int] = (), *, samples: bool = True, incarnation: int = 1
) -> pb.Work:
    new_blocks = [pb.Blocks(ids=blocks)]
    return pb.Work(row=row, incarnation=incarnation, max_query=max_query, max_ids=int(samples), new_blocks=new_blocks)


@dataclass
class Sequence_:
    """What a router would know of a sequence. Its blocks are its row's own, enough for 128 positions."""

    row: int
    prompt: list[int]
    options: dict[str, Any] = field(default_factory=dict)
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    incarnation: int = 0

    def admit(self) -> pb.Admit:
        """The next incarnation, with the whole log."""
        self.incarnation += 1
        log = [*self.prompt, *self.ids]
        return admit(self.row, log, len(self.prompt), incarnation=self.incarnation, **self.options)

    def first(self, max_query: int = 256, *, samples: bool = True) -> pb.Work:
        blocks = range(8 * self.row, 8 * self.row + 8)
        return work(self.row, max_query, blocks, samples=samples, incarnation=self.incarnation)

    def next(self, max_query: int = 1, *, samples: bool = True) -> pb.Work:
        return work(self.row, max_query, samples=samples, incarnation=self.incarnation)

    def take(self, result: pb.RowResult) -> None:
        assert (result.row, result.incarnation) == (self.row, self.incarnation)
        assert not result.HasField("error"), result
        self.ids += result.ids
        self.logprobs += result.logprobs


def generate(shards: Shards, sequences: Sequence[Sequence_], count: int, *, depth: int = 1) -> None:
    """Admits the sequences, gives each `count` more ids and releases them, with up to `depth` plans sent ahead."""
    rows = [s.row for s in sequences]
    received = 0

    def receive() -> None:
        for sequence, result in zip(sequences, shards.receive(), strict=True):
            sequence.take(result)

    for i in range(count):
        release = rows if i == count - 1 else []
        if i == 0:
            shards.send(admit=[s.admit() for s in sequences], work=[s.first() for s in sequences], release=release)
        else:
            shards.send(work=[s.next() for s in sequences], release=release)
        if i + 1 - received >= depth:
            receive()
            received += 1
    for _ in range(count - received):
        receive()
