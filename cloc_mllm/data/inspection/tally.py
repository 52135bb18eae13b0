"""Statistics of samples that add up over parts of a data set, in whatever number of processes they are taken."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from cloc_mllm.data.dataset import unique_regions
from cloc_mllm.data.inspection.faults import RegionView, SampleView, regions_of
from cloc_mllm.data.inspection.pictures import digest
from cloc_mllm.data.inspection.texts import CAPTIONS, FLAWS, REGION_TEXTS, TextTally, texts_of, token_counts
from cloc_mllm.data.schema import Size, box_problems, region_text_problems

SMALL, MEDIUM = 32**2, 96**2
"""COCO's limits between small, medium and large, in square pixels (pycocotools, `Params.areaRng`)."""
SHARE_EDGES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.95)
ASPECT_EDGES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
EXAMPLES = 20
"""Examples kept of each notice."""

_SCORE_BINS = 20


@dataclass(frozen=True)
class Place:
    """Where a sample stands: its number over the whole set, its file, and what to call it there."""

    number: int
    file: str | None
    name: str


@dataclass
class Notice:
    """Something odd that is no fault: how often, and the first ones, each with file, sample and detail."""

    count: int = 0
    examples: list[tuple[str | None, str, str]] = field(default_factory=list)

    def add(self, place: Place, detail: str = "") -> None:
        """Count one."""
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append((place.file, place.name, detail))

    def merge(self, other: Notice) -> None:
        """Add those of another part of the set, which comes after this one."""
        self.count += other.count
        self.examples += other.examples[: EXAMPLES - len(self.examples)]


@dataclass(frozen=True)
class TallyOptions:
    """What is counted.

    Attributes:
        tokenizer: Counts tokens; None counts characters and words only.
        limit: Tokens that a caption or region text may have.
        conversation_limit: Tokens that a whole conversation may have; None for no limit.
        min_words: Texts with fewer words are not remembered, so neither their repetition nor their leaks are known.
    """

    tokenizer: Any = None
    limit: int = 77
    conversation_limit: int | None = None
    min_words: int = 1

    def limit_of(self, group: str) -> int | None:
        """The limit of a group of texts."""
        if group in (CAPTIONS, REGION_TEXTS):
            return self.limit
        return self.conversation_limit if group == "conversations" else None


@dataclass
class Tally:
    """Counts of samples, their texts and regions.

    Attributes:
        kinds: Samples of each kind.
        tasks: Samples of each `task`.
        sources: Samples of each `source`.
        texts: By group, see `texts.GROUPS`.
        images: Samples with each number of images.
        turns: Conversations with each number of turns.
        regions: Samples with each number of regions.
        forms: Regions of each form and role.
        areas: Boxes that are "small", "medium" and "large" by COCO's limits on the box's area.
        shares: Boxes in each interval of `SHARE_EDGES`: their part of the picture's area.
        aspects: Boxes in each interval of `ASPECT_EDGES`: width by height.
        unmeasured: Boxes with a fault, or of a picture that could not be read.
        unique: Region texts that name their region of the image only, and region texts judged.
        scores: Scores in 20 equal parts of 0 to 1, out of it in -1 and 20.
        score_sums: Number, sum, least and most of the scores.
        notices: By what is odd.
        without_id: Samples without an id.
        ids: 128-bit hash of kind and id of every sample that has one, two numbers each.
        id_samples: The number of that sample.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    tasks: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    texts: dict[str, TextTally] = field(default_factory=dict)
    images: Counter[int] = field(default_factory=Counter)
    turns: Counter[int] = field(default_factory=Counter)
    regions: Counter[int] = field(default_factory=Counter)
    forms: Counter[str] = field(default_factory=Counter)
    areas: Counter[str] = field(default_factory=Counter)
    shares: Counter[int] = field(default_factory=Counter)
    aspects: Counter[int] = field(default_factory=Counter)
    unmeasured: int = 0
    unique: Counter[str] = field(default_factory=Counter)
    scores: Counter[int] = field(default_factory=Counter)
    score_sums: list[float] = field(default_factory=lambda: [0.0, 0.0, math.inf, -math.inf])
    notices: dict[str, Notice] = field(default_factory=dict)
    without_id: int = 0
    ids: array[int] = field(default_factory=lambda: array("Q"))
    id_samples: array[int] = field(default_factory=lambda: array("q"))

    def notice(self, kind: str, place: Place, detail: str = "") -> None:
        """Count something odd."""
        self.notices.setdefault(kind, Notice()).add(place, detail)

    def add(self, view: SampleView, sizes: Sequence[Size | None], place: Place, options: TallyOptions) -> None:
        """Count a sample.

        Args:
            view: The sample.
            sizes: Width and height of its images, None where one could not be read.
            place: Where it stands.
            options: What is counted.
        """
        sample = view.sample
        self.kinds[view.kind] += 1
        for name, counter in (("task", self.tasks), ("source", self.sources)):
            if isinstance(sample.get(name), str):
                counter[sample[name]] += 1
        if sample.get("id") in (None, ""):
            self.without_id += 1
        else:
            self.ids.extend(digest(f"{view.kind}\0{sample['id']}".encode("utf-8", "surrogatepass")))
            self.id_samples.append(place.number)
        self.images[len(view.images)] += 1
        if view.messages:
            self.turns[sum(_role(message) in ("user", "assistant") for message in view.messages)] += 1
        for image in view.images:
            self._add_path(image, place)
        self._add_regions(view, sizes, place)
        self._add_texts(view, place, options)

    def _add_path(self, image: Any, place: Place) -> None:
        if not isinstance(image, str) or "://" in image:
            return
        path = PurePath(image)
        if path.is_absolute():
            self.notice("the path of the picture is absolute: the folder cannot be moved", place, image)
        elif ".." in path.parts:
            self.notice("the path of the picture leaves the folder of the file", place, image)

    def _add_regions(self, view: SampleView, sizes: Sequence[Size | None], place: Place) -> None:
        regions = list(regions_of(view))
        self.regions[len(regions)] += 1
        seen = set()
        for region in regions:
            self.forms[f"{region.form}, {region.role}"] += 1
            if region.form != "box":
                continue
            size = sizes[region.image] if 0 <= region.image < len(sizes) else None
            if size is None or next(box_problems(region.shape, size), None) is not None:
                self.unmeasured += 1
                continue
            self._add_box(region, size)
            key = (region.image, region.role, *region.shape, region.text)
            if region.role == "labelled" and key in seen:
                self.notice("a region stands in the sample twice, with the same box and text", place, str(region.text))
            seen.add(key)
        if view.kind == "region-text" and regions and next(region_text_problems(view.sample, None), None) is None:
            alone = unique_regions(view.sample["regions"])
            self.unique.update(unique=sum(alone), judged=len(alone))

    def _add_box(self, region: RegionView, size: Size) -> None:
        x1, y1, x2, y2 = region.shape
        area = (x2 - x1) * (y2 - y1)
        self.areas["small" if area < SMALL else "medium" if area < MEDIUM else "large"] += 1
        self.shares[_interval(area / (size[0] * size[1]), SHARE_EDGES)] += 1
        self.aspects[_interval((x2 - x1) / (y2 - y1), ASPECT_EDGES)] += 1
        score = region.score
        if isinstance(score, (int, float)) and not isinstance(score, bool) and math.isfinite(score):
            inside = min(int(score * _SCORE_BINS), _SCORE_BINS - 1) if 0 <= score <= 1 else None
            self.scores[(-1 if score < 0 else _SCORE_BINS) if inside is None else inside] += 1
            number, total, least, most = self.score_sums
            self.score_sums = [number + 1, total + score, min(least, score), max(most, score)]

    def _add_texts(self, view: SampleView, place: Place, options: TallyOptions) -> None:
        texts = list(texts_of(view))
        for group, text in texts:
            long_enough = options.min_words <= 1 or len(text.split()) >= options.min_words
            keyed = long_enough and group != "conversations"
            flaws = self.texts.setdefault(group, TextTally()).add(text, place.number, keyed)
            for flaw in flaws if group != "conversations" else ():  # its turns have been judged one by one
                self.notice(f"a text {FLAWS[flaw]}", place, f"{group}: {_shortened(text)}")
        if options.tokenizer is None:
            return
        said = [(group, text) for group, text in texts if text.strip()]
        for (group, text), tokens in zip(said, token_counts(options.tokenizer, [t for _, t in said]), strict=True):
            self.texts[group].tokens[tokens] += 1
            limit = options.limit_of(group)
            if limit is not None and tokens > limit:
                kind = f"a text of more than {limit} tokens ({group}): the rest is cut off"
                self.notice(kind, place, f"{tokens} tokens: {_shortened(text)}")

    def merge(self, other: Tally) -> None:
        """Add the counts of another part of the set, which comes after this one."""
        for name in ("kinds", "tasks", "sources", "images", "turns", "regions", "forms", "areas", "shares", "aspects"):
            getattr(self, name).update(getattr(other, name))
        self.unique.update(other.unique)
        self.scores.update(other.scores)
        (n, total, least, most), (n2, total2, least2, most2) = self.score_sums, other.score_sums
        self.score_sums = [n + n2, total + total2, min(least, least2), max(most, most2)]
        self.unmeasured += other.unmeasured
        self.without_id += other.without_id
        self.ids.extend(other.ids)
        self.id_samples.extend(other.id_samples)
        for group, texts in other.texts.items():
            self.texts.setdefault(group, TextTally()).merge(texts)
        for kind, notice in other.notices.items():
            self.notices.setdefault(kind, Notice()).merge(notice)


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


def _interval(value: float, edges: Sequence[float]) -> int:
    """The number of the interval that a value is in: from each edge up to, not including, the next."""
    return sum(value >= edge for edge in edges)


def _shortened(text: str, length: int = 120) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
