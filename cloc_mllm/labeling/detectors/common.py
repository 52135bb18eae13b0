"""What the detectors share: options, checkpoints loaded completely, boxes brought back to pixels of the picture."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import transformers
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

from cloc_mllm.data.files import may_be_hub_name
from cloc_mllm.errors import ClocError
from cloc_mllm.labeling.stages import Detection
from cloc_mllm.models.geometry import Geometry

INSTALL = "pip install 'cloc-mllm[label]'"
_READ_FROM_A_FOLDER = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors", "*.bin")


class DetectorOptions(BaseModel):
    """What every detector can be told.

    Attributes:
        floor: Finds below this confidence are not even reported; what becomes a label is for the filter to say.
        dtype: Number format of the model.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    floor: float = Field(0.05, ge=0, lt=1)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The number format as torch knows it."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found


Options = TypeVar("Options", bound=DetectorOptions)


def read_options(kind: type[Options], options: Mapping[str, Any], detector: str) -> Options:
    """Read a detector's options.

    Args:
        kind: The class that says what there is.
        options: What was asked for.
        detector: Its name, for messages.

    Raises:
        ClocError: An option is unknown, or its value is none it can have.
    """
    try:
        return kind.model_validate(dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            problem = f"the detector '{detector}' has no option '{name}'"
        else:
            problem = f"option '{name}' of the detector '{detector}': {first['msg']}, not {first['input']!r}"
        raise ClocError(problem, remedy=f"There are: {', '.join(kind.model_fields)}.") from error


def load_config(path: str | None, example: str, model_types: Sequence[str] | None = None) -> Any:
    """Read a checkpoint's configuration, before its weights.

    Args:
        path: Folder or name on the hub.
        example: A specification that works, for messages.
        model_types: What the checkpoint may be of; None for anything.

    Raises:
        ClocError: No checkpoint is named, there is none, or it is of another kind.
    """
    if path is None:
        raise ClocError("the detector needs a model", remedy=f"Name its folder or hub name, as in {example}.")
    if not Path(path).is_dir() and not may_be_hub_name(path):
        raise ClocError("there is no such folder", file=path)
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ClocError(f"no model can be loaded: {error}", file=path) from error
    if model_types is not None and config.model_type not in model_types:
        problem = f"holds a model of type '{config.model_type}', not {' or '.join(model_types)}"
        raise ClocError(problem, file=path, remedy=f"One that works: {example}.")
    return config


def load_model(auto_class: Any, path: str, device: str, dtype: torch.dtype) -> Any:
    """Load a checkpoint completely, ready to answer.

    Raises:
        ClocError: It cannot be loaded, lacks weights, or the device is not there.
    """
    try:
        model, info = auto_class.from_pretrained(path, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise ClocError(f"no model can be loaded: {error}", file=path) from error
    lost = sorted(info["missing_keys"])
    if lost:
        raise ClocError(f"the checkpoint lacks {len(lost)} weights, the first being '{lost[0]}'", file=path)
    return to_device(model, device)


def to_device(model: torch.nn.Module, device: str) -> Any:
    """A model in eval mode, without gradients, on its device.

    Raises:
        ClocError: The device is not there.
    """
    try:
        return model.to(device).eval().requires_grad_(False)
    except (RuntimeError, AssertionError) as error:
        raise ClocError(f"the model cannot be put on '{device}': {error}") from error


def load_image_processor(path: str) -> Any:
    """Load a checkpoint's image processor.

    Raises:
        ClocError: There is none.
    """
    try:
        return AutoImageProcessor.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ClocError(f"no image processor can be loaded: {error}", file=path) from error


def load_tokenizer(path: str) -> Any:
    """Load a checkpoint's tokenizer.

    Raises:
        ClocError: There is none.
    """
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ClocError(f"no tokenizer can be loaded: {error}", file=path) from error


def process_images(processor: Any, images: Sequence[Image.Image], **options: Any) -> Any:
    """Run an image processor.

    Args:
        processor: From `load_image_processor`.
        images: RGB pictures.
        options: Passed on.

    Returns:
        Its output, in tensors.

    Raises:
        ClocError: It needs a package that is not installed.
    """
    try:
        return processor(images=list(images), return_tensors="pt", **options)
    except ImportError as error:
        raise ClocError(f"the image processor needs more packages: {error}", remedy=INSTALL) from error


def checkpoint_identity(path: str, config: Any) -> str:
    """What a checkpoint is, wherever it lies.

    Args:
        path: Folder or name on the hub.
        config: Its configuration, as loaded.

    Returns:
        `owner/name@commit` of the hub. Of a folder, the SHA-256 of what is loaded from it, names and contents: a
        retrained model in the same place is another one, a copy elsewhere is the same.
    """
    if not Path(path).is_dir():
        return f"{path}@{getattr(config, '_commit_hash', None)}"
    digest = hashlib.sha256()
    for file in sorted(file for pattern in _READ_FROM_A_FOLDER for file in Path(path).glob(pattern)):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def versions() -> dict[str, str]:
    """The libraries whose arithmetic an answer depends on."""
    return {"torch": torch.__version__, "transformers": transformers.__version__}


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
