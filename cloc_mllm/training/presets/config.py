"""Presets: a YAML file plus `key=value` overrides become one typed, checked configuration a stage.

There is no interpolation and no inheritance between files: what a preset says is what it does. Whatever is wrong with
it is a :class:`ClocError` that names the file, the key and, for a misspelt key, the nearest real ones.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError, model_validator

from cloc_mllm.errors import ClocError
from cloc_mllm.training.presets.options import (
    AlignDataOptions,
    Block,
    ComputeOptions,
    EncoderModelOptions,
    EncoderParts,
    InstructDataOptions,
    MllmModelOptions,
    MllmObjective,
    MllmParts,
    OptimOptions,
    PartOptions,
    PretrainObjective,
    RegionTextOptions,
    RunOptions,
    TokenizerOptions,
    block,
)
from cloc_mllm.yaml_files import parse_yaml


class _StageConfig(Block):
    """What the three stages have in common."""

    run: RunOptions
    tokenizer: TokenizerOptions = block(TokenizerOptions, "the text encoder's tokenizer")
    optim: OptimOptions = block(OptimOptions, "optimiser and schedule")

    @model_validator(mode="after")
    def _bf16_needs_a_sharded_optimizer(self) -> _StageConfig:
        if self.run.precision == "bf16" and self.run.zero == 0:
            # DeepSpeed's bf16 optimiser for stage 0 takes one step on zero gradients when it is built.
            raise ValueError(
                "bf16 with ZeRO stage 0 is refused: DeepSpeed advances Adam by one empty step there, so the bias "
                "correction and the first updates are wrong; use run.zero=1, or run.precision=fp32"
            )
        return self

    @model_validator(mode="after")
    def _an_adapter_needs_a_base(self) -> _StageConfig:
        if self.run.export not in ("adapter", "both"):
            return self
        model: Any = getattr(self, "model", None)
        parts: Any = getattr(self, "parts", None)
        wanted = f"'run.export: {self.run.export}' writes an adapter"
        if parts is None or not hasattr(parts, "llm") or parts.llm.mode not in ("lora", "tokens"):
            raise ValueError(f"{wanted}, but there is none: set 'parts.llm' to lora or tokens, or export: merged")
        if not model.init.startswith("mllm:"):
            raise ValueError(
                f"{wanted}, which needs a base on disk: set 'model.init' to mllm:PATH, or export: merged (with init: "
                "parts the connectors are new, and there is no model to put the adapter on)"
            )
        return self

    @model_validator(mode="after")
    def _validation_needs_samples(self) -> _StageConfig:
        data: Any = getattr(self, "data", None)
        if data is not None and data.validation is None:
            for key, value in (("run.eval_every", self.run.eval_every), ("data.zero_shot", _zero_shot_of(data))):
                if value is not None:
                    raise ValueError(f"'{key}' is set, but there is nothing to validate on: set data.validation")
        return self


class PretrainConfig(_StageConfig):
    """Configuration of `train/pretrain_cloc.py`."""

    stage: Literal["pretrain"]
    model: EncoderModelOptions = block(EncoderModelOptions, "the encoder")
    data: RegionTextOptions
    objective: PretrainObjective = block(PretrainObjective, "the losses' weights")
    compute: ComputeOptions = block(ComputeOptions, "how work is saved")
    parts: EncoderParts = block(EncoderParts, "what is trained")

    @model_validator(mode="after")
    def _noise_is_for_tuning(self) -> PretrainConfig:
        if self.optim.neftune_alpha is not None:
            raise ValueError("'optim.neftune_alpha' is for alignment and instruction tuning: there is no LLM here")
        return self

    @model_validator(mode="after")
    def _control_has_no_prompter(self) -> PretrainConfig:
        if self.objective.extra_captions and self.model.prompter is not None:
            raise ValueError("'objective.extra_captions' is the control without a Prompter: set model.prompter=null")
        _refuse_adapters(self.parts, "the encoder")
        return self

    @model_validator(mode="after")
    def _savings_fit_the_model(self) -> PretrainConfig:
        prompter = self.model.prompter
        if self.compute.patch_dropout and prompter is not None and prompter.kind == "roi_align":
            raise ValueError("'compute.patch_dropout' leaves holes in the grid that RoI-Align samples: set it to 0")
        if self.compute.compile is not None and str(self.run.zero) in ("3", "zero3", "zero3_offload"):
            raise ValueError(
                "'compute.compile' with ZeRO stage 3 is refused: its weights come and go between the layers, which "
                "breaks the compiled graph apart at each; use stage 1 or 2"
            )
        return self

    @model_validator(mode="after")
    def _biases_go_with_the_sigmoid_loss(self) -> PretrainConfig:
        if (self.objective.contrast == "sigmoid") != (self.model.logit_bias_init is not None):
            raise ValueError(
                "'objective.contrast: sigmoid' and 'model.logit_bias_init' (SigLIP: -10) go together: the sigmoid loss "
                "needs a bias, and the softmax loss would leave one untrained"
            )
        return self


class _TuneConfig(_StageConfig):
    """What the two stages of the MLLM have in common."""

    @model_validator(mode="after")
    def _adapters_only_on_the_llm(self) -> _TuneConfig:
        parts: MllmParts = getattr(self, "parts")  # noqa: B009 -- a field of both stages
        _refuse_adapters(parts, "every part but the llm", but="llm")
        _refuse_quantization(parts.llm, self.run)
        return self


class AlignConfig(_TuneConfig):
    """Configuration of `train/align.py`."""

    stage: Literal["align"]
    model: MllmModelOptions
    data: AlignDataOptions
    objective: MllmObjective = block(MllmObjective, "the losses' weights")
    parts: MllmParts = block(MllmParts, "what is trained")


class InstructConfig(_TuneConfig):
    """Configuration of `train/instruct.py`."""

    stage: Literal["instruct"]
    model: MllmModelOptions
    data: InstructDataOptions
    objective: MllmObjective = block(MllmObjective, "the losses' weights")
    parts: MllmParts = block(MllmParts, "what is trained")


AnyConfig = PretrainConfig | AlignConfig | InstructConfig
ConfigT = TypeVar("ConfigT", bound=_StageConfig)
STAGES: dict[str, type[_StageConfig]] = {"pretrain": PretrainConfig, "align": AlignConfig, "instruct": InstructConfig}


@dataclass(frozen=True)
class BatchPlan:
    """How one optimiser step's samples are spread: `global_batch == micro_batch * accumulation * world_size`."""

    global_batch: int
    micro_batch: int
    accumulation: int
    world_size: int

    def __str__(self) -> str:
        return (
            f"{self.global_batch} samples a step = {self.micro_batch} at once x {self.accumulation} accumulated "
            f"x {self.world_size} processes"
        )


def plan_batch(global_batch: int, micro_batch: int | None, world_size: int) -> BatchPlan:
    """Derive accumulation steps from the global batch, the micro batch and the number of processes.

    This is the only place where batch arithmetic is done.

    Args:
        global_batch: Samples an optimiser step, over all processes.
        micro_batch: Samples a process takes at once; ``None`` takes its whole share at once.
        world_size: Number of processes.

    Returns:
        The plan.

    Raises:
        ClocError: The numbers do not divide.
    """
    if global_batch < 1 or world_size < 1 or (micro_batch is not None and micro_batch < 1):
        raise ClocError(
            f"batch_size {global_batch}, micro_batch_size {micro_batch} and {world_size} processes must all be positive"
        )
    if global_batch % world_size:
        raise ClocError(
            f"run.batch_size {global_batch} does not divide over {world_size} processes",
            remedy=f"Use a multiple of {world_size}, such as {-(-global_batch // world_size) * world_size}.",
        )
    share = global_batch // world_size
    micro = share if micro_batch is None else micro_batch
    if share % micro:
        raise ClocError(
            f"run.micro_batch_size {micro} does not divide a process's share of the batch, {share} "
            f"(run.batch_size {global_batch} over {world_size} processes)",
            remedy=f"Use a divisor of {share}, or another run.batch_size.",
        )
    return BatchPlan(global_batch, micro, share // micro, world_size)


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = (), *, stage: str | None = None) -> AnyConfig:
    """Read a preset, apply overrides, check everything.

    Args:
        path: YAML file. Paths inside it are relative to the working directory.
        overrides: `key=value` pairs: dotted keys, values in YAML (`optim.lr=1e-4`, `model.prompter=null`).
        stage: The stage that the file has to be of; ``None`` accepts each.

    Returns:
        The configuration class of the file's `stage`.

    Raises:
        ClocError: File unreadable or not YAML, unknown key, wrong value, contradicting options, wrong stage.
    """
    tree = _read_yaml(Path(path))
    for override in overrides:
        _apply_override(tree, override)
    name = tree.get("stage")
    if name not in STAGES:
        raise ClocError(f"'stage' must be one of {', '.join(STAGES)}, not {name!r}", file=path)
    if stage is not None and name != stage:
        raise ClocError(f"this preset is for the stage '{name}', not for '{stage}'", file=path)
    try:
        config = STAGES[name].model_validate(tree)
    except ValidationError as error:
        raise ClocError(_explain(error, STAGES[name]), file=path) from None
    assert isinstance(config, AnyConfig)
    return config


def write_config(config: AnyConfig, path: str | os.PathLike[str]) -> None:
    """Write the resolved configuration as a preset that reproduces the run.

    Args:
        config: What :func:`load_config` returned.
        path: YAML file to write.
    """
    tree = {"stage": config.stage, **config.model_dump(mode="json", exclude={"stage"})}
    Path(path).write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")])
        hint = f"Did you mean {' or '.join(near)}?" if near else None
        raise ClocError("there is no such preset", file=path, remedy=hint) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ClocError(f"cannot be read: {error}", file=path) from None
    except yaml.YAMLError as error:
        raise ClocError(f"is not valid YAML: {' '.join(str(error).split())}", file=path) from None
    if not isinstance(tree, dict):
        raise ClocError("must hold keys and values at the top level", file=path)
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one dotted key in place."""
    key, equals, text = override.partition("=")
    if not equals or not key or key.startswith("-"):
        raise ClocError(f"cannot read the override '{override}'", remedy="Write key=value, as in optim.lr=1e-4.")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        raise ClocError(f"the value of the override '{override}' is not valid YAML") from None
    *parents, last = key.split(".")
    node = tree
    for depth, parent in enumerate(parents):
        child = node.get(parent)
        if isinstance(child, str):  # `llm: lora` is short for `llm: {mode: lora}`; other words cannot have keys below
            child = {"mode": child}
        if child is not None and not isinstance(child, Mapping):
            raise ClocError(f"'{'.'.join(parents[: depth + 1])}' is a value, so '{key}' cannot be set")
        node[parent] = dict(child or {})
        node = node[parent]
    node[last] = value


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Turn pydantic's list of errors into one sentence about keys."""
    problems = []
    for item in error.errors(include_url=False):
        where = [str(part) for part in item["loc"] if part != "function-after"]
        key = ".".join(where)
        if item["type"] == "extra_forbidden":
            problems.append(f"unknown key '{key}'{_near(where, model)}")
        elif item["type"] == "missing":
            problems.append(f"'{key}' is missing")
        elif item["type"] == "value_error":
            problems.append((f"'{key}': " if key else "") + str(item["ctx"]["error"]))
        else:
            problems.append(f"'{key}' is {item['input']!r}: {item['msg'][:1].lower()}{item['msg'][1:]}")
    return "; ".join(dict.fromkeys(problems))


def _near(where: list[str], model: type[BaseModel]) -> str:
    """Say which real keys are near an unknown one: spelt alike in the same block, or the same word elsewhere."""
    *parents, word = where
    block: type[BaseModel] | None = model
    for parent in parents:
        field = block.model_fields.get(parent) if block else None
        block = _block_of(field.annotation) if field else None
    known = list(block.model_fields) if block else []
    near = [".".join([*parents, name]) for name in difflib.get_close_matches(word, known, n=2, cutoff=0.6)]
    near += [key for key in _all_keys(model) if key.rsplit(".")[-1] == word and key not in near]
    if near:
        return f" (did you mean {' or '.join(repr(key) for key in near[:3])}?)"
    return f" (known here: {', '.join(known)})" if known else ""


def _all_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Return every dotted key of a configuration class."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        block = _block_of(field.annotation)
        if block is not None:
            keys += _all_keys(block, f"{prefix}{name}.")
    return keys


def _block_of(annotation: Any) -> type[BaseModel] | None:
    """Return the block a field holds, looking through `| None`."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _zero_shot_of(data: Any) -> Any:
    return data.zero_shot if isinstance(data, RegionTextOptions) else None


def _refuse_adapters(parts: EncoderParts | MllmParts, whom: str, but: str = "") -> None:
    """LoRA is for the language model: everything else is small or has to move as a whole; tokens only it has."""
    for name in type(parts).model_fields:
        part: PartOptions = getattr(parts, name)
        if part.mode in ("lora", "tokens") and name != but:
            raise ValueError(f"'parts.{name}: {part.mode}' is not supported for {whom}: use frozen or full")


def _refuse_quantization(llm: PartOptions, run: RunOptions) -> None:
    """4-bit weights are packed bytes: stage 3 would cut them without their scales."""
    if llm.quantization is not None and str(run.zero).startswith(("3", "zero3")):
        raise ValueError(
            f"'parts.llm.quantization: {llm.quantization}' with ZeRO stage 3 is refused: it would partition packed "
            "4-bit weights as if they were numbers; use run.zero=2"
        )
