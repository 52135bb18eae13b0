"""Checkpoints to resume from: which one is complete, and whether this run may go on from it.

A checkpoint (`checkpoint-N/`) is the state of a run; an export (`export/`) is weights to use. They are two things.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cloc_mllm.errors import ClocError

STATE_FILE = "run_state.json"
_NUMBERED = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class RunState:
    """What has to be equal for a run to go on exactly where it stopped."""

    stage: str
    zero: int | None
    world_size: int
    precision: str
    global_batch: int
    micro_batch: int
    seed: int
    steps: int
    samples: int

    def write(self, checkpoint: Path) -> None:
        """Mark a checkpoint complete: this file is written last, so a killed save never has it."""
        temporary = checkpoint / f".{STATE_FILE}"
        temporary.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        temporary.replace(checkpoint / STATE_FILE)


_WORDS = {
    "stage": "the training stage",
    "zero": "the ZeRO stage",
    "world_size": "the number of processes",
    "precision": "the precision",
    "global_batch": "run.batch_size",
    "micro_batch": "run.micro_batch_size",
    "seed": "run.seed",
    "steps": "the number of steps",
    "samples": "the number of training samples",
}


def checkpoints(run: str | os.PathLike[str]) -> list[Path]:
    """Return a run's complete checkpoints, oldest first."""
    found = [
        (int(match[1]), path) for path in Path(run).glob("checkpoint-*") if (match := _NUMBERED.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found) if (path / STATE_FILE).is_file()]


def choose_checkpoint(resume: str | None, run: Path, *, overwrite: bool) -> Path | None:
    """Return the checkpoint to resume from, or ``None`` to start anew.

    Args:
        resume: `latest`, a checkpoint's path, or ``None``.
        run: The run folder.
        overwrite: Whether starting anew over existing checkpoints is meant.

    Raises:
        ClocError: There is no such checkpoint, or a fresh start would mix with an older run.
    """
    existing = checkpoints(run)
    if resume is None:
        if existing and not overwrite:
            raise ClocError(
                f"already holds {existing[-1].name} of an earlier run",
                file=run,
                remedy="Pass --resume to go on, or run.output=… or run.overwrite=true to start anew.",
            )
        return None
    if resume == "latest":
        if not existing:
            raise ClocError("there is no complete checkpoint to resume from", file=run, remedy="Leave out --resume.")
        return existing[-1]
    path = Path(resume)
    if not (path / STATE_FILE).is_file():
        raise ClocError(f"is not a complete checkpoint of this program (no {STATE_FILE})", file=path)
    return path


def require_same_run(checkpoint: Path, now: RunState) -> None:
    """Refuse to resume where the remaining steps could not equal those of the uninterrupted run.

    Args:
        checkpoint: The checkpoint.
        now: What this run is.

    Raises:
        ClocError: Naming every difference.
    """
    try:
        then: dict[str, Any] = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ClocError(f"is damaged: {error}", file=checkpoint / STATE_FILE) from None
    differences = [
        f"{_WORDS[key]} was {then.get(key)!r} and is {value!r} now"
        for key, value in asdict(now).items()
        if then.get(key) != value
    ]
    if differences:
        raise ClocError(
            "cannot resume: " + ", ".join(differences),
            file=checkpoint,
            remedy="Resume as it was started, or start a new run from this checkpoint's weights (model.init).",
        )
