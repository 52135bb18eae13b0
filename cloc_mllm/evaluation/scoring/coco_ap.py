"""COCO's average precision, and LVIS's, by the reference implementation: pycocotools, or faster-coco-eval instead.

Nothing of the metric is written anew here: truth and detections go in, the table of precisions comes out and is
averaged. LVIS adds two rules, and both packages get them in their own way: a detection of a class that was not looked
for in an image does not count, and where a class was not annotated exhaustively, a detection without a match is no
mistake.
"""

from __future__ import annotations

import contextlib
import io
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.scoring.metrics import Metric

BACKENDS = ("pycocotools", "faster-coco-eval")
AREAS = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
"""Pixels, both ends included, as pycocotools has it."""
_IOU_50, _IOU_75, _ALL_AREAS = 0, 5, 0

Record = Mapping[str, Any]


def average_precision(
    truth: Mapping[str, Sequence[Record]],
    detections: Sequence[Record],
    *,
    groups: Mapping[str, Sequence[int]] | None = None,
    most: int = 100,
    backend: str = "pycocotools",
    resamples: int = 100,
    seed: int = 0,
) -> dict[str, Metric]:
    """Score detections.

    Args:
        truth: COCO's layout: ``images`` (``id``; LVIS's ``neg_category_ids`` and ``not_exhaustive_category_ids``),
            ``annotations`` (``image_id``, ``category_id``, ``bbox`` xywh in pixels, ``area``, ``iscrowd``) and
            ``categories`` (``id``).
        detections: COCO's results: ``image_id``, ``category_id``, ``bbox`` xywh in pixels, ``score``.
        groups: Categories that also get an average of their own, by name.
        most: Detections that count for each class of an image, the best first (COCO: 100, LVIS: 300).
        backend: One of :data:`BACKENDS`.
        resamples: Draws of the images that the intervals rest on; 0: no intervals.
        seed: Of these draws.

    Returns:
        ``ap``, ``ap50``, ``ap75``, ``ap_small``, ``ap_medium``, ``ap_large``, and ``ap_NAME``, ``ap50_NAME`` of each
        group; their ``n`` is the number of boxes to be found. What has no box to be found is NaN.

    Raises:
        ClocError: There is no such backend, or its package is not installed.
    """
    groups = groups or {}
    counted = [one for one in truth["annotations"] if not one.get("iscrowd")]
    order = sorted(one["id"] for one in truth["categories"])
    columns = {name: [order.index(number) for number in some] for name, some in groups.items()}
    evaluator = _open(backend)(truth, _federated(truth, detections), most)
    values = _averages(evaluator.precision(), columns)
    rng, images = np.random.default_rng(seed), len(truth["images"])
    drawn = [
        _averages(evaluator.precision(rng.integers(0, images, size=images)), columns)
        for _ in range(resamples if counted else 0)
    ]
    sizes = _boxes_to_find(counted, groups)
    return {
        name: Metric(value, _interval(value, [one[name] for one in drawn]), sizes[name.partition("_")[2]])
        for name, value in values.items()
    }


def _averages(precision: NDArray[np.float64], columns: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Average ``(T, R, K, A)`` precisions (-1: no box to be found) in every way that is reported."""
    every = precision[..., _ALL_AREAS]
    found = {"ap": _mean(every), "ap50": _mean(every[_IOU_50]), "ap75": _mean(every[_IOU_75])}
    found |= {f"ap_{name}": _mean(precision[..., number]) for number, name in enumerate(AREAS, start=1)}
    for name, some in columns.items():
        found[f"ap_{name}"] = _mean(every[:, :, some])
        found[f"ap50_{name}"] = _mean(every[_IOU_50][:, some])
    return found


def _mean(precision: NDArray[np.float64]) -> float:
    present = precision[precision > -1]
    return float(present.mean()) if present.size else math.nan


def _interval(value: float, drawn: Sequence[float]) -> tuple[float, float]:
    """Two standard errors around the value. Not the draws' percentiles, as everywhere else: AP is no mean.

    A draw repeats images, whose detections then confirm each other, and loses rare classes: its AP lies above the
    value more often than not, by more than the interval's width where classes are rare.
    """
    if math.isnan(value) or np.isfinite(drawn).sum() < 2:
        return math.nan, math.nan
    spread = 1.96 * float(np.nanstd(drawn, ddof=1))
    return max(0.0, value - spread), min(1.0, value + spread)


def _boxes_to_find(counted: Sequence[Record], groups: Mapping[str, Sequence[int]]) -> dict[str, int]:
    found = {"": len(counted)}
    for name, (low, high) in AREAS.items():
        found[name] = sum(low <= one["area"] <= high for one in counted)
    for name, some in groups.items():
        found[name] = sum(one["category_id"] in set(some) for one in counted)
    return found


def _federated(truth: Mapping[str, Sequence[Record]], detections: Sequence[Record]) -> list[dict[str, Any]]:
    """Apply LVIS's rules where images say what was looked for; other detections pass as they are.

    Detections get what both packages want of results: ``id`` from 1, ``area``, ``iscrowd``; and ``lvis_mark``.
    """
    sought: dict[Any, set[int]] = {}
    loose: dict[Any, set[int]] = {}
    for image in truth["images"]:
        if "neg_category_ids" in image:
            sought[image["id"]] = set(image["neg_category_ids"])
            loose[image["id"]] = set(image.get("not_exhaustive_category_ids") or ())
    for one in truth["annotations"]:
        if one["image_id"] in sought:
            sought[one["image_id"]].add(one["category_id"])
    kept: list[dict[str, Any]] = []
    for one in detections:
        image, category = one["image_id"], one["category_id"]
        if image in sought and category not in sought[image]:
            continue
        area = one["bbox"][2] * one["bbox"][3]
        marked = category in loose.get(image, ())
        kept.append({**one, "id": len(kept) + 1, "area": area, "iscrowd": 0, "lvis_mark": marked})
    return kept


def _open(backend: str) -> Any:
    if backend not in BACKENDS:
        raise ClocError(f"there is no backend '{backend}'", remedy=f"Choose one of {', '.join(BACKENDS)}.")
    return _Pycocotools if backend == "pycocotools" else _FasterCocoEval


class _Evaluator(ABC):
    """One run of a package: matched once, averaged over as many draws of images as are wanted."""

    package: str

    def __init__(self, truth: Mapping[str, Sequence[Record]], detections: Sequence[Record], most: int) -> None:
        dataset, evaluator = self._import()
        # Numbered from 1: both packages write the number of the box that was found, and take 0 for none.
        boxes = [{"iscrowd": 0, **one, "id": k + 1} for k, one in enumerate(truth["annotations"])]
        with _silent():
            sides = []
            for annotations in (boxes, [dict(one) for one in detections]):
                side = dataset()
                side.dataset = {**truth, "annotations": annotations}
                side.createIndex()
                sides.append(side)
            self.run = evaluator(*sides, "bbox")
            self.run.params.maxDets = [most]
            self.match(detections)
        shape = (len(truth["categories"]), 1 + len(AREAS), len(truth["images"]))
        self.cells = np.empty(math.prod(shape), dtype=object)
        self.cells[:] = self.matched()
        self.cells = self.cells.reshape(shape)

    def _import(self) -> tuple[Any, Any]:
        try:
            return self.classes()
        except ImportError as error:
            remedy = f"Install it: pip install {self.package} (or 'cloc-mllm[eval]')."
            raise ClocError(f"average precision needs {self.package}, which is not installed", remedy=remedy) from error

    def precision(self, images: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
        """Return the ``(T, R, K, A)`` precisions over all images, or over a draw of them with repetitions."""
        cells = self.cells if images is None else self.cells[:, :, images]
        with _silent():
            self.put(list(cells.ravel()))
            self.run.accumulate()
        return np.asarray(self.run.eval["precision"], dtype=np.float64)[..., 0]

    @abstractmethod
    def classes(self) -> tuple[Any, Any]:
        """Import the package's data set and evaluator."""

    def match(self, detections: Sequence[Record]) -> None:
        """Match detections with boxes, image by image."""
        self.run.evaluate()

    @abstractmethod
    def matched(self) -> list[Any]:
        """Return what was matched, category by category, area by area, image by image."""

    @abstractmethod
    def put(self, cells: list[Any]) -> None:
        """Have these cells averaged next."""


class _Pycocotools(_Evaluator):
    package = "pycocotools"

    def classes(self) -> tuple[Any, Any]:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return COCO, COCOeval

    def match(self, detections: Sequence[Record]) -> None:
        self.run.evaluate()
        marked = [one["id"] for one in detections if one["lvis_mark"]]
        if not marked:
            return
        for cell in self.run.evalImgs:
            if cell is not None:
                forgiven = np.isin(cell["dtIds"], marked)[None] & (cell["dtMatches"] == 0)
                cell["dtIgnore"] = np.logical_or(cell["dtIgnore"], forgiven)

    def matched(self) -> list[Any]:
        return list(self.run.evalImgs)

    def put(self, cells: list[Any]) -> None:
        self.run.evalImgs = cells


class _FasterCocoEval(_Evaluator):
    package = "faster-coco-eval"

    def classes(self) -> tuple[Any, Any]:
        from faster_coco_eval import COCO, COCOeval_faster

        def evaluator(*words: Any) -> Any:
            return COCOeval_faster(*words, separate_eval=True, print_function=lambda *_: None)

        return COCO, evaluator

    def matched(self) -> list[Any]:
        return list(self.run._evalImgs_cpp)

    def put(self, cells: list[Any]) -> None:
        self.run._evalImgs_cpp = cells


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep pycocotools' progress off the screen."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
