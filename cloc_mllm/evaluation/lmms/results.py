"""From what lmms-eval found to this project's report: values with intervals, honest names, failed judges told apart."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.lmms.benchmarks import JUDGED, KNOWN_SIZES, POINTS, ZERO_BOXES, note_on
from cloc_mllm.evaluation.lmms.runs import Found
from cloc_mllm.evaluation.reporting.report import DatasetRef
from cloc_mllm.evaluation.scoring.metrics import Metric, mean_metric

NO_INTERVAL = (math.nan, math.nan)

_IMAGE_KEYS = ("image", "imageId", "image_id", "image_source", "img_id", "file_name", "question_id")
"""Where tasks name the picture of a question; the questions about one picture are resampled together."""

_SCALES = {"gpt_eval_score": 100.0}
"""What a metric's full marks are where they are not 1, so that all are reported as shares."""

_FAILED = -1
_OTHER_CATEGORY = -999
"""What stands for the scores of a call that failed, and of a question of another category."""


def metrics_of(found: Found, seed: int = 0) -> tuple[dict[str, Metric], dict[str, Any]]:
    """Turn an evaluation into metrics and details.

    Args:
        found: The evaluation.
        seed: Of the bootstrap.

    Returns:
        Each metric as `task/metric`, in [0, 1]; and the details: `tasks` (questions asked and there, what to know),
        `points` (figures that are no share, as MME's), `without_interval` (why), `judge` (calls that failed).

    Raises:
        ClocError: Every call of a judge failed.
    """
    metrics: dict[str, Metric] = {}
    details: dict[str, Any] = {"tasks": {}, "points": {}, "without_interval": {}, "judge": {}}
    for task, samples in found.samples.items():
        details["tasks"][task] = _about(found, task)
        if task in JUDGED:
            judged, calls = _judged_metrics(task, samples, seed)
            metrics |= {f"{task}/{name}": metric for name, metric in judged.items()}
            details["judge"][task] = calls
            if JUDGED[task].pairs:
                ratio = "a ratio of two means: the model's score to the reference's"
                details["without_interval"] |= {f"{task}/{name}": ratio for name in judged}
            continue
        for name, value in _values(found.scores[task]):
            metric, why = _metric(name, value, samples, name.partition(" ")[0] in found.means[task], seed)
            key = f"{task}/{name}"
            if metric is None:
                details["points"][key] = value
            else:
                metrics[key] = metric
            if why:
                details["without_interval"][key] = why
    return metrics, {name: value for name, value in details.items() if value}


def dataset_of(found: Found) -> DatasetRef:
    """Name what was evaluated on: never by the split's name where it was less, or is not known to be all of it."""
    names = []
    asked = there = 0
    for task, samples in found.samples.items():
        size, known = found.sizes[task], KNOWN_SIZES.get(task)
        name = task if len(samples) == size else f"{task} (the first {len(samples)} of {size})"
        if known is not None and size != known:
            name += f" [a copy of {size}, the published split has {known}]"
        names.append(name)
        asked += len(samples)
        there += max(size, known or 0)
    split = ", ".join(names) + ("" if asked == there else ": a")  # "a subset (10 of 9000 questions)", its label goes on
    return DatasetRef("lmms-eval", split, asked, there, None, "questions")


def unparsed_of(found: Found) -> float | None:
    """The share of answers without a readable box, of the questions that ask for one and say so; None if none does."""
    flags = [_unread(task, sample) for task, samples in found.samples.items() for sample in samples]
    known = [flag for flag in flags if flag is not None]
    return float(np.mean(known)) if known else None


def _unread(task: str, sample: Mapping[str, Any]) -> bool | None:
    """Whether no box could be read in an answer; None where the sample does not tell, or no box is asked for."""
    own = sample["metrics"].get("unparsed")
    if isinstance(own, Mapping):
        return bool(own["score"])
    if not any(fnmatchcase(task, pattern) for pattern in ZERO_BOXES):
        return None
    told = [entry["pred"] for entry in sample["metrics"].values() if isinstance(entry, Mapping) and "pred" in entry]
    return not any(told[0]) if told else None


def answers_of(found: Found) -> list[dict[str, Any]]:
    """Every answer beside its truth, with what the task made of it."""
    return [
        {"task": task, **{key: value for key, value in sample.items() if key != "doc"}}
        for task, samples in found.samples.items()
        for sample in samples
    ]


def _about(found: Found, task: str) -> dict[str, Any]:
    known = KNOWN_SIZES.get(task)
    about: dict[str, Any] = {"n": len(found.samples[task]), "of": found.sizes[task]}
    if known is not None:
        about["published_split"] = known
    note = note_on(task)
    return about | ({"note": note} if note else {})


def _values(scores: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The figures of a task, without the errors that lmms-eval estimates."""
    found = []
    for key, value in scores.items():
        name, _, kind = key.partition(",")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if kind and number and "_stderr" not in name:
            found.append((name if kind == "none" else f"{name} ({kind})", float(value)))
    return found


def _metric(
    name: str, value: float, samples: Sequence[Mapping[str, Any]], is_mean: bool, seed: int
) -> tuple[Metric | None, str | None]:
    """A metric with its interval, or without; None if it is no share. The second is why there is no interval."""
    value /= _SCALES.get(name, 1.0)
    if name in POINTS or not 0 <= value <= 1:
        return None, "points, not a share"
    rows = [sample for sample in samples if name in sample["metrics"]]
    if not is_mean:
        return Metric(value, NO_INTERVAL, len(rows)), "not a mean over questions"
    scores = [_score(sample["metrics"][name]) for sample in rows]
    numbers = [score for score in scores if score is not None]
    if len(numbers) < len(rows) or not math.isclose(sum(numbers), value * len(rows), abs_tol=1e-6 * len(rows)):
        return Metric(value, NO_INTERVAL, len(rows)), "its samples do not say what each question scored"
    return mean_metric(numbers, [_image(sample) for sample in rows], seed=seed), None


def _score(entry: Any) -> float | None:
    """What one answer scored, where the task says it in a form that is known."""
    if isinstance(entry, Mapping):
        entry = entry.get("score")
    return float(entry) if isinstance(entry, (int, float)) else None


def _image(sample: Mapping[str, Any]) -> Hashable:
    """The picture of a question, or what stands for it."""
    for key in _IMAGE_KEYS:
        name = sample["doc"].get(key)
        if isinstance(name, (str, int)):
            return name
    return ("question", sample["doc_id"])


def _judged_metrics(
    task: str, samples: Sequence[Mapping[str, Any]], seed: int
) -> tuple[dict[str, Metric], dict[str, int]]:
    """The figures of a judged task over the calls that went well, and how many did not.

    Raises:
        ClocError: None went well.
    """
    failed = [k for k, sample in enumerate(samples) if _failed_call(task, sample)]
    calls = {"calls": len(samples), "failed": len(failed)}
    well = [sample for k, sample in enumerate(samples) if k not in set(failed)]
    if not well:
        raise ClocError(
            f"every call of the judge failed ({len(samples)} of the task '{task}')",
            remedy="Check its address, key and model; lmms-eval would have reported a score all the same.",
        )
    if not JUDGED[task].pairs:
        scores = [float(sample["metrics"]["gpt_eval_score"]["score"]) for sample in well]
        return {"gpt_eval_score": mean_metric(scores, [_image(sample) for sample in well], seed=seed)}, calls
    metrics = {}
    for name in sorted({name for sample in well for name in sample["metrics"]}):
        pairs = [sample["metrics"][name]["scores"] for sample in well]
        pairs = [pair for pair in pairs if _OTHER_CATEGORY not in pair]
        reference = sum(pair[0] for pair in pairs)
        if pairs and reference > 0:
            metrics[name] = Metric(sum(pair[1] for pair in pairs) / reference, NO_INTERVAL, len(pairs))
    return metrics, calls


def _failed_call(task: str, sample: Mapping[str, Any]) -> bool:
    if JUDGED[task].pairs:
        return any(_FAILED in entry["scores"] for entry in sample["metrics"].values())
    return not sample["metrics"]["gpt_eval_score"].get("eval_model")
