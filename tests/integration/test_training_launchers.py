"""The real launchers: `deepspeed`, `torchrun` and plain `python`, a SIGKILL in between, and what they leave behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.builders_training import (
    CONFIGS,
    ROOT,
    TINY_ENCODER,
    losses,
    nothing_left_in_shared_memory,
    run_program,
    write_regions,
)
from tests.harness import run_ranks

pytestmark = pytest.mark.integration

BIN = Path(sys.executable).parent
PROGRAM = str(ROOT / "train" / "pretrain_cloc.py")
LIMIT = 300
"""Seconds that a launch may take on a busy machine."""


def environment() -> dict[str, str]:
    """As a person's shell: nothing that the toolkit would need set, and no compiler to fall back on."""
    kept = ("HOME", "LANG", "TMPDIR", "VIRTUAL_ENV")
    tools = {"PATH": f"{BIN}:{_path_without_compilers()}", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return {**{key: os.environ[key] for key in kept if key in os.environ}, **tools}


def _path_without_compilers() -> str:
    folders = os.environ["PATH"].split(":")
    return ":".join(f for f in folders if f and not any(Path(f, name).exists() for name in ("g++", "c++", "nvcc")))


def arguments(data: Path, output: Path, *overrides: str) -> list[str]:
    return [
        "--config",
        str(CONFIGS / "pretrain_quick.yaml"),
        *TINY_ENCODER,
        f"data.train={data}",
        f"run.output={output}",
        *("run.steps=40", "run.batch_size=4", "run.zero=2", "run.save_every=2", "run.keep=null"),
        *overrides,
    ]


def launch(words: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=LIMIT, check=False)


def deepspeed(*words: str) -> list[str]:
    return [sys.executable, str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", "29871", PROGRAM, *words]


def kill_once_there(words: list[str], cwd: Path, sign: Path) -> None:
    """Start a launcher and SIGKILL everything it has started as soon as a file appears."""
    with (cwd / "killed.log").open("w") as log:
        process = subprocess.Popen(words, cwd=cwd, env=environment(), stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + LIMIT
        while not sign.exists():
            assert process.poll() is None, (cwd / "killed.log").read_text()[-3000:]
            assert time.monotonic() < deadline, "the run never wrote a checkpoint"
            time.sleep(0.02)
        for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            each.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()


def test_killed_under_deepspeed_and_resumed_under_torchrun(tmp_path: Path) -> None:
    data = write_regions(tmp_path / "data", 48)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_ranks(run_program, 2, "pretrain_cloc", arguments(data, whole), init_group=False, timeout=LIMIT)
    with nothing_left_in_shared_memory():
        kill_once_there(deepspeed(*arguments(data, cut)), tmp_path, cut / "checkpoint-6" / "run_state.json")
        assert not (cut / "export").exists(), "the run ended before it could be killed"
        survived = max(int(path.name.split("-")[1]) for path in cut.glob("checkpoint-*"))
        assert survived < 40
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29872"]
        done = launch([*torchrun, PROGRAM, *arguments(data, cut), "--resume"], tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
    assert losses(cut) == losses(whole)
    assert (cut / "export" / "model.safetensors").read_bytes() == (whole / "export" / "model.safetensors").read_bytes()
    assert "\r" not in done.stderr, "a progress bar was drawn although stderr is no terminal"


def test_plain_python_starts_deepspeed_by_itself(tmp_path: Path) -> None:
    data = write_regions(tmp_path / "data", 48)
    options = ("run.steps=3", "run.save_every=null")
    with nothing_left_in_shared_memory():
        done = launch([sys.executable, PROGRAM, *arguments(data, tmp_path / "run", *options)], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(losses(tmp_path / "run")) == 3
    assert shutil.which("g++", path=environment()["PATH"]) is None


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("run.zero=0 run.precision=bf16", "bf16 with ZeRO stage 0 is refused"),
        ("optim.learning_rate=1", "unknown key 'optim.learning_rate'"),
        ("run.batch_size=5 run.micro_batch_size=2", "does not divide"),
        ("run.zero=zero9.json", "there is no such file"),
        ("data.train=nowhere", "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(override: str, complaint: str, tmp_path: Path) -> None:
    words = [sys.executable, PROGRAM, *arguments(tmp_path / "data", tmp_path / "run"), *override.split()]
    done = launch(words, tmp_path)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
