"""Checkpoints to and from the Hugging Face Hub."""

import re
from collections.abc import Sequence
from pathlib import Path

from dicode.config import CheckpointError

CARD = """---
library_name: dicode
pipeline_tag: text-to-video
---

# {repo_id}

A text-to-video model: `dicode generate "a prompt" --model {repo_id}`
"""
RELATIVE_LINK = re.compile(r"!?\[([^\]]*)\]\((?!https?://|#)[^)]*\)")  # to a file beside the card, as ../README.md


def downloaded(repo_id: str, files: Sequence[str], revision: str | None = None) -> Path:
    """These files (patterns) of a repository on the Hub, as a folder of its cache; without a network, the cached ones.

    Every failure is a `CheckpointError` with what to do.
    """
    from huggingface_hub import constants, errors, snapshot_download

    url = f"{constants.ENDPOINT}/{repo_id}"
    advice = {  # in this order: GatedRepoError is a RepositoryNotFoundError too
        errors.GatedRepoError: f"gated; ask for access at {url}, then run `hf auth login`",
        errors.RepositoryNotFoundError: f"no folder here and no repository at {url}; if private, run `hf auth login`",
        errors.RevisionNotFoundError: f"no such branch, tag or commit; see {url}",
        errors.LocalEntryNotFoundError: f"no folder here, not in the cache {constants.HF_HUB_CACHE}, and the Hub "
        "cannot be reached; connect once, or unset HF_HUB_OFFLINE",
    }
    try:
        # the first pattern would match in folders too, where training runs keep files that the model does not need
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(files), ignore_patterns=["*/*"]))
    except Exception as error:  # errors of the Hub's HTTP library share no stable base class
        other = f"download failed, try again ({type(error).__name__}: {error})"
        reason = next((text for kind, text in advice.items() if isinstance(error, kind)), other)
        name = f"{repo_id!r}" if revision is None else f"{repo_id!r} at revision {revision!r}"
        raise CheckpointError(f"{name}: {reason}") from error


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload a dicode model",
    card: str | None = None,
) -> str:
    """Upload a checkpoint folder to the Hub; returns its address.

    Creates the repository and the branch `revision` (default: main) where missing. `card` is the text of README.md;
    without one the repository's card stays. Where it has none, the folder's is taken, its links to other files of the
    package as plain text, or a short one is written. Raises `ValueError` for a public repository where `private` is
    requested, and for a card whose metadata the Hub refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    repo_id = url.repo_id  # with the owner, where none was named
    if private and api.model_info(repo_id).private is False:
        raise ValueError(f"{repo_id} exists and is public: make it private at {url}/settings, or push another name")
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    readme = folder / "README.md"
    stays = card is None and api.file_exists(repo_id, readme.name, revision=revision)
    if card is None:
        own = readme.read_text(encoding="utf-8") if readme.is_file() else CARD.format(repo_id=repo_id)
        card = RELATIVE_LINK.sub(r"\1", own)
    if not stays:
        readme.write_text(card, encoding="utf-8")
    api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        commit_message=commit_message,
        ignore_patterns=[readme.name] if stays else None,
    )
    return str(url)
