"""Measure our 4-bit kernels and server beside llama.cpp and OpenVINO GenAI, on a model of TinyLlama's dimensions.

Random weights of one seed, made here: as a gptq checkpoint (4 bits, groups of 128, head in bfloat16) for us, as GGUF for
llama.cpp. Its Q4_0 has groups of 32; it is measured with the head in bfloat16, as ours, and with the head that its own
quantizer chooses. OpenVINO GenAI has groups of 128 and its usual head, of 8 bits.

  decode, prefill   one process each, no HTTP: a token after 32 others; a prompt of 2,048 tokens
  clients           each sends its next request when it has its answer: prompts of about 128 tokens, answers of 128; through
                    HTTP but for OpenVINO GenAI, whose continuous batching has no server

Sides take turns. What memory allows: a step reads every weight once, at the speed at which our process reads memory beside
its turn. See README.md for how to get the peers.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import quantized
import roofs

START_TIMEOUT_S = 300.0
PORTS = {"ours": 18420, "llama.cpp": 18421}
OURS, SAME_HEAD, OWN_HEAD, OPENVINO = "ours", "llama.cpp Q4_0, head as ours", "llama.cpp Q4_0", "OpenVINO GenAI"
CONTEXT, PROMPT, ANSWER = 32, 2048, 128
WHAT = {"decode": f"Decode of one sequence, after {CONTEXT} tokens", "prefill": f"Prefill of {PROMPT} tokens"}
CHECKPOINT = "gptq-4-128"
PROMPT_CHARACTERS = 128  # each of which this tokenizer makes a token of


def servable(folder: Path) -> Path:
    """A gptq checkpoint in `folder`, made if it is not there, with the shipped tokenizer filled up; no token ends an answer."""
    model = folder / CHECKPOINT
    if not (model / "tokenizer.json").exists():
        quantized.make_checkpoint(CHECKPOINT, model)
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if (common.SHIPPED_MODEL / name).exists():
                settings = json.loads((common.SHIPPED_MODEL / name).read_text())
                settings.pop("eos_token", None)
                (model / name).write_text(json.dumps(settings))
        command: list[str | Path] = [common.BENCHMARK, "extend-tokenizer", "--vocab-size", "32000"]
        command += ["--tokenizer", common.SHIPPED_MODEL / "tokenizer.json", "--output", model / "tokenizer.json"]
        subprocess.run(command, check=True, timeout=60)
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    return model


def write_gguf(target: Path, tokenizer: Path) -> None:
    """In the peer's environment: the model in float16, with random weights of the spread that the others have."""
    import gguf  # type: ignore[import-not-found,unused-ignore]
    import numpy as np

    config = quantized.TINY_LLAMA
    hidden, heads, kv_heads = 2048, 32, 4
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(config["vocab_size"])
    words = json.loads(tokenizer.read_text())
    by_id = {number: word for word, number in words["model"]["vocab"].items()}
    by_id |= {word["id"]: word["content"] for word in words["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([by_id.get(n, f"<unused{n}>") for n in range(config["vocab_size"])])
    writer.add_token_types([gguf.TokenType.NORMAL] * config["vocab_size"])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in words["model"]["merges"]])
    writer.add_eos_token_id(config["vocab_size"] - 1)
    writer.add_add_bos_token(False)
    generator = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        values = (
            generator.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
            if len(shape) > 1
            else np.ones(shape, np.float32)
        )
        writer.add_tensor(name, values.astype(np.float16) if len(shape) > 1 else values)

    add("token_embd.weight", config["vocab_size"], hidden)
    add("output.weight", config["vocab_size"], hidden)
    add("output_norm.weight", hidden)
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
             "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}  # fmt: skip
    for layer in range(config["num_hidden_layers"]):
        add(f"blk.{layer}.attn_norm.weight", hidden)
        add(f"blk.{layer}.ffn_norm.weight", hidden)
        for linear, shape in quantized.linears().items():
            add(f"blk.{layer}.{names[linear.partition('.')[2]]}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def work_openvino(file: Path, threads: int) -> None:
    """In the peer's environment: load the file, then answer `decode` and `prefill` with tokens per second."""
    import openvino_genai  # type: ignore[import-not-found,unused-ignore]

    pipeline = openvino_genai.LLMPipeline(
        str(file), "CPU", INFERENCE_NUM_THREADS=threads, PERFORMANCE_HINT="LATENCY", ENABLE_MMAP=True
    )
    print("ready", flush=True)
    settings = openvino_genai.GenerationConfig()
    settings.ignore_eos, settings.do_sample, settings.apply_chat_template = True, False, False
    for turn, line in enumerate(sys.stdin):
        # Other words each time, so that nothing of an earlier prompt can be used again.
        command, length = line.split()
        settings.max_new_tokens = 64 if command == "decode" else 2
        prompt = " ".join(f"{turn} {n}" for n in range(int(length)))[: int(length) * 2]
        metrics = pipeline.generate([prompt], settings).perf_metrics
        if command == "decode":
            speed = 1e3 / metrics.get_tpot().mean
        else:
            speed = metrics.get_num_input_tokens() / metrics.get_ttft().mean * 1e3
        print(json.dumps({"tokens_per_s": speed, "tokens": metrics.get_num_input_tokens()}), flush=True)


def work_openvino_clients(file: Path, threads: int, streams: int, requests: int) -> None:
    """In the peer's environment: its continuous batching, each of `streams` clients `requests` times; prints a report."""
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_seqs, scheduler.cache_size, scheduler.dynamic_split_fuse = streams, 2, True
    scheduler.enable_prefix_caching = False
    pipeline = openvino_genai.ContinuousBatchingPipeline(
        str(file), scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "THROUGHPUT"}
    )
    settings = openvino_genai.GenerationConfig()
    settings.ignore_eos, settings.do_sample, settings.max_new_tokens = True, False, ANSWER
    settings.apply_chat_template = False
    gaps: list[float] = []

    def run(turns: int, first: int) -> float:
        """Seconds. Who has an answer asks again; words differ, so that nothing can be used again."""
        asked, handles = 0, []
        begun = last = time.perf_counter()
        while True:
            handles = [handle for handle in handles if handle.get_status() == openvino_genai.GenerationStatus.RUNNING]
            while len(handles) < streams and asked < turns * streams:
                prompt = " ".join(f"{first + asked} {n}" for n in range(110))[:PROMPT_CHARACTERS]
                handles.append(pipeline.add_request(first + asked, prompt, settings))
                asked += 1
            if not handles:
                return time.perf_counter() - begun
            pipeline.step()
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    run(1, 0)
    gaps.clear()
    seconds = run(requests, streams)
    cuts = statistics.quantiles(gaps, n=100)
    print(json.dumps({
        "tokens_per_s": requests * streams * ANSWER / seconds, "short_answers": 0, "failed": 0,
        "between_tokens": {"p50_ms": 1e3 * cuts[49], "p99_ms": 1e3 * cuts[98]},
    }))  # fmt: skip


class Bench:
    """The sides that are there."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        """Make the models in `folder`."""
        self.arguments, self.folder, self.threads = arguments, folder, len(os.sched_getaffinity(0))
        self.ours = servable(folder)
        self.files = {SAME_HEAD: folder / "same-head.gguf", OWN_HEAD: folder / "own-head.gguf"}
        self.openvino = folder / "openvino"
        if OPENVINO in arguments.sides and not (self.openvino / "openvino_model.xml").exists():
            self._export(folder / "bf16")
        plain = folder / "plain.gguf"
        if not all(file.exists() for file in self.files.values()):
            command = [arguments.peer_python, __file__, "--role", "gguf", "--file", plain]
            subprocess.run([*command, "--tokenizer", self.ours / "tokenizer.json"], check=True, timeout=600)
            for side, flags in (
                (SAME_HEAD, ["--output-tensor-type", "bf16", "--token-embedding-type", "bf16"]),
                (OWN_HEAD, []),
            ):
                command = [
                    arguments.llama_cpp / "llama-quantize",
                    *flags,
                    plain,
                    self.files[side],
                    "Q4_0",
                    str(self.threads),
                ]
                subprocess.run(command, check=True, timeout=600, capture_output=True)
            plain.unlink()

    def _export(self, dense: Path) -> None:
        """The model as OpenVINO has it, from a checkpoint in bfloat16."""
        if not dense.exists():
            quantized.make_checkpoint("bf16", dense)
        for path in self.ours.glob("*token*.json"):
            shutil.copy(path, dense / path.name)
        command = [Path(self.arguments.peer_python).parent / "optimum-cli", "export", "openvino", "--model", dense]
        command += ["--task", "text-generation-with-past", "--weight-format", "int4", "--group-size", "128", "--sym"]
        command += ["--ratio", "1.0", self.openvino]
        subprocess.run(command, check=True, timeout=1200, env={**os.environ, "HF_HUB_OFFLINE": "1"})

    def alone(self, side: str, server: common.Server | None, what: str) -> dict[str, float]:
        """Tokens per second of `decode` or of `prefill`; of ours, what share that is of what its process read."""
        if side == OURS:
            assert server is not None
            tokens = 1 if what == "decode" else PROMPT
            server.write_line(f"{what} 1 {CONTEXT if what == 'decode' else PROMPT}")
            answer = json.loads(server.read_line(START_TIMEOUT_S))
            share = self.step_bytes / answer["read"] / answer["s"]
            return {"tokens_per_s": tokens / answer["s"], "share": share, "read": answer["read"]}
        if side == OPENVINO:
            assert server is not None
            server.write_line(f"{what} {CONTEXT if what == 'decode' else PROMPT}")
            return {"tokens_per_s": json.loads(server.read_line(START_TIMEOUT_S))["tokens_per_s"]}
        command = [self.arguments.llama_cpp / "llama-bench", "-m", self.files[side], "-t", str(self.threads), "-r", "1"]
        command += ["-p", "0", "-n", "64"] if what == "decode" else ["-p", str(PROMPT), "-n", "0"]
        done = subprocess.run([*command, "-o", "json"], check=True, timeout=600, capture_output=True, text=True)
        return {"tokens_per_s": json.loads(done.stdout)[0]["avg_ts"]}

    def start(self, side: str) -> common.Server | None:
        """A process that keeps its model, for the sides that have one."""
        if side == OURS:
            command = [sys.executable, quantized.__file__, "--work", self.ours, "--threads", str(self.threads)]
            server = common.Server([*command, "--quantize", "", "--dtype", "bfloat16"], log=self.folder / "ours.log")
            loaded = json.loads(server.read_line(START_TIMEOUT_S))
            self.step_bytes = quantized.step_bytes(quantized.SIDES["gptq 4 bits g128"], loaded["plan_bytes"])
            return server
        if side == OPENVINO:
            command = [self.arguments.peer_python, __file__, "--role", "openvino", "--file", self.openvino]
            server = common.Server([*command, "--threads", str(self.threads)], log=self.folder / "openvino.log")
            server.read_line(START_TIMEOUT_S)
            return server
        return None

    def clients(self, side: str, streams: int) -> common.Report:
        """Through HTTP; OpenVINO GenAI, which has no server, in its process."""
        if side == OPENVINO:
            command: list[Any] = [
                self.arguments.peer_python,
                __file__,
                "--role",
                "openvino-clients",
                "--file",
                self.openvino,
            ]
            command += ["--threads", self.threads, "--streams", streams, "--requests", self.arguments.requests]
            done = subprocess.run(list(map(str, command)), check=True, timeout=600, capture_output=True, text=True)
            report: common.Report = json.loads(done.stdout.splitlines()[-1])
            return report
        if side == OURS:
            port, api = PORTS["ours"], "generate-stream"
            command = [
                common.ROOT / ".venv" / "bin" / "text-generation-launcher",
                "--model-id",
                self.ours,
            ]
            command += ["--hostname", "127.0.0.1", "--port", str(port)]
        else:
            port, api = PORTS["llama.cpp"], "openai"
            command = [
                self.arguments.llama_cpp / "llama-server",
                "-m",
                self.files[side],
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
            ]
            command += [
                "-t",
                str(self.threads),
                "-np",
                str(streams),
                "-c",
                str(streams * 512),
                "--no-webui",
                "--no-warmup",
                # It answers no more connections at once than it has threads for.
                "--threads-http",
                str(4 * streams),
            ]
        log = self.folder / f"{port}.log"
        with common.Server(command, log=log, speaks=False) as server:
            server.wait_until_healthy(f"http://127.0.0.1:{port}/health", START_TIMEOUT_S)
            return common.load(
                f"127.0.0.1:{port}",
                *("--api", api, "--model", "model", "--streams", str(streams), "--words", "110"),
                *("--requests", str(streams * self.arguments.requests), "--warmup", str(streams)),
                *("--max-new-tokens", str(ANSWER), "--duration", "240", "--timeout", "300"),
                may_fail=side != OURS,
            )


def arithmetic_roof(operations: dict[str, float]) -> float:
    """Answered tokens per second if every product ran at the processor's peak. Prompts go through all blocks, not the head.

    operations: a second, by kind.
    """
    config = quantized.TINY_LLAMA
    hidden, size = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    block = 2 * hidden**2 + 2 * kv * hidden + 3 * size * hidden
    brain = max(value for kind, value in operations.items() if kind != "vnni")
    seconds = 4 * block * config["num_hidden_layers"] / max(operations.values())
    return 1 / (seconds + 2 * config["vocab_size"] * hidden / brain)


def measure(arguments: argparse.Namespace, folder: Path) -> str:
    """All rounds, and the tables."""
    bench = Bench(arguments, folder)
    sides = [side for side in (OURS, SAME_HEAD, OWN_HEAD, OPENVINO) if side in arguments.sides]
    operations = roofs.Roof(bench.threads).operations()
    servers: dict[str, common.Server | None] = {}
    alone: dict[str, dict[str, list[dict[str, float]]]] = {what: {side: [] for side in sides} for what in WHAT}
    try:
        servers = {side: bench.start(side) for side in sides}
        for what, turns in (("decode", arguments.turns), ("prefill", arguments.rounds)):
            for turn in range(turns):
                for side in sides:
                    found = bench.alone(side, servers[side], what)
                    alone[what][side].append(found)
                    print(f"{what}, turn {turn + 1}: {side}: {found}", file=sys.stderr, flush=True)
    finally:
        for server in servers.values():
            if server is not None:
                server.__exit__(None, None, None)
    parts = []
    for what, title in WHAT.items():
        rows = []
        for side in sides:
            speeds = [run["tokens_per_s"] for run in alone[what][side]]
            ours = [run["tokens_per_s"] for run in alone[what][OURS]]
            row = [side, common.spread(speeds, 1), common.spread([a / b for a, b in zip(ours, speeds, strict=True)], 2)]
            if what == "decode":
                row.append(common.spread([run["share"] for run in alone[what][side]], 2) if side == OURS else "")
            rows.append(row)
        head = ["", "tokens/s", "ours ÷ this, turn by turn", *(["of what memory allows"] if what == "decode" else [])]
        parts += [f"## {title}\n", common.table(head, rows), ""]
    runs: dict[str, list[common.Report]] = {side: [] for side in sides}
    for turn in range(arguments.rounds):
        for side in runs:
            runs[side].append(bench.clients(side, arguments.streams))
            print(
                f"round {turn + 1}: {side}: {runs[side][-1]['tokens_per_s']:.1f} tokens/s", file=sys.stderr, flush=True
            )
    rows = []
    for side, reports in runs.items():
        speeds = [report["tokens_per_s"] for report in reports]
        ratios = [mine["tokens_per_s"] / other["tokens_per_s"] for mine, other in zip(runs[OURS], reports, strict=True)]
        between = [
            statistics.median(report["between_tokens"][column] for report in reports) for column in ("p50_ms", "p99_ms")
        ]
        lost = (sum(report[what] for report in reports) for what in ("short_answers", "failed"))
        one = statistics.median(run["tokens_per_s"] for run in alone["decode"][side])
        rows.append([side, common.spread(speeds, 1), common.spread(ratios, 2), f"{statistics.median(speeds) / one:.1f}",
                     *(f"{ms:.0f}" for ms in between), *lost])  # fmt: skip
    head = ["", "tokens/s", "ours ÷ this", "÷ its decode of one", "between tokens p50 ms", "p99 ms", "short answers",
            "failed"]  # fmt: skip
    parts += [
        f"## {arguments.streams} clients, about 128 tokens in, {ANSWER} out\n",
        common.table(head, rows),
        "",
    ]
    parts.append(
        f"{bench.threads} threads each; if every product ran at the processor's peak, clients would get "
        f"{arithmetic_roof(operations):.0f} tokens/s. A step of ours reads {bench.step_bytes / 2**20:.0f} MiB; our process read "
        f"memory at {common.spread([run['read'] / 1e9 for run in alone['decode'][OURS]], 1)} GB/s beside its turns. Files of the peers: "
        + ", ".join(f"{side} {file.stat().st_size / 2**20:.0f} MiB" for side, file in bench.files.items())
        + f". llama.cpp: {_version(arguments.llama_cpp)}; its server has as many slots as there are clients."
    )
    return "\n".join(parts)


def _version(folder: Path) -> str:
    done = subprocess.run(
        [folder / "llama-server", "--version"], capture_output=True, text=True, timeout=30, check=False
    )
    return " ".join((done.stdout + done.stderr).split("built")[0].split())


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--llama-cpp", type=Path, default=Path("target/peers/llama.cpp/bin"), help="folder of llama.cpp's programs"
    )
    parser.add_argument(
        "--peer-python", default="target/peers/openvino/bin/python", help="has openvino-genai, optimum-intel and gguf"
    )
    every = [OURS, SAME_HEAD, OWN_HEAD, OPENVINO]
    parser.add_argument("--sides", nargs="+", choices=every, default=every, help="ours among them")
    parser.add_argument(
        "--turns", type=int, default=12, help="of decode: short ones, as memory is fast and slow by turns"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of prefill and of clients")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--requests", type=int, default=4, help="of each client")
    parser.add_argument("--folder", type=Path, help="where models are made and kept; by default they are removed")
    parser.add_argument("--name", default="peers", help="of the result's file (default: %(default)s)")
    parser.add_argument("--role", choices=["gguf", "openvino", "openvino-clients"], help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--tokenizer", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role == "gguf":
        write_gguf(arguments.file, arguments.tokenizer)
        return
    if arguments.role == "openvino":
        work_openvino(arguments.file, arguments.threads)
        return
    if arguments.role == "openvino-clients":
        work_openvino_clients(arguments.file, arguments.threads, arguments.streams, arguments.requests)
        return
    arguments.llama_cpp = arguments.llama_cpp.resolve()
    common.build("text-generation-benchmark")
    head = common.environment()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        body = measure(arguments, folder.resolve())
    common.write_result(arguments.name, "Beside llama.cpp and OpenVINO GenAI, 4 bits", head, body)


if __name__ == "__main__":
    main()
