"""Stages run once, in order, side by side where slots allow; failures and interruptions leave nothing half done."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from pathlib import Path

import pytest

from cloc_mllm.apps.demo.progress import Progress, format_seconds
from cloc_mllm.apps.demo.stages import Stage, StageFailedError, StageRunner

_WRITE = (
    "import pathlib, sys; p = pathlib.Path(sys.argv[1]); p.mkdir(parents=True); (p / 'done').write_text(sys.argv[2])"
)


def _stage(out: Path, name: str, text: str = "text", after: tuple[str, ...] = (), slots: int = 1) -> Stage:
    command = (sys.executable, "-c", _WRITE, str(out / name), text)
    return Stage(name, f"writes {text}", command, after, slots, {"world_size": slots})


def _runner(out: Path, slots: int = 1) -> tuple[StageRunner, io.StringIO]:
    stream = io.StringIO()
    return StageRunner(out, slots, dict(os.environ), Progress(stream)), stream


def test_stages_run_and_leave_their_cost(tmp_path: Path) -> None:
    runner, stream = _runner(tmp_path)
    stamps = runner.run([_stage(tmp_path, "a"), _stage(tmp_path, "b/c", after=("a",))])
    assert (tmp_path / "b/c/done").read_text() == "text"
    assert list(stamps) == ["a", "b/c"]
    assert all(stamp["seconds"] > 0 and stamp["world_size"] == 1 and not stamp["skipped"] for stamp in stamps.values())
    assert json.loads((tmp_path / "stages/b.c.json").read_text())["name"] == "b/c"
    assert "[ 2/2] b/c" in stream.getvalue()


def test_a_second_run_does_nothing_again(tmp_path: Path) -> None:
    stages = [_stage(tmp_path, "a"), _stage(tmp_path, "b", after=("a",))]
    first = _runner(tmp_path)[0].run(stages)
    mark = (tmp_path / "a/done").stat().st_mtime_ns
    second = _runner(tmp_path)[0].run(stages)
    assert (tmp_path / "a/done").stat().st_mtime_ns == mark
    assert all(stamp["skipped"] for stamp in second.values())
    assert [stamp["seconds"] for stamp in second.values()] == [stamp["seconds"] for stamp in first.values()]


def test_a_changed_stage_redoes_what_depends_on_it_and_no_more(tmp_path: Path) -> None:
    def stages(text: str) -> list[Stage]:
        return [
            _stage(tmp_path, "a", text),
            _stage(tmp_path, "other"),
            _stage(tmp_path, "b", after=("a",)),
        ]

    _runner(tmp_path)[0].run(stages("one"))
    stamps = _runner(tmp_path)[0].run(stages("two"))
    assert {name: stamp["skipped"] for name, stamp in stamps.items()} == {"a": False, "other": True, "b": False}
    assert (tmp_path / "a/done").read_text() == "two"


def test_a_changed_settings_file_redoes_the_stage(tmp_path: Path) -> None:
    out, settings = tmp_path / "out", tmp_path / "preset.yaml"
    settings.write_text("steps: 1")
    stage = _stage(out, "a", str(settings))
    _runner(out)[0].run([stage])
    assert _runner(out)[0].run([stage])["a"]["skipped"]
    settings.write_text("steps: 2")
    assert not _runner(out)[0].run([stage])["a"]["skipped"]


def test_a_missing_folder_redoes_the_stage(tmp_path: Path) -> None:
    stage = _stage(tmp_path, "a")
    _runner(tmp_path)[0].run([stage])
    (tmp_path / "a/done").unlink()
    (tmp_path / "a").rmdir()
    assert not _runner(tmp_path)[0].run([stage])["a"]["skipped"]


def test_a_moved_output_folder_keeps_its_stamps(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    _runner(before)[0].run([_stage(before, "a")])
    before.rename(after)
    assert _runner(after)[0].run([_stage(after, "a")])["a"]["skipped"]


def test_a_failure_shows_the_end_of_the_log_and_leaves_no_stamp(tmp_path: Path) -> None:
    bad = Stage("bad", "fails", (sys.executable, "-c", "print('what went wrong'); raise SystemExit(3)"))
    with pytest.raises(StageFailedError, match=r"bad failed with exit code 3(.|\n)*what went wrong"):
        _runner(tmp_path)[0].run([bad, _stage(tmp_path, "never", after=("bad",))])
    assert not (tmp_path / "stages/bad.json").exists()
    assert not (tmp_path / "never").exists()


def _sleeper(out: Path, name: str, seconds: float, slots: int = 1) -> Stage:
    code = (
        "import pathlib, sys, time; p = pathlib.Path(sys.argv[1]); p.mkdir(parents=True)\n"
        "(p / 'start').write_text(repr(time.time())); time.sleep(float(sys.argv[2]))\n"
        "(p / 'end').write_text(repr(time.time()))"
    )
    return Stage(name, "sleeps", (sys.executable, "-c", code, str(out / name), str(seconds)), (), slots)


def _overlap(out: Path, one: str, two: str) -> bool:
    times = [tuple(float((out / name / end).read_text()) for end in ("start", "end")) for name in (one, two)]
    return times[0][0] < times[1][1] and times[1][0] < times[0][1]


@pytest.mark.parametrize(("slots", "side_by_side"), [(1, False), (2, True)])
def test_stages_share_the_slots(slots: int, side_by_side: bool, tmp_path: Path) -> None:
    _runner(tmp_path, slots)[0].run([_sleeper(tmp_path, "a", 1.0), _sleeper(tmp_path, "b", 1.0)])
    assert _overlap(tmp_path, "a", "b") == side_by_side


def test_a_stage_of_two_processes_takes_two_slots(tmp_path: Path) -> None:
    _runner(tmp_path, 2)[0].run([_sleeper(tmp_path, "a", 0.5, slots=2), _sleeper(tmp_path, "b", 0.5)])
    assert not _overlap(tmp_path, "a", "b")


def test_a_failure_ends_what_runs_beside_it(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    code = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(60)"
    slow = Stage("slow", "sleeps", (sys.executable, "-c", code, str(pid_file)))
    wait = (
        "import pathlib, sys, time\n"
        "while not pathlib.Path(sys.argv[1]).is_file() or not pathlib.Path(sys.argv[1]).read_text(): time.sleep(0.05)\n"
        "sys.exit(1)"
    )
    bad = Stage("bad", "fails", (sys.executable, "-c", wait, str(pid_file)))
    started = time.monotonic()
    with pytest.raises(StageFailedError):
        _runner(tmp_path, 2)[0].run([slow, bad])
    assert time.monotonic() - started < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


def test_an_interrupted_stage_resumes_from_its_checkpoint_and_a_changed_one_starts_anew(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys; p = pathlib.Path(sys.argv[1])\n"
        "(p / 'checkpoint-1').mkdir(parents=True, exist_ok=True)\n"
        "(p / 'checkpoint-1' / 'run_state.json').write_text('{}')\n"
        "(p / 'mode').write_text('resumed' if 'go-on' in sys.argv else 'fresh')\n"
        "sys.exit(0 if 'go-on' in sys.argv or 'well' in sys.argv else 1)"
    )

    def stage(*words: str) -> Stage:
        return Stage("a", "", (sys.executable, "-c", code, str(tmp_path / "a"), *words), resume=("go-on",))

    with pytest.raises(StageFailedError):
        _runner(tmp_path)[0].run([stage()])
    _runner(tmp_path)[0].run([stage()])
    assert (tmp_path / "a/mode").read_text() == "resumed"
    (tmp_path / "a/stale").write_text("")
    _runner(tmp_path)[0].run([stage("well")])
    assert (tmp_path / "a/mode").read_text() == "fresh"
    assert not (tmp_path / "a/stale").exists()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.44, "0.4 s"), (9.96, "10.0 s"), (95, "95 s"), (425, "7 min 05 s"), (4320, "1 h 12 min")]
)
def test_lengths_of_time(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
