"""The ``referring`` suite: is the object in a box, at a point, in an outline a A or a B? (LVIS referred objects).

The questions are a file that `cloc-mllm data build lvis-referring` makes of LVIS; Ferret's own is not published. Two
scorers stand side by side: ``ferret``, which takes the published scorer's decisions, and ``strict``, which wants whole
words and one of the two names only (:mod:`cloc_mllm.evaluation.scoring.referring`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cloc_mllm.data.dataset import ConversationDataset
from cloc_mllm.data.messages import Message, region_boxes, turn_text
from cloc_mllm.data.readers import sample_name
from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.encoders.region_data import draw, opened_path
from cloc_mllm.evaluation.mllms.answerers import Answerer, MllmSettings, answer_record, ask_each
from cloc_mllm.evaluation.reporting.known_splits import set_facts
from cloc_mllm.evaluation.reporting.report import DatasetRef
from cloc_mllm.evaluation.scoring.metrics import Metric, mean_metric
from cloc_mllm.evaluation.scoring.referring import OUTCOMES, ferret_right, strict_right, which_named
from cloc_mllm.evaluation.suites.asking import AskingSettings, load_answerer, mllm_settings, with_suffix
from cloc_mllm.evaluation.suites.options import EvalOptions, Outcome, settings_of

KINDS = ("box", "point", "free-form")
SCORERS: dict[str, Callable[..., bool]] = {"ferret": ferret_right, "strict": strict_right}


def run(options: EvalOptions) -> Outcome:
    """Ask the MLLM that a folder holds."""
    settings = settings_of(AskingSettings, options)
    split = load_referring(options.data_path, options.split, options.limit, options.seed)
    return evaluate_referring(load_answerer(options, settings), split, mllm_settings(options), settings.suffix)


@dataclass(frozen=True)
class Referred:
    """One thing that is asked about.

    Attributes:
        row: Where the question stands in its data set.
        id: What to call it.
        image: What tells its picture from others.
        kind: How it is pointed at, one of ``KINDS``.
        pair: The right name and its synonyms, the other name and its synonyms, as the scorers take them.
        first: Whether the right name is said first in the question.
    """

    row: int
    id: str
    image: str
    kind: str
    pair: tuple[str, tuple[str, ...], str, tuple[str, ...]]
    first: bool


@dataclass(frozen=True)
class ReferringSplit:
    """Some or all questions of a file."""

    ref: DatasetRef
    questions: list[Referred]
    dataset: ConversationDataset


def load_referring(
    path: str | Path, split: str | None = None, limit: int | None = None, seed: int = 0
) -> ReferringSplit:
    """Read a file of questions about referred objects, or the folder that holds it.

    Args:
        path: The file, or a folder with ``questions.jsonl``.
        split: What to call the split; default what ``dataset.json`` says, or ``all``.
        limit: So many questions, drawn with ``seed``; None takes all.
        seed: Of the draw.

    Raises:
        ClocError: It cannot be read, a question lacks one of its names, or there are more than were made.
    """
    dataset = ConversationDataset(path, preferred="questions.jsonl")
    rows = draw(len(dataset), limit, seed)
    facts = set_facts(path)
    total = written_questions(facts, len(dataset), path)
    name, split = Path(path).resolve().name, split or str(facts.get("split") or "all")
    drawn = seed if len(rows) < len(dataset) else None
    read = opened_path(path, "questions.jsonl")
    ref = DatasetRef(name, split, len(rows), total, drawn, "questions", read, facts.get("kind"))
    return ReferringSplit(ref, [_referred(dataset, row) for row in rows], dataset)


def written_questions(facts: Mapping[str, Any], present: int, path: str | Path) -> int:
    """Return how many questions were made: a file that has lost some is not called by its split's name.

    Args:
        facts: What ``dataset.json`` says; may be nothing.
        present: Questions in the data at hand.
        path: The data, for the error.

    Raises:
        ClocError: There are more than were made.
    """
    counts = facts.get("counts")
    written = counts.get("questions_written") if isinstance(counts, Mapping) else None
    if type(written) is not int:
        return present
    if present > written:
        problem = f"the data hold {present:,} questions, but dataset.json says that {written:,} were written"
        raise ClocError(problem, file=path, remedy="Make the questions anew, into an empty folder.")
    return written


def _referred(dataset: ConversationDataset, row: int) -> Referred:
    raw = dataset.source[row]
    file, place = dataset.source.where(row)
    name = sample_name(raw, place)
    remedy = "Make the questions with: cloc-mllm data build lvis-referring."
    for key in ("answer", "negative"):
        if not isinstance(raw.get(key), str) or not raw[key].strip():
            raise ClocError(f"the question has no '{key}'", file=file, sample=name, remedy=remedy)
    for key in ("synonyms", "negative_synonyms"):
        if not all(isinstance(one, str) for one in raw.get(key, ())) or isinstance(raw.get(key), str):
            raise ClocError(f"'{key}' is not a list of names", file=file, sample=name, remedy=remedy)
    if raw.get("kind") not in KINDS:
        problem = f"the question is of the kind {raw.get('kind')!r}, none of {', '.join(KINDS)}"
        raise ClocError(problem, file=file, sample=name, remedy=remedy)
    pair = (raw["answer"], tuple(raw.get("synonyms", ())), raw["negative"], tuple(raw.get("negative_synonyms", ())))
    asked = _text_of(raw.get("messages"))
    places = [asked.rfind(one.replace("_", " ")) for one in (raw["answer"], raw["negative"])]
    image = str(raw.get("image") or _image_of(raw.get("messages")) or row)
    return Referred(row, str(raw.get("id", place)), image, raw["kind"], pair, places[0] < places[1])


def _contents(messages: Any) -> list[Mapping[str, Any]]:
    """The items of all turns of a raw sample that have any; what is malformed is named when the question is asked."""
    turns = messages if isinstance(messages, list) else []
    lists = [turn.get("content") for turn in turns if isinstance(turn, Mapping)]
    return [item for items in lists if isinstance(items, list) for item in items if isinstance(item, Mapping)]


def _text_of(messages: Any) -> str:
    return " ".join(str(item["text"]) for item in _contents(messages) if "text" in item)


def _image_of(messages: Any) -> str | None:
    return next((item["image"] for item in _contents(messages) if isinstance(item.get("image"), str)), None)


def evaluate_referring(
    answerer: Answerer, split: ReferringSplit, settings: MllmSettings | None = None, suffix: str = ""
) -> Outcome:
    """Ask about every object and score the answers by both scorers.

    Args:
        answerer: Who is asked.
        split: The questions.
        settings: How to ask.
        suffix: Put behind every question.
    """
    settings = settings or MllmSettings()
    questions = split.questions
    answers = ask_each(
        answerer,
        len(questions),
        lambda k: with_suffix(split.dataset[questions[k].row]["messages"], suffix),
        settings,
        split.ref.split,
    )
    said = [answer.text for answer in answers]
    outcomes = [which_named(text, *one.pair) for text, one in zip(said, questions, strict=True)]
    metrics = _scored(questions, said, settings.seed)
    records = [
        {"id": one.id, "row": one.row, "kind": one.kind, "truth": one.pair[0], "other": one.pair[2], "named": named}
        | {name: right(answer.text, *one.pair) for name, right in SCORERS.items()}
        | _shown(split.dataset.source[one.row]["messages"][-1])
        | {"right": strict_right(answer.text, *one.pair)}
        | answer_record(answer)
        for one, answer, named in zip(questions, answers, outcomes, strict=True)
    ]
    counted = Counter(outcomes)
    details = {
        "named": {outcome: counted[outcome] for outcome in OUTCOMES},
        "kinds": {kind: sum(one.kind == kind for one in questions) for kind in KINDS},
        "baselines": _baselines(questions, settings.seed),
        "an answer that names both": _constant(questions, lambda one: f"a {one.pair[0]} or a {one.pair[2]}", settings),
    }
    unparsed = counted["neither"] / len(questions)
    return Outcome(split.ref, metrics, details, unparsed, records)


def _shown(turn: Message) -> dict[str, Any]:
    return {"question": turn_text(turn), "boxes_in": region_boxes(turn)}


def _scored(questions: Sequence[Referred], said: Sequence[str], seed: int) -> dict[str, Metric]:
    images = [one.image for one in questions]
    metrics = {}
    for name, right in SCORERS.items():
        hits = np.array([right(text, *one.pair) for text, one in zip(said, questions, strict=True)], dtype=bool)
        metrics[f"referring_acc_{name}"] = mean_metric(hits, images, seed=seed)
        for kind in KINDS:
            rows = [k for k, one in enumerate(questions) if one.kind == kind]
            if rows:
                label = f"referring_acc_{name}_{kind.replace('-', '_')}"
                metrics[label] = mean_metric(hits[rows], [images[k] for k in rows], seed=seed)
    return metrics


def _constant(
    questions: Sequence[Referred], answer: Callable[[Referred], str], settings: MllmSettings
) -> dict[str, Metric]:
    """What an answer that looks at no picture would score."""
    scored = _scored(questions, [answer(one) for one in questions], settings.seed)
    return {f"referring_acc_{name}": scored[f"referring_acc_{name}"] for name in SCORERS}


def _baselines(questions: Sequence[Referred], seed: int) -> dict[str, Any]:
    """Always the name that is said first; and a coin."""
    first = [one.pair[0] if one.first else one.pair[2] for one in questions]
    scored = _scored(questions, first, seed)
    return {
        f"referring_acc_{name}": {
            "majority": scored[f"referring_acc_{name}"],
            "chance": 0.5,
            "answers": {"always": "the name said first"},
        }
        for name in SCORERS
    }
