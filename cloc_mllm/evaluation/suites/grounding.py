"""The ``grounding`` suite: the box of what an expression names, on RefCOCO, RefCOCO+, RefCOCOg and data like them.

Measured on region-text data in which each text names its box alone, as `cloc-mllm data convert refcoco` writes them.
The first box of the answer counts. An answer without a readable box is wrong, and the share of those is reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.encoders.region_data import Region, RegionSplit, draw, load_region_split
from cloc_mllm.evaluation.mllms.answerers import Answerer, MllmSettings, answer_record, ask_each, first_boxes
from cloc_mllm.evaluation.reporting.known_splits import KNOWN_EXPRESSIONS
from cloc_mllm.evaluation.reporting.report import DatasetRef
from cloc_mllm.evaluation.scoring.metrics import Metric, box_ious, mean_metric
from cloc_mllm.evaluation.suites.asking import (
    AskingSettings,
    grounding_mode,
    load_answerer,
    mllm_settings,
    question,
    refuse_asking,
)
from cloc_mllm.evaluation.suites.encoder_grounding import locate_texts
from cloc_mllm.evaluation.suites.options import ENCODER, EvalOptions, Outcome, model_type, settings_of
from cloc_mllm.inference.templates import Templates

THRESHOLDS = (0.25, 0.5, 0.75)
HEADLINE = 0.5
PHRASE = "{phrase}"


@dataclass(frozen=True)
class GroundingSettings(AskingSettings):
    """The settings of this suite.

    Attributes:
        question: What is asked, with ``{phrase}`` in it; default the model's own template.
        of: The public set that the data are a split of, such as ``refcoco``: the number of expressions is then held
            against the split's known one. Default what ``dataset.json`` says.
    """

    question: str | None = None
    of: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.question is not None and str(self.question).count(PHRASE) != 1:
            raise ClocError(f"the question needs {PHRASE} exactly once: {self.question!r}")
        if self.of is not None and self.of not in KNOWN_EXPRESSIONS:
            raise ClocError(f"no splits are known of '{self.of}'", remedy=f"Known: {', '.join(KNOWN_EXPRESSIONS)}.")

    def ask(self, phrase: str) -> str:
        """The question for a phrase."""
        if self.question is None:
            return Templates().where_is(phrase)
        return self.question.replace(PHRASE, phrase)


def run(options: EvalOptions) -> Outcome:
    """Ask the MLLM that a folder holds, or let the encoder search."""
    settings = settings_of(GroundingSettings, options)
    data = load_region_split(options.data_path, split=options.split, seed=options.seed, kind=settings.of)
    expressions = load_expressions(data, settings.of, options.limit, options.seed)
    if model_type(options.model) == ENCODER:
        refuse_asking(options, settings)
        return score_located(expressions, locate_texts(options, data, expressions.rows), options.seed)
    return evaluate_grounding(load_answerer(options, settings), expressions, settings, mllm_settings(options))


@dataclass(frozen=True)
class Expressions:
    """Some or all expressions of a split.

    Attributes:
        ref: What to call it; counts expressions.
        rows: Which regions of the split are looked for, ascending.
        data: The split that they come from.
        ambiguous: Regions left out because their text fits another region of the picture as well.
    """

    ref: DatasetRef
    rows: list[int]
    data: RegionSplit
    ambiguous: int

    @property
    def regions(self) -> list[Region]:
        """What is looked for."""
        return [self.data.regions[row] for row in self.rows]


def load_expressions(data: RegionSplit, of: str | None = None, limit: int | None = None, seed: int = 0) -> Expressions:
    """Take the expressions of region-text data that name their box alone.

    Args:
        data: All images of a split.
        of: The public set, default the one that the data are; a split of it that has fewer expressions than it
            should is called a subset.
        limit: So many expressions, drawn with ``seed``; None takes all.
        seed: Of the draw.

    Raises:
        ClocError: There is none, the set has no such split, or there are more of them than the split has.
    """
    of = of or (data.ref.kind if data.ref.kind in KNOWN_EXPRESSIONS else None)
    findable = [row for row, region in enumerate(data.regions) if region.unique]
    if not findable:
        raise ClocError("there is no expression that names one region alone", file=data.ref.name)
    total = len(findable) if of is None else known_size(of, data.ref.split, len(findable))
    chosen = [findable[k] for k in draw(len(findable), limit, seed)]
    drawn = seed if len(chosen) < len(findable) else None
    ref = DatasetRef(
        of or data.ref.name,
        data.ref.split,
        len(chosen),
        total,
        drawn,
        "expressions",
        data.ref.path,
        of or data.ref.kind,
    )
    return Expressions(ref, chosen, data, len(data.regions) - len(findable))


def known_size(of: str, split: str, found: int) -> int:
    """Return how many items a split of a public set has.

    Args:
        of: The set.
        split: The split.
        found: How many were found; more than there are is an error.

    Raises:
        ClocError: There is no such split, or too much was found.
    """
    splits = KNOWN_EXPRESSIONS[of]
    if split not in splits:
        raise ClocError(f"'{of}' has no split '{split}'", remedy=f"Add --split, one of {', '.join(splits)}.")
    if found > splits[split]:
        problem = f"the data hold {found:,} expressions, but {of} {split} has {splits[split]:,}"
        raise ClocError(problem, remedy="Check which partition, and which split, was converted.")
    return splits[split]


def evaluate_grounding(
    answerer: Answerer,
    expressions: Expressions,
    settings: GroundingSettings | None = None,
    asking: MllmSettings | None = None,
) -> Outcome:
    """Ask for every expression and compare the first box of each answer with the true one.

    Args:
        answerer: Who is asked.
        expressions: What is looked for.
        settings: The question.
        asking: How to ask.
    """
    settings, asking = settings or GroundingSettings(), asking or MllmSettings()
    regions, data = expressions.regions, expressions.data

    def conversation(k: int) -> list[dict[str, Any]]:
        region = regions[k]
        return question(data.dataset[data.rows[region.image]]["image"], settings.ask(region.text), settings.suffix)

    answers = ask_each(answerer, len(regions), conversation, asking, expressions.ref.split)
    ious = box_ious(first_boxes(answers), [region.box for region in regions])
    records = [
        _record(data, one, iou) | answer_record(answer) for one, iou, answer in zip(regions, ious, answers, strict=True)
    ]
    details = {
        "grounding_mode": grounding_mode(answerer),
        "asking": {"question": settings.ask(PHRASE), "suffix": settings.suffix or "none"},
        "regions": {"asked for": len(regions), "ambiguous, left out": expressions.ambiguous},
        "answers": {
            "with a box": sum(bool(answer.boxes) for answer in answers),
            "with several boxes": sum(len(answer.boxes) > 1 for answer in answers),
        },
        "baselines": _baselines(regions, data, asking.seed),
    }
    unparsed = sum(not answer.boxes for answer in answers) / len(answers)
    return Outcome(expressions.ref, _metrics(ious, regions, data, asking.seed), details, unparsed, records)


def score_located(expressions: Expressions, located: Mapping[str, Sequence[Sequence[float]]], seed: int = 0) -> Outcome:
    """Score what an encoder found, in each of its ways; the first one is the headline.

    Args:
        expressions: What was looked for.
        located: By way, a box for each expression, xyxy in pixels of the original.
        seed: Of the bootstrap.
    """
    regions, data = expressions.regions, expressions.data
    truth = [region.box for region in regions]
    scored = {name: _metrics(box_ious(boxes, truth), regions, data, seed) for name, boxes in located.items()}
    headline = next(iter(scored))
    details = {
        "choices": {"made_on": "nothing", "localizer": headline},
        "localizers": scored,
        "regions": {"asked for": len(regions), "ambiguous, left out": expressions.ambiguous},
        "baselines": _baselines(regions, data, seed),
    }
    ious = box_ious(located[headline], truth)
    records = [
        _record(data, one, iou) | {"answer": headline, "boxes": [{"phrase": one.text, "box": list(box)}]}
        for one, iou, box in zip(regions, ious, located[headline], strict=True)
    ]
    return Outcome(expressions.ref, scored[headline], details, answers=records)


def _record(data: RegionSplit, region: Region, iou: float) -> dict[str, Any]:
    """What `answers.jsonl` says of an expression, whoever looked for it."""
    right = bool(iou >= HEADLINE)
    return {
        "id": data.ids[region.image],
        "row": data.rows[region.image],
        "phrase": region.text,
        "question": region.text,
        "true_boxes": [list(region.box)],
        "iou": round(float(iou), 4),
        "right": right,
        "score": 1.0 if right else round(float(iou), 4),
    }


def _metrics(ious: Any, regions: Sequence[Region], data: RegionSplit, seed: int) -> dict[str, Metric]:
    """Accuracy at each threshold, the usual one first, and the mean IoU; resampled by picture."""
    ids = data.image_keys
    images = [ids[region.image] for region in regions]
    found = {f"grounding_acc{100 * at:.0f}": mean_metric(ious >= at, images, seed=seed) for at in THRESHOLDS}
    return {
        "grounding_acc50": found.pop("grounding_acc50"),
        **found,
        "grounding_mean_iou": mean_metric(ious, images, seed=seed),
    }


def _baselines(regions: Sequence[Region], data: RegionSplit, seed: int) -> dict[str, Any]:
    """The answer that needs no looking: the whole picture."""
    whole = np.array([[0, 0, *data.sizes[region.image]] for region in regions], dtype=np.float64)
    scored = _metrics(box_ious(whole, [region.box for region in regions]), regions, data, seed)
    return {name: {"majority": metric, "answers": {"always": "the whole picture"}} for name, metric in scored.items()}
