"""Sequence packing: several conversations in one row of a batch, each of which sees itself alone.

A packed batch has no `attention_mask`. Its `position_ids` start at 0 again with each conversation, and from that
transformers' attention makes a mask of blocks along the diagonal (`masking_utils.find_packed_sequence_indices`; the
variable-length kernels of flash attention read the same). What fills up a row is a block of its own.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch

from .chat_template import IGNORED


def pack_rows(lengths: Sequence[int], capacity: int | None = None) -> list[list[int]]:
    """Deal sequences out to rows, so that rows times the longest row, the places to compute, are few.

    First-fit decreasing says how many rows it takes. From that number on, the longest sequence always goes to the
    emptiest row, which makes rows alike; the number whose rows need the fewest places is taken. (With three quarters
    of a row filled by each pair of sequences, a row more, less wide, is less to compute.)

    Args:
        lengths: Tokens of each sequence.
        capacity: Most tokens of a row; ``None``: the longest sequence's. A longer sequence has a row of its own.

    Returns:
        The numbers of the sequences in each row, ascending, rows in order of their first one.

    Raises:
        ValueError: There is no sequence, or one of them is empty.
    """
    if not lengths or min(lengths) < 1:
        raise ValueError("packing needs at least one sequence, and each needs at least one token")
    limit = max(capacity or 0, max(lengths))
    order = sorted(range(len(lengths)), key=lambda k: -lengths[k])
    rows: list[list[int]] = []
    filled: list[int] = []
    for k in order:
        place = next((r for r, used in enumerate(filled) if used + lengths[k] <= limit), None)
        if place is None:
            rows.append([])
            filled.append(0)
            place = -1
        rows[place].append(k)
        filled[place] += lengths[k]
    best, places = rows, len(rows) * max(filled)
    for count in range(len(rows), len(lengths) + 1):
        level, width = _level_rows(lengths, order, count)
        if width <= limit and count * width < places:
            best, places = level, count * width
    return sorted(sorted(row) for row in best)


def _level_rows(lengths: Sequence[int], order: Sequence[int], count: int) -> tuple[list[list[int]], int]:
    """Return `count` rows, each sequence in the emptiest one when its turn comes, and the longest row's tokens."""
    rows: list[list[int]] = [[] for _ in range(count)]
    emptiest = [(0, r) for r in range(count)]
    for k in order:
        used, r = heapq.heappop(emptiest)
        rows[r].append(k)
        heapq.heappush(emptiest, (used + lengths[k], r))
    return rows, max(used for used, _ in emptiest)


def packed_tensors(
    ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], rows: Sequence[Sequence[int]], pad_id: int
) -> dict[str, torch.Tensor]:
    """Lay sequences one after another.

    Args:
        ids: Tokens of each sequence.
        labels: Their labels, -100 where nothing is learnt.
        rows: Which sequences are in which row, as :func:`pack_rows` returns.
        pad_id: What a row is filled up with.

    Returns:
        `input_ids`, `labels` and `position_ids`, each ``(rows, longest row)``. No first token of a sequence is
        learnt: it would be predicted from the last one of its neighbour.
    """
    width = max(sum(len(ids[k]) for k in row) for row in rows)
    shape = (len(rows), width)
    tokens = torch.full(shape, pad_id)
    learnt = torch.full(shape, IGNORED)
    positions = torch.zeros(shape, dtype=torch.long)
    for r, row in enumerate(rows):
        start = 0
        for k in row:
            end = start + len(ids[k])
            tokens[r, start:end] = torch.tensor(ids[k])
            learnt[r, start + 1 : end] = torch.tensor(labels[k][1:], dtype=torch.long)
            positions[r, start:end] = torch.arange(end - start)
            start = end
        positions[r, start:] = torch.arange(width - start)
    return {"input_ids": tokens, "labels": learnt, "position_ids": positions}


def sequence_numbers(position_ids: torch.Tensor) -> torch.Tensor:
    """Return which sequence of its row each token belongs to.

    Args:
        position_ids: ``(B, T)`` of a packed batch.

    Returns:
        ``(B, T)``, counted from 0 in each row; a filling is a sequence too.
    """
    return (torch.diff(position_ids, dim=1, prepend=position_ids[:, :1] - 1) != 1).cumsum(1)
