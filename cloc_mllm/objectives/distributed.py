"""Collectives the losses need: a ragged gather that carries gradient, and a plain sum.

Every loss of this package is *global*: each rank computes the value of the batch joined over all ranks. DDP and ZeRO
then average the parameters' gradients over ranks. The backward pass of :func:`gather_with_grad` sums over ranks, which
that average divides out again, so the gradients are those of one process holding the joined batch. No caller ever
multiplies by the number of ranks.

Without a process group, or with a single rank, every function here is the identity and communicates nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def world_size() -> int:
    """Return the number of ranks the losses run over; 1 where no process group has been initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum a tensor over all ranks, for counts and logging: no gradient flows.

    Args:
        x: Any shape, the same on every rank.

    Returns:
        A new tensor of the same shape and dtype, equal on every rank.
    """
    total = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def gather_with_grad(x: Tensor) -> Tensor:
    """Concatenate the rows of all ranks, in rank order, such that gradient flows back to the rank that owns each row.

    The number of rows may differ from rank to rank and may be 0. Every rank must call this, and, if any rank's rows
    need gradient, every rank must run the backward pass: both communicate. A rank whose own rows are constants while
    another rank's need gradient takes part in the backward pass all the same.

    Args:
        x: ``(n_rank, ...)``; trailing dimensions are the same on every rank.

    Returns:
        ``(sum of n_rank, ...)``, equal on every rank.

    Raises:
        ValueError: ``x`` has no row dimension, or the ranks' rows differ in size (raised on every rank alike).
    """
    if x.dim() == 0:
        raise ValueError("gather_with_grad needs a row dimension, got a 0-dimensional tensor")
    if world_size() == 1:
        return x
    counts, any_needs_grad = exchange_row_counts(x, x.requires_grad)
    if not any_needs_grad:
        return gather_rows(x, counts)
    if not x.requires_grad:
        # The other ranks will wait for this one in the backward pass, so this rank's result must be on a graph too.
        x = x.detach().requires_grad_()
    gathered: Tensor = _GatherRows.apply(x, counts)
    return gathered


def exchange_row_counts(x: Tensor, needs_grad: bool) -> tuple[list[int], bool]:
    """Tell the ranks of each other's rows; every rank must call this.

    Args:
        x: ``(n_rank, ...)``.
        needs_grad: Whether this rank will run a backward pass, if gradients are on.

    Returns:
        Every rank's number of rows, in rank order, and whether any rank will run a backward pass.

    Raises:
        ValueError: The ranks' rows differ in size (raised on every rank alike).
    """
    needs_grad = torch.is_grad_enabled() and needs_grad
    mine = torch.tensor([len(x), math.prod(x.shape[1:]), int(needs_grad)], dtype=torch.int64, device=x.device)
    everyone = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(everyone, mine)
    counts, row_sizes, flags = torch.stack(everyone).T.tolist()
    if len(set(row_sizes)) > 1:
        raise ValueError(f"ranks disagree on the number of values in a row: {row_sizes}, in rank order")
    return counts, any(flags)


def own_slice(counts: list[int]) -> slice:
    """Return where this rank's rows are among those of all ranks, from every rank's number of rows."""
    rank = dist.get_rank() if world_size() > 1 else 0
    start = sum(counts[:rank])
    return slice(start, start + counts[rank])


def gather_rows(x: Tensor, counts: list[int]) -> Tensor:
    """Concatenate the ragged rows of all ranks, without gradient; every rank must call this.

    Args:
        x: ``(n_rank, ...)``.
        counts: Every rank's number of rows.
    """
    if world_size() == 1:
        return x.detach()
    # Padded to the longest rank: backends gather equal shapes only.
    longest = max(counts)
    if longest == 0:
        return torch.empty_like(x)
    padded = x.new_zeros((longest, *x.shape[1:]))
    padded[: len(x)] = x
    blocks = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(blocks, padded)
    return torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)])


class _GatherRows(torch.autograd.Function):
    """Ragged gather forward; sum over ranks of the gradient, then this rank's slice of it, backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        return gather_rows(x, counts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Cloned: autograd may hand the same buffer to other consumers, and the reduction works in place.
        total = grad.clone(memory_format=torch.contiguous_format)
        if len(total):
            dist.all_reduce(total)
        return total[own_slice(ctx.counts)], None
