"""Writes `export/`: the weights to use, complete in themselves, in fp32, whatever the run was sharded into.

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
import yaml
from torch import nn

from cloc_mllm import __version__
from cloc_mllm.errors import ClocError
from cloc_mllm.training import launch
from cloc_mllm.training.config import AnyConfig, write_config

EXPORT_FOLDER = "export"
RAW_EXPORT_FOLDER = "export_raw"
"""The weights as the last step left them, beside an export of their average."""


def export_model(
    trainer: Any,
    build_skeleton: Callable[[], nn.Module],
    processor: Any,
    name: str = EXPORT_FOLDER,
    metrics: dict[str, float] | None = None,
) -> Path:
    """Gather the weights of a finished run and write `export/` in its folder. Every process has to call this.

    Args:
        trainer: The stage's trainer, after training.
        build_skeleton: Builds the model anew with its parts applied; called under the meta device, so it costs nothing.
        processor: Saved beside the weights.
        name: What the folder is called in the run folder.
        metrics: Final figures for the model card.

    Returns:
        The folder.

    Raises:
        ClocError: A weight could not be gathered.
    """
    folder = Path(trainer.args.output_dir) / name
    weights = gather_weights(trainer.model, launch.zero_stage(trainer.zero), trainer.world.is_main)
    exact = {name: value for name, value in trainer.exact_weights.items() if name in weights}
    # What 4-bit weights keep beside themselves: their scales, under names below their own.
    weights = {n: value for n, value in weights.items() if n.rpartition(".weight.")[0] + ".weight" not in exact} | exact
    if trainer.world.is_main:
        temporary = folder.with_name(f".{name}.partial")
        shutil.rmtree(temporary, ignore_errors=True)
        save_weights(weights, build_skeleton, processor, temporary, source=trainer.model)
        _write_card(temporary, trainer.config, metrics or {})
        # Whoever sees the folder sees all of it.
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
    launch.barrier()
    return folder


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
    with _without_zero_init(), torch.device("meta"):
        skeleton: Any = build_skeleton()
    skeleton.load_state_dict(weights, strict=True, assign=True)
    _tie_again(skeleton, weights)
    if hasattr(skeleton, "merge_and_unload"):
        skeleton = skeleton.merge_and_unload()
    skeleton.tie_weights()
    generation = getattr(source, "generation_config", None)
    if generation is not None:
        skeleton.generation_config = generation
    skeleton.save_pretrained(str(folder))
    processor.save_pretrained(str(folder))


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


def _write_card(folder: Path, config: AnyConfig, metrics: dict[str, float]) -> None:
    """Write the model card: what this is, how it was made, and how it did on validation."""
    write_config(config, folder / "run.yaml")
    made = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    figures = "".join(f"| {name} | {value:.4g} |\n" for name, value in sorted(metrics.items()))
    table = f"\n| figure at the end of training | value |\n|---|---|\n{figures}" if figures else ""
    (folder / "README.md").write_text(
        f"---\nlibrary_name: transformers\ntags: [cloc]\n---\n\n# {Path(config.run.output).name}\n\n"
        f"Made by the stage `{config.stage}` of cloc_mllm {__version__}, with this configuration:\n\n"
        f"```yaml\n{made}```\n{table}",
        encoding="utf-8",
    )
