"""Labels against COCO's boxes: noun phrases of captions against n-grams, with any detector.

    python scripts/benchmarks/label_quality.py --images train2017 \
        --instances annotations/instances_train2017.json --captions annotations/captions_train2017.json

COCO's captions stand for re-captions (all five of a picture) and, the first alone, for an alt text; neither is the real
thing: COCO's were written by people who were asked to name what matters. A label is *judged* if its phrase names a
category of COCO, by its last words in singular or plural or by a synonym of `SYNONYMS`; it is right if it overlaps a
box of that category with an IoU of at least 0.5. Crowd boxes are left out. Labels are judged one by one, so two on one
object count twice. Brackets are 95 % bootstrap intervals over pictures.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import print_table, write_report

from cloc_mllm.data.importers.coco import convert_coco
from cloc_mllm.data.readers import open_samples, resolve_image
from cloc_mllm.data.tar_shards import Sample
from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.scoring.metrics import Metric, mean_metric
from cloc_mllm.inference.images import read_image
from cloc_mllm.labeling.detectors.imagenet_nouns import classes_of
from cloc_mllm.labeling.filtering import FilterOptions, filter_detections
from cloc_mllm.labeling.stages import CAPTIONERS, DETECTORS, PHRASES, Detection, build_stage
from cloc_mllm.models.boxes import box_iou

SYNONYMS = {
    "person": "man woman boy girl child kid baby toddler lady guy gentleman people men women children player skier "
    "surfer skateboarder rider cyclist chef cook couple crowd group",
    "bicycle": "bike cycle",
    "motorcycle": "motorbike scooter moped",
    "airplane": "plane jet aircraft",
    "car": "automobile taxi cab suv",
    "truck": "pickup lorry",
    "boat": "ship sailboat canoe",
    "tv": "television monitor screen",
    "cell phone": "phone cellphone smartphone",
    "couch": "sofa",
    "refrigerator": "fridge",
    "oven": "stove range",
    "dining table": "table",
    "potted plant": "plant houseplant",
    "cow": "cattle bull calf",
    "dog": "puppy",
    "cat": "kitten",
    "sports ball": "ball",
    "hot dog": "hotdog",
    "donut": "doughnut",
    "cup": "mug",
    "wine glass": "wineglass glass",
    "handbag": "purse",
    "tie": "necktie",
    "toilet": "commode",
    "teddy bear": "teddy",
}
"""Words that name a category besides its own name."""

ALL, FIRST = "5 captions", "1 caption"
SOURCES = ((ALL, "textblob"), (FIRST, "textblob"), (ALL, "ngrams"), (FIRST, "ngrams"))
IOU = 0.5


@dataclass
class Truth:
    """What COCO says of a picture.

    Attributes:
        size: Width and height in pixels.
        boxes: ``(N, 4)`` xyxy, pixels.
        names: The N categories.
    """

    size: tuple[int, int]
    boxes: torch.Tensor
    names: list[str]


def vocabulary(categories: Sequence[str]) -> dict[str, frozenset[int]]:
    """Each word that names a category, to its number in `categories`."""
    number = {name: frozenset({k}) for k, name in enumerate(categories)}
    also = {word: number[name] for name, words in SYNONYMS.items() if name in number for word in words.split()}
    return {**also, **number}


@dataclass
class Judged:
    """One label beside the truth.

    Attributes:
        image: The picture's id.
        category: What its phrase names, if it names a category.
        right: Best IoU with a box of that category; 0 if there is none.
        anything: Best IoU with any box.
        whole: Best IoU that the whole picture would have had with a box of that category.
    """

    image: str
    category: str | None
    right: float
    anything: float
    whole: float


def judge(image: str, label: Detection, truth: Truth, words: Mapping[str, frozenset[int]], names: list[str]) -> Judged:
    """Compare a label with the truth of its picture."""
    hit = classes_of(label.text, words)
    category = None if hit is None else names[next(iter(hit[1]))]
    own = torch.tensor([name == category for name in truth.names], dtype=torch.bool)
    boxes = torch.tensor([label.box, (0.0, 0.0, *truth.size)], dtype=torch.float64)
    overlaps = box_iou(boxes, truth.boxes)

    def best(row: int, which: torch.Tensor) -> float:
        return float(overlaps[row, which].max()) if bool(which.any()) else 0.0

    return Judged(image, category, best(0, own), best(0, torch.ones_like(own)), best(1, own))


def found_boxes(
    labels: Sequence[Detection], truth: Truth, words: Mapping[str, frozenset[int]], names: list[str]
) -> Any:
    """``(N,)`` booleans: which of the truth's boxes a label of the right category overlaps enough."""
    hits = np.zeros(len(truth.names), dtype=bool)
    for label in labels:
        hit = classes_of(label.text, words)
        if hit is not None:
            close = box_iou(torch.tensor([label.box], dtype=torch.float64), truth.boxes)[0] >= IOU
            same = torch.tensor([name == names[next(iter(hit[1]))] for name in truth.names], dtype=torch.bool)
            hits |= (close & same).numpy()
    return hits


def read_coco(args: argparse.Namespace, folder: Path) -> tuple[list[Sample], dict[str, Truth], list[str]]:
    """The pictures with captions, their truth, and the names of all categories."""
    convert_coco(args.images, args.instances, args.captions, folder)
    source = open_samples(folder)
    samples = [source[k] for k in range(len(source))][: args.limit]
    samples = [{**sample, "image": resolve_image(sample["image"], folder)} for sample in samples]
    truths = {
        sample["id"]: Truth(
            (sample["width"], sample["height"]),
            torch.tensor([region["box"] for region in sample["regions"]], dtype=torch.float64).reshape(-1, 4),
            [region["text"] for region in sample["regions"]],
        )
        for sample in samples
    }
    names = [category["name"] for category in json.loads(args.instances.read_text())["categories"]]
    return samples, truths, names


def label(
    samples: Sequence[Sample], phrases: Sequence[Sequence[str]], detector: Any, options: FilterOptions, batch: int
) -> tuple[dict[str, list[Detection]], Counter[str]]:
    """Labels of each picture, and what the filter took away."""
    labels: dict[str, list[Detection]] = {}
    dropped: Counter[str] = Counter()
    for start in range(0, len(samples), batch):
        part = samples[start : start + batch]
        images = [read_image(sample["image"]).convert("RGB") for sample in part]
        for sample, image, found in zip(part, images, detector(images, phrases[start : start + batch]), strict=True):
            labels[sample["id"]], reasons = filter_detections(found, image.size, options)
            dropped += reasons
    return labels, dropped


def measure_source(
    labels: Mapping[str, Sequence[Detection]],
    phrases: Mapping[str, Sequence[str]],
    truths: Mapping[str, Truth],
    names: list[str],
) -> dict[str, Any]:
    """All figures of one way to get phrases."""
    words = vocabulary(names)
    judged = [judge(image, one, truths[image], words, names) for image, own in labels.items() for one in own]
    named = [one for one in judged if one.category is not None]
    boxes = [(image, name) for image, truth in truths.items() for name in truth.names]
    recalled = [hit for image, truth in truths.items() for hit in found_boxes(labels[image], truth, words, names)]
    asked = {
        image: {names[next(iter(hit[1]))] for phrase in own if (hit := classes_of(phrase, words))}
        for image, own in phrases.items()
    }
    sought = [name in asked[image] for image, name in boxes]

    def mean(values: Sequence[Any], images: Sequence[str]) -> Metric:
        return mean_metric(np.asarray(values, dtype=np.float64), images)

    own, every, places = [one.image for one in named], [one.image for one in judged], [image for image, _ in boxes]
    texts = [one.text for part in labels.values() for one in part]
    return {
        "phrases_an_image": mean([len(part) for part in phrases.values()], list(phrases)),
        "labels_an_image": mean([len(part) for part in labels.values()], list(labels)),
        "words_a_label": mean([len(text.split()) for text in texts], every),
        "boxes_asked_for": mean(sought, places),
        "precision": mean([one.right >= IOU for one in named], own),
        "precision_of_the_whole_picture": mean([one.whole >= IOU for one in named], own),
        "mean_iou": mean([one.right for one in named], own),
        "any_box": mean([one.anything >= IOU for one in judged], every),
        "recall": mean(recalled, places),
        "recall_of_those_asked_for": mean(
            [hit for hit, wanted in zip(recalled, sought, strict=True) if wanted],
            [image for image, wanted in zip(places, sought, strict=True) if wanted],
        ),
    }


def cell(metric: Metric, share: bool) -> str:
    """A figure with its interval; shares in per cent, with their number of items."""
    factor, digits = (100, 1) if share else (1, 1)
    low, high = metric.ci95
    text = f"{metric.value * factor:.{digits}f} [{low * factor:.{digits}f}, {high * factor:.{digits}f}]"
    return f"{text}, n = {metric.n}" if share else text


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--instances", type=Path, required=True, help="COCO's instances file")
    parser.add_argument("--captions", type=Path, required=True, help="COCO's captions file")
    parser.add_argument("--detector", default="cam", help="a detector's specification, such as owlv2:FOLDER")
    parser.add_argument("--score", type=float, default=0.1, help="labels have to be more confident than this")
    parser.add_argument("--batch", type=int, default=8, help="pictures at a time")
    parser.add_argument("--limit", type=int, help="the first so many pictures only")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder of the JSON")
    return parser.parse_args()


def main() -> None:
    """Label the pictures each way, compare with the truth, print the table, write the JSON."""
    args = parse()
    detector = build_stage(DETECTORS, args.detector, args.device)
    captioner = build_stage(CAPTIONERS, "existing")
    options = FilterOptions(score=args.score)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        samples, truths, names = read_coco(args, Path(folder))
        captions = captioner([], samples)
        for which, extractor in SOURCES:
            texts = captions if which == ALL else [own[:1] for own in captions]
            phrases = build_stage(PHRASES, extractor)(texts)
            start = time.perf_counter()
            labels, dropped = label(samples, phrases, detector, options, args.batch)
            seconds = (time.perf_counter() - start) / len(samples)
            own = dict(zip([sample["id"] for sample in samples], phrases, strict=True))
            figures = measure_source(labels, own, truths, names)
            results.append(
                {"source": f"{extractor}, {which}", "seconds_an_image": seconds, "dropped": dropped, **figures}
            )
    heads = list(figures)
    rows = [["", *(result["source"] for result in results)]]
    for head in heads:
        share = not head.endswith(("_image", "_label"))
        rows.append([head, *(cell(result[head], share or head == "mean_iou") for result in results)])
    print_table(rows)
    boxes = sum(len(truth.names) for truth in truths.values())
    print(
        f"\n{len(samples)} pictures, {boxes} boxes of {len({n for t in truths.values() for n in t.names})} categories."
    )
    plain = [{k: v.to_dict() if isinstance(v, Metric) else v for k, v in result.items()} for result in results]
    settings = {"detector": dict(detector.identity()), "filter": asdict(options)}
    write_report(args.out, "label_quality", [{**settings, **result} for result in plain])


if __name__ == "__main__":
    try:
        main()
    except ClocError as error:
        sys.exit(f"error: {error}")
