"""The kinds of questions about a picture's regions, each a generator of turns.

A generator takes only things that are still free and marks those it tells of, so that no turn of a conversation repeats
what an earlier one gave away. It ends when the picture allows no more.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cloc_mllm.data.builders.absent import Vocabulary, is_name
from cloc_mllm.data.builders.picture import Picture
from cloc_mllm.data.builders.templates import WORDINGS, worded
from cloc_mllm.data.english import without_article
from cloc_mllm.data.importers.coco import caption_of_names
from cloc_mllm.data.messages import REGION, Message, question_items, text_item, turn

MOST_LISTED = 16
"""Most boxes in an answer that lists everything."""


@dataclass(frozen=True)
class Choices:
    """What a person decides about the turns.

    Attributes:
        shape: How a region is shown: "box", "point", "mask" or "mixed".
        answers: "plain": always the first wording of an answer; "varied": any.
        max_boxes: Most boxes of one phrase in an answer.
        absent: How absent names are drawn: "random", "popular" or "adversarial".
    """

    shape: str = "box"
    answers: str = "plain"
    max_boxes: int = 8
    absent: str = "random"


@dataclass
class Asker:
    """Asks about one picture.

    Attributes:
        picture: What is on it.
        choices: See :class:`Choices`.
        vocabulary: What is on other pictures; `None` where nothing absent is asked for.
        draw: Decides what is left open.
        counts: Counted here: what is shown, to be found and left out.
    """

    picture: Picture
    choices: Choices
    vocabulary: Vocabulary | None
    draw: random.Random
    counts: Counter[str]

    def shuffled(self) -> list[int]:
        """The numbers of all things, in random order."""
        return self.draw.sample(range(len(self.picture.things)), len(self.picture.things))

    def say(
        self, what: str, text: str, shown: list[dict[str, Any]], answer: list[dict[str, Any]] | None
    ) -> list[Message]:
        """A question of a kind of wording and its answer.

        Args:
            what: Key of `WORDINGS`.
            text: What it is about.
            shown: The regions that the question shows.
            answer: Items of the answer, or `None` for its template's.
        """
        question = worded(self.draw.choice(WORDINGS[what].questions), text)
        items = question_items(question, shown) if shown else [text_item(question)]
        return turn(items, answer or self.reply(what, text, []))

    def reply(self, what: str, text: str, things: list[int]) -> list[dict[str, Any]]:
        """An answer from its template, with the boxes of some things where it has a `<region>`."""
        answers = WORDINGS[what].answers
        template = answers[0] if self.choices.answers == "plain" else self.draw.choice(answers)
        before, found, behind = template.partition(REGION)
        items = [text_item(worded(before, text))]
        if found:
            boxes = [list(self.picture.things[k].box) for k in things]
            items += [{"type": "region", "box": box, "phrase": text} for box in boxes]
            self.counts["boxes_to_be_found"] += len(boxes)
        return items + ([text_item(worded(behind, text))] if behind else [])


Kind = Callable[[Asker], Iterator[list[Message]]]


def referring(asker: Asker) -> Iterator[list[Message]]:
    """What a region is."""
    for number in asker.shuffled():
        if number in asker.picture.free:
            asker.picture.free.remove(number)
            text = asker.draw.choice(asker.picture.things[number].texts)
            shown = asker.picture.located(number, asker.choices.shape, asker.draw, asker.counts)
            yield asker.say("name", text, [shown], None)


def description(asker: Asker) -> Iterator[list[Message]]:
    """What the picture shows, then all that is said of a region. A caption made of names is none."""
    picture = asker.picture
    names = [text for thing in picture.things for text in thing.texts]
    captions = [caption for caption in picture.captions if [caption] != caption_of_names(names)]
    asker.counts["captions_of_names_left_out"] += len(picture.captions) - len(captions)
    if captions and len(picture.free) == len(picture.things):
        yield asker.say("caption", asker.draw.choice(captions), [], None)
    for number in asker.shuffled():
        if number in picture.free:
            picture.free.remove(number)
            shown = picture.located(number, asker.choices.shape, asker.draw, asker.counts)
            yield asker.say("describe", "; ".join(picture.things[number].texts), [shown], None)


def grounding(asker: Asker) -> Iterator[list[Message]]:
    """Where a thing is, by a phrase that fits no other."""
    picture = asker.picture
    alone = {
        number: [text for place, text in enumerate(thing.texts) if picture.is_unique(number, place)]
        for number, thing in enumerate(picture.things)
    }
    texts, fitting = sum(len(thing.texts) for thing in picture.things), sum(map(len, alone.values()))
    asker.counts["phrases_of_several_things_left_out"] += texts - fitting
    for number in asker.shuffled():
        if alone[number] and number in picture.free:
            picture.free.remove(number)
            text = asker.draw.choice(alone[number])
            yield asker.say("find", text, [], asker.reply("find", text, [number]))


def multi_object(asker: Asker) -> Iterator[list[Message]]:
    """Every thing that a phrase names; or, of a picture nothing has been told of, everything with its name."""
    picture = asker.picture
    phrases = _phrases_of_several(asker)
    if _can_be_listed(asker) and (not phrases or asker.draw.random() < 1 / (1 + len(phrases))):
        yield _list_of_all(asker)
    for phrase, things in phrases:
        if picture.free.issuperset(things):
            picture.free -= set(things)
            yield asker.say("find every", phrase, [], asker.reply("find every", phrase, things))


def _phrases_of_several(asker: Asker) -> list[tuple[str, list[int]]]:
    """Phrases that are said of two things or more, each with them, in random order.

    A phrase whose words are in a longer text as well is left out: a striped red cube is a red cube, but a hot dog is no
    dog, and words do not tell which is which.
    """
    picture = asker.picture
    phrases: dict[frozenset[str], str] = {}
    for thing in picture.things:
        for text, stated in zip(thing.texts, thing.stated, strict=True):
            if not stated:
                phrases.setdefault(frozenset(without_article(text).lower().split()), text)
    fitting = {phrase: picture.fitting(phrase) for phrase in phrases.values()}
    found = [(phrase, things) for phrase, things in fitting.items() if len(things) > 1]
    several = [(phrase, things) for phrase, things in found if picture.named(phrase) == things]
    asker.counts["phrases_in_longer_texts_left_out"] += len(found) - len(several)
    kept = [pair for pair in several if len(pair[1]) <= asker.choices.max_boxes]
    asker.counts["phrases_of_too_many_things_left_out"] += len(several) - len(kept)
    return asker.draw.sample(kept, len(kept))


def _named(picture: Picture) -> dict[str, list[int]]:
    """Things by their first text without its article, in lower case."""
    named: dict[str, list[int]] = {}
    for number, thing in enumerate(picture.things):
        named.setdefault(without_article(thing.texts[0]).lower(), []).append(number)
    return named


def _can_be_listed(asker: Asker) -> bool:
    picture, most = asker.picture, asker.choices.max_boxes
    all_free = len(picture.free) == len(picture.things)
    return all_free and 1 < len(picture.things) <= MOST_LISTED and all(len(k) <= most for k in _named(picture).values())


def _list_of_all(asker: Asker) -> list[Message]:
    picture = asker.picture
    answer: list[dict[str, Any]] = []
    for name, things in _named(picture).items():
        answer += ([text_item(", ")] if answer else []) + asker.reply("list", name, things)
    picture.free.clear()
    return asker.say("list", "", [], answer)


def negatives(asker: Asker) -> Iterator[list[Message]]:
    """Whether something is there, "yes" as likely as "no"; and where something is that is not there.

    Once "yes" cannot be the answer any more, "no" must not be either: where pictures have few names it would be the
    better guess.
    """
    picture, taken = asker.picture, set[str]()
    assert asker.vocabulary is not None
    present = [text for k in asker.shuffled() for text in picture.things[k].texts if is_name(text)]
    while True:
        here = next((text for text in present if without_article(text).lower() not in taken), None)
        name = asker.vocabulary.absent(picture, asker.choices.absent, taken, asker.draw)
        if name is None:
            asker.counts["pictures_out_of_absent_names"] += 1
            return
        kinds = ("find what is absent", "find what is absent", "is there, yes", "is there, no")
        kind = asker.draw.choice(kinds if here is not None else kinds[:2])
        text = here if here is not None and kind == "is there, yes" else name
        taken.add(without_article(text).lower())
        yield asker.say(kind, text, [], None)


KINDS: Mapping[str, Kind] = {
    "referring": referring,
    "grounding": grounding,
    "description": description,
    "multi-object": multi_object,
    "negatives": negatives,
}
"""Kind of question to what asks it."""
