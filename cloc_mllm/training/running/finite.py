"""What is done when a number of a step is not finite: find the samples at fault, keep the batches, name them.

A NaN that reaches the weights cannot be taken back, and one that is skipped in silence comes again with its sample. So
the run stops, before the weights change or before they are saved, with the batches in a file and their samples by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cloc_mllm.training.running.stream import SampleName

SHOWN = 8
IMAGE_ROWS = ("image_embeds", "text_embeds")
REGION_ROWS = ("region_embeds", "region_text_embeds", "pred_boxes")


def broken_images(output: Any, inputs: Mapping[str, Any]) -> list[int]:
    """Return which images of a batch came out of the encoder with anything that is not finite.

    Args:
        output: A `ClocOutput` of ``B`` images.
        inputs: What it is of; `box_image_index` tells whose the regions are.

    Returns:
        Rows, 0 to ``B - 1``, of images whose own embedding, caption's, or a valid region's is not finite.
    """
    broken = torch.zeros(len(output.image_embeds), dtype=torch.bool, device=output.image_embeds.device)
    for name in IMAGE_ROWS:
        rows = getattr(output, name)
        # With a caption more than once, or several an image, rows are not images.
        if rows is not None and len(rows) == len(broken):
            broken |= ~torch.isfinite(rows.detach()).all(dim=1)
    for name in REGION_ROWS:
        rows = getattr(output, name)
        if rows is not None and "box_image_index" in inputs:
            bad = ~torch.isfinite(rows.detach()).all(dim=1) & inputs["region_valid"]
            broken[inputs["box_image_index"][bad]] = True
    return broken.nonzero()[:, 0].tolist()


def keep_batches(
    folder: Path, step: int, rank: int, batches: Sequence[Mapping[str, Any]], samples: Sequence[SampleName]
) -> Path:
    """Write a process's batches of a step, for `torch.load(…)`.

    Args:
        folder: The run folder.
        step: The step that could not be done, counted from 1.
        rank: The process.
        batches: Its micro-batches.
        samples: What they are of, in order.

    Returns:
        The file: a dictionary with `batches` and `samples` (number, file, name of each).
    """
    path = folder / f"not-finite-step{step}-process{rank}.pt"
    named = [(sample.index, sample.file, sample.name) for sample in samples]
    torch.save({"batches": [dict(batch) for batch in batches], "samples": named}, path)
    return path


def listed(samples: Sequence[SampleName], total: int | None = None) -> str:
    """Return the names of samples, the first few if there are many.

    Args:
        samples: The names; at least the first few.
        total: How many there are; ``None``: those given.
    """
    more = (len(samples) if total is None else total) - len(samples[:SHOWN])
    return ", ".join(map(str, samples[:SHOWN])) + (f" and {more} more" if more else "")


def gather_names(mine: list[SampleName]) -> list[SampleName]:
    """Return the names that all processes have, in order of the processes; every process has to call this."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return mine
    everyone: list[list[SampleName] | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    return [name for names in everyone for name in names or []]


def is_broken_norm(norm: torch.Tensor | float | None) -> bool:
    """Return whether a gradient's norm is not finite; DeepSpeed writes -1 for one that is not."""
    if norm is None:
        return False
    value = float(norm)
    return not 0 <= value < float("inf")


def weights_are_finite(model: nn.Module) -> bool:
    """Return whether all trained weights, or what this process holds of them, are finite, on every process alike."""
    parts = [getattr(p, "ds_tensor", p).detach() for p in model.parameters() if p.requires_grad]
    parts = [part for part in parts if part.numel()]
    bad = torch.zeros((), device=parts[0].device) if parts else torch.zeros(())
    for part in parts:
        bad += (~torch.isfinite(part)).any()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(bad)
    return not bool(bad)
