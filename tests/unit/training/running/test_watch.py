"""The watch over processes: whom it blames, when it leaves a run alone, and that noting costs nothing."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloc_mllm.training.running.watch import ALLOWANCE, STALLED, LocalBoard, Sign, StallWatch, judge


def sign(rank: int, count: int, age: float, *, allowed: float = 10.0, waits: bool = False) -> Sign:
    return Sign(rank, "host", 1, count, 3, "forward", age, allowed, "here.py:1 in f", waits)


def ranks(signs: list[Sign], silence: dict[int, float] | None = None) -> list[int]:
    return [late.rank for late in judge(signs, silence or {s.rank: 0.0 for s in signs})]


def test_the_process_that_has_begun_the_fewest_things_is_the_one() -> None:
    assert ranks([sign(0, 8, 50), sign(1, 7, 50), sign(2, 8, 50)]) == [1]
    assert ranks([sign(0, 8, 5), sign(1, 7, 5)]) == [], "nobody is over time"
    # The others have waited too long, but the one they wait for may take its time.
    assert ranks([sign(0, 8, 50), sign(1, 7, 50, allowed=60)]) == []


def test_among_equals_those_that_wait_in_a_collective_are_not_to_blame() -> None:
    assert ranks([sign(0, 7, 50, waits=True), sign(1, 7, 50)]) == [1]
    assert ranks([sign(0, 7, 50, waits=True), sign(1, 7, 50, waits=True)]) == [0, 1], "then the network is"
    assert ranks([sign(0, 7, 50, waits=True), sign(1, 7, 1)]) == [], "the second has only just come"
    assert ranks([sign(0, 7, 50, waits=True), sign(1, 7, 9, waits=True)]) == []


def test_a_process_that_shows_no_sign_is_late_although_its_last_one_was_young() -> None:
    assert ranks([sign(0, 7, 50, waits=True), sign(1, 7, 0.1, waits=True)], {0: 0.0, 1: 49.0}) == [1]


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 9.9)), min_size=1, max_size=6))
def test_nobody_is_blamed_before_the_time_is_over(notes: list[tuple[int, float]]) -> None:
    assert ranks([sign(rank, count, age) for rank, (count, age) in enumerate(notes)]) == []


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 99), st.booleans()), min_size=1, max_size=6))
def test_whoever_is_blamed_is_behind_everyone_and_over_time(notes: list[tuple[int, float, bool]]) -> None:
    signs = [sign(rank, count, age, waits=waits) for rank, (count, age, waits) in enumerate(notes)]
    for rank in ranks(signs):
        assert signs[rank].age > signs[rank].allowed
        assert signs[rank].count == min(s.count for s in signs)


def run_two(folder: Path, timeout: float, phase: str) -> tuple[list[int], float]:
    """Two processes' watches on one board: the second begins a phase and never ends it."""
    ended: list[int] = []
    board, started = LocalBoard(), time.monotonic()
    watches = [StallWatch(rank, 2, timeout, folder, board=board, end=ended.append) for rank in (0, 1)]
    for watch in watches:
        watch.__enter__()
        watch.beat("loading data", 1)
    for watch in watches:
        watch.beat(phase, 2)
    watches[0].beat("forward", 2)
    deadline = time.monotonic() + 2.5
    while len(ended) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    for watch in watches:
        watch.__exit__(None, None, None)
    return ended, time.monotonic() - started


def test_a_stall_is_told_by_rank_phase_and_place_and_ends_every_process(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pause = threading.Event()
    # Not the seconds that processes of a real run give each other to write their stacks.
    monkeypatch.setattr("cloc_mllm.training.running.watch.time.sleep", lambda seconds: pause.wait(min(seconds, 0.05)))
    ended, seconds = run_two(tmp_path, 0.3, "loading data")
    assert ended == [STALLED, STALLED]
    assert seconds < 3
    said = capfd.readouterr().err
    assert "stalled: process 1 on " in said
    assert "at step 2: loading data for" in said
    assert "stalled: 1 other processes wait" in said
    assert said.count("stalled: process 1") == 1, "one process speaks"
    assert {path.name for path in (tmp_path / "stalls").iterdir()} == {"process0.txt", "process1.txt"}
    assert "in run_two" in (tmp_path / "stalls" / "process1.txt").read_text()


def test_slow_phases_have_more_time(tmp_path: Path) -> None:
    assert run_two(tmp_path, 1.0, "saving")[0] == []
    assert not (tmp_path / "stalls").exists()
    watch = StallWatch(0, 1, 10.0, tmp_path)
    watch.beat("forward", 7)
    assert f'"allowed": {10.0 * ALLOWANCE}' in watch._sign_text(), "the first step of a run"
    watch.beat("forward", 8)
    assert '"allowed": 10.0' in watch._sign_text()


def test_a_process_that_is_through_holds_up_nobody(tmp_path: Path) -> None:
    ended: list[int] = []
    board = LocalBoard()
    first, second = (StallWatch(rank, 2, 0.2, tmp_path, board=board, end=ended.append) for rank in (0, 1))
    with first:
        with second:
            second.beat("exporting", 1)
        for _ in range(20):
            first.beat("exporting", 1)
            time.sleep(0.02)
    assert ended == []


def test_noting_costs_next_to_nothing_and_unwatched_runs_have_no_thread(tmp_path: Path) -> None:
    with StallWatch(0, 1, None, tmp_path) as watch:
        assert not [thread for thread in threading.enumerate() if thread.name == "stall-watch"]
        started = time.perf_counter()
        for _ in range(10_000):
            watch.beat("forward", 1)
        assert (time.perf_counter() - started) / 10_000 < 5e-5
