"""What the detectors share: options, processors, boxes brought back to pixels of the picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from pydantic import Field
from transformers import AutoImageProcessor, AutoTokenizer

from cloc_mllm.errors import ClocError
from cloc_mllm.labeling import checkpoints
from cloc_mllm.labeling.checkpoints import Dtype
from cloc_mllm.labeling.stage_options import StageOptions
from cloc_mllm.labeling.stages import Detection, StageError
from cloc_mllm.models.geometry import Geometry

INSTALL = "pip install 'cloc-mllm[label]'"


class DetectorOptions(StageOptions):
    """What every detector can be told.

    Attributes:
        floor: Finds below this confidence are not even reported; what becomes a label is for the filter to say.
        dtype: Number format of the model; `auto` is the checkpoint's own.
        revision: Branch, tag or commit on the hub.
    """

    floor: float = Field(0.05, ge=0, lt=1)
    dtype: Dtype = "float32"
    revision: str | None = None


def load_config(path: str | None, example: str, revision: str | None, model_types: Sequence[str] | None = None) -> Any:
    """Read a checkpoint's configuration, before its weights.

    Args:
        path: Folder or name on the hub.
        example: A specification that works, for messages.
        revision: Branch, tag or commit on the hub.
        model_types: What the checkpoint may be of; None for anything.

    Raises:
        ClocError: No checkpoint is named, there is none, or it is of another kind.
    """
    if path is None:
        raise ClocError("the detector needs a model", remedy=f"Name its folder or hub name, as in {example}.")
    config = checkpoints.load_config(path, revision)
    if model_types is not None and config.model_type not in model_types:
        problem = f"holds a model of type '{config.model_type}', not {' or '.join(model_types)}"
        raise ClocError(problem, file=path, remedy=f"One that works: {example}.")
    return config


def load_image_processor(path: str, revision: str | None) -> Any:
    """Load a checkpoint's image processor.

    Raises:
        ClocError: There is none.
    """
    try:
        return AutoImageProcessor.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        raise ClocError(f"no image processor can be loaded: {error}", file=path) from error


def load_tokenizer(path: str, revision: str | None) -> Any:
    """Load a checkpoint's tokenizer.

    Raises:
        ClocError: There is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        raise ClocError(f"no tokenizer can be loaded: {error}", file=path) from error
    checkpoints.require_tokenizer(tokenizer, path)
    return tokenizer


def process_images(processor: Any, images: Sequence[Image.Image], **options: Any) -> Any:
    """Run an image processor.

    Args:
        processor: From `load_image_processor`.
        images: RGB pictures.
        options: Passed on.

    Returns:
        Its output, in tensors.

    Raises:
        StageError: It needs a package that is not installed.
    """
    try:
        return processor(images=list(images), return_tensors="pt", **options)
    except ImportError as error:
        raise StageError(f"the image processor needs more packages: {error}", remedy=INSTALL) from error


def stretched(image: Image.Image) -> Geometry:
    """Where a picture lies in a frame that it fills entirely."""
    return Geometry.fit(*image.size, size=1, resize_mode="resize")


def padded_to_square(image: Image.Image) -> Geometry:
    """Where a picture lies in a frame that OWLv2's processor made: padded right or below, then scaled as a square."""
    width, height = image.size
    return Geometry(width, height, max(width, height), scaled_width=width, scaled_height=height, left=0, top=0)


def make_detections(
    boxes: torch.Tensor, texts: Sequence[str], scores: torch.Tensor, geometry: Geometry
) -> list[Detection]:
    """Turn a model's answer for one picture into finds.

    Args:
        boxes: ``(N, 4)`` xyxy boxes, normalised to the model's frame.
        texts: The N phrases.
        scores: ``(N,)`` confidences.
        geometry: Where the picture lies in that frame.

    Returns:
        The finds with boxes in pixels, cut off at the picture's edges, in descending order of score. What lies wholly
        outside the picture, in the padding, is none.
    """
    pixels = geometry.boxes_from_model(boxes)
    inside = (pixels[:, 2:] > pixels[:, :2]).all(dim=1)
    found = [
        Detection((x1, y1, x2, y2), text, score)
        for (x1, y1, x2, y2), text, score, within in zip(
            pixels.tolist(), texts, scores.tolist(), inside.tolist(), strict=True
        )
        if within
    ]
    return sorted(found, key=lambda one: -one.score)


class PhraseTally(Counter[str]):
    """How many phrases a detector was given, and how many it could read only in part or not at all.

    It is for reports; no answer depends on it.
    """

    def count(self, given: int, shortened: int = 0, unreadable: int = 0) -> None:
        """Count the phrases of one call."""
        self.update(given=given, shortened=shortened, unreadable=unreadable)
