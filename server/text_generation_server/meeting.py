"""Ranks wait for each other before they connect, so that whoever waits can still be called away.

A connection that forms can only be timed out, and a rank that died on its way would hold up the next epoch for so long.
"""

import time
from collections.abc import Callable
from pathlib import Path

POLL_S = 0.005


def meet(rendezvous: str, rank: int, size: int, timeout_s: float, is_wanted: Callable[[], bool]) -> bool:
    """Waits until all ranks of an epoch are here; False if that was no longer wanted before.

    Ranks leave signs beside the file `rendezvous`, whose name is new for each epoch. Raises TimeoutError.
    """
    if size == 1:
        return True
    missing = {other: sign(rendezvous, other) for other in range(size)}
    sign(rendezvous, rank).touch()
    deadline = time.monotonic() + timeout_s
    while missing := {other: path for other, path in missing.items() if not path.exists()}:
        if not is_wanted():
            sign(rendezvous, rank).unlink(missing_ok=True)
            return False
        if time.monotonic() > deadline:
            raise TimeoutError(f"ranks {sorted(missing)} did not join within {timeout_s:.0f} s")
        time.sleep(POLL_S)
    return True


def part(rendezvous: str, rank: int) -> None:
    """Takes the sign of this rank away; all have met."""
    sign(rendezvous, rank).unlink(missing_ok=True)


def sign(rendezvous: str, rank: int) -> Path:
    """A file that says that a rank has come."""
    return Path(f"{rendezvous}.rank-{rank}")
