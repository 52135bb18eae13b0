"""Which files a path means, and ranges of bytes out of them, on disk or behind any URL that fsspec opens."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

from cloc_mllm.errors import ClocError

_GLOB = frozenset("*?[")


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL (`hf://`, `s3://`, `https://`, …) rather than a place on disk."""
    return "://" in str(path)


def may_be_hub_name(path: str | os.PathLike[str]) -> bool:
    """Whether a path has the form of a name on the hub, `owner/name`, rather than that of a place on disk."""
    return str(path).count("/") == 1 and not str(path).startswith((".", "/", "~"))


def is_glob(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a pattern such as `data/train-*.tar`; a file that is really called so is none."""
    return bool(_GLOB & set(str(path))) and not (not is_url(path) and Path(path).exists())


def glob_files(pattern: str | os.PathLike[str]) -> list[str]:
    """The files that fit a pattern, in order of their names.

    Raises:
        ClocError: There are none.
    """
    system, place = _file_system(str(pattern))
    found = sorted(str(name) for name in system.glob(place))
    if not found:
        raise ClocError("no file fits the pattern", file=pattern, remedy="Check the path.")
    return [system.unstrip_protocol(name) for name in found] if is_url(pattern) else found


def list_folder(path: str) -> list[str]:
    """The files right below a folder, in order of their names; of a file, the file itself.

    Raises:
        ClocError: There is nothing there.
    """
    system, place = _file_system(path)
    try:
        entries = system.ls(place, detail=True)
    except (OSError, ValueError) as error:
        raise ClocError(f"cannot be listed: {error}", file=path, remedy="Check the address.") from error
    names = sorted(str(entry["name"]) for entry in entries if entry["type"] == "file")
    return [system.unstrip_protocol(name) for name in names]


class ByteFile:
    """Reads ranges of bytes of one file. Between two reads nothing is open, so that a thousand of them cost nothing.

    Args:
        path: A path or a URL.

    Attributes:
        size: Length of the file in bytes.

    Raises:
        ClocError: There is no such file.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            if is_url(path):
                self.size = int(self._connect().size(self._place))
            else:
                self._system: Any = None
                self.size = os.path.getsize(path)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ClocError(f"cannot read the file: {reason}", file=path, remedy="Check the path.") from error

    def _connect(self) -> Any:
        self._system, self._place = _file_system(self.path)
        self._process = os.getpid()
        return self._system

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from `start` up to `stop`.

        Raises:
            ClocError: They cannot be read, or the file ends before.
        """
        try:
            if self._system is None:
                with open(self.path, "rb", buffering=0) as file:
                    file.seek(start)
                    data = _read_all(file, stop - start)
            else:
                if self._process != os.getpid():
                    self._connect()  # clients of remote storage do not survive a fork
                data = self._system.cat_file(self._place, start=start, end=stop)
        except OSError as error:
            raise ClocError(f"cannot read bytes {start} to {stop}: {error}", file=self.path) from error
        if len(data) != stop - start:
            problem = f"ends after {start + len(data)} bytes, where {stop} were expected"
            raise ClocError(problem, file=self.path, remedy="The file is cut off: copy it anew.")
        return data


def open_url(path: str) -> Any:
    """A file behind a URL, opened for reading bytes at any place; `ClocError` or `OSError` if that cannot be done."""
    system, place = _file_system(path)
    return system.open(place, "rb")


def read_text(path: str) -> str | None:
    """The text of a small file beside the data, or None if there is none."""
    system, place = _file_system(path)
    try:
        return str(system.cat_file(place), "utf-8")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ClocError(f"cannot read the file: {error}", file=path) from error


def _read_all(file: io.FileIO, length: int) -> bytes:
    data = file.read(length)
    if len(data) == length or not data:
        return data
    parts = [data]  # one call hands over at most 2 GiB, and may hand over less
    while parts[-1] and (left := length - sum(map(len, parts))):
        parts.append(file.read(left))
    return b"".join(parts)


def _file_system(path: str) -> tuple[Any, str]:
    """Fsspec's file system of a path and the path within it; opened anew in each process, as its clients demand."""
    from fsspec.core import url_to_fs

    try:
        system, place = url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise ClocError(f"cannot be opened: {error}", file=path, remedy="Check the address.") from error
    return system, str(place)
