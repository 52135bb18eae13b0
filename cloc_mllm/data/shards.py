"""The shards of one source as a stream reads them: lengths known, any range of rows read at once, little held.

Tar shards are read through their index (see `tar_shards`), Parquet row group by row group with pyarrow. `datasets` does
neither here: its streaming readers (5.2) start a tar at its beginning and resume inside a row group by reading and
dropping rows; a tar sample costs them several times as much, a Parquet row about the same
(`scripts/benchmarks/shard_reading.py` measures them beside these).
JSON lines and lists are taken as well, through their map-style readers, so that a mixture may hold anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from cloc_mllm.data.files import ByteFile, is_url, open_url
from cloc_mllm.data.readers import Sample, SampleSource, open_file, sample_of_row, shard_files
from cloc_mllm.data.tar_shards import TarFile, index_path, read_index, scan_tar, write_index
from cloc_mllm.errors import ClocError

MAX_ROW_GROUP = 512 * 2**20
"""Largest row group of a Parquet shard in bytes: one is held for every lane."""


class SampleBlock(Protocol):
    """Consecutive samples that have been read, or can be looked up at no cost."""

    def __len__(self) -> int: ...

    def sample(self, number: int) -> Sample:
        """The raw sample of that number in the block; `ClocError` if there is none to be made of what was read."""
        ...

    def where(self, number: int) -> tuple[str | None, str]:
        """File and place of a sample, for messages."""
        ...

    def folder(self, number: int) -> Path | None:
        """The folder that a sample's relative image paths start from."""
        ...


class ShardReader(Protocol):
    """An open shard."""

    def __len__(self) -> int: ...

    def block(self, start: int, stop: int) -> SampleBlock:
        """The samples from `start` up to `stop`."""
        ...


class ShardSet:
    """The shards of a source, opened one at a time by whoever reads them.

    Args:
        path: A file, a folder, a pattern or a URL of .parquet or .tar shards, or of one .jsonl or .json file.

    Attributes:
        name: The path, for messages.
        files: The shards, in order of their names.
        counts: Samples in each.

    Raises:
        ClocError: There are none, one cannot be read, or a tar shard has no index (`write_missing_indexes`).
    """

    def __init__(self, path: str | Path) -> None:
        self.name = str(path)
        self.files = shard_files(path)
        # Readers of JSON know where all lines are: one of them serves every lane.
        self._sources = {file: open_file(file) for file in self.files if not file.endswith((".parquet", ".tar"))}
        self.counts = [self._count(file) for file in self.files]
        if not sum(self.counts):
            raise ClocError("there are no samples", file=path, remedy="Check the path.")

    def _count(self, file: str) -> int:
        if file in self._sources:
            return len(self._sources[file])
        if file.endswith(".parquet"):
            return _ParquetShard(file).rows
        offsets = read_index(file, ByteFile(file).size)
        if offsets is None:
            remedy = f"Put {index_path(file)} beside it; training on the shard where it is on disk writes one."
            raise ClocError("the shard has no index", file=file, remedy=remedy)
        return len(offsets) - 1

    def open(self, shard: int) -> ShardReader:
        """Open one shard, for one lane."""
        file = self.files[shard]
        return _SourceShard(self._sources[file]) if file in self._sources else open_shard(file)

    def where(self, shard: int, row: int) -> str:
        """File and place of a sample, for messages."""
        place = f"row {row}"
        if not self.files[shard].endswith(".parquet"):
            block = self.open(shard).block(row, row + 1)
            place = block.where(0)[1]
        return f"{self.files[shard]}: {place}"


def open_shard(file: str) -> ShardReader:
    """Open one file of samples on its own, of whatever kind; a tar shard on disk needs no index.

    Args:
        file: A .parquet, .tar, .jsonl or .json file.

    Raises:
        ClocError: It cannot be read.
    """
    if file.endswith(".parquet"):
        return _ParquetShard(file)
    return TarFile(file) if file.endswith(".tar") else _SourceShard(open_file(file))


def write_missing_indexes(paths: Iterable[str | Path]) -> int:
    """Write the index of every tar shard on disk that has none, with a message: each is read through once.

    Args:
        paths: Sources, as `ShardSet` takes them.

    Returns:
        How many were written.
    """
    files = [file for path in paths for file in shard_files(path) if file.endswith(".tar") and not is_url(file)]
    missing = [file for file in files if not Path(index_path(file)).exists()]
    if missing:
        print(f"{len(missing)} tar shards have no index: reading them through once to write it", flush=True)
    for file in tqdm(missing, desc="indexing", unit="shard", disable=None):
        write_index(file, scan_tar(file).tolist())
    return len(missing)


class _SourceShard:
    """A map-style source as one shard: nothing is read before a sample is asked for."""

    def __init__(self, source: SampleSource) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def block(self, start: int, stop: int) -> SampleBlock:
        return _SourceBlock(self._source, start, stop)


class _SourceBlock:
    def __init__(self, source: SampleSource, start: int, stop: int) -> None:
        self._source, self._rows = source, range(start, stop)

    def __len__(self) -> int:
        return len(self._rows)

    def sample(self, number: int) -> Sample:
        return self._source[self._rows[number]]

    def where(self, number: int) -> tuple[str | None, str]:
        return self._source.where(self._rows[number])

    def folder(self, number: int) -> Path | None:
        return self._source.folder(self._rows[number])


class _ParquetShard:
    """A Parquet file, one row group at a time; the last one stays, for a block that begins where another ended."""

    def __init__(self, path: str) -> None:
        # Imported here: only those who read Parquet pay for it.
        import pyarrow
        import pyarrow.parquet

        self.path = path
        try:
            self._file = pyarrow.parquet.ParquetFile(open_url(path) if is_url(path) else path, pre_buffer=False)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ClocError(f"not a readable Parquet file: {reason}", file=path, remedy="Write it anew.") from error
        groups = [self._file.metadata.row_group(k) for k in range(self._file.metadata.num_row_groups)]
        self.rows = int(self._file.metadata.num_rows)
        self._starts = np.cumsum([0, *(group.num_rows for group in groups)])
        largest = max((group.total_byte_size for group in groups), default=0)
        if largest > MAX_ROW_GROUP:
            raise ClocError(
                f"has a row group of {largest / 2**20:,.0f} MiB, and each lane holds one in memory",
                file=path,
                remedy="Write it anew with row groups of some hundred rows (`row_group_size=128` in pyarrow).",
            )
        self._last: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        return self.rows

    def block(self, start: int, stop: int) -> SampleBlock:
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        rows: list[dict[str, Any]] = []
        for group in range(first, len(self._starts) - 1):
            begin, end = int(self._starts[group]), int(self._starts[group + 1])
            if begin >= stop:
                break
            low, high = max(start, begin), min(stop, end)
            rows += self._group(group).slice(low - begin, high - low).to_pylist()
            if high == end:
                self._last = (-1, None)  # nothing of it is left to be asked for
        return _ParquetBlock(self.path, rows, start)

    def _group(self, group: int) -> Any:
        import pyarrow

        if self._last[0] != group:
            try:
                # Without threads: Arrow's pool does not outlive the fork into a worker.
                self._last = (group, self._file.read_row_group(group, use_threads=False))
            except (pyarrow.ArrowException, OSError) as error:
                raise ClocError(
                    f"row group {group} cannot be read: {error}", file=self.path, remedy="Write it anew."
                ) from error
        return self._last[1]


class _ParquetBlock:
    def __init__(self, path: str, rows: Sequence[dict[str, Any]], first: int) -> None:
        self._path, self._rows, self._first = path, rows, first

    def __len__(self) -> int:
        return len(self._rows)

    def sample(self, number: int) -> Sample:
        try:
            return sample_of_row(self._rows[number])
        except ValueError as error:
            where = self.where(number)
            raise ClocError(f"not valid JSON: {error}", file=where[0], sample=where[1], remedy="Mend it.") from error

    def where(self, number: int) -> tuple[str, str]:
        return self._path, f"row {self._first + number}"

    def folder(self, number: int) -> Path | None:
        return None if is_url(self._path) else Path(self._path).parent
