"""gRPC in front of a shard. gRPC's threads move messages through queues; one step thread does everything else.

`Health` answers from the first moment, before torch is imported, and whatever the step thread is doing.
"""

import faulthandler
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import grpc
from loguru import logger

from . import __version__
from .config import ServeConfig
from .errors import ConfigError, ShardError
from .health import Health, Phase
from .lifeline import die_with_parent, watch_lifeline
from .outbox import MAX_QUEUED, POLL_S, Stream
from .pb import shard_pb2 as pb
from .planning import plan_model
from .stacks import print_stacks

if TYPE_CHECKING:
    from .runner import Admission, Plan, Result, RowResult
    from .sampling.grammar import Grammar
    from .shard import Shard

T = TypeVar("T")

MAX_MESSAGE_BYTES = 256 << 20
# How late the end of a step on a device may be noticed while no plan comes.
LOOK_S = 0.0001
# Calls that wait for a grammar, of the 16 threads that answer calls.
MAX_PREPARING = 6
# Long enough for the other ranks' step threads to come out of a collective.
JOIN_TIMEOUT_S = 60.0


class EpochError(RuntimeError):
    """A call that belongs to another epoch than the current one, or comes too early or too late in it."""


class StepThread(threading.Thread):
    """Loads the model, then works off commands in order."""

    def __init__(self, config: ServeConfig, health: Health, on_end: Callable[[int], None]) -> None:
        super().__init__(name="step", daemon=True)
        self.config, self.health, self.on_end = config, health, on_end
        self.commands: queue.Queue[Callable[[Shard], None]] = queue.Queue(4 * MAX_QUEUED)
        self.shard: Shard | None = None
        self.stream: Stream | None = None

    def run(self) -> None:
        try:
            self.shard = shard = self.load()
            # Whoever reads this may join at once.
            self.health.enter(Phase.LOADED, "loaded, waiting for the router")
            while True:
                command = self.next_command(shard)
                self.health.busy = True
                command(shard)
                self.health.busy = shard.num_open > 0 or not self.commands.empty()
        except ShardError as error:
            self.health.enter(Phase.FAILED, str(error))
            logger.error("{}", error)
        except BaseException as error:  # the process ends, whatever it was
            self.health.enter(Phase.FAILED, f"{type(error).__name__}: {error}")
            logger.opt(exception=True).error("the step thread ended: {}: {}", type(error).__name__, error)
        self.on_end(1)

    def load(self) -> "Shard":
        """The model. Raises ShardError if it cannot be served."""
        config = self.config
        # What cannot be served is refused before torch is imported, which takes seconds.
        plan = plan_model(
            config.model_dir,
            world_size=config.world_size,
            dtype=config.dtype,
            quantize=config.quantize,
            gptq_bits=config.gptq_bits,
            gptq_groupsize=config.gptq_groupsize,
            device=config.device,
        )
        from .shard import Shard

        return Shard(config, plan, self.health)

    def call(self, work: Callable[["Shard"], T], context: grpc.ServicerContext) -> T:
        """Runs `work` on the step thread and waits. Errors become a status that tells what happened."""
        future: Future[T] = Future()

        def command(shard: "Shard") -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work(shard))
                except Exception as error:  # whoever asked is answered
                    future.set_exception(error)

        self.commands.put(command)
        # Nobody waits for whoever hung up: the threads that wait are those that answer Health.
        while not wait([future], timeout=POLL_S).done:
            if not context.is_active():
                future.cancel()
                break
        try:
            return future.result(timeout=0)
        except ShardError as error:
            abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, error)
        except EpochError as error:
            abort(context, grpc.StatusCode.FAILED_PRECONDITION, error)
        except (CancelledError, TimeoutError) as error:
            abort(context, grpc.StatusCode.CANCELLED, error)
        except Exception as error:  # the one place where exceptions become statuses
            logger.warning("{}: {}", type(error).__name__, error)
            abort(context, grpc.StatusCode.INTERNAL, error)

    def step(self, stream: Stream, message: bytes) -> None:
        """Queues a plan. What follows a failed step on the same stream is dropped."""

        def command(shard: "Shard") -> None:
            if stream.is_closed or stream is not self.stream:
                return
            try:
                for result in run_plan(shard, stream, message):
                    stream.put(result)
            except Exception as error:  # the stream ends with it; the process lives for the next Join
                self.fail(shard, stream, error)

        self.commands.put(command)

    def fail(self, shard: "Shard", stream: Stream, error: Exception) -> None:
        """Ends a stream whose step failed; the process too, if it cannot compute any more."""
        logger.warning("step failed: {}: {}", type(error).__name__, error)
        stream.put(error)
        self.close(shard, stream)
        if (why := shard.lost()) is not None:
            raise ShardError(f"this process can no longer use its device: {why}") from error

    def next_command(self, shard: "Shard") -> "Callable[[Shard], None]":
        """Waits for it. Meanwhile open steps are answered: none is waited for, so that a plan can begin behind them."""
        while shard.num_open:
            try:
                return self.commands.get(timeout=LOOK_S)
            except queue.Empty:
                self.finish(shard)
        return self.commands.get()

    def finish(self, shard: "Shard") -> None:
        """Answers the oldest open step, if it is done."""
        if (stream := self.stream) is None:
            # A call to join took the stream away, and came to nothing.
            return shard.leave()
        try:
            if (result := shard.finish_if_done()) is not None:
                stream.put(result_message(result).SerializeToString())
        except Exception as error:  # the stream ends with it; the process lives for the next Join
            self.fail(shard, stream, error)

    def end(self, stream: Stream) -> None:
        """Queues the end of a stream: the router is gone, or has given up on this epoch."""
        stream.is_closed = True
        self.commands.put(lambda shard: self.close(shard, stream))

    def close(self, shard: "Shard", stream: Stream) -> None:
        stream.is_closed = True
        if self.stream is stream:
            self.stream = None
            shard.leave()
            shard.health.enter(Phase.LOADED, "the router's stream ended, waiting for the next")


class Service:
    """The methods of proto/shard.proto."""

    def __init__(self, config: ServeConfig, health: Health, thread: StepThread) -> None:
        self.config, self.health, self.thread = config, health, thread
        self.highest_epoch = 0
        self.lock = threading.Lock()
        self.preparing = threading.BoundedSemaphore(MAX_PREPARING)

    def handlers(self) -> "grpc.GenericRpcHandler[Any, Any]":
        """How gRPC finds the methods. Plans and results stay bytes until the step thread takes them."""

        def unary(
            method: Callable[[Any, grpc.ServicerContext], Any], request: Any
        ) -> "grpc.RpcMethodHandler[Any, Any]":
            return grpc.unary_unary_rpc_method_handler(
                method, request.FromString, lambda reply: reply.SerializeToString()
            )

        return grpc.method_handlers_generic_handler(
            "text_generation.shard.v1.Shard",
            {
                "Describe": unary(self.describe, pb.DescribeRequest),
                "Join": unary(self.join, pb.JoinRequest),
                "Warmup": unary(self.warmup, pb.WarmupRequest),
                "Prepare": unary(self.prepare, pb.Grammar),
                "Health": unary(self.answer_health, pb.HealthRequest),
                "Run": grpc.stream_stream_rpc_method_handler(self.run),
            },
        )

    def loaded(self, context: grpc.ServicerContext) -> "Shard":
        """The shard, or UNAVAILABLE while it loads."""
        shard = self.thread.shard
        if shard is None:
            abort(context, grpc.StatusCode.UNAVAILABLE, f"not loaded yet: {self.health.detail}")
        return shard

    def describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.Description:
        shard = self.loaded(context)
        settings = shard.plan.settings
        return pb.Description(
            model_type=settings.model_type,
            architecture=settings.architecture,
            vocab_size=settings.vocab_size,
            eos_token_ids=shard.plan.eos_token_ids,
            max_positions=settings.max_positions,
            dtype=shard.plan.dtype,
            device=self.config.device,
            kv_bytes_per_token=shard.model.cache_spec.bytes_per_token,
            num_cache_groups=1,
            max_drafts=0,
            row_stable=shard.kernels.row_stable,
            version=__version__,
            rank=self.config.rank,
            world_size=self.config.world_size,
        )

    def join(self, request: pb.JoinRequest, context: grpc.ServicerContext) -> pb.JoinReply:
        self.loaded(context)
        here = (self.config.rank, self.config.world_size)
        if (request.rank, request.world_size) != here:
            what = f"this is rank {here[0]} of {here[1]}, not {request.rank} of {request.world_size}"
            abort(context, grpc.StatusCode.INVALID_ARGUMENT, what)
        with self.lock:
            if request.epoch <= self.highest_epoch:
                what = f"epoch {request.epoch} is not above {self.highest_epoch}"
                abort(context, grpc.StatusCode.FAILED_PRECONDITION, what)
            self.highest_epoch = request.epoch
        # Told at once, so that a router that asks takes a higher one even if this join never ends.
        self.health.epoch = request.epoch
        # Plans of the old epoch are not worth computing any more.
        if (old := self.thread.stream) is not None:
            old.is_closed = True

        def is_wanted() -> bool:
            return request.epoch == self.highest_epoch and context.is_active()

        def work(shard: "Shard") -> None:
            self.thread.stream = None
            if not is_wanted() or not shard.join(request.epoch, request.rendezvous, JOIN_TIMEOUT_S, is_wanted):
                raise EpochError(f"epoch {request.epoch} was overtaken by {self.highest_epoch}, or given up")

        self.thread.call(work, context)
        return pb.JoinReply(epoch=request.epoch)

    def warmup(self, request: pb.WarmupRequest, context: grpc.ServicerContext) -> pb.WarmupReply:
        self.loaded(context)

        def work(shard: "Shard") -> int:
            if shard.epoch is None or request.epoch != shard.epoch:
                raise EpochError(f"Warmup of epoch {request.epoch}, but this rank has joined {shard.epoch}")
            limits = Limits(request.block_size, request.max_running, request.max_step_tokens, request.max_total_tokens)
            if request.num_blocks == 0:
                return shard.measure_blocks(limits)
            shard.allocate(request.num_blocks, limits)
            return int(request.num_blocks)

        from .shard import Limits

        return pb.WarmupReply(num_blocks=self.thread.call(work, context))

    def prepare(self, request: pb.Grammar, context: grpc.ServicerContext) -> pb.PrepareReply:
        """Answers when the grammar is compiled, or cannot be. Who waits here has a thread that could answer Health."""
        from .sampling.constraint import GrammarError
        from .sampling.grammar import COMPILE_TIMEOUT_S

        shard, grammar = self.loaded(context), parse_grammar(request)
        if grammar is None or self.config.rank != 0:
            return pb.PrepareReply()
        if not self.preparing.acquire(blocking=False):
            abort(context, grpc.StatusCode.UNAVAILABLE, f"{MAX_PREPARING} grammars are being made ready")
        try:
            shard.grammars.prepare(grammar).result(COMPILE_TIMEOUT_S)
        except GrammarError as error:
            return pb.PrepareReply(error=str(error)[:500])
        except TimeoutError:
            abort(context, grpc.StatusCode.DEADLINE_EXCEEDED, f"not compiled within {COMPILE_TIMEOUT_S} s")
        finally:
            self.preparing.release()
        return pb.PrepareReply()

    def run(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """Results in the order of the plans, until the router ends the stream or a step fails."""
        self.loaded(context)
        stream = Stream()

        def work(shard: "Shard") -> None:
            if shard.epoch is None or shard.runner is None:
                raise EpochError("Run comes after Join and Warmup")
            if self.thread.stream is not None:
                raise EpochError(f"epoch {shard.epoch} has a stream already")
            stream.epoch, self.thread.stream = shard.epoch, stream

        def read() -> None:
            try:
                for message in messages:
                    self.thread.step(stream, message)
            except Exception as error:  # gRPC raises bare exceptions when the peer is gone
                logger.debug("the router's stream broke: {}", error)
            stream.is_closed = True

        self.thread.call(work, context)
        if not context.add_callback(lambda: self.thread.end(stream)):
            self.thread.end(stream)
        threading.Thread(target=read, name="plans", daemon=True).start()
        while (result := stream.get()) is not None:
            if isinstance(result, Exception):
                abort(context, grpc.StatusCode.INTERNAL, result)
            yield result

    def answer_health(self, request: pb.HealthRequest, context: grpc.ServicerContext) -> pb.HealthReply:
        health, shard = self.health, self.thread.shard
        return pb.HealthReply(
            phase=health.phase.name,
            detail=health.detail[:1000],
            done=health.done,
            total=health.total,
            epoch=health.epoch,
            step=health.step,
            progress=health.progress,
            busy=health.busy,
            num_rows=health.num_rows,
            rank=self.config.rank,
            process_id=os.getpid(),
            waits=shard is not None and shard.group.waits,
        )


def abort(context: grpc.ServicerContext, code: grpc.StatusCode, why: Exception | str) -> NoReturn:
    """Ends the call with a status; an error of ours with its name."""
    named = isinstance(why, Exception) and not isinstance(why, ShardError | EpochError)
    context.abort(code, (f"{type(why).__name__}: {why}" if named else str(why))[:1000])
    raise AssertionError("abort raises")


def run_plan(shard: "Shard", stream: Stream, message: bytes) -> list[bytes]:
    """Parses, computes, serializes: the results that are there."""
    plan = parse_plan(pb.StepPlan.FromString(message))
    if plan.epoch != stream.epoch:
        raise RuntimeError(f"a plan of epoch {plan.epoch} on a stream of epoch {stream.epoch}")
    return [result_message(result).SerializeToString() for result in shard.step(plan)]


def parse_plan(message: pb.StepPlan) -> "Plan":
    """The wire's plan as values of the runner."""
    from .runner import Plan, Work

    works = []
    for work in message.work:
        (blocks,) = work.new_blocks or [pb.Blocks()]
        works.append(Work(work.row, work.incarnation, work.max_query, work.max_ids, blocks.ids))
    admissions = [parse_admission(admit) for admit in message.admit]
    return Plan(message.epoch, message.step, list(message.release), admissions, works)


def parse_admission(admit: pb.Admit) -> "Admission":
    """The wire's admission; what it asks for and is not served is named in `unsupported`."""
    from .runner import Admission
    from .sampling.params import SamplingParams

    s = admit.sampling
    params = SamplingParams(
        do_sample=s.do_sample,
        temperature=s.temperature,
        top_k=s.top_k,
        top_p=s.top_p,
        typical_p=s.typical_p,
        repetition_penalty=s.repetition_penalty,
        frequency_penalty=s.frequency_penalty,
        presence_penalty=s.presence_penalty,
        logit_bias=tuple((b.token, b.bias) for b in s.logit_bias),
        seed=s.seed,
        branch=s.branch,
        top_n=s.top_n,
        count_penalty=s.count_penalty,
        min_new_tokens=s.min_new_tokens,
        watermark=s.watermark,
    )
    kind = admit.grammar.kind
    asked = {
        "an adapter": bool(admit.adapter),
        "an input that is not text": len(admit.spans) > 0,
        "a temperature of zero or less": s.do_sample and not s.temperature > 0,
    }
    return Admission(
        row=admit.row,
        sequence=admit.sequence,
        incarnation=admit.incarnation,
        tokens=admit.tokens,
        num_prompt=admit.num_prompt,
        cached_len=admit.cached_len,
        params=params,
        automaton=admit.grammar.source if kind == pb.Grammar.AUTOMATON else None,
        grammar=parse_grammar(admit.grammar),
        unsupported=next((what for what, is_asked in asked.items() if is_asked), None),
        prompt_logprobs_from=admit.prompt_logprobs_from if admit.HasField("prompt_logprobs_from") else None,
    )


def parse_grammar(grammar: pb.Grammar) -> "Grammar | None":
    """The wire's grammar, if it is one over text."""
    from .sampling.grammar import JSON_SCHEMA, REGEX, Grammar

    kinds = {pb.Grammar.JSON_SCHEMA: JSON_SCHEMA, pb.Grammar.REGEX: REGEX}
    return Grammar(kinds[grammar.kind], grammar.source) if grammar.kind in kinds else None


def result_message(result: "Result") -> pb.StepResult:
    """The runner's result as the wire's."""
    return pb.StepResult(
        epoch=result.epoch,
        step=result.step,
        table_digest=result.table_digest,
        rows=[row_message(row) for row in result.rows],
        timings=pb.Timings(forward_us=result.forward_us, sample_us=result.sample_us, total_us=result.total_us),
    )


def row_message(row: "RowResult") -> pb.RowResult:
    message = pb.RowResult(
        row=row.row, incarnation=row.incarnation, computed=row.computed, ids=row.ids, logprobs=row.logprobs
    )
    if row.top is not None:
        message.top.add(ids=row.top[0], logprobs=row.top[1])
    if row.prompt is not None:
        message.prompt_logprobs.extend(row.prompt.logprobs)
        for ids, logprobs in row.prompt.top:
            message.prompt_top.add(ids=ids, logprobs=logprobs)
    if row.fault is not None:
        message.error.CopyFrom(pb.RowError(kind=row.fault.kind, message=row.fault.message[:500]))
    return message


def run(config: ServeConfig) -> NoReturn:
    """Serves until SIGTERM, SIGINT, the launcher's end or an error of loading; ends the process.

    Raises ConfigError if the socket cannot be made.
    """
    # The exit code, or None where the stacks are asked for. A signal may have interrupted `get`: of all queues, only a
    # simple one may be put into then.
    orders: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    die_with_parent()
    faulthandler.enable()
    signal.signal(signal.SIGUSR1, lambda *_: orders.put(None))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: orders.put(0))
    if config.exit_with_stdin:
        threading.Thread(target=watch_lifeline, name="lifeline", daemon=True).start()
    health = Health()
    thread = StepThread(config, health, orders.put)
    server = grpc.server(
        ThreadPoolExecutor(16, thread_name_prefix="grpc"),
        options=[
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.so_reuseport", 0),
        ],
    )
    server.add_generic_rpc_handlers((Service(config, health, thread).handlers(),))
    if not config.uds_path.parent.is_dir():
        raise ConfigError(f"--uds-path {config.uds_path}: {config.uds_path.parent} is not a folder")
    # Whoever may connect may compute: the socket is the owner's alone.
    os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{config.uds_path}")
    except RuntimeError as error:
        raise ConfigError(f"--uds-path {config.uds_path}: cannot listen there: {str(error).split(';')[0]}") from None
    server.start()
    os.umask(0o077)
    thread.start()
    while (code := orders.get()) is None:
        print_stacks()
    server.stop(0)
    sys.stdout.flush()
    sys.stderr.flush()
    # A step thread in a collective would keep the interpreter from ending.
    os._exit(code)
