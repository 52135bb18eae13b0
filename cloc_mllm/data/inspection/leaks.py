"""`cloc-mllm data leaks`: pictures and texts of evaluation sets that occur in a training set.

A picture leaks if the training set has one with the same bytes, one that looks the same to within some bits of a
perceptual hash (re-encoded, resized; mirrored, if asked for), or one called after the same COCO image. Texts leak if
they occur there word by word, case and spaces apart; short ones and formulas, which many samples of the evaluation
repeat, tell nothing and are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cloc_mllm.data.inspection.duplicates import near_matches, require_distance
from cloc_mllm.data.inspection.exclusion import Excluded, data_root, excluded_sample, write_exclusions
from cloc_mllm.data.inspection.faults import SampleView
from cloc_mllm.data.inspection.scan import SampleFiles, Scan, ScanOptions, scan
from cloc_mllm.data.inspection.statistics import DEFAULT_DISTANCE, comparable
from cloc_mllm.data.inspection.tally import TallyOptions
from cloc_mllm.data.inspection.texts import matching_texts
from cloc_mllm.errors import ClocError

KINDS = ("same bytes", "looks alike", "looks alike in a mirror", "same COCO image")
"""How a picture may leak, the surest first: a picture counts for the first that holds."""

TEXTS = ("count", "report", "skip")
FORMULA = 3
"""A text that so many samples of an evaluation set hold is a formula, not a leak."""

LISTED_TEXTS = 1000
_FAR = np.iinfo(np.int64).max
_SHIFT = 48

Rows = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class LeakOptions:
    """What counts as a leak.

    Attributes:
        distance: In how many of 64 bits the hashes of two pictures that look the same may differ.
        mirrored: Also look for pictures seen in a mirror.
        texts: "count" texts as leaks, only "report" them, or "skip" them.
        min_words: Texts with fewer words are left out.
        workers: Processes; changes nothing but the time.
        progress: Show progress bars, if standard error is a terminal.
    """

    distance: int = DEFAULT_DISTANCE
    mirrored: bool = False
    texts: str = "count"
    min_words: int = 8
    workers: int = 1
    progress: bool = True


@dataclass(frozen=True)
class PictureHit:
    """A picture of an evaluation set that the training set has.

    Attributes:
        kind: One of `KINDS`.
        distance: Bits between the two hashes; None where they were not compared.
        evaluation: Row of the picture in the evaluation's table.
        training: Row of the nearest one in the training set's.
        count: Training pictures that it is found in this way.
    """

    kind: str
    distance: int | None
    evaluation: int
    training: int
    count: int


@dataclass
class SetLeaks:
    """What of one evaluation set leaked.

    Attributes:
        path: The set.
        scan: What it holds.
        pictures: The leaked pictures, in order of their first samples.
        texts: Hashes of the leaked texts, in order of their first samples.
        formulas: Texts that leaked but are formulas.
    """

    path: str
    scan: Scan
    pictures: list[PictureHit] = field(default_factory=list)
    texts: list[int] = field(default_factory=list)
    formulas: int = 0


@dataclass
class LeakReport:
    """What leaked.

    Attributes:
        train: The training set.
        training: What it holds.
        sets: For each evaluation set what of it leaked.
        options: What counted as a leak.
        reasons: For every training picture that is one of an evaluation set, how it was found there.
    """

    train: str
    training: Scan
    sets: list[SetLeaks]
    options: LeakOptions
    reasons: dict[int, str]

    @property
    def leaks(self) -> int:
        """Number of leaked pictures, and of leaked texts if they count."""
        texts = sum(len(each.texts) for each in self.sets) if self.options.texts == "count" else 0
        return sum(len(each.pictures) for each in self.sets) + texts

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data; pictures all, texts up to a thousand."""
        hits = [
            {
                "kind": hit.kind,
                "distance": hit.distance,
                "evaluation": _picture(each.scan, hit.evaluation),
                "training": _picture(self.training, hit.training),
                "training_pictures": hit.count,
            }
            for each in self.sets
            for hit in each.pictures
        ]
        by_kind = {kind: sum(hit["kind"] == kind for hit in hits) for kind in KINDS}
        texts = sum(len(each.texts) for each in self.sets)
        return {
            "train": self.train,
            "leaks": self.leaks,
            "summary": self.summary(),
            "rules": self.rules(),
            "kinds": [kind for kind in KINDS if self.options.mirrored or kind != KINDS[2]],
            "training_samples_to_leave_out": len(self.samples_to_leave_out()),
            "sets": [
                {
                    "path": each.path,
                    "samples": len(each.scan.files),
                    "pictures": len(each.scan.pictures),
                    "by_kind": {kind: sum(hit.kind == kind for hit in each.pictures) for kind in KINDS},
                    "texts": len(each.texts),
                    "formulas": each.formulas,
                }
                for each in self.sets
            ],
            "pictures": {"count": len(hits), "by_kind": by_kind, "hits": hits},
            "texts": {"count": texts, "hits": self._text_hits()},
        }

    def summary(self) -> str:
        """What leaked, in one sentence."""
        pictures = sum(len(each.pictures) for each in self.sets)
        texts = sum(len(each.texts) for each in self.sets)
        shown = sum(len(each.scan.pictures) for each in self.sets)
        said = (
            "" if self.options.texts == "skip" else f", and {texts:,} texts of {self.options.min_words} words and more"
        )
        return f"{pictures:,} of {shown:,} evaluation pictures are in the training set{said}"

    def rules(self) -> str:
        """What was compared."""
        mirror = ", mirrored or not" if self.options.mirrored else ""
        return (
            f"Pictures are the same if their bytes are, if their perceptual hashes differ in at most "
            f"{self.options.distance} of 64 bits{mirror}, or if both are called after one COCO image. "
            f"Texts that {FORMULA} samples of an evaluation set hold are formulas."
        )

    def samples_to_leave_out(self) -> dict[int, str]:
        """The numbers of the training samples that show a leaked picture or hold a leaked text that counts; and why."""
        found: dict[int, str] = {}
        for sample, row in self.training.uses.tolist():
            if row in self.reasons:
                found.setdefault(sample, self.reasons[row])
        if self.options.texts == "count":
            leaked = np.array(sorted({key for each in self.sets for key in each.texts}), np.uint64)
            keys, samples = _texts(self.training)
            for sample in samples[np.isin(keys, leaked)].tolist():
                found.setdefault(sample, "a text of an evaluation set")
        return dict(sorted(found.items()))

    def _text_hits(self) -> list[dict[str, Any]]:
        """The leaked texts with the first sample of both sides, read back from there."""
        hits: list[dict[str, Any]] = []
        keys, samples = _texts(self.training)
        unique, first = np.unique(keys, return_index=True)
        for each in self.sets:
            own, own_samples = _texts(each.scan)
            own_unique, own_first = np.unique(own, return_index=True)
            for key in each.texts[: LISTED_TEXTS - len(hits)]:
                sample = int(own_samples[own_first[np.searchsorted(own_unique, np.uint64(key))]])
                other = int(samples[first[np.searchsorted(unique, np.uint64(key))]])
                text, here = _text(each.scan.files, sample, key)
                hits.append({"text": text, "evaluation": here, "training": _text(self.training.files, other, key)[1]})
        return hits


def find_leaks(train: str | Path, evaluations: Sequence[str | Path], options: LeakOptions) -> LeakReport:
    """Look for evaluation data in a training set.

    Args:
        train: The training set: a file of samples, a folder of such files, a folder of splits, or a pattern.
        evaluations: Evaluation sets, the same.
        options: What counts as a leak.

    Raises:
        ClocError: There is nothing at a path, or an option makes no sense.
    """
    require_distance(options.distance)
    if options.texts not in TEXTS:
        raise ClocError(f"texts is '{options.texts}'", remedy=f"Write one of {', '.join(TEXTS)}.")
    how = ScanOptions(TallyOptions(min_words=options.min_words), options.workers, options.progress)
    report = LeakReport(str(train), scan(train, how), [], options, {})
    for path in evaluations:
        leaks = SetLeaks(str(path), scan(path, how))
        leaks.pictures = _picture_hits(leaks, report)
        if options.texts != "skip":
            leaks.texts, leaks.formulas = _leaked_texts(leaks.scan, report.training)
        report.sets.append(leaks)
    return report


def _picture_hits(leaks: SetLeaks, report: LeakReport) -> list[PictureHit]:
    """The pictures of an evaluation set that the training set has; notes what training pictures those are."""
    here, there = leaks.scan.pictures, report.training.pictures
    looks_here, looks_there = comparable(here), comparable(there)
    distance = report.options.distance
    sound_here, sound_there = np.flatnonzero(here.sound), np.flatnonzero(there.sound)
    content_here = here.column("content") ^ here.column("content_rest")
    content_there = there.column("content") ^ there.column("content_rest")
    named_here, named_there = (np.flatnonzero(table.column("coco") >= 0) for table in (here, there))
    look = there.column("look")[looks_there]
    searches = [
        (KINDS[0], content_here[sound_here], sound_here, content_there[sound_there], sound_there, 0),
        (KINDS[1], here.column("look")[looks_here], looks_here, look, looks_there, distance),
        (KINDS[2], here.column("mirrored")[looks_here], looks_here, look, looks_there, distance),
        (KINDS[3], *_named(here, named_here), *_named(there, named_there), 0),
    ]
    found: dict[int, PictureHit] = {}
    for kind, keys, rows, other_keys, other_rows, bits in searches:
        if kind == KINDS[2] and not report.options.mirrored:
            continue
        hits, partners = _match(kind, keys, rows, other_keys, other_rows, bits)
        for hit in hits:
            found.setdefault(hit.evaluation, hit)
        for training, evaluation in partners.items():
            if training not in report.reasons:
                shown = _picture(leaks.scan, evaluation)
                report.reasons[training] = f"{kind} as {shown['file']}: sample '{shown['sample']}'"
    return sorted(found.values(), key=lambda hit: hit.evaluation)


def _named(table: Any, rows: Rows) -> tuple[Keys, Rows]:
    return table.column("coco")[rows].astype(np.uint64), rows


def _match(
    kind: str, keys: Keys, rows: Rows, other_keys: Keys, other_rows: Rows, distance: int
) -> tuple[list[PictureHit], dict[int, int]]:
    """Hits of evaluation pictures with the nearest training picture; and for each of those an evaluation picture."""
    if not len(keys) or not len(other_keys):
        return [], {}
    unique, first, where = np.unique(keys, return_index=True, return_inverse=True)
    others, other_first, other_where, number = np.unique(
        other_keys, return_index=True, return_inverse=True, return_counts=True
    )
    nearest = np.full(len(unique), _FAR, np.int64)
    partner = np.full(len(others), _FAR, np.int64)
    count = np.zeros(len(unique), np.int64)
    for left, right, away in near_matches(unique, others, distance):
        # Distance and place in one number, so that the least is the nearest, and of these the first.
        np.minimum.at(nearest, left, (away << _SHIFT) + other_first[right])
        np.minimum.at(partner, right, (away << _SHIFT) + first[left])
        np.add.at(count, left, number[right])
    mask = (1 << _SHIFT) - 1
    hits = [
        PictureHit(
            kind,
            None if kind == KINDS[3] else int(nearest[group] >> _SHIFT),
            int(rows[k]),
            int(other_rows[nearest[group] & mask]),
            int(count[group]),
        )
        for k, group in enumerate(where.tolist())
        if nearest[group] != _FAR
    ]
    partners = {
        int(other_rows[k]): int(rows[partner[group] & mask])
        for k, group in enumerate(other_where.tolist())
        if partner[group] != _FAR
    }
    return hits, partners


def _picture(found: Scan, row: int) -> dict[str, Any]:
    """The first sample that names a picture."""
    place = found.files.place(found.pictures.first_sample(row))
    return {"file": place.file, "sample": place.name}


def _texts(found: Scan) -> tuple[Keys, Rows]:
    """Hashes of all texts of a set, and the numbers of their samples, in order of the samples."""
    assert found.tally is not None, "leaks are looked for with statistics"
    groups = found.tally.texts.values()
    keys = np.concatenate([np.array(texts.keys, np.uint64) for texts in groups] or [np.empty(0, np.uint64)])
    samples = np.concatenate([np.array(texts.samples, np.int64) for texts in groups] or [np.empty(0, np.int64)])
    order = np.argsort(samples, kind="stable")
    return keys[order], samples[order]


def _leaked_texts(evaluation: Scan, training: Scan) -> tuple[list[int], int]:
    """Hashes of the texts that both sets hold, in order of the evaluation's samples, and how many more are formulas."""
    keys, samples = _texts(evaluation)
    both = np.isin(keys, _texts(training)[0])
    keys, samples = keys[both], samples[both]
    unique, first, where = np.unique(keys, return_index=True, return_inverse=True)
    pairs = np.unique(np.stack([where, samples], axis=1), axis=0) if len(keys) else np.empty((0, 2), np.int64)
    formula = np.bincount(pairs[:, 0], minlength=len(unique)) >= FORMULA
    leaked = unique[~formula][np.argsort(first[~formula])]
    return [int(key) for key in leaked], int(formula.sum())


def _text(files: SampleFiles, sample: int, key: int) -> tuple[str, dict[str, Any]]:
    """A text of a sample by its hash, and where it stands."""
    raw, folder = files.read(sample)
    group, text, _ = next(matching_texts(SampleView.of(raw, folder), {key}))
    place = files.place(sample)
    return text, {"file": place.file, "sample": place.name, "group": group}


def write_exclude(report: LeakReport, out: str | Path) -> int:
    """Write the training samples to be left out, for `cloc-mllm data filter --exclude`; return how many.

    Raises:
        ClocError: It cannot be written there.
    """
    files = report.training.files
    root = data_root(report.train, files)
    left_out: list[Excluded] = [
        excluded_sample(root, files, number, reason) for number, reason in report.samples_to_leave_out().items()
    ]
    write_exclusions(out, left_out)
    return len(left_out)
