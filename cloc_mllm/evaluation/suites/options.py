"""What a suite is asked and what it answers: the options of ``cloc-mllm eval``, read from arguments or from YAML.

Which kind of model a folder holds is read from its ``config.json``, never guessed from its name.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.reporting.report import DatasetRef
from cloc_mllm.evaluation.scoring.metrics import Metric, check_seed

METHODS = ("prompter", "roi", "value", "crop")
ENCODER, MLLM = "cloc", "cloc_mllm"

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class EvalOptions:
    """What to evaluate, on what, and how; the options of ``cloc-mllm eval`` and the keys of a suite's YAML.

    Attributes:
        model: A checkpoint folder of an encoder or an MLLM, or what else the suite takes.
        data: What the suite is measured on; None for suites that bring their own. See ``docs/evaluation.md``.
        out: The folder for the report.
        split: Default ``test`` for ``scenes``; for data of one split only a name for the report.
        method: Read regions in this way only: ``prompter``, ``roi``, ``value`` or ``crop``.
        limit: Encoders: images; MLLMs: questions of each task. Drawn with ``seed``; default all.
        seed: Of every draw and of the bootstrap.
        device: Default a GPU if there is one.
        batch_size: Images, or questions, at a time; default by suite.
        max_new_tokens: MLLMs: longest answer in tokens.
        trust_remote_code: MLLMs: let code in the checkpoint run.
        settings: What only the suite at hand knows (``--set key=value``); see :func:`settings_of`.
    """

    model: str
    data: str | None
    out: str
    split: str | None = None
    method: str | None = None
    limit: int | None = None
    seed: int = 0
    device: str | None = None
    batch_size: int | None = None
    max_new_tokens: int = 48
    trust_remote_code: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ClocError(f"{name} is {value!r}, not a positive whole number")
        check_seed(self.seed)
        if self.method is not None and self.method not in METHODS:
            raise ClocError(f"there is no method '{self.method}'", remedy=f"Choose one of {', '.join(METHODS)}.")
        if not isinstance(self.settings, Mapping):
            raise ClocError(f"settings is {self.settings!r}, not a mapping of names to values")

    @property
    def data_path(self) -> str:
        """The data, where a suite cannot do without.

        Raises:
            ClocError: None were named.
        """
        if self.data is None:
            raise ClocError("this suite needs data, and none are named", remedy="Add --data (in YAML: data: …).")
        return self.data


@dataclass(frozen=True)
class Outcome:
    """What a suite found; the rest of the report is the same for all suites."""

    dataset: DatasetRef
    metrics: Mapping[str, Metric]
    details: Mapping[str, Any]
    unparsed: float = 0.0
    answers: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class NoSettings:
    """For suites that know no settings of their own."""


def settings_of(kind: type[Settings], options: EvalOptions) -> Settings:
    """Read what only one suite knows into that suite's own dataclass.

    Args:
        kind: A dataclass all of whose fields have defaults; it checks its own values.
        options: Whose ``settings`` to read.

    Raises:
        ClocError: The suite knows no such setting.
    """
    known = [one.name for one in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in options.settings:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            remedy = f"Did you mean '{near[0]}'?" if near else f"It knows: {', '.join(known) or 'none'}."
            raise ClocError(f"this suite has no setting '{key}'", remedy=remedy)
    return kind(**options.settings)


def settings_from_words(words: Sequence[str]) -> dict[str, Any]:
    """Read ``key=value`` words, values in YAML.

    Raises:
        ClocError: A word is not of that form.
    """
    import yaml

    values: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ClocError(f"'{word}' is not of the form key=value")
        try:
            values[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ClocError(f"the value of '{key}' is not valid YAML: {value!r}") from error
    return values


def options_from_yaml(path: str | PathLike[str], overrides: Sequence[str] = ()) -> tuple[str, EvalOptions]:
    """Read a suite's YAML file: the key ``suite`` and the fields of :class:`EvalOptions`.

    Args:
        path: The file.
        overrides: ``key=value`` pairs, values in YAML; they win over the file. ``settings.key=value`` is one setting.

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
    given = settings_from_words(overrides)
    inner = {key.removeprefix("settings."): given.pop(key) for key in list(given) if key.startswith("settings.")}
    values |= given
    if inner:
        values["settings"] = {**(values.get("settings") or {}), **inner}
    fields = {one.name: one for one in dataclasses.fields(EvalOptions)}
    for key in values:
        if key != "suite" and key not in fields:
            near = difflib.get_close_matches(str(key), [*fields, "suite"], n=1)
            raise ClocError(f"unknown key '{key}'", file=path, remedy=f"Did you mean '{near[0]}'?" if near else None)
    needed = ("suite", "model", "out")
    missing = [key for key in needed if values.get(key) is None]
    if missing:
        raise ClocError(f"'{missing[0]}' is not given", file=path, remedy=f"Add {missing[0]}=… to the command.")
    name = str(values.pop("suite"))
    return name, EvalOptions(**{"data": None, **values})


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


def batch_size_of(options: EvalOptions) -> dict[str, Any]:
    """Return the batch size as a keyword, if one is asked for; each suite has its own default."""
    return {} if options.batch_size is None else {"batch_size": options.batch_size}


def other_model(kind: str, options: EvalOptions) -> ClocError:
    """Return the error of a checkpoint that a suite cannot evaluate."""
    return ClocError(
        f"the checkpoint holds a '{kind}' model, which this suite cannot evaluate",
        file=options.model,
        remedy=f"It takes '{ENCODER}' (an encoder) or, for the suite scenes, '{MLLM}'.",
    )
