"""Files that are there whole or not at all, and what is known so far of a labelling, in files of that kind."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from cloc_mllm.errors import ClocError

STATE = ".label"
"""Folder within the output for what is known so far."""

Record = dict[str, Any]


_DAY = 24 * 3600.0


def process_tag() -> str:
    """What this process puts into the names of its unfinished files: machine and number."""
    return f"{socket.gethostname()}-{os.getpid()}"


def is_leftover(path: Path) -> bool:
    """Whether a file or folder named with a `process_tag` (before a `.part`) is of a process that is no more.

    Of another machine's processes that is not known: theirs are taken for dead after a day.
    """
    tag = path.name.removesuffix(".part")
    host, _, number = tag.rpartition("-")
    try:
        if host.endswith(socket.gethostname()):
            os.kill(int(number), 0)
            return False
        return time.time() - path.stat().st_mtime > _DAY
    except ProcessLookupError:
        return True
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def atomic_writer(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name when it is complete and on the disk.

    Two processes may write the same one: each has a name of its own until then.
    """
    part = path.with_name(f"{path.name}.{process_tag()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    with part.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all."""
    with atomic_writer(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def put_in_place(piece: Path, target: Path) -> None:
    """Give a finished file its name, once its content is on the disk."""
    with piece.open("rb") as file:
        os.fsync(file.fileno())
    piece.replace(target)


def write_records(path: Path, records: Iterable[Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    """Write one record a line, and facts about all of them as the last line."""
    with atomic_writer(path) as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        file.write(json.dumps({"end": True, **facts}).encode() + b"\n")


def read_records(path: Path) -> tuple[list[Record], Record] | None:
    """What `write_records` wrote: records and facts; None if it is not there, or damaged."""
    try:
        lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    except (FileNotFoundError, ValueError):
        return None
    if not lines or not all(isinstance(line, dict) for line in lines) or not lines[-1].get("end"):
        return None
    return lines[:-1], lines[-1]


class Locks:
    """Who works on an output folder: one process alone, or several that each take a part of the shards.

    The operating system lets go of a lock when its process ends, however it ends.

    Args:
        state: Folder of what is known so far; made if missing.
    """

    def __init__(self, state: Path) -> None:
        state.mkdir(parents=True, exist_ok=True)
        self._state = state
        self._held: dict[str, BinaryIO] = {}

    def take(self, name: str, *, shared: bool = False, wait: bool = False) -> bool:
        """Take a lock and keep it until `release`.

        Args:
            name: Which.
            shared: Others may have it too, if they share it.
            wait: Until whoever has it lets go.

        Returns:
            False if another process has it.
        """
        file = (self._state / f"{name}.lock").open("ab")
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.close()
            return False
        except OSError as error:
            file.close()
            problem = f"the file system has no locks ({error.strerror})"
            raise ClocError(problem, file=self._state, remedy="Choose another folder with --out.") from error
        self._held[name] = file
        return True

    def require(self, name: str, *, shared: bool = False) -> None:
        """Take a lock, or say that another process is at work."""
        if not self.take(name, shared=shared):
            remedy = "Wait for it, choose another --out, or share the work out: --shards k/n in each of n processes."
            raise ClocError("another process is labelling into this folder", file=self._state.parent, remedy=remedy)

    def release(self, *names: str) -> None:
        """Let go of some locks, or of all."""
        for name in names or tuple(self._held):
            if file := self._held.pop(name, None):
                file.close()
