"""How well copies of photographs are known again, how fast near pairs are found, and what a scan holds in memory.

Every photograph of a folder is changed in some ways (JPEG quality, size, crop, mirror, …) and looked for among the
originals by the perceptual hash that `cloc-mllm data stats` and `data leaks` use. Recall is the share of changed
photographs whose original is found; precision the share of the pairs found that are a photograph and its own copy.

    python scripts/benchmarks/near_duplicates.py --images COCO/train2017
"""

from __future__ import annotations

import io
import json
import os
import resource
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import MIB, argument_parser, print_table, run_case, write_report
from PIL import Image, ImageEnhance, ImageOps

from cloc_mllm.data.inspection.duplicates import near_groups, near_matches, near_pairs
from cloc_mllm.data.inspection.pictures import look_at
from cloc_mllm.data.inspection.statistics import inspect_data

DISTANCES = (0, 2, 4, 6, 8, 10, 12)


def saved(picture: Image.Image, kind: str = "BMP", **options: Any) -> bytes:
    """Return a picture's file."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def cropped(picture: Image.Image, share: float) -> Image.Image:
    """Return a picture without a share of its width and height, half of it on each side."""
    across, down = round(picture.width * share / 2), round(picture.height * share / 2)
    return picture.crop((across, down, picture.width - across, picture.height - down))


def resized(picture: Image.Image, factor: float) -> Image.Image:
    """Return a picture made smaller."""
    return picture.resize((round(picture.width * factor), round(picture.height * factor)), Image.Resampling.BICUBIC)


CHANGES: dict[str, Callable[[Image.Image], bytes]] = {
    "JPEG, quality 50": lambda picture: saved(picture, "JPEG", quality=50),
    "JPEG, quality 10": lambda picture: saved(picture, "JPEG", quality=10),
    "half the size": lambda picture: saved(resized(picture, 0.5), "JPEG", quality=90),
    "a quarter of the size": lambda picture: saved(resized(picture, 0.25), "JPEG", quality=90),
    "squeezed to 224 x 224": lambda picture: saved(picture.resize((224, 224)), "JPEG", quality=90),
    "grey": lambda picture: saved(picture.convert("L")),
    "brighter by a third": lambda picture: saved(ImageEnhance.Brightness(picture).enhance(4 / 3)),
    "cropped by 2 %": lambda picture: saved(cropped(picture, 0.02)),
    "cropped by 5 %": lambda picture: saved(cropped(picture, 0.05)),
    "cropped by 10 %": lambda picture: saved(cropped(picture, 0.10)),
    "turned by 2 degrees": lambda picture: saved(picture.rotate(2, Image.Resampling.BICUBIC)),
    "mirrored": lambda picture: saved(ImageOps.mirror(picture)),
}


def recognition(case: dict[str, Any]) -> dict[str, Any]:
    """Look for changed photographs among the originals."""
    pictures = [Image.open(file).convert("RGB") for file in sorted(Path(case["images"]).glob("*.jpg"))]
    own = np.array([look_at(saved(picture), None, hashes=True).look for picture in pictures], np.uint64)
    apart = [away for block in near_pairs(own, 15) for away in block[2].tolist()]
    found: dict[str, Any] = {}
    for name, change in CHANGES.items():
        looks = [look_at(change(picture), None, hashes=True) for picture in pictures]
        for kind, hashes in (
            ("", [look.look for look in looks]),
            (", as in a mirror", [look.mirrored for look in looks]),
        ):
            if kind and name != "mirrored":
                continue
            found[name + kind] = {
                str(distance): _scores(np.array(hashes, np.uint64), own, distance) for distance in DISTANCES
            }
    return {"photographs": len(pictures), "nearest_different": min(apart, default=None), "changes": found}


def _scores(changed: Any, own: Any, distance: int) -> dict[str, Any]:
    pairs = [pair for block in near_matches(changed, own, distance) for pair in zip(*block[:2], strict=True)]
    right = sum(i == j for i, j in pairs)
    return {"recall": right / len(own), "precision": right / len(pairs) if pairs else None}


def searching(case: dict[str, Any]) -> dict[str, Any]:
    """Time the search among hashes at random, a hundredth of which have a near one."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, case["hashes"], dtype=np.uint64)
    count = case["hashes"] // 100
    hashes[:count] = hashes[-count:] ^ (np.uint64(1) << rng.integers(0, 64, count, dtype=np.uint64))
    start = time.perf_counter()
    groups, _ = near_groups(hashes, case["distance"])
    return {"seconds": time.perf_counter() - start, "groups": len(groups), "wanted": count}


def memory(case: dict[str, Any]) -> dict[str, Any]:
    """Inspect a set that names the same few pictures many times, and tell the largest resident set."""
    with tempfile.TemporaryDirectory(prefix="inspect-") as name:
        folder = Path(name)
        noise = np.random.default_rng(0)
        for k in range(case["pictures"]):
            Image.fromarray(noise.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(folder / f"{k}.png")
        with (folder / "regions.jsonl").open("w") as file:
            for k in range(case["samples"]):
                regions = [{"box": [1, 2, 30, 40], "text": f"thing {k % 997} {r}"} for r in range(5)]
                sample = {
                    "id": k,
                    "image": f"{k % case['pictures']}.png",
                    "caption": f"Caption {k}.",
                    "regions": regions,
                }
                file.write(json.dumps(sample) + "\n")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        start = time.perf_counter()
        inspect_data(folder, progress=False)
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "before_mib": before / MIB, "peak_mib": peak / MIB}


def main() -> None:
    """Measure every case, print the tables, write the JSON."""
    parser = argument_parser(__doc__)
    parser.add_argument("--images", type=Path, help="folder of photographs (.jpg); without, nothing is recognised")
    parser.add_argument("--hashes", type=int, nargs="+", default=[10_000, 100_000], help="hashes to search among")
    parser.add_argument("--samples", type=int, default=500, help="samples of the smaller set that is inspected")
    args = parser.parse_args()
    if args.case:
        case = json.loads(args.case)
        work = {"recognition": recognition, "searching": searching, "memory": memory}[case["what"]]
        print(json.dumps(work(case)))
        return
    cases: list[dict[str, Any]] = []
    if args.images is not None:
        cases.append({"what": "recognition", "images": str(args.images)})
    cases += [{"what": "searching", "hashes": n, "distance": d} for n in args.hashes for d in (2, 4, 6)]
    for factor in (1, 20):
        pictures = min(500, args.samples // 10) * factor
        cases.append({"what": "memory", "samples": args.samples * factor, "pictures": pictures})
    report([run_case(__file__, case, args.timeout) for case in cases], args)


def report(results: list[dict[str, Any]], args: Namespace) -> None:
    """Print the tables and write the JSON."""
    for found in results:
        if "failed" in found:
            print(f"{found['what']}: {found['failed']}")
        elif found["what"] == "recognition":
            apart = found["nearest_different"] or "more than 15"
            print(f"{found['photographs']} photographs; the nearest two are {apart} bits apart\n")
            rows = [["recall (precision) at a distance of", *map(str, DISTANCES)]]
            for name, scores in found["changes"].items():
                rows.append([name, *(_cell(scores[str(distance)]) for distance in DISTANCES)])
            print_table(rows)
            print()
    searches = [r for r in results if r["what"] == "searching" and "failed" not in r]
    rows = [["hashes", "distance", "s", "groups found", "groups there"]]
    rows += [
        [f"{r['hashes']:,}", str(r["distance"]), f"{r['seconds']:.2f}", str(r["groups"]), str(r["wanted"])]
        for r in searches
    ]
    print_table(rows)
    print()
    rows = [["samples", "pictures", "s", "MiB before", "MiB at most"]]
    for r in (r for r in results if r["what"] == "memory" and "failed" not in r):
        sizes = [f"{r['before_mib']:,.0f}", f"{r['peak_mib']:,.0f}"]
        rows.append([f"{r['samples']:,}", f"{r['pictures']:,}", f"{r['seconds']:.1f}", *sizes])
    print_table(rows)
    write_report(args.out, "near_duplicates", results)


def _cell(scores: dict[str, Any]) -> str:
    precision = "" if scores["precision"] in (None, 1.0) else f" ({scores['precision']:.2f})"
    return f"{scores['recall']:.2f}{precision}"


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
