"""What each preset of the demo trains: which encoders and MLLMs, on how much, for how long, over which seeds.

Everything that is compared shares data, steps, batch, seed and size; what sets one model apart is its line of overrides
here. Hyper-parameters live in the presets of `train/configs/`, so the stages can be run by hand with the same result.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cloc_mllm.errors import ClocError


@dataclass(frozen=True)
class EncoderPlan:
    """An encoder: its name in the report, and what sets it apart from the shared preset."""

    name: str
    description: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class MllmPlan:
    """An MLLM: its name in the report, the encoder it stands on, and what sets it apart."""

    name: str
    description: str
    encoder: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class ScenesPlan:
    """The procedural scenes to make: preset of the generator and pictures a split."""

    preset: str
    train: int
    validation: int
    test: int
    seed: int = 0


@dataclass(frozen=True)
class TrainingPlan:
    """One kind of training: a preset of `train/configs/` and what the demo changes in it."""

    config: str
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class DemoPlan:
    """Everything a run of the demo does.

    Attributes:
        preset: Name of the preset.
        scenes: Data to make.
        encoders: Encoders to pre-train.
        mllms: MLLMs to align and tune.
        pretrain: Pre-training.
        align: Alignment.
        instruct: Instruction tuning.
        seeds: Every model is trained once for each.
        world_size: Processes of a training stage.
        slots: Processes at work at once; above `world_size`, stages run side by side.
        limits: What the preset's numbers do not show, for the report.
        judged: Whether the preset is long enough for its figures to be held against the wanted ones.
        language_model: `scratch`, or a folder that holds a causal LM.
        questions: Test questions of each task that an MLLM is asked; None asks all.
    """

    preset: str
    scenes: ScenesPlan
    encoders: tuple[EncoderPlan, ...]
    mllms: tuple[MllmPlan, ...]
    pretrain: TrainingPlan
    align: TrainingPlan
    instruct: TrainingPlan
    seeds: tuple[int, ...] = (0,)
    world_size: int = 2
    slots: int = 2
    limits: tuple[str, ...] = ()
    judged: bool = True
    language_model: str = "scratch"
    questions: int | None = None


_ENCODERS = {
    encoder.name: encoder
    for encoder in (
        EncoderPlan("clip", "captions only", ("model.prompter=null",)),
        EncoderPlan(
            "clip_captions",
            "captions, and every region text as one more caption",
            ("model.prompter=null", "objective.extra_captions=true"),
        ),
        EncoderPlan("cloc", "captions, and region texts through the Prompter", ()),
    )
}
# Without a region token a box is written out as numbers.
_COORDINATES = ("model.region_encoder=none", "model.region_format=coords")
_MLLMS = {
    mllm.name: mllm
    for mllm in (
        MllmPlan("blind", "sees no image", "clip", (*_COORDINATES, "model.blind=true")),
        MllmPlan("clip", "CLIP's tower, boxes as coordinates", "clip", _COORDINATES),
        MllmPlan("clip_roi", "CLIP's tower, a pooled region token", "clip", ("model.region_encoder=roi_align",)),
        MllmPlan("cloc", "CLOC's tower, boxes as coordinates", "cloc", _COORDINATES),
        MllmPlan("cloc_prompter", "CLOC's tower, Prompter region token", "cloc", ("model.region_encoder=prompter",)),
        MllmPlan(
            "cloc_new_head",
            "as cloc_prompter, its grounding head untrained at the start, as CLIP's is",
            "cloc",
            ("model.region_encoder=prompter", "model.grounding_init=new"),
        ),
    )
}

_SHARED_LIMITS = (
    "Scenes are drawn, not photographed, and their language is small: the numbers compare training recipes, they do "
    "not predict scores on photographs.",
    "Towers of half a million weights trained for minutes are far from converged: CLOC learning regions sooner at "
    "equal steps is what can be seen, not where either would end.",
)
_QUICK_LIMITS = (
    "One seed: the intervals are over test images only. Left to `--preset reproduce`: three seeds, the full "
    "vocabulary, and the controls clip_captions (CLIP that sees the same region texts), clip_roi (CLIP with a region "
    "token), cloc without a region token, cloc_new_head (CLOC's tower, its grounding head as untrained as CLIP's) and "
    "blind. Until they are run, part of what separates cloc from clip here may be the labels it sees, and the start "
    "that pre-training gives its grounding head.",
    *_SHARED_LIMITS,
)

PRESETS = {
    "quick": DemoPlan(
        preset="quick",
        scenes=ScenesPlan("quick", train=10_000, validation=500, test=1_000),
        encoders=(_ENCODERS["clip"], _ENCODERS["cloc"]),
        mllms=(_MLLMS["clip"], _MLLMS["cloc_prompter"]),
        pretrain=TrainingPlan("pretrain_quick"),
        align=TrainingPlan("align_quick"),
        instruct=TrainingPlan("instruct_quick"),
        # Two launches at a time: one computes while the other imports or its processes wait for each other. On two
        # cores two trainings of 100 steps took 76 s so, and 83 s one after the other.
        slots=4,
        limits=_QUICK_LIMITS,
    ),
    "reproduce": DemoPlan(
        preset="reproduce",
        scenes=ScenesPlan("full", train=40_000, validation=1_000, test=2_000),
        encoders=tuple(_ENCODERS.values()),
        mllms=tuple(_MLLMS.values()),
        pretrain=TrainingPlan("pretrain_reproduce"),
        align=TrainingPlan("align_reproduce"),
        instruct=TrainingPlan("instruct_reproduce"),
        seeds=(0, 1, 2),
        world_size=1,
        limits=_SHARED_LIMITS,
    ),
    "miniature": DemoPlan(
        preset="miniature",
        scenes=ScenesPlan("quick", train=96, validation=16, test=24),
        encoders=(_ENCODERS["clip"], _ENCODERS["cloc"]),
        mllms=(_MLLMS["clip"], _MLLMS["cloc_prompter"]),
        pretrain=TrainingPlan("pretrain_quick", ("run.steps=4", "run.batch_size=16", "run.log_every=1")),
        align=TrainingPlan("align_quick", ("run.steps=2", "run.batch_size=16", "run.log_every=1")),
        instruct=TrainingPlan("instruct_quick", ("run.steps=3", "run.batch_size=16", "run.log_every=1")),
        limits=("A few steps on a few images: this proves that every part runs, and its numbers mean nothing.",),
        judged=False,
    ),
}


_REAL_LLM_LIMITS = (
    "One MLLM, tuned with LoRA for some dozen steps and asked a small part of the test questions: this shows that a "
    "real language model can be aligned and tuned behind the tower and keeps its English, not how well it could see. "
    "So few steps may not be enough for it to learn to ask for a box.",
    *_SHARED_LIMITS,
)


def with_language_model(plan: DemoPlan, folder: str) -> DemoPlan:
    """Return a plan with a pre-trained language model, aligned with only its new tokens trained, then tuned with LoRA.

    A step costs some hundred times one of the small model from scratch, so there are few, and one MLLM.

    Args:
        plan: `quick` or `miniature`.
        folder: Holds a causal LM and its tokenizer.

    Raises:
        ClocError: The preset trains too much for that.
    """
    if len(plan.seeds) > 1:
        raise ClocError(
            f"the preset '{plan.preset}' with a real language model would run for days", remedy="Use --preset quick."
        )
    short = not plan.judged
    shared = (f"run.batch_size={2 if short else 8}", "run.log_every=2", "run.save_every=null")
    return replace(
        plan,
        encoders=(_ENCODERS["cloc"],),
        mllms=(_MLLMS["cloc_prompter"],),
        align=TrainingPlan(
            plan.align.config,
            (*shared, f"run.steps={1 if short else 60}", "parts.llm.mode=tokens", "data.validation_samples=8"),
        ),
        instruct=TrainingPlan(
            plan.instruct.config,
            (
                *shared,
                f"run.steps={1 if short else 60}",
                # Gently: at rank 16 and 5e-4, fifty steps taught it to answer every question with one word.
                "parts.llm.mode=lora",
                "parts.llm.rank=8",
                "parts.llm.alpha=16",
                "parts.llm.lr=2e-4",
                "data.validation_samples=8",
            ),
        ),
        limits=_REAL_LLM_LIMITS if plan.judged else plan.limits,
        judged=False,
        language_model=folder,
        questions=4 if short else 60,
    )


def make_plan(preset: str, *, world_size: int | None = None, seed: int | None = None) -> DemoPlan:
    """Return a preset with the user's changes.

    Args:
        preset: `quick`, `reproduce` or `miniature`.
        world_size: Processes of a training stage; None keeps the preset's.
        seed: First seed; the preset's others follow it.

    Returns:
        The plan.

    Raises:
        ClocError: There is no such preset, or there would be no process.
    """
    if preset not in PRESETS:
        raise ClocError(f"there is no demo preset '{preset}'", remedy=f"Choose one of {', '.join(PRESETS)}.")
    plan = PRESETS[preset]
    if world_size is not None:
        if world_size < 1:
            raise ClocError(f"--world-size is {world_size}, but a stage has at least one process")
        plan = replace(plan, world_size=world_size, slots=max(plan.slots, world_size))
    if seed is not None:
        plan = replace(plan, seeds=tuple(seed + number for number in range(len(plan.seeds))))
    return plan
