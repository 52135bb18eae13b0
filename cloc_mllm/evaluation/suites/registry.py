"""The suites that exist, by name, and how one is run: checkpoint and data in, ``report.json`` and ``report.md`` out."""

from __future__ import annotations

import importlib
import json
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.reporting.report import build_report, write_report
from cloc_mllm.evaluation.reporting.scores import SCORES_FILE, write_scores
from cloc_mllm.evaluation.suites.options import EvalOptions

_HERE = "cloc_mllm.evaluation.suites"


@dataclass(frozen=True)
class Suite:
    """One row of the table of suites.

    Attributes:
        name: As ``cloc-mllm eval NAME`` calls it.
        summary: One line of help.
        module: Has ``run(options: EvalOptions) -> Outcome``; imported when the suite is the one asked for.
    """

    name: str
    summary: str
    module: str


SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite("scenes", "procedural scenes: encoders by region and phrase, MLLMs by question", f"{_HERE}.scenes"),
        Suite("region", "encoders: recognition and retrieval of regions on any region-text data", f"{_HERE}.region"),
        Suite("image", "encoders: zero-shot classification of images, or retrieval with captions", f"{_HERE}.image"),
        Suite("detection", "encoders: open-vocabulary detection, COCO's and LVIS's AP", f"{_HERE}.detection"),
        Suite("referring", "MLLMs: is the object in a region a A or a B (LVIS), by two scorers", f"{_HERE}.referring"),
        Suite("grounding", "boxes of referring expressions (RefCOCO, +, g), MLLMs and encoders", f"{_HERE}.grounding"),
        Suite(
            "flickr30k", "boxes of phrases in captions (Flickr30k Entities), MLLMs and encoders", f"{_HERE}.flickr30k"
        ),
        Suite("ferret-bench", "MLLMs: open questions about regions, marked by a judge", f"{_HERE}.ferret_bench"),
        Suite("easy-vqa", "MLLMs: short questions about one shape, from the package easy-vqa", f"{_HERE}.easy_vqa"),
        Suite("vqa", "MLLMs: lmms-eval's benchmarks, and our tasks for it (--set tasks=gqa,pope)", f"{_HERE}.vqa"),
    )
}


def run_suite(name: str, options: EvalOptions, command: str | None = None) -> dict[str, Any]:
    """Run a suite and write its report: ``report.json``, ``.md``, ``.html``, ``scores.npz`` and ``answers.jsonl``.

    The last two are written where the suite has scores of single items and answers, and those of an earlier run go.

    Args:
        name: The suite.
        options: What to evaluate and on what.
        command: What the report names as the command that repeats it; default this process's.

    Returns:
        The report.

    Raises:
        ClocError: There is no such suite, or the model or data cannot be used.
    """
    # It decodes pictures, and so imports torch: not for the sake of --help.
    from cloc_mllm.evaluation.reporting.gallery import ANSWERS_FILE
    from cloc_mllm.evaluation.reporting.html import write_html

    suite = find_suite(name)
    started = time.monotonic()
    outcome = importlib.import_module(suite.module).run(options)
    report = build_report(
        suite=name,
        model=options.model,
        dataset=outcome.dataset,
        metrics=outcome.metrics,
        seconds=time.monotonic() - started,
        command=command or shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        unparsed=outcome.unparsed,
        details=outcome.details,
    )
    # An earlier run's would be taken for this one's, by comparisons above all.
    for stale in (ANSWERS_FILE, SCORES_FILE):
        (Path(options.out) / stale).unlink(missing_ok=True)
    write_report(report, options.out)
    write_scores(outcome.metrics, options.out)
    if outcome.answers:
        lines = "".join(json.dumps(answer) + "\n" for answer in outcome.answers)
        (Path(options.out) / ANSWERS_FILE).write_text(lines, encoding="utf-8")
    write_html(report, options.out, outcome.answers)
    return report


def find_suite(name: str) -> Suite:
    """Return a suite by name.

    Raises:
        ClocError: There is none of that name; the error lists those there are.
    """
    if name not in SUITES:
        raise ClocError(f"there is no suite '{name}'", remedy=f"There are: {', '.join(SUITES)}.")
    return SUITES[name]
