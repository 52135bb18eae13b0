"""Watches the processes of a run: one that holds up the others is reported by name, and the run is ended.

A process that hangs, say on a file of a dead disk, makes all others wait in a collective until that gives up, half an
hour later and without a name. Here every process notes what it begins to do, which costs less than a microsecond; a
thread of its own shows these notes to the others through a store, and judges. All processes do the same things in the
same order, so the one that is held up by none is the one that has begun the fewest.
"""

from __future__ import annotations

import datetime
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

STALLED = 75
"""Exit code of a run that was ended for a stall; sysexits.h calls it a temporary failure, worth another try."""
STALLS_FOLDER = "stalls"
SLOW_PHASES = ("starting", "evaluating", "saving", "exporting")
ALLOWANCE = 6
"""How much longer than a step's work the phases above may take, and all of the first step."""
SHOWN = 8
_DONE = 2**62
# A process whose innermost calls are in these waits for others.
_COLLECTIVES = ("torch/distributed/", "deepspeed/comm/")


@dataclass(frozen=True)
class Sign:
    """What a process says of itself.

    Attributes:
        rank: Which process.
        host: Where it runs.
        pid: Its number there.
        count: How many things it has begun.
        step: The optimiser step, from 1.
        phase: What it does.
        age: Seconds since it began that, by its own clock.
        allowed: Seconds it may take.
        place: The innermost line of its main thread, once it takes long.
        waits: Whether that line is inside a collective.
    """

    rank: int
    host: str
    pid: int
    count: int
    step: int
    phase: str
    age: float
    allowed: float
    place: str = ""
    waits: bool = False


class Board(Protocol):
    """Where the processes' signs hang."""

    def publish(self, rank: int, text: str) -> None:
        """Replace a process's sign."""

    def read(self, rank: int) -> str | None:
        """Return a process's sign, or ``None`` if it has never shown one."""

    def claim(self, verdict: str) -> str:
        """Put up a verdict unless there is one; return the one that is up."""

    def verdict(self) -> str | None:
        """Return the verdict, if there is one."""


class LocalBoard:
    """A board inside one process."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}

    def publish(self, rank: int, text: str) -> None:
        """Replace a process's sign."""
        self._texts[str(rank)] = text

    def read(self, rank: int) -> str | None:
        """Return a process's sign, or ``None``."""
        return self._texts.get(str(rank))

    def claim(self, verdict: str) -> str:
        """Put up a verdict unless there is one; return the one that is up."""
        return self._texts.setdefault("verdict", verdict)

    def verdict(self) -> str | None:
        """Return the verdict, if there is one."""
        return self._texts.get("verdict")


class StoreBoard:
    """A board in the store through which the processes found each other, over a connection of its own."""

    def __init__(self) -> None:
        from torch import distributed

        store = distributed.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=60),
        )
        # An elastic launcher keeps its store when it starts the processes anew: what is left in it is not of this run.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = distributed.PrefixStore(f"cloc_watch/{attempt}", store)

    def publish(self, rank: int, text: str) -> None:
        """Replace a process's sign."""
        self._store.set(str(rank), text)

    def read(self, rank: int) -> str | None:
        """Return a process's sign, or ``None``."""
        return self._store.get(str(rank)).decode() if self._store.check([str(rank)]) else None

    def claim(self, verdict: str) -> str:
        """Put up a verdict unless there is one; return the one that is up."""
        return self._store.compare_set("verdict", "", verdict).decode()

    def verdict(self) -> str | None:
        """Return the verdict, if there is one."""
        return self._store.get("verdict").decode() if self._store.check(["verdict"]) else None


def judge(signs: Sequence[Sign], silence: Mapping[int, float]) -> list[Sign]:
    """Return the processes that hold up the others, if any does.

    Args:
        signs: The last sign of every process.
        silence: Seconds since each process last showed a new one.

    Returns:
        Of the processes that are furthest behind, those that do not wait in a collective and have taken longer than
        they may; if all of them wait, and all for too long, all of them.
    """
    count = min(sign.count for sign in signs)
    behind = [sign for sign in signs if sign.count == count < _DONE]
    # A frozen process waits for nobody, wherever it was last seen.
    acting = [sign for sign in behind if not sign.waits or silence[sign.rank] > sign.allowed / 2]
    late = [sign for sign in acting or behind if sign.age + silence[sign.rank] > sign.allowed]
    # Whoever waits may have waited for long for one that has only just come to where they stand.
    return late if acting or len(late) == len(behind) else []


class StallWatch:
    """Notes what this process does, and ends the run if one stands still. A context manager around the whole run.

    Args:
        rank: This process.
        world_size: How many there are.
        timeout: Seconds that a process may hold up the others within a step; ``None``: nothing is watched.
        folder: The run folder; stacks are written to `stalls/` in it.
        board: Where signs hang; ``None``: in the launcher's store, or here if there is one process.
        end: Ends the process.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        timeout: float | None,
        folder: str | os.PathLike[str],
        *,
        board: Board | None = None,
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self.folder = Path(folder) / STALLS_FOLDER
        self.board = board
        self.interval = min(10.0, (timeout or 0.0) / 4)
        self._end_process = end
        self._host, self._main = socket.gethostname(), threading.main_thread().ident or 0
        self._note = (0, time.monotonic(), "starting", 0)
        self._first_step: int | None = None
        self._heard: dict[int, tuple[str | None, float]] = {}
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self, phase: str, step: int) -> None:
        """Note what this process begins to do. All processes have to begin the same things in the same order.

        Args:
            phase: A word or two.
            step: The optimiser step it belongs to, from 1.
        """
        self._note = (self._note[0] + 1, time.monotonic(), phase, step)
        if self._first_step is None:
            self._first_step = step

    def __enter__(self) -> StallWatch:
        """Begin to watch."""
        if self.timeout is not None:
            if self.board is None:
                self.board = LocalBoard() if self.world_size == 1 else StoreBoard()
            self._note = (0, time.monotonic(), "starting", 0)
            self._thread = threading.Thread(target=self._watch, name="stall-watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Say that this process is through, or has failed and will say why; the others are not kept from ending."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(self.interval + 1)
            if kind is None and self.board is not None:
                self._note = (_DONE, time.monotonic(), "done", self._note[3])
                self.board.publish(self.rank, self._sign_text())

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        # The first process judges. The last one does too: it runs on another node, if there are several.
        judges = self.rank in (0, self.world_size - 1)
        while not self._over.wait(self.interval):
            try:
                verdict = self._look(judges)
            except RuntimeError as error:
                # The process that held the store is gone; the launcher is about to end this one too.
                if not self._over.is_set():
                    print(f"process {self.rank} no longer watches for stalls: {error}", file=sys.stderr, flush=True)
                return
            if verdict is not None:
                self._finish(json.loads(verdict))
                return

    def _look(self, judges: bool) -> str | None:
        """Show this process's sign and return the verdict on the run, if there is one."""
        assert self.board is not None
        assert self.timeout is not None
        self.board.publish(self.rank, self._sign_text())
        verdict = self.board.verdict()
        if verdict is not None or not judges:
            return verdict
        now, signs, silence = time.monotonic(), [], {}
        for rank in range(self.world_size):
            text = self.board.read(rank)
            if rank not in self._heard or self._heard[rank][0] != text:
                self._heard[rank] = (text, now)
            silence[rank] = now - self._heard[rank][1]
            unheard = Sign(rank, "an unknown host", 0, -1, 0, "starting", 0.0, ALLOWANCE * self.timeout)
            signs.append(unheard if text is None else Sign(**json.loads(text)["sign"]))
        late = judge(signs, silence)
        if not late:
            return None
        mine = json.dumps({"by": self.rank, "late": [s.rank for s in late], "text": self._report(late, silence)})
        return self.board.claim(mine)

    def _sign_text(self) -> str:
        """Return this process's sign as it hangs: with the time, so that each is a new one."""
        count, since, phase, step = self._note
        age = time.monotonic() - since
        timeout = self.timeout or 0.0
        slow = phase in SLOW_PHASES or step == self._first_step
        place, waits = self._place() if age > timeout / 2 else ("", False)
        allowed = ALLOWANCE * timeout if slow else timeout
        sign = Sign(self.rank, self._host, os.getpid(), count, step, phase, age, allowed, place, waits)
        return json.dumps({"at": time.monotonic(), "sign": asdict(sign)})

    def _place(self) -> tuple[str, bool]:
        """Return the main thread's innermost line, and whether it is inside a collective."""
        frame = sys._current_frames().get(self._main)
        if frame is None:
            return "", False
        place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"
        files: list[str] = []
        while frame is not None and len(files) < 6:
            files.append(frame.f_code.co_filename)
            frame = frame.f_back
        return place, any(part in file for file in files for part in _COLLECTIVES)

    def _report(self, late: Sequence[Sign], silence: Mapping[int, float]) -> str:
        lines = []
        for sign in late[:SHOWN]:
            quiet, seconds = silence[sign.rank], sign.age + silence[sign.rank]
            does = f"{sign.phase} for {seconds:.0f} s" + (f", at {sign.place}" if sign.place else "")
            if quiet > sign.allowed / 2:
                does = f"does not respond, without a sign for {quiet:.0f} s, last seen {sign.phase}"
            lines.append(f"stalled: process {sign.rank} on {sign.host} (pid {sign.pid}) at step {sign.step}: {does}")
        if len(late) > SHOWN:
            lines.append(f"stalled: and {len(late) - SHOWN} more processes")
        waiting = self.world_size - len(late)
        lines.append(
            f"stalled: {waiting} other processes wait; the run ends with exit code {STALLED} (run.stall_timeout is "
            f"{self.timeout:g} s, {ALLOWANCE} times that while starting, evaluating and saving); stacks are in "
            f"{self.folder}"
        )
        return "\n".join(lines)

    def _finish(self, verdict: dict[str, Any]) -> None:
        """Write this process's stack, speak if it falls to this process, and end."""
        late = self.rank in verdict["late"]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / f"process{self.rank}.txt").open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            print(f"process {self.rank} cannot write its stack: {error}", file=sys.stderr, flush=True)
        if late:
            print(f"stalled: this is process {self.rank}, and it stands here:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        speaks = verdict["by"] == self.rank
        if speaks:
            print(verdict["text"], file=sys.stderr, flush=True)
        # The launcher ends all processes once one has ended: each needs time to see the verdict and write its stack.
        time.sleep(2 * self.interval + (1 if speaks else 3))
        sys.stdout.flush()
        self._end_process(STALLED)
