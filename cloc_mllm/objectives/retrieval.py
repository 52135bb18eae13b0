"""Retrieval and classification at rank 1, over all processes, without ever holding all similarities.

Ties count against the model: embeddings that are all alike score 0, not 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cloc_mllm.objectives.distributed import all_reduce_sum, world_size

_ENTRIES = 1 << 22
"""Similarities held at a time."""


@torch.no_grad()
def top1_hits(queries: Tensor, gallery: Tensor, query_labels: Tensor, gallery_labels: Tensor) -> Tensor:
    """Return for each query whether what scores highest has its label.

    Args:
        queries: ``(N, D)``.
        gallery: ``(M, D)``.
        query_labels: ``(N,)`` integers.
        gallery_labels: ``(M,)`` integers; several entries may have one label, and each of them is right.

    Returns:
        ``(N,)`` booleans. A wrong entry that scores as high as the best right one is a miss, and so is a score that is
        not a number.
    """
    hits = torch.zeros(len(queries), dtype=torch.bool, device=queries.device)
    if not len(gallery):
        return hits
    rows = max(1, _ENTRIES // len(gallery))
    for start in range(0, len(queries), rows):
        part = slice(start, start + rows)
        similarity = queries[part].float() @ gallery.float().T
        right = query_labels[part, None] == gallery_labels
        best_right = similarity.masked_fill(~right, -torch.inf).amax(dim=1)
        best_wrong = similarity.masked_fill(right, -torch.inf).amax(dim=1)
        hits[part] = best_right > best_wrong
    return hits


@torch.no_grad()
def shared_top1(queries: Tensor, gallery: Tensor, query_labels: Tensor, gallery_labels: Tensor) -> tuple[float, float]:
    """Return the share of hits of :func:`top1_hits`, and its mean over the queries' labels; all ranks share the work.

    Args:
        queries: ``(N, D)``, equal on every rank, as are the other arguments.
        gallery: ``(M, D)``.
        query_labels: ``(N,)``.
        gallery_labels: ``(M,)``.

    Returns:
        Both 0 where there is no query.
    """
    if not len(queries):
        return 0.0, 0.0
    rank = torch.distributed.get_rank() if world_size() > 1 else 0
    mine = slice(rank, None, world_size())
    labels, classes = query_labels.unique(return_inverse=True)
    hits = top1_hits(queries[mine], gallery, query_labels[mine], gallery_labels)
    found = all_reduce_sum(torch.bincount(classes[mine], weights=hits.double(), minlength=len(labels)))
    counts = torch.bincount(classes, minlength=len(labels))
    return float(found.sum() / counts.sum()), float((found / counts).mean())
