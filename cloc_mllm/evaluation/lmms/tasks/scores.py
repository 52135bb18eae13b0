"""How answers are scored: `process_results` of lmms-eval, and the one aggregation.

lmms-eval drops a document once its answer is scored, so a score travels with what is needed to look into it later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cloc_mllm.evaluation.lmms.tasks.documents import picture_size
from cloc_mllm.evaluation.scoring.metrics import box_ious, exact_match_hits
from cloc_mllm.evaluation.scoring.referring import ferret_right, strict_right
from cloc_mllm.evaluation.suites.flickr30k import PROTOCOLS, Wanted, first_right
from cloc_mllm.models.boxes import BoxCodec

FRAME = BoxCodec("norm1")
"""Boxes are asked for and read as shares (0 to 1) of the original picture's width and height."""


def mean_score(items: Sequence[Mapping[str, Any]]) -> float:
    """The mean of the scores; lmms-eval's aggregation."""
    return sum(item["score"] for item in items) / len(items)


def score_words(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """An answer in words: right when it equals the truth up to case, punctuation, articles and number words."""
    right = bool(exact_match_hits([results[0]], [doc["answer"]])[0])
    return {"exact_match": _entry(doc, right, answer=results[0], truth=doc["answer"], kind=doc["kind"])}


def score_box(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """The first box of an answer against the true one; an answer without a readable box is a miss, and is counted."""
    box, truth = first_box(doc, results[0]), doc["boxes"][0]
    iou = float(box_ious([box], [truth])[0])
    what = {"phrase": doc.get("phrase", doc.get("answer")), "answer": results[0], "box": box, "truth": truth}
    return {
        "acc50": _entry(doc, iou >= 0.5, iou=iou, **what),
        "acc25": _entry(doc, iou >= 0.25),
        "acc75": _entry(doc, iou >= 0.75),
        "mean_iou": _entry(doc, iou),
        "unparsed": _entry(doc, box is None),
    }


def score_phrase(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """The first box of an answer against the boxes of a phrase, at an IoU of 0.5, by both protocols.

    MERGED-BOXES: against the box that encloses all of them. ANY-BOX: against the best-fitting one.
    """
    box, truths = first_box(doc, results[0]), [list(one) for one in doc["boxes"]]
    wanted, given = Wanted(doc["phrase"], (doc["kind"],), truths), [] if box is None else [box]
    hits = {protocol: bool(first_right([wanted], [given], protocol)[0] == 1) for protocol in PROTOCOLS}
    what = {"phrase": doc["phrase"], "kind": doc["kind"], "answer": results[0], "box": box, "truth": truths}
    return {
        "recall1_merged": _entry(doc, hits["merged"], **what),
        "recall1_any": _entry(doc, hits["any"]),
        "unparsed": _entry(doc, box is None),
    }


def score_name(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Which of the two names an answer gives: by Ferret's published rule, and by whole words."""
    names = (doc["answer"], list(doc["synonyms"]), doc["negative"], list(doc["negative_synonyms"]))
    what = {"answer": results[0], "truth": doc["answer"], "negative": doc["negative"], "kind": doc["kind"]}
    return {
        "ferret": _entry(doc, ferret_right(results[0], *names), **what),
        "strict": _entry(doc, strict_right(results[0], *names)),
    }


def first_box(doc: Mapping[str, Any], answer: str) -> list[float] | None:
    """The first box that can be read in an answer, in pixels, or None."""
    boxes = FRAME.decode(answer, *picture_size(doc)).boxes
    return boxes[0] if boxes else None


def _entry(doc: Mapping[str, Any], score: float, **more: Any) -> dict[str, Any]:
    return {"score": float(score), "id": doc["id"], "image": doc["image"], **more}
