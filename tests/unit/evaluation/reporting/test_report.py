"""Reports: their keys, their honesty about subsets, and what averaging over seeds does."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.reporting.report import (
    DatasetRef,
    aggregate_metrics,
    aggregate_reports,
    build_report,
    render_markdown,
    write_report,
)
from cloc_mllm.evaluation.scoring.metrics import Metric, mean_metric

KEYS = {"suite", "model", "dataset", "frame", "metrics", "unparsed", "versions", "seconds", "command", "details"}


def report(value: float = 0.5, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "suite": "scenes",
        "model": "runs/cloc",
        "dataset": DatasetRef("scenes", "test", 1200, 1200),
        "metrics": {"region_top1": Metric(value, (value - 0.1, value + 0.1), 900), "none": mean_metric([], [])},
        "seconds": 1.234,
        "command": "cloc-mllm eval scenes",
        "details": {"readouts": {"roi": {"region_top1": Metric(0.25, (0.2, 0.3), 900)}}, "pools": {"image": "1200"}},
    }
    return build_report(**{**values, **changes})


def test_a_report_has_the_contracts_keys_and_is_strict_json(tmp_path: Path) -> None:
    made = report()
    assert set(made) == KEYS
    assert made["metrics"]["region_top1"] == {"value": 0.5, "ci95": [0.4, 0.6], "n": 900}
    assert made["metrics"]["none"] == {"value": None, "ci95": [None, None], "n": 0}
    assert "pixels of the original image" in made["frame"]
    assert {"python", "cloc_mllm", "torch", "transformers"} <= set(made["versions"])
    path, text = write_report(made, tmp_path / "new")
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == made
    page = text.read_text()
    for part in ("| region_top1 | 50.0 | 40.0 to 60.0 | 900 |", "| none | – | – to – | 0 |", "### roi", "25.0", "1200"):
        assert part in page, part


def test_a_subset_never_carries_the_splits_name() -> None:
    assert DatasetRef("scenes", "test", 1200, 1200).to_dict()["split"] == "test"
    subset = DatasetRef("scenes", "test", 400, 1200, seed=3).to_dict()
    assert subset["split"] == "test subset (400 of 1200 images, seed 3)"
    assert (subset["n"], subset["of"]) == (400, 1200)
    for n in (0, 1201):
        with pytest.raises(ClocError, match="1200 images"):
            DatasetRef("scenes", "test", n, 1200)


def test_seeds_are_averaged_and_their_spread_is_apart_from_the_interval() -> None:
    joined = aggregate_reports([report(0.4), report(0.5), report(0.6)])
    entry = joined["metrics"]["region_top1"]
    assert entry["value"] == pytest.approx(0.5)
    assert entry["seeds"] == [0.4, 0.5, 0.6]
    assert entry["ci95"] == pytest.approx([0.4, 0.6])
    assert entry["spread"] == {"std": pytest.approx(0.1), "min": 0.4, "max": 0.6}
    assert joined["metrics"]["none"]["value"] is None
    assert joined["model"] == ["runs/cloc"] * 3
    assert "40.0, 50.0, 60.0" in render_markdown(joined)
    json.dumps(joined, allow_nan=False)


def test_one_seed_stays_as_it_is() -> None:
    one = report()["metrics"]
    assert aggregate_metrics([one]) == one


def test_n_of_seeds_is_the_smallest() -> None:
    runs = [{"a": {"value": 0.1, "ci95": [0, 1], "n": n}} for n in (2000, 3500)]
    assert aggregate_metrics(runs)["a"]["n"] == 2000


def test_what_does_not_belong_together_is_not_averaged() -> None:
    with pytest.raises(ClocError, match="different 'dataset'"):
        aggregate_reports([report(), report(dataset=DatasetRef("scenes", "test", 400, 1200))])
    with pytest.raises(ClocError, match="different 'suite'"):
        aggregate_reports([report(), report(suite="region")])
    with pytest.raises(ClocError, match="only some have other"):
        aggregate_metrics([report()["metrics"], {**report()["metrics"], "other": {}}])
    with pytest.raises(ClocError, match="no report"):
        aggregate_reports([])


def test_nan_in_details_becomes_null() -> None:
    assert report(details={"a": [math.nan, 1 / 3]})["details"] == {"a": [None, 0.333333]}
