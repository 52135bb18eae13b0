"""How long the conversion of a set of COCO val2017's size takes, and what memory it holds, at a size and 20 times that.

    python scripts/benchmarks/import_coco.py
    python scripts/benchmarks/import_coco.py --images 200 --times 5 --formats jsonl --repeats 1

The set is made up in the official format: 5,000 images of 640 x 480, 36,000 boxes with outlines, 25,000 captions. Each
picture is a file of its own of the stated size; all are hard links to one, so that the larger set costs no disk. The
real command runs in a process of its own, and seconds and the largest resident set are that process's, start-up
included.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import argument_parser, print_table, run_case, write_report
from PIL import Image

BOXES, CAPTIONS, CATEGORIES = 7.2, 5, 80
SIZE = (640, 480)
PROGRAM = """
import sys, time
from cloc_mllm.apps.cli import main
code = main(sys.argv[1:])
print(time.process_time())
# Not getrusage: what it tells counts the memory of the process that started this one.
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
sys.exit(code)
"""
WORDS = ("a", "man", "dog", "on", "the", "red", "street", "with", "two", "small", "tables", "near", "grey", "water")


def make_set(folder: Path, images: int) -> list[str]:
    """Write a set in COCO's format; return the arguments that convert it."""
    rng = random.Random(0)
    pictures = folder / "val2017"
    pictures.mkdir(parents=True)
    first = pictures / "000000000000.jpg"
    grain = np.random.default_rng(0).integers(0, 256, (SIZE[1] // 8, SIZE[0] // 8, 3), dtype=np.uint8)
    Image.fromarray(grain).resize(SIZE, Image.Resampling.BICUBIC).save(first, quality=85)
    listed = [
        {"id": k, "file_name": f"{k:012d}.jpg", "width": SIZE[0], "height": SIZE[1], "license": 1}
        for k in range(images)
    ]
    for image in listed[1:]:
        os.link(first, pictures / image["file_name"])
    # Annotations stand in any order in the official files.
    boxes = (_box(rng, k, images) for k in range(round(images * BOXES)))
    captions = (
        {
            "id": k,
            "image_id": rng.randrange(images) if k >= images else k,
            "caption": " ".join(rng.choices(WORDS, k=10)),
        }
        for k in range(images * CAPTIONS)
    )
    categories = [{"id": k, "name": f"thing {k}", "supercategory": "thing"} for k in range(1, CATEGORIES + 1)]
    _write(folder / "instances.json", listed, boxes, {"categories": categories})
    _write(folder / "captions.json", listed, captions, {})
    words = ["--images", pictures, "--instances", folder / "instances.json", "--captions", folder / "captions.json"]
    return [str(word) for word in words]


def _box(rng: random.Random, number: int, images: int) -> dict[str, Any]:
    x, y = rng.uniform(0, 500), rng.uniform(0, 400)
    w, h = rng.uniform(5, 640 - x), rng.uniform(5, 480 - y)
    outline = [round(value, 2) for k in range(24) for value in (x + w * k / 24, y + h * (k % 3) / 3)]
    return {
        "id": number,
        "image_id": rng.randrange(images),
        "category_id": rng.randint(1, CATEGORIES),
        "bbox": [round(value, 2) for value in (x, y, w, h)],
        "iscrowd": 0,
        "area": w * h,
        "segmentation": [outline],
    }


def _write(path: Path, images: list[Any], annotations: Any, rest: dict[str, Any]) -> None:
    """Write an annotation file item by item: the larger ones are not held in memory here either."""
    with path.open("w") as file:
        file.write('{"info": {}, "images": ' + json.dumps(images) + ', "annotations": [')
        for k, item in enumerate(annotations):
            file.write((", " if k else "") + json.dumps(item))
        file.write("]" + "".join(f", {json.dumps(key)}: {json.dumps(value)}" for key, value in rest.items()) + "}")


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Make a set and convert it as often as asked; the median and the largest resident set of the command count."""
    seconds, busy, peaks, counts = [], [], [], {}
    with tempfile.TemporaryDirectory() as place:
        words = make_set(Path(place) / "set", case["images"])
        for number in range(case["repeats"]):
            out = Path(place) / f"out{number}"
            command = [sys.executable, "-c", PROGRAM, "data", "convert", "coco", *words]
            command += ["--format", case["format"], "--out", str(out)]
            start = time.perf_counter()
            done = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": _root()}
            )
            seconds.append(time.perf_counter() - start)
            busy.append(float(done.stdout.split()[-2]))
            peaks.append(int(done.stdout.split()[-1]) / 1024)
            counts = json.loads((out / "dataset.json").read_text())["counts"]
    if counts["images_written"] != case["images"]:
        raise SystemExit(f"{counts['images_written']} of {case['images']} images were written")
    middle = len(seconds) // 2
    found = {"seconds": sorted(seconds)[middle], "processor_seconds": sorted(busy)[middle], "peak_mib": max(peaks)}
    return {**found, "boxes": counts["boxes_written"]}


def _root() -> str:
    return str(Path(__file__).resolve().parents[2])


def main() -> None:
    """Measure the set, and the memory at two sizes; print the table, write the JSON."""
    parser = argument_parser(__doc__)
    parser.add_argument("--images", type=int, default=5000, help="images of the set that is timed")
    parser.add_argument("--times", type=int, default=20, help="memory: of a tenth of it, and of this times the tenth")
    parser.add_argument("--formats", nargs="+", default=["jsonl", "parquet"], help="formats to write")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(run(json.loads(args.case))))
        return
    cases = [{"images": args.images, "format": name, "repeats": args.repeats} for name in args.formats]
    small = max(1, args.images // 10)
    cases += [{"images": count, "format": args.formats[0], "repeats": 1} for count in (small, small * args.times)]
    results = [run_case(__file__, case, args.timeout) for case in cases]
    table = [["images", "boxes", "format", "s", "processor s", "largest resident set, MiB"]]
    for found in results:
        if "failed" in found:
            table.append([f"{found['images']:,}", "–", found["format"], found["failed"], "–", "–"])
            continue
        cells = [f"{found['images']:,}", f"{found['boxes']:,}", found["format"], f"{found['seconds']:.1f}"]
        table.append([*cells, f"{found['processor_seconds']:.1f}", f"{found['peak_mib']:.0f}"])
    print_table(table)
    write_report(args.out, "import_coco", results)


if __name__ == "__main__":
    main()
