"""Contact sheets: pictures with their boxes, texts and captions, to look at what a data set holds."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from cloc_mllm.data.dataset import open_image
from cloc_mllm.data.inspection.faults import SampleView, problems_of, sound_boxes
from cloc_mllm.data.inspection.pictures import PictureSizes
from cloc_mllm.data.inspection.scan import SampleFiles
from cloc_mllm.data.inspection.texts import turn_text
from cloc_mllm.data.readers import Sample
from cloc_mllm.data.schema import kind_of
from cloc_mllm.errors import ClocError

CELL = 256
_LINES, _MARGIN, _MOST_COLUMNS = 3, 6, 6
_PALETTE = ("#ff3b30", "#34c759", "#0a84ff", "#ffcc00", "#bf5af2", "#64d2ff", "#ff9f0a", "#ff6fae")
_MISSING = "\u25a1"
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


class Pen:
    """Writes texts in one font, which has no glyphs for some scripts: such characters become squares, and are counted.

    Args:
        font_file: A TrueType or OpenType file; None for Pillow's own font, which has plain Latin letters only.
        size: Height in pixels.

    Attributes:
        line: Height of a line in pixels.

    Raises:
        ClocError: The font cannot be read.
    """

    def __init__(self, font_file: str | Path | None = None, size: int = 11) -> None:
        self.line = size + 3
        try:
            self.font: Font = ImageFont.load_default(size) if font_file is None else _load(font_file, size)
        except OSError as error:
            raise ClocError(f"cannot be read as a font: {error}", file=font_file, remedy="Name a .ttf file.") from error
        self.has = lru_cache(maxsize=1 << 14)(self._has)

    def _has(self, character: str) -> bool:
        if character.isspace():
            return True
        if not character.isprintable():
            return False
        try:
            return bytes(self.font.getmask(character)) != bytes(self.font.getmask("\U0010ffff"))
        except (UnicodeError, OSError, ValueError):
            return False  # Pillow without FreeType draws Latin-1 only

    def drawable(self, text: str) -> tuple[str, int]:
        """A text without the accents that the font lacks, a mark for each letter it lacks; and how many those are."""
        missing = _MISSING if self.has(_MISSING) else "?"
        shown, lost = [], 0
        for character in text:
            bare = character if self.has(character) else unicodedata.normalize("NFKD", character)[0]
            found = self.has(bare)
            lost += not found
            shown.append(bare if found else missing)
        return "".join(shown), lost

    def width(self, text: str) -> float:
        """Width of a text in pixels."""
        return self.font.getlength(text)

    def cut(self, text: str, width: float) -> str:
        """A text that is no wider than some pixels, with dots where its end is missing."""
        if self.width(text) <= width:
            return text
        low, high = 0, len(text)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.width(text[:middle] + "...") <= width else (low, middle - 1)
        return text[:low] + "..."

    def wrapped(self, text: str, width: float, lines: int) -> list[str]:
        """A text in at most so many lines; the last one ends with dots if there is more."""
        found, words = [""], text.split()
        for number, word in enumerate(words):
            longer = f"{found[-1]} {word}".strip()
            if self.width(longer) <= width or not found[-1]:
                found[-1] = longer
            elif len(found) < lines:
                found.append(word)
            else:
                found[-1] = self.cut(" ".join([found[-1], *words[number:]]), width)
                break
        return [self.cut(line, width) for line in found]


def _load(font_file: str | Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(font_file), size)


def title_of(sample: Sample) -> str:
    """What a contact sheet says below a picture: the caption, or the first turns and the answer."""
    if kind_of(sample) == "region-text":
        return str(sample.get("caption", ""))
    turns = [turn_text(message["content"]) for message in SampleView.of(sample, None).messages[:2]]
    return " / ".join([*turns, *([str(sample["answer"])] if "answer" in sample else [])])


def draw_sample(image: Image.Image, view: SampleView, pen: Pen, cell: int = CELL, caption: bool = True) -> Image.Image:
    """A picture of a sample with the boxes on its first image, and its caption or first turns below.

    Args:
        image: The sample's first image.
        view: The sample.
        pen: What to write with.
        cell: Longer side of the picture in pixels.
        caption: Write below; without, only the boxes are drawn and have their texts.

    Returns:
        An RGB picture: `cell` wide and a few lines higher, or without caption of the image's shape.
    """
    scale = cell / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    drawn = Image.new("RGB", (cell, cell + _LINES * pen.line + 2) if caption else size, "white")
    drawn.paste(image.resize(size, Image.Resampling.BICUBIC if scale < 1 else Image.Resampling.NEAREST), (0, 0))
    draw, missing = ImageDraw.Draw(drawn), 0
    blank = "" if view.kind == "region-text" else "?"
    boxes = [(region.shape, region.text or blank) for region in sound_boxes(view)]
    # Large boxes first and labels last: neither covers a small box or another label's box.
    marks = sorted(enumerate(boxes), key=lambda mark: -_area(mark[1][0]))
    for k, (box, _) in marks:
        corners = [min(max(value * scale, -4), cell + 4) for value in box]
        draw.rectangle(corners, outline=_PALETTE[k % len(_PALETTE)], width=2)
    taken: list[tuple[float, float, float, float]] = []
    for k, (box, text) in marks:
        shown, lost = pen.drawable(" ".join(text.split()))
        missing += lost
        if shown:
            shown = pen.cut(shown, cell - 4)
            place = _free_place([value * scale for value in box], pen.width(shown) + 2, pen.line - 1, size, taken)
            draw.rectangle(draw.textbbox(place, shown, pen.font), fill="black")
            draw.text(place, shown, fill=_PALETTE[k % len(_PALETTE)], font=pen.font)
    if not caption:
        return drawn
    shown, lost = pen.drawable(title_of(view.sample))
    missing += lost
    note = f" [{missing} characters the font lacks]" if missing else ""
    for row, line in enumerate(_caption(pen, shown, note, cell - 4)):
        draw.text((2, cell + 1 + pen.line * row), line, fill="black", font=pen.font)
    return drawn


def _caption(pen: Pen, text: str, note: str, width: float) -> list[str]:
    """The lines below a picture; the note keeps the last one for itself."""
    if not note:
        return pen.wrapped(text, width, _LINES)
    return [*pen.wrapped(text, width, _LINES - 1), pen.cut(note.strip(), width)]


def _area(box: Sequence[float]) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))


def _free_place(
    box: Sequence[float],
    width: float,
    height: float,
    size: tuple[int, int],
    taken: list[tuple[float, float, float, float]],
) -> tuple[float, float]:
    """Where a box's label goes: above it, or else where it covers no earlier label; always on the picture."""
    x1, y1, x2, y2 = box
    wanted = ((x1, y1 - height), (x1, y2), (x1, y1), (x2 - width, y1 - height), (x2 - width, y2), (x2, y1))
    places = [(max(0.0, min(x, size[0] - width)), max(0.0, min(y, size[1] - height))) for x, y in wanted]
    free = (
        (x, y)
        for x, y in places
        if not any(x < r and left < x + width and y < b and top < y + height for left, top, r, b in taken)
    )
    x, y = next(free, places[0])
    taken.append((x, y, x + width, y + height))
    return x, y


def open_first(view: SampleView, folder: Path | None) -> Image.Image:
    """The first image of a sample that can be drawn.

    Raises:
        ClocError: It has none that can be read, or is a conversation with faults: there is nothing to lay out.
    """
    if view.kind != "region-text":
        sizes = PictureSizes()
        if problems := problems_of(view, [sizes(image, folder) for image in view.images]):
            raise problems[0].error(None, None)
    return open_image(view.images[0] if view.images else None, folder, None, "")


def draw_sheet(
    path: str | Path,
    out: str | Path,
    count: int = 24,
    *,
    seed: int | None = None,
    ids: Sequence[str] | None = None,
    font: str | Path | None = None,
    cell: int = CELL,
) -> int:
    """Draws a contact sheet: pictures with their boxes, texts and captions.

    Args:
        path: A file or folder as for `check_data`.
        out: The picture to write (.png or .jpg).
        count: Most samples to show; files that cannot be shown are left out.
        seed: Draw the samples at random over all files; None takes them evenly spread over each file.
        ids: Show the samples of these ids, in this order, however many; neither `count` nor `seed` counts.
        font: A font file; Pillow's own has plain Latin letters only.
        cell: Size of a picture on the sheet in pixels.

    Returns:
        The number of samples shown.

    Raises:
        ClocError: Nothing could be shown, an id is not there or cannot be shown, or `out` cannot be written.
    """
    files, pen = SampleFiles(path), Pen(font, max(11, cell // 24))
    if ids is not None:
        cells = [_cell(files, number, pen, cell) for number in _numbers_of(files, ids, path)]
    elif seed is not None:
        order = random.Random(seed).sample(range(len(files)), len(files))
        cells = list(_cells(files, order, count, pen, cell))
    else:
        cells = []
        for file in range(len(files.files)):
            share = (count - len(cells)) // (len(files.files) - file)
            length = len(files.source(file) or ())
            spread = range(files.start(file), files.start(file) + length, max(1, length // max(1, share)))
            cells += _cells(files, spread, share, pen, cell)
    if not cells:
        raise ClocError("no sample has a picture that could be drawn", file=path, remedy="See the faults listed.")
    _write(cells, out)
    return len(cells)


def _cells(files: SampleFiles, order: Sequence[int], count: int, pen: Pen, cell: int) -> Iterator[Image.Image]:
    """Up to `count` cells, of the first samples in an order that can be shown."""
    shown = 0
    for number in order:
        if shown == count:
            return
        try:
            drawn = _cell(files, number, pen, cell)
        except ClocError:
            continue  # a check reports these; there is nothing in them to draw
        shown += 1
        yield drawn


def _cell(files: SampleFiles, number: int, pen: Pen, cell: int) -> Image.Image:
    sample, folder = files.read(number)
    view = SampleView.of(sample, folder)
    return draw_sample(open_first(view, folder), view, pen, cell)


def _numbers_of(files: SampleFiles, ids: Sequence[str], path: str | Path) -> list[int]:
    """The numbers of the samples of some ids, in the order of the ids; samples that share one all count."""
    found: dict[str, list[int]] = {identity: [] for identity in ids}
    for number in range(len(files)):
        try:
            sample, _ = files.read(number)
        except ClocError:
            continue  # without JSON it has no id
        if (numbers := found.get(str(sample.get("id")))) is not None:
            numbers.append(number)
    for identity, numbers in found.items():
        if not numbers:
            raise ClocError("no sample has this id", file=path, sample=identity, remedy="Ids are compared as text.")
    return [number for identity in ids for number in found[identity]]


def _write(cells: Sequence[Image.Image], out: str | Path) -> None:
    columns = min(_MOST_COLUMNS, len(cells))
    rows = -(-len(cells) // columns)
    width, height = cells[0].width + _MARGIN, cells[0].height + _MARGIN
    sheet = Image.new("RGB", (columns * width + _MARGIN, rows * height + _MARGIN), "white")
    for k, cell in enumerate(cells):
        sheet.paste(cell, (_MARGIN + k % columns * width, _MARGIN + k // columns * height))
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        sheet.save(out)
    except (OSError, ValueError) as error:
        raise ClocError(f"cannot write the sheet: {error}", file=out, remedy="Name a writable .png file.") from error
