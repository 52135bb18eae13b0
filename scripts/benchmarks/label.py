"""Labelling: pictures a second in each step, and memory over a set and over one 20 times as large.

    python scripts/benchmarks/label.py
    python scripts/benchmarks/label.py --source photos --detector owlv2:google/owlv2-base-patch16-ensemble

Without `--source`, the set is made-up JPEGs of 160 x 120 pixels with captions, in tar shards, and the detector a tiny
OWLv2 with random weights; what takes its time then is the image processor that OWLv2 comes with, not a model. Each set
is labelled in a process of its own by one worker, whose largest resident set counts. A given source is labelled once,
as it is.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import MIB, argument_parser, print_table, run_case, write_report
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "labeling"))

from tiny_owl import WORDS, save_detector

from cloc_mllm.data.writers import WebDatasetWriter
from cloc_mllm.labeling.config import load_label_config
from cloc_mllm.labeling.pipeline import label

PICTURES, IN_SHARD = 64, 32


def write_source(folder: Path, samples: int) -> None:
    """Write tar shards of a few pictures again and again, each with a caption of its own."""
    rng = np.random.default_rng(0)
    words, files = WORDS.split(), []
    for number in range(PICTURES):
        files.append(folder / f"{number}.jpg")
        coarse = Image.fromarray(rng.integers(0, 256, (15, 20, 3), dtype=np.uint8))
        coarse.resize((160, 120), Image.Resampling.BICUBIC).save(files[-1], quality=90)
    with WebDatasetWriter(folder / "shards", shard=IN_SHARD) as writer:
        for number in range(samples):
            caption = " ".join(rng.choice(words, 4).tolist())
            writer.write({"id": f"{number}", "image": files[number % PICTURES], "caption": caption, "regions": []})


def measure_case(case: dict[str, Any]) -> dict[str, Any]:
    """Label one set in this process."""
    given = {"workers": 0, "format": "webdataset", "source": case["source"], "out": case["out"], "shard": IN_SHARD}
    stages = {f"{name}.stage": case[name] for name in ("captioner", "phrases", "detector")}
    label(load_label_config(None, {**given, **stages}, case["overrides"]), progress=False)
    report = json.loads((Path(case["out"]) / "report.json").read_text())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB
    return {"peak_mib": peak, "counts": report["counts"], "throughput": report["throughput"]}


def main() -> None:
    """Label each set, print the tables and write the JSON."""
    parser = argument_parser(__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration")
    parser.add_argument("--samples", type=int, default=64, help="pictures of the smaller set")
    parser.add_argument("--times", type=int, default=20, help="how many times as large the other one is")
    parser.add_argument("--source", help="label this instead")
    parser.add_argument("--captioner", default="existing", help="default: %(default)s")
    parser.add_argument("--phrases", default="ngrams", help="default: %(default)s")
    parser.add_argument("--detector", help="default: a tiny OWLv2 with random weights")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure_case(json.loads(args.case))))
        return
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        if args.detector is None:
            save_detector(place / "detector")
            args.overrides.insert(0, "detector.options.size=null")  # the checkpoint's own, which is tiny
        stages = {"captioner": args.captioner, "phrases": args.phrases}
        stages["detector"] = args.detector or f"owlv2:{place / 'detector'}"
        sets = [("given", args.source)] if args.source else []
        for samples in () if args.source else (args.samples, args.samples * args.times):
            (place / str(samples)).mkdir()
            write_source(place / str(samples), samples)
            sets.append((str(samples), str(place / str(samples) / "shards")))
        results = []
        for name, source in sets:
            case = {**stages, "source": source, "out": str(place / f"out-{name}"), "overrides": args.overrides}
            results.append({"set": name, **run_case(__file__, case, args.timeout)})
    rows = [["set", "pictures", "regions", "largest resident set, MiB"]]
    for result in results:
        if "failed" in result:
            print(f"{result['set']}: {result['failed']}")
            continue
        counts = result["counts"]
        cells = [f"{counts['samples_written']:,}", f"{counts['regions_written']:,}", f"{result['peak_mib']:,.0f}"]
        rows.append([result["set"], *cells])
    print_table(rows)
    print()
    measured = [result for result in results if "failed" not in result]
    head = ["step", *(f"{r['set']}: {unit}" for r in measured for unit in ("pictures/s", "share of the time"))]
    steps = [[step] for step in (measured[-1]["throughput"] if measured else ())]
    for row in steps:
        for result in measured:
            found = result["throughput"][row[0]]
            row += [f"{found['samples_per_second'] or 0:,.1f}", f"{100 * (found['share'] or 0):.1f} %"]
    print_table([head, *steps])
    write_report(args.out, "label", results)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
