"""The ``image`` suite: any encoder on whole images: zero-shot classification, or retrieval with captions.

Classification takes images with a class each and reports top-1 and top-5 with CLIP's 80 templates, as the field does,
and with bare names. Retrieval takes images with captions and reports R@1, 5 and 10 both ways; an image is right if any
of its captions is among the best k. Images go in by the model's own preprocessing.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from cloc_mllm.data.labelled import SAMPLES_FILE, LabelledImages
from cloc_mllm.data.prompt_templates import BARE, IMAGENET, templates_of
from cloc_mllm.data.readers import open_samples
from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.encoders.loading import load_encoder
from cloc_mllm.evaluation.encoders.measure import (
    EncoderSettings,
    Metrics,
    TextBank,
    all_captions,
    image_metrics,
    similarity_of,
)
from cloc_mllm.evaluation.encoders.readouts import Encoder
from cloc_mllm.evaluation.encoders.region_data import RegionSplit, dataset_ref, load_region_split
from cloc_mllm.evaluation.encoders.zero_shot import class_embeddings
from cloc_mllm.evaluation.reporting.known_splits import KNOWN_SPLITS
from cloc_mllm.evaluation.scoring.metrics import class_mean_metric, mean_metric, topk_hits
from cloc_mllm.evaluation.suites.options import EvalOptions, Outcome, batch_size_of, settings_of

RECALLS = (1, 5, 10)
TASKS = ("auto", "zero-shot", "retrieval")


@dataclass(frozen=True)
class ImageSettings:
    """Settings of this suite.

    Attributes:
        task: ``zero-shot``, ``retrieval``, or ``auto``: whichever the data are made for.
        templates: Of classification: ``imagenet`` (the 80), ``simple``, ``bare``, or a list.
        class_names: Classification: a JSON file that names the classes, a mapping from the folders' (or labels') names,
            or a list in their order; default their own names.
        captions: Retrieval: use the first so many captions of each image (the standard protocol: 5); default all.
        dataset: The public set that the data are (``imagenet``, ``coco-karpathy``, …), so that a part is not called by
            the name of the split; default what ``dataset.json`` says.
    """

    task: str = "auto"
    templates: str | list[str] = "imagenet"
    class_names: str | None = None
    captions: int | None = None
    dataset: str | None = None

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ClocError(f"task is '{self.task}'", remedy=f"It is one of {', '.join(TASKS)}.")
        if self.captions is not None and (not isinstance(self.captions, int) or self.captions < 1):
            raise ClocError(f"captions is {self.captions!r}, not a positive whole number")
        if self.dataset is not None and self.dataset not in KNOWN_SPLITS:
            raise ClocError(f"no data set '{self.dataset}' is known", remedy=f"There are: {', '.join(KNOWN_SPLITS)}.")
        templates_of(self.templates)


def run(options: EvalOptions) -> Outcome:
    """Measure the encoder that ``--model`` names."""
    asked = settings_of(ImageSettings, options)
    if options.method is not None:
        raise ClocError("--method is for regions: this suite embeds whole images")
    settings = EncoderSettings(seed=options.seed, **batch_size_of(options))
    labelled = asked.task == "zero-shot" or (asked.task == "auto" and _holds_labels(Path(options.data_path)))
    return (_classification if labelled else _retrieval)(options, asked, settings)


def _holds_labels(path: Path) -> bool:
    """Whether data are images with a class each rather than images with captions."""
    if path.is_dir():
        listed = any(path.glob("*.jsonl")) or any(path.glob("*.parquet")) or any(path.glob("*.tar"))
        return (path / SAMPLES_FILE).is_file() or (not listed and any(one.is_dir() for one in path.iterdir()))
    first = open_samples(path, SAMPLES_FILE)[0]
    return "label" in first and "caption" not in first


# --- classification ----------------------------------------------------------------------------------------------


def _classification(options: EvalOptions, asked: ImageSettings, settings: EncoderSettings) -> Outcome:
    images = LabelledImages(options.data_path, options.limit)
    names = class_names(images.classes, asked.class_names)
    ref = dataset_ref(options.data_path, options.split, len(images), images.total, kind=asked.dataset)
    encoder = load_encoder(options.model, options.device)
    metrics, details = classify(encoder, images, names, templates_of(asked.templates), settings)
    return Outcome(ref, metrics, details)


def classify(
    encoder: Encoder,
    images: LabelledImages,
    names: Sequence[str],
    templates: Sequence[str] = IMAGENET,
    settings: EncoderSettings | None = None,
) -> tuple[Metrics, dict[str, Any]]:
    """Classify images by the names of their classes.

    Args:
        encoder: The encoder.
        images: Images and their classes.
        names: What each class is called.
        templates: The sentences whose embeddings are averaged.
        settings: Batch size and seed.

    Returns:
        Top-1, its mean over classes, and top-5; and the details: the same with bare names, chance, what was used.
    """
    settings = settings or EncoderSettings()
    embeds = embed_whole(encoder, _labelled_batches(images, settings.batch_size), len(images), settings)

    def measured(with_templates: Sequence[str]) -> Metrics:
        scores = similarity_of(embeds, class_embeddings(encoder, names, with_templates))
        top1 = topk_hits(scores, images.labels)
        return {
            "image_top1": mean_metric(top1, images.ids, seed=settings.seed),
            "image_top5": mean_metric(topk_hits(scores, images.labels, 5), images.ids, seed=settings.seed),
            "image_macc": class_mean_metric(top1, images.labels, images.ids, seed=settings.seed),
        }

    return measured(templates), {
        "templates": {"headline": f"{len(templates)} templates", "bare names": measured(BARE)},
        "baselines": {"image_top1": {"chance": 1 / len(names)}, "image_top5": {"chance": min(1.0, 5 / len(names))}},
        "classes": {"number": len(names), "first": ", ".join(names[:3])},
        "preprocessing": encoder.preprocessing,
    }


def class_names(classes: Sequence[str], path: str | None) -> list[str]:
    """Return what classes are called.

    Args:
        classes: Their names in the data, in their order there.
        path: A JSON file: a mapping from these names, or a list in their order (in the order of the numbers, where the
            names are numbers, as in ImageNet v2); None: they are called as in the data.

    Raises:
        ClocError: The file cannot be read or does not name every class.
    """
    if path is None:
        return list(classes)
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ClocError(f"cannot read the names of the classes ({error})", file=path) from error
    if isinstance(given, list):
        order = sorted(classes, key=int) if all(name.isdigit() for name in classes) else list(classes)
        if len(given) != len(order):
            raise ClocError(f"names {len(given)} classes, and the data have {len(order)}", file=path)
        given = dict(zip(order, given, strict=True))
    if not isinstance(given, dict):
        raise ClocError("is neither a mapping nor a list of names", file=path)
    missing = [name for name in classes if not isinstance(given.get(name), str)]
    if missing:
        raise ClocError(f"does not name the class '{missing[0]}'", file=path)
    return [given[name] for name in classes]


def _labelled_batches(images: LabelledImages, size: int) -> Iterator[tuple[list[Image.Image], list[str]]]:
    for start in range(0, len(images), size):
        rows = range(start, min(start + size, len(images)))
        yield [images[row] for row in rows], [str(row) for row in rows]


# --- retrieval ---------------------------------------------------------------------------------------------------


def _retrieval(options: EvalOptions, asked: ImageSettings, settings: EncoderSettings) -> Outcome:
    split = load_region_split(
        options.data_path, split=options.split, limit=options.limit, seed=options.seed, kind=asked.dataset
    )
    if asked.captions is not None:
        split = dataclasses.replace(split, captions=[some[: asked.captions] for some in split.captions])
    encoder = load_encoder(options.model, options.device)
    metrics, details = retrieve(encoder, split, settings)
    return Outcome(split.ref, metrics, details)


def retrieve(
    encoder: Encoder, split: RegionSplit, settings: EncoderSettings | None = None
) -> tuple[Metrics, dict[str, Any]]:
    """Find captions of images and images of captions among all of a split.

    Args:
        encoder: The encoder.
        split: Images and their captions.
        settings: Batch size and seed.

    Returns:
        R@1, 5 and 10 both ways; and the details: what was chosen from.

    Raises:
        ClocError: All images have the same caption, so there is nothing to choose from.
    """
    settings = settings or EncoderSettings()
    captions = all_captions(split)
    distinct, sizes = len(set(captions)), sorted({len(some) for some in split.captions})
    if distinct < 2:
        raise ClocError(
            "all images have the same caption: every answer would be right",
            file=split.ref.path,
            remedy="Retrieval needs data with captions of their own.",
        )
    batches = ((pictures, [split.ids[k] for k in rows]) for rows, pictures in split.pictures(settings.batch_size))
    embeds = embed_whole(encoder, batches, len(split.ids), settings)
    metrics = image_metrics(embeds, split, TextBank(encoder, captions), settings, RECALLS)
    each = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    return metrics, {
        "pools": {"images": len(split.ids), "captions": f"{distinct} distinct of {len(captions)}, {each} an image"},
        "baselines": {"image_i2t_r1": {"chance": 1 / distinct}, "image_t2i_r1": {"chance": 1 / len(split.ids)}},
        "preprocessing": encoder.preprocessing,
    }


def embed_whole(
    encoder: Encoder, batches: Iterator[tuple[list[Image.Image], list[str]]], count: int, settings: EncoderSettings
) -> torch.Tensor:
    """Embed images by the model's own preprocessing: ``(count, D)`` on the CPU."""
    parts = []
    with tqdm(total=count, unit="img", disable=None if settings.progress else True) as bar:
        for pictures, ids in batches:
            parts.append(encoder.embed_images(pictures, ids).cpu())
            bar.update(len(pictures))
    return torch.cat(parts)
