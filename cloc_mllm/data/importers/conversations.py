"""What the importers of conversations share: reading, checking, counting and writing; each adds only its own format.

Nothing is lost in silence: samples read = samples written + samples skipped, and a sample that breaks a rule stops the
conversion by name, or with `--on-bad-sample skip` is left out, counted, and listed with its fault in `skipped.txt`.
What comes out is the messages format, boxes in pixels of the original image, checked by the rules that training reads
by. `dataset.json` beside it states source, licence, frame and counts.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cloc_mllm.data.importers.conversion import compared
from cloc_mllm.data.importers.json_stream import stream_items
from cloc_mllm.data.importers.pictures import Pictures
from cloc_mllm.data.readers import open_file, sample_name
from cloc_mllm.data.schema import cleaned, conversation_problems, raise_first
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
    parser.add_argument("--format", default="jsonl", choices=("jsonl", "parquet"), help="default: %(default)s")
    parser.add_argument("--copy-images", action="store_true", help="with jsonl: copy the pictures into OUT/images")
    parser.add_argument(
        "--on-bad-sample", default="error", choices=("error", "skip"), help="skip: leave out, count and list it"
    )


def common_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `convert_conversations` that parsed arguments hold."""
    return {"file_format": args.format, "copy_images": args.copy_images, "on_bad_sample": args.on_bad_sample}


def read_samples(path: str | Path) -> Iterator[tuple[Any, str]]:
    """Yields the raw samples of a file and where each stands, without holding the file in memory.

    A line that cannot be read comes as the `ClocError` that says so, in the sample's place: the lines behind it can be.

    Raises:
        ClocError: The file is missing, malformed or of another kind.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ClocError(f"cannot tell what '{path.name}' is", file=path, remedy=f"Readable are {', '.join(SUFFIXES)}.")
    if path.suffix == ".json":
        for number, sample in enumerate(stream_items(path)):
            yield sample, f"entry {number}"
        return
    source = open_file(path)
    for number in range(len(source)):
        where = source.where(number)[1]
        try:
            raw: Any = source[number]
        except ClocError as error:
            raw = error
        yield raw, where


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
    progress: bool = True,
) -> dict[str, Any]:
    """Converts a file of conversations to the messages format.

    Args:
        src: The annotations.
        images: Folder that image names start from.
        out: Folder to write to.
        origin: What is converted.
        translate: The format's own part.
        read: Yields the raw samples of `src` and where each stands.
        file_format: "jsonl" or "parquet".
        copy_images: With "jsonl", copy the pictures beside it instead of referring to them.
        on_bad_sample: "error" stops at the first sample that breaks a rule; "skip" leaves it out and lists it.
        progress: Show a progress bar, if standard error is a terminal.

    Returns:
        What is also written to `dataset.json`: exact counts, source, licence and frame.

    Raises:
        ClocError: A file that cannot be read or written; without "skip", a bad sample, by name.
    """
    from tqdm import tqdm

    from cloc_mllm.data.writers import open_writer

    src, out, pictures = Path(src), Path(out), Pictures(images)
    counts: Counter[str] = Counter()
    skipped: list[str] = []
    try:
        with open_writer(out, file_format, "conversations", copy_images) as writer:
            for raw, where in tqdm(read(src), unit=" samples", disable=None if progress else True):
                counts["samples_read"] += 1
                of_sample: Counter[str] = Counter()
                try:
                    sample = _convert(raw, where, src, pictures, translate, of_sample)
                except ClocError as error:
                    if on_bad_sample == "error":
                        raise
                    skipped.append(" ".join(str(error).split()))
                    continue
                counts.update(of_sample)
                counts["samples_written"] += 1
                writer.write(sample)
        counts["samples_skipped"] = len(skipped)
        stated = {key: value for key, value in asdict(origin).items() if key != "samples"}
        result: dict[str, Any] = {**stated, "format": file_format, "counts": dict(counts)}
        if origin.samples is not None:
            result |= compared(src, origin.kind, src.stem, {"samples_read": origin.samples}, counts)
        (out / "dataset.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        (out / "skipped.txt").unlink(missing_ok=True)
        if skipped:
            (out / "skipped.txt").write_text("\n".join(skipped) + "\n", encoding="utf-8")
    except OSError as error:
        raise ClocError(f"cannot write: {error.strerror or error}", file=error.filename or out) from error
    return result


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
