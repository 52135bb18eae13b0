"""Writes the demo's tables as Markdown, for documents and terminals: `report.md`, the page without its pictures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cloc_mllm.apps.demo.findings import majority_of

TITLES = {"encoder": "encoder", "mllm": "MLLM"}


def write_markdown(report: Mapping[str, Any], out: Path) -> Path:
    """Write `report.md` beside `report.json`.

    Args:
        report: The demo's report.
        out: The demo's output folder.

    Returns:
        The path of the file.
    """
    path = out / "report.md"
    path.write_text("\n".join(_lines(report)) + "\n", encoding="utf-8")
    return path


def _lines(report: Mapping[str, Any]) -> Iterator[str]:
    seeds = report["seeds"]
    yield f"# Demo, preset {report['preset']}: {report['dataset']['name']}, split {report['dataset']['split']}"
    yield ""
    yield "Per cent, with 95 % bootstrap intervals clustered by image." + (
        f" Means over the seeds {', '.join(map(str, seeds))}; ± is the standard deviation over them."
        if len(seeds) > 1
        else " One seed."
    )
    for kind in TITLES:
        if report[kind]:
            yield ""
            yield from _table(_metric_rows(report, kind))
    if report["targets"]:
        yield ""
        yield from _table(
            [["figure", "wanted", "got", "reached"]]
            + [[t["name"], t["wanted"], t["got"], "yes" if t["reached"] else "**no**"] for t in report["targets"]]
        )
    for finding in report["findings"]:
        yield f"\n* {finding['text']}"
    yield ""
    yield f"{report['machine']}: {report['seconds']:,.0f} s in this run; seconds by stage: {_costs(report['stages'])}."


def _metric_rows(report: Mapping[str, Any], kind: str) -> list[list[str]]:
    """One row a metric, one column a model, and the best answer that sees no image."""
    models: Mapping[str, Any] = report[kind]
    names = list(dict.fromkeys(metric for entry in models.values() for metric in entry["metrics"]))
    rows = [[TITLES[kind], *(f"`{name}`" for name in models), "constant or chance"]]
    for metric in names:
        floor = majority_of(report["baselines"][kind], metric)
        cells = [_cell(entry["metrics"].get(metric)) for entry in models.values()]
        rows.append([f"`{metric}`", *cells, "–" if floor is None else f"{100 * floor:.1f}"])
    return rows


def _cell(entry: Mapping[str, Any] | None) -> str:
    if entry is None or entry["value"] is None:
        return "–"
    spread = f" ± {100 * entry['spread']['std']:.1f}" if "spread" in entry else ""
    low, high = entry["ci95"]
    return f"{100 * entry['value']:.1f}{spread} [{100 * low:.1f}, {100 * high:.1f}]"


def _costs(stages: Sequence[Mapping[str, Any]]) -> str:
    """Seconds of each stage; over several seeds their mean."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for stage in stages:
        name = stage["name"]
        seconds[name.partition("/")[2] if name.startswith("seed") else name].append(stage["seconds"])
    return "; ".join(f"{name} {sum(found) / len(found):.0f}" for name, found in seconds.items())


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    head, *rest = rows
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rest:
        yield "| " + " | ".join(row) + " |"
