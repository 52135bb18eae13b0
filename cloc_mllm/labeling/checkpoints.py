"""Checkpoints that stages load: complete or not at all, never a pickle, and named by what is in them."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig

from cloc_mllm.data.files import may_be_hub_name
from cloc_mllm.errors import ClocError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

_LOADED = (".json", ".jinja", ".txt", ".model", ".safetensors")
"""Endings of the files that loading reads. Model cards and the like change no answer."""

_BLOCK = 1 << 22


def load_config(path: str, revision: str | None = None) -> Any:
    """Read a checkpoint's configuration, before its weights.

    Args:
        path: Folder or name on the hub.
        revision: Branch, tag or commit on the hub.

    Raises:
        ClocError: There is none.
    """
    if not Path(path).is_dir() and not may_be_hub_name(path):
        raise ClocError("there is no such folder", file=path)
    try:
        return AutoConfig.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        raise ClocError(f"no model can be loaded: {error}", file=path) from error


def load_model(auto_class: Any, path: str, device: str, dtype: Dtype, revision: str | None = None) -> Any:
    """Load a checkpoint, ready to answer.

    Args:
        auto_class: Which of transformers' Auto classes.
        path: Folder or name on the hub.
        device: Where it runs.
        dtype: Number format; `auto` is the checkpoint's own.
        revision: As in `load_config`.

    Raises:
        ClocError: It cannot be loaded, lacks weights, has no safetensors, or the device is not there.
    """
    try:
        model, info = auto_class.from_pretrained(
            path,
            revision=revision,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            output_loading_info=True,
            use_safetensors=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ClocError(f"the checkpoint cannot be loaded: {error}", file=path) from error
    lost = sorted(info["missing_keys"])
    if lost:
        raise ClocError(f"the checkpoint lacks {len(lost)} weights, the first being '{lost[0]}'", file=path)
    return to_device(model, device)


def to_device(model: torch.nn.Module, device: str) -> Any:
    """Put a model where it runs, in eval mode and without gradients.

    Raises:
        ClocError: The device is not there.
    """
    try:
        return model.to(device).eval().requires_grad_(False)
    except (RuntimeError, AssertionError) as error:
        raise ClocError(f"the model cannot be put on '{device}': {error}") from error


def require_tokenizer(tokenizer: Any, path: str) -> None:
    """Refuse an empty tokenizer: transformers makes one out of nothing where a checkpoint has none.

    Raises:
        ClocError: It is empty.
    """
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        remedy = "Fetch the checkpoint anew, with tokenizer.json."
        raise ClocError("the checkpoint has no tokenizer", file=path, remedy=remedy)


def prepare_tokenizer(tokenizer: Any, path: str) -> None:
    """Make a checkpoint's tokenizer fit for batches of prompts: padded on the left, so that all end alike.

    Raises:
        ClocError: It is empty.
    """
    require_tokenizer(tokenizer, path)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def checkpoint_identity(path: str, config: Any) -> str:
    """What a checkpoint is, wherever it lies.

    All of a folder is hashed, which takes about as long as loading it: weights that were tuned a little further may
    differ from the old ones in few tensors, and a sample of them, or their headers alone, would let old answers pass
    for new ones.

    Args:
        path: Folder or name on the hub.
        config: Its configuration, as loaded.

    Returns:
        `owner/name@commit` of the hub; of a folder, the SHA-256 of the files that are loaded, names and contents.
    """
    if not Path(path).is_dir():
        return f"{path}@{getattr(config, '_commit_hash', None)}"
    digest = hashlib.sha256()
    for file in sorted(file for file in Path(path).iterdir() if file.suffix in _LOADED and file.is_file()):
        status = file.stat()
        digest.update(f"{file.name}\0{_hash_of(str(file), status.st_size, status.st_mtime_ns)}\n".encode())
    return f"sha256:{digest.hexdigest()}"


@lru_cache(maxsize=1024)
def _hash_of(path: str, size: int, changed: int) -> str:
    """Hash of a file; size and time of change are there so that a file that was written anew is read anew."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """The libraries whose arithmetic an answer depends on."""
    return {"torch": torch.__version__.partition("+")[0], "transformers": transformers.__version__}
