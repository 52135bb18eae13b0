"""The command line as a person meets it: real processes, exit codes, one clear line for what is wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
CLI = (sys.executable, "-m", "cloc_mllm.apps.cli")


def run_cli(*words: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run `cloc-mllm` in a process of its own, from a folder that is not the repository's."""
    return subprocess.run(
        [*CLI, *map(str, words)],
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def expect_refusal(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Assert exit code 2 and a last line on stderr that holds every part, without a traceback."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    for part in parts:
        assert part in last, done.stderr


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "scenes"
    done = run_cli("data", "scenes", "--n", 6, "--n-val", 2, "--n-test", 2, "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_data_goes_from_scenes_to_a_clean_check(scenes: Path) -> None:
    done = run_cli("data", "check", scenes)
    assert done.returncode == 0, done.stdout + done.stderr


def test_data_check_lists_every_fault_and_exits_2(scenes: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(scenes / "train", broken)
    lines = [json.loads(line) for line in (broken / "regions.jsonl").read_text().splitlines()]
    lines[0]["image"] = "images/missing.jpg"
    lines[1]["regions"][0]["box"] = [30, 10, 20, 40]
    lines[2]["regions"][0]["box"] = [0, 0, 1000, 40]
    lines[3]["regions"][0]["text"] = " "
    lines[4]["captoin"] = lines[4].pop("caption")
    (broken / "regions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    whole = broken / lines[5]["image"]
    whole.write_bytes(whole.read_bytes()[:200])
    done = run_cli("data", "check", broken)
    expect_refusal(done, "faults")
    for part in ("missing.jpg", "x2 < x1", "outside the image", "empty text", "captoin", Path(lines[5]["image"]).name):
        assert part in done.stdout, part


def test_a_misspelt_preset_key_is_named_with_the_right_one() -> None:
    preset = ROOT / "train" / "configs" / "pretrain_quick.yaml"
    done = run_cli("train", "explain", "--config", preset, "run.stepz=3")
    expect_refusal(done, "run.stepz", "run.steps")


def test_train_explain_tells_batch_and_parts() -> None:
    done = run_cli("train", "explain", "--config", ROOT / "train" / "configs" / "pretrain_quick.yaml")
    assert done.returncode == 0, done.stderr
    assert re.search(r"samples a step", done.stdout)


@pytest.mark.parametrize("command", ["chat", "eval", "export"])
def test_a_model_that_is_not_there_is_named(command: str, scenes: Path, tmp_path: Path) -> None:
    missing = tmp_path / "no-such-model"
    words: dict[str, tuple[object, ...]] = {
        "chat": (missing, "What is this?"),
        "eval": ("scenes", "--model", missing, "--data", scenes, "--out", tmp_path / "out"),
        "export": (missing, "--format", "clip", "--out", tmp_path / "out"),
    }
    expect_refusal(run_cli(command, *words[command]), "no-such-model")


@pytest.mark.parametrize(
    "words",
    [
        ("demo", "--preset", "miniature", "--out", "{out}"),
        ("data", "scenes", "--n", "2", "--out", "{out}"),
        ("export", "{model}", "--format", "clip", "--out", "{out}"),
    ],
    ids=lambda words: words[0],
)
def test_a_place_that_cannot_be_written_to_is_named(words: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "cloc"}')
    for out in (tmp_path / "file" / "below", Path("/proc/self/cloc")):
        expect_refusal(run_cli(*(word.format(out=out, model=model) for word in words)), str(out))


def _children(pid: int) -> list[int]:
    """Return the processes that descend from one, by its group-independent parent links."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue  # it ended while the folder was read
            parents[int(entry.name)] = int(fields[1])
    found, frontier = [], {pid}
    while frontier:
        frontier = {child for child, parent in parents.items() if parent in frontier}
        found += sorted(frontier)
    return found


def _is_running(pid: int) -> bool:
    """Whether a process is there and has not ended: what has ended stays listed until its new parent looks."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_demo_leaves_no_process_behind(number: signal.Signals, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*CLI, "demo", "--preset", "miniature", "--out", str(tmp_path / "out")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background has them, and all they start, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not (started := _children(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    started = _children(process.pid) or started
    assert started
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    # They have been killed by now; on a busy machine the kernel may need a moment to end them.
    deadline = time.monotonic() + 10
    while (left := [pid for pid in started if _is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left
