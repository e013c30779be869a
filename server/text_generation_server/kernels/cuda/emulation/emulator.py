"""Runs the kernels of `sources` on a processor: the same text, compiled as C++ against `device.h`. For tests."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..backend import Argument, pack
from ..compile import CompileError, kernels_of, text_of

HERE = Path(__file__).parent
FLAGS = ("-O1", "-std=c++20", "-fPIC", "-shared", "-ffp-contract=off", "-fno-strict-aliasing", "-w", "-DEMULATED")


@dataclass(frozen=True)
class Place:
    """What one place in a source did to memory. units: passes of shared memory's banks, or sectors of 32 bytes."""

    kind: str
    file: str
    line: int
    requests: int
    units: int
    fewest: int


class _Copy:
    """What was copied can be seen when it was waited for, and not before."""

    def __init__(self, tensor: Tensor) -> None:
        self._copy = tensor.clone()

    def is_done(self) -> bool:
        return True

    def wait(self) -> Tensor:
        return self._copy


# Operations that a graph cannot hold: numbers that come from the host, or go there.
_HOST = ("aten::_local_scalar_dense", "aten::lift_fresh", "aten::is_nonzero", "aten::nonzero", "aten::equal")


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Implements `Graph`: operations and launches as they were, on the same memory; no Python of theirs runs again."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._steps: list[Callable[[], object]] = []
        self._kept: list[list[Tensor]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.name().split(".")[0] in _HOST:
            raise RuntimeError(f"{func.name()} cannot be recorded: the host would have to wait, or to send something")
        how = kwargs or {}
        out = func(*args, **how)
        outs = [out] if isinstance(out, Tensor) else list(out)
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}

        def again() -> None:
            found = func(*args, **how)
            for kept, new in zip(outs, [found] if isinstance(found, Tensor) else found, strict=True):
                if kept is not new:
                    kept.copy_(new)

        is_view = all(o.untyped_storage().data_ptr() in given for o in outs) and not func._schema.is_mutable
        # A view is one of the same memory still; what is only allocated has nothing in it.
        if not is_view and "empty" not in func.name():
            self._steps.append(again)
        self._kept.append(outs)
        return out

    def add(self, launch: Callable[[], None]) -> None:
        self._steps.append(launch)

    def replay(self) -> None:
        for step in self._steps:
            step()


class EmulatedStreams:
    """Implements `Streams`: everything is done at once. Memory is that of a small GPU."""

    def __init__(self, total_bytes: int = 1 << 30) -> None:
        self.total_bytes, self.num_records = total_bytes, 0
        self.tape: Tape | None = None  # while something is recorded

    def upload(self, values: NDArray[np.int64], into: Tensor) -> None:
        if self.tape is not None:
            raise RuntimeError("a copy from the host cannot be recorded")
        into.copy_(torch.from_numpy(values))

    def fetch(self, tensor: Tensor) -> _Copy:
        return _Copy(tensor)

    def record(self, work: Callable[[], None]) -> Tape:
        self.num_records += 1
        tape = self.tape = Tape()
        try:
            with tape:
                work()
        finally:
            self.tape = None
        return tape

    def memory(self) -> tuple[int, int]:
        return self.total_bytes, 0

    def peak_bytes(self, forget: bool = False) -> int:
        return 0

    def lost(self) -> str | None:
        return None


class Emulator:
    """A GPU of few multiprocessors. `order` (0 or 1) is that in which threads take turns."""

    device = torch.device("cpu")
    has_bfloat16 = True

    def __init__(self, folder: Path, order: int = 0, num_processors: int = 2, compiler: str = "c++") -> None:
        """folder: where libraries are kept, by the hash of what they are made from."""
        self.order, self.num_processors = order, num_processors
        self._folder, self._compiler = folder, compiler
        self.streams = EmulatedStreams()
        self._modules: dict[tuple[str, tuple[tuple[str, int], ...]], EmulatedModule] = {}

    def module(self, source: str, defines: Mapping[str, int]) -> EmulatedModule:
        key = (source, tuple(sorted(defines.items())))
        if key not in self._modules:
            self._modules[key] = EmulatedModule(self, self._build(source, defines))
        return self._modules[key]

    def _build(self, source: str, defines: Mapping[str, int]) -> Path:
        exports = "".join(f"EXPORT_KERNEL({name})\n" for name in kernels_of(source))
        # Lines keep the names of their files, for the report.
        text = text_of(source, defines) + "\n" + exports
        headers = "".join((HERE / name).read_text() for name in ("device.h", "ptx_emulated.h"))
        digest = hashlib.sha256(repr((text, headers, FLAGS, self._compiler)).encode()).hexdigest()[:32]
        library = self._folder / f"{Path(source).stem}-{digest}.so"
        if library.exists():
            return library
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            file, made = Path(folder) / source.replace(".cu", ".cpp"), Path(folder) / "made.so"
            file.write_text(text)
            command = [self._compiler, *FLAGS, f"-I{HERE}", "-o", str(made), str(file)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise CompileError(f"{self._compiler} refuses {source}:\n{done.stderr}")
            os.replace(made, library)
        return library


class EmulatedModule:
    """A library that holds the kernels of a source and its own emulated device."""

    def __init__(self, emulator: Emulator, library: Path) -> None:
        self._emulator = emulator
        self._library = ctypes.CDLL(str(library))
        self._library.emulation_report.restype = ctypes.c_char_p

    def launch(self, kernel: str, grid: tuple[int, int, int], threads: int, shared: int, *arguments: Argument) -> None:
        pointers, kept = pack(arguments)
        shape = (ctypes.c_uint * 7)(*grid, threads, 1, 1, self._emulator.order)

        def run(kept: object = (arguments, kept)) -> None:
            getattr(self._library, f"emulate_{kernel}")(shape, ctypes.c_uint(shared), pointers)

        run()
        if (tape := self._emulator.streams.tape) is not None:
            tape.add(run)

    def count(self, on: bool = True) -> None:
        """Begins to count accesses to memory, from none."""
        self._library.emulation_count(int(on))

    def report(self) -> list[Place]:
        """What was counted."""
        lines = self._library.emulation_report().decode().splitlines()
        rows = [line.split("\t") for line in lines]
        return [Place(r[0], r[1], int(r[2]), int(r[3]), int(r[4]), int(r[5])) for r in rows]
