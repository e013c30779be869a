"""From what a user calls a model to the folder that holds it: a local folder, or an id on the hub."""

import contextlib
import errno
import logging
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from string import ascii_letters, digits
from typing import Any

from ..errors import CheckpointError

LETTERS = frozenset(ascii_letters + digits + "-_.")
# The hub's cache, and not the hub, is at fault.
OF_THE_CACHE = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR)
ANOTHER_CACHE = "name another folder: --huggingface-hub-cache (HUGGINGFACE_HUB_CACHE)"
# What a server reads; never pickles, never code.
PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer.model", "*.jinja")


def locate(model_id: str, revision: str | None, download: bool = False, name: str = "--model-id") -> Path:
    """The folder of `model_id`: itself if it is one, else that of the hub's cache. `name`: what the user calls it.

    Raises CheckpointError if it is neither, or if the hub does not answer. The hub's own settings (HF_HOME, HF_TOKEN,
    HF_HUB_OFFLINE, ...) are read by its library.
    """
    folder = Path(model_id)
    # An empty name would be the folder that this was started in.
    if model_id and folder.is_dir():
        return folder.resolve()
    if not looks_like_hub_id(model_id):
        raise CheckpointError(f"{name} {model_id!r}: no such folder, and not the form of a hub id (owner/name)")
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    # That of the HTTP client that the hub's library is built on, which is another one now and then.
    network_error: type[Exception] = HfHubHTTPError.__bases__[0]
    # It prints what it also gives to the logs, and warns of what it then fails at.
    logging.getLogger("huggingface_hub").handlers.clear()
    warnings.filterwarnings("ignore", module="huggingface_hub")
    absent = f"{name} {model_id!r}: no such folder here"
    if constants.HF_HUB_CACHE.startswith("~"):
        raise CheckpointError(
            f"{absent}, and this user has no home folder for the hub's cache; set HOME, or {ANOTHER_CACHE}"
        )
    try:
        return _fetch(model_id, revision) if download else _find(model_id, revision)
    except RepositoryNotFoundError:
        raise CheckpointError(f"{absent}, and the hub has no such model (or asks for a token: HF_TOKEN)") from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{absent}, and the hub has no revision {revision!r} of that model") from None
    except NoRoom as error:
        raise CheckpointError(f"{absent}, and {error}") from None
    except (OSError, network_error) as error:  # what is not in the cache, too
        if constants.HF_HUB_OFFLINE:
            reason = "not in the hub's cache, and HF_HUB_OFFLINE forbids to fetch it; unset that, or give a folder"
        elif not download:
            reason = "not in the hub's cache; `text-generation-server download-weights` fetches it"
        elif isinstance(error, OSError) and error.errno in OF_THE_CACHE:
            reason = (
                f"and the hub's cache {constants.HF_HUB_CACHE} cannot be written: {error.strerror}; make "
                f"room there that this user may write, or {ANOTHER_CACHE}"
            )
        else:
            first_line = (str(error).splitlines() or [type(error).__name__])[0][:200]
            reason = (
                f"not in the hub's cache, and the hub cannot be asked: {first_line}; behind a proxy, set HTTPS_PROXY; "
                "where there is no network, fetch the model elsewhere (`text-generation-server download-weights`) and "
                "give its folder"
            )
        raise CheckpointError(f"{absent}, {reason}") from None


class NoRoom(Exception):
    """The model does not fit into the hub's cache."""


def _find(model_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model_id, revision=revision, allow_patterns=list(PATTERNS), local_files_only=True))


def _fetch(model_id: str, revision: str | None) -> Path:
    """Downloads what the cache does not have. Nothing is left there of what has no room in it.

    What has come when a connection breaks stays: the next try goes on with it.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import DryRunError
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(constants.HF_HUB_CACHE)
    folder = cache / repo_folder_name(repo_id=model_id, repo_type="model")
    wanted: dict[str, Any] = {"repo_id": model_id, "revision": revision, "allow_patterns": list(PATTERNS)}
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.suppress(DryRunError):  # without the hub: either everything is here, or it is said below
            with _without_progress():
                planned = snapshot_download(**wanted, dry_run=True)
            num_bytes = sum(file.file_size for file in planned if file.will_download)
            free = shutil.disk_usage(cache).free
            if num_bytes > free:
                raise NoRoom(
                    f"the hub's cache {cache} has no room for it: {num_bytes / 1e6:.1f} MB are to be fetched, "
                    f"{free / 1e6:.1f} MB are free; make room there, or {ANOTHER_CACHE}"
                )
        return Path(snapshot_download(**wanted))
    finally:
        _remove_traces(folder)


@contextlib.contextmanager
def _without_progress() -> Iterator[None]:
    """Of a look that takes a moment nobody wants to see how far it is."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _remove_traces(folder: Path) -> None:
    """Of a model that nothing came of: names of revisions, and empty folders."""
    if any(folder.glob("blobs/*")) or any(folder.glob("snapshots/*/*")):
        return
    for path in sorted([folder, *folder.rglob("*")], reverse=True):
        with contextlib.suppress(OSError):
            path.rmdir() if path.is_dir() else path.unlink()


def looks_like_hub_id(model_id: str) -> bool:
    """Whether it is `name` or `owner/name` of letters, digits, `-`, `_` and `.`, no part hidden or a parent folder."""
    parts = model_id.split("/")
    plain = all(part[:1].isalnum() and set(part) <= LETTERS for part in parts)
    return len(parts) in (1, 2) and plain and ".." not in model_id and len(model_id) <= 200
