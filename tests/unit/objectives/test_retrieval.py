"""Rank-1 retrieval, against a loop over all pairs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloc_mllm.objectives import retrieval
from cloc_mllm.objectives.retrieval import shared_top1, top1_hits


def by_hand(queries: torch.Tensor, gallery: torch.Tensor, labels: list[int], names: list[int]) -> list[bool]:
    hits = []
    for query, label in zip(queries, labels, strict=True):
        scores = [float(query @ entry) for entry in gallery]
        right = [score for score, name in zip(scores, names, strict=True) if name == label]
        wrong = [score for score, name in zip(scores, names, strict=True) if name != label]
        hits.append(bool(right) and max(right) > max(wrong, default=float("-inf")))
    return hits


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9), st.integers(0, 9), st.integers(1, 4), st.integers(0, 10**6), st.sampled_from([1, 7, 1 << 20]))
def test_hits_are_those_of_a_loop(rows: int, columns: int, classes: int, seed: int, entries: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    # Small whole numbers: ties are common, and sums exact.
    queries, gallery = (torch.randint(-1, 2, (n, 3), generator=rng).float() for n in (rows, columns))
    labels, names = (torch.randint(classes, (n,), generator=rng) for n in (rows, columns))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "_ENTRIES", entries)
        hits = top1_hits(queries, gallery, labels, names).tolist()
        assert hits == by_hand(queries, gallery, labels.tolist(), names.tolist())
        share, mean = shared_top1(queries, gallery, labels, names)
    if rows:
        assert share == pytest.approx(sum(hits) / rows)
        pairs = list(zip(hits, labels.tolist(), strict=True))
        of_class = [[hit for hit, label in pairs if label == wanted] for wanted in set(labels.tolist())]
        assert mean == pytest.approx(sum(sum(c) / len(c) for c in of_class) / len(of_class))
    else:
        assert (share, mean) == (0.0, 0.0)


def test_embeddings_that_are_all_alike_score_nothing() -> None:
    same, labels = torch.ones(4, 2), torch.arange(4)
    assert shared_top1(same, same, labels, labels) == (0.0, 0.0)
    assert not top1_hits(torch.full((1, 2), torch.nan), torch.eye(2), labels[:1], labels[:2]).any()
