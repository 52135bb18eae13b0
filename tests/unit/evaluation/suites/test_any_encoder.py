"""The suites for any encoder: oracles against brute force, what a report says of sets and splits, real photographs."""

from __future__ import annotations

import json
import math
import os
import re
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cloc_mllm.data.importers.coco import convert_coco
from cloc_mllm.data.labelled import LabelledImages
from cloc_mllm.data.prompt_templates import IMAGENET, templates_of
from cloc_mllm.data.readers import data_files
from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.encoders.detection_truth import read_truth
from cloc_mllm.evaluation.encoders.measure import EncoderSettings
from cloc_mllm.evaluation.encoders.region_data import load_region_split, opened_path
from cloc_mllm.evaluation.encoders.vocabulary import OV_COCO_BASE, OV_COCO_NOVEL, read_vocabulary
from cloc_mllm.evaluation.encoders.zero_shot import class_embeddings
from cloc_mllm.evaluation.reporting.gallery import Pictures, read_answers
from cloc_mllm.evaluation.reporting.known_splits import known_total
from cloc_mllm.evaluation.suites.detection import DetectionSettings, evaluate_detection
from cloc_mllm.evaluation.suites.image import class_names, classify, retrieve
from cloc_mllm.evaluation.suites.options import EvalOptions
from cloc_mllm.evaluation.suites.region import evaluate_regions
from cloc_mllm.evaluation.suites.registry import run_suite
from tests.builders import noise_image, save_tiny_siglip, tiny_cloc
from tests.unit.evaluation.oracles import TruthEncoder, TruthReadout

COCO50 = Path(os.environ.get("CLOC_COCO50", Path(__file__).resolve().parents[5] / "shared" / "data" / "coco50"))
QUIET = EncoderSettings(progress=False, crop_limit=None, batch_size=4)
NAMES = ["dog", "cat", "traffic light", "bird"]


class RandomEncoder:
    """Random embeddings: of a picture by its id, of a text by its words."""

    name, preprocessing, methods, why_not, scale, bias = "random", "none", ["crop"], {}, 10.0, None

    def _of(self, key: str) -> torch.Tensor:
        drawn = np.random.default_rng(zlib.crc32(key.encode())).normal(size=16)
        return torch.nn.functional.normalize(torch.from_numpy(drawn).float(), dim=-1)

    def embed_images(self, pictures: Sequence[Any], ids: Sequence[str], framed: bool = False) -> torch.Tensor:
        return torch.stack([self._of(name) for name in ids])

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        return torch.stack([self._of(text) for text in texts])


def write_regions(folder: Path, categories: list[dict[str, str]] | None = None, **facts: Any) -> Path:
    """Eight pictures with up to three boxes that do not overlap, of four classes."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for k in range(8):
        noise_image(90, 40, k).save(folder / f"{k}.png")
        regions = [{"box": [30 * j, 2, 30 * j + 20 + k, 30], "text": NAMES[(k * j + k) % 4]} for j in range(k % 3 + 1)]
        captions = [f"picture {k}", f"the one numbered {k}", f"noise {k}"]
        sample = {"id": str(k), "image": f"{k}.png", "caption": captions[0], "captions": captions, "regions": regions}
        lines.append(json.dumps(sample | {"width": 90, "height": 40}) + "\n")
    (folder / "regions.jsonl").write_text("".join(lines))
    if facts or categories:
        (folder / "dataset.json").write_text(json.dumps({**facts, "categories": categories}))
    return folder


@pytest.fixture(scope="module")
def cloc(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    for part in tiny_cloc():
        part.save_pretrained(folder)
    return str(folder)


# --- names and splits --------------------------------------------------------------------------------------------


def test_the_80_templates_are_clips() -> None:
    assert len(IMAGENET) == len(set(IMAGENET)) == 80
    assert all(one.count("{}") == 1 and one[-1] in ".}" for one in IMAGENET)
    theirs = pytest.importorskip("open_clip", reason="open_clip is not installed").OPENAI_IMAGENET_TEMPLATES
    assert sorted(IMAGENET) == sorted(template("{}") for template in theirs)


@pytest.mark.parametrize("value", ["imagenett", [], ["no place"], ["{} {}"], [3]])
def test_wrong_templates_are_refused(value: Any) -> None:
    with pytest.raises(ClocError):
        templates_of(value)


def test_class_embeddings_are_normalised_means(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = RandomEncoder()
    templates = ("a {}.", "the {}.", "{}")
    found = class_embeddings(encoder, NAMES, templates)  # type: ignore[arg-type]
    for name, embed in zip(NAMES, found, strict=True):
        mean = torch.stack([encoder._of(template.format(name)) for template in templates]).mean(dim=0)
        assert torch.allclose(embed, mean / mean.norm(), atol=1e-6)
    monkeypatch.setattr("cloc_mllm.evaluation.encoders.zero_shot._TEXTS", 3)
    assert torch.equal(class_embeddings(encoder, NAMES, templates), found)  # type: ignore[arg-type]


def test_the_vocabulary_is_the_whole_sets_where_it_is_known(tmp_path: Path) -> None:
    listed = [{"name": name, "frequency": "rcf"[k % 3]} for k, name in enumerate([*NAMES, "zebra", "dog"])]
    data = write_regions(tmp_path / "a", listed, kind="lvis", split="lvis_v1_val")
    known = read_vocabulary("auto", data, NAMES[:3])
    assert known.names == [*NAMES, "zebra"]
    assert known.described.startswith("5: all categories of lvis, dataset.json says (6, some of the same name)")
    assert known.frequency == {"cat": "c", "traffic light": "f", "bird": "r", "zebra": "c"}, "dog is of two kinds"
    assert read_vocabulary("auto", data, ["dog", "a phrase"]).names == ["a phrase", "dog"]
    assert read_vocabulary("occurring", data, ["dog"]).names == ["dog"]
    with pytest.raises(ClocError, match="'a phrase', is none of the categories"):
        read_vocabulary("known", data, ["a phrase"])
    with pytest.raises(ClocError, match="no categories are listed"):
        read_vocabulary("known", write_regions(tmp_path / "b"), ["dog"])
    (tmp_path / "names.txt").write_text("dog\ncat\n\n")
    assert read_vocabulary(str(tmp_path / "names.txt"), data, ["dog"]).names == ["dog", "cat"]
    with pytest.raises(ClocError, match="cannot read the categories"):
        read_vocabulary("knwon", data, ["dog"])
    assert (len(OV_COCO_BASE), len(OV_COCO_NOVEL), len({*OV_COCO_BASE, *OV_COCO_NOVEL})) == (48, 17, 65)


def test_a_part_of_a_known_split_is_not_called_by_its_name(tmp_path: Path) -> None:
    data = write_regions(tmp_path / "a", kind="coco", split="val2017")
    assert load_region_split(data).ref.label == "val2017 subset (8 of 5000 images)"
    assert load_region_split(data, limit=3, seed=5).ref.label == "val2017 subset (3 of 5000 images, seed 5)"
    entities = write_regions(tmp_path / "b", kind="flickr30k-entities", split="test")
    assert load_region_split(entities, kind="flickr30k").ref.label == "test subset (8 of 1000 images)"
    free = write_regions(tmp_path / "c", kind="grit")
    assert load_region_split(free, split="mine").ref.label == "mine"
    with pytest.raises(ClocError, match=r"5,001 images, and the split 'val2017' of coco has 5,000"):
        known_total("coco", "val2017", 5001)


def test_what_data_are_is_not_what_a_person_calls_them(tmp_path: Path) -> None:
    def complaint(data: Path, **said: str) -> str:
        with pytest.raises(ClocError) as caught:
            load_region_split(data, **said)  # type: ignore[arg-type]
        return str(caught.value)

    train = write_regions(tmp_path / "a", kind="coco", split="train2017")
    assert "the split 'train2017' of coco, dataset.json says, and not 'val2017'" in complaint(train, split="val2017")
    assert "and not 'test'" in complaint(train, split="test", kind="coco-karpathy")
    assert "coco-karpathy has no split 'train2017'" in complaint(train, kind="coco-karpathy")
    assert "of coco, dataset.json says, and not of lvis" in complaint(train, kind="lvis")
    unstated = write_regions(tmp_path / "b", kind="coco")
    assert load_region_split(unstated).ref.label == "all"
    karpathy = load_region_split(unstated, split="test", kind="coco-karpathy")
    assert karpathy.ref.label == "test subset (8 of 5000 images)"
    assert "coco has no split 'mine'. It has train2017, val2017," in complaint(unstated, split="mine")


def test_regions_are_drawn_on_the_picture_they_are_of(cloc: str, tmp_path: Path) -> None:
    """Questions about the same pictures lie beside the regions, in another order."""
    data = write_regions(tmp_path / "data")
    names = [json.loads(line)["image"] for line in (data / "regions.jsonl").read_text().splitlines()]
    turns = [
        {"role": "user", "content": [{"type": "image", "image": name}, {"type": "text", "text": "?"}]}
        for name in reversed(names)
    ]
    (data / "questions.jsonl").write_text(
        "".join(json.dumps({"id": str(k), "messages": [turn]}) + "\n" for k, turn in enumerate(turns))
    )
    report = run_suite("region", EvalOptions(cloc, str(data), str(tmp_path / "out"), settings={"templates": "bare"}))
    pictures = Pictures(report["dataset"]["path"])
    records = read_answers(tmp_path / "out")
    assert {record["row"] for record in records} == set(range(8))
    for record in records:
        with Image.open(data / names[record["row"]]) as own:
            assert pictures(record).tobytes() == own.convert("RGB").tobytes()


def test_shards_are_opened_as_they_were_read(tmp_path: Path) -> None:
    folder = tmp_path / "a [b]"
    folder.mkdir()
    for name in ("0.tar", "1.tar"):
        (folder / name).write_bytes(b"")
    (folder / "questions.jsonl").write_text("{}\n")
    assert data_files(opened_path(folder)) == data_files(folder) == [folder / "0.tar", folder / "1.tar"]
    assert opened_path(folder, "questions.jsonl") == str(folder / "questions.jsonl")
    assert opened_path(folder / "1.tar") == str(folder / "1.tar")


# --- region ------------------------------------------------------------------------------------------------------


def test_both_protocols_equal_a_plain_computation(tmp_path: Path) -> None:
    data = write_regions(tmp_path / "a", [{"name": name} for name in [*NAMES, "zebra"]], kind="coco")
    split, encoder = load_region_split(data), RandomEncoder()

    class Reading:
        name = "crop"

        def embed(self, images: Any, boxes: Sequence[Sequence[Any]]) -> torch.Tensor:
            some = [
                encoder._of(f"{name}{tuple(box)}") for name, of in zip(images.ids, boxes, strict=True) for box in of
            ]
            return torch.stack(some) if some else torch.zeros(0, 16)

    encoder.encode_images = lambda pictures, ids: type(  # type: ignore[attr-defined]
        "Images", (), {"ids": ids, "embeds": encoder.embed_images(pictures, ids)}
    )
    vocabulary = read_vocabulary("auto", data, [region.text for region in split.regions])
    metrics, details, _ = evaluate_regions(encoder, [Reading()], split, QUIET, vocabulary, one_gallery=True)  # type: ignore[arg-type]
    hits: dict[str, dict[str, list[float]]] = {"bare": {}, "top1": {}, "top5": {}}
    for region in split.regions:
        embed = encoder._of(f"{split.ids[region.image]}{region.box}")
        for key, templates in (("bare", ("{}",)), ("top", IMAGENET)):
            order = sorted(
                vocabulary.names,
                key=lambda name: -float(embed @ class_embeddings(encoder, [name], templates)[0]),  # type: ignore[arg-type]
            )
            for name, k in (("bare", 1),) if key == "bare" else (("top1", 1), ("top5", 5)):
                hits[name].setdefault(region.text, []).append(region.text in order[:k])
    every = {key: [hit for some in of.values() for hit in some] for key, of in hits.items()}
    assert metrics["region_macc"].value == pytest.approx(np.mean([np.mean(some) for some in hits["bare"].values()]))
    assert metrics["region_top1"].value == pytest.approx(np.mean(every["bare"]))
    assert metrics["region_ensemble_top1"].value == pytest.approx(np.mean(every["top1"]))
    assert metrics["region_ensemble_top5"].value == 1.0, "five classes"
    assert details["pools"]["classes"] == "5: all categories of coco, dataset.json says"
    assert set(details["protocols"]) == {"A", "B"}
    # Retrieval among all: a region's text is right, and so is every region of that text.
    texts = sorted({region.text for region in split.regions})
    found = []
    for region in split.regions:
        embed = encoder._of(f"{split.ids[region.image]}{region.box}")
        found.append(max(texts, key=lambda text: float(embed @ encoder._of(text))) == region.text)
    assert metrics["region_r2t_r1"].value == pytest.approx(np.mean(found))


def test_the_truth_is_right_by_both_protocols_in_one_gallery(tmp_path: Path) -> None:
    split = load_region_split(write_regions(tmp_path / "a"))
    encoder = TruthEncoder([split])
    vocabulary = read_vocabulary("occurring", tmp_path / "a", [region.text for region in split.regions])
    metrics, _, records = evaluate_regions(encoder, [TruthReadout(encoder)], split, QUIET, vocabulary, one_gallery=True)
    assert {metric.value for name, metric in metrics.items() if name.startswith("region")} == {1.0}
    assert [record["answer"] for record in records] == [region.text for region in split.regions]
    assert all(record["right"] for record in records)
    unnamed, details, none = evaluate_regions(encoder, [TruthReadout(encoder)], split, QUIET)
    assert not [name for name in unnamed if "acc" in name or "top" in name]
    assert details["pools"]["classes"] == "regions are not named"
    assert none == []


# --- whole images ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("captions", [1, 3])
def test_retrieval_equals_brute_force(tmp_path: Path, captions: int) -> None:
    import dataclasses

    split = load_region_split(write_regions(tmp_path / "a"))
    split = dataclasses.replace(split, captions=[some[:captions] for some in split.captions])
    encoder = RandomEncoder()
    metrics, details = retrieve(encoder, split, QUIET)  # type: ignore[arg-type]
    pairs = [(image, text) for image, some in zip(split.ids, split.captions, strict=True) for text in some]
    for k in (1, 5, 10):
        i2t, t2i = [], []
        for image, own in zip(split.ids, split.captions, strict=True):
            best = sorted((text for _, text in pairs), key=lambda t: -float(encoder._of(image) @ encoder._of(t)))
            i2t.append(bool(set(best[:k]) & set(own)))
        for image, text in pairs:
            best = sorted(split.ids, key=lambda i: -float(encoder._of(i) @ encoder._of(text)))
            t2i.append(image in best[:k])
        assert metrics[f"image_i2t_r{k}"].value == pytest.approx(np.mean(i2t))
        assert metrics[f"image_t2i_r{k}"].value == pytest.approx(np.mean(t2i))
    assert metrics["image_t2i_r1"].n == 8 * captions
    assert details["pools"]["captions"] == f"{8 * captions} distinct of {8 * captions}, {captions} an image"


@pytest.mark.parametrize("captions", [["a picture"] * 8, [f"a photo of {NAMES[k % 4]}" for k in range(8)]])
def test_captions_that_tell_no_image_are_not_retrieved(tmp_path: Path, captions: list[str]) -> None:
    """All alike, every encoder would be right; made of the regions' names, they were written for no image."""
    data = write_regions(tmp_path / "a")
    samples = [json.loads(line) for line in (data / "regions.jsonl").read_text().splitlines()]
    for sample, caption in zip(samples, captions, strict=True):
        del sample["captions"]
        sample["caption"] = caption
    (data / "regions.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    split = load_region_split(data)
    encoder = TruthEncoder([split])
    metrics, details, _ = evaluate_regions(encoder, [TruthReadout(encoder)], split, QUIET)
    assert not [name for name in metrics if name.startswith("image")]
    assert details["pools"]["image"].startswith("images are not retrieved: ")
    if len(set(captions)) == 1:
        with pytest.raises(ClocError, match="all images have the same caption"):
            retrieve(RandomEncoder(), split, QUIET)  # type: ignore[arg-type]


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    for k, name in enumerate(["n01", "n02", "n10", "n20", "n21", "n30", "n31"]):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for j in range(2):
            noise_image(30, 20, 7 * j + k).save(tmp_path / "classes" / name / f"{j}.png")
    return tmp_path / "classes"


def test_classification_equals_brute_force(labelled: Path) -> None:
    encoder, images = RandomEncoder(), LabelledImages(labelled)
    names = [f"thing {k}" for k in range(7)]
    metrics, details = classify(encoder, images, names, ("a {}.", "{}"), QUIET)  # type: ignore[arg-type]
    classes = class_embeddings(encoder, names, ("a {}.", "{}"))  # type: ignore[arg-type]
    ranks = []
    for row, label in enumerate(images.labels):
        scores = (classes @ encoder._of(str(row))).tolist()
        ranks.append(sorted(scores, reverse=True).index(scores[label]))
    assert metrics["image_top1"].value == pytest.approx(np.mean([rank < 1 for rank in ranks]))
    assert metrics["image_top5"].value == pytest.approx(np.mean([rank < 5 for rank in ranks]))
    assert 0 < metrics["image_top5"].value < 1
    assert details["templates"]["headline"] == "2 templates"


def test_labelled_images_say_which_they_are(labelled: Path) -> None:
    """Items are paired by these: running numbers would pair one set of images with another."""
    images = LabelledImages(labelled)
    assert len(set(images.ids)) == len(images)
    assert all((labelled / one).is_file() for one in images.ids)
    few = LabelledImages(labelled, 3)
    assert set(few.ids) < set(images.ids)


def test_classes_are_named_by_a_mapping_or_in_order(tmp_path: Path) -> None:
    file = tmp_path / "names.json"
    file.write_text(json.dumps({"n01": "tench", "n02": "goldfish"}))
    assert class_names(["n01", "n02"], str(file)) == ["tench", "goldfish"]
    with pytest.raises(ClocError, match="does not name the class 'n03'"):
        class_names(["n01", "n03"], str(file))
    file.write_text(json.dumps([f"class {k}" for k in range(12)]))
    assert class_names(sorted(str(k) for k in range(12)), str(file))[:3] == ["class 0", "class 1", "class 10"]
    with pytest.raises(ClocError, match="names 12 classes, and the data have 2"):
        class_names(["a", "b"], str(file))
    with pytest.raises(ClocError, match="cannot read the names"):
        class_names(["a", "b"], str(tmp_path / "none.json"))


def test_the_image_suite_tells_its_two_tasks_apart(cloc: str, labelled: Path, tmp_path: Path) -> None:
    file = tmp_path / "names.json"
    file.write_text(json.dumps(["ring", "circle", "square", "star", "cross", "red", "blue"]))
    asked = {"class_names": str(file), "dataset": "imagenet", "templates": "simple"}
    options = EvalOptions(cloc, str(labelled), str(tmp_path / "out"), split="val", limit=7, settings=asked)
    report = run_suite("image", options)
    assert report["dataset"]["split"] == "val subset (7 of 50000 images)"
    assert set(report["metrics"]) == {"image_top1", "image_top5", "image_macc"}
    assert "bare names" in (tmp_path / "out" / "report.md").read_text()
    data = write_regions(tmp_path / "data")
    report = run_suite("image", EvalOptions(cloc, str(data), str(tmp_path / "out"), settings={"captions": 2}))
    assert report["metrics"]["image_t2i_r10"]["n"] == 16
    with pytest.raises(ClocError, match="--method is for regions"):
        run_suite("image", EvalOptions(cloc, str(data), str(tmp_path / "out"), method="crop"))
    for wrong in ({"task": "x"}, {"captions": 0}, {"dataset": "imagenett"}, {"templates": "x"}, {"temlates": "bare"}):
        with pytest.raises(ClocError):
            run_suite("image", EvalOptions(cloc, str(data), str(tmp_path / "out"), settings=wrong))


# --- detection ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sign", "expected"), [(1.0, 1.0), (-1.0, 0.0)])
def test_detection_gives_the_truth_100_and_its_opposite_nothing(tmp_path: Path, sign: float, expected: float) -> None:
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    listed = [{"name": name, "frequency": "rccf"[k]} for k, name in enumerate(NAMES)]
    data = write_regions(tmp_path / "a", listed, kind="lvis")
    truth, split = read_truth(None, "auto", load_region_split(data), str(data))
    encoder = TruthEncoder([split], sign)
    asked = DetectionSettings(proposals="ground-truth", temperature=50.0, min_score=0.3, resamples=5, templates="bare")
    metrics, details = evaluate_detection(encoder, split, truth, asked, QUIET, readout=TruthReadout(encoder))
    occurring = {region.text for region in split.regions}
    groups = {"rare": {"dog"}, "common": {"cat", "traffic light"}, "frequent": {"bird"}}
    for name in ("ap", "ap50", "ap75", *(f"ap_{group}" for group, some in groups.items() if some & occurring)):
        assert metrics[name].value == expected, name
    assert metrics["ap"].n == len(split.regions)
    assert metrics["proposal_recall50"].value == 1.0
    assert details["detections"]["nms"] == 1.0, "true boxes are not suppressed"


def annotations(path: Path, names: Sequence[str], **image: Any) -> Path:
    """The boxes of :func:`write_regions` as an annotation file, the area being half of the box's, and a crowd."""
    boxes = []
    for k in range(8):
        for j in range(k % 3 + 1):
            bbox = [30 * j, 2, 20 + k, 28]
            kind = names.index(NAMES[(k * j + k) % 4]) + 1
            boxes.append({"image_id": k, "category_id": kind, "bbox": bbox, "area": bbox[2] * 14.0, "iscrowd": 0})
    boxes.append({"image_id": 0, "category_id": 1, "bbox": [60, 2, 20, 20], "area": 400.0, "iscrowd": 1})
    images = [{"id": k, **image} for k in range(9)]
    categories = [{"id": k, "name": name} for k, name in enumerate(names, start=1)]
    path.write_text(
        json.dumps(
            {"images": images, "annotations": [{**b, "id": n} for n, b in enumerate(boxes)], "categories": categories}
        )
    )
    return path


def test_the_official_truth_knows_crowds_and_areas(tmp_path: Path) -> None:
    data = write_regions(tmp_path / "a")
    split = load_region_split(data)
    names = [*OV_COCO_BASE, *OV_COCO_NOVEL, "traffic light"]
    file = annotations(tmp_path / "instances.json", names)
    truth, same = read_truth(str(file), "auto", split, str(data))
    assert [region.box for region in same.regions] == [region.box for region in split.regions]
    assert [region.text for region in same.regions] == [region.text for region in split.regions]
    assert sum(one["iscrowd"] for one in truth.coco["annotations"]) == 1
    assert truth.coco["annotations"][0]["area"] == 20 * 14.0
    assert "1 of its images not measured" in truth.source
    some, fewer = read_truth(str(file), "ov-coco", split, str(data))
    assert len(some.names) == 65
    assert {region.text for region in fewer.regions} == {"dog", "cat", "bird"}
    assert some.groups["novel"] == [names.index(name) + 1 for name in OV_COCO_NOVEL]
    by_regions, again = read_truth(None, "ov-coco", split, str(data))
    assert [region.box for region in again.regions] == [region.box for region in fewer.regions]
    assert again.ids == [name for name in fewer.ids if name in set(again.ids)]
    assert "boxes of other categories" in by_regions.source
    (tmp_path / "bad.json").write_text('{"images": []}')
    with pytest.raises(ClocError, match="cannot read these annotations"):
        read_truth(str(tmp_path / "bad.json"), "auto", split, str(data))
    (tmp_path / "none.json").write_text('{"images": [], "annotations": [], "categories": []}')
    with pytest.raises(ClocError, match="'0': the image is not in the annotation file"):
        read_truth(str(tmp_path / "none.json"), "auto", split, str(data))
    with pytest.raises(ClocError, match="not COCO's categories"):
        read_truth(str(annotations(tmp_path / "few.json", NAMES)), "ov-coco", split, str(data))


def test_settings_that_make_no_sense_are_refused(cloc: str, tmp_path: Path) -> None:
    data = write_regions(tmp_path / "a")

    def complaint(suite: str, **settings: Any) -> str:
        with pytest.raises(ClocError) as caught:
            run_suite(suite, EvalOptions(cloc, str(data), str(tmp_path / "out"), settings=settings))
        return str(caught.value)

    assert "its sigmoid would be near 1" in complaint("detection", score="sigmoid", proposals="ground-truth")
    assert "no backend 'x'" in complaint("detection", backend="x")
    assert "those of the file" in complaint("detection", annotations="f", categories="known")
    assert "no setting 'nmss'. Did you mean 'nms'?" in complaint("detection", nmss=0.5)
    assert "gallery is 'some'" in complaint("region", gallery="some")
    assert "recognition is 'no'" in complaint("region", recognition="no")


# --- photographs -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not COCO50.is_dir(), reason="the COCO photographs (CLOC_COCO50) are not there")
def test_all_three_suites_on_photographs(cloc: str, tmp_path: Path) -> None:
    """Encoders with random weights: the figures are chance, the machinery is the real one."""
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    instances = COCO50 / "annotations" / "instances_train2017.json"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that these are not the whole of train2017
        convert_coco(
            COCO50 / "train2017", instances, COCO50 / "annotations" / "captions_train2017.json", tmp_path / "coco"
        )
    save_tiny_siglip(tmp_path / "siglip")

    def report(suite: str, model: str, limit: int | None = None, **settings: Any) -> dict[str, Any]:
        options = EvalOptions(model, str(tmp_path / "coco"), str(tmp_path / "out"), limit=limit, settings=settings)
        return run_suite(suite, options)

    found = report("region", str(tmp_path / "siglip"), templates="simple")
    assert found["dataset"]["split"] == "train2017 subset (50 of 118287 images)"
    assert found["details"]["pools"]["classes"] == "80: all categories of coco, dataset.json says"
    assert found["metrics"]["region_macc"]["n"] == 465
    assert found["metrics"]["region_macc"]["value"] < 0.2
    found = report("image", cloc, captions=5)
    assert found["metrics"]["image_t2i_r1"]["n"] == 250
    asked = {"annotations": str(instances), "templates": "bare", "resamples": 2}
    found = report("detection", cloc, limit=6, grid={"steps": 4, "scales": [0.3, 0.6]}, **asked)
    assert found["metrics"]["ap"]["value"] < 0.2
    assert 0 < found["metrics"]["proposal_recall50"]["value"] < 1
    found = report("detection", cloc, proposals="ground-truth", categories="ov-coco", **asked)
    assert found["metrics"]["proposal_recall50"]["value"] == 1.0
    assert {"ap50_base", "ap50_novel"} <= set(found["metrics"])
    assert re.search(r"with crowds and areas of masks; \d+ of its images", found["details"]["truth"]["boxes"])
    assert not math.isnan(found["metrics"]["ap50_novel"]["value"])
