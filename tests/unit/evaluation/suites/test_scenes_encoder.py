"""The encoder's scenes suite with encoders that know everything, the opposite of everything, and some things."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.encoders.measure import EncoderSettings, draw_pools, measure
from cloc_mllm.evaluation.encoders.region_data import Region, RegionSplit, SceneTruth, canonical_name, describes, draw
from cloc_mllm.evaluation.scoring.metrics import iou_hits
from cloc_mllm.evaluation.scoring.paired import paired_difference
from cloc_mllm.evaluation.suites.scenes_encoder import baselines, evaluate_encoder
from tests.unit.evaluation.oracles import TruthEncoder, TruthLocalizer, TruthReadout

HEADLINE = {
    "image_i2t_r1",
    "image_t2i_r1",
    "region_top1",
    "region_macc",
    "region_top1_heldout",
    "region_size_acc",
    "region_r2t_r1",
    "region_t2r_r1",
    "pointing_acc",
    "grounding_acc50",
    "grounding_zeroshot_acc50",
}
QUIET = EncoderSettings(progress=False, batch_size=16)


@pytest.fixture(scope="module")
def test_split(scene_truth: SceneTruth) -> RegionSplit:
    return scene_truth.load_split("test")


@pytest.fixture(scope="module")
def validation(scene_truth: SceneTruth) -> RegionSplit:
    return scene_truth.load_split("validation")


@pytest.mark.parametrize(("sign", "shift", "expected"), [(1.0, 0.0, 1.0), (-1.0, 200.0, 0.0)])
def test_the_truth_scores_100_and_its_opposite_0(
    scene_truth: SceneTruth,
    test_split: RegionSplit,
    validation: RegionSplit,
    sign: float,
    shift: float,
    expected: float,
) -> None:
    encoder = TruthEncoder([test_split, validation], sign)
    localizers = [
        TruthLocalizer(encoder, "box_head", True, shift),
        TruthLocalizer(encoder, "grid_prompter", False, shift),
    ]
    metrics, details = evaluate_encoder(
        encoder, [TruthReadout(encoder)], localizers, scene_truth, test_split, validation, QUIET
    )
    assert set(metrics) == HEADLINE
    assert {name: metric.value for name, metric in metrics.items()} == dict.fromkeys(HEADLINE, expected)
    assert metrics["region_top1"].n == metrics["region_size_acc"].n == len(test_split.regions)
    assert 0 < metrics["region_top1_heldout"].n < len(test_split.regions)
    assert metrics["grounding_acc50"].n == sum(region.unique for region in test_split.regions)
    assert details["choices"]["made_on"] == "nothing to choose"
    assert len(encoder.encoded) == len(test_split.rows), "each image is encoded once"


def test_the_read_out_is_chosen_on_validation_and_all_are_shown(
    scene_truth: SceneTruth, test_split: RegionSplit, validation: RegionSplit
) -> None:
    encoder = TruthEncoder([test_split, validation])
    good_later = TruthReadout(encoder, "roi", sign=-1.0)
    good_before = TruthReadout(encoder, "crop", sign=1.0)
    validation_ids = set(validation.ids)

    class Turncoat(TruthReadout):
        """Right on validation, wrong on test: the choice must follow validation."""

        def embed(self, images, boxes):  # type: ignore[no-untyped-def]
            self.sign = 1.0 if images.ids[0] in validation_ids else -1.0
            return super().embed(images, boxes)

    metrics, details = evaluate_encoder(
        encoder, [good_later, Turncoat(encoder, "crop")], [], scene_truth, test_split, validation, QUIET
    )
    assert details["choices"]["region_top1"] == "crop"
    assert details["choices"]["made_on"] == "validation"
    assert metrics["region_top1"].value == 0.0
    assert set(details["readouts"]) == {"roi", "crop"}

    metrics, details = evaluate_encoder(
        encoder, [good_later, good_before], [], scene_truth, test_split, validation, QUIET
    )
    assert metrics["region_top1_heldout"].value == metrics["region_top1"].value == 1.0
    assert details["readouts"]["roi"]["region_top1"].value == 0.0


def test_an_encoder_with_a_prompter_is_reported_by_it_even_if_another_read_out_is_better(
    scene_truth: SceneTruth, test_split: RegionSplit
) -> None:
    encoder = TruthEncoder([test_split])
    readouts = [TruthReadout(encoder, "prompter", sign=-1.0), TruthReadout(encoder, "roi")]
    metrics, _ = evaluate_encoder(encoder, readouts, [], scene_truth, test_split, None, QUIET)
    assert metrics["region_top1"].value == 0.0


def test_a_choice_without_validation_split_is_refused(scene_truth: SceneTruth, test_split: RegionSplit) -> None:
    encoder = TruthEncoder([test_split])
    readouts = [TruthReadout(encoder, "crop"), TruthReadout(encoder, "roi")]
    with pytest.raises(ClocError, match="needs a validation split"):
        evaluate_encoder(encoder, readouts, [], scene_truth, test_split, None, QUIET)


def test_limits_show_in_n(scene_truth: SceneTruth, test_split: RegionSplit) -> None:
    encoder = TruthEncoder([test_split])
    settings = replace(QUIET, crop_limit=30, grid_images=10)
    found = measure(
        encoder,
        [TruthReadout(encoder, "crop"), TruthReadout(encoder, "roi")],
        [TruthLocalizer(encoder, "grid_roi", False), TruthLocalizer(encoder, "heatmap", False)],
        scene_truth,
        test_split,
        settings,
    )
    assert found.readouts["crop"]["region_top1"].n == 30
    assert found.readouts["roi"]["region_top1"].n == len(test_split.regions)
    assert found.readouts["crop"]["region_r2t_r1"].n == found.readouts["roi"]["region_r2t_r1"].n <= 30
    searched = set(draw(40, 10, 0))
    assert found.localizers["grid_roi"]["acc50"].n == sum(r.unique and r.image in searched for r in test_split.regions)
    assert found.localizers["heatmap"]["acc50"].n == sum(r.unique for r in test_split.regions)


def test_size_is_no_part_of_the_classes_or_the_pools(scene_truth: SceneTruth, test_split: RegionSplit) -> None:
    sizes = set(scene_truth.vocabulary["size"])
    assert len(scene_truth.classes) == 72 == len(set(scene_truth.classes))
    assert not any(sizes & set(name.split()) for name in scene_truth.classes)
    assert {canonical_name(region.attributes) for region in test_split.regions} <= set(scene_truth.classes)
    assert any(sizes & set(region.text.split()) for region in test_split.regions)


def test_pools_are_disjoint_and_hold_each_text_once() -> None:
    rng = np.random.default_rng(0)
    regions = [Region(0, (0, 0, 1, 1), f"text {rng.integers(20)}", True) for _ in range(200)]
    rows = list(range(0, 200, 2))
    settings = EncoderSettings(pools=4, pool_size=15)
    pools = draw_pools(rows, regions, settings)
    assert 1 < len(pools) <= 4
    flat = [row for pool in pools for row in pool]
    assert len(set(flat)) == len(flat)
    assert set(flat) <= set(rows)
    for pool in pools:
        texts = [regions[row].text for row in pool]
        assert len(set(texts)) == len(texts)
        assert len(pools[0]) / 2 <= len(pool) <= 15
    assert draw_pools(rows, regions, settings) == pools


def test_describes_is_word_by_word() -> None:
    things = [
        {"shape": "circle", "colour": "red", "size": "large", "texture": "solid"},
        {"shape": "ring", "colour": "red", "size": "large", "texture": "striped"},
    ]
    texts = ["red circle", "red", "large striped red ring", "blue ring"]
    assert describes(texts, things).tolist() == [[True, False], [True, True], [False, True], [False, False]]


def test_baselines_equal_counting(scene_truth: SceneTruth, test_split: RegionSplit, validation: RegionSplit) -> None:
    found = baselines(scene_truth, test_split, validation)
    names = [canonical_name(region.attributes) for region in validation.regions]
    best = min(set(names), key=lambda name: (-names.count(name), name))
    truth = [canonical_name(region.attributes) for region in test_split.regions]
    assert found["region_top1"]["majority"].value == pytest.approx(truth.count(best) / len(truth))
    assert found["region_top1"]["chance"] == 1 / 72
    mean = np.mean([region.box for region in validation.regions if region.unique], axis=0)
    true = [region.box for region in test_split.regions if region.unique]
    assert found["grounding_acc50"]["majority"].value == pytest.approx(iou_hits([mean] * len(true), true).mean())
    areas = [(b[2] - b[0]) * (b[3] - b[1]) / 96**2 for b in true]
    assert found["pointing_acc"]["chance"] == pytest.approx(np.mean(areas))


def test_a_folder_that_holds_no_scenes_is_named(tmp_path, scene_truth: SceneTruth) -> None:
    with pytest.raises(ClocError, match="no set of procedural scenes"):
        SceneTruth.load(tmp_path)
    (tmp_path / "dataset.json").write_text('{"vocabulary": {}}')
    with pytest.raises(ClocError, match="does not describe procedural scenes"):
        SceneTruth.load(tmp_path)
    with pytest.raises(ClocError, match=r"there is no split 'tset'.*test, train, validation"):
        scene_truth.load_split("tset")


def test_crops_of_some_regions_compare_with_a_prompter_that_saw_all(
    scene_truth: SceneTruth, test_split: RegionSplit
) -> None:
    encoder = TruthEncoder([test_split])
    settings = replace(QUIET, crop_limit=20)
    ways = [TruthReadout(encoder, "crop", sign=-1.0), TruthReadout(encoder)]
    found = measure(encoder, ways, [], scene_truth, test_split, settings).readouts
    assert found["prompter"]["region_top1"].n == len(test_split.regions) > 20
    for name in ("region_top1", "region_macc", "region_size_acc"):
        crop, whole = found["crop"][name].items, found["prompter"][name].items
        assert crop is not None
        assert whole is not None
        difference = paired_difference(crop, whole)
        assert (difference.value, difference.n) == (1.0, 20)
