"""`text-generation-server` whose GPUs are emulated: what the launcher starts in `test_emulated_gpu.py`.

The first argument is a folder for what is compiled; the others are the command's own.
"""

import sys
from pathlib import Path
from typing import Any

import text_generation_server.kernels.select as select
from text_generation_server import cli

# What a model with heads of 64 in bfloat16 needs.
MODULES: list[tuple[str, dict[str, int]]] = [
    ("elements.cu", {"BF16": 1}),
    ("sampling.cu", {"BF16": 1}),
    ("attention.cu", {"BF16": 1, "HEAD_DIM": 64}),
    ("linear.cu", {"BF16": 1, "CODING": 16, "SCALES": 1, "ZEROS": 0, "FINE": 0}),
]


def main() -> None:
    folder = Path(sys.argv.pop(1))
    if sys.argv[1] == "serve":
        from text_generation_server.kernels.cuda.emulation.emulator import Emulator
        from text_generation_server.kernels.cuda.kernels import CudaKernels

        gpu = Emulator(folder)
        # Now: a rank that waits for a compiler later would be taken for one that hangs.
        for source, defines in MODULES:
            gpu.module(source, defines)
        chosen: Any = lambda *_: CudaKernels(gpu)  # noqa: E731
        select.select_kernels = chosen
    cli.main()


if __name__ == "__main__":
    main()
