"""Pushes a finished folder to the hub. Files that the hub has already are not sent again, so it can be taken up."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.locate import looks_like_hub_id
from ..errors import ConfigError, ShardError


class UploadError(ShardError):
    """The hub did not take the result, which is safe on the disk."""


def check_name(name: str) -> None:
    """Raises ConfigError if it is not the form of a repository's name."""
    if not looks_like_hub_id(name) or "/" not in name:
        raise ConfigError(f"--upload-to-model-id {name!r}: expected owner/name")


def upload(folder: Path, name: str) -> str:
    """Makes the repository if there is none, and sends the files in one commit. Returns its address.

    Raises:
        UploadError: the hub cannot be reached or refuses; says how to go on.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    # The library's own error is one of its HTTP client's, whichever that is; so are those of connections.
    errors: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, OSError, ValueError, RuntimeError)
    api = HfApi()
    try:
        api.create_repo(name, exist_ok=True)
        commit = api.upload_folder(
            folder_path=folder, repo_id=name, commit_message="Quantized by text-generation-server"
        )
    except errors as error:
        first = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UploadError(
            f"--upload-to-model-id {name}: the hub did not take it: {first}; the result is complete in {folder}; give "
            "the same command again to send what is missing (a token: HF_TOKEN, or `hf auth login`)"
        ) from error
    return str(commit.repo_url)
