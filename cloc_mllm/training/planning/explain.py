"""What a preset amounts to, said before anything is trained: values, batch, parts, memory.

Models are built on the meta device: they have shapes and no weights, so a 7-billion-parameter LLM is explained in the
time it takes to read its configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import yaml
from torch import nn

from cloc_mllm.errors import ClocError
from cloc_mllm.models.modeling_cloc import ClocModel
from cloc_mllm.training.planning.scaling import DEVICES, GIB, estimate, state_bytes, table
from cloc_mllm.training.presets.config import AnyConfig, BatchPlan, PretrainConfig, load_config, plan_batch
from cloc_mllm.training.presets.parts import PartReport, apply_parts, describe, trained_and_total
from cloc_mllm.training.running import launch

if TYPE_CHECKING:
    from cloc_mllm.training.planning.costs import ImageCost


def explain(
    path: str,
    overrides: Sequence[str] = (),
    world_size: int = 1,
    scale: Sequence[int] = (),
    device: str = "h100",
) -> str:
    """Return everything about a preset that can be known without training.

    Args:
        path: The preset.
        overrides: `key=value` pairs.
        world_size: Number of processes to plan for.
        scale: Numbers of devices to estimate pre-training's memory, traffic and step time for.
        device: Which of `scaling.DEVICES`.

    Raises:
        ClocError: The preset is wrong, or the batch does not divide.
    """
    config = load_config(path, overrides)
    if scale and not isinstance(config, PretrainConfig):
        raise ClocError("estimates for many devices are made for pre-training only", file=path)
    plan = plan_batch(config.run.batch_size, config.run.micro_batch_size, world_size)
    stage = launch.zero_stage(launch.resolve_zero(config.run.zero))
    sections = [
        ("Configuration", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True).rstrip()),
        ("Batch", _batch_lines(config, plan)),
    ]
    try:
        reports = count_parts(config)
    except ClocError as error:
        # A preset may name the export of a stage that has not been run yet.
        sections.append(("Parts", f"unknown until this is there: {error}"))
    else:
        ema = config.optim.ema is not None
        sections.append(("Parts", describe(reports)))
        memory = memory_table(reports, config.run.precision, world_size, stage, ema)
        if not isinstance(config, PretrainConfig) and config.parts.llm.quantization is not None:
            memory += "\n  (all weights counted whole; the LLM's linear layers take about half a byte each in 4 bits)"
        sections.append(("Memory a process", memory))
        if isinstance(config, PretrainConfig):
            sections += _cost_sections(config, reports, stage, scale, device)
    return "\n\n".join(f"{title}\n{body}" for title, body in sections)


def count_parts(config: AnyConfig) -> list[PartReport]:
    """Build the model without weights and return what is trained in it.

    Args:
        config: The preset.

    Raises:
        ClocError: A checkpoint it starts from is not there.
    """
    with torch.device("meta"):
        model: nn.Module = encoder_skeleton(config) if isinstance(config, PretrainConfig) else _mllm(config)
        return apply_parts(model, config.parts, config.optim)[1]


def memory_table(
    reports: Sequence[PartReport], precision: str, world_size: int, stage: int | None, ema: bool = False
) -> str:
    """Return weights, gradients and optimiser state a process holds at each ZeRO stage, activations apart.

    Args:
        reports: Of every part.
        precision: `fp32` or `bf16`.
        world_size: Number of processes the states are shared over.
        stage: The preset's stage, marked in the table; ``None`` without DeepSpeed.
        ema: Whether the optimiser keeps an average of the weights too.
    """
    trained, total = trained_and_total(reports)
    lines = [f"  {'stage':<6} {'weights':>10} {'gradients':>10} {'optimiser':>10} {'sum':>10}   (activations apart)"]
    for number in range(4):
        if number == 0 and precision == "bf16":
            continue
        sizes = list(state_bytes(trained, total, precision, number, world_size, ema).values())
        mark = "  <- this preset" if number == stage or (stage is None and number == 0) else ""
        lines.append(f"  {number:<6} " + " ".join(f"{_size(value):>10}" for value in [*sizes, sum(sizes)]) + mark)
    return "\n".join(lines)


def _cost_sections(
    config: PretrainConfig, reports: Sequence[PartReport], stage: int | None, scale: Sequence[int], device: str
) -> list[tuple[str, str]]:
    """Return what an image costs, and what a step does on so many devices."""
    from cloc_mllm.training.planning.costs import image_cost

    cost = image_cost(config, lambda: encoder_skeleton(config))
    sections = [("An image, forward, and bytes kept for the backward pass", _cost_table(cost))]
    if scale:
        chosen, (trained, total) = DEVICES[device], trained_and_total(reports)
        estimates = [estimate(config, cost, trained, total, stage, count, chosen) for count in scale]
        reached = f"{chosen.utilisation:.0%} of {chosen.tflops:g} TFLOP/s reached"
        sections.append((f"On {chosen.name} ({reached}), a device", table(estimates)))
    return sections


def _cost_table(cost: ImageCost) -> str:
    lines = [f"  {part.name:<18} {part.flops / 1e9:>8.2f} GFLOP {_size(part.kept):>11}" for part in cost.parts]
    lines.append(f"  {'sum':<18} {cost.forward_flops / 1e9:>8.2f} GFLOP {_size(cost.kept):>11}")
    again = f", and {_size(cost.recomputed)} made anew at a time" if cost.recomputed else ""
    lines.append(f"  forward and backward {cost.step_flops / 1e9:.2f} GFLOP{again}")
    return "\n".join(lines)


def _batch_lines(config: AnyConfig, plan: BatchPlan) -> str:
    length = f"{config.run.steps:,} steps" if config.run.steps else f"{config.run.epochs:g} epochs"
    lines = [f"  {plan}", f"  {length}"]
    if config.run.steps:
        lines[-1] += f", {config.run.steps * config.run.batch_size:,} samples seen"
    if isinstance(config, PretrainConfig):
        cached = config.objective.grad_cache
        others = (plan.global_batch if cached else plan.micro_batch * plan.world_size) - 1
        how = "of the whole batch" if cached else "of its micro-batch: objective.grad_cache is off"
        lines.append(f"  every image is contrasted with {others:,} others, those {how}")
    return "\n".join(lines)


def encoder_skeleton(config: PretrainConfig) -> ClocModel:
    """Build the encoder a preset asks for without its weights, for counting; call it under the meta device.

    Args:
        config: The preset.
    """
    from cloc_mllm.training.pretraining.encoder import planned_config

    return ClocModel(planned_config(config))


def _mllm(config: AnyConfig) -> nn.Module:
    from cloc_mllm.training.tuning.mllm import mllm_skeleton

    assert not isinstance(config, PretrainConfig)
    return mllm_skeleton(config)


def _size(count: float) -> str:
    return f"{count / GIB:.2f} GiB" if count >= 0.1 * GIB else f"{count / 2**20:.2f} MiB"
