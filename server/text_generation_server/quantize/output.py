"""The files beside the weights: index, configurations, tokenizer, model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..checkpoint.index import DTYPE_BYTES, INDEX_NAME, TensorInfo, read_header, read_json
from ..checkpoint.model_config import CONFIG_NAME
from ..quantization.format import WeightFormat
from ..quantization.spec import Along, Shape
from .settings import Options, Solver
from .staging import REPORT, Staging, write_durably, write_text

# What belongs to a model beside its weights and its configuration.
COPIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.jinja",
    "chat_template.json", "generation_config.json", "LICENSE*", "USE_POLICY*", "NOTICE*",
)  # fmt: skip
CARD, CHART, QUANTIZE_CONFIG = "README.md", "quantization_error.png", "quantize_config.json"


def shard_name(number: int, total: int) -> str:
    return f"model-{number:05d}-of-{total:05d}.safetensors"


def companions(model_dir: Path) -> list[Path]:
    """Files of tokenizer, generation config, chat template, licence."""
    return sorted({path for pattern in COPIED for path in model_dir.glob(pattern) if path.is_file()})


def copy_companions(model_dir: Path, staging: Staging) -> None:
    for path in companions(model_dir):
        write_durably(staging.path(path.name), partial(_copy, path))


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def write_index(staging: Staging, shards: Sequence[str]) -> None:
    """`model.safetensors.index.json`, from the headers of the shards."""
    weight_map: dict[str, str] = {}
    total = 0
    for shard in shards:
        for name, info in read_header(staging.path(shard)).items():
            weight_map[name] = shard
            total += info.num_bytes
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(staging.path(INDEX_NAME), json.dumps(index, indent=2) + "\n")


def write_configs(model_dir: Path, staging: Staging, quantization: Mapping[str, Any]) -> None:
    """config.json as it was, with what says how the weights are stored; the same in quantize_config.json."""
    config = read_json(model_dir / CONFIG_NAME) | {"quantization_config": quantization}
    write_text(staging.path(CONFIG_NAME), json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    write_text(staging.path(QUANTIZE_CONFIG), json.dumps(quantization, indent=2) + "\n")


@dataclass(frozen=True)
class Proof:
    """What the reloaded result does on text that was held back, beside the model that it was made from."""

    tokens: int
    perplexity_before: float
    perplexity_after: float
    kl_mean: float
    kl_largest: float

    @property
    def increase(self) -> float:
        return self.perplexity_after - self.perplexity_before


def write_card(staging: Staging, options: Options, run: Mapping[str, Any], rows: Sequence[Mapping[str, Any]],
               proof: Proof) -> None:  # fmt: skip
    """A model card. It says nothing that differs between two runs of one command, so no times."""
    scheme = options.scheme
    bits = ", ".join(f"{bits} bits: {pattern}" for pattern, bits in scheme.module_bits)
    group = "all of an output" if scheme.group_size == -1 else f"groups of {scheme.group_size}"
    facts = [
        ("method", scheme.method),
        ("bits", f"{scheme.bits}" + (f" ({bits})" if bits else "")),
        ("inputs that share a scale", "blocks of 64" if scheme.method in ("bitsandbytes-nf4", "bitsandbytes-fp4") else
         "one scale for each output" if scheme.method == "bitsandbytes" else group),
        ("zero points", "symmetric" if scheme.sym else "stored"),
        ("left as it is", ", ".join(["lm_head", *scheme.excluded])),
        ("calibration text", f"{run['text']['source']}, {run['text']['measured']} sequences of {run['text']['length']} "
                             f"tokens, seed {options.sampling.seed}"),
        ("made with", f"text-generation-server {run['machine']['version']}, torch {run['machine']['torch']}, "
                      f"{run['machine']['device']} in {run['machine']['dtype']}, {run['machine']['threads']} threads"),
    ]  # fmt: skip
    if scheme.method == "gptq":
        facts.insert(4, ("solver", _solver_in_words(options.solver)))
    layers = "\n".join(
        f"| {row['layer']} | {row['bits']} | {row['error_before']:.3e} | {row['error_after']:.3e} | "
        f"{'' if row['damping'] is None else format(row['damping'], 'g')} |"
        for row in rows
    )
    # Front matter as the hub reads it; the licence is that of the model that it was made from.
    base = f"base_model: {options.hub_id}\n" if options.hub_id else ""
    text = f"""---
{base}tags:
- quantized
- {scheme.method.split("-")[0]}
---

# {options.title.rsplit("/", 1)[-1]}, quantized ({scheme.method}, {scheme.bits} bits)

Made from {options.title}, whose licence holds for it too. To serve it:

    text-generation-launcher --model-id path/of/this/folder

| | |
|---|---|
{chr(10).join(f"| {name} | {value} |" for name, value in facts)}

## Result

On {proof.tokens} tokens of the calibration text that were held back, read back from these files:

| | original | quantized |
|---|---|---|
| perplexity | {proof.perplexity_before:.4f} | {proof.perplexity_after:.4f} |

Kullback-Leibler divergence of the next token: {proof.kl_mean:.5f} nats on average, {proof.kl_largest:.3f} at most.

## Layers

Relative squared error of the outputs on the calibration text: rounded to nearest, and as stored.

| layer | bits | to nearest | stored | damping |
|---|---|---|---|---|
{layers}
"""
    write_text(staging.path(CARD), text)


def _solver_in_words(solver: Solver) -> str:
    switches = {
        "act-order": solver.act_order,
        "static groups": solver.static_groups,
        "ranges by search": solver.mse,
    }
    chosen = ", ".join(f"{name}: {'yes' if value else 'no'}" for name, value in switches.items())
    return f"damping {solver.damping:g}, {chosen}"


def write_report(staging: Staging, run: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], proof: Mapping[str, Any],
                 ) -> None:  # fmt: skip
    """JSON lines: the run, each layer, the proof."""
    lines = [json.dumps(line) for line in (run, *rows, proof)]
    write_text(staging.path(REPORT), "\n".join(lines) + "\n")


def write_chart(staging: Staging, rows: Sequence[Mapping[str, Any]]) -> None:
    """A PNG of the error of every layer, before and after."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(row["layer"].rsplit(".", 1)[-1] for row in rows))
    figure = Figure(figsize=(10, 5))
    figure.subplots_adjust(left=0.12, right=0.98, bottom=0.11, top=0.93)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, kind in enumerate(kinds):
        of_kind = [(i, row) for i, row in enumerate(rows) if row["layer"].rsplit(".", 1)[-1] == kind]
        places = [i for i, _ in of_kind]
        colour = f"C{number % 10}"
        axes.plot(
            places, [row["error_after"] for _, row in of_kind], color=colour, marker="o", markersize=3, label=kind
        )
        axes.plot(places, [row["error_before"] for _, row in of_kind], color=colour, linestyle=":", linewidth=1)
    axes.set_yscale("log")
    axes.set_xlabel("layers, in the order of the model")
    axes.set_ylabel("relative squared error of the outputs")
    axes.set_title("as stored (solid), rounded to nearest (dotted)")
    axes.legend(fontsize="small", ncols=2)
    write_durably(staging.path(CHART), lambda path: figure.savefig(path, format="png", dpi=100, metadata={
        "Software": None,
    }))  # fmt: skip


def stored_bytes(
    index: Mapping[str, TensorInfo], formats: Mapping[str, WeightFormat], shapes: Mapping[str, Shape]
) -> int:
    """Bytes of the result's weights."""
    replaced = {f"{name}.weight" for name in formats}
    total = sum(info.num_bytes for name, info in index.items() if name not in replaced)
    for name, format_ in formats.items():
        for spec in format_.specs(shapes[name]):
            sizes = [axis.size(shapes[name]) if axis.along is not Along.NEITHER else max(axis.elements, 1)
                     for axis in spec.axes]  # fmt: skip
            count = 1
            for size in sizes:
                count *= size
            # Scales of all these formats are float16, or float32 where no other type may be.
            total += count * min(DTYPE_BYTES[dtype] for dtype in spec.dtypes)
    return total
