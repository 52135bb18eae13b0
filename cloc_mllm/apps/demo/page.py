"""Renders the demo's report as one HTML file that carries its pictures and charts inside it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from cloc_mllm.apps.demo.findings import majority_of, percent
from cloc_mllm.apps.demo.picture import MODEL_COLOURS
from cloc_mllm.apps.demo.progress import format_seconds
from cloc_mllm.apps.demo.samples import read_jsonl
from cloc_mllm.models.image_processing_cloc import load_image
from cloc_mllm.pages.charts import Curve, interval_bar, line_chart
from cloc_mllm.pages.drawing import PALETTE, TRUE_COLOUR, DrawnBox, draw_boxes
from cloc_mllm.pages.page import data_uri, page_environment

ENCODER_METRICS = {
    "region_top1": "class of a region: shape × colour × texture",
    "region_macc": "the same, mean over classes",
    "region_r2t_r1": "text of a region among all",
    "region_t2r_r1": "region of a text among all",
    "region_size_acc": "size of a region, apart",
    "pointing_acc": "point at a phrase's object",
    "grounding_acc50": "box of a phrase by BoxHead, IoU ≥ 0.5",
    "grounding_zeroshot_acc50": "box of a phrase by grid search, untrained",
    "image_i2t_r1": "caption of an image, R@1",
    "image_t2i_r1": "image of a caption, R@1",
}
MLLM_METRICS = {
    "vqa_acc": "questions about the image",
    "referring_acc": "what is in a box",
    "grounding_acc50": "box of a phrase, IoU ≥ 0.5",
}
READOUT_TITLES = {
    "readouts": "Every way a region was read (CLIP's headline takes the one that is best on the validation split)",
    "localizers": "Every way a phrase was looked for (box_head is trained for it, the others are not)",
}
SHOWN_PICTURES = 8
SHOWN_CHATS = 4


def write_page(report: Mapping[str, Any], out: Path, runs: Mapping[str, Path], images: Path) -> Path:
    """Write `report.html` beside `report.json`.

    Args:
        report: The demo's report.
        out: The demo's output folder.
        runs: Training run folders by name, for the loss curves.
        images: The folder that the samples' image paths are relative to.

    Returns:
        The path of the page.
    """
    environment = page_environment("cloc_mllm.apps.demo")
    floors = {
        kind: {metric: majority_of(report["baselines"][kind], metric) for metric in metrics}
        for kind, metrics in (("encoder", ENCODER_METRICS), ("mllm", MLLM_METRICS))
    }
    colours = {name: MODEL_COLOURS.get(name, PALETTE[6]) for name in [*report["encoder"], *report["mllm"]]}
    environment.filters |= {
        "percent": percent,
        "duration": format_seconds,
        "bar": lambda entry, colour, floor: Markup(_bar(entry, colour, floor)),
        "is_best": _is_best,
    }
    pictures, legend = _pictures(report["samples"], images)
    page = environment.get_template("template.html.j2").render(
        report=report,
        floors=floors,
        colours=colours,
        encoder_metrics=_present(ENCODER_METRICS, report["encoder"]),
        mllm_metrics=_present(MLLM_METRICS, report["mllm"]),
        readout_tables=_readout_tables(report["readouts"]),
        charts=[Markup(chart) for chart in loss_charts(runs)],
        pictures=pictures,
        legend=legend,
        chats=_chats(report["samples"], images),
        chat_command=chat_command(report, images),
    )
    path = out / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _bar(entry: Mapping[str, Any], colour: str, floor: float | None) -> str:
    low, high = entry["ci95"]
    return interval_bar(entry["value"], low, high, colour, floor)


def loss_charts(runs: Mapping[str, Path]) -> list[str]:
    """Return one chart for each loss that the runs logged, runs of one stage together.

    Args:
        runs: Run folders by name; the name's last part tells the stage (`align`, `instruct`), encoders have none.

    Returns:
        `<svg>` elements.
    """
    charts: dict[tuple[str, str], list[Curve]] = {}
    for name, folder in runs.items():
        stage = {"align": "alignment", "instruct": "instruction tuning"}.get(Path(name).name, "pre-training")
        label = name.replace("encoders/", "").replace("mllm/", "").removesuffix("/align").removesuffix("/instruct")
        series: dict[str, list[tuple[float, float]]] = {}
        for record in read_jsonl(folder / "metrics.jsonl"):
            for key, value in record.items():
                if (key == "loss" or key.startswith("loss_")) and isinstance(value, (int, float)) and "step" in record:
                    series.setdefault(key, []).append((float(record["step"]), float(value)))
        for key, points in series.items():
            charts.setdefault((stage, key), []).append(Curve(label, points))
    return [line_chart(f"{stage}: {key}", curves) for (stage, key), curves in charts.items()]


def chat_command(report: Mapping[str, Any], images: Path) -> str:
    """Return a command that asks the best MLLM about the first sample's image."""
    if not report["mllm"] or not report["samples"]:
        return "cloc-mllm chat --help"
    name = "cloc_prompter" if "cloc_prompter" in report["mllm"] else next(iter(report["mllm"]))
    sample = report["samples"][0]
    words = ["cloc-mllm", "chat", report["mllm"][name]["path"], "--image", str(images / sample["image"])]
    question = sample["question"]
    if sample["boxes_in"]:
        words += ["--box", ",".join(f"{value:g}" for value in sample["boxes_in"][0])]
    return shlex.join([*words, question])


def _pictures(samples: Sequence[Mapping[str, Any]], images: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Draw the grounding samples: the true box dashed, each model's box in its colour."""
    shown: list[dict[str, str]] = []
    models: dict[str, str] = {}
    for sample in [sample for sample in samples if sample["task"] == "grounding"][:SHOWN_PICTURES]:
        boxes = [DrawnBox(sample["box"], colour=TRUE_COLOUR, dashed=True)]
        notes = []
        for name, answer in sample["answers"].items():
            models[name] = MODEL_COLOURS.get(name, PALETTE[6])
            boxes += [DrawnBox(item["box"], colour=models[name]) for item in answer["boxes"]]
            notes.append(f"{name}: IoU {answer['iou']:.2f}" if answer["boxes"] else f"{name}: no box")
        picture = draw_boxes(load_image(images / sample["image"]), boxes)
        shown.append({"data": data_uri(picture), "question": sample["question"], "caption": ", ".join(notes)})
    legend = [{"name": "true (dashed)", "colour": TRUE_COLOUR}]
    return shown, [*legend, *({"name": name, "colour": colour} for name, colour in models.items())]


def _chats(samples: Sequence[Mapping[str, Any]], images: Path) -> list[dict[str, Any]]:
    """Group the samples by image, with the boxes that were asked about drawn."""
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        grouped.setdefault(sample["image"], []).append(sample)
    chats = []
    for image, asked in list(grouped.items())[:SHOWN_CHATS]:
        prompts = [DrawnBox(box, "asked", PALETTE[1]) for sample in asked for box in sample["boxes_in"]]
        turns = [
            {
                "question": sample["question"],
                "truth": sample["truth"],
                "replies": [{"model": name, **answer} for name, answer in sample["answers"].items()],
            }
            for sample in asked
        ]
        picture = draw_boxes(load_image(images / image), prompts, smallest_side=288)
        chats.append({"image": image, "data": data_uri(picture), "turns": turns})
    return chats


def _readout_tables(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one table for the read-outs of regions and one for the ways of finding phrases."""
    tables = []
    for kind, title in READOUT_TITLES.items():
        mine = [row for row in rows if row["kind"] == kind]
        metrics = list(dict.fromkeys(metric for row in mine for metric in row["metrics"]))
        tables.append({"title": title, "metrics": metrics, "rows": mine})
    return [table for table in tables if table["rows"]]


def _present(metrics: Mapping[str, str], models: Mapping[str, Any]) -> dict[str, str]:
    """Return the metrics that at least one model has."""
    return {
        metric: meaning
        for metric, meaning in metrics.items()
        if any(entry["metrics"].get(metric, {}).get("value") is not None for entry in models.values())
    }


def _is_best(metric: str, name: str, models: Mapping[str, Any]) -> bool:
    values: Iterable[float | None] = (entry["metrics"].get(metric, {}).get("value") for entry in models.values())
    return models[name]["metrics"][metric]["value"] == max(value for value in values if value is not None)
