"""`cloc-mllm label` over processes: both engines write the same bytes, a worker that dies is named, SLURM's array."""

from __future__ import annotations

import os
import subprocess
import sys
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


def test_slurms_array_makes_the_whole(pictures: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    """Two jobs of an array whose numbers begin at 3, one after the other; the second one finishes."""
    out, script = tmp_path / "out", ROOT / "scripts" / "launch" / "slurm_label.sh"
    stages = [w for n in ("captioner", "phrases", "detector") for w in (f"--{n}", f"tests.builders_labels:{n}")]
    array = {"SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_MAX": "4", "SLURM_ARRAY_TASK_COUNT": "2"}
    base = {**os.environ, **array, "SLURM_ARRAY_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT), "PYTHON": sys.executable}
    for number in ("3", "4"):
        assert not (out / "dataset.json").exists()
        done = subprocess.run(
            ["bash", str(script), str(pictures), "--out", str(out), "--workers", "0", "--shard", "4", *stages],
            env={**base, "SLURM_ARRAY_TASK_ID": number},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert output_bytes(out) == whole


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({}, "this is for sbatch --array"),
        ({"SLURM_ARRAY_TASK_ID": "1"}, "usage: sbatch"),
        (
            {"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "4"},
            "numbers of the array have to follow each other",
        ),
    ],
)
def test_usage_of_the_array_script(variables: dict[str, str], complaint: str, tmp_path: Path) -> None:
    script = ROOT / "scripts" / "launch" / "slurm_label.sh"
    words = ["photos", "--out", "out"] if len(variables) == 3 else []
    base = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    env = {**base, "SLURM_ARRAY_TASK_COUNT": "3", **variables} if variables else base
    done = subprocess.run(["bash", str(script), *words], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
