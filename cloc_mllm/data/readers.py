"""Opens samples on disk without reading them all: JSON lines, Parquet through `datasets`, tar shards, JSON lists.

Every source is map-style (length and random access), knows where a sample stands (for messages) and which folder its
image paths are relative to, and can be sent to worker processes. Nothing is validated or decoded here.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cloc_mllm.data.files import glob_files, is_glob, is_url, list_folder
from cloc_mllm.data.tar_shards import Sample, TarFile
from cloc_mllm.errors import ClocError

_SCAN_BYTES = 1 << 24


class SampleSource(Protocol):
    """A sequence of raw samples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """The raw sample at an index; `ClocError` if it is not a JSON object."""
        ...

    def where(self, index: int) -> tuple[str | None, str]:
        """File and number of a sample, for messages."""
        ...

    def folder(self, index: int) -> Path | None:
        """The folder that a sample's relative image paths start from."""
        ...


def sample_name(sample: Mapping[str, Any] | None, fallback: str) -> str:
    """What to call a sample in a message: its id and where it stands."""
    identity = sample.get("id") if sample is not None else None
    return fallback if identity in (None, "") else f"{identity} ({fallback})"


def _parse(text: bytes | str, file: str | None, where: str) -> Sample:
    try:
        sample = json.loads(text)
    except (ValueError, RecursionError) as error:  # the latter: nested too deeply
        raise ClocError(f"not valid JSON: {error}", file=file, sample=where, remedy="Mend or remove it.") from error
    if not isinstance(sample, dict):
        raise ClocError("not a JSON object", file=file, sample=where, remedy="A sample is an object, {...}.")
    return sample


class JsonLines:
    """A .jsonl file, found by line offsets (16 bytes a line in memory) and read with `pread`.

    `pread` keeps no position, so that forked workers can share one descriptor.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._spans, self._numbers = _line_spans(self.path)
        self._descriptor: int | None = None

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Sample:
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        start, stop = self._spans[index].tolist()
        return _parse(os.pread(self._descriptor, stop - start, start), *self.where(index))

    def where(self, index: int) -> tuple[str, str]:
        """File and line of a sample."""
        return str(self.path), f"line {self._numbers[index]}"

    def folder(self, index: int) -> Path:
        """The folder of the file."""
        return self.path.parent

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)  # type: ignore[arg-type]


def _line_spans(path: Path) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Start and end of every line that is not blank, (N, 2) bytes, and its number in the file, (N,)."""
    breaks, total = [np.asarray([-1], np.int64)], 0
    try:
        with path.open("rb") as file:
            while block := file.read(_SCAN_BYTES):
                breaks.append(np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + total)
                total += len(block)
    except OSError as error:
        raise ClocError(f"cannot read the file: {error.strerror}", file=path, remedy="Check the path.") from error
    edges = np.concatenate([*breaks, np.asarray([total], np.int64)])
    spans = np.stack([edges[:-1] + 1, edges[1:]], axis=1)
    # Two bytes or fewer hold no object: a blank line, with or without a carriage return ("{}" is no sample either, but
    # it has no line break of its own to hide behind and is reported as one when read).
    kept = spans[:, 1] - spans[:, 0] >= 2
    return spans[kept], np.flatnonzero(kept) + 1


class JsonList:
    """A .json file that is one list of samples, kept as compact text (as LLaVA's files come)."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            samples = json.loads(self.path.read_bytes())
        except OSError as error:
            raise ClocError(f"cannot read the file: {error.strerror}", file=path, remedy="Check the path.") from error
        except (ValueError, RecursionError) as error:
            raise ClocError(
                f"not valid JSON: {error}", file=path, remedy="JSON lines need the ending .jsonl."
            ) from error
        if not isinstance(samples, list):
            raise ClocError(
                "not a list of samples", file=path, remedy="Write [{...}, ...], or one object a line (.jsonl)."
            )
        # Bytes cost a fraction of the objects and are shared by forked workers without being copied.
        self._texts = [json.dumps(sample).encode() for sample in samples]

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> Sample:
        return _parse(self._texts[index], *self.where(index))

    def where(self, index: int) -> tuple[str, str]:
        """File and place in the list of a sample."""
        return str(self.path), f"entry {index}"

    def folder(self, index: int) -> Path:
        """The folder of the file."""
        return self.path.parent


class ParquetFile:
    """A .parquet file, memory-mapped through `datasets`; images are bytes or paths inside it."""

    def __init__(self, path: str | Path) -> None:
        from datasets import Dataset, Image
        from datasets.utils.logging import disable_progress_bar

        self.path = Path(path)
        if not self.path.is_file():
            raise ClocError("cannot read the file: no such file", file=path, remedy="Check the path.")
        disable_progress_bar()
        try:
            table = Dataset.from_parquet(str(self.path))
        except Exception as error:
            # `datasets` wraps whatever Arrow found in errors of its own; the cause says what it was.
            reason = str(error.__cause__ or error).splitlines()[0]
            raise ClocError(f"not a readable Parquet file: {reason}", file=path, remedy="Write it anew.") from error
        for name, feature in table.features.items():
            if isinstance(feature, Image):
                table = table.cast_column(name, Image(decode=False))
            elif isinstance(getattr(feature, "feature", None), Image):
                table = table.cast_column(name, type(feature)(Image(decode=False)))
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Sample:
        return sample_of_row(self._table[index])

    def where(self, index: int) -> tuple[str, str]:
        """File and row of a sample."""
        return str(self.path), f"row {index}"

    def folder(self, index: int) -> Path:
        """The folder of the file."""
        return self.path.parent


def sample_of_row(row: Mapping[str, Any]) -> Sample:
    """The raw sample of a row of a Parquet file, whose images are stored as `datasets` stores them."""
    sample = {name: _plain(value) for name, value in row.items() if value is not None}
    for name in ("messages", "conversations"):
        if isinstance(sample.get(name), str):
            sample[name] = json.loads(sample[name])
    for region in sample.get("regions", ()):
        if isinstance(region, dict) and isinstance(region.get("attributes"), str):
            region["attributes"] = json.loads(region["attributes"])
    if "images" in sample:
        sample["images"] = [_encoded(image) for image in sample["images"]]
    if "image" in sample:
        sample["image"] = _encoded(sample["image"])
    return sample


def _plain(value: Any) -> Any:
    """A value without the None that Arrow puts where an optional key is missing."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items() if inner is not None}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def _encoded(image: Any) -> Any:
    """Bytes or path of an image stored as `datasets` stores one, {"bytes", "path"}."""
    return (image.get("bytes") or image.get("path")) if isinstance(image, dict) else image


class InMemory:
    """Samples given as Python objects."""

    def __init__(self, samples: Sequence[Sample], folder: str | Path | None = None) -> None:
        self._samples = samples
        self._folder = None if folder is None else Path(folder)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]

    def where(self, index: int) -> tuple[None, str]:
        """No file, and the place in the sequence."""
        return None, f"number {index}"

    def folder(self, index: int) -> Path | None:
        """The folder given at construction."""
        return self._folder


class Joined:
    """Several sources, one after another."""

    def __init__(self, parts: Sequence[SampleSource]) -> None:
        self._parts = list(parts)
        self._starts = np.cumsum([0, *(len(part) for part in parts)]).tolist()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _find(self, index: int) -> tuple[SampleSource, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect_right(self._starts, index) - 1
        return self._parts[part], index - self._starts[part]

    def __getitem__(self, index: int) -> Sample:
        part, inner = self._find(index)
        return part[inner]

    def where(self, index: int) -> tuple[str | None, str]:
        """File and number of a sample."""
        part, inner = self._find(index)
        return part.where(inner)

    def folder(self, index: int) -> Path | None:
        """The folder of the sample's file."""
        part, inner = self._find(index)
        return part.folder(inner)


_READERS: dict[str, Callable[[Path], SampleSource]] = {
    ".jsonl": JsonLines,
    ".json": JsonList,
    ".parquet": ParquetFile,
    ".tar": TarFile,
}


NOT_SAMPLES = ("dataset.json", "report.json")
"""Files of a data folder that speak of the samples and hold none."""

SHARD_KINDS = (".parquet", ".tar")
"""Endings of files of which a data set has many."""


def open_file(path: str | Path) -> SampleSource:
    """The samples of one .jsonl, .json, .parquet or .tar file.

    Raises:
        ClocError: The file is missing, unreadable or of another kind.
    """
    path = Path(path)
    if path.suffix not in _READERS:
        remedy = f"Readable are {', '.join(_READERS)}, and folders that hold them."
        raise ClocError(f"cannot tell what '{path.name}' is", file=path, remedy=remedy)
    return _READERS[path.suffix](path)


def data_files(path: str | Path, preferred: str = "regions.jsonl") -> list[Path]:
    """The files that hold the samples of a path: itself, or for a folder the one meant.

    In a folder the `preferred` file is taken, else all its .parquet files or all its .tar shards, else its only .jsonl
    or .json file. A pattern (`data/train-*.tar`) means the files that fit it.

    Raises:
        ClocError: There is nothing there, no file to take, or a choice between several; or it is a URL.
    """
    if is_url(path):
        remedy = "Stream it (data.streaming=true), or copy it to disk."
        raise ClocError("samples behind a URL cannot be read at random", file=path, remedy=remedy)
    if is_glob(path):
        return [Path(file) for file in glob_files(path)]
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ClocError("no such file or folder", file=path, remedy="Check the path.")
    if (path / preferred).is_file():
        return [path / preferred]
    for kind in SHARD_KINDS:
        if shards := sorted(path.glob(f"*{kind}")):
            return shards
    splits = sorted(part.parent.name for part in path.glob(f"*/{preferred}"))
    if splits:
        remedy = f"Name one of its splits: {', '.join(f'{path.name}/{split}' for split in splits)}."
        raise ClocError("is a data set of several splits", file=path, remedy=remedy)
    lines = sorted([*path.glob("*.jsonl"), *(p for p in path.glob("*.json") if p.name not in NOT_SAMPLES)])
    if len(lines) == 1:
        return lines
    if not lines:
        remedy = f"A data folder holds {preferred}, .parquet files, .tar shards or one .jsonl file."
        raise ClocError("the folder holds no samples", file=path, remedy=remedy)
    names = ", ".join(file.name for file in lines)
    raise ClocError(f"the folder holds several files: {names}", file=path, remedy="Name the one you mean.")


def shard_files(path: str | Path, preferred: str = "regions.jsonl") -> list[str]:
    """The files of a path to be streamed: as `data_files`, and behind a URL the file, folder or pattern it names.

    Raises:
        ClocError: See `data_files`.
    """
    if not is_url(path):
        return [str(file) for file in data_files(path, preferred)]
    if is_glob(path):
        return glob_files(path)
    if str(path).endswith(SHARD_KINDS):
        return [str(path)]
    listed = list_folder(str(path))
    for kind in SHARD_KINDS:
        if shards := [file for file in listed if file.endswith(kind)]:
            return shards
    raise ClocError("holds no .parquet or .tar shards", file=path, remedy="Check the address.")


def open_samples(
    data: str | Path | Sequence[Sample] | SampleSource | Sequence[str | Path], preferred: str = "regions.jsonl"
) -> SampleSource:
    """Opens a path, several paths joined, a list of samples in memory, or returns a source as it is.

    Args:
        data: What to open.
        preferred: The file to take in a folder that holds several.

    Raises:
        ClocError: See `data_files` and `open_file`.
    """
    if isinstance(data, (str, Path)):
        data = [data]
    if hasattr(data, "where"):
        return data  # type: ignore[return-value]
    if isinstance(data, Sequence) and data and all(isinstance(part, (str, Path)) for part in data):
        parts = [open_file(file) for path in data for file in data_files(path, preferred)]  # type: ignore[arg-type]
        return parts[0] if len(parts) == 1 else Joined(parts)
    return InMemory(data)  # type: ignore[arg-type]


def resolve_image(image: Any, folder: Path | None) -> Any:
    """An image reference ready to be loaded: relative paths become paths below `folder`, the rest stays as it is."""
    if isinstance(image, (str, Path)):
        return Path(image) if folder is None or Path(image).is_absolute() else folder / image
    return image
