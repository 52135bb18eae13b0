"""What a set of labels looks like, in numbers: added up sample by sample and shard by shard, in constant memory."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping
from typing import Any

from cloc_mllm.data.readers import Sample

MAX_PHRASES = 100_000
"""Distinct phrases that are counted; the rarest go when there are more."""

EDGES: dict[str, tuple[float, ...]] = {
    "regions an image": (0, 1, 2, 3, 5, 8, 12, 20, 50),
    "words a region": (1, 2, 3, 4, 5, 6, 8, 12),
    "words a caption": (1, 5, 10, 15, 20, 30, 50, 100, 200),
    "score": (0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    "share of the image": (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95),
}
"""Lower edges of the bins of each histogram; the last bin is open."""


class LabelStatistics:
    """Histograms, means and the most frequent phrases of labelled samples."""

    def __init__(self) -> None:
        self.histograms = {name: [0] * len(edges) for name, edges in EDGES.items()}
        self.sums: Counter[str] = Counter()
        self.phrases: Counter[str] = Counter()
        self.forgotten = 0

    def add(self, sample: Sample) -> None:
        """Count one region-text sample, with `width` and `height`."""
        regions = sample["regions"]
        self._count("regions an image", len(regions))
        self._count("words a caption", len(str(sample["caption"]).split()))
        area = sample["width"] * sample["height"]
        for region in regions:
            x1, y1, x2, y2 = region["box"]
            self._count("words a region", len(region["text"].split()))
            self._count("share of the image", (x2 - x1) * (y2 - y1) / area)
            if region.get("score") is not None:
                self._count("score", region["score"])
            self.phrases[region["text"].casefold()] += 1
        self._forget()

    def _count(self, name: str, value: float) -> None:
        self.histograms[name][max(0, bisect_right(EDGES[name], value) - 1)] += 1
        self.sums[name] += value  # type: ignore[assignment]

    def _forget(self) -> None:
        """Drop the rarest phrases once there are half as many again as may stay: an amortised sort."""
        if len(self.phrases) > 1.5 * MAX_PHRASES:
            self.forgotten += len(self.phrases) - MAX_PHRASES
            self.phrases = Counter(dict(self.phrases.most_common(MAX_PHRASES)))

    def merge(self, other: Mapping[str, Any]) -> None:
        """Add what `to_dict` of another returned."""
        for name, bins in other["histograms"].items():
            self.histograms[name] = [a + b for a, b in zip(self.histograms[name], bins, strict=True)]
        self.sums.update(other["sums"])
        self.phrases.update(other["phrases"])
        self.forgotten += other["forgotten"]
        self._forget()

    def to_dict(self) -> dict[str, Any]:
        """All of it, as plain data that `merge` takes."""
        sums = {name: round(value, 6) for name, value in self.sums.items()}
        ordered = sorted(self.phrases.items(), key=lambda item: (-item[1], item[0]))
        return {
            "histograms": self.histograms,
            "sums": sums,
            "phrases": dict(ordered[:MAX_PHRASES]),
            "forgotten": self.forgotten,
        }

    def summary(self, phrases: int = 30) -> dict[str, Any]:
        """What a reader wants to know: means, histograms by the names of their bins, the most frequent phrases."""
        means, tables = {}, {}
        for name, bins in self.histograms.items():
            total = sum(bins)
            means[name] = round(self.sums[name] / total, 4) if total else None
            tables[name] = dict(zip(_bin_names(EDGES[name]), bins, strict=True))
        ordered = sorted(self.phrases.items(), key=lambda item: (-item[1], item[0]))
        return {
            "means": means,
            "histograms": tables,
            "top_phrases": dict(ordered[:phrases]),
            "distinct_phrases": len(self.phrases),
            "phrases_no_longer_counted": self.forgotten,
        }


def _bin_names(edges: tuple[float, ...]) -> list[str]:
    """`0`, `3-4`, `0.1-0.15`, `50+`: whole edges are of whole numbers."""
    names = []
    for low, high in zip(edges, [*edges[1:], None], strict=True):
        if high is None:
            names.append(f"{low:g}+")
        elif all(float(edge).is_integer() for edge in edges):
            names.append(f"{low:g}" if high == low + 1 else f"{low:g}-{high - 1:g}")
        else:
            names.append(f"{low:g}-{high:g}")
    return names
