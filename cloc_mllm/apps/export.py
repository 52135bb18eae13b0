"""Writes checkpoints in layouts that other programs load without knowing this package."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path

from cloc_mllm.apps.outputs import prepare_output_folder
from cloc_mllm.errors import ClocError

ENCODER_TYPE = "cloc"

_CARD = """\
---
library_name: transformers
---

# Vision tower of {name}

A stock `CLIPVisionModel`, the image tower of a CLOC encoder without its Prompter:

```python
from transformers import AutoImageProcessor, CLIPVisionModel

tower = CLIPVisionModel.from_pretrained("{folder}")
processor = AutoImageProcessor.from_pretrained("{folder}")
```

Side of the model frame: {size} pixels. {frame}
"""
_FRAMES = {
    "pad": "The encoder was trained on images padded to a square with their mean colour. The image processor here only "
    "resizes: pad images that are not square before it, or features of them differ from the encoder's.",
    "resize": "The encoder was trained on images stretched to a square, and the image processor here does the same.",
}


def export_clip(model: str | PathLike[str], out: str | PathLike[str]) -> Path:
    """Write an encoder's image tower as a stock `CLIPVisionModel` with its image processor.

    Args:
        model: Folder of a CLOC (or CLIP) encoder, the `export/` of a pre-training run.
        out: Folder to write; it may exist if it is empty.

    Returns:
        The folder.

    Raises:
        ClocError: `model` is not such an encoder, its tower is not CLIP's, or `out` cannot be used.
    """
    kind = model_type_of(model)
    if kind != ENCODER_TYPE:
        raise ClocError(
            f"is a checkpoint of type '{kind}'; --format clip takes an encoder (type '{ENCODER_TYPE}')",
            file=model,
            remedy="Name the export/ of a pre-training run.",
        )
    folder = prepare_output_folder(out)
    if any(folder.iterdir()):
        raise ClocError("the folder is not empty", file=folder, remedy="Choose another one with --out.")

    from transformers import CLIPImageProcessorPil

    from cloc_mllm.evaluation.readouts import ClocEncoder

    encoder = ClocEncoder.from_pretrained(model, device="cpu")
    images = encoder.processor.image_processor
    try:
        encoder.model.save_clip_vision_tower(str(folder))
    except ValueError as error:
        raise ClocError(f"cannot be exported as CLIP: {error}", file=model) from error
    square = {"height": images.size, "width": images.size}
    CLIPImageProcessorPil(
        size=square,
        crop_size=square,
        do_center_crop=False,
        image_mean=list(images.image_mean),
        image_std=list(images.image_std),
    ).save_pretrained(str(folder))
    card = _CARD.format(name=Path(model).name, folder=folder, size=images.size, frame=_FRAMES[images.resize_mode])
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


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
