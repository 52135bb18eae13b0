"""`cloc-mllm label` over processes: both engines write the same bytes, a worker that dies is named, SLURM's array."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from cloc_mllm.errors import ClocError
from cloc_mllm.labeling.pipeline import label
from tests.builders_labels import output_bytes, small_config, write_pictures
from tests.builders_training import ROOT

pytestmark = pytest.mark.integration

COUNT = 14


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), COUNT)


@pytest.fixture(scope="module")
def whole(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    label(small_config(pictures, out), progress=False)
    return output_bytes(out)


def test_two_workers_write_what_one_does_and_a_death_is_told_with_its_shard(
    pictures: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one test, as the server that forks the workers takes seconds to start, and is the same for both."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the server imports from there
    out = tmp_path / "out"
    with pytest.raises(ClocError, match=r"a worker died \(SIGKILL\) in step 'detections' on shard \d"):
        label(small_config(pictures, out, "workers=2", "detector.options.die_at=dog"), progress=False)
    spoilt = write_pictures(tmp_path / "spoilt", COUNT)
    (spoilt / "b" / "0000.png").write_bytes(b"nothing")
    with pytest.raises(ClocError, match=r"b/0000\.png"):
        label(small_config(spoilt, tmp_path / "bad", "workers=2"), progress=False)
    assert label(small_config(pictures, out, "workers=2"), progress=False) is not None
    assert output_bytes(out) == whole


def test_ray_writes_what_one_process_does(
    pictures: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three pools of actors; the GPU is only said to be there, and nobody asks it for anything."""
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    out = tmp_path / "out"
    ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False, logging_level="warning")
    try:
        config = small_config(pictures, out, "engine=ray", "captioner.gpus=0")
        assert label(config, progress=False) is not None
        assert output_bytes(out) == whole
    finally:
        ray.shutdown()


def array_script(*words: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run it as SLURM would, with an interpreter that prints what it is asked to run."""
    stand_in = cwd / "python"
    stand_in.write_text('#!/bin/sh\necho "$@"\n')
    stand_in.chmod(0o700)
    base = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    env = {**base, "PYTHON": str(stand_in), "SLURM_SUBMIT_DIR": str(ROOT), **variables}
    command = ["bash", str(ROOT / "scripts" / "launch" / "slurm_label.sh"), *words]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=60)


def test_jobs_of_slurms_array_take_all_parts(tmp_path: Path) -> None:
    """An array whose numbers begin at 3; that parts make the whole, the unit tests show."""
    array = {"SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_MAX": "5", "SLURM_ARRAY_TASK_COUNT": "3"}
    parts = []
    for number in ("3", "4", "5"):
        done = array_script("a b", "--out", "out", cwd=tmp_path, SLURM_ARRAY_TASK_ID=number, **array)
        assert done.returncode == 0, done.stderr
        start, part = done.stdout.strip().split(" --shards ")
        assert start == "-m cloc_mllm.apps.cli label a b --out out"
        parts.append(part)
    assert parts == ["0/3", "1/3", "2/3"]


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({}, "this is for sbatch --array"),
        ({"SLURM_ARRAY_TASK_ID": "1"}, "usage: sbatch"),
        (
            {
                "SLURM_ARRAY_TASK_ID": "4",
                "SLURM_ARRAY_TASK_MIN": "0",
                "SLURM_ARRAY_TASK_MAX": "4",
                "SLURM_ARRAY_TASK_COUNT": "3",
            },
            "numbers of the array have to follow each other",
        ),
    ],
)
def test_usage_of_the_array_script(variables: dict[str, str], complaint: str, tmp_path: Path) -> None:
    words = ["photos", "--out", "out"] if len(variables) == 4 else []
    done = array_script(*words, cwd=tmp_path, **variables)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
