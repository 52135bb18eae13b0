"""What a suite is asked and what it answers: the options of ``cloc-mllm eval``, read from arguments or from YAML.

Which kind of model a folder holds is read from its ``config.json``, never guessed from its name.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.reporting.report import DatasetRef
from cloc_mllm.evaluation.scoring.metrics import Metric, check_seed
from cloc_mllm.yaml_files import parse_yaml

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
    """What a suite found; the rest of the report is the same for all suites.

    ``unparsed`` is None where answers are read by others who do not say which they could not read.
    """

    dataset: DatasetRef
    metrics: Mapping[str, Metric]
    details: Mapping[str, Any]
    unparsed: float | None = 0.0
    answers: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class NoSettings:
    """For suites that know no settings of their own."""


def settings_of(kind: type[Settings], options: EvalOptions) -> Settings:
    """Read what only one suite knows into that suite's own dataclass.

    Args:
        kind: A dataclass all of whose fields have defaults. Types are checked here, values by itself.
        options: Whose ``settings`` to read.

    Raises:
        ClocError: The suite knows no such setting, or a value is not of its type.
    """
    known = [one.name for one in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in options.settings:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            remedy = f"Did you mean '{near[0]}'?" if near else f"It knows: {', '.join(known) or 'none'}."
            raise ClocError(f"this suite has no setting '{key}'", remedy=remedy)
    hints = typing.get_type_hints(kind)
    return kind(**{name: value_of(name, value, hints[name]) for name, value in options.settings.items()})


@dataclass(frozen=True)
class Written:
    """A value as it was written on the command line; what it means is told by the type of what it is for.

    Attributes:
        word: The word itself.
        value: What it is in YAML.
        fault: Why it is nothing in YAML, if so.
    """

    word: str
    value: Any
    fault: str | None = None


_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def value_of(name: str, given: Any, hint: Any) -> Any:
    """Return the value of a setting or option, once it is of the type that its dataclass says.

    Args:
        name: What it is called.
        given: The value, or the word of the command line: for a text the word itself counts where YAML reads something
            else into it (``question=Task: find {phrase}`` is no mapping, ``model=123`` no number).
        hint: The type: ``bool``, ``int``, ``float``, ``str``, a list or mapping, or a union of such.

    Raises:
        ClocError: It is of another type.
    """
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    members = typing.get_args(hint) if union else (hint,)
    written = given if isinstance(given, Written) else Written("", given)
    if written.fault is None and any(_fits(written.value, member) for member in members):
        return written.value
    if isinstance(given, Written) and str in members:
        return given.word
    if isinstance(given, Written) and float in members and _is_number(given.word):
        return float(given.word)  # YAML takes 1e-3, without a point, for a text
    kinds = " or ".join(_named(member) for member in members if member is not type(None))
    told = repr(given.word if isinstance(given, Written) else given)
    raise ClocError(f"{name} is {told}, not {kinds}" + (f" ({written.fault})" if written.fault else ""))


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    if origin is not None:
        return isinstance(value, (list, tuple)) and all(_fits(one, inner[0]) for one in value)
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is hint


def _is_number(word: str) -> bool:
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False


def _named(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin is None:
        return _NAMES.get(hint, str(hint))
    return "a mapping" if issubclass(origin, Mapping) else f"a list ({_named(typing.get_args(hint)[0])} each)"


def settings_from_words(words: Sequence[str]) -> dict[str, Written]:
    """Read ``key=value`` words, values in YAML where what they are for is no text; see :func:`value_of`.

    Raises:
        ClocError: A word is not of that form.
    """
    import yaml

    values: dict[str, Written] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ClocError(f"'{word}' is not of the form key=value")
        try:
            values[key] = Written(value, parse_yaml(value))
        except yaml.YAMLError:
            values[key] = Written(value, None, "not valid YAML either")
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
        values = parse_yaml(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ClocError(f"cannot read this suite ({error})", file=path) from error
    if not isinstance(values, dict):
        raise ClocError("a suite's YAML is a mapping of keys to values", file=path)
    given = settings_from_words(overrides)
    inner = {key.removeprefix("settings."): given.pop(key) for key in list(given) if key.startswith("settings.")}
    values |= given
    if values.get("settings") is None:
        values.pop("settings", None)
    hints = {"suite": str, **typing.get_type_hints(EvalOptions)}
    fields = {one.name: one for one in dataclasses.fields(EvalOptions)}
    for key in values:
        if key != "suite" and key not in fields:
            near = difflib.get_close_matches(str(key), [*fields, "suite"], n=1)
            raise ClocError(f"unknown key '{key}'", file=path, remedy=f"Did you mean '{near[0]}'?" if near else None)
    needed = ("suite", "model", "out")
    missing = [key for key in needed if values.get(key) in (None, Written("", None))]
    if missing:
        raise ClocError(f"'{missing[0]}' is not given", file=path, remedy=f"Add {missing[0]}=… to the command.")
    values = {key: value_of(key, value, hints[key]) for key, value in values.items()}
    if inner:
        values["settings"] = {**values.get("settings", {}), **inner}
    name = values.pop("suite")
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
