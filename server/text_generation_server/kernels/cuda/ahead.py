"""Compiles ahead of time what servers would compile when they first need it: for container images."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from .compile import ARCHITECTURES, CompileError, compiled, default_cache


def _modules() -> list[tuple[str, dict[str, int]]]:
    """Codings as checkpoints have them (codes.h), with the types of scales of those; heads of the common sizes."""
    modules: list[tuple[str, dict[str, int]]] = []
    for bf16 in (1, 0):
        modules += [("elements.cu", {"BF16": bf16}), ("sampling.cu", {"BF16": bf16})]
        modules += [("attention.cu", {"BF16": bf16, "HEAD_DIM": dim}) for dim in (64, 96, 128, 256)]
        integers = [(bits, scales, zeros) for bits in (4, 2, 3, 8) for scales in (2, 3) for zeros in (0, 1)]
        for coding, scales, zeros in [(16, 1, 0), (5, 1, 0), (6, 1, 0), (6, 3, 0), (8, 1, 0), *integers]:
            modules.append(("linear.cu", {"BF16": bf16, "CODING": coding, "SCALES": scales, "ZEROS": zeros, "FINE": 0}))
    return modules


MODULES = _modules()


def compile_ahead(architectures: Sequence[str], folder: Path | None = None) -> Iterator[str]:
    """Fills the cache `folder`, by default the user's. Yields a line for each kernel: what the compiler says it takes.

    Raises:
        CompileError: an architecture that our kernels are not proven for, a folder that cannot be written, or what the
            compiler says.
    """
    for architecture in architectures:
        if architecture not in ARCHITECTURES:
            raise CompileError(f"{architecture} is not served; expected some of {', '.join(ARCHITECTURES)}")
    folder = folder or default_cache()
    if folder is None:
        raise CompileError("this user has no home folder to keep kernels in; name one: --kernel-cache (KERNEL_CACHE)")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CompileError(f"--kernel-cache {folder} cannot be made: {error.strerror}; name another folder") from None
    if not os.access(folder, os.W_OK):
        raise CompileError(f"--kernel-cache {folder} cannot be written by this user; name another folder")
    for architecture in architectures:
        for source, defines in MODULES:
            # Turing has no products of bfloat16.
            if architecture == "sm_75" and defines["BF16"]:
                continue
            cubin = compiled(source, defines, architecture, folder)
            said = " ".join(f"{name}={value}" for name, value in defines.items())
            for kernel, usage in cubin.usage().items():
                yield (
                    f"{architecture} {source} {said} {kernel}: {usage.registers} registers, "
                    f"{usage.spilled_bytes} bytes spilled, {usage.shared_bytes} bytes of static shared memory"
                )
