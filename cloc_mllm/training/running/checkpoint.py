"""Checkpoints to resume from: how they become complete, which ones stay, and whether this run may go on from one.

A checkpoint (`checkpoint-N/`) is the state of a run; an export (`export/`) is weights to use. They are two things.

A checkpoint is written into a hidden folder of the run and gets its name when all processes have written their share
and all of it is on the disk. Whoever sees a `checkpoint-N` sees all of it, whatever moment a run was killed at.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cloc_mllm.errors import ClocError

STATE_FILE = "run_state.json"
SAVING_FOLDER = ".saving"
"""Holds what is not a checkpoint yet, or no longer one; a run that starts empties it."""
_NUMBERED = re.compile(r"checkpoint-(\d+)")
_NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.EROFS)
# How torch and safetensors word a write that failed: neither passes the system's error on.
_WRITE_FAILED = ("PytorchStreamWriter", "inline_container", "I/O error", "No space left", "write failed")


@dataclass(frozen=True)
class RunState:
    """What a checkpoint was made with: what has to be equal for a run to go on, and who made it.

    Attributes:
        stage: The training stage.
        zero: Its ZeRO stage; ``None`` without DeepSpeed.
        world_size: Processes; another number may go on.
        precision: `fp32` or `bf16`.
        global_batch: Samples a step.
        loss_batch: Samples that are in one loss together. Where the loss is a sum over samples, or sees the whole step
            at once, this is the global batch, and micro-batches may be of any size.
        seed: The run's seed.
        steps: Length of the run.
        samples: Size of the training data.
    """

    stage: str
    zero: int | None
    world_size: int
    precision: str
    global_batch: int
    loss_batch: int
    seed: int
    steps: int
    samples: int

    def write(self, checkpoint: Path) -> None:
        """Mark a checkpoint complete; this is the last file to be written."""
        temporary = checkpoint / f".{STATE_FILE}"
        temporary.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        temporary.replace(checkpoint / STATE_FILE)


_MUST_BE_EQUAL = {
    "stage": "the training stage",
    "zero": "the ZeRO stage",
    "precision": "the precision",
    "global_batch": "run.batch_size",
    "loss_batch": "the number of samples contrasted or averaged at once (run.micro_batch_size x processes)",
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
        resume: `latest`, `auto` (the latest if there is one), a checkpoint's path, or ``None``.
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
    if resume == "auto" and not existing:
        return None
    if resume in ("latest", "auto"):
        if not existing:
            raise ClocError(
                "there is no complete checkpoint to resume from",
                file=run,
                remedy="Leave out --resume, or pass --resume auto.",
            )
        return existing[-1]
    path = Path(resume)
    if not (path / STATE_FILE).is_file():
        raise ClocError(f"is not a complete checkpoint of this program (no {STATE_FILE})", file=path)
    return path


def require_same_run(checkpoint: Path, now: RunState) -> RunState:
    """Refuse to resume where the remaining steps could not equal those of the uninterrupted run.

    Args:
        checkpoint: The checkpoint.
        now: What this run is.

    Returns:
        What the checkpoint was made with; the number of processes may differ.

    Raises:
        ClocError: Naming every difference.
    """
    file = checkpoint / STATE_FILE
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        then = RunState(**found)
    except (ValueError, TypeError) as error:
        raise ClocError(f"is damaged, or of another version: {error}", file=file) from None
    differences = [
        f"{words} was {getattr(then, key)!r} and is {getattr(now, key)!r} now"
        for key, words in _MUST_BE_EQUAL.items()
        if getattr(then, key) != getattr(now, key)
    ]
    if differences:
        raise ClocError(
            "cannot resume: " + ", ".join(differences),
            file=checkpoint,
            remedy="Resume as it was started (only the number of processes may change), or start a new run from "
            + (f"its weights: model.init=cloc:{checkpoint}." if then.stage == "pretrain" else "an export: model.init."),
        )
    return then


# -- writing ----------------------------------------------------------------------------------------------------------


def publish(written: Path, state: RunState) -> Path:
    """Turn what all processes have written into a checkpoint; the main process does this, once all of them have.

    Args:
        written: `RUN/.saving/checkpoint-N`.
        state: What the run is.

    Returns:
        `RUN/checkpoint-N`.
    """
    final = written.parent.parent / written.name
    state.write(written)
    _sync_tree(written)
    if final.exists():
        discard(final)
    written.rename(final)
    _sync(final.parent)
    return final


def prune(newest: Path, keep: int | None) -> None:
    """Remove a run's oldest complete checkpoints; the newest stays whatever its number is.

    Args:
        newest: The checkpoint just published.
        keep: How many stay; ``None``: all.
    """
    older = [path for path in checkpoints(newest.parent) if path != newest]
    for path in older[: 0 if keep is None else max(0, len(older) - keep + 1)]:
        discard(path)
    shutil.rmtree(newest.parent / SAVING_FOLDER, ignore_errors=True)


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint such that it is never seen in part."""
    folder = checkpoint.parent / SAVING_FOLDER
    folder.mkdir(exist_ok=True)
    gone = folder / f"removed-{checkpoint.name}"
    shutil.rmtree(gone, ignore_errors=True)
    checkpoint.rename(gone)
    shutil.rmtree(gone)


def tidy(run: Path) -> list[str]:
    """Clear away what a killed run left half-written or half-removed; the main process does this, before training.

    Args:
        run: The run folder.

    Returns:
        What was done, one line for each.
    """
    saving = run / SAVING_FOLDER
    lines: list[str] = []
    if not saving.is_dir():
        return lines
    for path in sorted(saving.iterdir()):
        if _NUMBERED.fullmatch(path.name) and (path / STATE_FILE).is_file() and not (run / path.name).exists():
            # Killed between the last file and the name: everything is there.
            path.rename(run / path.name)
            lines.append(f"{path.name} of an interrupted run was complete but for its name: kept")
        else:
            lines.append(f"removed {path.name.removeprefix('removed-')}, which an interrupted run left incomplete")
    shutil.rmtree(saving)
    return lines


@contextmanager
def naming_failed_writes(run: Path) -> Iterator[None]:
    """Turn a write that fails, as on a full disk, into an error that says what is left to go on from.

    Args:
        run: The run folder.

    Raises:
        ClocError: In the place of an error about writing.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and not any(words in str(error) for words in _WRITE_FAILED):
            raise
        before = checkpoints(run)
        free = shutil.disk_usage(run).free / 2**30
        reason = (isinstance(error, OSError) and error.strerror) or str(error).splitlines()[0]
        raise ClocError(
            f"a checkpoint could not be written ({reason}; {free:.2f} GiB are free)",
            file=run,
            remedy=f"Make room; --resume goes on from {before[-1].name}, which is whole."
            if before
            else "Make room and start again: there is no earlier checkpoint.",
        ) from error


def _sync_tree(folder: Path) -> None:
    """Have everything below a folder on the disk before its name says that it is."""
    for parent, _, files in os.walk(folder):
        for name in files:
            _sync(Path(parent, name))
        _sync(Path(parent))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot do it for folders; they write through when a file is closed.
        if error.errno not in _NO_FSYNC:
            raise
    finally:
        os.close(descriptor)
