"""What the exporters share: what a folder holds, where to write, and image processors of transformers' own."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import yaml

from cloc_mllm.errors import ClocError
from cloc_mllm.training.card import read_header


@dataclass(frozen=True)
class Exported:
    """What an exporter wrote.

    Attributes:
        folder: Where it lies.
        notes: What was left out, and what differs from the checkpoint, one sentence each; also on the card.
    """

    folder: Path
    notes: list[str] = field(default_factory=list)


def model_type_of(model: str | PathLike[str]) -> str:
    """Return a checkpoint's `model_type`, from its config.json and nothing else.

    Raises:
        ClocError: There is no such folder, or it holds no readable config.json.
    """
    path = Path(model) / "config.json"
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["model_type"])
    except FileNotFoundError:
        raise ClocError("there is no checkpoint here (no config.json)", file=model) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ClocError(f"cannot be read as a checkpoint's configuration ({error})", file=path) from None


def require_type(model: str | PathLike[str], wanted: str, layout: str, what: str) -> None:
    """Refuse a checkpoint of another type than a layout can hold.

    Args:
        model: The folder.
        wanted: The `model_type` it must have.
        layout: What `--format` calls the layout.
        what: What a checkpoint of that type is, and where one comes from.

    Raises:
        ClocError: It is of another type, or there is none.
    """
    kind = model_type_of(model)
    if kind != wanted:
        raise ClocError(
            f"is a checkpoint of type '{kind}'; --format {layout} takes {what} (type '{wanted}')", file=model
        )


def stock_image_processor(images: Any) -> tuple[Any, list[str]]:
    """Transformers' own image processor that makes of a picture what ours does.

    Args:
        images: A `ClocImageProcessor`.

    Returns:
        The processor, and in what it differs. `resize`: CLIP's without its crop, equal. `pad`: Janus', which scales the
        long side and then pads as ours does: equal where the picture is; the padding's colour is cut off to a whole
        number where ours is rounded, at most one of 255 steps. (LLaVA's own pads first and scales then, which blends
        the padding into the picture: up to 0.23 of normalised pixel values were measured inside it, on noise.)
    """
    from transformers import CLIPImageProcessorPil, JanusImageProcessorPil

    square = {"height": images.size, "width": images.size}
    # Servers read `crop_size` to count the tokens of an image, also where nothing is cropped.
    statistics = {"crop_size": square, "image_mean": list(images.image_mean), "image_std": list(images.image_std)}
    if images.resize_mode == "pad":
        note = (
            "The padding beside pictures that are not square is up to one of 255 grey levels darker than in training."
        )
        return JanusImageProcessorPil(size=square, min_size=1, **statistics), [note]
    if images.resize_mode == "resize":
        return CLIPImageProcessorPil(size=square, do_center_crop=False, **statistics), []
    raise ClocError(f"this layout has no image processor for pictures treated by resize_mode '{images.resize_mode}'")


_INHERITED = ("license", "base_model", "datasets")
"""What holds of an export as it does of the checkpoint."""


def card(source: str | PathLike[str], title: str, lead: str, snippet: str, notes: list[str], **header: str) -> str:
    """The README of an exported folder: what it is, how it is loaded, and what to know.

    Args:
        source: The checkpoint; licence, bases and data of its own card are taken over.
        title: Of the card.
        lead: One sentence.
        snippet: How it is loaded.
        notes: What to know.
        **header: Further lines of the header.
    """
    own = read_header(Path(source) / "README.md")
    known = {**header, **{name: own[name] for name in _INHERITED if name in own}}
    lines = yaml.safe_dump(known, sort_keys=False, allow_unicode=True) if known else ""
    listed = "".join(f"* {note}\n" for note in notes)
    end = f"\n{listed}" if notes else ""
    return f"---\nlibrary_name: transformers\n{lines}---\n\n# {title}\n\n{lead}\n\n```python\n{snippet}```\n{end}"
