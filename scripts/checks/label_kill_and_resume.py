"""Kill a labelling again and again, start it anew each time, and compare its shards with those of an uninterrupted one.

    python scripts/checks/label_kill_and_resume.py                          # 10 SIGKILLs
    python scripts/checks/label_kill_and_resume.py --kills 3 format=jsonl   # fewer; overrides of the configuration

Pictures and captions are procedural scenes, phrases their n-grams, and the detector is a tiny OWLv2 with random
weights: real stages, whose answers nobody would miss. Kills come at random moments (`--seed`) of all that a run does:
while it looks at the source, while a stage works, while shards are written. The exit code is 0 only if all kills were
dealt, and all files are equal to the last byte, with no sample missing and none there twice.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also runs from a clone that is not installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "labeling"))

from tiny_owl import save_detector

from cloc_mllm.data.readers import open_samples
from cloc_mllm.labeling.config import LabelConfig, load_label_config
from cloc_mllm.labeling.files import STATE
from cloc_mllm.labeling.pipeline import label
from cloc_mllm.labeling.steps import STEPS

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Kill:
    """One SIGKILL: after how long, in which step, how many shards of it were there, and what it left half-written."""

    seconds: float
    step: str
    shards: int
    unfinished: int


def work(config: LabelConfig) -> None:
    """Be one launch."""
    label(config, progress=False)


def launch(config: LabelConfig) -> multiprocessing.process.BaseProcess:
    """Start one."""
    process = CONTEXT.Process(target=work, args=(config,))
    process.start()
    return process


def run_through(config: LabelConfig) -> float:
    """Let a launch come to its end; return the seconds that it took."""
    start = time.monotonic()
    process = launch(config)
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"the labelling failed with exit code {process.exitcode}")
    return time.monotonic() - start


def shards_done(out: Path) -> dict[str, int]:
    """How many shards each step has left its answers on."""
    done = {step: len([*out.glob(f"{STATE}/{step}-*/[0-9]*.jsonl")]) for step in STEPS[:-1]}
    return {**done, "shards": len([*out.glob(f"{STATE}/done/*.json")])}


def deal_kills(config: LabelConfig, kills: int, seed: int, shards: int) -> list[Kill]:
    """Launch and kill as often as asked for, or until the labelling has come to its end.

    Steps follow each other, and what is done is not done again; so the first kills are aimed at the first step.
    """
    rng, out = random.Random(seed), Path(config.out)
    dealt: list[Kill] = []
    while len(dealt) < kills:
        aim = STEPS[len(dealt) * len(STEPS) // kills]
        wanted = min(shards_done(out)[aim] + rng.randrange(4), shards - 1)
        later, start = rng.uniform(0, 0.05), time.monotonic()
        process = launch(config)
        while process.is_alive() and shards_done(out)[aim] < wanted:
            time.sleep(0.001)
        process.join(later)
        if not process.is_alive():
            print(f"launch {len(dealt) + 1} ended before it was killed", flush=True)
            break
        process.kill()
        process.join()
        done = shards_done(out)
        step = next((name for name in STEPS if done[name] < shards), STEPS[-1])
        unfinished = len([*out.rglob("*.part"), *out.glob(f"{STATE}/piece-*")])
        dealt.append(Kill(round(time.monotonic() - start, 2), step, done[step], unfinished))
        print(f"kill {len(dealt):>2}: {dealt[-1]}", flush=True)
    return dealt


def digests(out: Path) -> dict[str, str]:
    """SHA-256 of each file of a finished set, without the reports, which tell how long it took."""
    files = [file for file in sorted(out.iterdir()) if file.is_file() and not file.name.startswith("report")]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def main() -> int:
    """Label, kill, label on, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the configuration")
    parser.add_argument("--kills", type=int, default=10, help="how many SIGKILLs")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--samples", type=int, default=160, help="pictures")
    parser.add_argument("--out", type=Path, default=Path("runs/checks/label_kill_and_resume"), help="folder of results")
    args = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"), HF_HUB_OFFLINE="1")
    # The server that forks the processes has to import this package too, not another that is installed.
    os.environ["PYTHONPATH"] = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")
    CONTEXT.set_forkserver_preload(["cloc_mllm.labeling.pipeline", "cloc_mllm.labeling.detectors.owlv2"])
    args.out = args.out.resolve()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    scenes = [sys.executable, "-m", "cloc_mllm.apps.cli", "data", "scenes", "--n", str(args.samples), "--out", "data"]
    subprocess.run([*scenes, "--n-val", "1", "--n-test", "1"], cwd=args.out, check=True, capture_output=True)
    save_detector(args.out / "detector")
    given = {"source": str(args.out / "data" / "train"), "workers": 0, "shard": 8, "captioner.stage": "existing"}
    given |= {"phrases.stage": "ngrams", "detector.stage": f"owlv2:{args.out / 'detector'}"}
    overrides = ["detector.options.size=null", *args.overrides]  # the checkpoint's own, which is tiny
    whole, cut = (
        load_label_config(None, {**given, "out": str(args.out / name)}, overrides) for name in ("whole", "cut")
    )
    first = CONTEXT.Process(target=time.sleep, args=(0,))  # waits for the server's imports
    first.start()
    first.join()
    seconds = run_through(whole)
    print(f"uninterrupted: {args.samples} pictures in {seconds:.1f} s", flush=True)
    kills = deal_kills(cut, args.kills, args.seed, -(-args.samples // whole.shard))
    run_through(cut)

    files = [digests(Path(config.out)) for config in (whole, cut)]
    source = open_samples(cut.out)
    ids = Counter(source[k]["id"] for k in range(len(source)))
    report = {
        "kills": [asdict(kill) for kill in kills],
        "in_steps": {step: sum(kill.step == step for kill in kills) for step in STEPS},
        "files": len(files[0]),
        "files_equal": files[0] == files[1],
        "samples": len(ids),
        "samples_twice": sum(count > 1 for count in ids.values()),
        "samples_missing": args.samples - len(ids),
        "left_behind": len([*Path(cut.out).rglob("*.part"), *Path(cut.out).glob(f"{STATE}/piece-*")]),
    }
    (args.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    hits = ", ".join(f"{count} in {step}" for step, count in report["in_steps"].items())
    print(f"\n{len(kills)} of {args.kills} kills: {hits}")
    print(f"{report['files']} files: {'equal' if report['files_equal'] else 'DIFFERENT'}")
    print(f"{len(ids)} samples, {report['samples_twice']} twice, {report['samples_missing']} missing")
    print(args.out / "report.json")
    sound = report["files_equal"] and not report["samples_twice"] and not report["samples_missing"]
    return 0 if sound and len(kills) == args.kills and not report["left_behind"] else 1


if __name__ == "__main__":
    sys.exit(main())
