"""What the demo's numbers say, worked out from them: ratios, who is ahead, and which control closes the gap.

Nothing here is written beforehand for a result: every sentence is chosen by comparing two values with the uncertainty
of their difference, so a run in which CLOC gains nothing says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["ahead", "level", "behind"]
Metrics = Mapping[str, Mapping[str, Any]]

OURS_ENCODER, OURS_MLLM = "cloc", "cloc_prompter"

ENCODER_METRICS = {
    "region_top1": "naming a region (shape, colour, texture)",
    "pointing_acc": "pointing at what a phrase names",
    "grounding_zeroshot_acc50": "finding what a phrase names, without training for it",
    "image_t2i_r1": "finding the image of a caption",
    "image_i2t_r1": "finding the caption of an image",
}
MLLM_METRICS = {
    "vqa_acc": "answering questions about the image",
    "referring_acc": "saying what is in a box",
    "grounding_acc50": "finding what a phrase names",
}
CONTROLS = {
    "clip_captions": "CLIP that sees the same region texts as extra captions",
    "clip_roi": "CLIP with a region token pooled from its patches",
    "cloc": "CLOC's tower without a region token",
    "cloc_new_head": "CLOC's tower and a grounding head that starts untrained, as CLIP's does",
    "blind": "an LLM that sees no image",
}


@dataclass(frozen=True)
class Difference:
    """How far `ours` lies from `other` on one metric.

    Attributes:
        value: ours - other, both shares.
        uncertainty: Half-width of the difference's 95 % interval.
    """

    value: float
    uncertainty: float

    @property
    def verdict(self) -> Verdict:
        """`level` unless the interval of the difference leaves zero out."""
        if abs(self.value) <= self.uncertainty:
            return "level"
        return "ahead" if self.value > 0 else "behind"


def difference(ours: Mapping[str, Any], other: Mapping[str, Any]) -> Difference:
    """Compare two entries of `metrics`.

    The uncertainty joins in quadrature, as if independent: each value's own interval and, where several seeds were run,
    two standard errors of each mean over seeds. Both models saw the same images, which makes their errors alike and
    the true uncertainty smaller: the verdict `level` is given rather too often than too seldom.

    Args:
        ours: Entry with `value`, `ci95` and perhaps `spread` and `seeds`.
        other: The same.
    """
    parts = []
    for entry in (ours, other):
        low, high = entry["ci95"]
        parts.append((high - low) / 2)
        if "spread" in entry:
            parts.append(2 * entry["spread"]["std"] / math.sqrt(len(entry["seeds"])))
    return Difference(ours["value"] - other["value"], math.hypot(*parts))


def findings(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return what the report's numbers say, as sentences with a verdict.

    Args:
        report: The demo's report; see :mod:`cloc_mllm.apps.demo.report`.

    Returns:
        Dictionaries with `verdict` (`ahead`, `level`, `behind`) and `text`.
    """
    found: list[dict[str, str]] = []
    encoders = {name: entry["metrics"] for name, entry in report["encoder"].items()}
    mllms = {name: entry["metrics"] for name, entry in report["mllm"].items()}
    for metric, meaning in ENCODER_METRICS.items():
        found += _against_clip(encoders, OURS_ENCODER, metric, meaning)
    for metric, meaning in MLLM_METRICS.items():
        found += _against_clip(mllms, OURS_MLLM, metric, meaning)
    found += _controls(encoders, OURS_ENCODER, ("clip_captions",), ENCODER_METRICS)
    found += _controls(mllms, OURS_MLLM, ("clip_roi", "cloc", "cloc_new_head", "blind"), MLLM_METRICS)
    return found + _below_majority(mllms, report["baselines"]["mllm"])


def _against_clip(models: Mapping[str, Metrics], ours: str, metric: str, meaning: str) -> list[dict[str, str]]:
    entry, other = _pair(models, ours, "clip", metric)
    if entry is None or other is None:
        return []
    gap = difference(entry, other)
    ratio = f", {entry['value'] / other['value']:.1f} times" if gap.verdict == "ahead" and other["value"] > 0 else ""
    tail = {
        "ahead": f"ahead{ratio}",
        "level": "no difference that this test set can show",
        "behind": "CLIP is ahead",
    }[gap.verdict]
    text = f"{_capital(meaning)} ({metric}): {ours} {percent(entry['value'])}, clip {percent(other['value'])}: {tail}."
    return [{"verdict": gap.verdict, "text": text}]


def _controls(
    models: Mapping[str, Metrics], ours: str, controls: tuple[str, ...], metrics: Mapping[str, str]
) -> list[dict[str, str]]:
    found = []
    for control in controls:
        for metric, meaning in metrics.items():
            entry, other = _pair(models, ours, control, metric)
            if entry is None or other is None:
                continue
            gap = difference(entry, other)
            if gap.verdict == "level" and not _leads_clip(models, ours, metric):
                continue  # there is no gap to close
            share = _closed_share(models, ours, control, metric)
            text = f"Control {control} ({CONTROLS[control]}), {meaning}: {percent(other['value'])}"
            if gap.verdict == "ahead":
                text += f" against {ours}'s {percent(entry['value'])}: {ours} stays ahead{share}."
            elif gap.verdict == "level":
                text += f", level with {ours}'s {percent(entry['value'])}: this control closes the gap."
            else:
                text += f", above {ours}'s {percent(entry['value'])}: this control more than closes the gap."
            found.append({"verdict": gap.verdict, "text": text})
    return found


def _closed_share(models: Mapping[str, Metrics], ours: str, control: str, metric: str) -> str:
    """Say how much of the way from CLIP to ours the control goes, where ours is clearly ahead of CLIP."""
    entry, base = _pair(models, ours, "clip", metric)
    if entry is None or base is None or control == "blind" or not _leads_clip(models, ours, metric):
        return ""
    way = (models[control][metric]["value"] - base["value"]) / (entry["value"] - base["value"])
    return f"; the control goes {percent(min(max(way, 0.0), 1.0), 0)} of the way from clip"


def _leads_clip(models: Mapping[str, Metrics], ours: str, metric: str) -> bool:
    entry, base = _pair(models, ours, "clip", metric)
    return entry is not None and base is not None and difference(entry, base).verdict == "ahead"


def _below_majority(mllms: Mapping[str, Metrics], baselines: Mapping[str, Any]) -> list[dict[str, str]]:
    """Name each figure of an MLLM that does not beat the best answer that ignores the image."""
    found = []
    for name, metrics in mllms.items():
        for metric, meaning in MLLM_METRICS.items():
            floor = majority_of(baselines, metric)
            entry = metrics.get(metric)
            if name == "blind" or floor is None or not entry or entry["value"] is None or entry["ci95"][0] > floor:
                continue
            found.append(
                {
                    "verdict": "behind" if entry["value"] <= floor else "level",
                    "text": f"{name} at {meaning} ({percent(entry['value'])}) is not clearly above the "
                    f"constant answer's {percent(floor)}.",
                }
            )
    return found


def majority_of(baselines: Mapping[str, Any], metric: str) -> float | None:
    """Return what the best constant answer scores on a metric, or chance where there is no such answer."""
    entry = baselines.get(metric, {})
    for kind in ("majority", "chance"):
        value = entry.get(kind)
        if isinstance(value, Mapping):
            value = value.get("value")
        if value is not None:
            return float(value)
    return None


def _pair(
    models: Mapping[str, Metrics], ours: str, other: str, metric: str
) -> tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]:
    """Return the two entries if both models were run and both have a value."""
    entries = [models.get(name, {}).get(metric) for name in (ours, other)]
    ours_entry, other_entry = (entry if entry and entry["value"] is not None else None for entry in entries)
    return ours_entry, other_entry


def percent(value: float | None, digits: int = 1) -> str:
    """Return a share as people read it."""
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
