"""Runs the demo's stages: each one a process of its own, in order of need, several side by side where slots allow.

A stage that ended well leaves a stamp, and is skipped when the demo runs again with the same command and the same
stages before it. So an interrupted demo goes on where it stopped, and a changed setting redoes what depends on it and
no more.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from cloc_mllm.apps.demo.progress import Progress
from cloc_mllm.training.running.checkpoint import checkpoints

LOG_TAIL_LINES = 25
POLL_SECONDS = 0.2
REPOSITORY = Path(__file__).resolve().parents[3]
FREE_PORT = "{free_port}"
"""Stands in a command for a port that is looked for only when the stage starts, so that fingerprints stay the same."""


@dataclass(frozen=True)
class Stage:
    """One process to run.

    Attributes:
        name: Unique; also the folder under the demo's output that the stage fills (`encoders/clip`).
        title: What it does, in a few words.
        command: The process's arguments.
        after: Names of the stages that must be done before.
        slots: How many processor slots it takes: its number of processes.
        facts: What the report tells of it: world size, ZeRO stage, seed, images seen, …
        resume: Arguments to add when the stage was interrupted and has a checkpoint to go on from.
    """

    name: str
    title: str
    command: tuple[str, ...]
    after: tuple[str, ...] = ()
    slots: int = 1
    facts: Mapping[str, Any] = field(default_factory=dict)
    resume: tuple[str, ...] = ()


class StageFailedError(Exception):
    """A stage's process ended with an error; the text holds the end of its log."""


@dataclass
class _Running:
    stage: Stage
    process: subprocess.Popen[bytes]
    log: TextIO
    started: float


class StageRunner:
    """Runs stages under one output folder.

    Args:
        out: The demo's output folder.
        slots: How many processes may work at once.
        environment: The environment of every stage.
        progress: Where to tell how it goes.
    """

    def __init__(self, out: Path, slots: int, environment: Mapping[str, str], progress: Progress) -> None:
        self.out = out
        self.slots = slots
        self.environment = dict(environment)
        self.progress = progress
        self._code = code_digest()
        for folder in ("stages", "logs"):
            (out / folder).mkdir(parents=True, exist_ok=True)

    def run(self, stages: Sequence[Stage]) -> dict[str, dict[str, Any]]:
        """Run what is not done yet.

        Args:
            stages: In order of preference; a stage's needs come before it.

        Returns:
            Each stage's stamp by name: seconds, facts, whether it was skipped now.

        Raises:
            StageFailedError: A stage failed; the others that were running have been ended.
        """
        fingerprints = _fingerprints(stages, self.out)
        stamps: dict[str, dict[str, Any]] = {}
        waiting = list(stages)
        running: list[_Running] = []
        self.progress.begin(len(stages))
        try:
            while waiting or running:
                for stage in self._startable(waiting, running, stamps):
                    waiting.remove(stage)
                    stamp = self._stamp_of(stage, fingerprints[stage.name])
                    if stamp is not None:
                        stamps[stage.name] = {**stamp, "skipped": True}
                        self.progress.skipped(stage.name, stage.title, stamp["code"] != self._code)
                    else:
                        running.append(self._start(stage, fingerprints[stage.name]))
                    break
                else:
                    time.sleep(POLL_SECONDS)
                for job in [job for job in running if job.process.poll() is not None]:
                    running.remove(job)
                    stamps[job.stage.name] = self._finish(job, fingerprints[job.stage.name])
                self.progress.tick([(job.stage.name, self.out / job.stage.name, job.started) for job in running])
        finally:
            for job in running:
                end_process_group(job.process)
                job.log.close()
        return stamps

    def _startable(
        self, waiting: Sequence[Stage], running: Sequence[_Running], stamps: Mapping[str, Any]
    ) -> list[Stage]:
        """Return the stages whose needs are done and that slots are free for; one too big for all slots runs alone."""
        free = self.slots - sum(job.stage.slots for job in running)
        ready = [stage for stage in waiting if all(name in stamps for name in stage.after)]
        return [stage for stage in ready if stage.slots <= free or not running]

    def _start(self, stage: Stage, fingerprint: str) -> _Running:
        """Start a stage, in a clean folder unless the same stage was interrupted and can resume."""
        folder = self.out / stage.name
        marker = self._marker(stage.name, "started")
        interrupted = marker.is_file() and marker.read_text() == fingerprint
        can_resume = bool(stage.resume) and interrupted and bool(checkpoints(folder))
        if folder.exists() and not can_resume:
            shutil.rmtree(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        marker.write_text(fingerprint)
        port = str(find_free_port())
        command = [port if word == FREE_PORT else word for word in stage.command]
        command += stage.resume if can_resume else ()
        log = self.log_path(stage.name).open("a" if can_resume else "w", encoding="utf-8")
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        self.progress.started(stage.name, stage.title, resumed=can_resume)
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=self.environment,
            start_new_session=True,
        )
        return _Running(stage, process, log, time.monotonic())

    def _finish(self, job: _Running, fingerprint: str) -> dict[str, Any]:
        """Write the stamp of a stage that ended well, or raise with the end of its log."""
        seconds = time.monotonic() - job.started
        job.log.close()
        code = job.process.returncode
        if code != 0:
            end_process_group(job.process)
            path = self.log_path(job.stage.name)
            tail = "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:])
            raise StageFailedError(
                f"stage {job.stage.name} failed with exit code {code}. The end of {path}:\n\n{tail}\n"
            )
        stamp = {
            "name": job.stage.name,
            "title": job.stage.title,
            "fingerprint": fingerprint,
            "code": self._code,
            "seconds": round(seconds, 2),
            **job.stage.facts,
            "command": [_portable(word, self.out) for word in job.stage.command],
        }
        path = self._marker(job.stage.name, "json")
        path.with_suffix(".part").write_text(json.dumps(stamp, indent=1), encoding="utf-8")
        path.with_suffix(".part").replace(path)
        self.progress.finished(job.stage.name, job.stage.title, seconds)
        return {**stamp, "skipped": False}

    def _stamp_of(self, stage: Stage, fingerprint: str) -> dict[str, Any] | None:
        """Return the stamp of a stage that is done with the same settings and whose folder is there."""
        path = self._marker(stage.name, "json")
        if not path.is_file() or not (self.out / stage.name).is_dir():
            return None
        stamp: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return stamp if stamp["fingerprint"] == fingerprint else None

    def log_path(self, name: str) -> Path:
        """Return the file that holds what the stage printed."""
        return self.out / "logs" / f"{_flat(name)}.log"

    def _marker(self, name: str, kind: str) -> Path:
        return self.out / "stages" / f"{_flat(name)}.{kind}"


def end_process_group(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads its own group, and all it started: kindly first, for sure after five seconds."""
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, signal_number)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def stage_environment(threads: int) -> dict[str, str]:
    """Return the environment of every stage: this one's, with what a small offline machine needs.

    Args:
        threads: Threads of each process. More threads than cores make OpenMP wait busily and cost more than they bring.
    """
    import torch

    environment = dict(os.environ)
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), environment.get("PYTHONPATH", "")]))
    environment["PYTHONUNBUFFERED"] = "1"
    defaults = {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_OFFLINE": "1",
    }
    if not torch.cuda.is_available():
        defaults["DS_ACCELERATOR"] = "cpu"
    return {**defaults, **environment}


def code_digest() -> str:
    """Return a digest of the package's own source, so that a stamp tells which code made it."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _fingerprints(stages: Sequence[Stage], out: Path) -> dict[str, str]:
    """Return what decides each stage's result: its command, the settings files it names, the stages before it."""
    known: dict[str, str] = {}
    for stage in stages:
        digest = hashlib.sha256()
        for word in stage.command:
            digest.update(_portable(word, out).encode() + b"\0")
            if word.endswith((".yaml", ".json")) and Path(word).is_file() and not word.startswith(str(out)):
                digest.update(Path(word).read_bytes())
        for name in stage.after:
            digest.update(known[name].encode())
        known[stage.name] = digest.hexdigest()[:16]
    return known


def _portable(word: str, out: Path) -> str:
    """Return a command's word without this machine's folders, so that moving one of them keeps the stamps."""
    folders = {str(out): "OUT", sys.executable: "python", str(Path(sys.executable).parent): "BIN", str(REPOSITORY): "."}
    for folder, short in folders.items():
        word = word.replace(folder, short)
    return word


def find_free_port() -> int:
    """Return a TCP port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _flat(name: str) -> str:
    return name.replace("/", ".")
