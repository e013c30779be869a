"""Log lines of a shard: for people, or as JSON for the launcher."""

import json
import logging
import sys
from typing import TYPE_CHECKING

from loguru import logger

from .config import LEVELS
from .errors import ConfigError

if TYPE_CHECKING:
    from loguru import Record


def set_up(level: str, json_output: bool, rank: int | None) -> None:
    """Sends log lines of at least `level` to standard error, one line each, whatever a message holds.

    Standard output is for answers. Raises ConfigError if there is no such level.
    """
    if level.upper() not in LEVELS:
        raise ConfigError(f"--logger-level is {level!r}, expected one of {', '.join(LEVELS)}")
    prefix = "" if rank is None else f"rank {rank}: "

    def as_json(record: "Record") -> str:
        record["extra"]["line"] = json.dumps(
            {
                "timestamp": record["time"].isoformat(),
                "level": record["level"].name,
                "rank": rank,
                "message": record["message"],
                "target": f"{record['name']}:{record['line']}",
            }
        )
        return "{extra[line]}\n"

    def as_text(record: "Record") -> str:
        record["extra"]["line"] = prefix + record["message"].replace("\n", "\\n")
        return "{time:YYYY-MM-DDTHH:mm:ss.SSS} {level: <7} {extra[line]}\n"

    logger.remove()
    # What the kernels and libraries say through Python's own logging comes the same way; of the latter only warnings.
    logging.basicConfig(handlers=[_Bridge()], level=logging.WARNING, force=True)
    logging.getLogger(__package__).setLevel(logging.DEBUG)
    logger.add(_write, level=level.upper(), format=as_json if json_output else as_text, colorize=False, catch=True)


def _write(line: str) -> None:
    """To what is standard error now: a live display takes its place, so that lines stand above it."""
    sys.stderr.write(line)
    sys.stderr.flush()


class _Bridge(logging.Handler):
    """Hands the lines of Python's own logging on to loguru, which keeps those of the level that was asked for."""

    def emit(self, record: logging.LogRecord) -> None:
        def place(made: "Record") -> None:
            made["name"], made["line"] = record.name, record.lineno

        level = record.levelname if record.levelname in LEVELS else record.levelno
        logger.patch(place).opt(exception=record.exc_info).log(level, "{}", record.getMessage())
