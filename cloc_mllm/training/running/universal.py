"""A ZeRO checkpoint for another number of processes: DeepSpeed's universal checkpoint, made when it is needed.

Stages 1 to 3 save one shard a process, which only as many processes can read. The universal form holds each parameter
and its optimiser state whole. It is written beside the shards, in the checkpoint, and goes with it when it is pruned.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cloc_mllm.errors import ClocError

LATEST = "latest_universal"
_PARTIAL = ".universal"
_SMALL = 2**28
"""Bytes of shards up to which starting worker processes takes longer than the work."""


def needs_conversion(stage: int | None) -> bool:
    """Return whether checkpoints of a ZeRO stage are in shards; those of stage 0 and of plain torch are whole."""
    return stage in (1, 2, 3)


def convert(checkpoint: Path) -> None:
    """Write a checkpoint's universal form, unless it is there; one process does this.

    Args:
        checkpoint: A complete `checkpoint-N`.

    Raises:
        ClocError: It holds no shards, or its folder cannot be written.
    """
    if (checkpoint / LATEST).is_file():
        return
    latest = checkpoint / "latest"
    if not latest.is_file():
        raise ClocError("holds no shards of DeepSpeed", file=checkpoint)
    shards = checkpoint / latest.read_text(encoding="utf-8").strip()
    partial = checkpoint / _PARTIAL
    target = checkpoint / f"{shards.name}_universal"
    try:
        for old in (partial, target):
            shutil.rmtree(old, ignore_errors=True)
        partial.mkdir()
        _run_converter(shards, partial / target.name)
        (partial / target.name).rename(target)
        # Last, as DeepSpeed looks for it first: without it the rest does not count.
        (partial / LATEST).rename(checkpoint / LATEST)
        partial.rmdir()
    except OSError as error:
        raise ClocError(
            f"cannot be converted for another number of processes ({error.strerror})",
            file=checkpoint,
            remedy="The folder has to be writable and needs as much room again as it takes.",
        ) from error


def _run_converter(shards: Path, target: Path) -> None:
    """Call DeepSpeed's converter in this process, without what it prints."""
    from deepspeed.checkpoint import ds_to_universal

    size = sum(path.stat().st_size for path in shards.iterdir())
    workers = 1 if size < _SMALL else min(4, os.cpu_count() or 1)
    options = argparse.Namespace(
        input_folder=str(shards),
        output_folder=str(target),
        num_extract_workers=workers,
        num_merge_workers=min(2, workers),
        keep_temp_folder=False,
        strict=True,
        # Stages 1 and 2 lack a note on tensor parallelism, of which there is none.
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(options)


def load(engine: Any, checkpoint: Path, *, strict: bool) -> None:
    """Read the universal form into a new engine, around three faults of DeepSpeed's reader (found in 0.19.8).

    At stages 1 and 2 it fails on a process that holds nothing of a parameter group, as of two temperatures among many
    processes. At stage 3 it gives every group the settings of the first, so that weights decay which must not and each
    part learns at the first part's rate; and it hands all groups one counter of steps, which each of them then counts
    up, so that Adam's bias correction is wrong.

    Args:
        engine: DeepSpeed's, built with `checkpoint.load_universal` set.
        checkpoint: What :func:`convert` has been called for.
        strict: Whether every module weight has to be in the checkpoint.
    """
    from transformers.integrations.deepspeed import deepspeed_load_checkpoint

    zero: Any = engine.optimizer
    settings = [{k: v for k, v in group.items() if k != "params"} for group in zero.optimizer.param_groups]
    with _without_empty_groups(zero):
        deepspeed_load_checkpoint(engine, str(checkpoint), load_module_strict=strict)
    for group, own in zip(zero.optimizer.param_groups, settings, strict=True):
        group.update(own)
    for state in zero.optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


@contextlib.contextmanager
def _without_empty_groups(zero: Any) -> Iterator[None]:
    """Hide parameter groups of which this process holds nothing; there is nothing to be read for them."""
    if not hasattr(zero, "bit16_groups"):
        yield
        return
    groups, settings = zero.bit16_groups, zero.optimizer.param_groups
    holds = [any(parameter._hp_mapping is not None for parameter in group) for group in groups]
    try:
        zero.bit16_groups = list(itertools.compress(groups, holds))
        zero.optimizer.param_groups = list(itertools.compress(settings, holds))
        yield
    finally:
        zero.bit16_groups, zero.optimizer.param_groups = groups, settings


def set_rates(optimizer: Any, rates: list[float]) -> None:
    """Give each parameter group the learning rate it goes on with.

    Args:
        optimizer: After loading.
        rates: The restored scheduler's, group by group.
    """
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
