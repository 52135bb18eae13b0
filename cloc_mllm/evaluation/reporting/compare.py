"""`cloc-mllm eval compare A B`: two reports of one suite side by side, metric by metric and answer by answer.

The models were measured on the same items, so they are compared on them: the interval is of the difference, from
resamples that take the same images for both, and the p-value from swapping the models image by image.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from markupsafe import Markup

from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.reporting.gallery import Picture, Pictures, draw_answers, read_answers, score_of
from cloc_mllm.evaluation.reporting.html import metric_bar, percent
from cloc_mllm.evaluation.reporting.report import plain
from cloc_mllm.evaluation.reporting.scores import read_scores
from cloc_mllm.evaluation.scoring.metrics import check_seed
from cloc_mllm.evaluation.scoring.paired import Difference, paired_difference
from cloc_mllm.pages.charts import difference_chart
from cloc_mllm.pages.drawing import PALETTE
from cloc_mllm.pages.page import page_environment

_SAME = ("suite", "frame")
_SAME_DATA = ("name", "split", "n", "of", "unit", "seed")
_SAME_IF_KNOWN = ("kind",)
_GALLERY = 12
_SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Side:
    """One of the two reports.

    Attributes:
        name: What to call the model.
        folder: Where its report is.
        report: ``report.json``.
    """

    name: str
    folder: Path
    report: Mapping[str, Any]


def compare_reports(
    first: str | PathLike[str], second: str | PathLike[str], out: str | PathLike[str], *, seed: int = 0
) -> dict[str, Any]:
    """Compare two models and write ``comparison.json``, ``.md`` and ``.html``.

    Args:
        first: Folder of the first model's report.
        second: Folder of the second's.
        out: Folder to write to; made if missing.
        seed: Of resamples and swaps.

    Returns:
        The comparison: ``models``, ``dataset``, and for each metric both entries and their ``difference`` (second less
        first), or ``why_not`` where the items are not the same.

    Raises:
        ClocError: The reports are not of one suite on the same data, or have nothing in common; or there is no such
            seed.
    """
    check_seed(seed)
    sides = _open_sides(first, second)
    scores = [read_scores(side.folder) for side in sides]
    metrics: dict[str, Any] = {}
    for name, entry in sides[0].report["metrics"].items():
        if name not in sides[1].report["metrics"]:
            continue
        row: dict[str, Any] = {"first": entry, "second": sides[1].report["metrics"][name]}
        if name in scores[0] and name in scores[1]:
            try:
                row["difference"] = asdict(paired_difference(scores[0][name], scores[1][name], seed=seed))
            except ClocError as error:
                row["why_not"] = str(error)
        else:
            row["why_not"] = "the metric is no mean over items, or its items were not stored"
        metrics[name] = row
    if not metrics:
        raise ClocError("the two reports have no metric in common", file=sides[1].folder)
    comparison = {
        "suite": sides[0].report["suite"],
        "models": [{"name": side.name, "model": side.report["model"], "report": str(side.folder)} for side in sides],
        "dataset": sides[0].report["dataset"],
        "frame": sides[0].report["frame"],
        "unparsed": [side.report["unparsed"] for side in sides],
        "metrics": plain(metrics),
        "only_one_has": sorted(set(sides[0].report["metrics"]) ^ set(sides[1].report["metrics"])),
    }
    target = Path(out)
    target.mkdir(parents=True, exist_ok=True)
    (target / "comparison.json").write_text(json.dumps(comparison, indent=2) + "\n", encoding="utf-8")
    (target / "comparison.md").write_text(render_markdown(comparison), encoding="utf-8")
    (target / "comparison.html").write_text(_render_html(comparison, sides), encoding="utf-8")
    return comparison


def _open_sides(first: str | PathLike[str], second: str | PathLike[str]) -> list[Side]:
    folders = [Path(first), Path(second)]
    reports = [_read(folder) for folder in folders]
    for key in _SAME:
        if reports[0][key] != reports[1][key]:
            raise ClocError(
                f"the reports differ in '{key}' ({reports[0][key]} and {reports[1][key]}): nothing to compare",
                file=folders[1],
            )
    for key in (*_SAME_DATA, *_SAME_IF_KNOWN):
        mine, other = (report["dataset"].get(key) for report in reports)
        # Reports of older versions lack some: what one side alone says contradicts nothing.
        if mine != other and not (key in _SAME_IF_KNOWN and None in (mine, other)):
            raise ClocError(
                f"the models were measured on different data: '{key}' is {mine} and {other}",
                file=folders[1],
                remedy="Run the suite for both on the same split, with the same --limit and --seed.",
            )
    models = [str(report["model"]) for report in reports]
    names = short_names(*(models if models[0] != models[1] else map(str, folders)))
    return [Side(name, folder, report) for name, folder, report in zip(names, folders, reports, strict=True)]


def short_names(first: str, second: str) -> tuple[str, str]:
    """Return what tells two paths apart: the parts that they do not share at their beginning and end."""
    parts = [Path(first).parts, Path(second).parts]
    low = 0
    while low < min(map(len, parts)) and parts[0][low] == parts[1][low]:
        low += 1
    high = 0
    while high < min(map(len, parts)) - low - 1 and parts[0][-1 - high] == parts[1][-1 - high]:
        high += 1
    names = ["/".join(part[low : len(part) - high]) for part in parts]
    return (names[0], names[1]) if all(names) else (first, second)


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "report.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not {"suite", "frame", "dataset", "metrics", "model"} <= set(found):
            raise ValueError("it lacks what a suite's report has")
    except (OSError, ValueError, TypeError) as error:
        remedy = "Give the folder that `cloc-mllm eval SUITE --out` wrote."
        raise ClocError(f"this is no report of a suite ({error})", file=path, remedy=remedy) from error
    return dict(found)


def verdict(difference: Mapping[str, Any] | Difference) -> str:
    """Return ``second``, ``first`` or ``neither``: which model is better, at a level of 5 %."""
    entry = asdict(difference) if isinstance(difference, Difference) else difference
    if entry["p_value"] >= _SIGNIFICANT or entry["value"] == 0:
        return "neither"
    return "second" if entry["value"] > 0 else "first"


def render_markdown(comparison: Mapping[str, Any]) -> str:
    """Write a comparison as a table."""
    first, second = (model["name"] for model in comparison["models"])
    dataset = comparison["dataset"]
    lines = [
        f"# {comparison['suite']}: {second} against {first}",
        "",
        f"On {dataset['name']}, split {dataset['split']}, {dataset['n']} {dataset['unit']}; {comparison['frame']}. "
        f"Unreadable boxes: {percent(comparison['unparsed'][0])} and {percent(comparison['unparsed'][1])} %.",
        "",
        f"| metric | {first} | {second} | difference | 95 % interval | p | better / worse / equal items |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in comparison["metrics"].items():
        cells = [name, percent(row["first"]["value"]), percent(row["second"]["value"])]
        if "difference" in row:
            entry = row["difference"]
            low, high = entry["ci95"]
            mark = {"second": " **+**", "first": " **-**", "neither": ""}[verdict(entry)]
            cells += [
                f"{100 * entry['value']:+.1f}{mark}",
                f"{100 * low:+.1f} to {100 * high:+.1f}",
                f"{entry['p_value']:.4f}",
                f"{entry['better']} / {entry['worse']} / {entry['equal']}{_of_common(row)}",
            ]
        else:
            cells += ["–", row["why_not"], "–", "–"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "In per cent. Intervals of the difference are paired bootstraps over images, p a randomisation test that "
        "swaps the models image by image; **+** and **-** mark p < 0.05, not corrected for the number of metrics.",
        "",
    ]
    return "\n".join(lines)


def _of_common(row: Mapping[str, Any]) -> str:
    """On how many items models that saw different ones were compared: the values beside it are each model's own."""
    n = row["difference"]["n"]
    return "" if n == row["first"]["n"] == row["second"]["n"] else f" (the {n} items that both saw)"


def _render_html(comparison: Mapping[str, Any], sides: Sequence[Side]) -> str:
    # Blue and green are taken: by what was asked about, and by the truth.
    colours = {side.name: colour for side, colour in zip(sides, (PALETTE[3], PALETTE[0]), strict=True)}
    rows = {name: row["difference"] for name, row in comparison["metrics"].items() if "difference" in row}
    chart = difference_chart(
        f"{sides[1].name} less {sides[0].name}, in points",
        [(name, 100 * row["value"], 100 * row["ci95"][0], 100 * row["ci95"][1]) for name, row in rows.items()],
    )
    environment = page_environment("cloc_mllm.evaluation.reporting")
    environment.filters |= {"percent": percent, "verdict": verdict, "bar": metric_bar, "of_common": _of_common}
    return environment.get_template("comparison.html.j2").render(
        comparison=comparison,
        names=[side.name for side in sides],
        colours=colours,
        chart=Markup(chart),
        galleries=_galleries(comparison, sides, colours),
    )


def _galleries(
    comparison: Mapping[str, Any], sides: Sequence[Side], colours: Mapping[str, str]
) -> list[tuple[str, int, list[Picture]]]:
    """Return where the second is better, where the first, and where both are wrong: title, count, pictures."""
    pictures = Pictures(comparison["dataset"].get("path"))
    by_id = [{_key(record): record for record in read_answers(side.folder) if pictures.has(record)} for side in sides]
    both = [key for key in by_id[0] if key in by_id[1]]
    gains = {key: score_of(by_id[1][key]) - score_of(by_id[0][key]) for key in both}
    ranked = sorted(both, key=lambda key: -abs(gains[key]))
    groups = [
        (f"Better: {sides[1].name}", [key for key in ranked if gains[key] > 0]),
        (f"Better: {sides[0].name}", [key for key in ranked if gains[key] < 0]),
        ("Both wrong", [key for key in both if gains[key] == 0 and score_of(by_id[0][key]) < 1]),
    ]
    return [
        (
            title,
            len(keys),
            [
                draw_answers(
                    pictures, {side.name: found[key] for side, found in zip(sides, by_id, strict=True)}, colours
                )
                for key in keys[:_GALLERY]
            ],
        )
        for title, keys in groups
        if keys
    ]


def _key(record: Mapping[str, Any]) -> str:
    """Tell one question from all others: an id may be the picture's, about which several things are asked."""
    return json.dumps([record.get(name) for name in ("id", "question", "boxes_in", "true_boxes", "caption")])
