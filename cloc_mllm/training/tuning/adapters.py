"""Adapters: what a run with `parts.llm: lora` or `tokens` has trained, on its own, and how it is merged into its base.

An adapter's folder holds peft's files (`adapter_config.json`, `adapter_model.safetensors`: LoRA, the control tokens'
embeddings, and every part that was trained as a whole), the processor, and `base.json`, which says what it was trained
on: names and shapes of the base's weights, and hashes of some of their values. On another base an adapter gives
plausible nonsense, so it is only ever put on one that agrees with all of it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from cloc_mllm.errors import ClocError

BASE_FILE = "base.json"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_HASHED_A_PART, _HASHED_VALUES = 16, 4096


def save_adapter(adapted: Any, base: str | Path, processor: Any, folder: Path) -> None:
    """Write an adapter's folder.

    Args:
        adapted: The model with its trained adapter, wrapped by peft.
        base: The checkpoint it was trained on.
        processor: Saved beside it.
        folder: Where to.

    Raises:
        ClocError: The base is not there any more, or holds no safetensors.
    """
    fingerprint = base_fingerprint(base)
    # Absolute, so that the folder can be moved; peft looks there for the base.
    adapted.peft_config["default"].base_model_name_or_path = str(Path(base).resolve())
    # The embeddings' trained rows are saved as such; "auto" would ask the hub about the base.
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's, which says nothing; the run writes its own
    processor.save_pretrained(str(folder))
    (folder / BASE_FILE).write_text(json.dumps(fingerprint, indent=2) + "\n", encoding="utf-8")


def merge_adapter(adapter: str | Path, out: str | Path, base: str | Path | None = None) -> Path:
    """Put an adapter on its base and write the merged model, with the adapter's processor, as one checkpoint.

    Args:
        adapter: The adapter's folder.
        out: Folder to write; it may exist if it is empty.
        base: The base; default the one the adapter names.

    Returns:
        The folder.

    Raises:
        ClocError: There is no adapter, its base is not there or is another one, weights are missing, or `out` is not
            empty.
    """
    adapter, out = Path(adapter), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ClocError("the folder is not empty", file=out, remedy="Choose another one with --out.")
    config = _read_json(adapter, CONFIG_FILE, "there is no adapter here")
    base = Path(base or config.get("base_model_name_or_path") or "")
    require_base(adapter, base)
    # Imported late: what is wrong with the folders has been said without waiting for it.
    from cloc_mllm.models.processing_cloc_mllm import ClocMllmProcessor
    from cloc_mllm.training.card import read_metrics, write_card
    from cloc_mllm.training.presets.config import load_config
    from cloc_mllm.training.tuning.mllm import load_mllm

    model, _ = load_mllm(base)
    merged = _with_adapter(model, adapter).merge_and_unload()
    merged.tie_weights()
    temporary = out.with_name(f".{out.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    merged.save_pretrained(str(temporary))
    ClocMllmProcessor.from_pretrained(str(adapter)).save_pretrained(str(temporary))
    if (adapter / "run.yaml").exists():
        write_card(temporary, load_config(adapter / "run.yaml"), read_metrics(adapter / "README.md"))
    if out.exists():
        out.rmdir()
    return temporary.replace(out)


def _with_adapter(model: Any, adapter: Path) -> Any:
    """A base with an adapter on it, every weight of it in place.

    Raises:
        ClocError: Weights are missing, or there are others than its configuration has a place for.
    """
    from peft import LoraConfig, get_peft_model
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

    try:
        config = LoraConfig.from_pretrained(str(adapter))
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
        weights = load_file(adapter / WEIGHTS_FILE)
        wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        for what, names in (("are missing", set(wanted) - set(weights)), ("have no place", set(weights) - set(wanted))):
            if names:
                problem = f"{len(names)} weights {what}, the first being '{min(names)}'"
                raise ClocError(problem, file=adapter / WEIGHTS_FILE)
        set_peft_model_state_dict(adapted, weights)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ClocError(f"the adapter cannot be loaded: {error}", file=adapter) from error
    return adapted.eval()


def require_base(adapter: str | Path, base: str | Path) -> None:
    """Refuse a base that is not the one an adapter was trained on.

    Raises:
        ClocError: It is missing, of another model, of other sizes, or has other weights.
    """
    known = _read_json(Path(adapter), BASE_FILE, "it is not known what this adapter was trained on")
    if not (Path(base) / "config.json").exists():
        raise ClocError(
            f"the adapter's base is not there: '{base}' holds no model",
            file=adapter,
            remedy="Name the folder that it lies in: --base DIR.",
        )
    found = base_fingerprint(base)
    for key, what in (("model_type", "a model of another type"), ("shapes", "a model of other sizes or parts")):
        if found[key] != known.get(key):
            raise ClocError(f"this adapter was trained on another base: '{base}' is {what}", file=adapter)
    changed = sorted(name for name, digest in known.get("values", {}).items() if found["values"].get(name) != digest)
    if changed or not known.get("values"):
        problem = f"this adapter was trained on another base: in '{base}' the weights differ"
        raise ClocError(problem + (f", the first being '{changed[0]}'" if changed else ""), file=adapter)


def base_fingerprint(base: str | Path) -> dict[str, Any]:
    """What tells one checkpoint from another without reading all of it.

    Args:
        base: Its folder.

    Returns:
        `model_type`; `shapes`, a hash of all names and shapes; `values`, for up to 16 matrices of each part a hash of
        their first 4,096 values in fp32, so that storing the same weights in other shards changes nothing.

    Raises:
        ClocError: It holds no configuration, or no safetensors.
    """
    base = Path(base)
    config = _read_json(base, "config.json", "there is no model here")
    shapes: dict[str, list[int]] = {}
    homes: dict[str, Path] = {}
    try:
        for file in sorted(base.glob("*.safetensors")):
            with safe_open(file, "pt") as weights:
                for name in weights.keys():  # noqa: SIM118 -- no dictionary
                    shapes[name], homes[name] = list(weights.get_slice(name).get_shape()), file
        if not shapes:
            raise ClocError("holds no safetensors", file=base, remedy="Save the model anew.")
        listed = "\n".join(f"{name} {shape}" for name, shape in sorted(shapes.items()))
        return {
            "model_type": config.get("model_type"),
            "shapes": hashlib.sha256(listed.encode()).hexdigest(),
            "values": {name: _digest(homes[name], name, shapes[name]) for name in _some_of_each_part(shapes)},
        }
    except (OSError, SafetensorError) as error:
        raise ClocError(f"its weights cannot be read: {error}", file=base) from error


def _some_of_each_part(shapes: dict[str, list[int]]) -> Iterator[str]:
    """Names of matrices, spread evenly over each part."""
    parts: dict[str, list[str]] = {}
    for name in sorted(shapes):
        if len(shapes[name]) >= 2:
            parts.setdefault(".".join(name.split(".")[:2]), []).append(name)
    for names in parts.values():
        step = max(1, -(-len(names) // _HASHED_A_PART))
        yield from names[::step]


def _digest(file: Path, name: str, shape: list[int]) -> str:
    rows = max(1, -(-_HASHED_VALUES // max(1, int(torch.Size(shape[1:]).numel()))))
    with safe_open(file, "pt") as weights:
        values = weights.get_slice(name)[:rows].flatten()[:_HASHED_VALUES]
    return hashlib.sha256(values.to(torch.float32).contiguous().numpy().tobytes()).hexdigest()


def _read_json(folder: Path, name: str, missing: str) -> dict[str, Any]:
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ClocError(f"{missing} (no {name})", file=folder) from None
    except (OSError, ValueError) as error:
        raise ClocError(f"cannot be read: {error}", file=folder / name) from None
    if not isinstance(found, dict):
        raise ClocError("is not a JSON object", file=folder / name)
    return found
