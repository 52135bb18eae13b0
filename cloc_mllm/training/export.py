"""Writes `export/`: the weights to use, complete in themselves, in fp32, whatever the run was sharded into; `adapter/`.

The live model is never saved from directly: at ZeRO-3 its parameters are empty, in bf16 they are rounded, under LoRA
they are wrapped. Instead the true (master) weights are gathered, put into a fresh skeleton, and that is saved.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cloc_mllm.errors import ClocError
from cloc_mllm.training.card import write_card
from cloc_mllm.training.presets.config import AnyConfig
from cloc_mllm.training.running import launch
from cloc_mllm.training.tuning.adapters import save_adapter

EXPORT_FOLDER = "export"
ADAPTER_FOLDER = "adapter"
RAW = "_raw"
"""Ends the names of what holds the weights as the last step left them, beside an export of their average."""


def export_model(
    trainer: Any,
    build_skeleton: Callable[[], nn.Module],
    processor: Any,
    suffix: str = "",
    metrics: dict[str, float] | None = None,
) -> None:
    """Gather the weights of a finished run and write what `run.export` asks for. Every process has to call this.

    Args:
        trainer: The stage's trainer, after training.
        build_skeleton: Builds the model anew with its parts applied; called under the meta device, so it costs nothing.
        processor: Saved beside the weights.
        suffix: Added to the names of the folders in the run folder.
        metrics: Final figures for the model card.

    Raises:
        ClocError: A weight could not be gathered.
    """
    config: AnyConfig = trainer.config
    weights = gather_weights(trainer.model, launch.zero_stage(trainer.zero), trainer.world.is_main)
    exact = {name: value for name, value in trainer.exact_weights.items() if name in weights}
    # What 4-bit weights keep beside themselves: their scales, under names below their own.
    weights = {n: value for n, value in weights.items() if n.rpartition(".weight.")[0] + ".weight" not in exact} | exact
    if trainer.world.is_main:
        # First the adapter: merging changes the weights in place.
        if config.run.export in ("adapter", "both"):
            base = config.model.init.removeprefix("mllm:")
            with _appearing_whole(Path(config.run.output) / f"{ADAPTER_FOLDER}{suffix}") as folder:
                save_adapter(filled_skeleton(weights, build_skeleton), base, processor, folder)
                write_card(folder, config, metrics or {})
        if config.run.export in ("merged", "both"):
            with _appearing_whole(Path(config.run.output) / f"{EXPORT_FOLDER}{suffix}") as folder:
                save_weights(weights, build_skeleton, processor, folder, source=trainer.model)
                write_card(folder, config, metrics or {})
    launch.barrier()


@contextmanager
def _appearing_whole(folder: Path) -> Iterator[Path]:
    """Give a hidden folder to write to and rename it at the end: whoever sees the folder sees all of it."""
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    yield temporary
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)


@torch.no_grad()
def gather_weights(model: nn.Module, stage: int | None, keep: bool) -> dict[str, torch.Tensor]:
    """Return all weights and saved buffers of a model in fp32 on the CPU.

    Args:
        model: The unwrapped model.
        stage: Its ZeRO stage; ``None`` without DeepSpeed.
        keep: Whether this process wants them; the others take part and get an empty dictionary.

    Raises:
        ClocError: A gathered weight is empty.
    """
    saved = model.state_dict()
    weights: dict[str, torch.Tensor] = {}
    found: dict[int, torch.Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in found:
            full = _full_parameter(parameter, stage)
            # Tied parameters have to stay one tensor, or they would be saved twice.
            found[id(parameter)] = full.detach().to("cpu", torch.float32, copy=True) if keep else torch.empty(0)
        if keep and name in saved:
            weights[name] = found[id(parameter)]
    if keep:
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        weights |= {name: value.detach().cpu() for name, value in saved.items() if name not in parameters}
        empty = [name for name, value in weights.items() if value.numel() == 0]
        if empty:
            raise ClocError(f"these weights came back empty from {stage=}: {', '.join(empty[:3])}")
    return weights


def save_weights(
    weights: dict[str, torch.Tensor],
    build_skeleton: Callable[[], nn.Module],
    processor: Any,
    folder: Path,
    source: Any = None,
) -> None:
    """Put weights into a fresh skeleton and save it with its processor.

    Args:
        weights: What :func:`gather_weights` returned.
        build_skeleton: Builds the model; see :func:`export_model`.
        processor: Saved beside the weights.
        folder: Where to.
        source: The trained model, for its generation settings.
    """
    skeleton = filled_skeleton(weights, build_skeleton)
    if hasattr(skeleton, "merge_and_unload"):
        skeleton = skeleton.merge_and_unload()
    skeleton.tie_weights()
    generation = getattr(source, "generation_config", None)
    if generation is not None:
        skeleton.generation_config = generation
    skeleton.save_pretrained(str(folder))
    processor.save_pretrained(str(folder))


def filled_skeleton(weights: dict[str, torch.Tensor], build_skeleton: Callable[[], nn.Module]) -> Any:
    """Build a model anew and give it weights, all of them; what was tied is tied again.

    Args:
        weights: What :func:`gather_weights` returned.
        build_skeleton: Builds the model; see :func:`export_model`.
    """
    with _without_zero_init(), torch.device("meta"):
        skeleton: Any = build_skeleton()
    skeleton.load_state_dict(weights, strict=True, assign=True)
    _tie_again(skeleton, weights)
    return skeleton


def _tie_again(skeleton: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Make parameters that were one tensor one parameter again: assigning made them several."""
    first: dict[int, nn.Parameter] = {}
    for name, parameter in list(skeleton.named_parameters(remove_duplicate=False)):
        shared = first.setdefault(id(weights[name]), parameter)
        if shared is not parameter:
            owner, _, leaf = name.rpartition(".")
            setattr(skeleton.get_submodule(owner), leaf, shared)


@contextmanager
def _without_zero_init() -> Iterator[None]:
    """Build models whole: while a stage-3 configuration is known, transformers partitions every model it builds.

    That would need all processes, and the skeleton is built by one.
    """
    from transformers.integrations import deepspeed as integration

    reference = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        config = None if reference is None else reference()
        if config is not None:
            integration.set_hf_deepspeed_config(config)


def _full_parameter(parameter: nn.Parameter, stage: int | None) -> torch.Tensor:
    """Return one whole parameter, from the optimiser's fp32 copy where there is one."""
    if stage in (None, 0):
        return parameter
    from deepspeed import zero
    from deepspeed.utils import safe_get_full_fp32_param

    if parameter.requires_grad and (parameter.dtype != torch.float32 or stage == 3):
        master = safe_get_full_fp32_param(parameter)
        if master is not None:
            return master.reshape(getattr(parameter, "ds_shape", parameter.shape))
    if stage == 3:
        with zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter
