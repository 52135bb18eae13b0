"""Annotations sorted by image, on disk.

Annotation files list their boxes in any order, and the largest hold tens of millions of them. They are read through
once into a small database, from which every process takes the annotations of its images: memory stays the same
whatever the size of the set, and a conversion that was stopped need not read them again.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cloc_mllm.errors import ClocError

Event = tuple[str, str | int, dict[str, Any]]
"""What a source reads: `("image", id, facts)`; `("about", name, facts)` of the whole set; or a note on an image, as the
name of its kind, the image's id, and the note."""

_BATCH = 10_000


class AnnotationIndex:
    """Images in the order of their source, each with its notes.

    Args:
        path: The database's file, made by :meth:`build`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._database = sqlite3.connect(f"file:{self.path}?mode=ro", uri=True)

    @classmethod
    def build(cls, path: str | Path, events: Iterable[Event], file: str | Path) -> AnnotationIndex:
        """Read a source's events into a new database.

        An image that comes twice (in an instances and in a captions file) counts once, its facts from the last.

        Args:
            path: The file to write; it appears when it is complete.
            events: What the source reads.
            file: The annotation file, for messages.

        Raises:
            ClocError: Notes refer to images that are not listed, or there is no image.
        """
        target, part = Path(path), Path(path).with_suffix(".part")
        part.unlink(missing_ok=True)
        database = sqlite3.connect(part)
        database.executescript(
            "PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF;"
            "CREATE TABLE images (place INTEGER PRIMARY KEY, id TEXT UNIQUE, facts TEXT);"
            "CREATE TABLE notes (image TEXT, kind TEXT, note TEXT);"
            "CREATE TABLE about (name TEXT PRIMARY KEY, facts TEXT);"
        )
        for batch in _batches(events):
            images = [(str(image), json.dumps(facts)) for kind, image, facts in batch if kind == "image"]
            about = [(str(name), json.dumps(facts)) for kind, name, facts in batch if kind == "about"]
            rest = [event for event in batch if event[0] not in ("image", "about")]
            notes = [(str(image), kind, json.dumps(note)) for kind, image, note in rest]
            put = "INSERT INTO images (id, facts) VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET facts = excluded.facts"
            database.executemany(put, images)
            database.executemany("INSERT INTO notes VALUES (?, ?, ?)", notes)
            database.executemany("INSERT OR REPLACE INTO about VALUES (?, ?)", about)
        database.execute("CREATE INDEX notes_by_image ON notes (image)")
        lost = "SELECT COUNT(DISTINCT image), MIN(image) FROM notes WHERE image NOT IN (SELECT id FROM images)"
        count, first = database.execute(lost).fetchone()
        if count:
            problem = f"annotations refer to {count} images that no file lists, the first of them {first}"
            raise ClocError(problem, file=file, remedy="Check that all files are of the same split and complete.")
        if not database.execute("SELECT COUNT(*) FROM images").fetchone()[0]:
            raise ClocError("no image is listed", file=file, remedy="Is it the right kind of file?")
        database.commit()
        database.close()
        part.replace(target)
        return cls(target)

    def __len__(self) -> int:
        return int(self._database.execute("SELECT COUNT(*) FROM images").fetchone()[0])

    def about(self) -> dict[str, dict[str, Any]]:
        """What the source told of the whole set, by name."""
        return {name: json.loads(facts) for name, facts in self._database.execute("SELECT name, facts FROM about")}

    def images(self, start: int, stop: int) -> Iterator[tuple[str, dict[str, Any], list[tuple[str, dict[str, Any]]]]]:
        """Id, facts and notes of the images from one place to another (places count from 0), in order."""
        # Rows are numbered from 1 without gaps: an image that came twice changed its row and used up no number.
        asked = "SELECT id, facts FROM images WHERE place > ? AND place <= ? ORDER BY place"
        rows = self._database.execute(asked, (start, stop))
        for image, facts in rows.fetchall():
            notes = self._database.execute("SELECT kind, note FROM notes WHERE image = ? ORDER BY rowid", (image,))
            yield image, json.loads(facts), [(kind, json.loads(note)) for kind, note in notes]


def _batches(events: Iterable[Event]) -> Iterator[list[Event]]:
    batch: list[Event] = []
    for event in events:
        batch.append(event)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    yield batch
