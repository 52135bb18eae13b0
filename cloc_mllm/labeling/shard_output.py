"""The last step on a shard: detections are filtered, the shard is written, and a marker says that it is there.

A shard gets its name when it is complete and on the disk; its marker comes after it, with counts, sizes and statistics.
A shard without a marker is written again, to the same bytes.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cloc_mllm.data.readers import Sample
from cloc_mllm.data.schema import raise_first, region_text_problems
from cloc_mllm.data.tar_shards import INDEX_ENDING
from cloc_mllm.data.writers import JsonlWriter, SampleWriter, open_writer
from cloc_mllm.errors import ClocError
from cloc_mllm.labeling.files import STATE, Record, process_tag, put_in_place, write_json
from cloc_mllm.labeling.filtering import filter_detections
from cloc_mllm.labeling.sources import RawSample, problem_of, refused
from cloc_mllm.labeling.stages import Detection
from cloc_mllm.labeling.statistics import LabelStatistics

if TYPE_CHECKING:
    from cloc_mllm.labeling.steps import Job

Labelled = tuple[RawSample, tuple[int, int], Sequence[str], Sequence[Detection]]
"""A sample, its picture's width and height, its captions, and all that was detected."""


def done_marker(state: Path, shard: int) -> Path:
    """The file that says that a shard is written."""
    return state / "done" / f"{shard:05d}.json"


def read_marker(marker: Path, out: Path) -> Record | None:
    """What a marker says; None if there is none, it is damaged, or a file of its shard is not there in full."""
    try:
        found = json.loads(marker.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(found, dict) or "key" not in found:
        return None
    files = [(out / name, size) for name, size in found["files"].items()]
    return found if all(file.is_file() and file.stat().st_size == size for file, size in files) else None


def shard_paths(out: Path) -> list[Path]:
    """Every file of a shard in a folder that is ours alone, whether a marker tells of it or not."""
    patterns = ("regions-*.parquet", "regions-*.tar", f"regions-*.tar{INDEX_ENDING}", f"{STATE}/lines/*.jsonl")
    return [path for pattern in patterns for path in sorted(out.glob(pattern))]


def write_shard(
    job: Job,
    shard: int,
    keys: Mapping[str, str],
    inputs: Iterable[Labelled],
    facts: Mapping[str, Record],
    refusals: Sequence[Record],
) -> None:
    """Write one shard, then its marker.

    Args:
        job: The labelling.
        shard: Number of the shard.
        keys: Of all steps.
        inputs: What is to be written, in order.
        facts: What the steps before say of their work: `seconds`, `samples`, and what a detector counted as `tally`.
        refusals: Records of the samples that the steps before have left out.

    Raises:
        ClocError: A sample cannot be written, or a stage has left what is no region-text sample, and `on_bad_sample` is
            "error".
    """
    start = time.perf_counter()
    marker = done_marker(job.state, shard)
    marker.unlink(missing_ok=True)
    piece = job.state / f"piece-{shard:05d}-{process_tag()}"
    shutil.rmtree(piece, ignore_errors=True)
    counts: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    statistics = LabelStatistics()
    config, refusals = job.config, list(refusals)
    with _writer(job, shard, piece) as writer:
        for raw, size, captions, found in inputs:
            try:
                kept, reasons = filter_detections(found, size, config.filter)
                sample = _sample(raw, size, captions, kept, keep=config.regions == "keep")
                raise_first(region_text_problems(sample, size), raw.file, raw.name)
                writer.write({**sample, "image": raw.stored()})
            except ClocError as error:  # a writer raises it before it has written anything of the sample
                # The writer names where it writes; what can be mended is where the sample came from.
                refusals.append(refused(raw, ClocError(error.problem, remedy=error.remedy)))
                if config.on_bad_sample == "error":
                    raise problem_of(refusals[-1]) from error
                continue
            except ValueError as error:
                raise ClocError(f"cannot be written: {error}", file=raw.file, sample=raw.name) from error
            dropped.update(reasons)
            counts.update(samples_written=1, detections=len(found), regions_written=len(sample["regions"]))
            counts["regions_of_the_source"] += len(sample["regions"]) - len(kept)
            statistics.add(sample)
    files = _put_in_place(job, shard, piece)
    first, behind = job.range_of(shard)
    if behind - first != counts["samples_written"] + len(refusals):
        problem = f"read {behind - first} samples, wrote {counts['samples_written']} and left out {len(refusals)}"
        raise ClocError(problem, sample=f"shard {shard}", remedy=f"Remove {job.state} and label anew.")
    seconds = {step: found["seconds"] for step, found in facts.items()}
    samples = {step: found["samples"] for step, found in facts.items()}
    write_json(
        marker,
        {
            "key": keys["shards"],
            "keys": dict(keys),
            "files": files,
            "counts": {"samples_read": behind - first, "samples_skipped": len(refusals), **counts},
            "dropped": dict(dropped),
            "seconds": {**seconds, "shards": round(time.perf_counter() - start, 4)},
            "samples": {**samples, "shards": counts["samples_written"]},
            "phrases": facts["detections"].get("tally", {}),
            "skipped": [record["problem"] for record in sorted(refusals, key=lambda record: record["n"])],
            "statistics": statistics.to_dict(),
        },
    )


def _writer(job: Job, shard: int, piece: Path) -> SampleWriter:
    if job.config.format == "jsonl":
        # Its lines name pictures relative to the output folder, so that is where it has to write from.
        piece.mkdir(parents=True)
        return JsonlWriter(job.config.out, f"{STATE}/{piece.name}/regions-00000")
    return open_writer(piece, job.config.format, shard=job.config.shard)


def _put_in_place(job: Job, shard: int, piece: Path) -> dict[str, int]:
    """Give the files of a shard their names; return these, relative to the output folder, with their sizes."""
    out = Path(job.config.out)
    folder = job.state / "lines" if job.config.format == "jsonl" else out
    folder.mkdir(exist_ok=True)
    files = {}
    for file in sorted(piece.iterdir()):
        target = folder / file.name.replace("-00000", f"-{shard:05d}", 1)
        put_in_place(file, target)
        files[target.relative_to(out).as_posix()] = target.stat().st_size
    piece.rmdir()
    return files


def _sample(
    raw: RawSample, size: tuple[int, int], captions: Sequence[str], kept: Sequence[Detection], *, keep: bool
) -> Sample:
    """The region-text sample, its picture still by name."""
    source = raw.checked()
    # Two decimals are what the importers write; a pixel is not known better than that.
    found = [{"box": [round(v, 2) for v in d.box], "text": d.text, "score": round(d.score, 4)} for d in kept]
    sample: Sample = {
        "id": str(source.get("id") or raw.number),
        "image": source["image"],
        "width": size[0],
        "height": size[1],
        "caption": captions[0],
        "captions": list(captions),
        "regions": [*(source.get("regions") or () if keep else ()), *found],
    }
    if isinstance(source.get("source"), str):
        sample["source"] = source["source"]
    return sample
