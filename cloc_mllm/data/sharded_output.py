"""A folder written shard by shard, by several processes, that goes on where it was stopped.

A shard appears under its name when it is complete, and its counts with it, so nothing is lost or written twice: a run
that is given again with the same plan ends in the same files, byte for byte, as one that was never stopped. Readers
take all shards of a folder for one data set, so files of another run never stay beside those of this one: what a
stopped run of another plan has written is removed, and anything else is refused.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloc_mllm.data.readers import SHARD_KINDS
from cloc_mllm.data.tar_shards import Sample
from cloc_mllm.errors import ClocError

_VERSION = 2
"""Of what lies in the folder of the state: one of another version is a state of another plan."""

Placed = tuple[Sample, Path | None]
"""A sample, and the folder that its relative image paths start from."""


def require_positive(**counts: int) -> None:
    """Refuse options that count something and are less than one.

    Raises:
        ClocError: One is; it is named.
    """
    for name, count in counts.items():
        if count < 1:
            raise ClocError(f"{name} is {count}", remedy="Give at least 1.")


@dataclass(frozen=True)
class ShardedOutput:
    """Where and how samples are written.

    Attributes:
        out: The folder.
        name: Name of the files without number and ending: "regions", "conversations".
        file_format: "jsonl" (joined into one file at the end), "parquet" or "webdataset".
        copy_images: With "jsonl", copy the pictures beside it instead of referring to them.
        shard: Most samples to a shard.
        folder: Name of the sub-folder of what is known so far, which is gone at the end.
    """

    out: Path
    name: str
    file_format: str = "jsonl"
    copy_images: bool = False
    shard: int = 4096
    folder: str = ".convert"

    @property
    def state(self) -> Path:
        """The folder of what is known so far."""
        return self.out / self.folder

    def begin(self, plan: Any) -> None:
        """Keep what an earlier run of the same plan has left, or make room for a new one.

        Args:
            plan: All that decides what comes out, as data that `json` can write or `str` tell apart.

        Raises:
            ClocError: The folder holds samples that no unfinished run of this folder has written.
        """
        known = hashlib.sha256(json.dumps([_VERSION, plan], default=str, sort_keys=True).encode()).hexdigest()
        stated = self.state / "plan"
        if not stated.is_file() or stated.read_text() != known:
            if stated.is_file():
                self._remove_written()
            self._drop_state()
        if strangers := sorted(self._found() - self._written()):
            remedy = "Readers would take both for one data set: choose another folder with --out, or remove the file."
            raise ClocError("the folder holds samples already", file=self.out / strangers[0], remedy=remedy)
        if not stated.is_file():
            self.state.mkdir(parents=True)
            stated.write_text(known)

    def _remove_written(self) -> None:
        """Remove what an unfinished run has written; each marker goes first, so that it never names what is gone."""
        for note in self.state.glob("*.files"):
            note.with_suffix(".json").unlink(missing_ok=True)
            for name in json.loads(note.read_text()):
                (self.out / name).unlink(missing_ok=True)
            note.unlink()

    def _drop_state(self) -> None:
        """Remove the state, the plan first: half a state must not be taken for one to go on from."""
        (self.state / "plan").unlink(missing_ok=True)
        shutil.rmtree(self.state, ignore_errors=True)

    def _written(self) -> set[str]:
        """Names of the files that this run has written or was about to."""
        return {name for note in self.state.glob("*.files") for name in json.loads(note.read_text())}

    def _found(self) -> set[str]:
        """Names of the files that readers would take for this data set; a joined file is replaced as a whole."""
        joined = f"{self.name}.jsonl" if self.file_format == "jsonl" else None
        endings = (*SHARD_KINDS, ".jsonl")
        return {file.name for ending in endings for file in self.out.glob(f"{self.name}*{ending}")} - {joined}

    def write(self, number: int, samples: Callable[[Counter[str]], Iterable[Placed]]) -> None:
        """Write one shard under its name, then its counts; a shard without counts is written again.

        Args:
            number: Of the shard, from 0.
            samples: Makes its samples, counting into what it is given.
        """
        from cloc_mllm.data.writers import JsonlWriter, open_writer

        counts: Counter[str] = Counter()
        piece = self.state / f"shard-{number:05d}"
        writer = (
            JsonlWriter(self.out, f"{self.folder}/lines-{number:05d}", self.copy_images)
            if self.file_format == "jsonl"
            else open_writer(piece, self.file_format, self.name, shard=self.shard)
        )
        with writer:
            for sample, start in samples(counts):
                writer.write(sample, start)
        files = sorted(piece.iterdir()) if piece.is_dir() else []
        names = [file.name.replace("-00000", f"-{number:05d}", 1) for file in files]
        # Noted before the first one appears, so that a run stopped right here can be cleared away.
        self._note(number, ".files", names)
        for file, name in zip(files, names, strict=True):
            file.replace(self.out / name)
        self._note(number, ".json", counts)

    def _note(self, number: int, ending: str, content: Any) -> None:
        """Write what is known of a shard; it appears when it is complete."""
        part = self.state / f"{number:05d}{ending}.part"
        part.write_text(json.dumps(content))
        part.replace(self.state / f"{number:05d}{ending}")

    def run(
        self, write: Callable[[int], None], shards: int, *, workers: int = 1, progress: bool = True, label: str = ""
    ) -> Iterator[Counter[str]]:
        """The counts of all shards in order, those that are not there yet written first.

        Args:
            write: Writes the shard of a number, through :meth:`write`; sent to the processes.
            shards: How many there are.
            workers: Processes.
            progress: Show a progress bar, if standard error is a terminal.
            label: What the bar is called.
        """
        from tqdm import tqdm

        missing = [number for number in range(shards) if not self._marker(number).exists()]
        with tqdm(total=len(missing), unit="shard", desc=label, disable=None if progress else True) as bar:
            if workers <= 1 or len(missing) <= 1:
                for number in missing:
                    write(number)
                    bar.update()
            else:
                with ProcessPoolExecutor(workers) as pool:
                    jobs: list[Future[None]] = [pool.submit(write, number) for number in missing]
                    try:
                        # As they end, so that what fails first is told first; the order of counts is made below.
                        for job in as_completed(jobs):
                            job.result()
                            bar.update()
                    except BaseException:
                        pool.shutdown(wait=False, cancel_futures=True)
                        raise
        for number in range(shards):
            yield Counter(json.loads(self._marker(number).read_text()))

    def finish(self, shards: int, report: Any) -> None:
        """Join lines to one file, write `dataset.json`, and drop what was kept for going on.

        Args:
            shards: How many shards there are.
            report: What `dataset.json` says.

        Raises:
            ClocError: Files have gone from the folder, or come to it, since they were written.
        """
        written, found = {name for name in self._written() if name.endswith(SHARD_KINDS)}, self._found()
        if wrong := sorted(written ^ found):
            what = "was written, and is gone" if wrong[0] in written else "is none of the files written"
            remedy = "Does something else write to the folder? Remove what is in it, and run the command again."
            raise ClocError(what, file=self.out / wrong[0], remedy=remedy)
        if self.file_format == "jsonl":
            target = self.out / f"{self.name}.jsonl.part"
            with target.open("wb") as joined:
                for number in range(shards):
                    with (self.state / f"lines-{number:05d}.jsonl").open("rb") as piece:
                        shutil.copyfileobj(piece, joined)
            target.replace(self.out / f"{self.name}.jsonl")
        (self.out / "dataset.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        self._drop_state()

    def _marker(self, number: int) -> Path:
        return self.state / f"{number:05d}.json"
