"""A folder written shard by shard, by several processes, that goes on where it was stopped.

A shard appears under its name when it is complete, and its counts with it, so nothing is lost or written twice: a run
that is given again with the same plan ends in the same files, byte for byte, as one that was never stopped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloc_mllm.data.tar_shards import Sample

Placed = tuple[Sample, Path | None]
"""A sample, and the folder that its relative image paths start from."""


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
        """
        known = hashlib.sha256(json.dumps(plan, default=str, sort_keys=True).encode()).hexdigest()
        if not (self.state / "plan").is_file() or (self.state / "plan").read_text() != known:
            shutil.rmtree(self.state, ignore_errors=True)
            self.state.mkdir(parents=True)
            (self.state / "plan").write_text(known)

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
        for file in sorted(piece.iterdir()) if piece.is_dir() else ():
            file.replace(self.out / file.name.replace("-00000", f"-{number:05d}", 1))
        marker = self._marker(number)
        part = marker.with_suffix(".part")
        part.write_text(json.dumps(counts))
        part.replace(marker)

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
                    for job in jobs:
                        job.result()
                        bar.update()
        for number in range(shards):
            yield Counter(json.loads(self._marker(number).read_text()))

    def finish(self, shards: int, report: Any) -> None:
        """Join lines to one file, write `dataset.json`, and drop what was kept for going on.

        Args:
            shards: How many shards there are.
            report: What `dataset.json` says.
        """
        if self.file_format == "jsonl":
            target = self.out / f"{self.name}.jsonl.part"
            with target.open("wb") as joined:
                for number in range(shards):
                    with (self.state / f"lines-{number:05d}.jsonl").open("rb") as piece:
                        shutil.copyfileobj(piece, joined)
            target.replace(self.out / f"{self.name}.jsonl")
        (self.out / "dataset.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(self.state)

    def _marker(self, number: int) -> Path:
        return self.state / f"{number:05d}.json"
