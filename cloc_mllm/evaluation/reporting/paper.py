"""`cloc-mllm eval paper`: the paper's tables, its figures beside what our reports measured, empty where none did.

A cell of ours says what it rests on: a part of a split is marked, and its size stands below the table.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any

import yaml

from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.reporting.report import versions
from cloc_mllm.pages.page import render_page

SOURCE = "arXiv 2410.02746v2"
_EMPTY = "–"


def paper_tables() -> list[dict[str, Any]]:
    """Return the paper's tables: columns, what fills them, and the paper's rows."""
    text = resources.files(__package__).joinpath("paper_tables.yaml").read_text(encoding="utf-8")
    return list(yaml.safe_load(text)["tables"])


def find_reports(folders: Iterable[str | PathLike[str]]) -> list[tuple[Path, dict[str, Any]]]:
    """Find the reports of suites in folders and all folders below.

    Raises:
        ClocError: A folder does not exist, or a report cannot be read.
    """
    found = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise ClocError("there is no such folder", file=folder, remedy="Name folders that hold reports of suites.")
        for path in sorted(folder.rglob("report.json")):
            try:
                report = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise ClocError(f"cannot read this report ({error})", file=path) from error
            if isinstance(report, dict) and isinstance(report.get("metrics"), dict) and "suite" in report:
                found.append((path, report))
    return found


def lay_out(
    reports: Sequence[tuple[Path, Mapping[str, Any]]], tiled: Sequence[tuple[Path, Mapping[str, Any]]] = ()
) -> list[dict[str, Any]]:
    """Fill the paper's tables.

    Args:
        reports: Where each stands, and what it says.
        tiled: Those of models that were tuned by Open-LLaVA-NeXT's recipe (anyres), which no report says: of the two
            tables of general questions they fill the second, all others the first.

    Returns:
        For each table ``title``, ``columns`` (titles), ``rows`` (``name``, ``ours``, ``cells``: text) and ``notes``.

    Raises:
        ClocError: Two reports on equally much data fill one cell.
    """
    tables = []
    for table in paper_tables():
        columns = table["columns"]
        mine = {"llava-1.5": [*reports], "open-llava-next": [*tiled]}.get(str(table.get("recipe")), [*reports, *tiled])
        rows = [
            {"name": name, "ours": False, "cells": [_text(values.get(key)) for key in columns]}
            for name, values in table["paper"].items()
        ]
        notes: list[str] = []
        for model in dict.fromkeys(str(report["model"]) for _, report in mine):
            cells = _cells(columns, [item for item in mine if str(item[1]["model"]) == model], notes)
            if any(cell != _EMPTY for cell in cells):
                rows.append({"name": model, "ours": True, "cells": cells})
        titles = [column["title"] for column in columns.values()]
        tables.append({"title": table["title"], "columns": titles, "rows": rows, "notes": notes})
    return tables


def _cells(
    columns: Mapping[str, Mapping[str, Any]], reports: Sequence[tuple[Path, Mapping[str, Any]]], notes: list[str]
) -> list[str]:
    """Return one model's cells; what is marked in them is explained in the notes."""
    values: dict[str, float] = {}
    texts: dict[str, str] = {}
    for key, column in columns.items():
        chosen = None if "mean_of" in column else _choose(column, reports)
        if chosen is None:
            continue
        path, report = chosen
        values[key], n = _figure(column, report)  # type: ignore[misc]
        dataset = report["dataset"]
        used, there = _extent(column, report)
        texts[key] = _text(values[key]) + ("*" if used != there else "")
        note = f"{column['title']}: {dataset['name']}, {dataset['split']}, n = {n} ({path.parent})"
        notes += [note] if note not in notes else []
    for key, column in columns.items():
        if "mean_of" in column and all(part in values for part in column["mean_of"]):
            texts[key] = _text(statistics.fmean(values[part] for part in column["mean_of"]))
            texts[key] += "*" if any(texts[part].endswith("*") for part in column["mean_of"]) else ""
    return [texts.get(key, _EMPTY) for key in columns]


def _choose(
    column: Mapping[str, Any], reports: Sequence[tuple[Path, Mapping[str, Any]]]
) -> tuple[Path, Mapping[str, Any]] | None:
    """Return the report that fills a cell: of those that fit, the one on most of the split."""
    fitting = [(path, report) for path, report in reports if _fits(column, report)]
    if not fitting:
        return None
    best = max(_extent(column, report)[0] for _, report in fitting)
    first, *others = [item for item in fitting if _extent(column, item[1])[0] == best]
    if others:
        raise ClocError(
            f"two reports fill the cell '{column['title']}' of {first[1]['model']}: {first[0]} and {others[0][0]}",
            remedy="Name the folder of the one that you mean.",
        )
    return first


def _fits(column: Mapping[str, Any], report: Mapping[str, Any]) -> bool:
    dataset = report["dataset"]
    split = str(dataset["split"]).partition(" subset")[0]
    splits = column.get("split", split)
    protocol = (report.get("details") or {}).get("protocol") or {}
    return (
        report["suite"] == column["suite"]
        and _figure(column, report) is not None
        and re.fullmatch(column["set"], str(dataset.get("kind") or dataset["name"]), re.IGNORECASE) is not None
        and split.lower() in [one.lower() for one in ([splits] if isinstance(splits, str) else splits)]
        and all(protocol.get(key) == value for key, value in column.get("protocol", {}).items())
    )


def _extent(column: Mapping[str, Any], report: Mapping[str, Any]) -> tuple[int, int]:
    """Return on how many samples a figure rests, and how many there are; of its task, where a report has several."""
    task = ((report.get("details") or {}).get("tasks") or {}).get(str(column["metric"]).partition("/")[0])
    if task is not None:
        return task["n"], max(task["of"], task.get("published_split", 0))
    return report["dataset"]["n"], report["dataset"]["of"]


def _figure(column: Mapping[str, Any], report: Mapping[str, Any]) -> tuple[float, int] | None:
    """Return a report's figure as the paper prints it, in per cent or in points, and what it rests on."""
    entry = report["metrics"].get(column["metric"])
    if entry is not None and entry["value"] is not None:
        return 100 * entry["value"], entry["n"]
    points = (report.get("details") or {}).get("points") or {}
    return (points[column["metric"]], _extent(column, report)[0]) if column["metric"] in points else None


def _text(value: float | None) -> str:
    return _EMPTY if value is None else f"{value:.1f}"


def write_paper(
    folders: Sequence[str | PathLike[str]],
    out: str | PathLike[str],
    tiled: Sequence[str | PathLike[str]] = (),
) -> list[dict[str, Any]]:
    """Write ``paper.md``, ``paper.html`` and ``paper.json``.

    Args:
        folders: Where reports of suites are; those below are found too.
        out: Folder to write to; made if missing.
        tiled: Where those of models tuned by Open-LLaVA-NeXT's recipe are.

    Returns:
        The tables.

    Raises:
        ClocError: See :func:`find_reports` and :func:`lay_out`.
    """
    tables = lay_out(find_reports(folders), find_reports(tiled))
    target = Path(out)
    target.mkdir(parents=True, exist_ok=True)
    (target / "paper.json").write_text(
        json.dumps({"source": SOURCE, "tables": tables, "versions": versions()}, indent=2) + "\n", encoding="utf-8"
    )
    (target / "paper.md").write_text(_markdown(tables), encoding="utf-8")
    page = render_page(__package__ or "", "paper.html.j2", tables=tables, source=SOURCE)
    (target / "paper.html").write_text(page, encoding="utf-8")
    return tables


def _markdown(tables: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "# The paper's tables, and ours",
        "",
        f"Figures of the paper: {SOURCE}. **Ours** in bold; * on a part of the split.",
        "",
    ]
    for table in tables:
        lines += [
            f"## {table['title']}",
            "",
            f"| model | {' | '.join(table['columns'])} |",
            "| --- " * (len(table["columns"]) + 1) + "|",
        ]
        for row in table["rows"]:
            name = f"**{row['name']}**" if row["ours"] else row["name"]
            lines.append(f"| {' | '.join([name, *row['cells']])} |")
        if not any(row["ours"] for row in table["rows"]):
            lines += ["", "Nothing of ours was run."]
        lines += ["", *(f"* {note}" for note in table["notes"]), ""]
    return "\n".join(lines)
