"""`cloc-mllm data check`: every fault of a data set in one pass, and a contact sheet of what it holds.

Training stops at the first broken sample, hours in if it must; this goes on to the last one and says where each is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from cloc_mllm.data.dataset import open_image
from cloc_mllm.data.messages import Message, image_items, messages_of, problems_before_messages, with_mask_paths
from cloc_mllm.data.readers import NOT_SAMPLES, Sample, SampleSource, open_file, resolve_image, sample_name
from cloc_mllm.data.schema import (
    Problem,
    Size,
    box_problems,
    conversation_problems,
    kind_of,
    region_text_problems,
    text_problems,
)
from cloc_mllm.errors import ClocError

_CELL, _TEXT_HEIGHT, _MARGIN = 256, 44, 6
_PALETTE = ("#ff3b30", "#34c759", "#0a84ff", "#ffcc00", "#bf5af2", "#64d2ff", "#ff9f0a", "#ff6fae")


@dataclass
class CheckReport:
    """What a check found.

    Attributes:
        files: For each file its path, kind of samples, and numbers of samples, regions and broken samples.
        faults: The faults, in the order of the files.
    """

    files: list[dict[str, Any]] = field(default_factory=list)
    faults: list[ClocError] = field(default_factory=list)

    @property
    def samples(self) -> int:
        """Number of samples read."""
        return sum(entry["samples"] for entry in self.files)

    @property
    def broken(self) -> int:
        """Number of samples with at least one fault."""
        return sum(entry["broken"] for entry in self.files)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        faults = [
            {"file": fault.file, "sample": fault.sample, "problem": fault.problem, "remedy": fault.remedy}
            for fault in self.faults
        ]
        return {"files": self.files, "samples": self.samples, "broken": self.broken, "faults": faults}


class ImageSizes:
    """Sizes of images, each file decoded once however many samples show it."""

    def __init__(self) -> None:
        self._known: dict[Path, Size | Problem] = {}

    def __call__(self, image: Any, folder: Path | None) -> Size | Problem:
        """Width and height of an image after decoding it in full, or what is wrong with it."""
        place = resolve_image(image, folder)
        if isinstance(place, Path) and place in self._known:
            return self._known[place]
        found: Size | Problem
        try:
            found = open_image(image, folder, None, "").size
        except ClocError as error:
            found = Problem(error.problem, "Restore the file or remove the sample.")
        if isinstance(place, Path):
            self._known[place] = found
        return found


def sample_problems(sample: Sample, folder: Path | None, sizes: ImageSizes) -> list[Problem]:
    """All that is wrong with one sample, its images included.

    Args:
        sample: The raw sample.
        folder: Where its relative image paths start.
        sizes: Looks images up.
    """
    kind = kind_of(sample)
    found: list[Problem] = []
    messages: list[Message] = []
    if kind == "region-text":
        references = [sample.get("image")]
    else:
        found += problems_before_messages(sample)
        messages = [] if found else with_mask_paths(messages_of(sample), folder)
        references = image_items(messages) if messages else [sample["image"]] if "image" in sample else []
    looked_up = [sizes(reference, folder) for reference in references]
    found += [size for size in looked_up if isinstance(size, Problem)]
    known = [None if isinstance(size, Problem) else size for size in looked_up]
    if kind == "region-text":
        return found + list(region_text_problems(sample, known[0]))
    if messages or not found:
        found += conversation_problems(sample, messages, known, answered=kind == "conversation")
    if kind == "question":
        found += _question_problems(sample, known)
    return found


def _question_problems(sample: Sample, sizes: Sequence[Size | None]) -> Iterator[Problem]:
    size = sizes[0] if len(sizes) == 1 else None
    yield from text_problems(sample.get("answer"), "the answer")
    if "box" in sample:
        yield from box_problems(sample["box"], size, "the box to be found")
    for box in sample.get("boxes_in", ()):
        yield from box_problems(box, size, "a box asked about")


def checkable_files(path: str | Path) -> list[Path]:
    """The sample files of a path: itself; or those in a folder; or, if it has none, those in its sub-folders.

    Raises:
        ClocError: There is nothing to check.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ClocError("no such file or folder", file=path, remedy="Check the path.")
    for pattern in ("*", "*/*"):
        files = [
            file
            for file in sorted(path.glob(pattern))
            if file.suffix in (".jsonl", ".parquet", ".tar", ".json") and file.name not in NOT_SAMPLES
        ]
        if files:
            return files
    raise ClocError(
        "the folder holds no samples", file=path, remedy="Samples are in .jsonl, .json, .parquet or .tar files."
    )


def check_data(path: str | Path, progress: bool = True) -> CheckReport:
    """Looks at every sample of a file or folder and at every image it names.

    Args:
        path: A file of samples, a folder of such files, or a folder of splits.
        progress: Show a progress bar, if standard error is a terminal.

    Returns:
        All faults; none of them is raised.

    Raises:
        ClocError: There is nothing to check at `path`.
    """
    report, sizes = CheckReport(), ImageSizes()
    for file in checkable_files(path):
        entry: dict[str, Any] = {"file": str(file), "kind": None, "samples": 0, "regions": 0, "broken": 0}
        report.files.append(entry)
        try:
            source = open_file(file)
        except ClocError as error:
            report.faults.append(error)
            continue
        if len(source) == 0:
            report.faults.append(ClocError("the file holds no samples", file=file, remedy="Remove it or fill it."))
        for index in tqdm(range(len(source)), desc=file.name, unit="sample", disable=None if progress else True):
            faults = _check_one(source, index, sizes, entry)
            entry["broken"] += bool(faults)
            report.faults += faults
    return report


def _check_one(source: SampleSource, index: int, sizes: ImageSizes, entry: dict[str, Any]) -> list[ClocError]:
    """The faults of one sample, which is counted in its file's entry."""
    entry["samples"] += 1
    place, number = source.where(index)
    try:
        sample = source[index]
    except ClocError as error:
        return [error]
    entry["kind"] = entry["kind"] or kind_of(sample)
    entry["regions"] += len(_labelled_boxes(sample))
    name = sample_name(sample, number)
    return [problem.error(place, name) for problem in sample_problems(sample, source.folder(index), sizes)]


def _labelled_boxes(sample: Sample) -> list[tuple[list[float], str]]:
    """Boxes of a sample's (first) image with their texts; malformed ones are left to the checks."""
    if kind_of(sample) == "region-text":
        regions = sample.get("regions")
        pairs: list[tuple[Any, str]] = [
            (region.get("box"), str(region.get("text", "")))
            for region in (regions if isinstance(regions, list) else ())
            if isinstance(region, dict)
        ]
    elif next(problems_before_messages(sample), None) is not None:
        return []
    else:
        pairs = [
            (item.get("box"), str(item.get("phrase", "?")))
            for message in messages_of(sample)
            if isinstance(message, dict) and isinstance(message.get("content"), list)
            for item in message["content"]
            if isinstance(item, dict) and item.get("type") == "region" and item.get("image", 0) == 0
        ]
    return [(list(box), text) for box, text in pairs if next(box_problems(box, None), None) is None]


def _title(sample: Sample) -> str:
    """What a contact sheet says below a picture."""
    if kind_of(sample) == "region-text":
        return str(sample.get("caption", ""))
    turns = []
    for message in messages_of(sample)[:2]:
        content = message["content"]
        items = [{"type": "text", "text": content}] if isinstance(content, str) else content
        turns.append("".join(item.get("text", f"<{item['type']}>") for item in items if item["type"] != "image"))
    return " / ".join([*turns, *([str(sample["answer"])] if "answer" in sample else [])])


def draw_sheet(path: str | Path, out: str | Path, count: int = 24) -> int:
    """Draws a contact sheet: pictures with their boxes, texts and captions.

    Args:
        path: A file or folder as for `check_data`.
        out: The picture to write (.png or .jpg).
        count: Most samples to show, evenly spread over each file; files that cannot be shown are left out.

    Returns:
        The number of samples shown.

    Raises:
        ClocError: Nothing could be shown, or `out` cannot be written.
    """
    cells: list[Image.Image] = []
    files = checkable_files(path)
    for number, file in enumerate(files):
        share = (count - len(cells)) // (len(files) - number)
        cells += list(_cells(file, share))
    if not cells:
        raise ClocError("no sample has a picture that could be drawn", file=path, remedy="See the faults listed.")
    columns = min(6, len(cells))
    rows = -(-len(cells) // columns)
    height = _CELL + _TEXT_HEIGHT
    sheet = Image.new("RGB", (columns * (_CELL + _MARGIN) + _MARGIN, rows * (height + _MARGIN) + _MARGIN), "white")
    for k, cell in enumerate(cells):
        sheet.paste(cell, (_MARGIN + k % columns * (_CELL + _MARGIN), _MARGIN + k // columns * (height + _MARGIN)))
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        sheet.save(out)
    except (OSError, ValueError) as error:
        raise ClocError(f"cannot write the sheet: {error}", file=out, remedy="Name a writable .png file.") from error
    return len(cells)


def _cells(file: Path, count: int) -> Iterator[Image.Image]:
    """Up to `count` cells of a contact sheet, from samples evenly spread over a file."""
    try:
        source = open_file(file)
    except ClocError:
        return  # The check has reported this file already; there is nothing in it to draw.
    step = max(1, len(source) // max(1, count))
    shown = 0
    for index in range(0, len(source), step):
        if shown == count:
            return
        try:
            sample = source[index]
            if kind_of(sample) != "region-text" and sample_problems(sample, source.folder(index), ImageSizes()):
                continue  # Without sound messages there is nothing to lay out; the check lists why.
            references = [sample.get("image")] if "image" in sample else image_items(messages_of(sample))
            image = open_image(references[0] if references else None, source.folder(index), None, "")
        except ClocError:
            continue  # Likewise reported by the check.
        shown += 1
        yield _cell(image, sample)


def _cell(image: Image.Image, sample: Sample) -> Image.Image:
    scale = _CELL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    cell = Image.new("RGB", (_CELL, _CELL + _TEXT_HEIGHT), "white")
    cell.paste(image.resize(size, Image.Resampling.BICUBIC if scale < 1 else Image.Resampling.NEAREST), (0, 0))
    draw, font = ImageDraw.Draw(cell), ImageFont.load_default(11)
    for k, (box, text) in enumerate(_labelled_boxes(sample)):
        colour = _PALETTE[k % len(_PALETTE)]
        corners = [value * scale for value in box]
        draw.rectangle(corners, outline=colour, width=2)
        place = (max(0.0, corners[0]), max(0.0, corners[1] - 13))
        draw.rectangle(draw.textbbox(place, text, font), fill="black")
        draw.text(place, text, fill=colour, font=font)
    for row, line in enumerate(_wrapped(_title(sample), draw, font)[:3]):
        draw.text((2, _CELL + 1 + 14 * row), line, fill="black", font=font)
    return cell


def _wrapped(text: str, draw: ImageDraw.ImageDraw, font: Any) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font) > _CELL - 4 and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
