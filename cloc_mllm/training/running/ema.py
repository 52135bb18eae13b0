"""An exponential moving average of the trained weights, kept where the optimiser keeps its own state.

The average stands beside Adam's moments, in fp32, in the same shards. So it costs a process as much as one moment does,
every checkpoint holds it, every resume restores it exactly, and nothing has to be gathered while training: under plain
torch, DDP and all ZeRO stages, offloaded or not.

The decay is warmed up, min(decay, (1 + t) / (10 + t)) at step t: without that a short run's average would mostly be
what the weights were at its beginning. (TensorFlow's ExponentialMovingAverage does so when it is told the step.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cloc_mllm.errors import ClocError

STATE_KEY = "ema"


def base_optimizer(wrapped: Any) -> torch.optim.Optimizer:
    """Return the torch optimiser inside what accelerate and DeepSpeed have wrapped around it."""
    while hasattr(getattr(wrapped, "optimizer", None), "param_groups"):
        wrapped = wrapped.optimizer
    return wrapped


def decay_at(step: int, decay: float) -> float:
    """Return the decay at a step (from 1), warmed up; the average's first value is the first step's weights."""
    return 0.0 if step <= 1 else min(decay, (1 + step) / (10 + step))


def keep_average(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Average what an optimiser updates, from its next step on.

    Args:
        optimizer: AdamW over the weights, or over fp32 shards of them. Other hooks that change weights after a step
            have to be registered first.
        decay: Of the average; see :func:`decay_at`.
    """

    @torch.no_grad()
    def update(stepped: torch.optim.Optimizer, *_: Any) -> None:
        for group in stepped.param_groups:
            for parameter in group["params"]:
                # DeepSpeed steps one group at a time: the others have no gradient, and some no state yet.
                state = stepped.state.get(parameter, {})
                if parameter.grad is None or "step" not in state:
                    continue
                _update_one(parameter, state, decay)

    optimizer.register_step_post_hook(update)


def _update_one(parameter: torch.Tensor, state: dict[str, Any], decay: float) -> None:
    step = int(state["step"])
    average = state.get(STATE_KEY)
    if average is not None:
        average.lerp_(parameter.detach().to(average.dtype), 1 - decay_at(step, decay))
    elif step > 1:
        raise ClocError(
            f"optim.ema is on, but after step {step} there is no average of the steps before",
            remedy="Resume a run that was started with optim.ema, or turn it off.",
        )
    else:
        state[STATE_KEY] = parameter.detach().float().clone()


@contextmanager
def averaged_weights(optimizer: Any, engine: Any = None) -> Iterator[None]:
    """Let the model hold its averaged weights for a while; every process has to enter.

    Args:
        optimizer: The trainer's optimiser, wrapped or not.
        engine: DeepSpeed's engine, or ``None`` without DeepSpeed.

    Raises:
        ClocError: There is no average.
    """
    base = base_optimizer(optimizer)
    averaged = [(parameter, state[STATE_KEY]) for parameter, state in base.state.items() if STATE_KEY in state]
    if not averaged:
        raise ClocError("there is no average of the weights: not one step was made with optim.ema")
    _exchange(averaged, engine)
    try:
        yield
    finally:
        _exchange(averaged, engine)


@torch.no_grad()
def _exchange(averaged: list[tuple[torch.Tensor, torch.Tensor]], engine: Any) -> None:
    """Exchange weights and averages, and bring what the model computes with up to date."""
    for weight, average in averaged:
        kept = weight.detach().clone()
        weight.data.copy_(average)
        average.copy_(kept)
    sharded: Any = getattr(engine, "optimizer", None)
    if hasattr(sharded, "fp32_partitioned_groups_flat"):  # ZeRO-3
        for number in range(len(sharded.fp32_partitioned_groups_flat)):
            sharded._reassign_or_swap_out_partitioned_parameters(number)
        whole = sharded.persistent_parameters
        if whole:
            # Parameters too small to be sharded between steps keep a whole copy.
            whole[0].partition(whole)
            whole[0].all_gather(whole)
    elif hasattr(sharded, "update_lp_params"):  # ZeRO-1 and 2
        sharded.update_lp_params()
