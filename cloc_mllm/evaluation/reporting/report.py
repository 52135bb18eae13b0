"""What every evaluation writes: ``report.json`` for programs and ``report.md`` for people.

A report says on what it was measured: which split, how many items of how many, in which coordinate frame, by which
versions and by which command. A score on a subset never carries the bare name of the split (:class:`DatasetRef`).
"""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from os import PathLike
from pathlib import Path
from typing import Any

from cloc_mllm import __version__
from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.scoring.metrics import Metric

FRAME = "boxes are [x1, y1, x2, y2] in pixels of the original image"

_VERSIONED = ("torch", "transformers", "numpy", "pillow")


@dataclass(frozen=True)
class DatasetRef:
    """What was evaluated on.

    Attributes:
        name: The data set: its folder's name, or its preset and seed.
        split: The split's own name, as in ``test``.
        n: How many of its samples were used.
        total: How many samples the split has.
        seed: Of the draw, where one was made.
        unit: What a sample is.
        path: Where the samples were read, if they can be opened again for their pictures.
        kind: The public set that this is (a part of), as ``data convert`` calls it, if it is known.
    """

    name: str
    split: str
    n: int
    total: int
    seed: int | None = 0
    unit: str = "images"
    path: str | None = None
    kind: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.n <= self.total:
            raise ClocError(
                f"split '{self.split}' of {self.name} has {self.total} {self.unit}, {self.n} were asked for"
            )

    @property
    def label(self) -> str:
        """The split's name if all of it was used, else a name that says it was not."""
        if self.n == self.total:
            return self.split
        drawn = "" if self.seed is None else f", seed {self.seed}"
        return f"{self.split} subset ({self.n} of {self.total} {self.unit}{drawn})"

    def to_dict(self) -> dict[str, str | int]:
        """Return the report's ``dataset`` entry; ``split`` is :attr:`label`."""
        found: dict[str, str | int] = {
            "name": self.name,
            "split": self.label,
            "n": self.n,
            "of": self.total,
            "unit": self.unit,
        }
        known = {"path": self.path, "kind": self.kind, "seed": self.seed if self.n < self.total else None}
        return {**found, **{key: value for key, value in known.items() if value is not None}}


def versions() -> dict[str, str]:
    """Return the versions that a score may depend on."""
    found = {"python": platform.python_version(), "cloc_mllm": __version__}
    for package in _VERSIONED:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def build_report(
    *,
    suite: str,
    model: str,
    dataset: DatasetRef,
    metrics: Mapping[str, Metric],
    seconds: float,
    command: str,
    unparsed: float | None = 0.0,
    details: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Put one evaluation into the form of ``report.json``.

    Args:
        suite: The suite's name.
        model: The checkpoint that was evaluated, as the user named it.
        dataset: What it was evaluated on.
        metrics: The numbers.
        seconds: Wall-clock time of the evaluation, loading included.
        command: The command that repeats it.
        unparsed: Share of the answers with boxes that could not be read; 0 where no box is read from text, and None
            where that was not counted.
        details: What else a reader needs: the read-outs side by side, choices and what they were made on, baselines.

    Returns:
        A dictionary of plain JSON values (no NaN: a metric over no item has the value None).
    """
    return {
        "suite": suite,
        "model": model,
        "dataset": dataset.to_dict(),
        "frame": FRAME,
        "metrics": {name: metric.to_dict() for name, metric in metrics.items()},
        "unparsed": None if unparsed is None else round(unparsed, 6),
        "versions": versions(),
        "seconds": round(seconds, 2),
        "command": command,
        "details": plain(details or {}),
    }


def plain(value: Any) -> Any:
    """Turn metrics inside nested mappings and lists into their dictionaries, and every NaN into None."""
    if isinstance(value, Metric):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return None if math.isnan(value) else round(value, 6)
    return value


def aggregate_metrics(runs: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Join the ``metrics`` of several seeds into one: the mean, every seed's value, and their spread.

    ``n`` is the smallest of the seeds' (the read-out chosen for CLIP may differ between seeds, and with it how many
    regions it was measured on). ``ci95`` is the mean of the seeds' intervals. They all rest on the same test images, so
    averaging models does not narrow that part; what seeds add is reported apart, as ``spread`` (sample standard
    deviation, smallest, largest).

    Args:
        runs: One metrics dictionary for each seed, in ``report.json``'s form.

    Returns:
        Per metric ``value``, ``ci95``, ``n`` and, where there is more than one run, ``seeds`` and ``spread``.

    Raises:
        ClocError: There is no run, or the runs do not report the same metrics.
    """
    if not runs:
        raise ClocError("there is no run to average over")
    if any(set(run) != set(runs[0]) for run in runs):
        odd = sorted({name for run in runs for name in run} ^ set.intersection(*(set(run) for run in runs)))
        raise ClocError(f"the runs do not report the same metrics: only some have {', '.join(odd)}")
    joined = {}
    for name in runs[0]:
        joined[name] = _join_seeds([run[name] for run in runs])
    return joined


def _join_seeds(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    values = [entry["value"] for entry in entries]
    if len(entries) == 1 or any(value is None for value in values):
        return dict(entries[0]) | ({"seeds": values} if len(entries) > 1 else {})
    return {
        "value": round(statistics.fmean(values), 6),
        "ci95": [_mean_end([entry["ci95"][end] for entry in entries]) for end in (0, 1)],
        "n": min(entry["n"] for entry in entries),
        "seeds": values,
        "spread": {
            "std": round(statistics.stdev(values), 6),
            "min": min(values),
            "max": max(values),
        },
    }


def _mean_end(ends: Sequence[float | None]) -> float | None:
    """The mean of one end of the seeds' intervals, or of their `unparsed`; None where some seed has none."""
    known = [end for end in ends if end is not None]
    return round(statistics.fmean(known), 6) if len(known) == len(ends) else None


def aggregate_reports(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join the reports of several seeds of one experiment; see :func:`aggregate_metrics`.

    Raises:
        ClocError: They are not of one suite on one data set.
    """
    if not reports:
        raise ClocError("there is no report to average over")
    for key in ("suite", "dataset", "frame"):
        if any(report[key] != reports[0][key] for report in reports):
            raise ClocError(f"reports with different '{key}' cannot be averaged")
    return {
        **reports[0],
        "model": [report["model"] for report in reports],
        "metrics": aggregate_metrics([report["metrics"] for report in reports]),
        "unparsed": _mean_end([report["unparsed"] for report in reports]),
        "seconds": round(sum(report["seconds"] for report in reports), 2),
        "command": [report["command"] for report in reports],
        "details": [report["details"] for report in reports],
    }


def write_report(report: Mapping[str, Any], folder: str | PathLike[str]) -> tuple[Path, Path]:
    """Write ``report.json`` and ``report.md`` into a folder, which is made if missing.

    Returns:
        The two paths.
    """
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    as_json, as_text = out / "report.json", out / "report.md"
    as_json.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    as_text.write_text(render_markdown(report), encoding="utf-8")
    return as_json, as_text


def render_markdown(report: Mapping[str, Any]) -> str:
    """Write the report for a reader: what was measured, the table of metrics, every table of the details."""
    dataset = report["dataset"]
    models = report["model"] if isinstance(report["model"], list) else [report["model"]]
    unread = "not counted" if report["unparsed"] is None else f"{report['unparsed']:.1%}"
    commands = report["command"] if isinstance(report["command"], list) else [report["command"]]
    lines = [
        f"# {report['suite']}: {', '.join(models)}",
        "",
        f"On {dataset['name']}, split {dataset['split']}, {dataset['n']} {dataset['unit']}; {report['frame']}. "
        f"Unreadable answers: {unread}. Took {report['seconds']:.1f} s.",
        "",
        *_metric_table(report["metrics"]),
        "",
    ]
    details = report["details"] if isinstance(report["details"], list) else [report["details"]]
    for number, detail in enumerate(details):
        prefix = f"Run {number + 1}: " if len(details) > 1 else ""
        for name, value in detail.items():
            rendered = _baseline_table(value) if name == "baselines" else _render_detail(value)
            lines += [f"## {prefix}{name}", "", *rendered, ""]
    versions_line = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return "\n".join([*lines, "## How", "", "```", *commands, "```", "", f"Versions: {versions_line}.", ""])


def _is_metric(value: Any) -> bool:
    return isinstance(value, Mapping) and {"value", "ci95", "n"} <= set(value)


def _render_detail(value: Any) -> list[str]:
    """Render a mapping of metrics, or of mappings of metrics, as tables and everything else as a list."""
    if not isinstance(value, Mapping):
        return [str(value)]
    lines: list[str] = []
    flat = {name: item for name, item in value.items() if _is_metric(item)}
    if flat:
        lines += [*_metric_table(flat), ""]
    for name, item in value.items():
        if _is_metric(item):
            continue
        if isinstance(item, Mapping) and item and all(_is_metric(entry) for entry in item.values()):
            lines += [f"### {name}", "", *_metric_table(item), ""]
        else:
            lines.append(f"* {name}: {item if isinstance(item, (str, int, float)) else json.dumps(item)}")
    return lines


def _baseline_table(baselines: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = [
        "| metric | best constant answer | 95 % interval | even guess | the answer |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, entry in baselines.items():
        majority = entry.get("majority") or {"value": None, "ci95": (None, None)}
        low, high = majority["ci95"]
        constant = ", ".join(f"{kind}: {answer}" for kind, answer in entry.get("answers", {}).items())
        cells = [_percent(majority["value"]), f"{_percent(low)} to {_percent(high)}", _percent(entry.get("chance"))]
        lines.append(f"| {' | '.join([name, *cells, constant])} |")
    return lines


def _metric_table(metrics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    with_seeds = any("seeds" in entry for entry in metrics.values())
    head = ["metric", "value", "95 % interval", "n", *(["seeds"] if with_seeds else [])]
    rows = [head, ["---"] * len(head)]
    for name, entry in metrics.items():
        low, high = entry["ci95"]
        row = [name, _percent(entry["value"]), f"{_percent(low)} to {_percent(high)}", str(entry["n"])]
        rows.append([*row, ", ".join(_percent(value) for value in entry.get("seeds", []))] if with_seeds else row)
    return [f"| {' | '.join(row)} |" for row in rows]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
