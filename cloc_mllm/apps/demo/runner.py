"""Turns a plan of the demo into stages, runs them, and writes the report.

Every stage is a program that a person can run by hand: `cloc-mllm data scenes`, the launcher with a program of
`train/`, `cloc-mllm eval`. The demo only chooses their arguments and keeps count.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterable
from importlib import util
from pathlib import Path
from typing import Any

from cloc_mllm.apps.demo.files import DATA, DemoFiles
from cloc_mllm.apps.demo.plan import DemoPlan, EncoderPlan, MllmPlan, TrainingPlan
from cloc_mllm.apps.demo.progress import Progress, format_seconds
from cloc_mllm.apps.demo.stages import FREE_PORT, Stage, StageRunner, stage_environment
from cloc_mllm.apps.outputs import prepare_output_folder
from cloc_mllm.errors import ClocError
from cloc_mllm.training.presets.config import load_config, plan_batch
from cloc_mllm.training.running.launch import programs_folder

_PROGRAMS = {"pretrain": "pretrain_cloc.py", "align": "align.py", "instruct": "instruct.py"}


def run_demo(plan: DemoPlan, out: str | os.PathLike[str], *, fresh: bool = False, progress: Progress) -> Path:
    """Run what is not done yet and write `report.json`, `report.md` and `report.html`.

    Args:
        plan: What to do.
        out: Output folder; one that an earlier demo wrote is gone on with.
        fresh: Forget what earlier runs did there.
        progress: Where to tell how it goes.

    Returns:
        The path of `report.html`.

    Raises:
        ClocError: The folder cannot be used, or an option does not fit.
        StageFailedError: A stage failed.
    """
    started = time.monotonic()
    folder = open_demo_folder(out, fresh=fresh)
    files = DemoFiles(folder, programs_folder(), len(plan.seeds))
    stages = build_stages(plan, files)
    progress.say(f"demo '{plan.preset}': {len(stages)} stages into {folder}; what each prints is in {folder / 'logs'}")
    threads = max(1, len(os.sched_getaffinity(0)) // plan.slots)
    stamps = StageRunner(folder, plan.slots, stage_environment(threads), progress).run(stages)

    from cloc_mllm.apps.demo.markdown import write_markdown
    from cloc_mllm.apps.demo.page import write_page
    from cloc_mllm.apps.demo.picture import write_picture
    from cloc_mllm.apps.demo.report import build_report, write_report

    report = build_report(plan, files, stamps, seconds=time.monotonic() - started, command=shlex.join(_own_command()))
    write_report(report, folder)
    write_markdown(report, folder)
    runs = {name: folder / name for name in training_runs(plan, files, plan.seeds[0])}
    page = write_page(report, folder, runs, folder / DATA / "test")
    write_picture(report, folder, folder / DATA / "test")
    progress.say(f"done in {format_seconds(time.monotonic() - started)}: {page}")
    return page


def open_demo_folder(out: str | os.PathLike[str], *, fresh: bool) -> Path:
    """Make the output folder, or take up the one of an earlier demo.

    Raises:
        ClocError: It holds something else, or cannot be written to.
    """
    folder = prepare_output_folder(out)
    if not (folder / "stages").is_dir() and any(folder.iterdir()):
        raise ClocError(
            "the folder is not empty and no demo wrote it", file=folder, remedy="Choose another folder with --out."
        )
    if fresh and (folder / "stages").is_dir():
        # Without a stamp nothing counts as done; each stage clears its own folder when it starts.
        shutil.rmtree(folder / "stages")
    (folder / "stages").mkdir(exist_ok=True)
    return folder


def build_stages(plan: DemoPlan, files: DemoFiles) -> list[Stage]:
    """Return the plan's stages, each after those it needs.

    Raises:
        ClocError: A preset or an override is wrong, or a batch cannot be divided among the processes.
    """
    stages = [_data_stage(plan, files)]
    for seed in plan.seeds:
        stages += [_pretrain_stage(plan, files, encoder, seed) for encoder in plan.encoders]
        for mllm in plan.mllms:
            stages += [_align_stage(plan, files, mllm, seed), _instruct_stage(plan, files, mllm, seed)]
        stages += [_evaluation_stage(plan, files, "encoders", encoder.name, seed) for encoder in plan.encoders]
        stages += [_evaluation_stage(plan, files, "mllm", mllm.name, seed) for mllm in plan.mllms]
    return stages


def training_runs(plan: DemoPlan, files: DemoFiles, seed: int) -> list[str]:
    """Return the names of the training stages of one seed."""
    encoders = [files.encoder(encoder.name, seed) for encoder in plan.encoders]
    mllms = [files.mllm(mllm.name, seed, stage) for stage in ("align", "instruct") for mllm in plan.mllms]
    return encoders + mllms


def _data_stage(plan: DemoPlan, files: DemoFiles) -> Stage:
    scenes = plan.scenes
    images = scenes.train + scenes.validation + scenes.test
    command = _cloc(
        *("data", "scenes", "--preset", scenes.preset, "--seed", scenes.seed, "--n", scenes.train),
        *("--n-val", scenes.validation, "--n-test", scenes.test),
        *("--workers", plan.slots, "--out", files.out / DATA),
    )
    facts = {"world_size": plan.slots, "zero_stage": None, "images": images}
    return Stage(DATA, f"draw {images:,} scenes", command, slots=plan.slots, facts=facts)


def _pretrain_stage(plan: DemoPlan, files: DemoFiles, encoder: EncoderPlan, seed: int) -> Stage:
    return _training_stage(
        plan,
        files,
        plan.pretrain,
        "pretrain",
        name=files.encoder(encoder.name, seed),
        title="pre-train the encoder",
        seed=seed,
        overrides=(f"data.validation={files.out / DATA / 'validation'}", *encoder.overrides),
        after=(DATA,),
    )


def _align_stage(plan: DemoPlan, files: DemoFiles, mllm: MllmPlan, seed: int) -> Stage:
    encoder = files.encoder(mllm.encoder, seed)
    overrides = (
        f"model.encoder={files.export(encoder)}",
        f"model.llm={plan.language_model}",
        f"data.validation={files.out / DATA / 'validation'}",
        *mllm.overrides,
    )
    name = files.mllm(mllm.name, seed, "align")
    return _training_stage(
        plan,
        files,
        plan.align,
        "align",
        name=name,
        title="align tower and language model",
        seed=seed,
        overrides=overrides,
        after=(encoder,),
    )


def _instruct_stage(plan: DemoPlan, files: DemoFiles, mllm: MllmPlan, seed: int) -> Stage:
    aligned = files.mllm(mllm.name, seed, "align")
    overrides = (
        f"model.init=mllm:{files.export(aligned)}",
        f"model.encoder={files.export(files.encoder(mllm.encoder, seed))}",
        f"data.validation={files.out / DATA / 'validation'}",
    )
    return _training_stage(
        plan,
        files,
        plan.instruct,
        "instruct",
        name=files.mllm(mllm.name, seed, "instruct"),
        title="tune on conversations",
        seed=seed,
        overrides=overrides,
        after=(aligned,),
    )


def _training_stage(
    plan: DemoPlan,
    files: DemoFiles,
    training: TrainingPlan,
    kind: str,
    *,
    name: str,
    title: str,
    seed: int,
    overrides: Iterable[str],
    after: tuple[str, ...],
) -> Stage:
    """Put a launcher command together and check its preset before anything is run."""
    preset = files.programs / "configs" / f"{training.config}.yaml"
    words = [
        f"run.output={files.out / name}",
        f"run.seed={seed}",
        f"data.train={files.out / DATA / 'train'}",
        *training.overrides,
        *overrides,
    ]
    config = load_config(preset, words, stage=kind)
    batch = plan_batch(config.run.batch_size, config.run.micro_batch_size, plan.world_size)
    facts = {
        "world_size": plan.world_size,
        "zero_stage": None if config.run.zero == "none" else config.run.zero,
        "seed": seed,
        "steps": config.run.steps,
        "images": (config.run.steps or 0) * batch.global_batch,
    }
    command = (
        *launcher(plan.world_size),
        str(files.programs / _PROGRAMS[kind]),
        "--config",
        str(preset),
        *words,
    )
    return Stage(name, title, command, after, plan.world_size, facts, resume=("--resume",))


def _evaluation_stage(plan: DemoPlan, files: DemoFiles, kind: str, name: str, seed: int) -> Stage:
    trained = files.encoder(name, seed) if kind == "encoders" else files.mllm(name, seed, "instruct")
    stage = files.evaluation(kind, name, seed)
    command = _cloc(
        *("eval", "scenes", "--model", files.export(trained)),
        *("--data", files.out / DATA, "--out", files.out / stage),
        *(("--limit", plan.questions) if kind == "mllm" and plan.questions else ()),
    )
    facts = {"world_size": 1, "zero_stage": None, "seed": seed, "images": plan.scenes.test}
    return Stage(stage, "score on the test split", command, (trained,), facts=facts)


def launcher(processes: int) -> tuple[str, ...]:
    """Return the DeepSpeed launcher's command for a number of processes on this machine.

    The program `deepspeed` of this very environment is run with this interpreter, whatever PATH says.

    Raises:
        ClocError: DeepSpeed is not installed.
    """
    if util.find_spec("deepspeed") is None:
        raise ClocError("DeepSpeed is not installed", remedy="Install this package with its dependencies.")
    program = Path(sys.executable).parent / "deepspeed"
    start = (str(program),) if program.is_file() else ("-m", "deepspeed.launcher.runner")
    return (sys.executable, *start, "--num_gpus", str(processes), "--master_port", FREE_PORT)


def _cloc(*words: Any) -> tuple[str, ...]:
    """Return a command of this package, run by this interpreter."""
    return (sys.executable, "-m", "cloc_mllm.apps.cli", *map(str, words))


def _own_command() -> list[str]:
    return ["cloc-mllm", *sys.argv[1:]]
