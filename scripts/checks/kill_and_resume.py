"""Kill a training run again and again, resume it each time, and compare its weights with those of an uninterrupted run.

    python scripts/checks/kill_and_resume.py                        # 20 SIGKILLs of a small run over 2 processes
    python scripts/checks/kill_and_resume.py --kills 2 --zero 3     # fewer, at another ZeRO stage
    python scripts/checks/kill_and_resume.py optim.lr=1e-4 …        # overrides of the preset, for both runs

Kills come at random moments (`--seed`): while the processes start, while they train, and while a checkpoint is being
written. They hit one process or all of them. The exit code is 0 only if all kills were dealt
and the exported weights and the logged losses are equal to the last bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import runpy
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also runs from a clone that is not installed

from cloc_mllm.training.running.checkpoint import SAVING_FOLDER, checkpoints

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "train" / "pretrain_cloc.py"
SAVE_EVERY = 3
SMALL = (
    "model.image_size=32",
    "model.patch_size=8",
    "model.vision={hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64}",
    "model.text={hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 64}",
    "model.projection_dim=16",
    "data.validation=null",
    "run.batch_size=4",
    f"run.save_every={SAVE_EVERY}",
    "run.log_every=1",
    "run.log_to=[]",
)
MOMENTS = ("starting", "training", "saving")
WEIGHTS = (2, 3, 5)
"""How often each moment is aimed at; a save is over too soon to be hit by chance."""
PATIENCE = 300.0
CONTEXT = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Kill:
    """One SIGKILL: what the run was doing, whom it hit, how far the run had come, what there was to go on from."""

    moment: str
    victim: str
    seconds: float
    step: int
    checkpoint: str


class Launch:
    """A run's processes. They are forked from one that has imported all they need, so a start takes a second or two."""

    def __init__(self, run: Path, options: list[str], world_size: int, log: Path) -> None:
        self.run, self.log = run, log
        log.write_text("")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        words = ["--config", str(ROOT / "train/configs/pretrain_quick.yaml"), *options, f"run.output={run}"]
        self.started = time.monotonic()
        self.processes = [
            CONTEXT.Process(target=train, args=([*words, "--resume", "auto"], rank, world_size, port, str(log)))
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def ended(self) -> bool:
        """Return whether a process has ended; as a launcher does, the script then ends the others."""
        return any(process.exitcode is not None for process in self.processes)

    def succeeded(self) -> bool:
        """Wait until a process fails or all have ended well; return which."""
        deadline = time.monotonic() + 6 * PATIENCE
        while time.monotonic() < deadline and any(process.exitcode is None for process in self.processes):
            if any(process.exitcode for process in self.processes):
                return False
            time.sleep(0.05)
        return all(process.exitcode == 0 for process in self.processes)

    def steps_shown(self) -> int:
        """Return the last step this launch has printed; 0 before the first."""
        lines = self.log.read_text(errors="replace").splitlines()
        shown = [line.split()[1].split("/")[0] for line in lines if line.startswith("step ")]
        return int(shown[-1]) if shown else 0

    def moment(self) -> str:
        """Return what the run is doing."""
        if not self.steps_shown():
            return "starting"  # a `.saving` that is there now is what the last kill has left
        return "saving" if (self.run / SAVING_FOLDER).is_dir() else "training"

    def wait_for(self, moment: str, seconds: float, saves: int = 0) -> None:
        """Wait until the run does something, after so many saves of its own, and a little longer, or has ended."""
        deadline = time.monotonic() + PATIENCE
        first = max((int(path.name.split("-")[1]) for path in checkpoints(self.run)), default=0)
        while not self.ended() and moment != "starting" and time.monotonic() < deadline:
            shown = self.steps_shown()
            enough = shown >= first + saves * SAVE_EVERY
            if shown and enough and (moment == "training" or self.moment() == "saving"):
                break
            time.sleep(0.001)
        end = time.monotonic() + seconds
        while not self.ended() and time.monotonic() < end:
            time.sleep(0.001)

    def kill(self, victim: str) -> None:
        """SIGKILL a process by its rank, or all at once; then end what is left, as a launcher does."""
        for process in self.processes if victim == "all" else [self.processes[int(victim)]]:
            process.kill()
        time.sleep(0.5)
        self.close()

    def close(self) -> None:
        """End whatever is left of this launch."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def train(words: list[str], rank: int, world_size: int, port: int, log: str) -> None:
    """Be one process of the run, from its first instruction to its exit code."""
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.argv = [str(PROGRAM), *words]
    runpy.run_path(str(PROGRAM), run_name="__main__")


def run_through(run: Path, options: list[str], world_size: int, log: Path) -> float:
    """Let a run go on to its end; return the seconds until its first step."""
    launch = Launch(run, options, world_size, log)
    try:
        launch.wait_for("training", 0.0)
        start = time.monotonic() - launch.started
        succeeded = launch.succeeded()
    finally:
        launch.close()
    if not succeeded:
        raise SystemExit(f"the run failed:\n{log.read_text()[-3000:]}")
    return start


def deal_kills(args: argparse.Namespace, run: Path, options: list[str], start: float) -> list[Kill]:
    """Launch and kill a run as often as asked for, or until it has reached its end."""
    rng = random.Random(args.seed)
    kills: list[Kill] = []
    while len(kills) < args.kills:
        aim = rng.choices(MOMENTS, WEIGHTS)[0]
        victim = rng.choice(["all", *map(str, range(args.world_size))])
        later = rng.uniform(0, {"starting": start, "training": 0.5, "saving": 0.2}[aim])
        saves = rng.randrange(3)
        launch = Launch(run, options, args.world_size, args.out / f"launch{len(kills) + 1}.log")
        try:
            launch.wait_for(aim, later, saves)
            if launch.ended():
                print(f"launch {len(kills) + 1} ended before it was killed", flush=True)
                break
            moment, step = launch.moment(), launch.steps_shown()
            launch.kill(victim)
        finally:
            launch.close()
        whole = checkpoints(run)
        seconds = round(time.monotonic() - launch.started, 2)
        kills.append(Kill(moment, victim, seconds, step, whole[-1].name if whole else "none"))
        print(f"kill {len(kills):>2}: {kills[-1]}", flush=True)
    return kills


def digest(path: Path) -> str:
    """Return a file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def logged_losses(run: Path) -> list[float]:
    """Return the loss of every step."""
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def main() -> int:
    """Run, kill, resume, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the preset")
    parser.add_argument("--kills", type=int, default=20, help="how many SIGKILLs")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims")
    parser.add_argument("--world-size", type=int, default=2, help="processes")
    parser.add_argument("--zero", default="2", help="run.zero")
    parser.add_argument("--steps", type=int, help="length of the run; default: 20 for each kill")
    parser.add_argument("--out", type=Path, default=Path("runs/checks/kill_and_resume"), help="folder of all results")
    args = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"), HF_HUB_OFFLINE="1")
    # The server that forks the processes has to import this package too, not another that is installed.
    os.environ["PYTHONPATH"] = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")
    CONTEXT.set_forkserver_preload(
        ["deepspeed", "cloc_mllm.training.program", "cloc_mllm.training.pretraining.pretrain"]
    )
    args.out = args.out.resolve()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    scenes = [sys.executable, "-m", "cloc_mllm.apps.cli", "data", "scenes", "--n", "100", "--out", "data"]
    subprocess.run(scenes, cwd=args.out, check=True, capture_output=True)
    steps = args.steps or 20 * args.kills
    options = [*SMALL, f"data.train={args.out / 'data' / 'train'}", f"run.zero={args.zero}", f"run.steps={steps}"]
    options += args.overrides

    # The first process waits for all imports; what a start takes is measured after it.
    first = CONTEXT.Process(target=time.sleep, args=(0,))
    first.start()
    first.join()
    whole, cut = args.out / "whole", args.out / "cut"
    started = time.monotonic()
    start = run_through(whole, options, args.world_size, args.out / "whole.log")
    print(f"uninterrupted: {steps} steps in {time.monotonic() - started:.0f} s", flush=True)
    kills = deal_kills(args, cut, options, start)
    run_through(cut, options, args.world_size, args.out / "last.log")

    weights = [digest(run / "export" / "model.safetensors") for run in (whole, cut)]
    losses = [logged_losses(run) for run in (whole, cut)]
    hits = {moment: sum(kill.moment == moment for kill in kills) for moment in MOMENTS}
    report = {
        "kills": [asdict(kill) for kill in kills],
        "hits": hits,
        "steps": steps,
        "world_size": args.world_size,
        "zero": args.zero,
        "weights_equal": weights[0] == weights[1],
        "losses_equal": losses[0] == losses[1],
        "sha256": weights,
    }
    (args.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(
        f"\n{len(kills)} of {args.kills} kills: " + ", ".join(f"{count} while {what}" for what, count in hits.items())
    )
    print(f"weights {weights[0][:16]}… and {weights[1][:16]}…: {'equal' if report['weights_equal'] else 'DIFFERENT'}")
    print(f"losses of {len(losses[0])} steps: {'equal' if report['losses_equal'] else 'DIFFERENT'}")
    print(args.out / "report.json")
    return 0 if report["weights_equal"] and report["losses_equal"] and len(kills) == args.kills else 1


if __name__ == "__main__":
    sys.exit(main())
