"""`cloc-mllm data filter`: a data set without the samples of a list, written anew in the format it has.

A list holds a sample a line: an id alone, or a JSON object with `id`, `file` (relative to the data set) and `place`
("line 7"), as `cloc-mllm data leaks --write-exclude` writes them, where ids need not be unique or there at all.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cloc_mllm.data.inspection.faults import SampleView, problems_of
from cloc_mllm.data.inspection.scan import SampleFiles
from cloc_mllm.data.inspection.tally import Place
from cloc_mllm.data.messages import with_mask_paths
from cloc_mllm.data.readers import Sample
from cloc_mllm.data.writers import FORMATS, SampleWriter, open_writer
from cloc_mllm.errors import ClocError

_FORMAT_OF = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".tar": "webdataset"}


@dataclass(frozen=True)
class Excluded:
    """A line of a list.

    Attributes:
        id: The sample's id; None if it has none.
        file: Its file, relative to the data set; None if the id is all that is known.
        place: Where in the file it stands.
        reason: Why it is left out.
    """

    id: str | None
    file: str | None = None
    place: str | None = None
    reason: str | None = None


def data_root(path: str | Path, files: SampleFiles) -> Path:
    """The folder that a list names files from: the data set's, or of a file or pattern the deepest that holds all.

    Args:
        path: What was asked for.
        files: What was found there.
    """
    if Path(path).is_dir():
        return Path(path)
    return Path(os.path.commonpath([file.parent for file in files.files]))


def excluded_sample(root: Path, files: SampleFiles, number: int, reason: str) -> Excluded:
    """The line of the sample of a number, its file named from `root`, as `data_root` gives it."""
    source, index = files.find(number)
    file, place = source.where(index)
    identity = source[index].get("id")
    named = None if file is None else Path(file).relative_to(root).as_posix()
    return Excluded(None if identity in (None, "") else str(identity), named, place, reason)


def write_exclusions(out: str | Path, samples: Iterable[Excluded]) -> None:
    """Write a list.

    Raises:
        ClocError: It cannot be written there.
    """
    path = Path(out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples), "utf-8")
    except OSError as error:
        reason = error.strerror or str(error)
        raise ClocError(f"cannot write the list: {reason}", file=out, remedy="Name a writable file.") from error


def read_exclusions(path: str | Path) -> list[Excluded]:
    """Read a list.

    Raises:
        ClocError: It cannot be read, or a line is neither an id nor an object of those keys.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise ClocError(f"cannot read the list: {error}", file=path, remedy="Check the path.") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if not line.startswith("{"):
            found.append(Excluded(line.strip()))
            continue
        try:
            entry = Excluded(**json.loads(line))
        except (ValueError, TypeError) as error:
            remedy = "A line is an id, or an object with id, file, place and reason."
            raise ClocError(f"line {number} cannot be read: {error}", file=path, remedy=remedy) from error
        if entry.id is None and (entry.file is None or entry.place is None):
            remedy = "Give it an id, or file and place."
            raise ClocError(f"line {number} names no sample", file=path, remedy=remedy)
        found.append(entry)
    return found


@dataclass
class FilterCounts:
    """What a filter did: `read` = `written` + `left_out`; `unmatched` lines of the list name no sample here."""

    read: int = 0
    written: int = 0
    left_out: int = 0
    unmatched: int = 0


def filter_data(
    path: str | Path,
    exclude: str | Path,
    out: str | Path,
    *,
    file_format: str | None = None,
    copy_images: bool = False,
    progress: bool = True,
) -> FilterCounts:
    """Write a data set without the samples of a list.

    Args:
        path: A file of samples, a folder of such files, or a folder of splits.
        exclude: The list.
        out: Folder to write to; files keep their names and sub-folders, shards are numbered anew.
        file_format: "jsonl", "parquet" or "webdataset"; None for that of each file.
        copy_images: With "jsonl", copy the pictures beside it instead of referring to them.
        progress: Show a progress bar, if standard error is a terminal.

    Raises:
        ClocError: A sample or the list cannot be read, or the output cannot be written.
    """
    files, listed, counts = SampleFiles(path), read_exclusions(exclude), FilterCounts()
    for fault in files.faults.values():
        raise fault
    root = data_root(path, files)
    if Path(out).resolve() in {root.resolve(), *(file.parent.resolve() for file in files.files)}:
        raise ClocError("the output is the data set itself", file=out, remedy="Choose another folder with --out.")
    places = {(entry.file, entry.place, entry.id): entry for entry in listed if entry.file is not None}
    ids = {entry.id for entry in listed if entry.file is None}
    matched: set[Any] = set()
    writers: dict[tuple[Path, str, str], SampleWriter] = {}
    with ExitStack() as stack, tqdm(total=len(files), unit="sample", disable=None if progress else True) as bar:
        for number in range(len(files)):
            line = excluded_sample(root, files, number, "")
            key: Any = (line.file, line.place, line.id)
            key = key if key in places else line.id if line.id in ids else None
            counts.read += 1
            bar.update()
            if key is not None:
                matched.add(key)
                counts.left_out += 1
                continue
            sample, folder = files.read(number)
            target = _target(files.files[files.file_of(number)], root, Path(out), file_format)
            if target not in writers:
                writers[target] = stack.enter_context(open_writer(target[0], target[1], target[2], copy_images))
            _write(writers[target], sample, folder, files.place(number))
            counts.written += 1
    counts.unmatched = len(places) + len(ids) - len(matched)
    return counts


def _target(file: Path, root: Path, out: Path, file_format: str | None) -> tuple[Path, str, str]:
    """Folder, format and name of the file that the samples of a file are written to."""
    if file_format is not None and file_format not in FORMATS:
        raise ClocError(f"unknown format '{file_format}'", remedy=f"Choose one of {', '.join(FORMATS)}.")
    folder = out / file.relative_to(root).parent
    name = re.sub(r"-\d{5,}$", "", file.stem) if file.suffix in (".parquet", ".tar") else file.stem
    return folder, file_format or _FORMAT_OF[file.suffix], name


def _write(writer: SampleWriter, sample: Sample, folder: Path | None, place: Place) -> None:
    """Write a sample; one that breaks the schema, or whose picture is gone, is named."""
    view = SampleView.of(sample, folder)
    for problem in problems_of(view, [None for _ in view.images]):
        remedy = f"{problem.remedy} Or add the sample to the list."
        raise ClocError(problem.problem, file=place.file, sample=place.name, remedy=remedy)
    try:
        writer.write(_with_whole_mask_paths(sample, folder), folder)
    except FileNotFoundError as error:
        problem_text = f"the picture '{error.filename}' does not exist"
        remedy = "Restore it, or add the sample to the list."
        raise ClocError(problem_text, file=place.file, sample=place.name, remedy=remedy) from error


def _with_whole_mask_paths(sample: Sample, folder: Path | None) -> Sample:
    """A conversation whose masks are found from anywhere; pictures are left to the writers."""
    if "messages" not in sample or folder is None:
        return sample
    return {**sample, "messages": with_mask_paths(sample["messages"], folder.resolve())}
