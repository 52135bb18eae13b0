"""Open-vocabulary detection with an encoder: embed proposed boxes, compare with the names, suppress duplicates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.encoders.measure import EncoderSettings
from cloc_mllm.evaluation.encoders.proposals import Proposals, ProposalSource
from cloc_mllm.evaluation.encoders.readouts import EncodedImages, Encoder, RegionReadout
from cloc_mllm.evaluation.encoders.region_data import RegionSplit
from cloc_mllm.models.boxes import box_iou

SCORES = ("softmax", "sigmoid")
_MEMORY = 2**26
"""Most token values that boxes copy at once: 256 MiB in float32."""


@dataclass(frozen=True)
class DetectionRules:
    """How embeddings become detections.

    Attributes:
        score: ``softmax`` over the classes, or ``sigmoid`` of each, of the scaled cosine.
        scale: Multiplier of the cosine.
        bias: Added to it, for ``sigmoid``.
        objectness: Whether the score is multiplied by the proposal's.
        nms: Boxes of one class that overlap a better one by more than this IoU go; 1 keeps all.
        most: Detections kept of an image, the best first.
        min_score: Detections must score more.
    """

    score: str = "softmax"
    scale: float = 100.0
    bias: float = 0.0
    objectness: bool = True
    nms: float = 0.5
    most: int = 100
    min_score: float = 0.0

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ClocError(f"score is '{self.score}'", remedy=f"It is one of {', '.join(SCORES)}.")
        if not (0 < self.nms <= 1 and 0 <= self.min_score < 1 and self.most >= 1 and self.scale > 0):
            raise ClocError(
                f"nms {self.nms}, min_score {self.min_score}, most {self.most} and scale {self.scale} make no sense",
                remedy="nms lies above 0 and up to 1, min_score between 0 and 1, most and scale above 0.",
            )

    def scores(self, embeds: torch.Tensor, classes: torch.Tensor, proposals: Proposals) -> torch.Tensor:
        """Score ``(R, D)`` boxes as ``(C, D)`` classes, both L2-normalised: ``(R, C)`` float32 in [0, 1]."""
        logits = self.scale * embeds.float().cpu() @ classes.float().cpu().T
        found = logits.softmax(dim=-1) if self.score == "softmax" else (logits + self.bias).sigmoid()
        certainty = torch.from_numpy(proposals.objectness).float()
        return found * certainty[:, None] if self.objectness else found


@dataclass(frozen=True)
class Detected:
    """What was found in one image, the best first.

    Attributes:
        boxes: (N, 4) xyxy in pixels of the original.
        classes: (N,) the place of each one's class.
        scores: (N,).
    """

    boxes: NDArray[np.float64]
    classes: NDArray[np.int64]
    scores: NDArray[np.float64]


def select(boxes: NDArray[np.float64], scores: torch.Tensor, rules: DetectionRules) -> Detected:
    """Keep the best detections of an image.

    Going through all pairs of box and class from the best down, a pair goes if a kept pair of its class overlaps it.
    That is non-maximum suppression class by class, and it can stop as soon as there are enough.

    Args:
        boxes: ``(R, 4)`` xyxy in pixels.
        scores: ``(R, C)``.
        rules: How.
    """
    count, corners = scores.shape[1], torch.from_numpy(boxes)
    ranked = scores.flatten().sort(descending=True, stable=True)
    kept: list[int] = []
    near: dict[int, NDArray[np.bool_]] = {}
    gone: dict[int, NDArray[np.bool_]] = {}
    for place, pair in enumerate(ranked.indices.tolist()):
        if len(kept) == rules.most or float(ranked.values[place]) <= rules.min_score:
            break
        row, number = divmod(pair, count)
        if number in gone and gone[number][row]:
            continue
        kept.append(place)
        if rules.nms < 1:
            if row not in near:
                near[row] = (box_iou(corners[row : row + 1], corners)[0] > rules.nms).numpy()
            gone[number] = gone[number] | near[row] if number in gone else near[row]
    pairs = ranked.indices[kept].numpy()
    return Detected(boxes[pairs // max(1, count)], pairs % max(1, count), ranked.values[kept].double().numpy())


def detect(
    encoder: Encoder,
    readout: RegionReadout,
    split: RegionSplit,
    source: ProposalSource,
    classes: torch.Tensor,
    rules: DetectionRules,
    settings: EncoderSettings,
) -> tuple[list[Detected], list[Proposals]]:
    """Detect on all images of a split.

    Args:
        encoder: Encodes the pictures.
        readout: Embeds boxes.
        split: The pictures.
        source: Proposes boxes.
        classes: ``(C, D)`` embeddings of the names.
        rules: How embeddings become detections.
        settings: Batch size and progress.

    Returns:
        For each image what was found, and what was proposed.
    """
    found: list[Detected] = []
    proposed: list[Proposals] = []
    with tqdm(total=len(split.ids), unit="img", disable=None if settings.progress else True) as bar:
        for batch, pictures in split.pictures(settings.batch_size):
            images = encoder.encode_images(pictures, [split.ids[number] for number in batch])
            some = source(images, batch)
            for place, proposals in enumerate(some):
                embeds = _embed(readout, images, place, proposals.boxes)
                found.append(select(proposals.boxes, rules.scores(embeds, classes, proposals), rules))
            proposed += some
            bar.update(len(batch))
    return found, proposed


def _embed(readout: RegionReadout, images: EncodedImages, place: int, boxes: NDArray[np.float64]) -> torch.Tensor:
    """Embed boxes of one image of a batch, in parts that fit into memory: each copies the image's tokens."""
    step = max(1, _MEMORY // max(1, images.tokens[place].numel()))
    parts = [images.embeds[:0]]
    for start in range(0, len(boxes), step):
        asked: list[Sequence[Sequence[float]]] = [[] for _ in images.ids]
        asked[place] = boxes[start : start + step].tolist()
        parts.append(readout.embed(images, asked))
    return torch.cat(parts)
