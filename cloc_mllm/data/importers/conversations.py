"""What the importers of conversations share: reading, checking, counting and writing; each adds only its own format.

Nothing is lost in silence: samples read = samples written + samples skipped, and a sample that breaks a rule stops the
conversion by name, or with `--on-bad-sample skip` is left out, counted, and listed with its fault in `skipped.txt`.
What comes out is the messages format, boxes in pixels of the original image, checked by the rules that training reads
by. `dataset.json` beside it states source, licence, frame and counts.

Samples are converted by ranges, in several processes, and a conversion that was stopped goes on where it was. A list in
one `.json` is first laid out on disk a line a sample, so memory does not grow with it.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from cloc_mllm.data.importers.conversion import compared
from cloc_mllm.data.importers.json_stream import stream_items
from cloc_mllm.data.importers.pictures import Pictures
from cloc_mllm.data.readers import SampleSource, open_file, sample_name
from cloc_mllm.data.schema import cleaned, conversation_problems, raise_first
from cloc_mllm.data.sharded_output import Placed, ShardedOutput, require_positive
from cloc_mllm.errors import ClocError

SUFFIXES = (".json", ".jsonl", ".parquet")
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Origin:
    """Where a format comes from; written into `dataset.json`.

    Attributes:
        kind: Its name on the command line.
        source: The public page that defines it.
        licence: Of the data published in it.
        frame: The frame of its boxes, and what becomes of them.
        samples: What a whole known file must count; `None` for any other.
    """

    kind: str
    source: str
    licence: str
    frame: str
    samples: int | None = None


Translate = Callable[[Mapping[str, Any], Pictures, "Counter[str]"], Messages]
"""Turns one raw sample into messages, raising `ClocError` for what it cannot keep; counts what it changes. Image items
hold paths or bytes, as `Pictures.place` gives them."""


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments that all importers of conversations take."""
    parser.add_argument("src", metavar="SRC", type=Path, help=f"the annotations: a {', '.join(SUFFIXES)} file")
    parser.add_argument("--images", required=True, type=Path, metavar="DIR", help="folder that image names start from")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write to")
    add_output_arguments(parser)


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments that say how conversations are written; `common_options` reads them."""
    parser.add_argument("--format", default="jsonl", choices=("jsonl", "parquet"), help="default: %(default)s")
    parser.add_argument("--copy-images", action="store_true", help="with jsonl: copy the pictures into OUT/images")
    parser.add_argument(
        "--on-bad-sample", default="error", choices=("error", "skip"), help="skip: leave out, count and list it"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--shard", type=int, default=4096, help="samples to a shard (default: %(default)s)")


def common_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `convert_conversations` that parsed arguments hold."""
    return {
        "file_format": args.format,
        "copy_images": args.copy_images,
        "on_bad_sample": args.on_bad_sample,
        "workers": args.workers,
        "shard": args.shard,
    }


def read_samples(path: str | Path) -> Iterator[tuple[Any, str]]:
    """Yields the raw samples of a file and where each stands, without holding the file in memory.

    A line that cannot be read comes as the `ClocError` that says so, in the sample's place: the lines behind it can be.

    Raises:
        ClocError: The file is missing, malformed or of another kind.
    """
    path = Path(path)
    _check_kind(path)
    if path.suffix == ".json":
        for number, sample in enumerate(stream_items(path)):
            yield sample, f"entry {number}"
        return
    source = open_file(path)
    yield from (_entry(source, number) for number in range(len(source)))


def _check_kind(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise ClocError(f"cannot tell what '{path.name}' is", file=path, remedy=f"Readable are {', '.join(SUFFIXES)}.")


def _entry(source: SampleSource, number: int) -> tuple[Any, str]:
    """A raw sample, or the `ClocError` that says why it cannot be read, and where it stands."""
    where = source.where(number)[1]
    try:
        return source[number], where
    except ClocError as error:
        return error, where


def convert_conversations(
    src: str | Path,
    images: str | Path,
    out: str | Path,
    origin: Origin,
    translate: Translate,
    *,
    read: Callable[[Path], Iterator[tuple[Any, str]]] = read_samples,
    file_format: str = "jsonl",
    copy_images: bool = False,
    on_bad_sample: str = "error",
    workers: int = 1,
    shard: int = 4096,
    progress: bool = True,
) -> dict[str, Any]:
    """Converts a file of conversations to the messages format.

    Args:
        src: The annotations.
        images: Folder that image names start from.
        out: Folder to write to.
        origin: What is converted.
        translate: The format's own part.
        read: Yields the raw samples of `src` and where each stands; another than the default yields what JSON can hold.
        file_format: "jsonl" or "parquet".
        copy_images: With "jsonl", copy the pictures beside it instead of referring to them.
        on_bad_sample: "error" stops at the first sample that breaks a rule; "skip" leaves it out and lists it.
        workers: Processes; changes nothing but the time.
        shard: Samples of the source to a shard.
        progress: Show a progress bar, if standard error is a terminal.

    Returns:
        What is also written to `dataset.json`: exact counts, source, licence and frame.

    Raises:
        ClocError: A file that cannot be read or written; without "skip", a bad sample, by name; options that make no
            sense.
    """
    require_positive(shard=shard, workers=workers)
    src, out = Path(src), Path(out)
    _check_kind(src)
    if not src.is_file():
        raise ClocError("cannot read the file: no such file", file=src, remedy="Check the path.")
    output = ShardedOutput(out, "conversations", file_format, copy_images, shard)
    counts: Counter[str] = Counter()
    try:
        known = (str(src.resolve()), src.stat().st_size, src.stat().st_mtime_ns, str(Path(images).resolve()))
        output.begin([asdict(origin), _told(translate), _told(read), known, {**vars(output)}, on_bad_sample])
        laid_out = _laid_out(src, read, output.state)
        job = _Job(src, laid_out, Path(images), translate, on_bad_sample)
        _opened.cache_clear()  # the file may be another one by now
        shards = -(-len(_opened(laid_out or src, job.images)[0]) // shard)
        write = partial(_write_shard, job, output)
        for found in output.run(write, shards, workers=workers, progress=progress, label=origin.kind):
            counts.update(found)  # and not "+=", which drops what stayed at zero
        counts["samples_skipped"] = counts.pop("samples_skipped", 0)
        stated = {key: value for key, value in asdict(origin).items() if key != "samples"}
        result: dict[str, Any] = {**stated, "format": file_format, "counts": dict(counts)}
        if origin.samples is not None:
            result |= compared(src, origin.kind, src.stem, {"samples_read": origin.samples}, counts)
        _join_skipped(output, shards, counts["samples_skipped"])
        output.finish(shards, result)
    except OSError as error:
        raise ClocError(f"cannot write: {error.strerror or error}", file=error.filename or out) from error
    return result


def _told(function: Callable[..., Any]) -> list[Any]:
    """What a function is, and what it is given, the same in every process."""
    inner = function.func if isinstance(function, partial) else function
    return [inner.__module__, inner.__qualname__, function.keywords if isinstance(function, partial) else {}]


@dataclass(frozen=True)
class _Job:
    """What every process must know: `laid_out` is the file of :func:`_laid_out`, or `None`."""

    src: Path
    laid_out: Path | None
    images: Path
    translate: Translate
    on_bad_sample: str


def _laid_out(src: Path, read: Callable[[Path], Iterator[tuple[Any, str]]], state: Path) -> Path | None:
    """A file with a line for each raw sample, `{"raw", "where"}`; `None` if the source can be read at any place."""
    if src.suffix != ".json" and read is read_samples:
        return None
    path = state / "entries.jsonl"
    if not path.exists():
        part = path.with_suffix(".part")
        with part.open("w", encoding="utf-8") as file:
            for raw, where in read(src):
                file.write(json.dumps({"raw": raw, "where": where}) + "\n")
        part.replace(path)
    return path


@lru_cache(maxsize=1)
def _opened(path: Path, images: Path) -> tuple[SampleSource, Pictures]:
    """Source and pictures, opened once in each process."""
    return open_file(path), Pictures(images)


def _write_shard(job: _Job, output: ShardedOutput, number: int) -> None:
    """Write the shard of a number, in whatever process this is; what is skipped is listed beside it."""
    source, pictures = _opened(job.laid_out or job.src, job.images)

    def samples(counts: Counter[str]) -> Iterator[Placed]:
        with _skipped(output, number).open("w", encoding="utf-8", errors="backslashreplace") as skipped:
            for index in range(number * output.shard, min((number + 1) * output.shard, len(source))):
                raw, where = _entry(source, index)
                if job.laid_out:
                    raw, where = raw["raw"], raw["where"]
                counts["samples_read"] += 1
                of_sample: Counter[str] = Counter()
                try:
                    sample = _convert(raw, where, job.src, pictures, job.translate, of_sample)
                except ClocError as error:
                    if job.on_bad_sample == "error":
                        raise
                    skipped.write(" ".join(str(error).split()) + "\n")
                    counts["samples_skipped"] += 1
                    continue
                counts.update(of_sample)
                counts["samples_written"] += 1
                yield sample, None

    output.write(number, samples)


def _skipped(output: ShardedOutput, number: int) -> Path:
    return output.state / f"skipped-{number:05d}.txt"


def _join_skipped(output: ShardedOutput, shards: int, count: int) -> None:
    """Write `skipped.txt`, if anything was skipped."""
    target = output.out / "skipped.txt"
    target.unlink(missing_ok=True)
    if count:
        part = target.with_suffix(".txt.part")
        with part.open("wb") as joined:
            for number in range(shards):
                with _skipped(output, number).open("rb") as piece:
                    shutil.copyfileobj(piece, joined)
        part.replace(target)


def _convert(
    raw: Any, where: str, src: Path, pictures: Pictures, translate: Translate, counts: Counter[str]
) -> dict[str, Any]:
    """One sample in the messages format, checked; what it changed is in `counts`."""
    name = sample_name(raw if isinstance(raw, Mapping) else None, where)
    if isinstance(raw, ClocError):
        raise raw
    if not isinstance(raw, Mapping):
        raise ClocError("not a JSON object", file=src, sample=name, remedy="A sample is an object, {...}.")
    try:
        messages = translate(raw, pictures, counts)
        places = [item["image"] for message in messages for item in message["content"] if item["type"] == "image"]
        sizes = [pictures.size(place) for place in places]
    except ClocError as error:
        problem = f"{error.file}: {error.problem}" if error.file else error.problem
        raise ClocError(problem, file=src, sample=name, remedy=error.remedy) from error
    for item in (item for message in messages for item in message["content"]):
        for key in ("text", "phrase"):
            if isinstance(item.get(key), str):
                item[key] = cleaned(item[key], counts)
    sample = {"id": str(raw.get("id", where.replace(" ", "-"))), "messages": messages}
    raise_first(conversation_problems(sample, messages, sizes), str(src), name)
    counts["images"] += len(places)
    counts["text_only"] += not places
    for message in messages:
        number = sum(item["type"] == "region" for item in message["content"])
        counts["regions_shown" if message["role"] == "user" else "regions_to_be_found"] += number
    return sample


def clip_box(box: Any, size: tuple[int, int], counts: Counter[str]) -> list[float]:
    """A box of four numbers in pixels, clipped to its picture; anything else is left for the schema to name.

    Annotations that count pixels put a border at the width or one beyond: that is clipped and counted. What lies
    outside altogether loses its area here, and is refused for that.
    """
    if not isinstance(box, (list, tuple)) or len(box) != 4 or not all(isinstance(v, (int, float)) for v in box):
        return box
    clipped = [min(max(float(value), 0.0), float(limit)) for value, limit in zip(box, (*size, *size), strict=True)]
    counts["boxes_clipped"] += any(abs(a - b) > 0.01 for a, b in zip(box, clipped, strict=True))
    return [round(value, 3) for value in clipped]
