"""The contrastive losses in memory linear in the global batch: exact, tile by tile, each rank its own rows.

The plain form holds the ``(N, N)`` logits of the joined batch, several times over, on every rank. Here only the texts
are gathered. Each rank walks over its own rows against all texts, a tile at a time, and keeps two vectors: the
log-sum-exp of each of its rows, complete at once, and of each column, completed by an all-reduce. Backward walks over
the tiles again and forms both gradients from those vectors; the texts' is summed over ranks.

For the joined batch's N rows of width D on W ranks: memory O(N D + tile^2), 2 N^2 D / W multiplications forward and
4 N^2 D / W backward (twice the forward's with the text filter, which is one more product a tile), and one gather and
one all-reduce of N D numbers.
Sources: method in Chen et al., "Contrastive Localized Language-Image Pre-Training" (arXiv 2410.02746), section 3; the
sigmoid loss in Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (arXiv 2303.15343), equation 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from cloc_mllm.objectives.distributed import all_reduce_sum, exchange_row_counts, gather_rows, own_slice, world_size
from cloc_mllm.objectives.precision import without_autocast


@dataclass(frozen=True)
class Tiling:
    """How the logits are walked over.

    Attributes:
        size: Rows, and columns, of a tile.
        filter_threshold: Negative pairs whose texts have a larger cosine are left out; ``None`` keeps them all.
    """

    size: int
    filter_threshold: float | None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"tile_size must be at least 1, got {self.size}")


@dataclass(frozen=True)
class _Tile:
    """A block of the joined batch's cosines.

    Attributes:
        rows: Which of this rank's rows.
        columns: Which of all texts.
        cosines: ``(rows, columns)``.
        positives: Indices ``(k,)`` into rows and columns of the tile where a row meets its own text.
        dropped: ``(rows, columns)`` pairs that the text filter leaves out, or ``None`` without a filter.
    """

    rows: slice
    columns: slice
    cosines: Tensor
    positives: tuple[Tensor, Tensor]
    dropped: Tensor | None


def tiled_info_nce(rows: Tensor, texts: Tensor, scale: Tensor, tiling: Tiling) -> Tensor:
    """Symmetric InfoNCE over the joined batch of all ranks.

    Args:
        rows: ``(n, D)`` this rank's images or regions, L2-normalised, fp32 or fp64; n may differ and may be 0.
        texts: ``(n, D)`` their texts, of the same dtype.
        scale: 0-dimensional multiplier of the cosines.
        tiling: How to walk.

    Returns:
        A scalar, equal on every rank; 0 if no rank holds a row. Gradients are those of the plain form.
    """
    texts, counts = _meet(rows, texts, scale)
    if sum(counts) == 0:
        return rows.sum() + texts.sum() + 0.0 * scale
    loss: Tensor = _InfoNce.apply(rows, texts, scale, counts, tiling)
    return loss


def tiled_sigmoid(rows: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, tiling: Tiling) -> Tensor:
    """Sigmoid loss of every pair of the joined batch of all ranks, divided by its number of rows.

    Args:
        rows: ``(n, D)`` this rank's images or regions, L2-normalised, fp32 or fp64; n may differ and may be 0.
        texts: ``(n, D)`` their texts, of the same dtype.
        scale: 0-dimensional multiplier of the cosines.
        bias: 0-dimensional number added to every logit.
        tiling: How to walk.

    Returns:
        A scalar, equal on every rank; 0 if no rank holds a row. Gradients are those of the plain form.
    """
    texts, counts = _meet(rows, texts, scale, bias)
    if sum(counts) == 0:
        return rows.sum() + texts.sum() + 0.0 * (scale + bias)
    loss: Tensor = _Sigmoid.apply(rows, texts, scale, bias, counts, tiling)
    return loss


def _meet(rows: Tensor, texts: Tensor, *others: Tensor) -> tuple[Tensor, list[int]]:
    """Tell the ranks how many rows each holds; return texts that are on a graph if any rank's loss is to be on one."""
    if world_size() == 1:
        return texts, [len(rows)]
    needs_grad = any(x.requires_grad for x in (rows, texts, *others))
    counts, any_needs_grad = exchange_row_counts(texts, needs_grad)
    if any_needs_grad and not needs_grad:
        # The other ranks will wait for this one in the backward pass.
        texts = texts.detach().requires_grad_()
    return texts, counts


class _InfoNce(torch.autograd.Function):
    """Mean of the cross-entropies of rows over texts and of texts over rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, texts: Tensor, scale: Tensor, counts: list[int], tiling: Tiling) -> Tensor:
        with without_autocast(rows):
            everyone = gather_rows(texts, counts)
            by_row = rows.new_full((len(rows),), -torch.inf)
            by_column = rows.new_full((len(everyone),), -torch.inf)
            positive = rows.new_zeros(len(rows))
            for tile in _tiles(rows, everyone, counts, tiling):
                logits = _drop(scale * tile.cosines, tile.dropped)
                positive[tile.rows][tile.positives[0]] = logits[tile.positives]
                by_row[tile.rows] = torch.logaddexp(by_row[tile.rows], logits.logsumexp(dim=1))
                by_column[tile.columns] = torch.logaddexp(by_column[tile.columns], logits.logsumexp(dim=0))
            by_column = _log_sum_exp_over_ranks(by_column)
            # Every row and every column is counted by the rank that owns it. Subtracted before they are summed: in fp32
            # two large sums would leave little of a small difference.
            own = (by_row - positive) + (by_column[own_slice(counts)] - positive)
            loss = all_reduce_sum(own.sum()) / (2 * len(everyone))
        ctx.counts, ctx.tiling = counts, tiling
        ctx.save_for_backward(rows, everyone, scale, by_row, by_column)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, everyone, scale, by_row, by_column = ctx.saved_tensors
        weight = grad / (2 * len(everyone))

        def slope(tile: _Tile) -> Tensor:
            logits = _drop(scale * tile.cosines, tile.dropped)
            slopes = (logits - by_row[tile.rows, None]).exp_()
            slopes += logits.sub_(by_column[tile.columns]).exp_()
            slopes[tile.positives] -= 2
            return slopes.mul_(weight)

        to_rows, to_texts, to_scale, _ = _gradients(rows, everyone, scale, ctx.counts, ctx.tiling, slope)
        return to_rows, to_texts, to_scale, None, None


class _Sigmoid(torch.autograd.Function):
    """Sum over all pairs of ``-log sigmoid(z * logit)``, z = 1 for a row and its own text and -1 for others, over N."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, counts: list[int], tiling: Tiling
    ) -> Tensor:
        with without_autocast(rows):
            everyone = gather_rows(texts, counts)
            own = rows.new_zeros(())
            for tile in _tiles(rows, everyone, counts, tiling):
                logits = _drop(scale * tile.cosines + bias, tile.dropped)
                logits[tile.positives] *= -1
                own -= F.logsigmoid(-logits).sum()
            loss = all_reduce_sum(own) / len(everyone)
        ctx.counts, ctx.tiling = counts, tiling
        ctx.save_for_backward(rows, everyone, scale, bias)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, everyone, scale, bias = ctx.saved_tensors
        weight = grad / len(everyone)

        def slope(tile: _Tile) -> Tensor:
            slopes = _drop(scale * tile.cosines + bias, tile.dropped).sigmoid_()
            slopes[tile.positives] -= 1
            return slopes.mul_(weight)

        to_rows, to_texts, to_scale, to_bias = _gradients(rows, everyone, scale, ctx.counts, ctx.tiling, slope)
        return to_rows, to_texts, to_scale, to_bias, None, None


def _tiles(rows: Tensor, texts: Tensor, counts: list[int], tiling: Tiling) -> Iterator[_Tile]:
    """Walk over this rank's ``(n, D)`` rows against all ``(N, D)`` texts."""
    first = own_slice(counts).start
    for top in range(0, len(rows), tiling.size):
        mine = rows[top : top + tiling.size]
        my_texts = texts[first + top : first + top + len(mine)]
        for left in range(0, len(texts), tiling.size):
            theirs = texts[left : left + tiling.size]
            # Row k of the tile belongs to column k + shift, if the tile has one.
            shift = first + top - left
            low, high = max(0, -shift), min(len(mine), len(theirs) - shift)
            paired = torch.arange(low, max(low, high), device=rows.device)
            positives = (paired, paired + shift)
            dropped = None
            if tiling.filter_threshold is not None:
                dropped = same_meaning(my_texts, theirs, tiling.filter_threshold)
                dropped[positives] = False
            down, across = slice(top, top + len(mine)), slice(left, left + len(theirs))
            yield _Tile(down, across, mine @ theirs.T, positives, dropped)


def same_meaning(texts: Tensor, others: Tensor, threshold: float) -> Tensor:
    """``(n, D)`` and ``(m, D)`` texts: the ``(n, m)`` mask of those whose cosine is above the threshold."""
    # Normalised again: rows that were rounded to bf16 are off unit length by more than a threshold's last digit.
    return F.normalize(texts.detach(), dim=1) @ F.normalize(others.detach(), dim=1).T > threshold


@torch.no_grad()
def share_filtered(texts: Tensor, threshold: float, tile_size: int) -> Tensor:
    """Return the share of this rank's negative pairs that the text filter leaves out, for logging.

    Args:
        texts: ``(n, D)`` this rank's texts.
        threshold: The filter's.
        tile_size: Rows compared at a time.
    """
    texts = texts.float()
    count, hits = len(texts), torch.zeros((), device=texts.device)
    for part in texts.split(tile_size):
        hits += same_meaning(part, texts, threshold).sum()
    # Every text is its own twin, but for rounding.
    return (hits - count).clamp(min=0) / max(count * (count - 1), 1)


def _drop(logits: Tensor, dropped: Tensor | None) -> Tensor:
    """Take pairs out of a softmax's, or a sum of softplus's, reach; in place."""
    return logits if dropped is None else logits.masked_fill_(dropped, -torch.inf)


def _log_sum_exp_over_ranks(values: Tensor) -> Tensor:
    """Combine the ranks' log-sum-exps, element by element; -inf where a rank has nothing to add."""
    if world_size() == 1:
        return values
    largest = values.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest + all_reduce_sum((values - largest).exp()).log()


def _gradients(
    rows: Tensor, texts: Tensor, scale: Tensor, counts: list[int], tiling: Tiling, slope: Callable[[_Tile], Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Form the gradients from the loss's slopes with respect to each tile's logits.

    Like those of :func:`gather_with_grad`, the gradients of the embeddings are summed over ranks, that is, times their
    number where all have the same loss: DDP and ZeRO divide by it. A multiplier or bias is on every rank: its gradient
    is whole on each.

    Args:
        rows: ``(n, D)`` this rank's.
        texts: ``(N, D)`` of all ranks.
        scale: The multiplier of the cosines.
        counts: Every rank's number of rows.
        tiling: How to walk.
        slope: Takes a tile, gives ``(rows, columns)`` slopes; 0 where a pair was dropped.

    Returns:
        Gradients of this rank's ``(n, D)`` rows and ``(n, D)`` texts, of the multiplier, of a bias.
    """
    to_rows, to_texts = torch.zeros_like(rows), torch.zeros_like(texts)
    to_scale_and_bias = rows.new_zeros(2)
    with without_autocast(rows):
        for tile in _tiles(rows, texts, counts, tiling):
            slopes = slope(tile)
            to_rows[tile.rows].addmm_(slopes, texts[tile.columns])
            to_texts[tile.columns].addmm_(slopes.T, rows[tile.rows])
            to_scale_and_bias += torch.stack([torch.sum(slopes * tile.cosines), slopes.sum()])
    if world_size() > 1:
        dist.all_reduce(to_texts)
    gain = scale * world_size()
    to_scale, to_bias = all_reduce_sum(to_scale_and_bias)
    return to_rows * gain, to_texts[own_slice(counts)] * gain, to_scale, to_bias
