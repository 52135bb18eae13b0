"""The ``vqa`` suite: an MLLM on lmms-eval's benchmarks, in its prompts and by its scorers, in this project's report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.lmms.frames import BOX_FORMATS
from cloc_mllm.evaluation.lmms.results import answers_of, dataset_of, metrics_of, unparsed_of
from cloc_mllm.evaluation.lmms.runs import Run, evaluate
from cloc_mllm.evaluation.suites.options import MLLM, EvalOptions, Outcome, model_type, other_model, settings_of


@dataclass(frozen=True)
class VqaSettings:
    """What only this suite knows.

    Attributes:
        tasks: Names, comma-separated or a list: of benchmarks, of lmms-eval's tasks, or of ours.
        include_path: A further folder of tasks.
        processes: On how many processes.
        box_format: The coordinates that boxes are printed in: ``auto`` (what each task reads), ``model``, ``norm1``,
            ``norm1000`` or ``pixel``.
        constrain_boxes: Whether boxes written as text must come out well-formed.
        gen_kwargs: Options of generation that win over the tasks', such as ``num_beams=3``.
        judge: Base URL of an OpenAI-compatible server for judged tasks; default OpenAI's, if there is a key.
        judge_model: The model to ask there.
        judge_key_variable: The environment variable that holds the key.
    """

    tasks: str | Sequence[str] = ()
    include_path: str | None = None
    processes: int = 1
    box_format: str = "auto"
    constrain_boxes: bool = False
    gen_kwargs: str | None = None
    judge: str | None = None
    judge_model: str | None = None
    judge_key_variable: str = "OPENAI_API_KEY"

    def __post_init__(self) -> None:
        if not self.names:
            raise ClocError("no task is named", remedy="Add --set tasks=gqa,pope (in YAML: settings: {tasks: …}).")
        if not isinstance(self.processes, int) or self.processes < 1:
            raise ClocError(f"processes is {self.processes!r}, not a positive whole number")
        if self.box_format not in BOX_FORMATS:
            raise ClocError(
                f"there is no box_format '{self.box_format}'", remedy=f"Choose one of {', '.join(BOX_FORMATS)}."
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks, one by one."""
        listed = self.tasks.split(",") if isinstance(self.tasks, str) else [str(name) for name in self.tasks]
        return tuple(name.strip() for name in listed if name.strip())


def run(options: EvalOptions) -> Outcome:
    """Measure an MLLM on tasks of lmms-eval."""
    settings = settings_of(VqaSettings, options)
    for name in ("data", "split", "method"):
        if getattr(options, name) is not None:
            raise ClocError(f"--{name} means nothing here: each task knows its own data and split")
    kind = model_type(options.model)
    if kind != MLLM:
        raise other_model(kind, options)
    found = evaluate(
        Run(
            model=options.model,
            tasks=settings.names,
            out=options.out,
            include_path=settings.include_path,
            limit=options.limit,
            batch_size=options.batch_size or 1,
            device=options.device,
            max_new_tokens=options.max_new_tokens,
            box_format=settings.box_format,
            constrain_boxes=settings.constrain_boxes,
            trust_remote_code=options.trust_remote_code,
            gen_kwargs=settings.gen_kwargs,
            judge=settings.judge,
            judge_model=settings.judge_model,
            judge_key_variable=settings.judge_key_variable,
        ),
        settings.processes,
    )
    metrics, details = metrics_of(found, options.seed)
    details["lmms_eval"] = found.version
    return Outcome(dataset_of(found), metrics, details, unparsed_of(found), answers_of(found))
