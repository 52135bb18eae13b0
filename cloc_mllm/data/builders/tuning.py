"""Conversations for tuning, made of region-text data in any format that can be read.

An image becomes one conversation of at most `--limit-per-image` turns of the kind asked for, or of several kinds by
weight (`mixed`). Every choice follows from the seed, the kind and the image's place in the data, so workers and stops
change nothing. Two texts of one picture are told apart by their words: a phrase that fits several things is never asked
for as if it were one. Images read = images written + without a question + bad ones left out.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from cloc_mllm.data.builders.absent import WAYS, Vocabulary
from cloc_mllm.data.builders.picture import SHAPES, Picture
from cloc_mllm.data.builders.turns import KINDS, Asker, Choices
from cloc_mllm.data.messages import Message
from cloc_mllm.data.readers import Sample, SampleSource, data_files, open_samples, resolve_image, sample_name
from cloc_mllm.data.schema import kind_of, raise_first, region_text_problems
from cloc_mllm.data.sharded_output import Placed, ShardedOutput, require_positive
from cloc_mllm.errors import ClocError

MIXED = "mixed"
SUMMARIES: dict[str, str] = {
    "referring": "what a region is: its name",
    "grounding": "where a phrase is that names one thing: its box",
    "description": "the picture's caption, then all that is said of a region",
    "multi-object": "all boxes of a phrase; all things of a picture with their boxes",
    "negatives": "whether something is there, and where something is that is not",
    MIXED: "all of these, by weight",
}
EXAMPLES: dict[str, str] = {
    "referring": "cloc-mllm data build referring data/coco --out data/coco-referring --shape mixed",
    "grounding": "cloc-mllm data build grounding data/refcoco --out data/refcoco-grounding",
    "description": "cloc-mllm data build description data/vg --out data/vg-description --limit-per-image 6",
    "multi-object": "cloc-mllm data build multi-object data/objects365 --out data/objects365-all --max-boxes 8",
    "negatives": "cloc-mllm data build negatives data/coco --out data/coco-negatives --absent adversarial",
    MIXED: "cloc-mllm data build mixed data/coco --out data/coco-mixed --weights referring=2 grounding=2 negatives=1",
}
COUNTS = ("images_read", "images_written", "images_without_question", "images_bad_left_out", "turns")
"""Counted for every kind, reported at zero too."""


@dataclass(frozen=True)
class BuildOptions:
    """What a person decides about conversations made of region-text data.

    Attributes:
        source: A file or folder of region-text data.
        out: Folder to write to.
        kind: A kind of question, or "mixed".
        weights: How often each kind is drawn for a turn, where it can still ask something.
        choices: How the turns look.
        limit: Most turns of a conversation.
        seed: Decides everything that is left open.
        file_format: "jsonl" or "parquet".
        copy_images: With "jsonl", copy the pictures beside it instead of referring to them.
        on_bad_sample: "error" stops at a sample that breaks a rule; "skip" leaves it out and counts it.
        workers: Processes.
        shard: Images of the source to a shard.
        progress: Show a progress bar, if standard error is a terminal.
    """

    source: Path
    out: Path
    kind: str
    weights: Mapping[str, float] = field(default_factory=dict)
    choices: Choices = field(default_factory=Choices)
    limit: int = 4
    seed: int = 0
    file_format: str = "jsonl"
    copy_images: bool = False
    on_bad_sample: str = "error"
    workers: int = 1
    shard: int = 4096
    progress: bool = True

    def __post_init__(self) -> None:
        require_positive(limit=self.limit, shard=self.shard, workers=self.workers)
        if self.choices.max_boxes < 2:
            raise ClocError(f"max_boxes is {self.choices.max_boxes}", remedy="Several boxes are at least 2.")
        if unknown := sorted(set(self.weights) - set(KINDS)):
            raise ClocError(f"there is no kind '{unknown[0]}'", remedy=f"There are {', '.join(KINDS)}.")
        if any(not weight > 0 for weight in self.weights.values()):
            raise ClocError("a weight is not positive", remedy="Leave out the kinds that are not wanted.")

    @property
    def kinds(self) -> dict[str, float]:
        """The kinds of question with their weights."""
        return dict(self.weights or dict.fromkeys(KINDS, 1.0)) if self.kind == MIXED else {self.kind: 1.0}


def add_arguments(parser: argparse.ArgumentParser, kind: str) -> None:
    """Declares the arguments of `cloc-mllm data build KIND`."""
    parser.add_argument("source", metavar="SOURCE", type=Path, help="region-text data: a file, or a folder")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="decides everything (default: %(default)s)")
    parser.add_argument("--limit-per-image", type=int, default=4, help="most turns to an image (default: %(default)s)")
    parser.add_argument(
        "--answers", default="plain", choices=("plain", "varied"), help="wording (default: %(default)s)"
    )
    if kind in ("referring", "description", MIXED):
        shapes = "how regions are shown; masks need --masks at the conversion (default: %(default)s)"
        parser.add_argument("--shape", default="box", choices=SHAPES, help=shapes)
    if kind in ("multi-object", MIXED):
        parser.add_argument("--max-boxes", type=int, default=8, help="most boxes of a phrase (default: %(default)s)")
    if kind in ("negatives", MIXED):
        ways = "absent names: any, frequent ones, or such as occur with what is there (default: %(default)s)"
        parser.add_argument("--absent", default="random", choices=WAYS, help=ways)
    if kind == MIXED:
        parser.add_argument(
            "--weights", nargs="+", type=_weight, default=[], metavar="KIND=W", help="default: all alike"
        )
    parser.add_argument("--format", default="jsonl", choices=("jsonl", "parquet"), help="default: %(default)s")
    parser.add_argument("--copy-images", action="store_true", help="with jsonl: copy the pictures into OUT/images")
    parser.add_argument("--on-bad-sample", default="error", choices=("error", "skip"), help="skip: leave out and count")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--shard", type=int, default=4096, help="images to a shard (default: %(default)s)")


def _weight(text: str) -> tuple[str, float]:
    kind, _, weight = text.partition("=")
    return kind, float(weight)


def build(args: argparse.Namespace) -> dict[str, Any]:
    """Builds what parsed arguments ask for."""
    given = {name: getattr(args, name) for name in ("shape", "answers", "max_boxes", "absent") if hasattr(args, name)}
    options = BuildOptions(
        args.source,
        args.out,
        args.kind,
        dict(getattr(args, "weights", ())),
        Choices(**given),
        args.limit_per_image,
        args.seed,
        args.format,
        args.copy_images,
        args.on_bad_sample,
        args.workers,
        args.shard,
    )
    return build_conversations(options)


def build_conversations(options: BuildOptions) -> dict[str, Any]:
    """Makes conversations of region-text data.

    Args:
        options: Of what, and how.

    Returns:
        What is also written to `dataset.json`: exact counts, where the data is from, and the options.

    Raises:
        ClocError: Data that cannot be read; without "skip", a bad sample, by name; or an output that cannot be written.
    """
    files = data_files(options.source)
    _opened.cache_clear()  # the file may be another one by now
    source = _opened(options.source)
    if len(source) == 0:
        raise ClocError("there are no samples", file=options.source, remedy="Check the path.")
    output = ShardedOutput(
        options.out, "conversations", options.file_format, options.copy_images, options.shard, ".build"
    )
    settings = {**asdict(options), "workers": 0, "progress": False}
    counts: Counter[str] = Counter()
    try:
        output.begin([settings, [(str(file.resolve()), file.stat().st_size) for file in files]])
        vocabulary = Vocabulary.of(source, options.seed) if "negatives" in options.kinds else None
        shards = -(-len(source) // options.shard)
        write = partial(_write_shard, options, output, vocabulary)
        for found in output.run(write, shards, workers=options.workers, progress=options.progress, label=options.kind):
            counts += found
        result = _report(options, counts)
        output.finish(shards, result)
    except OSError as error:
        raise ClocError(f"cannot write: {error.strerror or error}", file=error.filename or options.out) from error
    return result


@lru_cache(maxsize=1)
def _opened(path: Path) -> SampleSource:
    """The source, opened once in each process."""
    return open_samples(path)


def _write_shard(options: BuildOptions, output: ShardedOutput, vocabulary: Vocabulary | None, number: int) -> None:
    """Write the shard of a number, in whatever process this is."""
    source = _opened(options.source)

    def samples(counts: Counter[str]) -> Iterator[Placed]:
        for index in range(number * options.shard, min((number + 1) * options.shard, len(source))):
            counts["images_read"] += 1
            of_image: Counter[str] = Counter()
            try:
                sample = _conversation(source, index, options, vocabulary, of_image)
            except ClocError:
                if options.on_bad_sample == "error":
                    raise
                counts["images_bad_left_out"] += 1
                continue
            counts.update(of_image)
            counts["images_without_question" if sample is None else "images_written"] += 1
            if sample is not None:
                yield sample, source.folder(index)

    output.write(number, samples)


def _conversation(
    source: SampleSource, index: int, options: BuildOptions, vocabulary: Vocabulary | None, counts: Counter[str]
) -> Sample | None:
    """The conversation about one image, or `None` if there is nothing to ask."""
    raw = source[index]
    file, place = source.where(index)
    name = sample_name(raw, place)
    size = _measured(raw, source.folder(index), file, name)
    raise_first(region_text_problems(raw, size), file, name)
    draw = random.Random(f"{options.seed}-{options.kind}-{index}")
    asker = Asker(Picture(raw, size), options.choices, vocabulary, draw, counts)
    try:
        messages = _messages(asker, options)
    except ClocError as error:
        raise ClocError(error.problem, file=file, sample=name, remedy=error.remedy) from error
    counts["regions_read"] += len(raw["regions"])
    counts["boxes_read"] += len(asker.picture.things)
    counts["boxes_not_asked_about"] += len(asker.picture.free)
    if not messages:
        return None
    messages[0]["content"].insert(0, {"type": "image", "image": raw["image"]})
    counts["turns"] += len(messages) // 2
    identity = f"{raw.get('id', place.replace(' ', '-'))}-{options.kind}"
    origin = {"source": raw["source"]} if "source" in raw else {}
    return {"id": identity, "task": options.kind, "messages": messages, **origin}


def _measured(raw: Sample, folder: Path | None, file: str | None, name: str) -> tuple[int, int]:
    """Width and height of a sample's picture, from its header."""
    from cloc_mllm.data.importers.pictures import picture_size

    if kind_of(raw) != "region-text":
        remedy = "Questions are built of region-text data, such as `cloc-mllm data convert coco` writes."
        raise ClocError("is a conversation already", file=file, sample=name, remedy=remedy)
    if raw.get("image") is None:
        raise ClocError("the sample names no image", file=file, sample=name, remedy="Give it 'image'.")
    try:
        return picture_size(resolve_image(raw["image"], folder))
    except ClocError as error:
        where = f"{error.file}: " if error.file else ""
        raise ClocError(f"{where}{error.problem}", file=file, sample=name, remedy="Restore it, or skip it.") from error


def _messages(asker: Asker, options: BuildOptions) -> list[Message]:
    """Turns of the kinds asked for, a kind drawn by weight each time, until the limit or until none has any left."""
    asking = {kind: KINDS[kind](asker) for kind in options.kinds}
    messages: list[Message] = []
    while asking and len(messages) < 2 * options.limit:
        (kind,) = asker.draw.choices(list(asking), [options.kinds[one] for one in asking])
        found = next(asking[kind], None)
        if found is None:
            del asking[kind]
            continue
        asker.counts[f"turns_{kind.replace('-', '_')}"] += 1
        messages += found
    return messages


def _report(options: BuildOptions, counts: Counter[str]) -> dict[str, Any]:
    """What `dataset.json` says; licence and frame are those that the source's states."""
    folder = options.source if options.source.is_dir() else options.source.parent
    stated: Any = {}
    if (folder / "dataset.json").is_file():
        stated = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    known = {key: stated[key] for key in ("licence", "kind") if isinstance(stated, dict) and key in stated}
    shown = {name: counts[name] for name in COUNTS}
    shown |= {name: count for name, count in sorted(counts.items()) if name not in COUNTS}
    return {
        "kind": f"built: {options.kind}",
        "format": options.file_format,
        "frame": "xyxy pixels of the original image",
        "built_of": {"data": options.source.name, **known},
        "seed": options.seed,
        "limit_per_image": options.limit,
        "weights": options.kinds,
        **asdict(options.choices),
        "counts": shown,
    }
