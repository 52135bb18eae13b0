"""How the demo tells what it is doing: one line a stage, and on a terminal a live line with step and loss."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

REFRESH_SECONDS = 1.0


class Progress:
    """Writes progress to a stream; the live line only where the stream is a terminal.

    Args:
        stream: Where to write, usually stderr.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._live = stream.isatty()
        self._total = 0
        self._number = 0
        self._last = 0.0

    def begin(self, total: int) -> None:
        """Start counting stages from one."""
        self._total, self._number = total, 0

    def say(self, text: str) -> None:
        """Write one line."""
        if self._live:
            self.stream.write("\r\x1b[2K")
        self.stream.write(text + "\n")
        self.stream.flush()

    def started(self, name: str, title: str, *, resumed: bool) -> None:
        """A stage's process was started."""
        self._number += 1
        self.say(f"[{self._number:2d}/{self._total}] {name:<32} {title}{', resumed' if resumed else ''}")

    def skipped(self, name: str, title: str, other_code: bool) -> None:
        """A stage was done before; say so, and whether other code did it."""
        self._number += 1
        note = "done before" + (", by other code (--fresh does it again)" if other_code else "")
        self.say(f"[{self._number:2d}/{self._total}] {name:<32} {title}: {note}")

    def finished(self, name: str, title: str, seconds: float) -> None:
        """A stage ended well."""
        self.say(f"{'':>7} {name:<32} done in {format_seconds(seconds)}")

    def tick(self, running: Sequence[tuple[str, Path, float]]) -> None:
        """Refresh the live line.

        Args:
            running: Of each running stage its name, its folder and when it started (monotonic seconds).
        """
        now = time.monotonic()
        if not self._live or now - self._last < REFRESH_SECONDS:
            return
        self._last = now
        parts = [f"{name} {format_seconds(now - start)}{_latest(folder)}" for name, folder, start in running]
        width = shutil.get_terminal_size().columns - 1
        self.stream.write("\r\x1b[2K" + (" " * 8 + " · ".join(parts))[:width])
        self.stream.flush()


def _latest(folder: Path) -> str:
    """Return step and loss of the last line of a run's metrics, if there is one to read."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return ""
    with path.open("rb") as stream:
        stream.seek(max(path.stat().st_size - 4096, 0))
        lines = stream.read().decode("utf-8", errors="replace").splitlines()
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            # The line is being written, or was cut at the start of what was read.
            continue
        if "loss" in record:
            return f" step {record.get('step', '?')} loss {record['loss']:.3f}"
    return ""


def format_seconds(seconds: float) -> str:
    """Return a length of time as people read it: 8.2 s, 95 s, 7 min 05 s, 1 h 12 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
