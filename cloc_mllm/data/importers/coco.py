"""COCO's instance and caption annotations as region-text samples.

Policy, all of it counted in the result: a box [x, y, w, h] becomes [x1, y1, x2, y2], clipped to the picture; its text
is the category's name; crowd boxes (`iscrowd`: 1) cover several things at once and are left out; so are boxes without
area. The caption with the lowest id is the sample's caption, the others go to `captions`. Images without a caption are
left out, images without objects are kept with no region.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cloc_mllm.data.importers.json_stream import stream_lists
from cloc_mllm.data.importers.pictures import picture_size
from cloc_mllm.errors import ClocError

SUMMARY = "COCO: instances (boxes with category names) and captions"
EXAMPLE = (
    "cloc-mllm data convert coco --images train2017 --instances annotations/instances_train2017.json "
    "--captions annotations/captions_train2017.json --out data/coco"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `cloc-mllm data convert coco`."""
    parser.add_argument("--images", required=True, type=Path, help="folder of the pictures")
    parser.add_argument("--instances", required=True, type=Path, help="instances_*.json")
    parser.add_argument("--captions", required=True, type=Path, help="captions_*.json")
    parser.add_argument("--out", required=True, type=Path, help="folder to write to")
    parser.add_argument(
        "--format", default="jsonl", choices=("jsonl", "parquet", "webdataset"), help="default: %(default)s"
    )
    parser.add_argument("--copy-images", action="store_true", help="with jsonl: copy the pictures into OUT/images")
    parser.add_argument(
        "--on-bad-sample", default="error", choices=("error", "skip"), help="a missing or mismatched picture"
    )


def convert(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the conversion that parsed arguments ask for."""
    return convert_coco(
        args.images,
        args.instances,
        args.captions,
        args.out,
        file_format=args.format,
        copy_images=args.copy_images,
        on_bad_sample=args.on_bad_sample,
    )


class _Annotations:
    """What is kept of the two annotation files: no masks, so that a million boxes fit into memory."""

    def __init__(self, instances: Path, captions: Path, counts: Counter[str]) -> None:
        self.images: dict[int, tuple[str, int, int]] = {}
        self.boxes: dict[int, list[tuple[list[float], int]]] = {}
        self.captions: dict[int, list[tuple[int, str]]] = {}
        self.categories: dict[int, str] = {}
        for name, item in stream_lists(instances, ("images", "annotations", "categories")):
            with _reading(instances, name, item):
                if name == "images":
                    self._add_image(item)
                elif name == "categories":
                    self.categories[item["id"]] = item["name"]
                elif item.get("iscrowd"):
                    counts["boxes_crowd_left_out"] += 1
                else:
                    box = [float(value) for value in item["bbox"]]
                    self.boxes.setdefault(item["image_id"], []).append((box, item["category_id"]))
        for name, item in stream_lists(captions, ("images", "annotations")):
            with _reading(captions, name, item):
                if name == "images":
                    self._add_image(item)
                else:
                    text = " ".join(str(item["caption"]).split())
                    counts["captions_read" if text else "captions_empty_left_out"] += 1
                    if text:
                        self.captions.setdefault(item["image_id"], []).append((item["id"], text))
        self._check_references(instances, captions)

    def _add_image(self, item: dict[str, Any]) -> None:
        self.images[item["id"]] = (item["file_name"], int(item["width"]), int(item["height"]))

    def _check_references(self, instances: Path, captions: Path) -> None:
        for file, owners in ((instances, self.boxes), (captions, self.captions)):
            lost = [image for image in owners if image not in self.images]
            if lost:
                problem = f"annotations refer to {len(lost)} images that no file lists, the first of them {lost[0]}"
                raise ClocError(problem, file=file, remedy="Check that both files are of the same split and complete.")
        used = {category for boxes in self.boxes.values() for _, category in boxes}
        if unknown := used - set(self.categories):
            raise ClocError(f"category {min(unknown)} is used but not listed", file=instances, remedy="Fetch it again.")


class _reading:  # noqa: N801 -- used like a function, in a `with` statement
    """Turns the errors of a malformed item into one that says where it is."""

    def __init__(self, file: Path, name: str, item: Any) -> None:
        self.file, self.name, self.item = file, name, item

    def __enter__(self) -> None:
        if not isinstance(self.item, dict):
            raise ClocError(f"an item of '{self.name}' is not an object", file=self.file, remedy="Check the file.")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (KeyError, TypeError, ValueError)):
            what = f"lacks {error}" if isinstance(error, KeyError) else f"is malformed ({error})"
            sample = self.item.get("id")
            raise ClocError(
                f"an item of '{self.name}' {what}",
                file=self.file,
                sample=sample,
                remedy="Is it the right kind of file?",
            ) from error


def _check_picture(path: Path, width: int, height: int, annotations: Path, image_id: int) -> None:
    size = picture_size(path)
    if size != (width, height):
        raise ClocError(
            f"the file says {width} x {height} pixels, but {path.name} is {size[0]} x {size[1]}",
            file=annotations,
            sample=image_id,
            remedy="The boxes would be wrong: use the pictures that the annotations were made for, or skip it.",
        )


def _regions(
    boxes: list[tuple[list[float], int]], categories: dict[int, str], width: int, height: int, counts: Counter[str]
) -> Iterator[dict[str, Any]]:
    """The regions of one image, in xyxy."""
    for (x, y, w, h), category in boxes:
        exact = [x, y, x + w, y + h]
        box = [min(max(value, 0.0), limit) for value, limit in zip(exact, (width, height) * 2, strict=True)]
        if box[2] <= box[0] or box[3] <= box[1]:
            counts["boxes_without_area_left_out"] += 1
            continue
        counts["boxes_clipped"] += any(abs(a - b) > 0.01 for a, b in zip(exact, box, strict=True))
        counts["boxes_written"] += 1
        # Annotations have two decimals; adding width to x must not show float dust such as 359.98999999999995.
        yield {"box": [round(value, 2) for value in box], "text": categories[category]}


def convert_coco(
    images: str | Path,
    instances: str | Path,
    captions: str | Path,
    out: str | Path,
    *,
    file_format: str = "jsonl",
    copy_images: bool = False,
    on_bad_sample: str = "error",
    progress: bool = True,
) -> dict[str, Any]:
    """Converts COCO to region-text samples; see the top of this file for what becomes of what.

    Args:
        images: Folder of the pictures.
        instances: The instances file.
        captions: The captions file.
        out: Folder to write to.
        file_format: "jsonl", "parquet" or "webdataset".
        copy_images: With "jsonl", copy the pictures beside it instead of referring to them.
        on_bad_sample: "error" stops at a picture that is missing, unreadable or of another size than annotated;
            "skip" leaves it out and counts it.
        progress: Show a progress bar, if standard error is a terminal.

    Returns:
        Exact counts, also written to `dataset.json` in `out`.

    Raises:
        ClocError: Files that cannot be read or do not fit together, or that cannot be written.
    """
    from tqdm import tqdm

    from cloc_mllm.data.writers import open_writer

    images, instances, captions, out = Path(images), Path(instances), Path(captions), Path(out)
    counts: Counter[str] = Counter()
    found = _Annotations(instances, captions, counts)
    try:
        with open_writer(out, file_format, "regions", copy_images) as writer:
            for image_id in tqdm(found.images, unit="img", desc="coco", disable=None if progress else True):
                sample = _sample(found, image_id, images, instances, counts, on_bad_sample)
                if sample is not None:
                    writer.write(sample)
        result = {"kind": "coco", "format": file_format, "counts": _all_counts(found, counts)}
        (out / "dataset.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ClocError(f"cannot write: {error.strerror or error}", file=error.filename or out) from error
    return result


def _sample(
    found: _Annotations, image_id: int, images: Path, instances: Path, counts: Counter[str], on_bad_sample: str
) -> dict[str, Any] | None:
    """The sample of one image, or None if it is left out."""
    file_name, width, height = found.images[image_id]
    spoken = [text for _, text in sorted(found.captions.get(image_id, ()))]
    if not spoken:
        counts["images_without_caption_left_out"] += 1
        return None
    try:
        _check_picture(images / file_name, width, height, instances, image_id)
    except ClocError:
        if on_bad_sample == "error":
            raise
        counts["images_bad_left_out"] += 1
        return None
    regions = list(_regions(found.boxes.get(image_id, []), found.categories, width, height, counts))
    counts["images_written"] += 1
    counts["images_without_objects"] += not regions
    return {
        "id": str(image_id),
        "image": images / file_name,
        "width": width,
        "height": height,
        "caption": spoken[0],
        "captions": spoken,
        "regions": regions,
        "source": "coco",
    }


def _all_counts(found: _Annotations, counts: Counter[str]) -> dict[str, int]:
    """Every count by name, those that stayed at zero too."""
    names = (
        "images_written",
        "images_without_objects",
        "images_without_caption_left_out",
        "images_bad_left_out",
        "captions_read",
        "captions_empty_left_out",
        "boxes_written",
        "boxes_clipped",
        "boxes_crowd_left_out",
        "boxes_without_area_left_out",
    )
    return {"images_listed": len(found.images), "categories": len(found.categories)} | {k: counts[k] for k in names}
