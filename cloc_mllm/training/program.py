"""What the programs in `train/` have in common: arguments, the run folder, how an MLLM is tuned, how a run ends."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cloc_mllm.errors import ClocError
from cloc_mllm.training.presets.config import (
    AlignConfig,
    AnyConfig,
    InstructConfig,
    load_config,
    plan_batch,
    write_config,
)
from cloc_mllm.training.running import launch
from cloc_mllm.training.running.checkpoint import checkpoints, choose_checkpoint, discard, tidy

if TYPE_CHECKING:
    from torch import nn

    from cloc_mllm.training.running.trainer import ClocTrainer


@dataclass(frozen=True)
class ProgramArgs:
    """The command line of a training program."""

    config: str
    overrides: list[str]
    resume: str | None


def parse_args(description: str, argv: Sequence[str] | None = None) -> ProgramArgs:
    """Parse `--config X.yaml key=value … [--resume [CHECKPOINT | auto]]`.

    Args:
        description: What the program does.
        argv: Arguments; `sys.argv[1:]` if ``None``.
    """
    parser = argparse.ArgumentParser(description=description, epilog="`cloc-mllm train explain` shows every key.")
    parser.add_argument("--config", required=True, help="preset, a YAML file such as those in train/configs")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, as in optim.lr=1e-4")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="latest",
        metavar="CHECKPOINT",
        help="go on from the latest, or this, checkpoint; auto: from the latest if there is one, else start",
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
    if resume is None:
        choose_checkpoint(None, folder, overwrite=config.run.overwrite)  # refuses before anything is touched
    if world.is_main:
        with _naming_the_folder(folder):
            for line in tidy(folder):
                print(line, flush=True)
    launch.barrier()
    checkpoint = choose_checkpoint(resume, folder, overwrite=config.run.overwrite)
    launch.barrier()
    if world.is_main:
        with _naming_the_folder(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for old in checkpoints(folder) if checkpoint is None else ():
                discard(old)
            write_config(config, folder / "run.yaml")
    launch.barrier()
    # Imported here: until now, all that could be wrong with the command line has been said without waiting for it.
    from cloc_mllm.training.running.log import quiet_where_unseen

    quiet_where_unseen()
    return checkpoint


@contextmanager
def _naming_the_folder(folder: Path) -> Iterator[None]:
    """Turn what the file system refuses into an error about the run folder."""
    try:
        yield
    except OSError as error:
        raise ClocError(
            f"cannot write here ({error.strerror})", file=folder, remedy="Choose another run.output."
        ) from error


def train_and_export(
    trainer: ClocTrainer,
    checkpoint: Path | None,
    build_skeleton: Callable[[], nn.Module],
) -> None:
    """Train to the end, then write `export/`, `adapter/` or both; with an average of the weights, also without it.

    Args:
        trainer: The stage's trainer.
        checkpoint: What to resume from, or ``None``.
        build_skeleton: Builds the model anew with its parts applied, for the export.
    """
    run, ema = trainer.config.run, trainer.config.optim.ema
    with trainer.watch:
        if checkpoint is not None:
            trainer.prepare_resume(checkpoint)
        result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        # Imported late: it is needed once, at the very end.
        from cloc_mllm.training.export import RAW, export_model

        with trainer.final_weights():
            metrics = trainer.evaluate() if trainer.eval_dataset is not None else {}
            trainer.note("exporting")
            trainer.require_finite_weights()
            if run.export != "none":
                export_model(trainer, build_skeleton, trainer.processor, metrics=metrics)
        if run.export != "none" and ema is not None:
            export_model(trainer, build_skeleton, trainer.processor, RAW)
    if trainer.world.is_main:
        done = {
            "stage": trainer.config.stage,
            "steps": trainer.state.global_step,
            "seconds": round(result.metrics.get("train_runtime", 0.0), 2),
            "samples_per_second": result.metrics.get("train_samples_per_second"),
            "world_size": trainer.world.size,
            "zero": launch.zero_stage(trainer.zero),
            "precision": run.precision,
            "ema": ema,
            **{name: value for name, value in metrics.items() if isinstance(value, float)},
        }
        Path(run.output, "summary.json").write_text(json.dumps(done, indent=2) + "\n", encoding="utf-8")
        print(f"done: {run.output}", flush=True)


def tune_mllm(stage: Literal["align", "instruct"], description: str) -> None:
    """Run a stage of the MLLM from preset to export; the stages differ in their data, which the preset names.

    Args:
        stage: Which.
        description: What the program does, for its help.

    Raises:
        ClocError: The preset, the data or a model is wrong.
    """
    # 1. What is asked for. Nothing slow is imported yet, so a misspelt key is reported at once.
    args = parse_args(description)
    config = load_config(args.config, args.overrides, stage=stage)
    assert isinstance(config, (AlignConfig, InstructConfig))
    plan = plan_batch(config.run.batch_size, config.run.micro_batch_size, launch.world_size_of_environment())
    zero = launch.resolve_zero(config.run.zero)

    # 2. The processes find each other.
    world = launch.start(zero, config.run.precision)
    checkpoint = open_run_folder(config, args.resume, world)

    from cloc_mllm.training.presets.parts import apply_parts, describe
    from cloc_mllm.training.running.stream import StepStream, keep_order
    from cloc_mllm.training.running.trainer import training_arguments
    from cloc_mllm.training.tuning import mllm
    from cloc_mllm.training.tuning.quantization import quantize_llm
    from cloc_mllm.training.tuning.tune import TuneTrainer, phrase_embedder, prepare_model

    # 3. The data, in an order that depends on the seed and the position only; a run goes on with the one it began with.
    dataset, run = mllm.training_conversations(config), config.run
    name = ", ".join(source.path for source in config.data.sources)
    stream = StepStream(dataset, plan, steps=run.steps, epochs=run.epochs, seed=run.seed, name=name)
    keep_order(Path(run.output), mllm.describe_order(config), resumed=checkpoint is not None, write=world.is_main)

    # 4. The model, whole on every process: an encoder's tower, a language model and new connectors between them, or
    # what an earlier stage has exported.
    model, processor = mllm.build_mllm(config, world)
    prepare_model(model, config)
    originals = quantize_llm(model, config.parts.llm, keep=world.is_main, stage=launch.zero_stage(zero))
    trained, reports = apply_parts(model, config.parts, config.optim)
    stream.grouping = mllm.tuning_grouping(config, processor, dataset)
    if world.is_main:
        for line in dataset.describe() if hasattr(dataset, "describe") else ():
            print(line)
        print(f"{plan}, {stream.steps} steps of {len(dataset):,} samples\n{describe(reports)}")
        first = mllm.first_report(processor, dataset, mllm.preset_template(processor, config))
        print(f"the first sample, what is learnt in ⟦ ⟧:\n{first}", flush=True)

    # 5. The trainer, and beside it the encoder's text side, whose embeddings teach the grounding head.
    phrases = phrase_embedder(config, model.config.grounding, world.device)
    trainer = TuneTrainer(
        config,
        world,
        zero,
        stream,
        phrases=phrases,
        model=trained,
        args=training_arguments(config, plan, world, zero, stream.steps),
        data_collator=mllm.conversation_collator(processor, config, dataset),
        eval_dataset=mllm.validation_conversations(config),
        processor=processor,
    )
    trainer.exact_weights |= originals

    # 6. Train, then write the weights to use, adapters merged.
    train_and_export(trainer, checkpoint, lambda: apply_parts(type(model)(model.config), config.parts, config.optim)[0])
    launch.leave()
