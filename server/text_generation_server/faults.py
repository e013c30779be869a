"""Faults on demand, for tests of recovery: a rank kills, stops or stalls itself at a chosen point.

The fault file holds one line, `rank=R point=P count=N action=A [times=T]`. The rank that finds itself named takes it
(the file is removed, or its `times` counted down, before anything happens) and acts when it reaches the point for the
N-th time after that. Without a fault file nothing here does anything.
"""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

POINTS = ("load", "step", "all_reduce", "sample")
ACTIONS = ("kill", "stop", "exit", "raise", "stall", "nan")


@dataclass
class Fault:
    """What is to happen, and how many times its point is still passed before."""

    point: str
    remaining: int
    action: str


class Faults:
    """The faults of one rank."""

    def __init__(self, path: Path | None, rank: int) -> None:
        self._path, self._rank = path, rank
        self._armed: Fault | None = None

    @property
    def armed(self) -> bool:
        """Whether one is to happen."""
        return self._armed is not None

    def look(self) -> None:
        """Takes the fault out of the file, if there is one for this rank."""
        if self._path is None or self._armed is not None:
            return
        try:
            line = self._path.read_text()
        except FileNotFoundError:
            return
        # Somebody is writing it just now.
        if not line.strip():
            return
        rank, times, fault = self._parse(line)
        if rank != self._rank:
            return
        if times > 1:
            words = [word for word in line.split() if not word.startswith("times=")]
            changed = self._path.with_name(f"{self._path.name}.{self._rank}")
            changed.write_text(" ".join([*words, f"times={times - 1}"]) + "\n")
            changed.rename(self._path)
        else:
            self._path.unlink()
        self._armed = fault

    def _parse(self, line: str) -> tuple[int, int, Fault]:
        """Rank, times and fault."""
        try:
            fields = dict(word.split("=", 1) for word in line.split())
            fault = Fault(fields["point"], int(fields["count"]), fields["action"])
            rank, times = int(fields["rank"]), int(fields.get("times", "1"))
            if fault.point in POINTS and fault.action in ACTIONS and fault.remaining > 0:
                return rank, times, fault
        except (ValueError, KeyError):
            pass
        expected = f"rank=R point={'|'.join(POINTS)} count=N action={'|'.join(ACTIONS)}"
        raise ValueError(f"{self._path}: expected {expected}, found {line!r}")

    def reach(self, point: str) -> bool:
        """Acts if this is the moment. Returns whether the action is one that the caller carries out (`nan`)."""
        fault = self._armed
        if fault is None or fault.point != point:
            return False
        fault.remaining -= 1
        if fault.remaining > 0:
            return False
        self._armed = None
        if fault.action == "nan":
            return True
        if fault.action == "raise":
            raise RuntimeError(f"fault on demand at {point}")
        act(fault.action)
        return False


def act(action: str) -> None:
    """Ends, stops or stalls this process; returns only if it was stopped and continued."""
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "exit":
        os._exit(3)
    else:
        stall()


def stall() -> NoReturn:
    """Waits for ever."""
    while True:
        time.sleep(3600)
