"""The launch scripts, as far as one machine goes: two processes, two "nodes" that are this one, a SLURM of stand-ins.

What SLURM itself would do is played by small executables named `srun` and `scontrol`: they show that the script passes
on what it should, not that a cluster takes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.builders_training import CONFIGS, ROOT, TINY_ENCODER, losses, write_regions
from tests.integration.test_training_launchers import BIN, LIMIT, PROGRAM

pytestmark = pytest.mark.integration

SCRIPTS = ROOT / "scripts" / "launch"
SRUN = """#!/usr/bin/env bash
# As srun does: the command once for each node, at the same time, each with its number.
echo "srun $*" >>"$CALLS"
shift
for ((node = 0; node < SLURM_NNODES; node++)); do SLURM_NODEID=$node "$@" & done
code=0
for job in $(jobs -p); do wait "$job" || code=$?; done
exit "$code"
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >>"$CALLS"
[ "$1" != show ] || printf '127.0.0.1\\nlocalhost\\n'
"""


def environment() -> dict[str, str]:
    """A person's shell on a machine without an accelerator."""
    ours = {"PATH": f"{BIN}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **ours, "PYTHON": sys.executable}


def script(name: str, *words: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPTS / name), *words]
    env = {**environment(), **variables}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=LIMIT, check=False)


def training(folder: Path, name: str) -> list[str]:
    data = folder / "data"
    if not data.exists():
        write_regions(data, 24)
    sizes = ("run.steps=4", "run.batch_size=4", "run.zero=1", "run.save_every=2", f"run.output={folder / name}")
    return [PROGRAM, "--config", str(CONFIGS / "pretrain_quick.yaml"), *TINY_ENCODER, f"data.train={data}", *sizes]


def processes(run: Path) -> int:
    return int(json.loads((run / "summary.json").read_text())["world_size"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("launch")


@pytest.fixture(scope="module")
def one_node(folder: Path) -> Path:
    done = script("torchrun.sh", "2", *training(folder, "one"), cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "one"


def test_torchrun_over_two_processes(one_node: Path) -> None:
    assert processes(one_node) == 2
    assert len(losses(one_node)) == 4


def test_two_nodes_of_a_hostfile_make_one_run(folder: Path, one_node: Path) -> None:
    hostfile = folder / "hostfile"
    hostfile.write_text("# both are this machine\nlocalhost slots=1\n127.0.0.1 slots=1\n")
    variables = {**environment(), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29881"}
    words = ["bash", str(SCRIPTS / "hostfile.sh"), str(hostfile), "--no_ssh"]
    nodes = []
    for node in ("0", "1"):
        with (folder / f"node{node}.log").open("w") as log:
            command = [*words, node, *training(folder, "hosts")]
            nodes.append(subprocess.Popen(command, cwd=folder, env=variables, stdout=log, stderr=log))
    try:
        codes = [node.wait(timeout=LIMIT) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert codes == [0, 0], (folder / "node0.log").read_text()[-2000:] + (folder / "node1.log").read_text()[-2000:]
    assert processes(folder / "hosts") == 2
    assert losses(folder / "hosts") == losses(one_node)


def slurm(folder: Path) -> dict[str, str]:
    """Stand-ins on PATH, and what SLURM would have set."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(stat.S_IRWXU)
    calls = folder / "calls.txt"
    calls.write_text("")
    job = {
        "SLURM_JOB_ID": "24711",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "n[0-1]",
        "SLURM_GPUS_PER_NODE": "a100:1",
    }
    path = f"{tools}:{environment()['PATH']}"
    return {**job, "PATH": path, "CALLS": str(calls), "SLURM_SUBMIT_DIR": str(folder)}


def test_slurm_starts_one_run_on_all_nodes(folder: Path, one_node: Path) -> None:
    variables = slurm(folder)
    done = script("slurm.sh", *training(folder, "slurm"), cwd=folder, **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    assert processes(folder / "slurm") == 2
    assert losses(folder / "slurm") == losses(one_node)
    calls = Path(variables["CALLS"]).read_text()
    assert "scontrol show hostnames n[0-1]" in calls
    assert "--resume auto" in calls
    assert "requeue" not in calls


def test_slurm_puts_a_job_back_that_failed_or_runs_out_of_time(tmp_path: Path) -> None:
    variables = slurm(tmp_path)
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit(3)")
    done = script("slurm.sh", "broken.py", cwd=tmp_path, **variables)
    assert (done.returncode, "goes back into the queue" in done.stderr) == (0, True)
    assert "scontrol requeue 24711" in Path(variables["CALLS"]).read_text()
    Path(variables["CALLS"]).write_text("")
    done = script("slurm.sh", "broken.py", cwd=tmp_path, **variables, SLURM_RESTART_COUNT="3")
    assert done.returncode == 1
    assert "requeue" not in Path(variables["CALLS"]).read_text()

    Path(variables["CALLS"]).write_text("")
    (tmp_path / "long.py").write_text("import time; time.sleep(100)")
    env = {**environment(), **variables}
    job = subprocess.Popen(
        ["bash", str(SCRIPTS / "slurm.sh"), "long.py"], cwd=tmp_path, env=env, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 30
        while "srun" not in Path(variables["CALLS"]).read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        job.send_signal(signal.SIGUSR1)  # as `--signal=B:USR1@180` has SLURM do
        assert job.wait(timeout=30) == 0
        assert "scontrol requeue 24711" in Path(variables["CALLS"]).read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("name", "words", "complaint"),
    [
        ("torchrun.sh", ["0", "train.py"], "PROCESSES is '0'"),
        ("torchrun.sh", ["2", "nowhere.py"], "there is no program nowhere.py"),
        ("hostfile.sh", ["nowhere", "train.py"], "there is no hostfile nowhere"),
        ("hostfile.sh", ["bad", "--no_ssh", "0", "train.py"], "holds 'worker-1 gpus=8'"),
        ("hostfile.sh", ["twice", "--no_ssh", "0", "train.py"], "names worker-0 twice"),
        ("hostfile.sh", ["good", "--no_ssh", "2", "train.py"], "not a number from 0 to 1"),
        ("slurm.sh", ["train.py"], "this is for sbatch"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(
    name: str, words: list[str], complaint: str, tmp_path: Path
) -> None:
    (tmp_path / "good").write_text("worker-0 slots=8\nworker-1 slots=8\n")
    (tmp_path / "bad").write_text("worker-0 slots=8\nworker-1 gpus=8\n")
    (tmp_path / "twice").write_text("worker-0 slots=8\nworker-0 slots=8\n")
    (tmp_path / "train.py").write_text("")
    done = script(name, *words, cwd=tmp_path)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
