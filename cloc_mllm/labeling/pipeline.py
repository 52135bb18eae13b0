"""VESL from end to end: pictures → captions → phrases → detections → region-text shards, and a report.

Everything goes shard by shard through the steps of `cloc_mllm.labeling.steps`, on the engine asked for. What is done
lies in `OUT/.label`; a run that was stopped in any way goes on from there when the same command is given again, and
ends in the same shards, byte for byte.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from cloc_mllm import __version__
from cloc_mllm.data.files import is_url
from cloc_mllm.errors import ClocError
from cloc_mllm.labeling.config import LabelConfig
from cloc_mllm.labeling.engines.local import run_local
from cloc_mllm.labeling.files import STATE, Locks, Record, atomic_writer, is_leftover, write_json
from cloc_mllm.labeling.report import write_reports
from cloc_mllm.labeling.shard_output import done_marker, read_marker, shard_paths
from cloc_mllm.labeling.sources import plan_source
from cloc_mllm.labeling.statistics import LabelStatistics
from cloc_mllm.labeling.steps import STEPS, Job

_VERSIONED = ("torch", "transformers", "pillow", "pyarrow", "numpy")
_WRITTEN = ("dataset.json", "report.json", "report.md", "report.html", "skipped.txt", "regions.jsonl")
"""What `finish` writes, beside the shards; the first of it comes last."""
_COUNTS = (
    "samples_read",
    "samples_written",
    "samples_skipped",
    "detections",
    "regions_written",
    "regions_of_the_source",
)


def label(
    config: LabelConfig, part: tuple[int, int] | None = None, *, finish_only: bool = False, progress: bool = True
) -> dict[str, Any] | None:
    """Label pictures.

    Args:
        config: What, how and where to.
        part: `(k, n)`: only every n-th shard, from the k-th on (from 0), beside n - 1 other processes that take the
            others. Whoever is last writes `dataset.json` and the report.
        finish_only: Do no step; write `dataset.json` and the report of shards that are all there.
        progress: Show progress bars, if standard error is a terminal.

    Returns:
        What `dataset.json` holds; None if there are shards left that others take.

    Raises:
        ClocError: Bad input, a stage that cannot be built or fails, another process at work on the same folder.
    """
    out = Path(config.out).absolute()
    if not is_url(config.source) and Path(config.source).absolute() == out:
        raise ClocError("the source and the output are one folder", file=out, remedy="Choose another one with --out.")
    config = config.model_copy(update={"out": str(out)})
    locks = Locks(out / STATE)
    try:
        if part is None:
            locks.require("run")
        job = Job(config, plan_source(config.source, out / STATE))
        if config.format == "jsonl" and any(file.endswith((".tar", ".parquet")) for file in job.plan.files):
            remedy = "Write shards that hold them too: --format parquet or webdataset."
            raise ClocError("JSON lines name pictures, and these are held in shards", file=config.source, remedy=remedy)
        _enter(job, locks, part, finish_only=finish_only)
        mine = range(job.shards)[part[0] :: part[1]] if part is not None else range(job.shards)
        if not finish_only and mine:
            _engine(config)(job, mine, progress)
        return _finish(job) if part is None or _is_last(job, locks) else None
    finally:
        locks.release()


def _engine(config: LabelConfig) -> Any:
    if config.engine == "local":
        return run_local
    from cloc_mllm.labeling.engines.ray_data import run_ray

    return run_ray


def _enter(job: Job, locks: Locks, part: tuple[int, int] | None, *, finish_only: bool) -> None:
    """Take the folder, clear away what killed runs have left half-written, and record what is asked for.

    Parts come in one after the other, so that the first of them finds itself alone.
    """
    out, options = Path(job.config.out), job.state / "options.json"
    if part is not None:
        locks.take("door", wait=True)
    alone = part is None or locks.take("run")
    asked = {"options": job.config.output_options(), "fingerprint": job.plan.fingerprint}
    before = json.loads(options.read_text(encoding="utf-8")) if options.exists() else None
    if before is None:
        _refuse_foreign(out)
    if before != asked and (finish_only or not alone):
        remedy = "Give the same command as they were given, or wait until they are done."
        raise ClocError("the shards here are made with other options or of another source", file=out, remedy=remedy)
    if alone:
        leftovers = [*job.state.glob("*.part"), *job.state.glob("*/*.part"), *out.glob("*.part")]
        for path in filter(is_leftover, [*leftovers, *job.state.glob("piece-*")]):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if before != asked:
        if before is not None:
            _clear(job, out)
        write_json(options, asked)
    if part is not None:
        locks.release("run")
        locks.require("run", shared=True)
        locks.require(f"part-{part[0]}-of-{part[1]}")
        locks.release("door")


def _refuse_foreign(out: Path) -> None:
    """Refuse a folder with data of others in it."""
    for kind in ("*.parquet", "*.tar", "*.jsonl"):
        for path in sorted(out.glob(kind)):
            raise ClocError(f"the folder holds {path.name} already", file=out, remedy="Choose another one with --out.")


def _is_last(job: Job, locks: Locks) -> bool:
    """Whether all shards are there and no other part at work: each lets go, then asks, so that the last one knows."""
    locks.release()
    locks.take("door", wait=True)
    out = Path(job.config.out)
    return locks.take("run") and all(
        read_marker(done_marker(job.state, shard), out) is not None for shard in range(job.shards)
    )


def _clear(job: Job, out: Path) -> None:
    """Remove labels of other options: shards and markers, not what the stages have answered.

    A run that was killed between a shard and its marker leaves a shard that no marker tells of: all go.
    """
    if (out / "dataset.json").exists() and not job.config.overwrite:
        remedy = "Choose another --out; or --overwrite, which uses again what its stages have answered where it can."
        raise ClocError("the folder holds a finished set of other options or another source", file=out, remedy=remedy)
    lists = [path for path in job.state.glob("pictures*.jsonl") if str(path) not in job.plan.files]
    for path in [*(out / name for name in _WRITTEN), *(job.state / "done").glob("*.json"), *shard_paths(out), *lists]:
        path.unlink(missing_ok=True)


# -- when all shards are there ----------------------------------------------------------------------------------------


def _markers(job: Job) -> Iterator[Record]:
    """What is known of each shard, in order."""
    for shard in range(job.shards):
        marker = read_marker(done_marker(job.state, shard), Path(job.config.out))
        if marker is None:
            remedy = "Run the part that it belongs to (again)."
            problem = f"shard {shard} of {job.shards} is not done, or its files are not there in full"
            raise ClocError(problem, file=job.config.out, remedy=remedy)
        yield marker


def _finish(job: Job) -> dict[str, Any]:
    """Write what speaks of the whole set: the joined lines, `skipped.txt`, the report, and last `dataset.json`."""
    out = Path(job.config.out)
    counts, dropped = Counter(dict.fromkeys(_COUNTS, 0)), Counter[str]()
    seconds, samples, phrases = Counter[str](), Counter[str](), Counter[str]()
    statistics, keys, files, examples = LabelStatistics(), None, list[str](), list[str]()
    with atomic_writer(out / "skipped.txt") as skipped:
        for number, marker in enumerate(_markers(job)):
            if keys not in (None, marker["keys"]):
                remedy = "Stages, models or versions differed: give the same command again, without --shards."
                raise ClocError(f"shard {number} was made by other stages than shard 0", file=out, remedy=remedy)
            keys = marker["keys"]
            counts.update(marker["counts"])
            dropped.update(marker["dropped"])
            seconds.update(marker["seconds"])
            samples.update(marker["samples"])
            phrases.update(marker["phrases"])
            files += marker["files"]
            statistics.merge(marker["statistics"])
            for problem in marker["skipped"]:
                error = ClocError(**problem)
                skipped.write(f"{error}\n".encode())
                examples += [str(error)] if len(examples) < 20 else []
    for path in shard_paths(out):
        if path.relative_to(out).as_posix() not in files:
            remedy = "Remove it, and give the same command again: its samples would count twice."
            raise ClocError("is a shard that this labelling has not written", file=path, remedy=remedy)
    if not counts["samples_written"]:
        raise ClocError("no sample could be labelled", file=out / "skipped.txt", remedy="It lists why.")
    if not counts["samples_read"] == counts["samples_written"] + counts["samples_skipped"] == job.plan.total:
        raise ClocError("the shards do not add up to the source", file=out, remedy=f"Remove {job.state}; label anew.")
    if job.config.format == "jsonl":
        _join_lines(out, files)
    if not counts["samples_skipped"]:
        (out / "skipped.txt").unlink()
    assert keys is not None
    result = _description(job, keys, counts, dropped)
    timing = {"seconds": dict(seconds), "samples": dict(samples), "phrases": dict(phrases)}
    write_reports(out, result, statistics.summary(), timing, examples)
    write_json(out / "dataset.json", result)
    return result


def _join_lines(out: Path, files: Sequence[str]) -> None:
    with atomic_writer(out / "regions.jsonl") as joined:
        for name in files:
            with (out / name).open("rb") as piece:
                shutil.copyfileobj(piece, joined)


def _description(job: Job, keys: dict[str, str], counts: Counter[str], dropped: Counter[str]) -> dict[str, Any]:
    """What `dataset.json` says: enough to make the set again, and nothing that differs from run to run."""
    config, versions = job.config, {"cloc_mllm": __version__, "python": platform.python_version()}
    stages = {}
    for step, name in zip(STEPS[1:4], ("captioner", "phrases", "detector"), strict=True):
        identity = json.loads((job.state / f"{step}-{keys[step]}" / "identity.json").read_text(encoding="utf-8"))
        asked = job.stage_of(step)
        stages[name] = {"stage": asked.stage, "options": asked.options, "identity": identity}
    options = config.output_options()
    return {
        "kind": "vesl",
        "source": config.source,
        "format": config.format,
        "frame": "xyxy pixels of the original image",
        "shard": config.shard,
        "shards": job.shards,
        "stages": stages,
        "filter": options["filter"],
        "regions_in_the_source": config.regions,
        "on_bad_sample": config.on_bad_sample,
        "counts": {**counts, "files_ignored": job.plan.ignored},
        "detections_dropped": dict(sorted(dropped.items())),
        "versions": {**versions, **{name: metadata.version(name) for name in _VERSIONED}},
    }
