"""The grounding suite: oracles, the sizes of known splits, a real tiny MLLM, and stock LLaVA with boxes in text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.encoders.region_data import load_region_split
from cloc_mllm.evaluation.mllms.answerers import MllmSettings
from cloc_mllm.evaluation.reporting.known_splits import KNOWN_EXPRESSIONS
from cloc_mllm.evaluation.suites.grounding import (
    GroundingSettings,
    evaluate_grounding,
    known_size,
    load_expressions,
    score_located,
)
from cloc_mllm.evaluation.suites.options import EvalOptions
from cloc_mllm.evaluation.suites.registry import run_suite
from cloc_mllm.models.answer_text import AnswerText
from tests.builders import noise_image
from tests.unit.evaluation.oracles import ScriptedAnswerer, asked_text, silent

QUIET = MllmSettings(progress=False, batch_size=3, max_new_tokens=6)


@pytest.fixture(scope="module")
def expressions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures with two expressions each, and one text that fits two regions."""
    folder = tmp_path_factory.mktemp("refcoco")
    lines = []
    for k in range(5):
        noise_image(60, 40, k).save(folder / f"{k}.png")
        regions = [
            {"box": [2 * k + 5 * j, 1 + j, 2 * k + 5 * j + 20, 30], "text": f"the thing {2 * k + j}", "unique": True}
            for j in (0, 1)
        ]
        if k == 4:
            regions += [{"box": [0, 0, 9, 9], "text": "twin"}, {"box": [20, 0, 29, 9], "text": "twin"}]
        lines.append(json.dumps({"id": f"p{k}", "image": f"{k}.png", "caption": "noise", "regions": regions}) + "\n")
    (folder / "regions.jsonl").write_text("".join(lines))
    return folder


def moved(split: Any, shift: float) -> ScriptedAnswerer:
    """An answerer that knows every box, and says it so many pixels to the right; then another box, for nothing."""
    boxes = {region.text: region.box for region in split.regions}

    def answer(messages: Any) -> AnswerText:
        (text,) = [text for text in boxes if asked_text(messages).endswith(text.removeprefix("the ") + "?")]
        x1, y1, x2, y2 = boxes[text]
        found = [{"phrase": text, "box": [x1 + shift, y1, x2 + shift, y2]}, {"phrase": "", "box": [0, 0, 1, 1]}]
        return AnswerText(f"{text} [..]", boxes=found)

    return ScriptedAnswerer(answer)


def test_the_truth_scores_100_and_silence_0(expressions: Path) -> None:
    asked = load_expressions(load_region_split(expressions, split="val"))
    assert (len(asked.regions), asked.ambiguous) == (10, 2)
    right = evaluate_grounding(moved(asked, 0), asked, asking=QUIET)
    assert {metric.value for metric in right.metrics.values()} == {1.0}
    assert right.unparsed == 0.0
    items = right.metrics["grounding_acc50"].items
    assert items is not None
    assert set(items.images) == {f"p{k}" for k in range(5)}
    assert right.details["answers"] == {"with a box": 10, "with several boxes": 10}
    nothing = evaluate_grounding(silent(), asked, asking=QUIET)
    assert {metric.value for metric in nothing.metrics.values()} == {0.0}
    assert nothing.unparsed == 1.0


def test_thresholds_and_mean_iou_are_those_of_the_first_box(expressions: Path) -> None:
    asked = load_expressions(load_region_split(expressions))
    # Boxes are 20 wide: moved by 8, 12 of 28 overlap.
    found = evaluate_grounding(moved(asked, 8), asked, asking=QUIET).metrics
    assert found["grounding_mean_iou"].value == pytest.approx(12 / 28)
    assert [found[f"grounding_acc{at}"].value for at in (25, 50, 75)] == [1.0, 0.0, 0.0]
    assert next(iter(found)) == "grounding_acc50"
    whole = [(region.box[2] - region.box[0]) * (region.box[3] - region.box[1]) / 2400 for region in asked.regions]
    baselines = evaluate_grounding(silent(), asked, asking=QUIET).details["baselines"]
    assert baselines["grounding_mean_iou"]["majority"].value == pytest.approx(float(np.mean(whole)))


def test_the_question_is_the_models_own_or_the_one_given(expressions: Path) -> None:
    asked = load_expressions(load_region_split(expressions), limit=1)
    seen: list[str] = []

    def answer(messages: Any) -> AnswerText:
        seen.append(asked_text(messages))
        return AnswerText()

    phrase = asked.regions[0].text
    for question in (None, "What is the location of {phrase} in the image?"):
        evaluate_grounding(ScriptedAnswerer(answer), asked, GroundingSettings(question=question), QUIET)
    assert seen == [f"Where is {phrase}?", f"What is the location of {phrase} in the image?"]
    with pytest.raises(ClocError, match="exactly once"):
        GroundingSettings(question="Where?")


def test_a_part_of_a_known_split_is_not_called_by_its_name(expressions: Path) -> None:
    some = load_expressions(load_region_split(expressions, split="testA"), of="refcoco")
    assert some.ref.label == "testA subset (10 of 5657 expressions)"
    evaluated = {name: dict(splits) for name, splits in KNOWN_EXPRESSIONS.items()}
    for splits in evaluated.values():
        splits.pop("train")
    assert evaluated == {
        "refcoco": {"val": 10_834, "testA": 5_657, "testB": 5_095},
        "refcoco+": {"val": 10_758, "testA": 5_726, "testB": 4_889},
        "refcocog": {"val": 4_896, "test": 9_602},
    }
    assert known_size("refcoco", "val", 10_834) == 10_834
    with pytest.raises(ClocError, match="'refcoco' has no split 'test'"):
        known_size("refcoco", "test", 1)
    with pytest.raises(ClocError, match=r"10,835 expressions, but refcoco val has 10,834"):
        known_size("refcoco", "val", 10_835)
    with pytest.raises(ClocError, match="no splits are known of 'refclef'"):
        GroundingSettings(of="refclef")


def test_the_set_and_the_split_are_those_of_the_data(expressions: Path, mllm_folder: Path, tmp_path: Path) -> None:
    """As `data convert refcoco` writes them; what a person says otherwise is an error."""
    data = tmp_path / "data"
    shutil.copytree(expressions, data)

    def stated(**facts: str) -> None:
        (data / "dataset.json").write_text(json.dumps({"kind": "refcoco", **facts}))

    def asked(split: str | None = None, **settings: str) -> dict[str, Any]:
        options = EvalOptions(
            str(mllm_folder), str(data), str(tmp_path / "out"), split, limit=1, max_new_tokens=1, settings=settings
        )
        return run_suite("grounding", options)["dataset"]

    stated(set="refcoco+", split="testA")
    for found in (asked(), asked("testA", of="refcoco+")):
        assert found["split"] == "testA subset (1 of 5726 expressions, seed 0)"
        assert (found["name"], found["kind"]) == ("refcoco+", "refcoco+")
    with pytest.raises(ClocError, match=r"the split 'testA' of refcoco\+, dataset.json says, and not 'val'"):
        asked("val")
    with pytest.raises(ClocError, match=r"of refcoco\+, dataset.json says, and not of refcoco\."):
        asked(of="refcoco")
    stated(set="refcoco (google)", split="val")
    assert asked()["split"] == "val subset (1 of 10 expressions, seed 0)"
    with pytest.raises(ClocError, match=r"of refcoco \(google\), dataset.json says, and not of refcoco\."):
        asked(of="refcoco")
    stated()  # from the hub's files: a person has to say which
    assert asked()["split"].startswith("all subset")
    assert asked("val", of="refcoco")["split"] == "val subset (1 of 10834 expressions, seed 0)"


def test_a_real_model_is_asked(expressions: Path, mllm_folder: Path, tmp_path: Path) -> None:
    options = EvalOptions(str(mllm_folder), str(expressions), str(tmp_path), limit=4, max_new_tokens=6)
    report = run_suite("grounding", options)
    assert report["dataset"]["split"] == "all subset (4 of 10 expressions, seed 0)"
    assert report["metrics"]["grounding_acc50"]["n"] == 4
    assert report["details"]["grounding_mode"] == "text"
    assert 0 <= report["unparsed"] <= 1
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 4


def test_what_an_encoder_found_is_scored_by_the_same_rule(expressions: Path) -> None:
    asked = load_expressions(load_region_split(expressions))
    truth = [list(region.box) for region in asked.regions]
    found = score_located(asked, {"box_head": truth, "grid_prompter": [[0, 0, 1, 1]] * len(truth)})
    assert {metric.value for metric in found.metrics.values()} == {1.0}
    assert found.details["choices"]["localizer"] == "box_head"
    assert found.details["localizers"]["grid_prompter"]["grounding_acc50"].value == 0.0


def test_a_real_encoder_searches(expressions: Path, encoder_folder: Path, tmp_path: Path) -> None:
    options = EvalOptions(str(encoder_folder), str(expressions), str(tmp_path), limit=4)
    report = run_suite("grounding", options)
    assert report["details"]["choices"]["localizer"] == "box_head"
    assert {"box_head", "grid_prompter"} <= set(report["details"]["localizers"])
    assert report["metrics"]["grounding_acc50"]["n"] == 4
    with pytest.raises(ClocError, match="finds no phrases by the method 'crop'"):
        run_suite("grounding", EvalOptions(str(encoder_folder), str(expressions), str(tmp_path), method="crop"))


def test_data_without_expressions_are_refused(tmp_path: Path) -> None:
    noise_image(20, 20).save(tmp_path / "a.png")
    regions = [{"box": [0, 0, 9, 9], "text": "twin"}, {"box": [5, 5, 9, 9], "text": "twin"}]
    sample = {"id": "a", "image": "a.png", "caption": "c", "regions": regions}
    (tmp_path / "regions.jsonl").write_text(json.dumps(sample) + "\n")
    with pytest.raises(ClocError, match="no expression that names one region alone"):
        load_expressions(load_region_split(tmp_path))
