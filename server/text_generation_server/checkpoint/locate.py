"""From what a user calls a model to the folder that holds it: a local folder, or an id on the hub."""

import errno
import logging
from pathlib import Path
from string import ascii_letters, digits

from ..errors import CheckpointError

LETTERS = frozenset(ascii_letters + digits + "-_.")
# What a server reads; never pickles, never code.
# The hub's cache, and not the hub, is at fault.
OF_THE_CACHE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR)
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
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # It prints what it also gives to the logs.
    logging.getLogger("huggingface_hub").handlers.clear()
    absent = f"{name} {model_id!r}: no such folder here"
    try:
        found = snapshot_download(
            model_id, revision=revision, allow_patterns=list(PATTERNS), local_files_only=not download
        )
    except RepositoryNotFoundError:
        raise CheckpointError(f"{absent}, and the hub has no such model (or asks for a token: HF_TOKEN)") from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{absent}, and the hub has no revision {revision!r} of that model") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        if constants.HF_HUB_OFFLINE:
            reason = "not in the hub's cache, and HF_HUB_OFFLINE forbids to fetch it"
        elif not download:
            reason = "not in the hub's cache; `text-generation-server download-weights` fetches it"
        elif isinstance(error, OSError) and error.errno in OF_THE_CACHE:
            reason = (
                f"and the hub's cache {constants.HF_HUB_CACHE} cannot be written: {error.strerror}; make "
                "room there that this user may write, or name another folder: --huggingface-hub-cache "
                "(HUGGINGFACE_HUB_CACHE)"
            )
        else:
            first_line = (str(error).splitlines() or [type(error).__name__])[0][:200]
            reason = f"not in the hub's cache, and the hub cannot be asked: {first_line}"
        raise CheckpointError(f"{absent}, {reason}") from None
    return Path(found)


def looks_like_hub_id(model_id: str) -> bool:
    """Whether it is `name` or `owner/name` of letters, digits, `-`, `_` and `.`, no part hidden or a parent folder."""
    parts = model_id.split("/")
    plain = all(part[:1].isalnum() and set(part) <= LETTERS for part in parts)
    return len(parts) in (1, 2) and plain and ".." not in model_id and len(model_id) <= 200
