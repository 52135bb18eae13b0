"""What a person may ask of `cloc-mllm label`: a YAML file plus `key=value` overrides become one checked `LabelConfig`.

Every key has a type and a default, and a key that is not here is an error. Importing this module loads no model.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cloc_mllm.errors import ClocError
from cloc_mllm.labeling.filtering import FilterOptions
from cloc_mllm.yaml_files import parse_yaml

_STAGES = ("captioner", "phrases", "detector")
Positive = Annotated[int, Field(gt=0)]


class _Block(BaseModel):
    """Unknown keys are refused, and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class StageChoice(_Block):
    """One stage: which, with what options, how much at a time.

    Attributes:
        stage: `name` or `name:argument`, see `cloc_mllm.labeling.stages`.
        options: Passed to the stage, which refuses those it does not know.
        batch_size: Pictures at a time. Answers made with another batch size are used again.
        gpus: Share of a GPU that one worker takes, with the engine `ray` on a cluster that has GPUs.
    """

    stage: str
    options: dict[str, Any] = Field(default_factory=dict)
    batch_size: Positive = 8
    gpus: Annotated[float, Field(ge=0)] = 0.5


class LabelConfig(_Block):
    """All of a labelling.

    Attributes:
        source: Folder of pictures, or region-text data or shards in any form that the readers open.
        out: Folder to write to.
        captioner: See `cloc_mllm.labeling.stages`.
        phrases: See `cloc_mllm.labeling.stages`.
        detector: See `cloc_mllm.labeling.stages`.
        filter: Which detections become regions.
        format: "parquet", "webdataset" or "jsonl".
        shard: Samples of the source to a shard.
        regions: What becomes of regions that the source has: "ignore" them, or "keep" them before the new ones.
        on_bad_sample: "error" stops at a sample that cannot be labelled; "skip" leaves it out, counts and lists it.
        engine: "local" processes, or "ray".
        workers: Processes; 0 does all the work in this one, null takes one a device (see `devices`).
        devices: Where models run, shared out over the workers; null: all GPUs, or else one worker for each two cores.
        threads: Processor threads of each worker's model. One makes answers equal wherever they are computed.
        ray_address: Of a running cluster; null finds one or starts one on this machine, "local" always starts one.
        overwrite: Replace a finished set of other options in `out`.
    """

    source: str
    out: str
    captioner: StageChoice = StageChoice(stage="existing")
    phrases: StageChoice = StageChoice(stage="textblob", batch_size=256, gpus=0)
    detector: StageChoice = StageChoice(stage="owlv2:google/owlv2-base-patch16-ensemble")
    filter: FilterOptions = FilterOptions()
    format: Literal["parquet", "webdataset", "jsonl"] = "parquet"
    shard: Positive = 1024
    regions: Literal["ignore", "keep"] = "ignore"
    on_bad_sample: Literal["error", "skip"] = "error"
    engine: Literal["local", "ray"] = "local"
    workers: Annotated[int, Field(ge=0)] | None = None
    devices: list[str] | None = None
    threads: Positive = 1
    ray_address: str | None = None
    overwrite: bool = False

    @model_validator(mode="before")
    @classmethod
    def _short_stages(cls, tree: Any) -> Any:
        """`captioner: existing` is short for `captioner: {stage: existing}`; what a block leaves out is the default."""
        if not isinstance(tree, dict):
            return tree
        tree = dict(tree)
        for name in _STAGES:
            value = tree.get(name)
            if isinstance(value, str):
                value = {"stage": value}
            if isinstance(value, dict):
                default = cls.model_fields[name].default
                kept = {"batch_size": default.batch_size, "gpus": default.gpus}
                tree[name] = {**kept, "stage": default.stage, **value}
        return tree

    @field_validator("devices")
    @classmethod
    def _some_device(cls, devices: list[str] | None) -> list[str] | None:
        if devices is not None and not devices:
            raise ValueError("name at least one device, or null")
        return devices

    def output_options(self) -> dict[str, Any]:
        """What decides the output, as plain data: not where it is computed, nor how many at a time."""
        tree = self.model_dump(
            mode="json",
            exclude={"out", "engine", "workers", "devices", "threads", "ray_address", "overwrite", "on_bad_sample"},
        )
        for name in _STAGES:
            tree[name] = {key: tree[name][key] for key in ("stage", "options")}
        return tree


def load_label_config(
    path: str | Path | None, given: Mapping[str, Any] | None = None, overrides: Sequence[str] = ()
) -> LabelConfig:
    """Read a preset, put what the command line gives over it, check everything.

    Where the command line names another stage than the preset, the preset's options of its stage do not go with it.

    Args:
        path: YAML file; None starts from the defaults. Paths inside it are relative to the working directory.
        given: Values by dotted key, as options of the command line give them; None values are not given.
        overrides: `key=value` pairs: dotted keys, values in YAML (`detector.options.prompt=null`).

    Raises:
        ClocError: File unreadable or not YAML, unknown key, wrong value.
    """
    tree = {} if path is None else _read_yaml(Path(path))
    pairs = [(key, value) for key, value in (given or {}).items() if value is not None]
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key or key.startswith("-"):
            raise ClocError(f"cannot read the override '{override}'", remedy="Write key=value, as in filter.score=0.2.")
        try:
            pairs.append((key, parse_yaml(text)))
        except yaml.YAMLError:
            raise ClocError(f"the value of the override '{override}' is not valid YAML") from None
    for name in _STAGES:
        _drop_options_of_another(tree, name, dict(pairs).get(f"{name}.stage"))
    for key, value in pairs:
        _set(tree, key, value)
    try:
        return LabelConfig.model_validate(tree)
    except ValidationError as error:
        raise ClocError(_explain(error), file=path) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problem = f"cannot be read as YAML: {' '.join(str(error).split())}"
        raise ClocError(problem, file=path, remedy="scripts/labeling/vesl.yaml is one that can.") from None
    if not isinstance(tree, dict):
        raise ClocError("must hold keys and values at the top level", file=path)
    return tree


def _drop_options_of_another(tree: dict[str, Any], name: str, asked: Any) -> None:
    """Take out of a preset what a stage is told if another one is asked for; another model of it is no other stage."""
    block = tree.get(name)
    if asked is not None and isinstance(block, dict):
        before = block.get("stage", LabelConfig.model_fields[name].default.stage)
        if str(before).partition(":")[0] != str(asked).partition(":")[0]:
            tree[name] = {key: value for key, value in block.items() if key != "options"}


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set one dotted key in place."""
    *parents, last = key.split(".")
    for parent in parents:
        child = tree.get(parent)
        if isinstance(child, str) and parent in _STAGES:
            child = {"stage": child}
        if child is not None and not isinstance(child, dict):
            raise ClocError(f"'{parent}' is a value, so '{key}' cannot be set")
        tree[parent] = dict(child or {})
        tree = tree[parent]
    tree[last] = value


def _explain(error: ValidationError) -> str:
    """Turn pydantic's list of errors into one sentence about keys."""
    problems = []
    for item in error.errors(include_url=False):
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            near = difflib.get_close_matches(str(item["loc"][-1]), _known(item["loc"][:-1]), n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(_known(item['loc'][:-1]))}"
            problems.append(f"unknown key '{key}' ({hint})")
        elif item["type"] == "missing":
            problems.append(f"'{key}' is missing")
        else:
            problems.append(f"'{key}' is {item['input']!r}: {item['msg'][:1].lower()}{item['msg'][1:]}")
    return "; ".join(dict.fromkeys(problems))


def _known(where: Sequence[Any]) -> list[str]:
    """The keys of a block."""
    if not where:
        return list(LabelConfig.model_fields)
    return list(FilterOptions.__dataclass_fields__ if where[0] == "filter" else StageChoice.model_fields)
