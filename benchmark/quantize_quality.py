"""Compare the quantizer with GPTQModel: perplexity of the results, and time, on the same model and the same text.

Both sides are given the same token ids, cut from the calibration text that is bundled. Results are read by one reader
(the server's), dequantized into transformers in float32, and judged on a text that neither has seen
(server/tests/texts/eval_public.txt, windows of 512 tokens). Each run is a process of its own; its time is from the call
to the last file, without the imports, and ours contains the comparison at the end that the peer does not make.
GPTQModel then loads what we made, by itself and through transformers, and its logits are compared with those of the same
weights in float32.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

MODEL = common.SHIPPED_MODEL
TEXT = common.ROOT / "server" / "tests" / "texts" / "eval_public.txt"
WINDOW = 512
TIMEOUT_S = 1800.0
# Perplexity may grow by so many times what the peer's grows by.
QUALITY_LIMIT, TIME_LIMIT = 1.02, 1.0
LOGITS_LIMIT = 1e-2
# How OpenMP's threads wait for each other, of both sides.
WAITS = {
    "brief": "spinning a thousand times, then asleep (GOMP_SPINCOUNT)",
    "passive": "asleep (OMP_WAIT_POLICY)",
    "active": "spinning (OMP_WAIT_POLICY)",
}
Settings = dict[str, Any]

# Name -> our flags, the peer's settings (None: it has no such thing).
CASES: dict[str, tuple[list[str], Settings | None]] = {
    "gptq 4 bits g128, in order": (["--no-act-order"], {"bits": 4, "desc_act": False, "act_group_aware": False}),
    "gptq 4 bits g128, by activation, groups in order": ([], {"bits": 4, "desc_act": False}),
    "gptq 4 bits g128, act-order": (["--no-static-groups"], {"bits": 4, "desc_act": True, "act_group_aware": False}),
    "gptq 3 bits g128, by activation, groups in order": (["--bits", "3"], {"bits": 3, "desc_act": False}),
    "gptq 3 bits g128, act-order": (
        ["--bits", "3", "--no-static-groups"],
        {"bits": 3, "desc_act": True, "act_group_aware": False},
    ),
    "awq 4 bits g128": (["--method", "awq"], {"bits": 4, "method": "awq"}),
    "to nearest 4 bits g128": (["--method", "rtn", "--no-mse"], None),
    "to nearest 3 bits g128": (["--method", "rtn", "--bits", "3", "--no-mse"], None),
}

# What is measured in one go, and written into a table of its own.
GROUPS = {
    "all": list(CASES),
    "4bits": [name for name in CASES if " 4 bits" in name and "awq" not in name],
    "3bits": [name for name in CASES if " 3 bits" in name],
    "awq": [name for name in CASES if "awq" in name] + ["to nearest 4 bits g128"],
}


def environment(arguments: argparse.Namespace) -> dict[str, str]:
    """Of both sides. The peer looks for things on the network unless told not to, and needs two workers to begin."""
    own = {"OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    # The peer sets nothing by itself; it is given what our command sets.
    own |= {"GOMP_SPINCOUNT": "1000"} if arguments.wait == "brief" else {"OMP_WAIT_POLICY": arguments.wait}
    return {**os.environ, **own, "GPTQMODEL_CPU_WORKERS": str(max(2, arguments.threads))}


def cut(length: int, samples: int) -> list[list[int]]:
    """The sequences that our command takes of the bundled text, with seed 0."""
    from text_generation_server.quantize.documents import open_documents
    from text_generation_server.quantize.settings import Sampling
    from text_generation_server.quantize.windows import make_windows

    sampling = Sampling(num_samples=samples, length=length)
    return make_windows(open_documents(None, MODEL), MODEL, sampling, 2048, 4096).measured


def ours(arguments: argparse.Namespace, output: Path, flags: list[str]) -> float:
    """Seconds of the command, without starting Python and importing torch."""
    program = (
        # The command prepares the environment before it imports torch too.
        "from text_generation_server.config import prepare_environment\n"
        "prepare_environment(serves=False)\n"
        "import sys, time, torch, matplotlib.figure, text_generation_server.quantize.run\n"
        "from text_generation_server.cli import app\n"
        "begun = time.perf_counter()\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "print(time.perf_counter() - begun)\n"
    )
    command = [
        sys.executable,
        "-c",
        program,
        "quantize",
        str(MODEL),
        str(output),
        *flags,
        "--num-threads",
        str(arguments.threads),
    ]
    command += ["--num-samples", str(arguments.samples), "--sequence-length", str(arguments.length)]
    return float(run(command, arguments).splitlines()[-1])


def peer(arguments: argparse.Namespace, output: Path, settings: Settings, ids: Path) -> float:
    """Seconds of loading, quantizing and saving, without imports."""
    command = [arguments.peer_python, __file__, "--peer", json.dumps(settings), str(MODEL), str(output), str(ids)]
    return float(run(command, arguments).splitlines()[-1])


def run(command: list[str], arguments: argparse.Namespace, **more: str) -> str:
    settings = environment(arguments) | more
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=settings, check=False)
    if done.returncode:
        raise common.MeasureError(f"{command[:3]} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def as_peer(settings: Settings, model: str, output: str, ids: str) -> None:
    """In the peer's interpreter: quantize and save, and print the seconds."""
    import torch
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    windows = json.loads(Path(ids).read_text())
    calibration = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in windows]
    if settings.get("method") == "awq":
        settings |= {"format": "gemm", "sym": False}
    backend = BACKEND.AWQ_TORCH if settings.get("method") == "awq" else BACKEND.GPTQ_TORCH
    begun = time.perf_counter()
    # In the type that it takes by itself; float32 it does not do.
    quantizer = GPTQModel.load(model, QuantizeConfig(group_size=128, **settings), device="cpu", backend=backend)
    quantizer.quantize(calibration, batch_size=4, backend=backend)
    quantizer.save(output)
    print(time.perf_counter() - begun)


def logits_as_peer(folder: str, ids: str, output: str) -> None:
    """In the peer's interpreter: load a result, alone and through transformers, and write some sequences' logits."""
    import torch
    import transformers
    from gptqmodel import BACKEND, GPTQModel
    from safetensors.torch import save_file

    method = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]["quant_method"]
    backend = BACKEND.AWQ_TORCH if method == "awq" else BACKEND.GPTQ_TORCH
    windows = json.loads(Path(ids).read_text())
    found = {}
    for reader in ("gptqmodel", "transformers"):
        if reader == "gptqmodel":
            model = GPTQModel.load(folder, device="cpu", backend=backend, dtype=torch.float16)
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float16)
        with torch.no_grad():
            logits = [model(input_ids=torch.tensor([window])).logits[0].float() for window in windows]
        found[reader] = torch.stack(logits)
    save_file(found, output)


def dequantized(folder: Path) -> Any:
    """A model of transformers in float32, with the weights as the server reads them."""
    import torch
    import transformers
    from text_generation_server.checkpoint.tensors import Checkpoint
    from text_generation_server.planning import plan_model
    from text_generation_server.quantize.recording import read_dense

    plan = plan_model(folder, world_size=1)
    checkpoint = Checkpoint(plan.index)
    config = transformers.AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.float32).eval()
    state = {f"{name}.weight": read_dense(checkpoint, name, linear) for name, linear in plan.linears.items()}
    state |= {n: checkpoint[n].read().float() for n in model.state_dict() if n not in state and n in checkpoint}
    model.load_state_dict(state, strict=False)
    return model


def evaluation_windows() -> list[list[int]]:
    """The text as the shipped references cut it: every document between <s> and </s>, joined."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    ids: list[int] = []
    for document in TEXT.read_text().split("\n%%%%\n"):
        ids += [1, *tokenizer.encode(document.strip("\n"), add_special_tokens=False).ids, 2]
    return [ids[first : first + WINDOW] for first in range(0, len(ids) - WINDOW + 1, WINDOW)]


def perplexity(model: Any, windows: list[list[int]]) -> float:
    """Of all tokens but the first of each window."""
    import torch

    total = 0.0
    with torch.no_grad():
        for first in range(0, len(windows), 8):
            ids = torch.tensor(windows[first : first + 8])
            logs = model(ids).logits[:, :-1].log_softmax(-1)
            total -= float(logs.gather(2, ids[:, 1:, None]).sum(dtype=torch.float64))
    return math.exp(total / (len(windows) * (WINDOW - 1)))


def same_logits(
    arguments: argparse.Namespace, folder: Path, model: Any, windows: list[list[int]], scratch: Path
) -> float:
    """How far the peer's logits of our result, in float16, are from those in float32 of the same weights, relative."""
    import torch
    from safetensors.torch import load_file

    ids, out = scratch / "eval.json", scratch / f"{folder.name}.logits"
    ids.write_text(json.dumps(windows[:2]))
    # Reading is not timed: without compiling for each shape, which takes a minute.
    command = [arguments.peer_python, __file__, "--peer-logits", str(folder), str(ids), str(out)]
    run(command, arguments, TORCHDYNAMO_DISABLE="1")
    with torch.no_grad():
        expected = torch.stack([model(torch.tensor([window])).logits[0] for window in windows[:2]])
    return max(float((logits - expected).norm() / expected.norm()) for logits in load_file(out).values())


def measure(arguments: argparse.Namespace, scratch: Path, environment_table: str) -> bool:
    """Write the result after every case; whether the limits held."""
    import torch

    torch.set_num_threads(arguments.threads)
    windows = evaluation_windows()
    ids = scratch / "ids.json"
    ids.write_text(json.dumps(cut(arguments.length, arguments.samples)))
    base = perplexity(dequantized(MODEL), windows)
    rows, held = [], True
    grown: dict[str, float] = {}
    for number, name in enumerate(arguments.cases):
        flags, settings = CASES[name]
        own_times, peer_times = [], []
        for turn in range(arguments.rounds):
            mine, theirs = scratch / f"ours-{number}-{turn}", scratch / f"peer-{number}-{turn}"
            own_times.append(ours(arguments, mine, flags))
            if settings is not None and arguments.peer_python:
                peer_times.append(peer(arguments, theirs, settings, ids))
        result = dequantized(mine)
        own = grown[name] = perplexity(result, windows) - base
        row = [name, f"{base + own:.4f}", f"{own:+.4f}"]
        if peer_times:
            other = perplexity(dequantized(theirs), windows) - base
            ratio, speed = own / other, statistics.median(a / b for a, b in zip(peer_times, own_times, strict=True))
            try:
                difference = same_logits(arguments, mine, result, windows, scratch)
            except common.MeasureError as error:
                print(error, file=sys.stderr, flush=True)
                difference = math.inf
            ok = ratio <= QUALITY_LIMIT and speed >= TIME_LIMIT and difference <= LOGITS_LIMIT
            held &= ok
            row += [f"{other:+.4f}", f"{ratio:.3f}", common.spread(own_times, 2), common.spread(peer_times, 2),
                    f"{speed:.2f}", f"{difference:.1e}", "held" if ok else "NOT HELD"]  # fmt: skip
        else:
            row += ["", "", common.spread(own_times, 2), "", "", "", ""]
        rows.append(row)
        body = report(arguments, base, rows, grown, held)
        common.write_result(arguments.result, "The quantizer beside GPTQModel", environment_table, body)
    return held


def report(
    arguments: argparse.Namespace, base: float, rows: list[list[str]], grown: dict[str, float], held: bool
) -> str:
    """The table in markdown, of the cases that are done."""
    head = ["", "perplexity", "grown by", "the peer's", "÷ the peer's", "seconds", "the peer's", "times as fast",
            "logits in GPTQModel and in transformers differ by", ""]  # fmt: skip
    nearest = [
        f"{grown[name] / grown[other]:.2f} ({name})"
        for name in grown
        for other in grown
        if other.startswith("to nearest")
        and name != other
        and name.split(" g128")[0][-6:] == other.split(" g128")[0][-6:]
    ]
    body = [
        f"The model without quantization: {base:.4f}. {arguments.samples} sequences of {arguments.length} tokens. "
        f"{arguments.threads} threads of OpenMP on both sides, which wait for each other: {WAITS[arguments.wait]}"
        f"{'; times are medians of ' + str(arguments.rounds) if arguments.rounds > 1 else ''}.\n",
        common.table(head, rows),
        f"\nWhat these grow by, ÷ what rounding to nearest with as many bits does: {'; '.join(nearest)}."
        if nearest
        else "",
        f"\nLimits: grown by at most {QUALITY_LIMIT} × the peer's; not slower; logits of our files, which the peer reads and computes in "
        f"float16, within {LOGITS_LIMIT} of those in float32: **{'held' if held else 'NOT HELD'}**.",
    ]
    return "\n".join(body)


def main() -> None:
    """Parse the command line and measure."""
    if len(sys.argv) > 1 and sys.argv[1] == "--peer":
        as_peer(json.loads(sys.argv[2]), *sys.argv[3:])
        return
    if len(sys.argv) > 1 and sys.argv[1] == "--peer-logits":
        logits_as_peer(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="an interpreter with gptqmodel; without it only our side is measured")
    parser.add_argument("--group", choices=list(GROUPS), default="all", help="what to compare; each has its own table")
    parser.add_argument("--samples", type=int, default=96, help="sequences of the calibration text")
    parser.add_argument("--length", type=int, default=512, help="tokens of each")
    parser.add_argument("--rounds", type=int, default=1, help="turns of each side; times are medians")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of each side")
    parser.add_argument(
        "--wait",
        choices=list(WAITS),
        default="brief",
        help="how OpenMP's threads wait for each other, on both sides; brief is what our command sets by itself",
    )
    arguments = parser.parse_args()
    arguments.cases = GROUPS[arguments.group]
    arguments.result = "quantize_quality" + ("" if arguments.group == "all" else f"_{arguments.group}")
    head = common.environment()
    with tempfile.TemporaryDirectory() as scratch:
        held = measure(arguments, Path(scratch), head)
    if not held:
        sys.exit(1)


if __name__ == "__main__":
    main()
