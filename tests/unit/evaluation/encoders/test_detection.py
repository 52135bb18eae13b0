"""Proposals and how embeddings of boxes become detections, against plain twins."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.encoders.detection import DetectionRules, select
from cloc_mllm.evaluation.encoders.proposals import FileProposals, Proposals, build_proposals
from cloc_mllm.evaluation.encoders.readouts import EncodedImages
from cloc_mllm.evaluation.encoders.region_data import RegionSplit, load_region_split
from cloc_mllm.labeling.stages import DETECTORS, Detection
from cloc_mllm.models.boxes import box_iou
from cloc_mllm.models.geometry import Geometry
from tests.builders import noise_image

SIZES = [(80, 60), (40, 90)]


@pytest.fixture
def split(tmp_path: Path) -> RegionSplit:
    """Two pictures, "7" with two boxes, "9" with none."""
    lines = []
    for (width, height), name in zip(SIZES, "79", strict=True):
        noise_image(width, height).save(tmp_path / f"{name}.png")
        regions = [{"box": [5, 5, 30, 40], "text": "dog"}, {"box": [30, 10, 60, 50], "text": "cat"}]
        sample = {"id": name, "image": f"{name}.png", "caption": "c", "regions": regions if name == "7" else []}
        lines.append(json.dumps(sample) + "\n")
    (tmp_path / "regions.jsonl").write_text("".join(lines))
    return load_region_split(tmp_path)


def images_of(sizes: list[tuple[int, int]]) -> EncodedImages:
    nothing = torch.zeros(len(sizes), 1, 1)
    return EncodedImages(
        ids=[str(k) for k in range(len(sizes))],
        pictures=[Image.new("RGB", size) for size in sizes],
        geometries=[Geometry.fit(*size, 96) for size in sizes],
        embeds=nothing[:, 0],
        tokens=nothing,
    )


def plain_suppression(boxes: np.ndarray, scores: np.ndarray, rules: DetectionRules) -> list[tuple[int, int]]:
    """Class by class, all of them, and the best of what is left."""
    ious = box_iou(torch.from_numpy(boxes), torch.from_numpy(boxes)).numpy()
    kept: list[tuple[int, int]] = []
    for number in range(scores.shape[1]):
        mine: list[int] = []
        for row in np.argsort(-scores[:, number], kind="stable"):
            if scores[row, number] > rules.min_score and all(ious[row, other] <= rules.nms for other in mine):
                mine.append(int(row))
        kept += [(row, number) for row in mine]
    return sorted(kept, key=lambda pair: -scores[pair])[: rules.most]


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 12), st.integers(1, 3), st.sampled_from([0.3, 0.5, 1.0]), st.integers(1, 30), st.integers(0, 10**6)
)
def test_selection_is_suppression_class_by_class(rows: int, count: int, nms: float, most: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 60, (rows, 2))
    boxes = np.concatenate([low, low + rng.uniform(5, 60, (rows, 2))], axis=1)
    scores = rng.permutation(rows * count).reshape(rows, count) / max(1, rows * count)  # no ties, one is 0
    rules = DetectionRules(nms=nms, most=most)
    found = select(boxes, torch.from_numpy(scores), rules)
    expected = plain_suppression(boxes, scores, rules)
    assert found.classes.tolist() == [number for _, number in expected]
    assert found.boxes.tolist() == [boxes[row].tolist() for row, _ in expected]
    assert found.scores.tolist() == [scores[pair] for pair in expected]


def test_scores_are_the_softmax_or_the_sigmoid_times_objectness() -> None:
    torch.manual_seed(0)
    embeds, classes = (torch.nn.functional.normalize(torch.randn(k, 5), dim=-1) for k in (3, 4))
    proposals = Proposals(np.zeros((3, 4)), np.array([1.0, 0.5, 0.0]))
    soft = DetectionRules(scale=20.0).scores(embeds, classes, proposals)
    assert soft.sum(dim=-1).tolist() == pytest.approx([1.0, 0.5, 0.0])
    each = DetectionRules(score="sigmoid", scale=20.0, bias=-3.0, objectness=False).scores(embeds, classes, proposals)
    assert each[1, 2] == pytest.approx(float(torch.sigmoid(20 * embeds[1] @ classes[2] - 3)), rel=1e-5)
    with pytest.raises(ClocError, match="score is 'max'"):
        DetectionRules(score="max")
    with pytest.raises(ClocError, match="make no sense"):
        DetectionRules(nms=0.0)


def test_the_grid_covers_the_picture_and_keeps_to_it(split: RegionSplit) -> None:
    source = build_proposals("grid", split, ["dog"], "cpu", {"steps": 6, "scales": [0.3, 0.6, 0.9], "aspects": [1, 2]})
    for (width, height), found in zip(SIZES, source(images_of(SIZES), [0, 1]), strict=True):
        assert (found.boxes[:, :2] >= 0).all()
        assert (found.boxes[:, 2:] <= [width + 1e-6, height + 1e-6]).all()
        assert len(np.unique(found.boxes, axis=0)) == len(found.boxes) <= 6 * 6 * 6
        whole = torch.tensor([[0.0, 0.0, width, height]], dtype=torch.float64)
        assert float(box_iou(whole, torch.from_numpy(found.boxes)).max()) > 0.5


def test_true_boxes_and_boxes_of_a_file(split: RegionSplit, tmp_path: Path) -> None:
    true = build_proposals("ground-truth", split, [], "cpu")(images_of(SIZES), [0, 1])
    assert true[0].boxes.tolist() == [[5, 5, 30, 40], [30, 10, 60, 50]]
    assert len(true[1].boxes) == 0
    entries = [
        {"image_id": 9, "bbox": [10, 20, 50, 10], "score": 0.25, "category_id": 3},
        {"image_id": 9, "bbox": [200, 20, 50, 10]},
        {"image_id": 8, "bbox": [1, 1, 1, 1]},
    ]
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps(entries))
    source = build_proposals(f"file:{file}", split, [], "cpu")
    (found,) = source(images_of(SIZES[1:]), [1])
    assert found.boxes.tolist() == [[10, 20, 40, 30]], "clipped to the picture; what lies outside is gone"
    assert found.objectness.tolist() == [0.25]
    assert source.described == "2 boxes of boxes.json; 1 for other images left out, 1 images without any"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[", "cannot read"),
        ("{}", "JSON list"),
        ('[{"image_id": 7}]', "entry 0 has no bbox"),
        ('[{"image_id": 7, "bbox": [1, 2, 0, 4]}]', "entry 0 has the box"),
        ('[{"image_id": 7, "bbox": [1, 2, NaN, 4]}]', "entry 0 has the box"),
        ('[{"image_id": 7, "bbox": [1, 2, 3, 4], "score": 7}]', "the score 7"),
    ],
)
def test_faults_of_a_file_of_proposals_are_named(split: RegionSplit, tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "boxes.json").write_text(text)
    with pytest.raises(ClocError, match=problem):
        FileProposals(tmp_path / "boxes.json", split)


def test_any_labelling_detector_may_propose(split: RegionSplit, monkeypatch: pytest.MonkeyPatch) -> None:
    class Corner:
        """Sees everything in the upper left corner."""

        def __call__(self, images: list[Image.Image], phrases: list[list[str]]) -> list[list[Detection]]:
            return [[Detection((0, 0, 9, 9), text, 0.5) for text in some] for some in phrases]

    module = type("Module", (), {"build": staticmethod(lambda name, argument, device, options: Corner())})
    monkeypatch.setitem(DETECTORS, "corner", "made.up")
    monkeypatch.setattr("cloc_mllm.labeling.stages.importlib.import_module", lambda name: module)
    found = build_proposals("detector:corner:x", split, ["dog", "cat"], "cpu")(images_of(SIZES), [0, 1])
    assert [one.boxes.tolist() for one in found] == [[[0, 0, 9, 9]] * 2] * 2
    assert found[0].objectness.tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("choice", "grid", "problem"),
    [
        ("gird", None, "no proposals 'gird'"),
        ("file:", None, "no proposals 'file:'"),
        ("ground-truth", {"steps": 3}, "grid is for proposals=grid"),
        ("grid", {"step": 3}, "grid holds step: 3"),
        ("grid", {"scales": []}, "grid holds scales"),
        ("grid", {"steps": 2.5}, "grid holds steps"),
    ],
)
def test_wrong_proposals_are_refused(split: RegionSplit, choice: str, grid: dict | None, problem: str) -> None:
    with pytest.raises(ClocError, match=problem):
        build_proposals(choice, split, [], "cpu", grid)
