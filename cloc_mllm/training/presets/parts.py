"""The one table of a model's parts, and the one function that freezes, trains or adapts them.

A preset speaks of parts (`vision_tower`, `prompter`, `llm`, …); this module knows which sub-modules each of them is. A
parameter that belongs to no part, or a part that was asked to train but does not exist, is an error: nothing is ever
trained, or left out, by accident.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cloc_mllm.errors import ClocError
from cloc_mllm.training.presets.options import EncoderParts, MllmParts, OptimOptions, PartOptions

PartTable = Mapping[str, tuple[str, ...]]

ENCODER_PARTS: PartTable = {
    "vision_tower": ("vision_model", "visual_projection"),
    "text_tower": ("text_model", "text_projection"),
    "prompter": ("prompter",),
    "box_head": ("box_head",),
    "temperature": ("logit_scale",),
    "region_temperature": ("region_logit_scale",),
    "bias": ("logit_bias",),
    "region_bias": ("region_logit_bias",),
}
TEMPERATURES = ("temperature", "region_temperature")
MLLM_PARTS: PartTable = {
    "vision_tower": ("model.vision_tower",),
    "projector": ("model.multi_modal_projector", "model.image_newline"),
    "prompter": ("model.prompter",),
    "region_projector": ("model.region_projector",),
    "grounding_head": ("model.grounding_head",),
    "llm": ("model.language_model", "lm_head"),
}

_PEFT_INFIXES = re.compile(
    r"\.(base_layer|modules_to_save\.\w+|original_module|token_adapter\b.*|lora_\w+\.\w+)(?=\.|$)"
)


@dataclass(frozen=True)
class PartReport:
    """What became of one part: for printing, `train explain` and tests.

    Attributes:
        name: The part.
        mode: `frozen`, `full`, `lora` or `tokens`; `absent` if the model has no such part.
        total: Number of its parameters, adapters included.
        trained: How many of them are trained.
        lr: Its peak learning rate; 0 if nothing is trained.
    """

    name: str
    mode: str
    total: int
    trained: int
    lr: float


def table_for(parts: EncoderParts | MllmParts) -> PartTable:
    """Return the table that goes with a preset's `parts` block."""
    return ENCODER_PARTS if isinstance(parts, EncoderParts) else MLLM_PARTS


def part_of(parameter: str, table: PartTable) -> str:
    """Return the part that a parameter belongs to.

    Args:
        parameter: Its name in `named_parameters`, with or without peft's wrappers.
        table: One of the tables above.

    Raises:
        ClocError: No part owns it.
    """
    name = plain_name(parameter)
    for part, prefixes in table.items():
        if any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes):
            return part
    raise ClocError(f"the parameter '{parameter}' belongs to none of the parts {', '.join(table)}")


def plain_name(parameter: str) -> str:
    """Return a parameter's name without what peft's wrappers put in it."""
    return _PEFT_INFIXES.sub("", parameter.removeprefix("base_model.model."))


def apply_parts(
    model: nn.Module, parts: EncoderParts | MllmParts, optim: OptimOptions
) -> tuple[nn.Module, list[PartReport]]:
    """Freeze, unfreeze and adapt, as the preset's `parts` say.

    Args:
        model: The whole model, on any device (also meta).
        parts: The preset's block.
        optim: For the learning rates that `parts` leave open.

    Returns:
        The model (wrapped by peft if the LLM is `lora` or `tokens`) and a report of every part.

    Raises:
        ClocError: A parameter belongs to no part, or nothing is left to train.
    """
    table = table_for(parts)
    options = {name: getattr(parts, name) for name in table}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(options[part_of(name, table)].mode == "full")
    if any(option.mode in ("lora", "tokens") for option in options.values()):
        model = _add_adapters(model, options)
    reports = [_report(model, name, options[name], table, optim) for name in table]
    if not any(report.trained for report in reports):
        raise ClocError("every part is frozen: there is nothing to train", remedy="Set one of `parts` to full or lora.")
    return model, reports


def parameter_groups(model: nn.Module, parts: EncoderParts | MllmParts, optim: OptimOptions) -> list[dict[str, Any]]:
    """Return the optimiser's parameter groups: one a part, halved into decayed matrices and the undecayed rest.

    Args:
        model: The model after :func:`apply_parts`.
        parts: The preset's block.
        optim: Learning rate and weight decay that `parts` leave open.

    Returns:
        Groups for `torch.optim`, each with `name`, `params`, `lr`, `weight_decay`. Temperatures are never decayed.
    """
    table = table_for(parts)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = part_of(name, table)
        option: PartOptions = getattr(parts, part)
        # A partitioned parameter (ZeRO-3) is flat; DeepSpeed keeps its real shape beside it.
        dims = len(getattr(parameter, "ds_shape", parameter.shape))
        decayed = dims >= 2 and part not in TEMPERATURES
        decay = optim.weight_decay if option.weight_decay is None else option.weight_decay
        key = f"{part}/{'decay' if decayed else 'no_decay'}"
        group = groups.setdefault(
            key,
            {
                "name": key,
                "params": [],
                "lr": optim.lr if option.lr is None else option.lr,
                "weight_decay": decay if decayed else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def describe(reports: Iterable[PartReport]) -> str:
    """Return the table of parts as text."""
    rows = [("part", "mode", "parameters", "trained", "lr")]
    listed = list(reports)
    rows += [(r.name, r.mode, f"{r.total:,}", f"{r.trained:,}", f"{r.lr:g}") for r in listed]
    trained, total = trained_and_total(listed)
    rows.append(("all", "", f"{total:,}", f"{trained:,}", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = []
    for row in rows:
        left = [row[i].ljust(widths[i]) for i in (0, 1)]
        right = [row[i].rjust(widths[i]) for i in (2, 3, 4)]
        lines.append("  " + "  ".join([*left, *right]).rstrip())
    return "\n".join(lines)


def trained_and_total(reports: Iterable[PartReport]) -> tuple[int, int]:
    """Return how many parameters all parts together train, and have."""
    listed = list(reports)
    return sum(report.trained for report in listed), sum(report.total for report in listed)


def _report(model: nn.Module, name: str, option: PartOptions, table: PartTable, optim: OptimOptions) -> PartReport:
    # peft keeps a frozen copy of every module it saves whole: that is no parameter of the model.
    real = [(n, p) for n, p in model.named_parameters() if ".original_module" not in n]
    mine = [p for n, p in real if part_of(n, table) == name]
    total = sum(_size(p) for p in mine)
    trained = sum(p.numel() for p in mine if p.requires_grad)
    lr = optim.lr if option.lr is None else option.lr
    return PartReport(name, option.mode if mine else "absent", total, trained, lr if trained else 0.0)


def _size(parameter: nn.Parameter) -> int:
    """Return how many numbers a parameter holds; a 4-bit one keeps two in each of its bytes."""
    state: Any = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(torch.Size(state.shape).numel())


def _add_adapters(model: nn.Module, options: Mapping[str, PartOptions]) -> nn.Module:
    """Put adapters on the LLM, and keep every fully trained part in the adapter's files too.

    They are on the embeddings of the control tokens and, with `lora`, on the LLM's linear layers.
    """
    from peft import LoraConfig, get_peft_model
    from peft.utils.constants import DUMMY_TARGET_MODULES

    llm = options["llm"]
    full = [
        prefix
        for part, prefixes in MLLM_PARTS.items()
        for prefix in prefixes
        if options[part].mode == "full" and _submodule(model, prefix) is not None
    ]
    config = LoraConfig(
        r=llm.rank,
        lora_alpha=llm.alpha,
        lora_dropout=llm.dropout,
        target_modules=_adapted_layers(model, llm.layers)
        if llm.mode == "lora"
        else DUMMY_TARGET_MODULES,  # peft's word for none
        modules_to_save=full or None,
        trainable_token_indices=_new_tokens(model),
    )
    # DeepSpeed casts the whole model itself; adapters that peft keeps in fp32 would break ZeRO-3's one dtype.
    try:
        with warnings.catch_warnings():
            # peft still asks transformers in an old way; nothing of ours can change it.
            warnings.simplefilter("ignore", FutureWarning)
            return get_peft_model(model, config, autocast_adapter_dtype=False)  # type: ignore[return-value]
    except ValueError as error:
        raise ClocError(f"'parts.llm: {llm.mode}' does not fit this language model: {error}") from error


def llm_layers(model: nn.Module, chosen: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """Return the linear layers of the language model's decoder, by their full names: all but the embeddings and head.

    Families name them as they like (`q_proj`, `dense`, `c_attn`), so they are found by what they are.

    Args:
        model: The MLLM.
        chosen: Last words of the names to return, as in `q_proj`; ``None``: all.

    Raises:
        ClocError: There is none, or a chosen name is none of theirs.
    """
    from transformers.pytorch_utils import Conv1D

    decoder = _submodule(model, "model.language_model") or nn.Module()
    found = {n: m for n, m in decoder.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    known = sorted({name.rpartition(".")[-1] for name in found})
    unknown = sorted(set(chosen or ()) - set(known))
    if unknown or not found:
        problem = f"it has no layer {', '.join(unknown)}" if unknown else "it has no linear layers"
        raise ClocError(
            f"'parts.llm: lora' does not fit this language model: {problem}",
            remedy=f"Choose 'parts.llm.layers' among {', '.join(known)}." if known else None,
        )
    kept = {n: m for n, m in found.items() if chosen is None or n.rpartition(".")[-1] in chosen}
    return {f"model.language_model.{name}": module for name, module in kept.items()}


def _adapted_layers(model: nn.Module, chosen: Sequence[str] | None) -> str:
    """Return a regular expression on whole names: bare ones would also hit the tower's layers of the same name."""
    leaves = sorted({name.rpartition(".")[-1] for name in llm_layers(model, chosen)})
    return rf"model\.language_model\.(.*\.)?({'|'.join(map(re.escape, leaves))})"


def _new_tokens(model: nn.Module) -> dict[str, list[int]] | None:
    """Return the rows of the embeddings that alignment added: a frozen LLM could never learn to say `<ground>`."""
    config: Any = model.config
    ids = [getattr(config, key, None) for key in ("image_token_index", "region_token_index", "ground_token_index")]
    known = sorted({int(i) for i in ids if i is not None})
    if not known:
        return None
    inputs: Any = model.get_input_embeddings()  # type: ignore[operator]
    name = next(name for name, module in model.named_modules() if module is inputs).rsplit(".")[-1]
    # Tied output embeddings follow the input ones by themselves.
    tied = inputs.weight is model.get_output_embeddings().weight  # type: ignore[operator]
    return {name: known} if tied else {name: known, "lm_head": known}


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    node: Any = model
    for step in name.split("."):
        node = getattr(node, step, None)
    return node if isinstance(node, nn.Module) else None
