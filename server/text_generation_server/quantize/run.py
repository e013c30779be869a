"""The run itself: from a checked command to a folder that a server serves, and back again after a crash."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .. import __version__
from ..checkpoint.index import INDEX_NAME, read_header
from ..checkpoint.model_config import CONFIG_NAME, TOKENIZER_NAME
from ..checkpoint.tensors import Checkpoint
from ..errors import CheckpointError, ConfigError, ShardError
from ..kernels.offline import Machine, machine
from ..planning import ModelPlan, check_tensors, plan_model
from ..quantization.format import StoredLinear
from . import output, preflight
from .checks import Checked
from .formats import HEAD, quantization_config
from .output import CHART, Proof, shard_name
from .progress import MemoryWatch, Progress, duration, gib
from .proof import prove
from .recording import open_model
from .settings import Options
from .solve import BlockSolver, LayerReport
from .staging import (
    FOLDER,
    REPORT,
    Staging,
    differences,
    free_bytes,
    report_line,
    report_lines,
    result_files,
    write_durably,
    write_text,
)
from .upload import upload
from .walk import Pass, block_prefix, drop_block, embed, load_block, load_finished
from .windows import Windows

HASH_THREADS = 4
Rows = list[dict[str, Any]]


class StoppedError(ShardError):
    """Ctrl-C, or a polite signal; what is finished is safe."""

    exit_code = 130


@dataclass(frozen=True)
class Outcome:
    """What became of a run. `too_bad`: the perplexity grew by more than --max-ppl-increase allows."""

    folder: Path
    proof: Mapping[str, Any] | None
    too_bad: bool = False


def carry_out(options: Options, checked: Checked, begins: Callable[[], None] = lambda: None) -> Outcome:
    """What is left when everything is checked that needs no weights. `begins` is called when all modules are there.

    Raises:
        ShardError: in one line, what is wrong and what to do.
    """
    begins()
    plan, windows = checked.plan, checked.windows
    threads = options.resources.num_threads or preflight.usable_cores()
    torch.set_num_threads(threads)
    device = machine(options.resources.device, options.resources.dtype)
    with MemoryWatch() as watch, Progress(plan.settings.num_layers, watch) as progress:
        run = _describe(options, plan, windows, device, threads)
        if checked.done is not None:
            return _again(options, run, checked.done, progress)
        try:
            return _Run(options, checked, device, progress, run).go()
        except KeyboardInterrupt:
            raise StoppedError(_stopped(options, plan)) from None
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"OUTPUT_DIR {options.output_dir}: cannot be written: {_reason(error)}; finished blocks are safe "
                "there; make room and give the same command again"
            ) from error


def _stopped(options: Options, plan: ModelPlan) -> str:
    stored, blocks = len(list((options.output_dir / FOLDER).glob("rows-*.jsonl"))), plan.settings.num_layers
    return (
        f"stopped; {stored} of {blocks} blocks are stored in {options.output_dir / FOLDER}; the same command goes on "
        f"with {'the next one' if stored < blocks else 'what is left to be done with them'}"
    )


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).splitlines()[0][:200]


def _describe(options: Options, plan: ModelPlan, windows: Windows, device: Machine, threads: int) -> dict[str, Any]:
    """The first line of the report: everything that decides the result."""
    return {
        "kind": "run",
        **options.making(),
        "model": _digests(plan),
        "data": windows.digest,
        "machine": {
            "version": __version__, "torch": torch.__version__, "device": device.name, "threads": threads,
            "dtype": str(device.dtype).removeprefix("torch."),
        },
        "text": {
            "source": windows.source, "measured": len(windows.measured), "held_back": len(windows.held_back),
            "length": windows.length,
        },
    }  # fmt: skip


def _digests(plan: ModelPlan) -> dict[str, str]:
    """SHA-256 of every file that the result is made from, by name."""
    paths = {info.path for info in plan.index.values()}
    paths |= {plan.model_dir / name for name in (CONFIG_NAME, TOKENIZER_NAME)}

    ordered = sorted(paths)
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return {path.name: value for path, value in zip(ordered, pool.map(_sha256, ordered), strict=True)}


def _again(options: Options, run: Mapping[str, Any], done: Mapping[str, Any], progress: Progress) -> Outcome:
    """The result is there already: what is left is to upload it."""
    if changed := differences(done, run):
        raise ConfigError(
            f"OUTPUT_DIR {options.output_dir}: holds a finished result that differs in {'; '.join(changed)}; take "
            "another folder, or --overwrite to replace it"
        )
    folder = options.output_dir
    proof = report_line(folder, "proof")
    files = result_files(folder)
    damaged = [name for name, size in files.items() if not _has_size(folder / name, size)] if files else [REPORT]
    if proof is None or damaged:
        raise ConfigError(
            f"OUTPUT_DIR {folder}: holds the result of this command, but {', '.join(damaged[:4])} is missing "
            "or is not as it was written; give --overwrite to make it again, or take another folder"
        )
    progress.say(f"{options.output_dir} is finished already: the same model, text and options")
    return _finish(options, proof, progress)


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _finish(options: Options, proof: Mapping[str, Any], progress: Progress) -> Outcome:
    limit = options.max_ppl_increase
    too_bad = limit is not None and not proof["increase"] <= limit
    if too_bad:
        progress.say(
            f"perplexity grew by {proof['increase']:.4f}, more than --max-ppl-increase {limit:g} allows; "
            f"the result is kept in {options.output_dir}" + (", and not uploaded" if options.upload_to else "")
        )
    elif options.upload_to is not None:
        progress.say(f"uploading {options.output_dir} to {options.upload_to}")
        progress.say(f"uploaded: {upload(options.output_dir, options.upload_to)}")
    told = {name: value for name, value in proof.items() if name not in ("kind", "files")}
    return Outcome(options.output_dir, told, too_bad)


class _Run:
    """One run, from the first unfinished block to the end."""

    def __init__(
        self, options: Options, checked: Checked, device: Machine, progress: Progress, run: dict[str, Any]
    ):  # fmt: skip
        self.options, self.plan, self.formats, self.windows = options, checked.plan, checked.formats, checked.windows
        self.device, self.progress, self.run = device, progress, run
        self.model = open_model(self.plan, device, self.windows.length)
        self.num_blocks = len(self.model.decoder.blocks)
        self.shards = [shard_name(i + 1, self.num_blocks + 2) for i in range(self.num_blocks + 2)]
        self.begun, self.walked_s = time.monotonic(), 0.0

    def go(self) -> Outcome:
        say = self.progress.say
        spill = self._preflight()
        staging = Staging(self.options.output_dir, self.run, self.options.overwrite)
        try:
            if not staging.is_complete:
                self._walk(staging, spill)
                self.walked_s = time.monotonic() - self.begun
                self._write_rest(staging)
                proof = self._prove(staging)
                self._write_reports(staging, proof)
            staging.publish(self._names(staging))
        finally:
            staging.close()
            self.model.close()
        done = report_line(self.options.output_dir, "proof")
        assert done is not None, "it was written just now, or before the files began to move"
        say(
            f"{self.options.output_dir}: perplexity {done['perplexity_before']:.4f} -> {done['perplexity_after']:.4f} "
            f"on {done['tokens']} tokens that were held back, divergence {done['kl_mean']:.5f} nats per token"
        )
        say(f"took {duration(time.monotonic() - self.begun)} and {self._peaks()} at most; layers: {REPORT}, {CHART}")
        return _finish(self.options, done, self.progress)

    def _preflight(self) -> bool:
        shapes = {name: linear.shape for name, linear in self.plan.linears.items()}
        stored = output.stored_bytes(self.plan.index, self.formats, shapes)
        windows = self.windows
        need = preflight.estimate(
            self.model, self.options, len(windows.measured), len(windows.held_back), windows.length, stored
        )
        self.progress.say(
            f"{self.options.title}: {self.num_blocks} blocks of {self.plan.settings.architecture}, "
            f"{len(self.formats)} linears to {self.options.scheme.method}; text: {windows.source}, "
            f"{len(windows.measured)} sequences of {windows.length} tokens, {len(windows.held_back)} held back"
        )
        staged = self.options.output_dir / FOLDER
        there = sum(path.stat().st_size for path in staged.glob("*.safetensors")) if staged.is_dir() else 0
        self._say_if_few_tokens()
        fit = preflight.check_fits(need, self.options, self.device, free_bytes(self.options.output_dir) + there)
        self.need, self.resting = fit.need, fit.resting
        measured = torch.tensor(windows.measured, dtype=torch.int64)
        self.need_s = preflight.seconds(self.model, self.options, measured, len(windows.held_back), fit.resting)
        self.progress.say(fit.need.line(self.device, self.need_s))
        if fit.spill:
            self.progress.say(f"activations ({gib(need.activations)}) are kept on the disk: memory would not suffice")
        return fit.spill

    def _say_if_few_tokens(self) -> None:
        """Second moments of fewer tokens than a layer has inputs say little of it."""
        tokens = len(self.windows.measured) * self.windows.length
        widest = max(self.plan.linears[name].shape.in_ for name in self.formats)
        if self.options.scheme.method in ("gptq", "awq") and tokens < widest:
            self.progress.say(
                f"the text has {tokens} tokens, fewer than the widest layer has inputs ({widest}): the result will be "
                "no better than rounding for other text; give more text, or a larger --num-samples"
            )

    def _walk(self, staging: Staging, spill: bool) -> None:
        windows = torch.tensor(self.windows.measured, dtype=torch.int64)
        file = staging.scratch("activations", self.need.activations) if spill else None
        activations = embed(self.model, windows, file)
        first = next((i for i in range(self.num_blocks) if not self._is_stored(staging, i)), self.num_blocks)
        if staging.resumed:
            self.progress.say(f"going on: {first} of {self.num_blocks} blocks are stored")
        solver = BlockSolver(
            self.model, self.options.scheme, self.options.solver, self.formats, self._tell, self.progress.say
        )
        for i, block in enumerate(self.model.decoder.blocks):
            if i < first:
                if first < self.num_blocks:
                    self._replay(staging, i, block)
                    Pass(self.model, block, activations).forward()
                    drop_block(self.model, block)
                continue
            self.progress.starts_block(i, first)
            load_block(self.model, block)
            sweep = Pass(self.model, block, activations, self.resting)
            result = solver.run(block, sweep)
            self._store(staging, self.shards[i + 1], self._tensors_of(block, result.tensors))
            rows = [report.row() for report in result.reports] + [{"kind": "order", "in_order": result.in_order}]
            # Written last: with it the block is stored.
            rows.append({"kind": "stored", "sha256": _sha256(staging.path(self.shards[i + 1]))})
            write_text(staging.path(rows_name(i)), "".join(json.dumps(row) + "\n" for row in rows))
            del result
            if i + 1 < self.num_blocks:
                sweep.forward()
            del sweep
            drop_block(self.model, block)
            self.device.trim()
            self.progress.ends_block()
        del activations
        staging.drop_scratch()
        self.device.trim()
        self.device.release()

    def _tell(self, report: LayerReport) -> None:
        self.progress.layer(report.layer, report.error_before, report.error_after, report.seconds)

    def _is_stored(self, staging: Staging, i: int) -> bool:
        """Whether a block is there as it was written; says so if it is not any more."""
        rows, shard = report_lines(staging.path(rows_name(i))), staging.path(self.shards[i + 1])
        if any(row.get("kind") == "stored" and shard.is_file() and row.get("sha256") == _sha256(shard) for row in rows):
            return True
        if staging.has(rows_name(i)):
            self.progress.say(f"block {i + 1} is not as it was stored; it and those behind it are made again")
        return False

    def _replay(self, staging: Staging, i: int, block: Any) -> None:
        """Brings a block as it was stored by an earlier run."""
        done = Checkpoint(read_header(staging.path(self.shards[i + 1])))

        def format_of(name: str) -> StoredLinear:
            shape = self.plan.linears[name].shape
            return StoredLinear(shape, self.formats[name]) if name in self.formats else self.plan.linears[name]

        try:
            load_finished(self.model, block, done, format_of)
        finally:
            done.close()

    def _tensors_of(self, block: Any, changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All of a block's tensors, those that are not changed as the checkpoint has them."""
        prefix = block_prefix(self.model.recorded_in(block))
        kept = [name for name in self._tensors if name.startswith(prefix) and not self._is_replaced(name)]
        return {name: self.model.checkpoint[name].read() for name in kept if name not in changed} | dict(changed)

    def _is_replaced(self, name: str) -> bool:
        return name.endswith(".weight") and name.removesuffix(".weight") in self.formats

    @cached_property
    def _tensors(self) -> list[str]:
        """Every tensor that the model reads."""
        plan = self.plan
        return check_tensors(plan.index, plan.linears, plan.settings, plan.model_dir)

    def _store(self, staging: Staging, name: str, tensors: Mapping[str, Tensor]) -> None:
        contiguous = {key: tensor.contiguous() for key, tensor in sorted(tensors.items())}
        write_durably(staging.path(name), lambda partial: save_file(contiguous, partial, metadata={"format": "pt"}))

    def _write_rest(self, staging: Staging) -> None:
        """What is in no block: the embedding before, norm and head behind; then everything that is not a weight."""
        prefixes = tuple(block_prefix(self.model.recorded_in(block)) for block in self.model.decoder.blocks)
        outside = [name for name in self._tensors if not name.startswith(prefixes)]
        first = [name for name in outside if "embed" in name] or outside[:1]
        for shard, names in ((self.shards[0], first), (self.shards[-1], [n for n in outside if n not in first])):
            self._store(staging, shard, {name: self.model.checkpoint[name].read() for name in names})
        output.write_index(staging, self.shards)
        output.copy_companions(self.plan.model_dir, staging)
        dense = [name for name in self.plan.linears if name not in self.formats and name != HEAD]
        in_order = all(row["in_order"] for row in self._rows(staging, "order"))
        stored = next(info.dtype for name, info in self.plan.index.items() if self._is_replaced(name))
        compute = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[stored]
        settings = quantization_config(self.options.scheme, self.options.solver, dense, in_order, __version__, compute)
        output.write_configs(self.plan.model_dir, staging, settings)

    def _rows(self, staging: Staging, kind: str) -> Rows:
        lines = [line for i in range(self.num_blocks) for line in report_lines(staging.path(rows_name(i)))]
        return [line for line in lines if line["kind"] == kind]

    def _prove(self, staging: Staging) -> Proof:
        """Reads the files back as a server does."""
        self.progress.say("reading the result back and comparing it on the text that was held back")
        self.model.close()
        original = open_model(self.plan, self.device, self.windows.length)
        result = open_model(plan_model(staging.folder, world_size=1), self.device, self.windows.length)
        self.model = original
        try:
            held_back = torch.tensor(self.windows.held_back, dtype=torch.int64)
            return prove(original, result, held_back, self.progress.compares)
        finally:
            result.close()

    def _write_reports(self, staging: Staging, proof: Proof) -> None:
        rows = self._rows(staging, "layer")
        output.write_card(staging, self.options, self.run, rows, proof)
        output.write_chart(staging, rows)
        peaks = {
            "host_estimate": self.need.host, "host_peak": self.progress.watch.peak,
            "device_estimate": self.need.device, "device_peak": self.device.peak_bytes(),
        }  # fmt: skip
        seconds = {"estimate": self.need_s, "walk": self.walked_s, "all": time.monotonic() - self.begun}
        files = {name: staging.path(name).stat().st_size for name in self._names(staging) if name != REPORT}
        line = {
            "kind": "proof", **asdict(proof), "increase": proof.increase, "memory": peaks, "seconds": seconds,
            "files": files,
        }  # fmt: skip
        output.write_report(staging, self.run, rows, line)

    def _peaks(self) -> str:
        host = f"{gib(self.progress.watch.peak)} of host memory"
        return host if self.device.is_host else f"{gib(self.device.peak_bytes())} of {self.device.name}, {host}"

    def _names(self, staging: Staging) -> list[str]:
        """All of the result, config.json last."""
        beside = output.companions(self.plan.model_dir)
        others = {INDEX_NAME, output.QUANTIZE_CONFIG, output.CARD, CHART, REPORT, *(path.name for path in beside)}
        return [*self.shards, *sorted(others), CONFIG_NAME]


def rows_name(block: int) -> str:
    """The file of a block's report."""
    return f"rows-{block:05d}.jsonl"
