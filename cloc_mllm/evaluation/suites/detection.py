"""The ``detection`` suite: open-vocabulary detection by any encoder, scored with COCO's or LVIS's average precision.

Boxes are proposed (by a grid, a file, a detector, or the truth itself), embedded as regions and compared with the names
of the categories. The truth is the data's regions or, for the official protocol, the annotation file they came from,
which also knows crowds, areas of masks and what LVIS did not look for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cloc_mllm.data.prompt_templates import templates_of
from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.encoders.detection import Detected, DetectionRules, detect
from cloc_mllm.evaluation.encoders.detection_truth import Truth, read_truth
from cloc_mllm.evaluation.encoders.loading import load_encoder
from cloc_mllm.evaluation.encoders.measure import EncoderSettings, Metrics
from cloc_mllm.evaluation.encoders.proposals import Proposals, build_proposals
from cloc_mllm.evaluation.encoders.readouts import Encoder, build_readouts, default_device
from cloc_mllm.evaluation.encoders.region_data import RegionSplit, load_region_split
from cloc_mllm.evaluation.encoders.vocabulary import OV_COCO
from cloc_mllm.evaluation.encoders.zero_shot import class_embeddings
from cloc_mllm.evaluation.scoring.coco_ap import BACKENDS, average_precision
from cloc_mllm.evaluation.scoring.metrics import mean_metric
from cloc_mllm.evaluation.suites.options import EvalOptions, Outcome, batch_size_of, settings_of
from cloc_mllm.models.boxes import box_iou

_BATCH = 8


@dataclass(frozen=True)
class DetectionSettings:
    """Settings of this suite.

    Attributes:
        proposals: ``grid``, ``ground-truth``, ``file:PATH`` (COCO's results) or ``detector:SPEC``.
        grid: With ``grid``: its ``steps``, ``scales``, ``aspects``.
        annotations: COCO's or LVIS's annotation file, for the official protocol; default the data's regions.
        categories: Without ``annotations``: ``auto``, ``known``, ``occurring``, a file; with or without: ``ov-coco``.
        templates: ``imagenet`` (the 80), ``simple``, ``bare``, or a list.
        score: ``softmax`` over the categories, ``sigmoid`` of each, or ``auto``: as the model was trained.
        temperature: Multiplier of the cosine; default the model's own.
        objectness: Multiply by the proposal's own score.
        nms: IoU above which the worse of two boxes of a class goes; default 0.5, and none for the true boxes.
        most: Detections of an image (COCO: 100, LVIS: 300).
        min_score: Detections must score more.
        backend: ``pycocotools`` or ``faster-coco-eval``.
        resamples: Draws of the images for the intervals; 0: no intervals.
    """

    proposals: str = "grid"
    grid: Mapping[str, Any] | None = None
    annotations: str | None = None
    categories: str = "auto"
    templates: str | list[str] = "imagenet"
    score: str = "auto"
    temperature: float | None = None
    objectness: bool = True
    nms: float | None = None
    most: int = 100
    min_score: float = 0.0
    backend: str = "pycocotools"
    resamples: int = 100

    def __post_init__(self) -> None:
        templates_of(self.templates)
        if self.backend not in BACKENDS:
            raise ClocError(f"there is no backend '{self.backend}'", remedy=f"Choose one of {', '.join(BACKENDS)}.")
        if self.resamples < 0:
            raise ClocError(f"resamples is {self.resamples!r}, not a whole number from 0")
        if self.score not in ("auto", "softmax", "sigmoid"):
            raise ClocError(f"score is '{self.score}'", remedy="It is auto, softmax or sigmoid.")
        if self.most < 1:
            raise ClocError(f"most is {self.most}, not a positive whole number")
        if self.nms is not None and not 0 <= self.nms <= 1:
            raise ClocError(f"nms is {self.nms}, not a share from 0 to 1")
        if self.temperature is not None and self.temperature <= 0:
            raise ClocError(f"temperature is {self.temperature}, not a positive number")
        if self.annotations is not None and self.categories not in ("auto", OV_COCO):
            raise ClocError("with annotations, the categories are those of the file", remedy="Leave categories out.")


def run(options: EvalOptions) -> Outcome:
    """Measure the encoder that ``--model`` names."""
    asked = settings_of(DetectionSettings, options)
    split = load_region_split(options.data_path, split=options.split, limit=options.limit, seed=options.seed)
    truth, split = read_truth(asked.annotations, asked.categories, split, options.data_path)
    encoder = load_encoder(options.model, options.device)
    settings = EncoderSettings(seed=options.seed, **({"batch_size": _BATCH} | batch_size_of(options)))
    metrics, details = evaluate_detection(
        encoder, split, truth, asked, settings, options.method, default_device(options.device)
    )
    return Outcome(split.ref, metrics, details)


def evaluate_detection(
    encoder: Encoder,
    split: RegionSplit,
    truth: Truth,
    asked: DetectionSettings,
    settings: EncoderSettings,
    method: str | None = None,
    device: str = "cpu",
    readout: Any = None,
) -> tuple[Metrics, dict[str, Any]]:
    """Detect on a split and score it.

    Args:
        encoder: The encoder.
        split: The pictures, in the order that the truth numbers them.
        truth: What is to be found.
        asked: How.
        settings: Batch size, seed, progress.
        method: How boxes are read; default the encoder's own way.
        device: Where a detector that proposes boxes runs.
        readout: Embeds boxes, instead of what ``method`` names.

    Returns:
        AP in all its forms and the recall of the proposals; and the details: truth, proposals, rules.
    """
    readout = readout or build_readouts(encoder, [method or _default_method(encoder)])[0]
    source = build_proposals(asked.proposals, split, truth.names, device, asked.grid)
    rules = _rules(asked, encoder, source.distinct)
    classes = class_embeddings(encoder, truth.names, templates_of(asked.templates))
    found, proposed = detect(encoder, readout, split, source, classes, rules, settings)
    metrics = average_precision(
        truth.coco,
        list(_as_results(found, [one["id"] for one in truth.coco["categories"]])),
        groups=truth.groups,
        most=rules.most,
        backend=asked.backend,
        resamples=asked.resamples,
        seed=settings.seed,
    )
    metrics["proposal_recall50"] = mean_metric(*_proposal_hits(split, proposed), seed=settings.seed)
    boxes, kept = sum(len(one.boxes) for one in proposed), sum(len(one.boxes) for one in found)
    return metrics, {
        "truth": {"boxes": truth.source, "categories": len(truth.names)},
        "proposals": {"source": source.described, "boxes an image": round(boxes / len(proposed), 1)},
        "detections": {"an image": round(kept / len(found), 1), **dataclasses.asdict(rules), "readout": readout.name},
        "scoring": {
            "package": asked.backend,
            "intervals": f"{asked.resamples} draws of the images" if asked.resamples else "none",
            "templates": len(templates_of(asked.templates)),
        },
    }


def _default_method(encoder: Encoder) -> str:
    """The Prompter, or pooling: a crop for each of hundreds of boxes has to be asked for."""
    return next((name for name in ("prompter", "roi") if name in encoder.methods), "crop")


def _rules(asked: DetectionSettings, encoder: Encoder, distinct: bool) -> DetectionRules:
    score = asked.score
    if score == "auto":
        score = "softmax" if encoder.bias is None else "sigmoid"
    if score == "sigmoid" and encoder.bias is None:
        raise ClocError(
            "this encoder was trained with the softmax and has no bias: its sigmoid would be near 1 for every box",
            file=encoder.name,
            remedy="Use score=softmax.",
        )
    return DetectionRules(
        score=score,
        scale=encoder.scale if asked.temperature is None else asked.temperature,
        bias=encoder.bias or 0.0,
        objectness=asked.objectness,
        nms=asked.nms if asked.nms is not None else (1.0 if distinct else 0.5),
        most=asked.most,
        min_score=asked.min_score,
    )


def _as_results(found: Sequence[Detected], ids: Sequence[int]) -> Iterable[dict[str, Any]]:
    for number, detected in enumerate(found, start=1):
        low, sides = detected.boxes[:, :2], detected.boxes[:, 2:] - detected.boxes[:, :2]
        rows = np.concatenate([low, sides], axis=1).tolist()
        for row, kind, score in zip(rows, detected.classes.tolist(), detected.scores.tolist(), strict=True):
            yield {"image_id": number, "category_id": ids[kind], "bbox": row, "score": score}


def _proposal_hits(split: RegionSplit, proposed: Sequence[Proposals]) -> tuple[list[bool], list[str]]:
    """Whether some proposal overlaps each true box by an IoU of 0.5, and each one's image: no detector finds more."""
    hits: list[bool] = []
    for region in split.regions:
        boxes = torch.from_numpy(proposed[region.image].boxes)
        true = torch.tensor([region.box], dtype=torch.float64)
        hits.append(bool((box_iou(true, boxes) >= 0.5).any()))
    keys = split.image_keys
    return hits, [keys[region.image] for region in split.regions]
