"""Which build this is."""

import subprocess
from importlib import metadata
from pathlib import Path


def version() -> str:
    """Number and commit, such as `0.1.0 (0123456789ab)`, in the form of every program here."""
    number = metadata.version("text-generation-server")
    commit = _commit()
    return f"{number} ({commit})" if commit else number


def _commit() -> str | None:
    """Written into a wheel when it is built; in a checkout, git knows."""
    package = Path(__file__).resolve().parent
    try:
        return (package / "commit.txt").read_text().strip()
    except FileNotFoundError:
        pass
    checkout = package.parent.parent
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
