"""Reading shards: this package's streams against open_clip's WebDataset pipeline and `datasets` streaming.

    pip install -e '.[benchmarks]'
    python scripts/benchmarks/shard_reading.py --samples 2048 --workers 0 2

Made-up JPEGs with captions and regions are written to a temporary folder once, as tar shards and as Parquet. What is
timed is a whole shuffled pass over them in batches, loader and workers started anew: *images* decodes
every picture, resizes it to 224 x 224 pixels, normalises it and tokenises the caption, by the same functions on every
side; *bytes* stops at the encoded picture and the caption: the pipeline's own cost (`datasets` is measured for bytes
only: it would decode by the same functions). The sides take turns in one process, so that another load on the machine
meets all of them alike; medians count, and processor time beside them, which another load hardly changes. Two more
tables: the time to the first batch of a run that resumes after three quarters of a pass, and the largest resident set
over a set and over one 20 times as large.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import sys
import tarfile
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from common import MIB, argument_parser, print_table, run_case, write_report
from PIL import Image

from cloc_mllm.data.dataset import region_text_item
from cloc_mllm.data.lanes import LaneOrder
from cloc_mllm.data.shards import ShardSet, write_missing_indexes
from cloc_mllm.data.streaming import ShardStream
from cloc_mllm.data.writers import ParquetWriter
from cloc_mllm.models.image_processing_cloc import load_image
from cloc_mllm.training.presets.config import plan_batch
from cloc_mllm.training.running.stream import LaneStream, TrainLoader

SIDES = ("cloc_mllm tar", "open_clip tar", "datasets tar", "cloc_mllm parquet", "datasets parquet")
BATCH, SIZE, LANES, BLOCK = 64, 224, 16, 64
WORDS = (
    "a",
    "red",
    "dog",
    "on",
    "the",
    "old",
    "bench",
    "beside",
    "two",
    "small",
    "blue",
    "cars",
    "under",
    "grey",
    "sky",
)
MEAN = torch.tensor([0.48, 0.46, 0.41]).view(3, 1, 1)

Batch = Any


# -- what is read -----------------------------------------------------------------------------------------------------


def write_shards(folder: Path, samples: int, in_shard: int) -> None:
    """Write the same samples as tar shards (`.jpg`, `.json` and, for open_clip, `.txt`) and as Parquet."""
    rng = random.Random(0)
    pictures = [_picture(seed) for seed in range(64)]
    with ParquetWriter(folder / "parquet", shard=in_shard) as parquet:
        for number in range(samples):
            caption = " ".join(rng.choices(WORDS, k=12))
            regions = [
                {"box": [x, x, x + 90.0, x + 60.0], "text": " ".join(rng.choices(WORDS, k=2))}
                for x in (5, 80, 200, 300)
            ]
            sample = {"id": str(number), "width": 640, "height": 480, "caption": caption, "regions": regions}
            content = pictures[number % len(pictures)]
            parquet.write({**sample, "image": content})
            if number % in_shard == 0:
                (folder / "tar").mkdir(exist_ok=True)
                archive = tarfile.open(folder / "tar" / f"{number // in_shard:05d}.tar", "w")  # noqa: SIM115
            for ending, data in (("jpg", content), ("json", json.dumps(sample).encode()), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{number:09d}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
            if number % in_shard == in_shard - 1 or number == samples - 1:
                archive.close()
    write_missing_indexes([folder / "tar"])


def _picture(seed: int) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC), np.int16)
    grain = np.random.default_rng(seed + 1).integers(-6, 7, smooth.shape, dtype=np.int16)
    buffer = io.BytesIO()
    Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def prepare(image: Image.Image) -> torch.Tensor:
    """Return a picture as the tower takes it, ``(3, 224, 224)`` float32; the same on every side."""
    small = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    return torch.from_numpy(small.copy()).permute(2, 0, 1).to(torch.float32).div_(255.0).sub_(MEAN)


def tokenizer() -> Callable[[str], torch.Tensor]:
    """Return a tokenizer of single texts, ``(1, 77)``, as open_clip's pipeline calls one; the same on every side."""
    from cloc_mllm.training.presets.options import TokenizerOptions
    from cloc_mllm.training.pretraining.tokenizer import train_text_tokenizer

    own = train_text_tokenizer([" ".join(WORDS)], TokenizerOptions(vocab_size=300))
    return lambda text: own(text, padding="max_length", truncation=True, max_length=77, return_tensors="pt")[
        "input_ids"
    ]


# -- the sides --------------------------------------------------------------------------------------------------------


def own_loader(folder: Path, case: dict[str, Any]) -> TrainLoader:
    """Return this package's loader, as pre-training makes it."""
    source = ShardSet(folder)
    order = LaneOrder(
        [source.counts],
        [1.0],
        names=[source.name],
        batch=BATCH,
        lanes=case.get("lanes", LANES),
        chunk=None,
        block=case.get("block", BLOCK),
        seed=0,
    )
    images = case["mode"] == "images"
    stream = ShardStream([source], order, partial(region_text_item, max_regions=4) if images else _as_bytes)
    lanes = LaneStream(stream, plan_batch(BATCH, None, 1), epochs=1, workers=case["workers"])
    start = case.get("start", 0) // BATCH
    return TrainLoader(lanes, collator(images), 0, lambda: start, workers=case["workers"])


def _as_bytes(raw: dict[str, Any], *_: Any) -> dict[str, Any]:
    return {"image": raw["image"], "caption": raw["caption"]}


def collator(images: bool) -> Callable[[Sequence[dict[str, Any]]], Batch]:
    """Return what makes a batch of samples with `image` and `caption`."""
    if not images:
        return lambda items: [(item["image"], item["caption"]) for item in items]
    tokenize = tokenizer()
    return lambda items: (
        torch.stack([prepare(item["image"]) for item in items]),
        torch.stack([tokenize(item["caption"])[0] for item in items]),
    )


def open_clip_loader(folder: Path, case: dict[str, Any]) -> Iterable[Batch]:
    """Return open_clip's training loader; for bytes, the same stages up to decoding."""
    import webdataset as wds
    from open_clip_train import data

    shards = sorted(map(str, folder.glob("*.tar")))
    pattern = f"{folder}/{{00000..{len(shards) - 1:05d}}}.tar"
    if case["mode"] == "images":
        args = Namespace(
            train_data=pattern,
            train_num_samples=case["samples"],
            train_data_upsampling_factors=None,
            dataset_resampled=False,
            seed=0,
            batch_size=BATCH,
            workers=case["workers"],
            world_size=1,
        )
        return data.get_wds_dataset(args, prepare, is_train=True, tokenizer=tokenizer()).dataloader
    stages = [
        wds.SimpleShardList(pattern),
        data.detshuffle2(bufsize=data._SHARD_SHUFFLE_SIZE, initial=data._SHARD_SHUFFLE_INITIAL, seed=0, epoch=0),
        wds.split_by_node,
        wds.split_by_worker,
        data.tarfile_to_samples_nothrow,
        wds.shuffle(bufsize=data._SAMPLE_SHUFFLE_SIZE, initial=data._SAMPLE_SHUFFLE_INITIAL),
        wds.select(data.filter_no_caption_or_no_image),
        wds.rename(image="jpg;png;jpeg;webp", text="txt"),
        wds.to_tuple("image", "text"),
        wds.batched(BATCH, collation_fn=None, partial=False),
    ]
    return wds.WebLoader(wds.DataPipeline(*stages), batch_size=None, num_workers=case["workers"])


def datasets_loader(folder: Path, case: dict[str, Any]) -> Iterable[Batch]:
    """Return `datasets` streaming with a shuffle buffer as large as open_clip's, decoded by this package."""
    import datasets

    datasets.disable_progress_bar()
    kind = case["side"].split()[1]
    files = sorted(map(str, folder.glob(f"*.{kind}")))
    builder = "webdataset" if kind == "tar" else "parquet"
    stream = datasets.load_dataset(builder, data_files=files, split="train", streaming=True)
    stream = stream.cast_column("jpg" if kind == "tar" else "image", datasets.Image(decode=False))
    if case.get("start"):
        stream = stream.skip(case["start"])
    else:
        stream = stream.shuffle(seed=0, buffer_size=5000)
    make = collator(case["mode"] == "images")

    def batch(rows: Sequence[dict[str, Any]]) -> Batch:
        items = [
            {"image": row["jpg"]["bytes"], "caption": row["txt"]}
            if kind == "tar"
            else {"image": row["image"]["bytes"], "caption": row["caption"]}
            for row in rows
        ]
        if case["mode"] == "images":
            items = [{**item, "image": load_image(item["image"])} for item in items]
        return make(items)

    return torch.utils.data.DataLoader(stream, batch_size=BATCH, num_workers=case["workers"], collate_fn=batch)


def loader_of(case: dict[str, Any]) -> Iterable[Batch]:
    """Return a case's loader."""
    side, kind = case["side"].split()
    folder = Path(case["folder"]) / kind
    made = {"cloc_mllm": own_loader, "open_clip": open_clip_loader, "datasets": datasets_loader}[side]
    return made(folder, case)


# -- measuring --------------------------------------------------------------------------------------------------------


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Measure one case."""
    torch.set_num_threads(1)
    if "side" in case:
        next(_short(case))  # what is imported and made once is no part of reading
    if case["what"] == "resume":
        start = time.perf_counter()
        next(iter(loader_of(case)))
        return {"seconds": time.perf_counter() - start}
    if case["what"] == "passes":
        return {"sides": take_turns(case)}
    return one_pass(case)


def take_turns(case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Let every side make its passes in turn; return the medians of each, or why it cannot."""
    taken: dict[str, list[dict[str, Any]]] = {side: [] for side in case["sides"]}
    failed: dict[str, dict[str, Any]] = {}
    for _ in range(case["repeats"]):
        for side, found in taken.items():
            if side in failed:
                continue
            try:
                next(_short({**case, "side": side}))
                found.append(one_pass({**case, "side": side}))
            except ImportError as error:
                failed[side] = {"failed": str(error)}
    keys = ("seen", "seconds", "images_per_second", "cpu_ms_per_image")
    return {
        side: failed.get(side) or {key: median(result[key] for result in found) for key in keys}
        for side, found in taken.items()
    }


def one_pass(case: dict[str, Any]) -> dict[str, Any]:
    """Time one pass of one side."""
    start, used, seen = time.perf_counter(), _cpu_seconds(), 0
    for batch in loader_of(case):
        seen += len(batch[0]) if case["mode"] == "images" else len(batch)
    seconds, used = time.perf_counter() - start, _cpu_seconds() - used
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB
    rate = {"images_per_second": seen / seconds, "cpu_ms_per_image": 1000 * used / seen}
    return {"seconds": seconds, "seen": seen, **rate, "peak_mib": peak}


def _cpu_seconds() -> float:
    """Processor time of this process and of its workers that have ended: other load on the machine leaves it alone."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def _short(case: dict[str, Any]) -> Iterator[None]:
    """Do everything once that is done once a process."""
    if case["mode"] == "images":
        prepare(Image.new("RGB", (640, 480)))
        tokenizer()("a dog")
    side = case["side"].split()[0]
    if side == "open_clip":
        import open_clip_train.data  # noqa: F401
    if side == "datasets":
        import datasets  # noqa: F401
    yield


def multiply(folder: Path, times: int) -> Path:
    """Return a folder that holds the same shards many times over, as links."""
    large = folder / f"times{times}" / "tar"
    large.mkdir(parents=True)
    for copy in range(times):
        for shard in sorted((folder / "tar").iterdir()):
            name = shard.name.replace(".tar", f"-{copy:03d}.tar")
            os.link(shard, large / name)
    return large.parent


def main() -> None:
    """Measure every case, print the tables, write the JSON."""
    parser = argument_parser(__doc__)
    parser.add_argument("--samples", type=int, default=2048, help="pictures in the set")
    parser.add_argument("--in-shard", type=int, default=256, help="pictures in a shard")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="numbers of loader workers")
    parser.add_argument("--modes", nargs="+", default=["images", "bytes"], choices=("images", "bytes"))
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(run(json.loads(args.case))))
        return
    with tempfile.TemporaryDirectory(prefix="shards-") as name:
        folder = Path(name)
        write_shards(folder, args.samples, args.in_shard)
        base = {"folder": name, "samples": args.samples}
        passes = [
            {**base, "what": "passes", "mode": mode, "workers": workers, "repeats": args.repeats}
            | {"sides": [side for side in args.sides if mode == "bytes" or not side.startswith("datasets")]}
            for mode in args.modes
            for workers in args.workers
        ]
        resumes = [
            {**base, "what": "resume", "side": side, "mode": "bytes", "workers": 0, "start": args.samples * 3 // 4}
            for side in args.sides
            if not side.startswith("open_clip")
        ]
        small = {"what": "memory", "side": "cloc_mllm tar", "mode": "bytes", "workers": 0, "lanes": 16, "block": 16}
        memory = [{**base, **small}, {**base, **small}]
        memory[1] |= {"folder": str(multiply(folder, 20)), "samples": 20 * args.samples}
        results = by_side([run_case(__file__, case, args.timeout) for case in passes])
        results += measured(resumes, args.repeats, args.timeout)
        results += measured(memory, 1, 4 * args.timeout)
    report(results, args)


def by_side(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what was found in passes that took turns as one result for each side."""
    shown = []
    for result in results:
        for side in result["sides"]:
            found = {"failed": result["failed"]} if "failed" in result else result["sides"][side]
            known = {key: result[key] for key in ("mode", "workers", "samples")}
            shown.append({"what": "pass", "side": side, **known, **found})
    return shown


def measured(cases: Sequence[dict[str, Any]], repeats: int, timeout: float) -> list[dict[str, Any]]:
    """Run every case in turn, as often as asked, and return each with the medians of what it measured."""
    taken: list[list[dict[str, Any]]] = [[] for _ in cases]
    for _ in range(repeats):
        for case, found in zip(cases, taken, strict=True):
            if not any("failed" in result for result in found):
                found.append(run_case(__file__, case, timeout))
    combined = []
    for case, found in zip(cases, taken, strict=True):
        if "failed" in found[-1]:
            combined.append(found[-1])
            continue
        keys = [key for key in found[0] if key not in case]
        combined.append({**case, **{key: median(result[key] for result in found) for key in keys}})
    return [{key: value for key, value in result.items() if key != "folder"} for result in combined]


def report(results: Sequence[dict[str, Any]], args: Namespace) -> None:
    """Print the tables and write the JSON."""
    passes = {(r["mode"], r["workers"], r["side"]): r for r in results if r["what"] == "pass" and "failed" not in r}
    for mode in args.modes:
        heads = [f"{workers} workers" for workers in args.workers]
        table = [[mode, *(f"{head}{unit}" for head in heads for unit in (", images/s", ", ratio", ", CPU ms/image"))]]
        for side in args.sides:
            row = [side]
            for workers in args.workers:
                own, theirs = passes.get((mode, workers, side)), passes.get((mode, workers, "open_clip tar"))
                ratio = own["images_per_second"] / theirs["images_per_second"] if own and theirs else None
                row += [f"{own['images_per_second']:,.0f}" if own else "–", f"{ratio:.2f}" if ratio else "–"]
                row += [f"{own['cpu_ms_per_image']:.2f}" if own else "–"]
            table.append(row)
        print_table(table)
        print()
    print("ratio: to open_clip's pipeline\n")
    resumes = [result for result in results if result["what"] == "resume" and "seconds" in result]
    print_table(
        [["to the first batch after 3/4 of a pass", "s"], *([r["side"], f"{r['seconds']:.3f}"] for r in resumes)]
    )
    print()
    peaks = [result for result in results if result["what"] == "memory" and "peak_mib" in result]
    print_table(
        [["largest resident set", "MiB"], *([f"{r['samples']:,} samples", f"{r['peak_mib']:,.0f}"] for r in peaks)]
    )
    for found in results:
        if "failed" in found:
            print(f"{found['what']}, {found['side']}, {found['mode']}, {found['workers']} workers: {found['failed']}")
    write_report(args.out, "shard_reading", results)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
