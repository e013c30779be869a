"""Run every measurement, one after the other, and say which held its limit.

Ends with 1 if one of them failed; the others are run all the same.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

SCRIPTS = [
    "load_ceiling", "scheduler_cost", "step_gap", "memory", "router_alone", "http_cost", "text_cost", "constrained",
    "neighbours", "quantized", "quantize_quality", "quantize_speed", "products", "step_overhead", "attention", "sampling",
    "gpu_kernels", "recovery", "shards", "side_by_side",
]  # fmt: skip
TIMEOUT_S = 3600


def main() -> None:
    """Run the scripts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", default=SCRIPTS, help=f"some of: {', '.join(SCRIPTS)}")
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter with transformers[serving]")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.scripts) - set(SCRIPTS))
    if unknown:
        parser.error(f"found {', '.join(unknown)}, expected some of {', '.join(SCRIPTS)}")
    failed = []
    for script in arguments.scripts:
        print(f"\n== {script}", flush=True)
        command = [sys.executable, str(Path(__file__).with_name(f"{script}.py"))]
        if script == "side_by_side":
            command += ["--peer-python", arguments.peer_python]
        if subprocess.run(command, timeout=TIMEOUT_S, check=False).returncode:
            failed.append(script)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
