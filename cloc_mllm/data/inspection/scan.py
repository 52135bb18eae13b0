"""Every sample of some files looked at once, and every picture decoded once, by any number of processes.

Pictures that are files are decoded first, each once however many samples name it; then the samples are read in parts of
fixed length, judged and counted. What the parts hold is put together in the order of the files, so the result is the
same for any number of processes. Pictures inside a shard are decoded as their sample is read.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from cloc_mllm.data.files import glob_files, is_glob
from cloc_mllm.data.inspection.faults import SampleView, problems_of, sound_boxes
from cloc_mllm.data.inspection.pictures import (
    Picture,
    PictureSizes,
    PictureTable,
    coco_image_id,
    look_at_files,
    path_key,
)
from cloc_mllm.data.inspection.tally import Place, Tally, TallyOptions
from cloc_mllm.data.readers import (
    NOT_SAMPLES,
    JsonLines,
    JsonList,
    Sample,
    SampleSource,
    open_file,
    resolve_image,
    sample_name,
)
from cloc_mllm.data.schema import Problem
from cloc_mllm.errors import ClocError

_PART = 128
_PICTURES = 16
_AHEAD = 4

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True)
class ScanOptions:
    """What a scan is for.

    Attributes:
        statistics: What to count; None looks for faults only.
        workers: Processes; changes nothing but the time.
        progress: Show progress bars, if standard error is a terminal.
    """

    statistics: TallyOptions | None = None
    workers: int = 1
    progress: bool = True


@dataclass
class Part:
    """What was found in consecutive samples of a file.

    Attributes:
        kind: Of the first sample that could be read.
        samples: Number of samples.
        regions: Number of sound boxes on first images, whether they fit their picture or not.
        broken: Samples with a fault.
        faults: The faults, in order.
        worst: Number of faults of each broken sample, by its number over the whole set.
        tally: The counts, if they were asked for.
        fresh: Pictures decoded with these samples, each with the hash of its path if it is a file.
        uses: Samples, pictures as `PictureSizes.used` numbers them, and COCO image ids, three numbers a use.
    """

    kind: str | None = None
    samples: int = 0
    regions: int = 0
    broken: int = 0
    faults: list[ClocError] = field(default_factory=list)
    worst: dict[int, int] = field(default_factory=dict)
    tally: Tally | None = None
    fresh: list[tuple[Picture, tuple[int, int] | None]] = field(default_factory=list)
    uses: array[int] = field(default_factory=lambda: array("q"))


class SampleFiles:
    """The sample files of a path, their samples numbered through.

    Args:
        path: See `checkable_files`.

    Attributes:
        files: All of them, in order.
        faults: For each file that cannot be opened, or is empty, why.

    Raises:
        ClocError: There are none.
    """

    def __init__(self, path: str | Path) -> None:
        self.files = checkable_files(path)
        self.faults: dict[int, ClocError] = {}
        self._sources: dict[int, SampleSource] = {}
        self._starts = [0]
        for number, file in enumerate(self.files):
            length = 0
            try:
                self._sources[number] = open_file(file)
                length = len(self._sources[number])
                if length == 0:
                    remedy = "Remove it or fill it."
                    self.faults[number] = ClocError("the file holds no samples", file=file, remedy=remedy)
            except ClocError as error:
                self.faults[number] = error
            self._starts.append(self._starts[-1] + length)

    def __len__(self) -> int:
        """Number of samples in all files."""
        return self._starts[-1]

    def source(self, file: int) -> SampleSource | None:
        """The samples of a file; None if it cannot be opened."""
        return self._sources.get(file)

    def start(self, file: int) -> int:
        """Number, over the whole set, of a file's first sample."""
        return self._starts[file]

    def file_of(self, number: int) -> int:
        """The number of the file that holds the sample of a number over the whole set."""
        return bisect_right(self._starts, number) - 1

    def find(self, number: int) -> tuple[SampleSource, int]:
        """Source and place in it of the sample of a number over the whole set."""
        file = self.file_of(number)
        return self._sources[file], number - self._starts[file]

    def read(self, number: int) -> tuple[Sample, Path | None]:
        """A sample and the folder its paths start from; `ClocError` if it cannot be read."""
        source, index = self.find(number)
        return source[index], source.folder(index)

    def place(self, number: int) -> Place:
        """Where a sample stands."""
        source, index = self.find(number)
        file, where = source.where(index)
        try:
            return Place(number, file, sample_name(source[index], where))
        except ClocError:
            return Place(number, file, where)


def checkable_files(path: str | Path) -> list[Path]:
    """The sample files of a path: itself; or those in a folder; or, if it has none, those in its sub-folders.

    A pattern (`data/train-*.tar`) means the files that fit it.

    Raises:
        ClocError: There is nothing to check.
    """
    if is_glob(path):
        return [Path(file) for file in glob_files(path)]
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


@dataclass
class Scan:
    """What a scan found.

    Attributes:
        files: The files.
        parts: The findings of each file, its parts put together; `fresh` and `uses` are empty.
        pictures: All pictures.
        uses: Numbers of samples and rows of the pictures they name, ``(uses, 2)``, in order of the samples.
        tally: The counts of all files, if they were asked for.
        worst: Number of faults of each broken sample, by its number.
    """

    files: SampleFiles
    parts: list[Part]
    pictures: PictureTable
    uses: np.ndarray[Any, np.dtype[np.int64]]
    tally: Tally | None
    worst: Counter[int]


def scan(path: str | Path, options: ScanOptions) -> Scan:
    """Look at every sample of some files and at every picture they name.

    Args:
        path: A file of samples, a folder of such files, a folder of splits, or a pattern.
        options: What for.

    Raises:
        ClocError: There is nothing at `path`.
    """
    files = SampleFiles(path)
    table = PictureTable()
    _decode_files(files, table, options)
    parts = [Part() for _ in files.files]
    uses: array[int] = array("q")
    whole = Scan(files, parts, table, np.empty((0, 2), np.int64), None, Counter())
    if options.statistics is not None:
        whole.tally = Tally()
    for number, fault in files.faults.items():
        parts[number].faults.append(fault)
    ranges = [
        (number, start)
        for number in range(len(files.files))
        for start in range(0, len(files.source(number) or ()), _PART)
    ]
    judge = _Judge(files, table, options)
    bar = tqdm(total=len(files), desc="samples", unit="sample", disable=None if options.progress else True)
    with bar:
        for (number, _), found in _run(judge, ranges, options.workers):
            _merge(whole, uses, number, found)
            bar.update(found.samples)
    for row, notice in table.notices.items():
        if whole.tally is not None:
            whole.tally.notice(notice, files.place(int(table.first_sample(row))))
    whole.uses = np.array(uses, np.int64).reshape(-1, 2)
    return whole


def _decode_files(files: SampleFiles, table: PictureTable, options: ScanOptions) -> None:
    """Decode the pictures that are files, each once, into the table.

    Only samples in JSON are looked through for them: they name files, where shards hold their pictures.
    """
    seen: set[tuple[int, int]] = set()

    def batches() -> Iterator[list[Path]]:
        places: list[Path] = []
        for place in _picture_files(files):
            key = path_key(place)
            if key in seen:
                continue
            seen.add(key)
            places.append(place)
            if len(places) == _PICTURES:
                yield places
                places = []
        if places:
            yield places

    work = partial(look_at_files, hashes=options.statistics is not None)
    with tqdm(desc="pictures", unit="picture", disable=None if options.progress else True) as bar:
        for places, found in _run(work, batches(), options.workers):
            for place, picture in zip(places, found, strict=True):
                table.add(picture, path_key(place))
            bar.update(len(found))


def _picture_files(files: SampleFiles) -> Iterator[Path]:
    """The pictures that samples in JSON name, as often as they are named."""
    for number in range(len(files.files)):
        source = files.source(number)
        if not isinstance(source, (JsonLines, JsonList)):
            continue
        for index in range(len(source)):
            folder = source.folder(index)
            try:
                view = SampleView.of(source[index], folder)
            except ClocError:
                continue  # found again, and reported, when the samples are judged
            for image in view.images:
                if isinstance(place := resolve_image(image, folder), Path):
                    yield place


class _Judge:
    """Judges and counts one part of a file; made once, and taken along by every process."""

    def __init__(self, files: SampleFiles, table: PictureTable, options: ScanOptions) -> None:
        self._files, self._table, self._options = files, table, options

    def __call__(self, job: tuple[int, int]) -> Part:
        number, start = job
        source = self._files.source(number)
        assert source is not None, "only files that could be opened are divided into parts"
        sizes = PictureSizes(self._table, self._options.statistics is not None)
        part = Part(tally=None if self._options.statistics is None else Tally())
        for index in range(start, min(start + _PART, len(source))):
            faults = self._one(source, index, self._files.start(number) + index, sizes, part)
            part.samples += 1
            part.broken += bool(faults)
            part.faults += faults
            if faults:
                part.worst[self._files.start(number) + index] = len(faults)
        part.fresh = sizes.fresh
        return part

    def _one(self, source: SampleSource, index: int, overall: int, sizes: PictureSizes, part: Part) -> list[ClocError]:
        """The faults of one sample, which is counted in its part."""
        file, where = source.where(index)
        try:
            sample = source[index]
        except ClocError as error:
            return [error]
        folder = source.folder(index)
        view = SampleView.of(sample, folder)
        part.kind = part.kind or view.kind
        part.regions += sum(region.role != "truth" for region in sound_boxes(view))
        sizes.used.clear()
        looked_up = [sizes(image, folder) for image in view.images]
        for image, row in zip(view.images, sizes.used, strict=True):
            part.uses.extend((overall, row, coco_image_id(image, sample)))
        name = sample_name(sample, where)
        if part.tally is not None and self._options.statistics is not None:
            known = [None if isinstance(size, Problem) else size for size in looked_up]
            part.tally.add(view, known, Place(overall, file, name), self._options.statistics)
        return [problem.error(file, name) for problem in problems_of(view, looked_up)]


def _merge(whole: Scan, uses: array[int], number: int, found: Part) -> None:
    """Add a part to what is known of its file, and of all."""
    entry = whole.parts[number]
    entry.kind = entry.kind or found.kind
    for name in ("samples", "regions", "broken"):
        setattr(entry, name, getattr(entry, name) + getattr(found, name))
    entry.faults += found.faults
    whole.worst.update(found.worst)
    if whole.tally is not None and found.tally is not None:
        whole.tally.merge(found.tally)
    rows = []
    for picture, key in found.fresh:
        row = None if key is None else whole.pictures.row_of(key)
        rows.append(whole.pictures.add(picture, key) if row is None else row)
    for k in range(0, len(found.uses), 3):
        sample, used, coco = found.uses[k : k + 3]
        row = rows[-1 - used] if used < 0 else used
        whole.pictures.name_first(row, sample, coco)
        uses.extend((sample, row))


_work: Callable[[Any], Any]


def _start(work: Callable[[Any], Any]) -> None:
    """Give a process its work, with all that it holds, once."""
    global _work
    _work = work


def _call(job: Any) -> Any:
    return _work(job)


def _run(work: Callable[[Job], Result], jobs: Iterable[Job], workers: int) -> Iterator[tuple[Job, Result]]:
    """Each job with its result, in order; a few jobs ahead of what has been taken, so that nothing piles up."""
    if workers <= 1:
        for job in jobs:
            yield job, work(job)
        return
    with ProcessPoolExecutor(workers, initializer=_start, initargs=(work,)) as pool:
        waiting: deque[tuple[Job, Future[Result]]] = deque()
        for job in jobs:
            waiting.append((job, pool.submit(_call, job)))
            if len(waiting) > workers * _AHEAD:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()
