"""What a detector is to find: a data set's regions, or the annotation file that they came from.

The file is the official protocol: it also knows crowds, the areas of masks (which sort objects into small and large),
and what LVIS's annotators did not look for.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloc_mllm.data.importers.lvis import LvisSource
from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.encoders.region_data import Region, RegionSplit
from cloc_mllm.evaluation.encoders.vocabulary import OV_COCO, OV_COCO_BASE, OV_COCO_NOVEL, read_vocabulary

RARITY = {"r": "rare", "c": "common", "f": "frequent"}
_OV_COCO_NAMES = frozenset((*OV_COCO_BASE, *OV_COCO_NOVEL))
_FEDERATED = ("neg_category_ids", "not_exhaustive_category_ids")


@dataclass(frozen=True)
class Truth:
    """What is to be found.

    Attributes:
        coco: COCO's layout; its images are numbered as in the split, from 1.
        names: Of the categories, in the order of their ids.
        groups: Ids of the categories that get an average of their own, by name.
        source: Where it comes from, in words, with what was left out.
    """

    coco: dict[str, list[dict[str, Any]]]
    names: list[str]
    groups: dict[str, list[int]]
    source: str


def read_truth(annotations: str | None, categories: str, split: RegionSplit, data: str) -> tuple[Truth, RegionSplit]:
    """Put together what is to be found.

    Args:
        annotations: COCO's or LVIS's annotation file; None: the data's regions.
        categories: Which; see :func:`~cloc_mllm.evaluation.encoders.vocabulary.read_vocabulary`. A file has its own,
            of which ``ov-coco`` keeps those of that benchmark.
        split: The data.
        data: Where they are.

    Returns:
        The truth; and the split, its regions being the true boxes. ``ov-coco`` leaves out images that hold none.

    Raises:
        ClocError: The annotation file cannot be read, or does not know an image of the data.
    """
    if annotations is not None:
        return _from_file(Path(annotations), split, categories == OV_COCO)
    source = "the data's regions: no crowds, areas are those of boxes"
    if categories == OV_COCO:
        boxes, held = len(split.regions), len(split.ids)
        split = _restricted(split, [k for k, one in enumerate(split.regions) if one.text in _OV_COCO_NAMES])
        source += f"; left out: {boxes - len(split.regions)} boxes of other categories, {held - len(split.ids)} images"
    vocabulary = read_vocabulary(categories, data, [region.text for region in split.regions])
    number = {name: k for k, name in enumerate(vocabulary.names, start=1)}
    true = [_annotation(region.image + 1, number[region.text], region.box, None, False) for region in split.regions]
    images = [{"id": k + 1, "width": size[0], "height": size[1]} for k, size in enumerate(split.sizes)]
    listed = [{"id": k, "name": name} for name, k in number.items()]
    rarity = {number[name]: letter for name, letter in vocabulary.frequency.items()}
    coco = {"images": images, "annotations": true, "categories": listed}
    groups = _groups(number, rarity, categories == OV_COCO)
    return Truth(coco, vocabulary.names, groups, f"{source}; categories {vocabulary.described}"), split


def _groups(number: Mapping[str, int], rarity: Mapping[int, str], ov_coco: bool) -> dict[str, list[int]]:
    """Ids of base and novel categories of OV-COCO, or of LVIS's rare, common and frequent ones."""
    if ov_coco:
        return {"base": [number[name] for name in OV_COCO_BASE], "novel": [number[name] for name in OV_COCO_NOVEL]}
    groups = {word: [k for k, one in rarity.items() if one == letter] for letter, word in RARITY.items()}
    return {word: ids for word, ids in groups.items() if ids}


def _annotation(image: int, category: int, box: Sequence[float], area: float | None, crowd: bool) -> dict[str, Any]:
    width, height = box[2] - box[0], box[3] - box[1]
    return {
        "image_id": image,
        "category_id": category,
        "bbox": [box[0], box[1], width, height],
        "area": width * height if area is None else area,
        "iscrowd": int(crowd),
    }


def _restricted(split: RegionSplit, rows: Sequence[int]) -> RegionSplit:
    """Keep some regions, and the images that hold them."""
    images = sorted({split.regions[row].image for row in rows})
    place = {image: k for k, image in enumerate(images)}
    return dataclasses.replace(
        _only(split, images),
        regions=[dataclasses.replace(split.regions[row], image=place[split.regions[row].image]) for row in rows],
    )


def _only(split: RegionSplit, images: Sequence[int]) -> RegionSplit:
    """Keep some images, without their regions."""
    if not images:
        raise ClocError("no image holds anything of these categories", file=split.ref.name)
    return dataclasses.replace(
        split,
        ref=dataclasses.replace(split.ref, n=len(images)),
        ids=[split.ids[image] for image in images],
        captions=[split.captions[image] for image in images],
        sizes=[split.sizes[image] for image in images],
        rows=[split.rows[image] for image in images],
        regions=[],
    )


def _from_file(path: Path, split: RegionSplit, ov_coco: bool) -> tuple[Truth, RegionSplit]:
    """The truth of an annotation file, for the images of the data; true boxes become the split's regions."""
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        listed = {str(image["id"]): image for image in given["images"]}
        categories = sorted(given["categories"], key=lambda one: one["id"])
        boxes = [(str(one["image_id"]), one["category_id"], one) for one in given["annotations"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ClocError(f"cannot read these annotations ({type(error).__name__}: {error})", file=path) from error
    unknown = [name for name in split.ids if name not in listed]
    if unknown:
        raise ClocError("the image is not in the annotation file", file=path, sample=unknown[0])
    namer = LvisSource(path)
    names = {one["id"]: namer.category_name(one) if "frequency" in one else str(one["name"]) for one in categories}
    if ov_coco:
        names = {key: name for key, name in names.items() if name in _OV_COCO_NAMES}
        if set(names.values()) != _OV_COCO_NAMES:
            raise ClocError("these are not COCO's categories, which OV-COCO is made of", file=path)
    boxes = [one for one in boxes if one[1] in names]
    if ov_coco:
        holding = {image for image, *_ in boxes}
        split = _only(split, [k for k, name in enumerate(split.ids) if name in holding])
    number = {name: k for k, name in enumerate(split.ids, start=1)}
    annotations = [
        _annotation(number[image], category, _corners(one, path), one.get("area"), bool(one.get("iscrowd")))
        for image, category, one in boxes
        if image in number
    ]
    images = [
        {"id": k, "width": w, "height": h} | {key: listed[name][key] for key in _FEDERATED if key in listed[name]}
        for (name, k), (w, h) in zip(number.items(), split.sizes, strict=True)
    ]
    rarity = {one["id"]: one["frequency"] for one in categories if "frequency" in one}
    coco = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": key, "name": name} for key, name in names.items()],
    }
    source = f"{path.name}, with crowds and areas of masks; {len(listed) - len(number)} of its images not measured"
    if any(_FEDERATED[0] in one for one in images):
        source += "; by LVIS's rules for what was not looked for"
    groups = _groups({name: key for key, name in names.items()}, rarity, ov_coco)
    return Truth(coco, list(names.values()), groups, source), _with_boxes(split, coco)


def _corners(annotation: Mapping[str, Any], path: Path) -> list[float]:
    try:
        x, y, width, height = (float(value) for value in annotation["bbox"])
    except (KeyError, TypeError, ValueError) as error:
        raise ClocError(f"an annotation has no bbox ({error})", file=path, sample=annotation.get("id")) from error
    return [x, y, x + width, y + height]


def _with_boxes(split: RegionSplit, coco: Mapping[str, Sequence[Mapping[str, Any]]]) -> RegionSplit:
    """The split with the boxes of the truth as its regions, crowds and boxes without area apart."""
    names = {one["id"]: one["name"] for one in coco["categories"]}
    regions = []
    for one in sorted(coco["annotations"], key=lambda each: each["image_id"]):
        x, y, width, height = one["bbox"]
        if width > 0 and height > 0 and not one["iscrowd"]:
            box = (x, y, x + width, y + height)
            regions.append(Region(one["image_id"] - 1, box, names[one["category_id"]], False))
    return dataclasses.replace(split, regions=regions)
