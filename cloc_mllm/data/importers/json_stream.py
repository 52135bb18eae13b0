"""Reads the big lists of a JSON file item by item.

Annotation files such as COCO's are one object of half a gigabyte whose lists hold a million small items; parsed at
once they take several gigabytes. This walks through the text with a window of a few megabytes.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any

from cloc_mllm.errors import ClocError

_WINDOW = 1 << 20
_SPACE = " \t\r\n"
_AFTER_VALUE = _SPACE + ",]}"


class _Window:
    """A stretch of a text file with a reading position, refilled on demand."""

    def __init__(self, file: IO[str], path: Path) -> None:
        self.file, self.path = file, path
        self.text, self.at, self.passed = "", 0, 0
        self.decoder = json.JSONDecoder()

    def refill(self) -> bool:
        """Drops what was read and adds more; False at the end of the file."""
        more = self.file.read(max(_WINDOW, len(self.text) - self.at))
        self.passed += self.at
        self.text, self.at = self.text[self.at :] + more, 0
        return bool(more)

    def peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in _SPACE:
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.refill():
                return ""

    def expect(self, wanted: str) -> str:
        """Steps over the next character, which must be one of `wanted`."""
        found = self.peek()
        if not found or found not in wanted:
            raise self.error(f"expected {' or '.join(wanted)}, found {found or 'the end of the file'}")
        self.at += 1
        return found

    def value(self) -> Any:
        """The JSON value that starts here."""
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except RecursionError as error:
                raise self.error(str(error)) from error
            except ValueError as error:
                if not self.refill():
                    raise self.error(str(error)) from error
                continue
            # A number that ends near the window's end may go on behind it: "0." reads as 0 and a stray point.
            cut = end == len(self.text) or (isinstance(value, (int, float)) and self.text[end] not in _AFTER_VALUE)
            if cut and self.refill():
                continue
            self.at = end
            return value

    def error(self, reason: str) -> ClocError:
        place = self.passed + self.at
        return ClocError(f"not valid JSON near character {place}: {reason}", file=self.path, remedy="Fetch it again.")


def stream_lists(path: str | Path, names: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Yields (name, item) for every item of the named lists of a JSON object, in the order of the file.

    Args:
        path: A file that holds one JSON object.
        names: Keys whose values are lists to be walked through; other values are read and dropped.

    Raises:
        ClocError: The file cannot be read, is not JSON, or a named value is not a list.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8") as file:
            window = _Window(file, path)
            window.expect("{")
            if window.peek() == "}":
                return
            while True:
                name = window.value()
                window.expect(":")
                if name not in names:
                    window.value()
                else:
                    yield from ((name, item) for item in _items(window, name))
                if window.expect(",}") == "}":
                    return
    except (OSError, UnicodeDecodeError) as error:
        raise ClocError(f"cannot read the file: {error}", file=path, remedy="Check the path.") from error


def stream_items(path: str | Path) -> Iterator[Any]:
    """Yields every item of a JSON list, in the order of the file.

    Args:
        path: A file that holds one JSON list.

    Raises:
        ClocError: The file cannot be read, is not JSON, or is not a list.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8") as file:
            yield from _items(_Window(file, path), "the file")
    except (OSError, UnicodeDecodeError) as error:
        raise ClocError(f"cannot read the file: {error}", file=path, remedy="Check the path.") from error


def _items(window: _Window, name: str) -> Iterator[Any]:
    if window.peek() != "[":
        raise ClocError(f"'{name}' is not a list", file=window.path, remedy="Check that it is the right file.")
    window.at += 1
    if window.peek() == "]":
        window.at += 1
        return
    while True:
        yield window.value()
        if window.expect(",]") == "]":
            return
