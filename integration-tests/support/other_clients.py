"""Clients that cannot be installed beside the server, each in an environment of its own: `text-generation` and lm-eval.

    .venv/bin/python integration-tests/support/other_clients.py FOLDER      # takes what pip fetches, and about a minute

Serves a shipped model, and ends with 0 if every client finds what it expects. lm-eval scores two small tasks through
the server (`local-completions`, `local-chat-completions`) and with transformers (`hf`), which must come to the same.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support import lm_eval_tasks
from support.server import ROOT, Server

KEY = "a key of the tests"
MODEL = ROOT / "models" / "docs-qwen2-4m"
PACKAGES = {"text-generation": ["text-generation==0.7.0", "pytest"], "lm-eval": ["lm_eval[api,hf]==0.4.13"]}
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": KEY}


def environment(folder: Path, name: str) -> Path:
    """The interpreter of an environment that has the packages of that name; made if it is not there."""
    made = folder / name
    python = made / "bin" / "python"
    if not (made / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", made], check=True)
        if name == "lm-eval":
            # Its torch and transformers are the server's.
            packages = made / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
            (packages / "of_the_server.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES[name]], check=True)
        (made / "ready").touch()
    return python


def score(python: Path, folder: Path, model: str, arguments: str, tasks: str, *flags: str) -> dict[str, float]:
    """The result of each task: the share of texts that were answered as expected."""
    out = folder / f"results-{model}"
    command = [
        python,
        "-m",
        "lm_eval",
        "run",
        "--model",
        model,
        "--model_args",
        arguments,
        "--num_fewshot",
        "0",
        *flags,
    ]
    command += ["--include_path", folder / "tasks", "--tasks", tasks, "--output_path", out]
    subprocess.run(command, check=True, env=os.environ | OFFLINE, timeout=300)
    found = json.loads(max(out.rglob("*.json"), key=lambda path: path.stat().st_mtime).read_text())["results"]
    return {task: value for task, values in found.items() for key, value in values.items() if key.endswith(",none")
            and not key.endswith("_stderr,none")}  # fmt: skip


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pythons = {name: environment(folder, name) for name in PACKAGES}
    lm_eval_tasks.main(folder / "tasks")
    with Server(MODEL, "--dtype", "float32", env={"API_KEY": KEY}) as server:
        url = f"http://127.0.0.1:{server.port}"
        client = Path(__file__).with_name("text_generation_client.py")
        subprocess.run([pythons["text-generation"], client, url, KEY], check=True, timeout=300)
        both, python = "tiny_choice,tiny_answer", pythons["lm-eval"]
        model = f"model=tgi,tokenizer={MODEL},tokenizer_backend=huggingface,base_url={url}/v1"
        completions = score(python, folder, "local-completions", f"{model}/completions", both)
        chats = score(
            python,
            folder,
            "local-chat-completions",
            f"{model}/chat/completions",
            "tiny_answer",
            "--apply_chat_template",
        )
    reference = score(python, folder, "hf", f"pretrained={MODEL},dtype=float32", both)
    print(f"lm-eval: completions {completions}, chats {chats}, transformers {reference}")
    assert completions == reference
    assert reference["tiny_choice"] == 1
    assert chats.keys() == {"tiny_answer"}
    print("other clients: everything as they expect")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
