"""What a shard tells of itself at any moment, also while a step hangs: plain fields, each written by one thread."""

from dataclasses import dataclass
from enum import IntEnum


class Phase(IntEnum):
    """As in the wire's HealthReply."""

    IMPORTING = 0
    LOADING = 1
    LOADED = 2
    JOINING = 3
    WARMING_UP = 4
    SERVING = 5
    FAILED = 6


@dataclass
class Health:
    """Read by any thread. Attributes are replaced whole, which Python does atomically."""

    phase: Phase = Phase.IMPORTING
    detail: str = "importing torch"
    done: int = 0
    total: int = 0
    epoch: int = 0
    step: int = 0
    # Rises with every layer computed and every slice loaded.
    progress: int = 0
    busy: bool = False
    num_rows: int = 0

    def enter(self, phase: Phase, detail: str) -> None:
        """The next phase, in words for people."""
        self.detail, self.phase = detail, phase
        self.progress += 1
