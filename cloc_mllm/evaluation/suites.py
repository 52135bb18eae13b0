"""The suites that exist, by name, and how one is run: checkpoint and data in, ``report.json`` and ``report.md`` out.

Which kind of model a folder holds is read from its ``config.json``, never guessed from its name.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.metrics import Metric
from cloc_mllm.evaluation.report import DatasetRef, build_report, write_report

METHODS = ("prompter", "roi", "value", "crop")
ENCODER, MLLM = "cloc", "cloc_mllm"

_VALIDATION = "validation"
_KNOWN_QUESTIONS = 1000


@dataclass(frozen=True)
class EvalOptions:
    """What to evaluate, on what, and how; the options of ``cloc-mllm eval`` and the keys of a suite's YAML.

    Attributes:
        model: A checkpoint folder: of an encoder, or (suite ``scenes``) of an MLLM.
        data: The data: for ``scenes`` the folder that ``cloc-mllm data scenes`` wrote, for ``region`` region-text data.
        out: The folder for the report.
        split: Default ``test`` for ``scenes``; for ``region`` only a name for the report.
        method: Read regions in this way only: ``prompter``, ``roi``, ``value`` or ``crop``.
        limit: Encoders: images; MLLMs: questions of each task. Drawn with ``seed``; default all.
        seed: Of every draw and of the bootstrap.
        device: Default a GPU if there is one.
        batch_size: Images, or questions, at a time; default by suite.
        max_new_tokens: MLLMs: longest answer in tokens.
        trust_remote_code: MLLMs: let code in the checkpoint run.
    """

    model: str
    data: str
    out: str
    split: str | None = None
    method: str | None = None
    limit: int | None = None
    seed: int = 0
    device: str | None = None
    batch_size: int | None = None
    max_new_tokens: int = 48
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ClocError(f"{name} is {value!r}, not a positive whole number")
        if self.method is not None and self.method not in METHODS:
            raise ClocError(f"there is no method '{self.method}'", remedy=f"Choose one of {', '.join(METHODS)}.")


@dataclass(frozen=True)
class Outcome:
    """What a suite found; the rest of the report is the same for all suites."""

    dataset: DatasetRef
    metrics: Mapping[str, Metric]
    details: Mapping[str, Any]
    unparsed: float = 0.0
    answers: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Suite:
    """One row of the table of suites."""

    name: str
    summary: str
    run: Callable[[EvalOptions], Outcome]


def run_suite(name: str, options: EvalOptions, command: str | None = None) -> dict[str, Any]:
    """Run a suite and write its report (and, for an MLLM, every answer, as ``answers.jsonl``).

    Args:
        name: The suite.
        options: What to evaluate and on what.
        command: What the report names as the command that repeats it; default this process's.

    Returns:
        The report.

    Raises:
        ClocError: There is no such suite, or the model or data cannot be used.
    """
    suite = find_suite(name)
    started = time.monotonic()
    outcome = suite.run(options)
    report = build_report(
        suite=name,
        model=options.model,
        dataset=outcome.dataset,
        metrics=outcome.metrics,
        seconds=time.monotonic() - started,
        command=command or shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        unparsed=outcome.unparsed,
        details=outcome.details,
    )
    write_report(report, options.out)
    if outcome.answers:
        lines = "".join(json.dumps(answer) + "\n" for answer in outcome.answers)
        (Path(options.out) / "answers.jsonl").write_text(lines, encoding="utf-8")
    return report


def find_suite(name: str) -> Suite:
    """Return a suite by name.

    Raises:
        ClocError: There is none of that name; the error lists those there are.
    """
    if name not in SUITES:
        raise ClocError(f"there is no suite '{name}'", remedy=f"There are: {', '.join(SUITES)}.")
    return SUITES[name]


def options_from_yaml(path: str | PathLike[str], overrides: Sequence[str] = ()) -> tuple[str, EvalOptions]:
    """Read a suite's YAML file: the key ``suite`` and the fields of :class:`EvalOptions`.

    Args:
        path: The file.
        overrides: ``key=value`` pairs, values in YAML; they win over the file.

    Returns:
        The suite's name and the options.

    Raises:
        ClocError: The file cannot be read, a key is unknown, or a needed one is missing.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ClocError(f"cannot read this suite ({error})", file=path) from error
    if not isinstance(values, dict):
        raise ClocError("a suite's YAML is a mapping of keys to values", file=path)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ClocError(f"'{override}' is not of the form key=value")
        values[key] = yaml.safe_load(value)
    fields = {field.name: field for field in dataclasses.fields(EvalOptions)}
    for key in values:
        if key != "suite" and key not in fields:
            near = difflib.get_close_matches(str(key), [*fields, "suite"], n=1)
            raise ClocError(f"unknown key '{key}'", file=path, remedy=f"Did you mean '{near[0]}'?" if near else None)
    needed = ["suite", *(name for name, field in fields.items() if field.default is dataclasses.MISSING)]
    missing = [key for key in needed if values.get(key) is None]
    if missing:
        raise ClocError(f"'{missing[0]}' is not given", file=path, remedy=f"Add {missing[0]}=… to the command.")
    name = str(values.pop("suite"))
    return name, EvalOptions(**values)


def model_type(path: str | PathLike[str]) -> str:
    """Return what a checkpoint folder says it holds.

    Raises:
        ClocError: It is no checkpoint folder.
    """
    folder = Path(path)
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except OSError as error:
        inside = folder / "export"
        remedy = f"Did you mean {inside}?" if (inside / "config.json").is_file() else None
        raise ClocError("this is no checkpoint folder (no config.json)", file=path, remedy=remedy) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ClocError("config.json does not say its model_type", file=path) from error
    return str(found)


# --- the suites ----------------------------------------------------------------------------------------------------


def _scenes(options: EvalOptions) -> Outcome:
    kind = model_type(options.model)
    if kind == ENCODER:
        return _scenes_encoder(options)
    if kind == MLLM:
        return _scenes_mllm(options)
    raise _other_model(kind, options)


def _scenes_encoder(options: EvalOptions) -> Outcome:
    from cloc_mllm.evaluation.encoder_measure import EncoderSettings
    from cloc_mllm.evaluation.localizers import build_localizers
    from cloc_mllm.evaluation.readouts import ClocEncoder, build_readouts
    from cloc_mllm.evaluation.region_data import SceneTruth
    from cloc_mllm.evaluation.scenes_encoder import evaluate_encoder

    settings = EncoderSettings(seed=options.seed, **_batch(options))
    truth = SceneTruth.load(options.data)
    split = truth.load_split(options.split or "test", options.limit, options.seed)
    validation = truth.load_split(_VALIDATION, settings.validation_images, options.seed)
    encoder = ClocEncoder.from_pretrained(options.model, options.device)
    metrics, details = evaluate_encoder(
        encoder,
        build_readouts(encoder, [options.method] if options.method else None),
        build_localizers(encoder, options.method),
        truth,
        split,
        validation,
        settings,
    )
    return Outcome(split.ref, metrics, details)


def _scenes_mllm(options: EvalOptions) -> Outcome:
    from cloc_mllm.evaluation.mllm import MllmSettings, evaluate_mllm, load_questions
    from cloc_mllm.evaluation.region_data import SceneTruth
    from cloc_mllm.inference.predictor import Predictor

    if options.method is not None:
        raise ClocError("--method is for encoders: an MLLM reads regions in the way it was trained with")
    settings = MllmSettings(
        limit=options.limit, max_new_tokens=options.max_new_tokens, seed=options.seed, **_batch(options)
    )
    truth = SceneTruth.load(options.data)
    name = options.split or "test"
    split = load_questions(
        truth.split_folder(name), name=truth.name, split=name, limit=settings.limit, seed=settings.seed
    )
    known = load_questions(
        truth.split_folder(_VALIDATION), name=truth.name, split=_VALIDATION, limit=_KNOWN_QUESTIONS, seed=options.seed
    )
    predictor = Predictor.from_pretrained(
        options.model, device=options.device, trust_remote_code=options.trust_remote_code
    )
    metrics, unparsed, details, answers = evaluate_mllm(predictor, split, known, settings)
    return Outcome(split.ref, metrics, details, unparsed, answers)


def _region(options: EvalOptions) -> Outcome:
    from cloc_mllm.evaluation.encoder_measure import EncoderSettings
    from cloc_mllm.evaluation.readouts import ClocEncoder, build_readouts
    from cloc_mllm.evaluation.region_data import load_region_split
    from cloc_mllm.evaluation.region_suite import evaluate_regions

    if model_type(options.model) != ENCODER:
        raise _other_model(model_type(options.model), options)
    split = load_region_split(options.data, split=options.split or "all", limit=options.limit, seed=options.seed)
    encoder = ClocEncoder.from_pretrained(options.model, options.device)
    readouts = build_readouts(encoder, [options.method] if options.method else None)
    # The first is the headline: the Prompter's, or for CLIP the crop, which needs no read-out of patches.
    readouts.sort(key=lambda way: way.name not in ("prompter", "crop"))
    settings = EncoderSettings(crop_limit=None, seed=options.seed, **_batch(options))
    metrics, details = evaluate_regions(encoder, readouts, split, settings)
    return Outcome(split.ref, metrics, details)


def _batch(options: EvalOptions) -> dict[str, Any]:
    return {} if options.batch_size is None else {"batch_size": options.batch_size}


def _other_model(kind: str, options: EvalOptions) -> ClocError:
    return ClocError(
        f"the checkpoint holds a '{kind}' model, which this suite cannot evaluate",
        file=options.model,
        remedy=f"It takes '{ENCODER}' (an encoder) or, for the suite scenes, '{MLLM}'.",
    )


SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite("scenes", "procedural scenes: encoders by region and phrase, MLLMs by question", _scenes),
        Suite("region", "encoders: recognition and retrieval of regions on any region-text data", _region),
    )
}
