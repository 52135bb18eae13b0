"""Validation while training: figures by hand, repeated samples, labelled images, and zero-shot classification."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cloc_mllm.data.collate import RegionTextCollator
from cloc_mllm.data.dataset import RegionTextDataset
from cloc_mllm.data.labelled import LabelledImages
from cloc_mllm.errors import ClocError
from cloc_mllm.models.modeling_cloc import ClocOutput
from cloc_mllm.training.presets.options import ZeroShotOptions
from cloc_mllm.training.pretraining.validation import (
    NUMBER,
    NumberedSamples,
    NumberingCollator,
    first_of_each,
    text_ids,
    validation_figures,
    validation_rows,
)
from cloc_mllm.training.pretraining.zero_shot import ZeroShot
from cloc_mllm.training.running.launch import World
from tests.builders import noise_image, tiny_cloc
from tests.builders_training import write_regions

ALONE = World(0, 0, 1, 1, True)


def one_hot(*places: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(places), 8).float()


def batch(numbers: list[int], captions: list[int], owners: list[int], phrases: list[int]) -> dict[str, Any]:
    """Inputs whose texts are one token long; what that token is says which text it is."""
    distinct = sorted(set(phrases))
    return {
        NUMBER: torch.tensor(numbers),
        "input_ids": torch.tensor([[c] for c in captions]),
        "attention_mask": torch.ones(len(captions), 1, dtype=torch.long),
        "region_input_ids": torch.tensor([[p] for p in distinct]),
        "region_attention_mask": torch.ones(len(distinct), 1, dtype=torch.long),
        "region_text_index": torch.tensor([distinct.index(p) for p in phrases]),
        "region_valid": torch.ones(len(owners), dtype=torch.bool),
        "region_unique": torch.ones(len(owners), dtype=torch.bool),
        "box_image_index": torch.tensor(owners),
        "input_boxes": torch.tensor([[0.0, 0.0, 0.5, 0.5]] * len(owners)),
    }


def test_figures_by_hand() -> None:
    """Three images; region texts 5, 5, 6, 7: the second region of text 5 and the one of 7 are taken for 6."""
    inputs = batch([0, 1, 2], [1, 2, 2], [0, 0, 1, 2], [5, 5, 6, 7])
    inputs["region_unique"][3] = False
    output = ClocOutput(
        image_embeds=one_hot(0, 1, 1),
        text_embeds=one_hot(0, 1, 1),
        region_embeds=one_hot(5, 6, 6, 6),
        region_text_embeds=one_hot(5, 5, 6, 7),
        pred_boxes=torch.tensor([[0, 0, 0.5, 0.5], [0, 0, 0.5, 0.3], [0.5, 0.5, 1, 1], [0.0, 0, 0.5, 0.5]]),
    )
    figures = validation_figures([validation_rows(output, inputs)])
    assert figures["samples"] == 3
    assert figures["i2t_r1"] == figures["t2i_r1"] == 1.0, "two images with the same caption are both right"
    assert (figures["regions"], figures["region_texts"]) == (4, 3)
    assert figures["region_r2t_r1"] == 2 / 4
    assert figures["region_macc"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    # Text 5 finds its region; text 6 meets three that look alike, two of them wrong; 7 finds nothing.
    assert figures["region_t2r_r1"] == pytest.approx(1 / 3)
    assert figures["grounding_acc50"] == pytest.approx(2 / 3)
    assert figures["grounding_mean_iou"] == pytest.approx((1 + 0.6 + 0) / 3)


def test_samples_that_come_twice_count_once() -> None:
    model, processor = tiny_cloc()
    data = [{"image": noise_image(seed=k), "caption": f"a red ring {k}", "regions": regions(k)} for k in range(5)]
    samples = NumberedSamples(RegionTextDataset(data), 5)
    collate = NumberingCollator(RegionTextCollator(processor))
    assert len(NumberedSamples(data, 3)) == 3

    def figures(*batches: list[int]) -> dict[str, float]:
        rows = []
        for numbers in batches:
            inputs = collate([samples[k] for k in numbers])
            wanted = {k: v for k, v in inputs.items() if k in model.forward.__code__.co_varnames}
            rows.append(validation_rows(model(**wanted), inputs))
        return validation_figures(rows)

    whole = figures([0, 1, 2, 3, 4])
    assert whole["samples"] == 5
    assert whole["regions"] == sum(len(sample["regions"]) for sample in data)
    assert figures([0, 1, 2], [3, 4, 0]) == pytest.approx(whole)
    assert figures([3, 4], [0, 1], [2, 3]) == pytest.approx(whole)
    # A batch without any region carries a dummy one.
    assert figures([0]) | {"regions": 0.0} == figures([0])


def regions(number: int) -> list[dict[str, Any]]:
    return [{"box": [2 + k, 3, 20, 20], "text": f"ring {number} {k}"} for k in range(number)]


def test_the_first_of_each_value_in_order() -> None:
    assert first_of_each(torch.tensor([7, 3, 7, 3, 1])).tolist() == [0, 1, 4]
    assert first_of_each(torch.tensor([], dtype=torch.long)).tolist() == []


def test_texts_are_told_apart_by_their_tokens_whatever_the_padding() -> None:
    one = text_ids(torch.tensor([[4, 5, 0], [4, 5, 6]]), torch.tensor([[1, 1, 0], [1, 1, 1]]))
    two = text_ids(torch.tensor([[4, 5]]), torch.tensor([[1, 1]]))
    assert one[0] == two[0] != one[1]
    assert text_ids(torch.tensor([[45]]), torch.tensor([[1]]))[0] != two[0]


# -- labelled images ------------------------------------------------------------------------------------------------


def write_classes(folder: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            noise_image(seed=number).save(folder / name / f"{number}.png")
    return folder


def test_a_folder_of_folders(tmp_path: Path) -> None:
    images = LabelledImages(write_classes(tmp_path, {"red_ring": 3, "blue star": 1}))
    assert images.classes == ["blue star", "red ring"]
    assert images.labels == [0, 1, 1, 1]
    assert images[0].size == (40, 30)
    assert LabelledImages(tmp_path, 2).labels == [0, 1], "spread over the classes"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ClocError, match="no picture"):
        LabelledImages(tmp_path)


def test_samples_with_labels(tmp_path: Path) -> None:
    noise_image().save(tmp_path / "a.png")
    lines = [{"image": "a.png", "label": "ring"}, {"image": "none.png", "label": "star"}]
    file = tmp_path / "labels.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for path in (file, tmp_path):
        images = LabelledImages(path)
        assert images.classes == ["ring", "star"]
        assert images[0].size == (40, 30)
    with pytest.raises(ClocError, match=r"none\.png"):
        images[1]
    for wrong, message in (([{"image": "a.png"}], "the class of a sample is None"), (lines[:1], "holds 1 classes")):
        file.write_text("".join(json.dumps(line) + "\n" for line in wrong))
        with pytest.raises(ClocError, match=message):
            LabelledImages(file)


@torch.no_grad()
def test_zero_shot_classification_is_that_of_a_loop(tmp_path: Path) -> None:
    model, processor = tiny_cloc()
    templates = ["a {}", "the {} there"]
    options = ZeroShotOptions(path=str(write_classes(tmp_path, {"ring": 2, "star": 3, "x": 2})), templates=templates)
    scored = ZeroShot(options, processor, ALONE, batch_size=3)(lambda inputs: model(**inputs))
    images, hits = LabelledImages(tmp_path), []
    for number, label in enumerate(images.labels):
        picture = model(**processor(images=[images[number]], text=["a"])).image_embeds[0]
        scores = []
        for name in images.classes:
            texts = model.get_text_features(**processor.tokenize([t.format(name) for t in templates])).pooler_output
            mean = torch.nn.functional.normalize(texts, dim=1).mean(0)
            scores.append(float(picture @ mean / mean.norm()))
        hits.append(scores.index(max(scores)) == label)
    assert scored["zero_shot_top1"] == pytest.approx(sum(hits) / len(hits))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_process_embeds_as_many_batches_and_all_rows_are_there(size: int) -> None:
    for count in (1, 2, 7, 12):
        shares = []
        for rank in range(size):
            bare: Any = ZeroShot.__new__(ZeroShot)
            bare.world, bare.batch_size = World(rank, rank, size, size, True), 2
            shares.append(bare._my_batches(count))
        assert len({tuple(len(rows) for rows in share) for share in shares}) == 1
        assert [row for share in shares for rows in share for row in rows][:count] == list(range(count))


def test_the_templates_of_imagenet_go_by_their_name() -> None:
    assert len(ZeroShotOptions(path="x", templates="imagenet").templates) == 80


@pytest.mark.parametrize("templates", [["no place"], ["{} and {}"], ["{0}"], ["{name} {}"], []])
def test_templates_must_hold_the_name_once(templates: list[str]) -> None:
    with pytest.raises(ValueError, match=r"must hold|at least one"):
        ZeroShotOptions(path="x", templates=templates)


def test_the_data_of_these_tests_has_images_without_regions(tmp_path: Path) -> None:
    dataset = RegionTextDataset(write_regions(tmp_path, 12))
    assert {bool(dataset[k]["regions"]) for k in range(12)} == {True, False}
