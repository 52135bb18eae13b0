"""Average precision: oracles, both packages alike, LVIS's rules, and its intervals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.scoring.coco_ap import BACKENDS, average_precision

pytest.importorskip("pycocotools", reason="pycocotools is not installed")


def made_up(federated: bool, seed: int = 0) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Twenty images, five classes of which one never occurs, crowds, and detections right and wrong."""
    rng = np.random.default_rng(seed)
    images: list[dict[str, Any]] = [{"id": k + 1, "width": 200, "height": 200} for k in range(20)]
    if federated:
        for image in images:
            image["neg_category_ids"] = rng.integers(1, 6, 2).tolist()
            image["not_exhaustive_category_ids"] = rng.integers(1, 6, 1).tolist()
    boxes, found = [], []
    for k in range(90):
        where = {"image_id": int(rng.integers(1, 21)), "category_id": int(rng.integers(1, 5))}
        box = np.concatenate([rng.uniform(0, 100, 2), rng.uniform(5, 100, 2)])
        area = float(box[2] * box[3] * 0.8)
        boxes.append({**where, "bbox": box.tolist(), "area": area, "iscrowd": int(k % 15 == 0)})
        for _ in range(3):
            moved = np.maximum(box + rng.normal(0, 4, 4), 1.0)
            kind = where["category_id"] if rng.random() < 0.7 else int(rng.integers(1, 6))
            found.append({**where, "category_id": kind, "bbox": moved.tolist(), "score": float(rng.random())})
    categories = [{"id": k, "name": str(k)} for k in range(1, 6)]
    return {"images": images, "annotations": boxes, "categories": categories}, found


def the_truth(truth: dict[str, Any]) -> list[dict[str, Any]]:
    keys = ("image_id", "category_id", "bbox")
    return [{**{k: one[k] for k in keys}, "score": 1.0} for one in truth["annotations"] if not one["iscrowd"]]


def backends() -> list[str]:
    try:
        import faster_coco_eval  # noqa: F401
    except ImportError:
        return ["pycocotools"]
    return list(BACKENDS)


@pytest.mark.parametrize("federated", [False, True])
def test_the_truth_is_1_and_nothing_is_0(federated: bool) -> None:
    truth, _ = made_up(federated)
    for backend in backends():
        right = average_precision(truth, the_truth(truth), groups={"odd": [1, 3], "none": [5]}, backend=backend)
        nothing = average_precision(truth, [], backend=backend, resamples=2)
        for name in ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_odd", "ap50_odd"):
            assert right[name].value == 1.0, name
            assert right[name].ci95 == (1.0, 1.0)
        assert {nothing[name].value for name in ("ap", "ap50", "ap_medium")} == {0.0}
        assert math.isnan(right["ap_none"].value)
        assert right["ap_none"].n == 0
        assert right["ap"].n == sum(not one["iscrowd"] for one in truth["annotations"])


@pytest.mark.parametrize("federated", [False, True])
def test_both_packages_agree_to_the_last_digit(federated: bool) -> None:
    pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed")
    truth, found = made_up(federated)
    slow, fast = (
        average_precision(truth, found, groups={"even": [2, 4]}, backend=name, resamples=5) for name in BACKENDS
    )
    assert 0.05 < slow["ap"].value < 0.9
    for name, metric in slow.items():
        assert metric.to_dict() == fast[name].to_dict(), name


def test_it_is_what_pycocotools_summarises() -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, found = made_up(False)
    numbered = [{**one, "id": k + 1} for k, one in enumerate(truth["annotations"])]
    plain = COCO()
    plain.dataset = {"info": {}, **truth, "annotations": numbered}
    plain.createIndex()
    run = COCOeval(plain, plain.loadRes(found), "bbox")
    run.evaluate()
    run.accumulate()
    run.summarize()
    ours = average_precision(truth, found, resamples=0)
    expected = dict(zip(("ap", "ap50", "ap75", "ap_small", "ap_medium"), run.stats, strict=False))
    assert {name: ours[name].value for name in expected} == pytest.approx(expected, abs=1e-12)
    assert math.isnan(ours["ap"].ci95[0])


def test_lvis_does_not_count_what_was_not_looked_for() -> None:
    box = [10.0, 10.0, 30.0, 30.0]
    image = {"id": 1, "width": 100, "height": 100, "neg_category_ids": [2], "not_exhaustive_category_ids": [3]}
    boxes = [{"image_id": 1, "category_id": k, "bbox": box, "area": 900.0} for k in (1, 3)]
    other = {"id": 2, "width": 100, "height": 100, "neg_category_ids": [], "not_exhaustive_category_ids": []}
    boxes += [{"image_id": 2, "category_id": k, "bbox": box, "area": 900.0} for k in (2, 4)]
    truth = {
        "images": [image, other],
        "annotations": boxes,
        "categories": [{"id": k, "name": str(k)} for k in (1, 2, 3, 4)],
    }
    wrong = [60.0, 60.0, 20.0, 20.0]
    more = [{"image_id": 1, "category_id": k, "bbox": wrong, "score": 1.0} for k in (1, 2, 3, 4)]
    right = [{**{k: one[k] for k in ("image_id", "category_id", "bbox")}, "score": 0.5} for one in boxes]
    for backend in backends():
        found = average_precision(
            truth, right + more, groups={str(k): [k] for k in (1, 2, 3, 4)}, backend=backend, resamples=0
        )
        # 1 was looked for and 2 found absent: mistakes. 3 is not exhaustive, 4 was never looked for: no mistakes.
        assert [found[f"ap50_{k}"].value for k in (1, 2, 3, 4)] == pytest.approx([0.5, 0.5, 1.0, 1.0], abs=0.01)


def test_the_interval_holds_the_value_and_can_be_left_out() -> None:
    truth, found = made_up(False)
    metric = average_precision(truth, found, resamples=30)["ap"]
    assert metric.ci95[0] < metric.value < metric.ci95[1]
    assert metric == average_precision(truth, found, resamples=30)["ap"], "the same seed, the same draws"
    with pytest.raises(ClocError, match="no backend 'coco'"):
        average_precision(truth, found, backend="coco")


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pycocotools.coco", None)
    with pytest.raises(ClocError, match="pip install pycocotools"):
        average_precision(made_up(False)[0], [])
