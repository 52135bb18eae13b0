"""What is to be labelled: a folder of pictures, region-text data, or tar and Parquet shards; always in the same order.

A source is planned once: which files, how many samples in each, and a fingerprint that changes with them. Any process
then reads any range of its samples, holding a few at a time. A folder of pictures becomes a list of files on disk
first, so that it is read like everything else, 16 bytes a picture in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloc_mllm.data.dataset import open_image
from cloc_mllm.data.files import ByteFile, is_glob, is_url
from cloc_mllm.data.readers import Sample, resolve_image, sample_name, shard_files
from cloc_mllm.data.schema import SAMPLE_KEYS, Size, kind_of, raise_first, region_text_problems
from cloc_mllm.data.shards import SampleBlock, ShardReader, open_shard
from cloc_mllm.data.tar_shards import IMAGE_ENDINGS
from cloc_mllm.errors import ClocError
from cloc_mllm.labeling.files import Record, atomic_writer, process_tag

_AT_ONCE = 32
"""Encoded samples held at a time."""


@dataclass(frozen=True)
class SourcePlan:
    """Which samples there are, in which order.

    Attributes:
        name: The source as it was given.
        files: Files of samples; of a folder of pictures, the list that was made of it.
        counts: Samples in each.
        fingerprint: Hash of the files' names and sizes, of JSON also of what it says; of a folder of pictures, of
            theirs.
        pictures: Whether it is pictures as such.
        ignored: Files of a folder of pictures that are none, or hidden, or in a hidden folder.
    """

    name: str
    files: tuple[str, ...]
    counts: tuple[int, ...]
    fingerprint: str
    pictures: bool = False
    ignored: int = 0

    @property
    def total(self) -> int:
        """Number of samples."""
        return sum(self.counts)


def plan_source(source: str, state: Path) -> SourcePlan:
    """Find the samples of a source.

    Args:
        source: Folder of pictures (searched with its sub-folders), a picture, a pattern of pictures; or a file, folder,
            pattern or URL of region-text data: .jsonl, .json, .parquet, .tar.
        state: Folder for the list of a folder of pictures.

    Raises:
        ClocError: There are no samples, or a file cannot be read.
    """
    if _holds_pictures(source):
        plan = _list_pictures(source, state)
    else:
        files = tuple(shard_files(source))
        digest, counts = hashlib.sha256(), []
        for file in files:
            digest.update(f"{os.path.basename(file)}\0{ByteFile(file).size}\n".encode("utf-8", "surrogateescape"))
            if file.endswith((".jsonl", ".json")):
                digest.update(_content_hash(file))
            counts.append(len(open_shard(file)))
        plan = SourcePlan(source, files, tuple(counts), digest.hexdigest())
    if not plan.total:
        remedy = (
            f"Pictures end with .{', .'.join(IMAGE_ENDINGS)}; samples are in .jsonl, .json, .parquet or .tar files."
        )
        raise ClocError("there is nothing to label", file=source, remedy=remedy)
    return plan


def _content_hash(file: str) -> bytes:
    """Of a file of texts, which may be edited without becoming longer."""
    digest = hashlib.sha256()
    with open(file, "rb") as lines:
        while block := lines.read(1 << 20):
            digest.update(block)
    return digest.digest()


def _is_picture(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGE_ENDINGS


def _holds_pictures(source: str) -> bool:
    """Whether a source is pictures as such, and not files that hold or list them."""
    if is_url(source):
        return False
    if is_glob(source) or not os.path.isdir(source):
        return _is_picture(source)
    names = os.listdir(source)
    return not any(name.endswith((".jsonl", ".parquet", ".tar")) for name in names)


def _list_pictures(source: str, state: Path) -> SourcePlan:
    """Write the list of all pictures, sorted folder by folder, and count what is none.

    A list is named by a hash of what it says: planning another source, which may yet be refused, does not touch the
    list that a run at work reads.
    """
    digest, content, found, ignored = hashlib.sha256(), hashlib.sha256(), 0, 0
    names: Iterator[tuple[str, bool]]
    if is_glob(source):
        from cloc_mllm.data.files import glob_files

        files = [os.path.abspath(file) for file in glob_files(source)]
        root = os.path.commonpath([os.path.dirname(file) for file in files])
        names = iter((os.path.relpath(file, root), True) for file in files)
    elif os.path.isdir(source):
        root, names = os.path.abspath(source), _walk(source, state.parent)
    else:
        ByteFile(source)  # says what is wrong if there is no such file
        root, names = os.path.dirname(os.path.abspath(source)), iter([(os.path.basename(source), True)])
    unnamed = state / f"pictures-{process_tag()}.part"
    with atomic_writer(unnamed) as file:
        for name, wanted in names:
            ignored += not wanted
            if not wanted:
                continue
            path = os.path.join(root, name)
            line = json.dumps({"id": name.replace(os.sep, "/"), "image": path}).encode() + b"\n"
            file.write(line)
            content.update(line)
            digest.update(f"{name}\0{_size(path)}\n".encode("utf-8", "surrogateescape"))
            found += 1
    target = unnamed.replace(state / f"pictures-{content.hexdigest()[:16]}.jsonl")
    return SourcePlan(source, (str(target),), (found,), digest.hexdigest(), True, ignored)


def _size(path: str) -> int:
    """Of a file; 0 of a link to nowhere, which is a bad sample and no reason to stop here."""
    try:
        return os.path.getsize(path)
    except FileNotFoundError:
        return 0


def _walk(folder: str, out: Path) -> Iterator[tuple[str, bool]]:
    """Every file below a folder in a fixed order, by its relative path, and whether it is a picture to be labelled.

    Links to folders are followed, and no folder is listed twice, so that they may lead in circles. What lies in the
    output folder is passed over, what is hidden or in a hidden folder is counted.
    """

    def refuse(error: OSError) -> None:
        raise ClocError(f"cannot be listed: {error.strerror}", file=error.filename, remedy="Make it readable.")

    listed = {_identity(place) for place in (folder, out) if os.path.isdir(place)}
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        found = {name: _identity(os.path.join(place, name)) for name in sorted(folders)}
        folders.clear()
        for name, identity in found.items():
            if identity not in listed:
                listed.add(identity)
                folders.append(name)
        for name in sorted(names):
            relative = os.path.relpath(os.path.join(place, name), folder)
            hidden = any(part.startswith(".") for part in relative.split(os.sep))
            yield relative, _is_picture(name) and not hidden


def _identity(folder: str | Path) -> tuple[int, int]:
    """Of a folder, by whatever name: its device and its number there."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


@dataclass(frozen=True)
class RawSample:
    """A sample of the source, not yet decoded.

    Attributes:
        number: Its place in the source, from 0.
        sample: As read, with `caption` and `captions` cleaned and checked, `id` and `source` cleaned; None if it could
            not be read.
        problem: Why not.
        file: Where it stands, for messages.
        name: What to call it, for messages.
        folder: Where its relative image path starts.
    """

    number: int
    sample: Sample | None
    problem: ClocError | None
    file: str | None
    name: str
    folder: Path | None

    def checked(self) -> Sample:
        """The sample; raises its problem if it has one."""
        if self.problem is not None or self.sample is None:
            raise self.problem or ClocError("the sample is empty", file=self.file, sample=self.name)
        return self.sample

    def picture(self) -> Any:
        """The picture, decoded, RGB and upright; `ClocError` if there is none."""
        return open_image(self.checked().get("image"), self.folder, self.file, self.name)

    def stored(self) -> Any:
        """Path or bytes of the picture as it is stored."""
        return resolve_image(self.checked()["image"], self.folder)

    def check_regions(self, size: Size) -> None:
        """Raise what is wrong with the regions that the sample has."""
        sample = self.checked()
        known = {key: value for key, value in sample.items() if key in SAMPLE_KEYS and key != "captions"}
        raise_first(region_text_problems({"regions": [], **known, "caption": "-"}, size), self.file, self.name)
        try:
            json.dumps(sample.get("regions"), ensure_ascii=False).encode()
        except UnicodeEncodeError:
            problem, remedy = "a region holds half a surrogate pair", "Mend it, or leave the sample out."
            raise ClocError(problem, file=self.file, sample=self.name, remedy=remedy) from None


def refused(raw: RawSample, error: ClocError) -> Record:
    """The record of a sample that cannot be labelled."""
    where = {"file": error.file or raw.file, "sample": error.sample or raw.name}
    return {"n": raw.number, "problem": {"problem": error.problem, "remedy": error.remedy, **where}}


def problem_of(record: Record) -> ClocError:
    """The error that a record of a refused sample stands for."""
    found = record["problem"]
    remedy = " ".join(filter(None, [found["remedy"], "(--on-bad-sample skip leaves such samples out and lists them.)"]))
    return ClocError(found["problem"], file=found["file"], sample=found["sample"], remedy=remedy)


class SourceReader:
    """Reads ranges of a source; the file read last stays open.

    Args:
        plan: What `plan_source` found.
    """

    def __init__(self, plan: SourcePlan) -> None:
        self._plan = plan
        self._open: tuple[int, ShardReader] | None = None

    def read(self, start: int, stop: int) -> Iterator[RawSample]:
        """The samples from number `start` up to `stop`, a few of them in memory.

        Raises:
            ClocError: A file has become unreadable. What is wrong with one sample is left to it.
        """
        first = 0
        for number, count in enumerate(self._plan.counts):
            low, high = max(start, first), min(stop, first + count)
            for at in range(low, high, _AT_ONCE):
                end = min(at + _AT_ONCE, high)
                block = self._file(number).block(at - first, end - first)
                for k in range(len(block)):
                    yield _raw_sample(block, k, at + k, listed=self._plan.pictures)
            first += count

    def _file(self, number: int) -> ShardReader:
        if self._open is None or self._open[0] != number:
            self._open = (number, open_shard(self._plan.files[number]))
            if len(self._open[1]) != self._plan.counts[number]:
                remedy = "Start again when nothing writes to it any more."
                raise ClocError("the source has changed", file=self._plan.files[number], remedy=remedy)
        return self._open[1]


def _raw_sample(block: SampleBlock, k: int, number: int, *, listed: bool) -> RawSample:
    """A sample of a block; of pictures that are `listed`, the list is ours, and no place to send a person to."""
    file, place = block.where(k)
    try:
        sample = block.sample(k)
    except ClocError as error:
        return RawSample(number, None, error, file, place, None)
    identity = clean_text(str(sample.get("id", "")))
    if listed:
        file, name = os.fsencode(sample["image"]).decode("utf-8", "replace"), identity
    else:
        name = sample_name({"id": identity}, place)
    try:
        sample, problem = _with_clean_texts(sample, file, name), None
    except ClocError as error:
        problem = error
    return RawSample(number, sample, problem, file, name, block.folder(k))


def _with_clean_texts(sample: Mapping[str, Any], file: str | None, name: str) -> Sample:
    """A sample whose captions are texts, or are not there.

    Raises:
        ClocError: It is a conversation, its captions are no texts, or a name in it leads somewhere else.
    """
    if kind_of(sample) != "region-text":
        raise ClocError("is a conversation", file=file, sample=name, remedy="Labels are for pictures: name those.")
    cleaned = {key: value for key, value in sample.items() if key not in ("caption", "captions")}
    identity = str(sample.get("id", ""))
    if file is not None and file.endswith(".tar") and (identity.startswith("/") or ".." in identity.split("/")):
        remedy = "Members of a shard have plain names: write the shard anew, or leave the sample out."
        raise ClocError("the name of the member leads out of the shard", file=file, sample=name, remedy=remedy)
    image = sample.get("image")
    if isinstance(image, str) and image != image.encode("utf-8", "replace").decode():
        remedy = "Rename the file, or leave it out."
        raise ClocError("the name of the picture is not UTF-8", file=file, sample=name, remedy=remedy)
    if "id" in sample:
        cleaned["id"] = clean_text(identity)
    if isinstance(sample.get("source"), str):
        cleaned["source"] = clean_text(sample["source"])
    for key in ("caption", "captions"):
        value = sample.get(key)
        texts = [value] if key == "caption" and value is not None else value or []
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            problem = f"'{key}' is {value!r:.60}, not {'a text' if key == 'caption' else 'a list of texts'}"
            raise ClocError(problem, file=file, sample=name, remedy="Mend it, or leave it out.")
        if texts := [text for text in map(clean_text, texts) if text]:
            cleaned[key] = texts[0] if key == "caption" else texts
    return cleaned


def clean_text(text: str) -> str:
    """A text on one line: runs of white space and control characters become one blank, half a surrogate pair U+FFFD.

    Whatever else Unicode has is kept as it is, joiners and marks of direction too: scripts need them.
    """
    whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return " ".join("".join(" " if unicodedata.category(mark) == "Cc" else mark for mark in whole).split())
