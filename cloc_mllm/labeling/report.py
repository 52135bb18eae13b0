"""What a labelling has made, for a reader: `report.json`, `report.md` and a self-contained `report.html`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from cloc_mllm.data.dataset import open_image
from cloc_mllm.data.readers import Sample, data_files
from cloc_mllm.data.shards import open_shard
from cloc_mllm.labeling.files import atomic_writer, write_json
from cloc_mllm.pages.drawing import PALETTE, DrawnBox, draw_boxes
from cloc_mllm.pages.page import data_uri, render_page

_PICTURES, _SIDE = 12, 480
Table = list[list[str]]


def write_reports(
    out: Path,
    description: Mapping[str, Any],
    statistics: Mapping[str, Any],
    timing: Mapping[str, Mapping[str, float]],
    skipped: Sequence[str],
) -> None:
    """Write the three reports into the folder of a finished set.

    Args:
        out: The folder; its shards are there.
        description: What `dataset.json` will hold.
        statistics: What `LabelStatistics.summary` returned.
        timing: `seconds` and `samples` by step, over all workers; `phrases`: how many the detector was given, and of
            how many it could read the beginning only, or nothing.
        skipped: Some of the samples that were left out, with their faults.
    """
    report = {**description, "statistics": statistics, "throughput": throughput(timing), "skipped": list(skipped)}
    report["detector_phrases"] = dict(timing["phrases"])
    write_json(out / "report.json", report)
    with atomic_writer(out / "report.md") as file:
        file.write(_markdown(report).encode())
    figures = [{"picture": uri, "caption": sample["caption"]} for uri, sample in _figures(out)]
    page = render_page("cloc_mllm.labeling", "report.html.j2", tables=tables(report), figures=figures, report=report)
    with atomic_writer(out / "report.html") as file:
        file.write(page.encode())


def throughput(timing: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    """For each step: seconds of all workers together, samples, samples a second of one worker, share of the time."""
    whole = sum(timing["seconds"].values())
    return {
        step: {
            "seconds": round(seconds, 2),
            "samples": timing["samples"][step],
            "samples_per_second": round(timing["samples"][step] / seconds, 2) if seconds else None,
            "share": round(seconds / whole, 4) if whole else None,
        }
        for step, seconds in timing["seconds"].items()
    }


def tables(report: Mapping[str, Any]) -> dict[str, Table]:
    """The report's tables by their titles; the first row of each is its head."""
    statistics = report["statistics"]
    shown: dict[str, Table] = {
        "Counts": [["what", "number"], *([n.replace("_", " "), f"{v:,}"] for n, v in report["counts"].items())]
    }
    stages = report["stages"].items()
    shown["Stages"] = [["", "stage", "what it is"], *([n, s["stage"], _plain(s["identity"])] for n, s in stages)]
    shown["Filter"] = [["rule", "value"], *([name, str(value)] for name, value in report["filter"].items())]
    dropped = report["detections_dropped"]
    shown["Detections that were dropped"] = [["rule", "number", "share of all"]]
    for name, number in dropped.items():
        shown["Detections that were dropped"].append(
            [name, f"{number:,}", _share(number, report["counts"]["detections"])]
        )
    phrases = report["detector_phrases"]
    if phrases:
        shown["Phrases as the detector read them"] = [["", "number", "share"]]
        shown["Phrases as the detector read them"] += [
            [name, f"{number:,}", _share(number, phrases.get("given", 0))] for name, number in phrases.items()
        ]
    shown["Time"] = [["step", "worker seconds", "samples", "samples a second, one worker", "share"]]
    for step, found in report["throughput"].items():
        speed = "–" if found["samples_per_second"] is None else f"{found['samples_per_second']:,.1f}"
        cells = [step, f"{found['seconds']:,.1f}", f"{found['samples']:,}", speed, _share(found["share"], 1)]
        shown["Time"].append(cells)
    means = [[name, "–" if value is None else f"{value:.2f}"] for name, value in statistics["means"].items()]
    shown["Means"] = [["of", "mean"], *means]
    for name, bins in statistics["histograms"].items():
        total = sum(bins.values())
        shown[name.capitalize()] = [["", "number", "share"]]
        shown[name.capitalize()] += [[label, f"{n:,}", _share(n, total)] for label, n in bins.items()]
    shown["Most frequent phrases"] = [
        ["phrase", "regions"],
        *([phrase, f"{number:,}"] for phrase, number in statistics["top_phrases"].items()),
    ]
    return shown


def _share(part: float | None, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole and part is not None else "–"


def _plain(identity: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in identity.items())


def _markdown(report: Mapping[str, Any]) -> str:
    counts = report["counts"]
    lines = [
        f"# Labels of {_cell(report['source'])}",
        "",
        f"{counts['samples_read']:,} samples read, {counts['samples_written']:,} written, "
        f"{counts['samples_skipped']:,} left out; {counts['regions_written']:,} regions; boxes are {report['frame']}.",
        "",
    ]
    for title, (head, *rows) in tables(report).items():
        lines += [f"## {title}", "", f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
        lines += [f"| {' | '.join(map(_cell, row))} |" for row in rows]
        lines.append("")
    if report["skipped"]:
        lines += ["## Left out", "", "The first of them; `skipped.txt` has all.", ""]
        lines += [f"* {_cell(text)}" for text in report["skipped"]]
    return "\n".join(lines).rstrip() + "\n"


def _cell(text: str) -> str:
    """A text that breaks no table and starts no markup."""
    return "".join(f"\\{mark}" if mark in "|\\`*_<>[]" else mark for mark in text)


def _figures(out: Path) -> Iterator[tuple[str, Sample]]:
    """Labelled pictures with their boxes drawn, evenly spread over the set."""
    files = data_files(out)
    chosen = files[:: max(1, len(files) // 4)][:4]
    each = -(-_PICTURES // len(chosen))
    for file in chosen:
        shard = open_shard(str(file))
        for number in range(0, len(shard), max(1, len(shard) // each))[:each]:
            block = shard.block(number, number + 1)
            sample = block.sample(0)
            picture = open_image(sample["image"], block.folder(0), str(file), str(sample["id"]))
            yield data_uri(_drawn(picture, sample), photograph=True), sample


def _drawn(picture: Image.Image, sample: Sample) -> Image.Image:
    """A picture as the report shows it: no larger than it has to be, its regions' boxes and texts drawn."""
    scale = min(1.0, _SIDE / max(picture.size))
    small = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
    boxes = [
        DrawnBox([value * scale for value in region["box"]], region["text"], PALETTE[k % len(PALETTE)])
        for k, region in enumerate(sample["regions"])
    ]
    return draw_boxes(small, boxes)
