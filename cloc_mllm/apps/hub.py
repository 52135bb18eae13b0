"""Uploads a finished folder to the hub: one commit, no pickles, a card that loads it by its name there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from cloc_mllm.errors import ClocError

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
_CARD = "README.md"
_CONFIGS = ("config.json", "adapter_config.json")


@dataclass(frozen=True)
class Upload:
    """What is, or would be, uploaded.

    Attributes:
        files: Names in the repository, and sizes in bytes.
        url: Of the commit; `None` if nothing was uploaded.
    """

    files: dict[str, int]
    url: str | None = None


def push(folder: str | PathLike[str], repo_id: str, private: bool = False, dry_run: bool = False) -> Upload:
    """Upload a checkpoint, an adapter or an export, in one commit.

    Snippets of the card that load the folder load the repository instead. Hidden files stay behind. The hub is the one
    that `HF_ENDPOINT` names, the account that of `hf auth login` or `HF_TOKEN`.

    Args:
        folder: The folder.
        repo_id: `OWNER/NAME`; made if it is not there.
        private: Whether a new repository is private.
        dry_run: Look at everything, upload nothing, ask the network for nothing.

    Returns:
        The files and the commit.

    Raises:
        ClocError: The folder holds no model or adapter, or pickles; the name is malformed; or the hub refuses.
    """
    folder = Path(folder)
    files = _files(folder)
    if not _REPO_ID.fullmatch(repo_id):
        raise ClocError(f"'{repo_id}' is not the name of a repository", remedy="Write OWNER/NAME.")
    sizes = {name: path.stat().st_size for name, path in files.items()}
    if dry_run:
        return Upload(sizes)
    from huggingface_hub import CommitOperationAdd, HfApi

    card = files.get(_CARD)
    text = card_for(card.read_text(encoding="utf-8"), folder, repo_id) if card else None
    additions = [
        CommitOperationAdd(name, text.encode() if text is not None and name == _CARD else str(path))
        for name, path in files.items()
    ]
    api = HfApi(library_name="cloc_mllm")
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.create_commit(repo_id, additions, commit_message=f"Upload {folder.resolve().name}")
    except Exception as error:
        # The client has exceptions of its own, and lets through those of its transport, which are no public names.
        status = getattr(getattr(error, "response", None), "status_code", None)
        remedy = "Log in first: hf auth login." if status in (401, 403) else None
        reason = " ".join(str(error.__cause__ or error).split())
        raise ClocError(f"the hub does not take it: {reason}", file=api.endpoint, remedy=remedy) from error
    return Upload(sizes, str(done.commit_url))


def card_for(card: str, folder: Path, repo_id: str) -> str:
    """A model card whose snippets load the repository: its folder's name, and `.`, become the repository's."""
    for own in (".", folder.name, str(folder)):
        card = card.replace(f'from_pretrained("{own}"', f'from_pretrained("{repo_id}"')
    return card


def _files(folder: Path) -> dict[str, Path]:
    """The files to upload, by their names in the repository.

    Raises:
        ClocError: There is no model among them, or something that would have to be unpickled.
    """
    if not any((folder / name).is_file() for name in _CONFIGS):
        inner = folder / "export"
        remedy = f"Did you mean '{inner}'?" if (inner / "config.json").is_file() else None
        raise ClocError(f"there is no model here (no {' or '.join(_CONFIGS)})", file=folder, remedy=remedy)
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    kept = {
        name: path
        for name, path in found.items()
        if not any(part.startswith(".") or part == "__pycache__" for part in name.split("/"))
    }
    if pickles := [name for name in kept if name.endswith(PICKLES)]:
        problem = f"'{pickles[0]}' is a pickle, which runs code when it is loaded"
        raise ClocError(problem, file=folder, remedy="Push an export: it holds safetensors only.")
    return kept
