"""`report.html`: the report as one page, with its metrics as bars and its worst answers as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from markupsafe import Markup

from cloc_mllm.evaluation.reporting.gallery import Pictures, draw_answers, worst
from cloc_mllm.pages.charts import interval_bar
from cloc_mllm.pages.drawing import PALETTE
from cloc_mllm.pages.page import page_environment

_PACKAGE = "cloc_mllm.evaluation.reporting"


def write_html(
    report: Mapping[str, Any], folder: str | PathLike[str], answers: Sequence[Mapping[str, Any]] = ()
) -> Path:
    """Write `report.html` into a folder.

    Args:
        report: As `build_report` made it.
        folder: Where to; it exists.
        answers: What the model said; drawn are those that say which picture they are about.

    Returns:
        The page.
    """
    samples = Pictures(report["dataset"].get("path"))
    shown = worst([answer for answer in answers if samples.has(answer)])
    pictures = [draw_answers(samples, {report["model"]: record}) for record in shown]
    wrong = sum(not answer.get("right", True) for answer in answers)
    environment = page_environment(_PACKAGE)
    environment.filters |= {"bar": metric_bar, "percent": percent}
    page = environment.get_template("report.html.j2").render(
        report=report,
        baselines=_baselines(report["details"]),
        pictures=pictures,
        wrong=wrong,
        total=len(answers),
        tables=_tables(report["details"]),
    )
    target = Path(folder) / "report.html"
    target.write_text(page, encoding="utf-8")
    return target


def metric_bar(entry: Mapping[str, Any], floor: float | None = None, colour: str = PALETTE[1]) -> Markup:
    """Draw a metric of a report that is a share; nothing if it has no value or no interval."""
    low, high = entry["ci95"]
    if entry["value"] is None or low is None or not 0 <= entry["value"] <= 1:
        return Markup("")
    return Markup(interval_bar(entry["value"], low, high, colour, floor))


def percent(value: float | None) -> str:
    """Return a share in per cent with one decimal, or a dash."""
    return "–" if value is None else f"{100 * value:.1f}"


def _baselines(details: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the floor of each metric: its best constant answer, or else an even guess."""
    found = {}
    for name, entry in (details.get("baselines") or {}).items():
        majority = (entry.get("majority") or {}).get("value")
        found[name] = entry.get("chance") if majority is None else majority
    return found


def _tables(details: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the details that are several sets of metrics: read-outs, localizers, protocols."""
    tables = []
    for title, rows in details.items():
        if title == "baselines" or not isinstance(rows, Mapping):
            continue
        rows = {name: row for name, row in rows.items() if _is_row(row)}
        if rows:
            metrics = list(dict.fromkeys(metric for row in rows.values() for metric in row))
            tables.append({"title": title, "metrics": metrics, "rows": rows})
    return tables


def _is_row(row: Any) -> bool:
    return isinstance(row, Mapping) and bool(row) and all(isinstance(m, Mapping) and "ci95" in m for m in row.values())
