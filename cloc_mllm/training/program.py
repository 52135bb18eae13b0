"""What the programs in `train/` have in common besides their stories: arguments, the run folder, how a run ends."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cloc_mllm.errors import ClocError
from cloc_mllm.training import launch
from cloc_mllm.training.checkpoint import checkpoints, choose_checkpoint, require_same_run
from cloc_mllm.training.config import AnyConfig, write_config

if TYPE_CHECKING:
    from torch import nn

    from cloc_mllm.training.trainer import ClocTrainer


@dataclass(frozen=True)
class ProgramArgs:
    """The command line of a training program."""

    config: str
    overrides: list[str]
    resume: str | None


def parse_args(description: str, argv: Sequence[str] | None = None) -> ProgramArgs:
    """Parse `--config X.yaml key=value … [--resume [CHECKPOINT]]`.

    Args:
        description: What the program does.
        argv: Arguments; `sys.argv[1:]` if ``None``.
    """
    parser = argparse.ArgumentParser(description=description, epilog="`cloc-mllm train explain` shows every key.")
    parser.add_argument("--config", required=True, help="preset, a YAML file such as those in train/configs")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, as in optim.lr=1e-4")
    parser.add_argument(
        "--resume", nargs="?", const="latest", metavar="CHECKPOINT", help="go on from the latest, or this, checkpoint"
    )
    # The deepspeed launcher passes it; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args(argv)
    if args.resume is not None and "=" in args.resume and not Path(args.resume).exists():
        # `--resume key=value`: argparse took the override for the checkpoint.
        args.overrides.append(args.resume)
        args.resume = "latest"
    return ProgramArgs(args.config, args.overrides, args.resume)


def open_run_folder(config: AnyConfig, resume: str | None, world: launch.World) -> Path | None:
    """Make the run folder, write `run.yaml`, and decide what to resume from.

    Args:
        config: The preset.
        resume: `--resume`.
        world: This process's place.

    Returns:
        The checkpoint to resume from, or ``None``.

    Raises:
        ClocError: The folder cannot be written, or holds another run, or there is nothing to resume.
    """
    folder = Path(config.run.output)
    checkpoint = choose_checkpoint(resume, folder, overwrite=config.run.overwrite)
    launch.barrier()
    if world.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if checkpoint is None:
                for old in checkpoints(folder):
                    shutil.rmtree(old)
            write_config(config, folder / "run.yaml")
        except OSError as error:
            raise ClocError(
                f"cannot write here ({error.strerror})", file=folder, remedy="Choose another run.output."
            ) from error
    launch.barrier()
    # Imported here: until now, all that could be wrong with the command line has been said without waiting for it.
    from cloc_mllm.training.log import quiet_where_unseen

    quiet_where_unseen()
    return checkpoint


def train_and_export(
    trainer: ClocTrainer,
    checkpoint: Path | None,
    build_skeleton: Callable[[], nn.Module],
) -> None:
    """Train to the end, then write `export/`.

    Args:
        trainer: The stage's trainer.
        checkpoint: What to resume from, or ``None``.
        build_skeleton: Builds the model anew with its parts applied, for the export.
    """
    if checkpoint is not None:
        require_same_run(checkpoint, trainer.run_state())
    result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    metrics = trainer.evaluate() if trainer.eval_dataset is not None else {}
    run = trainer.config.run
    if run.export:
        # Imported late: it is needed once, at the very end.
        from cloc_mllm.training.export import export_model

        export_model(trainer, build_skeleton, trainer.processor, metrics)
    if trainer.world.is_main:
        done = {
            "stage": trainer.config.stage,
            "steps": trainer.state.global_step,
            "seconds": round(result.metrics.get("train_runtime", 0.0), 2),
            "samples_per_second": result.metrics.get("train_samples_per_second"),
            "world_size": trainer.world.size,
            "zero": launch.zero_stage(trainer.zero),
            "precision": run.precision,
            **{name: value for name, value in metrics.items() if isinstance(value, float)},
        }
        Path(run.output, "summary.json").write_text(json.dumps(done, indent=2) + "\n", encoding="utf-8")
        print(f"done: {run.output}", flush=True)
