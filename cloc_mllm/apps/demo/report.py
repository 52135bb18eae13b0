"""Gathers what the demo's stages left into `report.json`: metrics over seeds, baselines, costs, samples, findings."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cloc_mllm.apps.demo.files import DATA, DemoFiles
from cloc_mllm.apps.demo.findings import findings, majority_of, percent
from cloc_mllm.apps.demo.plan import DemoPlan
from cloc_mllm.apps.demo.samples import collect_samples
from cloc_mllm.evaluation.reporting.report import FRAME, aggregate_metrics, plain, versions

CONTRACT_ENCODER_METRICS = (
    "image_i2t_r1",
    "image_t2i_r1",
    "region_top1",
    "region_macc",
    "region_r2t_r1",
    "region_t2r_r1",
    "pointing_acc",
    "grounding_acc50",
    "grounding_zeroshot_acc50",
    "region_size_acc",
)
CONTRACT_MLLM_METRICS = ("vqa_acc", "referring_acc", "grounding_acc50")


def build_report(
    plan: DemoPlan, files: DemoFiles, stamps: Mapping[str, Mapping[str, Any]], *, seconds: float, command: str
) -> dict[str, Any]:
    """Return the demo's report.

    Args:
        plan: What was run.
        files: Where it lies.
        stamps: What each stage cost, by its name.
        seconds: Wall-clock time of this run.
        command: What the user typed.

    Returns:
        The form of `report.json`; the keys are a contract.
    """
    encoders = {
        encoder.name: _model_entry(
            plan, files, "encoders", encoder.name, encoder.description, files.encoder(encoder.name, plan.seeds[0])
        )
        for encoder in plan.encoders
    }
    mllms = {
        mllm.name: _model_entry(
            plan, files, "mllm", mllm.name, mllm.description, files.mllm(mllm.name, plan.seeds[0], "instruct")
        )
        for mllm in plan.mllms
    }
    first = _read(files, "encoders", plan.encoders[0].name, plan.seeds[0])
    report: dict[str, Any] = {
        "suite": "demo",
        "preset": plan.preset,
        "model": str(files.out),
        "dataset": first["dataset"],
        "frame": FRAME,
        "seeds": list(plan.seeds),
        "encoder": encoders,
        "mllm": mllms,
        "baselines": _baselines(plan, files),
        "readouts": _readouts(plan, files),
        "grounding_mode": _grounding_mode(plan, files),
        "unparsed": max((entry["unparsed"] for entry in mllms.values()), default=0.0),
        "stages": [_stage_entry(stamp) for stamp in stamps.values()],
        "samples": _samples(plan, files),
        "limits": list(plan.limits),
        "versions": versions(),
        "machine": f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}, {platform.system()}",
        "seconds": round(seconds, 2),
        "command": command,
    }
    report["findings"] = findings(report) if plan.judged else []
    report["targets"] = targets(report) if plan.judged else []
    return report


def write_report(report: Mapping[str, Any], folder: Path) -> Path:
    """Write `report.json` into a folder; NaN has no place in it."""
    path = folder / "report.json"
    path.write_text(json.dumps(plain(report), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return path


def _read(files: DemoFiles, kind: str, name: str, seed: int) -> dict[str, Any]:
    path = files.out / files.evaluation(kind, name, seed) / "report.json"
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report


def _model_entry(
    plan: DemoPlan, files: DemoFiles, kind: str, name: str, description: str, trained: str
) -> dict[str, Any]:
    """Join one model's evaluations over seeds."""
    reports = [_read(files, kind, name, seed) for seed in plan.seeds]
    metrics = aggregate_metrics([report["metrics"] for report in reports])
    wanted = CONTRACT_ENCODER_METRICS if kind == "encoders" else CONTRACT_MLLM_METRICS
    extra = {key: value for key, value in metrics.items() if key not in wanted}
    entry: dict[str, Any] = {
        "description": description,
        "path": str(files.export(trained)),
        "metrics": {key: metrics[key] for key in wanted if key in metrics} | extra,
        "unparsed": round(sum(report["unparsed"] for report in reports) / len(reports), 6),
    }
    for key in ("choices", "grounding_mode"):
        if key in reports[0]["details"]:
            entry[key] = reports[0]["details"][key]
    return entry


def _baselines(plan: DemoPlan, files: DemoFiles) -> dict[str, Any]:
    """Return what answers that see no image score, by kind of model and metric; all models of a kind share them."""
    found = {}
    for key, kind, models in (("encoder", "encoders", plan.encoders), ("mllm", "mllm", plan.mllms)):
        details = [_read(files, kind, model.name, plan.seeds[0])["details"] for model in models[:1]]
        found[key] = details[0].get("baselines", {}) if details else {}
    return found


def _readouts(plan: DemoPlan, files: DemoFiles) -> list[dict[str, Any]]:
    """Return every way each encoder's regions were read, with its metrics over seeds."""
    rows = []
    for encoder in plan.encoders:
        details = [_read(files, "encoders", encoder.name, seed)["details"] for seed in plan.seeds]
        for kind in ("readouts", "localizers"):
            for readout in details[0].get(kind, {}):
                metrics = aggregate_metrics([detail[kind][readout] for detail in details])
                rows.append({"encoder": encoder.name, "readout": readout, "kind": kind, "metrics": metrics})
    return rows


def _samples(plan: DemoPlan, files: DemoFiles) -> list[dict[str, Any]]:
    """Return the first seed's answers to the first test questions."""
    folders = {mllm.name: files.out / files.evaluation("mllm", mllm.name, plan.seeds[0]) for mllm in plan.mllms}
    return collect_samples(files.out / DATA / "test", folders)


def _grounding_mode(plan: DemoPlan, files: DemoFiles) -> str:
    if not plan.mllms:
        return "none"
    details = _read(files, "mllm", plan.mllms[0].name, plan.seeds[0])["details"]
    return str(details["grounding_mode"])


def _stage_entry(stamp: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stage's cost as the report tells it."""
    images, seconds = stamp.get("images"), stamp["seconds"]
    return {
        "name": stamp["name"],
        "title": stamp["title"],
        "seconds": seconds,
        "images": images,
        "images_per_second": round(images / seconds, 1) if images else None,
        "world_size": stamp["world_size"],
        "zero_stage": stamp["zero_stage"],
        "steps": stamp.get("steps"),
        "seed": stamp.get("seed"),
        "skipped": stamp["skipped"],
        "command": stamp["command"],
    }


def targets(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Hold the report against the figures the demo is meant to reach.

    Args:
        report: The demo's report.

    Returns:
        For each figure its name, what is wanted, what came out, and whether that is enough. A figure whose models were
        not run is left out.
    """
    encoders = {name: entry["metrics"] for name, entry in report["encoder"].items()}
    mllms = {name: entry["metrics"] for name, entry in report["mllm"].items()}
    found: list[dict[str, Any]] = []

    def add(name: str, wanted: str, value: float, least: float) -> None:
        got = f"{percent(value)}, needed {percent(least)}"
        found.append({"name": name, "wanted": wanted, "got": got, "reached": bool(value >= least)})

    for other in ("clip", "clip_captions"):
        pair = _both(encoders, "cloc", other)
        if pair is None:
            continue
        cloc, clip = pair
        if other == "clip":
            add("region_top1", "2.5 × clip", cloc["region_top1"], 2.5 * clip["region_top1"])
            for metric in ("image_i2t_r1", "image_t2i_r1"):
                add(metric, "clip less 5 points", cloc[metric], clip[metric] - 0.05)
            zero_shot, best = cloc["grounding_zeroshot_acc50"], clip["grounding_zeroshot_acc50"]
            add("grounding_zeroshot_acc50", "40 % and 3 × clip", zero_shot, max(0.4, 3 * best))
        else:
            add(f"region_top1 against {other}", f"above {other}", cloc["region_top1"], clip["region_top1"])
    for other in ("clip", "clip_roi", "blind"):
        pair = _both(mllms, "cloc_prompter", other)
        if pair is None:
            continue
        ours, base = pair
        if other == "clip":
            least = 0.6 if report["preset"] == "reproduce" else 0.4
            add("mllm referring_acc", "2 × clip", ours["referring_acc"], 2 * base["referring_acc"])
            wanted = f"{percent(least, 0)} and above clip"
            add("mllm grounding_acc50", wanted, ours["grounding_acc50"], max(least, base["grounding_acc50"]))
        else:
            for metric in ("referring_acc", "grounding_acc50"):
                add(f"mllm {metric} against {other}", f"above {other}", ours[metric], base[metric])
    return found + _above_majority(mllms, report["baselines"]["mllm"])


def _above_majority(mllms: Mapping[str, Mapping[str, Any]], baselines: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = []
    for name, metrics in mllms.items():
        for metric in CONTRACT_MLLM_METRICS:
            floor, entry = majority_of(baselines, metric), metrics.get(metric)
            if name == "blind" or floor is None or entry is None or entry["value"] is None:
                continue
            got = f"{percent(entry['value'])}, constant answer {percent(floor)}"
            row = {"name": f"mllm {name} {metric}", "wanted": "above the constant answer", "got": got}
            found.append({**row, "reached": entry["value"] > floor})
    return found


def _both(
    models: Mapping[str, Mapping[str, Any]], ours: str, other: str
) -> tuple[Mapping[str, float], Mapping[str, float]] | None:
    """Return the plain values of two models, a missing one as zero; None if one of them was not run."""
    if ours not in models or other not in models:
        return None
    names: Sequence[str] = (*CONTRACT_ENCODER_METRICS, *CONTRACT_MLLM_METRICS)
    first, second = (
        {name: (models[model].get(name) or {}).get("value") or 0.0 for name in names} for model in (ours, other)
    )
    return first, second
