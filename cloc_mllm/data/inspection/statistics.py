"""`cloc-mllm data stats`: what a data set holds, what is wrong with it and what is odd, as plain data."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cloc_mllm.data.inspection.check import CheckReport, report_of
from cloc_mllm.data.inspection.duplicates import equal_groups, near_groups, require_distance
from cloc_mllm.data.inspection.faults import SampleView
from cloc_mllm.data.inspection.pictures import PictureTable
from cloc_mllm.data.inspection.scan import Scan, ScanOptions, scan
from cloc_mllm.data.inspection.tally import ASPECT_EDGES, EXAMPLES, SHARE_EDGES, Notice, Tally, TallyOptions
from cloc_mllm.data.inspection.texts import (
    GROUPS,
    TextTally,
    histogram_summary,
    matching_texts,
    normalized,
    over,
)
from cloc_mllm.errors import ClocError

DEFAULT_DISTANCE = 4
DEFAULT_LIMIT = 77
TOP_TEXTS = 20
LISTED_GROUPS = 100
"""Groups of duplicates that a report names; all are counted."""

_LISTED_PICTURES = 8


@dataclass(frozen=True)
class Inspection:
    """What an inspection found.

    Attributes:
        faults: What breaks the schema.
        statistics: All else, as plain data; `docs/data-inspection.md` has the keys.
        scan: The files and pictures it was found in.
    """

    faults: CheckReport
    statistics: dict[str, Any]
    scan: Scan

    def to_dict(self) -> dict[str, Any]:
        """Faults and statistics as plain data."""
        return {**self.faults.to_dict(), **self.statistics}


def inspect_data(
    path: str | Path,
    *,
    tokenizer: Any = None,
    limit: int | None = None,
    distance: int = DEFAULT_DISTANCE,
    workers: int = 1,
    progress: bool = True,
) -> Inspection:
    """Look at every sample and picture of a data set once, and describe it.

    Args:
        path: A file of samples, a folder of such files, a folder of splits, or a pattern.
        tokenizer: Counts tokens, special ones included; None counts characters and words only.
        limit: Tokens that a text may have; None for 77 for captions and region texts, and no limit for conversations.
        distance: In how many of 64 bits the perceptual hashes of two pictures that look the same may differ.
        workers: Processes; the result is the same for any number.
        progress: Show progress bars, if standard error is a terminal.

    Raises:
        ClocError: There is nothing at `path`, or an option makes no sense.
    """
    require_distance(distance)
    if limit is not None and limit < 1:
        raise ClocError(f"a limit of {limit} tokens", remedy="Give a positive number.")
    options = TallyOptions(tokenizer, DEFAULT_LIMIT if limit is None else limit, limit)
    found = scan(path, ScanOptions(options, workers, progress))
    faults = report_of(found)
    tally = found.tally
    assert tally is not None, "it was asked for"
    duplicates = _duplicates(found, distance)
    _notice_ids(found, tally)
    statistics = {
        "path": str(path),
        "fault_kinds": fault_kinds(faults.faults),
        "notices": notices_of(tally.notices),
        "kinds": _by_number(tally.kinds),
        "tasks": _by_number(tally.tasks),
        "sources": _by_number(tally.sources),
        "samples_without_id": tally.without_id,
        "images_per_sample": _histogram(tally.images),
        "turns_per_conversation": _histogram(tally.turns),
        "pictures": _pictures(found),
        "duplicates": duplicates,
        "regions": _regions(tally),
        "texts": {group: _texts(found, group, options) for group in GROUPS if group in tally.texts},
    }
    return Inspection(faults, statistics, found)


def fault_kinds(faults: Sequence[ClocError]) -> list[dict[str, Any]]:
    """Faults that read the same but for names and numbers, counted together, most frequent first."""
    counts: Counter[str] = Counter()
    first: dict[str, ClocError] = {}
    for fault in faults:
        kind = fault_kind(fault.problem)
        counts[kind] += 1
        first.setdefault(kind, fault)
    kinds = sorted(counts, key=lambda kind: (-counts[kind], kind))
    return [
        {"kind": kind, "count": counts[kind], "remedy": first[kind].remedy, "first": str(first[kind])} for kind in kinds
    ]


def fault_kind(problem: str) -> str:
    """What a problem is apart from the names and numbers in it."""
    text = re.sub(r"'(?:[^'\\]|\\.)*'|\"[^\"]*\"", "'…'", problem)
    text = re.sub(r"\[[^\[\]]*\]", "[…]", text)
    return re.sub(r"(?<![A-Za-z])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?", "N", text)


def notices_of(notices: dict[str, Notice]) -> list[dict[str, Any]]:
    """What is odd without being a fault, most frequent first, with the first examples."""
    ordered = sorted(notices.items(), key=lambda item: (-item[1].count, item[0]))
    return [
        {
            "kind": kind,
            "count": notice.count,
            "examples": [{"file": file, "sample": name, "detail": detail} for file, name, detail in notice.examples],
        }
        for kind, notice in ordered
    ]


def _notice_ids(found: Scan, tally: Tally) -> None:
    """Notice ids that several samples of a kind have; and where all are region-text samples, pictures of several."""
    ids = np.array(tally.ids, np.uint64).reshape(-1, 2)
    samples = np.array(tally.id_samples, np.int64)
    for group in equal_groups(ids):
        numbers = samples[group]
        files = [found.files.file_of(int(number)) for number in numbers]
        for k in range(1, len(numbers)):
            kind = _SAME_ID if files[k] in files[:k] else _SAME_ID_ELSEWHERE
            _notice_pair(found, tally, kind, int(numbers[k]), int(numbers[0]))
    if set(tally.kinds) == {"region-text"}:
        uses = found.uses[np.argsort(found.uses[:, 1], kind="stable")]
        for k in np.flatnonzero(uses[1:, 1] == uses[:-1, 1]).tolist():
            _notice_pair(found, tally, _SAME_PICTURE, int(uses[k + 1, 0]), int(uses[k, 0]))


def _notice_pair(found: Scan, tally: Tally, kind: str, number: int, earlier: int) -> None:
    """Notice a sample because of an earlier one; what both are called is looked up only where it is shown."""
    notice = tally.notices.setdefault(kind, Notice())
    if notice.count < EXAMPLES:
        before = found.files.place(earlier)
        shown = f"{before.file}: sample '{before.name}'" if before.file else f"sample '{before.name}'"
        notice.add(found.files.place(number), f"as {shown}")
    else:
        notice.count += 1


_SAME_ID = "an id that another sample of its file has"
_SAME_ID_ELSEWHERE = "an id that a sample of the same kind in another file has"
_SAME_PICTURE = "a picture that another sample names"


def _by_number(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _histogram(histogram: Counter[int]) -> dict[str, Any]:
    return {**histogram_summary(histogram), "histogram": {str(k): histogram[k] for k in sorted(histogram)}}


# -- pictures ---------------------------------------------------------------------------------------------------------


def _pictures(found: Scan) -> dict[str, Any]:
    table = found.pictures
    sound = table.sound
    width, height = table.column("width")[sound], table.column("height")[sound]
    formats = np.bincount(table.column("format")[sound], minlength=len(table.formats))
    sizes = Counter(zip(width.tolist(), height.tolist(), strict=True))
    common = sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:10]
    return {
        "count": len(table),
        "unreadable": len(table.problems),
        "flat": int(table.column("flat")[sound].sum()),
        "named": len(found.uses),
        "formats": _by_number(
            Counter({n or "unknown": int(k) for n, k in zip(table.formats, formats, strict=True) if k})
        ),
        "width": _summary(width),
        "height": _summary(height),
        "megapixels": _summary(width.astype(np.float64) * height / 1e6),
        "aspect": _summary(width / np.maximum(height, 1)),
        "bytes": _summary(table.column("length")[sound]),
        "sizes": [{"width": w, "height": h, "count": n} for (w, h), n in common],
    }


def _summary(values: npt.NDArray[Any]) -> dict[str, float | int]:
    """Number, mean, median, 95th percentile, least and most of some values."""
    if not len(values):
        return {"count": 0}
    cut = np.percentile(values, [50, 95], method="lower")
    named = {"mean": values.mean(), "median": cut[0], "p95": cut[1], "min": values.min(), "max": values.max()}
    return {"count": len(values)} | {name: round(float(value), 3) for name, value in named.items()}


def comparable(table: PictureTable) -> npt.NDArray[np.int64]:
    """Rows of the pictures whose looks can be compared: sound, and with some content."""
    return np.flatnonzero(table.sound & (table.column("flat") == 0))


def _duplicates(found: Scan, distance: int) -> dict[str, Any]:
    """Groups of pictures with the same bytes, and of pictures that look the same, as far as their looks tell."""
    table = found.pictures
    rows = np.flatnonzero(table.sound & (table.column("content") != 0))
    content = np.stack([table.column("content"), table.column("content_rest")], axis=1)[rows]
    exact = [rows[group] for group in equal_groups(content)]
    rows = comparable(table)
    # Copies of one file look the same: one of each is enough, so that groups tell of what the first list does not.
    copies = np.concatenate([group[1:] for group in exact]) if exact else np.empty(0, np.int64)
    rows = np.setdiff1d(rows, copies)
    groups, pairs = near_groups(table.column("look")[rows], distance)
    near = [rows[group] for group in groups]
    return {
        "distance": distance,
        "compared": len(rows),
        "exact": _groups(found, exact),
        "near": {**_groups(found, near), "pairs_of_looks": pairs},
    }


def _groups(found: Scan, groups: Sequence[npt.NDArray[np.int64]]) -> dict[str, Any]:
    """Groups of pictures by the samples that first name them, largest first."""
    largest = sorted(groups, key=lambda group: (-len(group), int(group[0])))[:LISTED_GROUPS]
    looks = found.pictures.column("look")
    listed = []
    for group in largest:
        places = [found.files.place(found.pictures.first_sample(int(row))) for row in group[:_LISTED_PICTURES]]
        away = [int(looks[group[0]] ^ looks[row]).bit_count() for row in group[:_LISTED_PICTURES]]
        pictures = [
            {"file": place.file, "sample": place.name, "number": place.number, "distance": bits}
            for place, bits in zip(places, away, strict=True)
        ]
        listed.append({"count": len(group), "pictures": pictures})
    surplus = sum(len(group) - 1 for group in groups)
    return {"groups": len(groups), "surplus": surplus, "listed": listed}


# -- regions and texts ------------------------------------------------------------------------------------------------


def _regions(tally: Tally) -> dict[str, Any]:
    judged = tally.unique["judged"]
    number, total, least, most = tally.score_sums
    found: dict[str, Any] = {
        "per_sample": _histogram(tally.regions),
        "forms": _by_number(tally.forms),
        "boxes_measured": tally.areas.total(),
        "boxes_unmeasured": tally.unmeasured,
        "coco_sizes": {name: tally.areas[name] for name in ("small", "medium", "large")},
        "share_of_picture": _intervals(tally.shares, SHARE_EDGES),
        "width_by_height": _intervals(tally.aspects, ASPECT_EDGES),
        "texts_judged": judged,
        "texts_unique_in_their_image": tally.unique["unique"],
        "share_unique": round(tally.unique["unique"] / judged, 4) if judged else None,
    }
    if number:
        bins = [tally.scores[k] for k in range(20)]
        outside = tally.scores[-1] + tally.scores[20]
        mean = round(total / number, 4)
        found["scores"] = {"count": int(number), "mean": mean, "min": least, "max": most, "histogram": bins}
        found["scores"]["outside_0_to_1"] = outside
    return found


def _intervals(counts: Counter[int], edges: Sequence[float]) -> list[dict[str, Any]]:
    """Number in each interval, with its ends: the first has no lower one, the last no upper one."""
    ends = [None, *edges, None]
    return [{"from": ends[k], "below": ends[k + 1], "count": counts[k]} for k in range(len(edges) + 1)]


def _texts(found: Scan, group: str, options: TallyOptions) -> dict[str, Any]:
    assert found.tally is not None, "the caller has it"
    tally = found.tally.texts[group]
    described: dict[str, Any] = {"count": tally.count, "blank": tally.blank}
    if group != "conversations":
        described |= {"distinct": tally.distinct(), "top": _top(found, tally)}
    described |= {"characters": histogram_summary(tally.characters), "words": _histogram(tally.words)}
    if options.tokenizer is not None:
        described["tokens"] = _histogram(tally.tokens)
        limit = options.limit_of(group)
        if limit is not None:
            described |= {"token_limit": limit, "over_limit": over(tally.tokens, limit)}
    return described | {"scripts": _by_number(tally.scripts), "flaws": _by_number(tally.flaws)}


def _top(found: Scan, tally: TextTally) -> list[dict[str, Any]]:
    """The texts that occur most often, without case, read back from the first sample that has each."""
    top = []
    for key, number, sample in tally.most_frequent(TOP_TEXTS):
        if number == 1:
            break
        raw, folder = found.files.read(sample)
        _, text, _ = next(matching_texts(SampleView.of(raw, folder), {key}))
        top.append({"text": normalized(text), "count": number})
    return top
