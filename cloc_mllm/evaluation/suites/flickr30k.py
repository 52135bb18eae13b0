"""The ``flickr30k`` suite: the boxes of the phrases of captions, on Flickr30k Entities, by both of its protocols.

A phrase may name several things, each with a box of its own. Under MERGED-BOXES the truth is the one box around them
all, under ANY-BOX each of them is right. Recall@k is the share of phrases for which one of the first k boxes answered
has an IoU of at least 0.5 with the truth. The set's own files are read (the ids of a split, `Sentences`,
`Annotations`), and what is asked, answered and scored belongs together by id, never by the order of files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloc_mllm.data.dataset import RegionTextDataset
from cloc_mllm.data.importers.flickr30k_entities import Flickr30kSource, enclosing, read_boxes, read_sentence
from cloc_mllm.data.importers.pictures import picture_in, picture_size
from cloc_mllm.data.readers import InMemory
from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.encoders.region_data import Region, RegionSplit, draw
from cloc_mllm.evaluation.mllms.answerers import Answered, Answerer, MllmSettings, answer_record, ask_each
from cloc_mllm.evaluation.reporting.report import DatasetRef
from cloc_mllm.evaluation.scoring.metrics import Metric, box_ious, mean_metric, normalise_answer
from cloc_mllm.evaluation.suites.asking import (
    AskingSettings,
    grounding_mode,
    load_answerer,
    mllm_settings,
    question,
    refuse_asking,
)
from cloc_mllm.evaluation.suites.encoder_grounding import locate_texts
from cloc_mllm.evaluation.suites.options import ENCODER, EvalOptions, Outcome, model_type, settings_of
from cloc_mllm.inference.templates import Templates

RECALLS = (1, 5, 10)
PROTOCOLS = ("merged", "any")
WAYS = ("phrase", "sentence")
PHRASES = "{phrases}"
THRESHOLD = 0.5


@dataclass(frozen=True)
class Flickr30kSettings(AskingSettings):
    """The settings of this suite.

    Attributes:
        images: The folder of pictures; needed.
        ask: ``phrase`` asks for each phrase by itself, ``sentence`` for all phrases of a caption at once.
        question: What is asked, with ``{phrases}`` in it; default the model's own template for one phrase, and "What
            are the locations of ...?" for those of a sentence.
    """

    images: str | None = None
    ask: str = "phrase"
    question: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ask not in WAYS:
            raise ClocError(f"ask is '{self.ask}'", remedy=f"Choose one of {', '.join(WAYS)}.")
        if self.question is not None and str(self.question).count(PHRASES) != 1:
            raise ClocError(f"the question needs {PHRASES} exactly once: {self.question!r}")

    def words(self, phrases: Sequence[str]) -> str:
        """The question for some phrases, which are joined by commas and so lose those that they have."""
        listed = ", ".join(" ".join(phrase.lower().replace(",", " ").split()) for phrase in phrases)
        if self.question is not None:
            return self.question.replace(PHRASES, listed)
        return Templates().where_is(listed) if self.ask == "phrase" else f"What are the locations of {listed}?"


def run(options: EvalOptions) -> Outcome:
    """Ask the MLLM that a folder holds, or let the encoder search."""
    settings = settings_of(Flickr30kSettings, options)
    if settings.images is None:
        raise ClocError("the pictures of Flickr30k are not named", remedy="Add --set images=DIR.")
    captions = load_captions(options.data_path, settings.images, options.split or "test", options.limit, options.seed)
    if model_type(options.model) == ENCODER:
        refuse_asking(options, settings)
        data = as_regions(captions)
        return score_located(captions, locate_texts(options, data, range(len(data.regions))), options.seed)
    return evaluate_flickr30k(load_answerer(options, settings), captions, settings, mllm_settings(options))


@dataclass(frozen=True)
class Wanted:
    """A phrase that has boxes.

    Attributes:
        text: The words.
        types: What kind of thing it names, such as ``people``.
        boxes: Its boxes, xyxy in pixels of the original.
    """

    text: str
    types: tuple[str, ...]
    boxes: list[list[float]]


@dataclass(frozen=True)
class Caption:
    """A caption with a phrase to be found in it.

    Attributes:
        image: The picture's id.
        number: Which caption of the picture, from 0.
        phrases: Its phrases that have boxes.
    """

    image: str
    number: int
    phrases: list[Wanted]


@dataclass(frozen=True)
class CaptionSplit:
    """The captions of some or all pictures of a split.

    Attributes:
        ref: What to call it; counts pictures.
        captions: Every caption that has a phrase with a box.
        pictures: The folder of pictures.
        counts: What was read, and what of it was left out.
    """

    ref: DatasetRef
    captions: list[Caption]
    pictures: Path
    counts: dict[str, int]


def load_captions(
    entities: str | Path, pictures: str | Path, split: str = "test", limit: int | None = None, seed: int = 0
) -> CaptionSplit:
    """Read a split of Flickr30k Entities.

    Args:
        entities: The folder with ``Sentences``, ``Annotations`` and ``<split>.txt``.
        pictures: The folder of pictures, ``<id>.jpg``.
        split: ``train``, ``val`` or ``test``.
        limit: So many pictures, drawn with ``seed``; None takes all.
        seed: Of the draw.

    Raises:
        ClocError: A file cannot be read, or there are more ids than the split has.
    """
    source = Flickr30kSource(entities, split)
    ids = [str(image) for _, image, _ in source.events(Counter())]
    if len(set(ids)) != len(ids):
        raise ClocError("an id stands there twice", file=source.files[0], sample=Counter(ids).most_common(1)[0][0])
    known = source.expected.get(split, {}).get("images_listed", len(ids))
    if len(ids) > known:
        raise ClocError(f"lists {len(ids)} pictures, but the split has {known}", file=source.files[0])
    chosen = [ids[k] for k in draw(len(ids), limit, seed)]
    counts: Counter[str] = Counter()
    captions = [caption for image in chosen for caption in _captions(source, image, counts)]
    if not captions:
        raise ClocError("no phrase of the split has a box", file=source.files[0])
    drawn = seed if len(chosen) < len(ids) else None
    ref = DatasetRef("flickr30k-entities", split, len(chosen), known, drawn)
    return CaptionSplit(ref, captions, Path(pictures), dict(counts))


def _captions(source: Flickr30kSource, image: str, counts: Counter[str]) -> list[Caption]:
    _, boxes = read_boxes(source.entities / "Annotations" / f"{image}.xml")
    found = []
    for number, line in enumerate(source.sentences(image)):
        _, phrases = read_sentence(line)
        wanted = [
            Wanted(phrase.text, phrase.types, boxes[phrase.entity]) for phrase in phrases if phrase.entity in boxes
        ]
        counts["captions_read"] += 1
        counts["phrases_read"] += len(phrases)
        counts["phrases_without_box_left_out"] += len(phrases) - len(wanted)
        counts["captions_without_phrase_left_out"] += not wanted
        counts["phrases_asked_for"] += len(wanted)
        if wanted:
            found.append(Caption(image, number, wanted))
    return found


def evaluate_flickr30k(
    answerer: Answerer,
    split: CaptionSplit,
    settings: Flickr30kSettings | None = None,
    asking: MllmSettings | None = None,
) -> Outcome:
    """Ask for the phrases of every caption and compare the boxes answered with the true ones.

    Args:
        answerer: Who is asked.
        split: The captions.
        settings: Whether each phrase or each caption is a question, and how it is put.
        asking: How to ask.
    """
    settings, asking = settings or Flickr30kSettings(), asking or MllmSettings()
    together = [
        [caption.phrases] if settings.ask == "sentence" else [[p] for p in caption.phrases]
        for caption in split.captions
    ]
    asked = [(caption, some) for caption, parts in zip(split.captions, together, strict=True) for some in parts]

    def conversation(k: int) -> list[dict[str, Any]]:
        caption, phrases = asked[k]
        words = settings.words([phrase.text for phrase in phrases])
        return question(picture_in(split.pictures, f"{caption.image}.jpg"), words, settings.suffix)

    answers = ask_each(answerer, len(asked), conversation, asking, split.ref.split)
    phrases: list[Wanted] = []
    given: list[list[Sequence[float]]] = []
    images: list[str] = []
    records = []
    for (caption, some), answer in zip(asked, answers, strict=True):
        boxes = boxes_of_phrases([phrase.text for phrase in some], answer)
        phrases, given, images = phrases + some, given + boxes, images + [caption.image] * len(some)
        picture = picture_in(split.pictures, f"{caption.image}.jpg")
        records.append(_record(caption, some, boxes) | answer_record(answer) | {"picture": str(picture)})
    ranks = {protocol: first_right(phrases, given, protocol) for protocol in PROTOCOLS}
    details = {
        "grounding_mode": grounding_mode(answerer),
        "asking": {
            "by": settings.ask,
            "question": settings.words([PHRASES]),
            "questions": len(asked),
            "suffix": settings.suffix or "none",
        },
        "answers": {
            "boxes whose phrase is said within other words": sum(
                said_within([phrase.text for phrase in some], answer)
                for (_, some), answer in zip(asked, answers, strict=True)
            )
        },
        "counts": split.counts,
        "types": _by_type(phrases, ranks, images, asking.seed),
    }
    unparsed = sum(not boxes for boxes in given) / len(given)
    return Outcome(split.ref, _recalls(ranks, images, asking.seed), details, unparsed, records)


def as_regions(split: CaptionSplit) -> RegionSplit:
    """Return the phrases as regions with their merged boxes, in the order of pictures, captions and phrases."""
    ids = list(dict.fromkeys(caption.image for caption in split.captions))
    number = {image: k for k, image in enumerate(ids)}
    paths = [picture_in(split.pictures, f"{image}.jpg") for image in ids]
    regions = [
        Region(number[caption.image], tuple(enclosing(phrase.boxes)), phrase.text, True)  # type: ignore[arg-type]
        for caption in split.captions
        for phrase in caption.phrases
    ]
    samples = [
        {"id": image, "image": str(path), "caption": image, "regions": []}
        for image, path in zip(ids, paths, strict=True)
    ]
    dataset = RegionTextDataset(InMemory(samples), max_regions=None)
    sizes = [picture_size(path) for path in paths]
    return RegionSplit(split.ref, ids, [[] for _ in ids], sizes, regions, dataset, list(range(len(ids))))


def score_located(split: CaptionSplit, located: Mapping[str, Sequence[Sequence[float]]], seed: int = 0) -> Outcome:
    """Score what an encoder found, in each of its ways; the first one is the headline. One box a phrase: Recall@1.

    Args:
        split: The captions.
        located: By way, a box for each phrase in order, xyxy in pixels of the original.
        seed: Of the bootstrap.
    """
    phrases = [phrase for caption in split.captions for phrase in caption.phrases]
    images = [caption.image for caption in split.captions for _ in caption.phrases]
    ranks = {
        name: {protocol: first_right(phrases, [[box] for box in boxes], protocol) for protocol in PROTOCOLS}
        for name, boxes in located.items()
    }
    scored = {name: _recalls(found, images, seed, (1,)) for name, found in ranks.items()}
    headline = next(iter(scored))
    details = {
        "choices": {"made_on": "nothing", "localizer": headline},
        "localizers": scored,
        "counts": split.counts,
        "types": _by_type(phrases, ranks[headline], images, seed),
    }
    whose = [caption for caption in split.captions for _ in caption.phrases]
    records = [
        _record(caption, [phrase], [[box]])
        | {"answer": headline, "boxes": [{"phrase": phrase.text, "box": list(box)}]}
        | {"picture": str(picture_in(split.pictures, f"{caption.image}.jpg"))}
        for caption, phrase, box in zip(whose, phrases, located[headline], strict=True)
    ]
    return Outcome(split.ref, scored[headline], details, answers=records)


def boxes_of_phrases(phrases: Sequence[str], answer: Answered) -> list[list[Sequence[float]]]:
    """Share the boxes of an answer out among the phrases that were asked for.

    A box belongs to the phrase said before it, compared without case, punctuation and articles: the longest of those
    asked for that the words before the box end with, so "The locations are a man [..]" is a man's. Where one phrase
    alone was asked for, every box is its. A phrase that was asked for several times (two men, each "a man") gets the
    j-th box said for it the j-th time if there are as many boxes as times, else all of them each time.

    Args:
        phrases: What was asked for, in order.
        answer: The answer.

    Returns:
        For each phrase its boxes in order; none where it got none.
    """
    if len(phrases) == 1:
        return [[found["box"] for found in answer.boxes]]
    said: dict[str | None, list[Sequence[float]]] = {}
    keys = [normalise_answer(phrase) for phrase in phrases]
    for found in answer.boxes:
        said.setdefault(_meant(normalise_answer(found.get("phrase", "")), keys), []).append(found["box"])
    times, met = Counter(keys), Counter[str]()
    shared = []
    for key in keys:
        mine = said.get(key, [])
        shared.append([mine[met[key]]] if len(mine) == times[key] else list(mine))
        met[key] += 1
    return shared


def said_within(phrases: Sequence[str], answer: Answered) -> int:
    """Count the boxes of an answer that belong to a phrase said within other words; see :func:`boxes_of_phrases`."""
    if len(phrases) == 1:
        return 0
    keys = [normalise_answer(phrase) for phrase in phrases]
    said = [normalise_answer(found.get("phrase", "")) for found in answer.boxes]
    return sum(words not in keys and _meant(words, keys) is not None for words in said)


def _meant(said: str, keys: Sequence[str]) -> str | None:
    """The longest of the keys that some words end with, a whole number of words; None if there is none."""
    return max((key for key in keys if key and f" {said}".endswith(f" {key}")), key=len, default=None)


def first_right(
    phrases: Sequence[Wanted], given: Sequence[Sequence[Sequence[float]]], protocol: str
) -> NDArray[np.float64]:
    """Return for each phrase which of its boxes is the first right one, (N,) counted from 1; infinity for none.

    Args:
        phrases: N phrases with their true boxes.
        given: The boxes answered for each, xyxy in the same frame.
        protocol: ``merged`` or ``any``.
    """
    ranks = np.full(len(phrases), np.inf)
    for number, (phrase, boxes) in enumerate(zip(phrases, given, strict=True)):
        truth = [enclosing(phrase.boxes)] if protocol == "merged" else phrase.boxes
        for rank, box in enumerate(boxes, 1):
            if box_ious([box] * len(truth), truth).max() >= THRESHOLD:
                ranks[number] = rank
                break
    return ranks


def _recalls(
    ranks: dict[str, NDArray[np.float64]], images: Sequence[str], seed: int, recalls: Sequence[int] = RECALLS
) -> dict[str, Metric]:
    return {
        f"flickr30k_{protocol}_r{k}": mean_metric(ranks[protocol] <= k, images, seed=seed)
        for protocol in PROTOCOLS
        for k in recalls
    }


def _by_type(
    phrases: Sequence[Wanted], ranks: dict[str, NDArray[np.float64]], images: Sequence[str], seed: int
) -> dict[str, dict[str, Metric]]:
    """Recall@1 on the phrases of each type; a phrase of two types counts for both."""
    found = {}
    for kind in sorted({kind for phrase in phrases for kind in phrase.types}):
        rows = [k for k, phrase in enumerate(phrases) if kind in phrase.types]
        found[kind] = {
            f"flickr30k_{protocol}_r1": mean_metric(ranks[protocol][rows] <= 1, [images[k] for k in rows], seed=seed)
            for protocol in PROTOCOLS
        }
    return found


def _record(caption: Caption, phrases: Sequence[Wanted], boxes: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """What `answers.jsonl` says of a question, whoever looked for its phrases."""
    told = [
        {"phrase": phrase.text, "types": list(phrase.types), "truth": phrase.boxes, "boxes": [list(b) for b in mine]}
        for phrase, mine in zip(phrases, boxes, strict=True)
    ]
    hits = first_right(phrases, boxes, "merged") == 1
    shown = {
        "question": ", ".join(phrase.text for phrase in phrases),
        "true_boxes": [enclosing(phrase.boxes) for phrase in phrases],
        "score": float(hits.mean()),
        "right": bool(hits.all()),
    }
    return {"id": caption.image, "caption": caption.number, "phrases": told} | shown
