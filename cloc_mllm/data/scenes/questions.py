"""Questions about a scene and their answers, from the same truth that drew it.

Three tasks: visual questions (count, colour, exists), referring ("What is <region>?") and grounding ("Where is ...?").
Answers are balanced so that no constant answer scores well: the answer is drawn first, then a question that has it.
Pairs held out of training never appear in a training question either, not even as something that is absent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cloc_mllm.data.builders.templates import GROUND, REFER
from cloc_mllm.data.english import plural, with_article
from cloc_mllm.data.messages import question_items, text_item
from cloc_mllm.data.scenes.language import canonical, is_unique, mention, sample_unique_mention, words
from cloc_mllm.data.scenes.objects import Pair, SceneObject
from cloc_mllm.data.scenes.vocabulary import ScenePreset

Content = list[dict[str, Any]]


@dataclass(frozen=True)
class Turn:
    """One question with its answer.

    Attributes:
        task: "vqa", "referring" or "grounding".
        kind: What is asked within the task ("count", "colour", "exists"; otherwise the task's name).
        question: Content of the user turn.
        reply: Content of the assistant turn.
        answer: The answer as plain text.
        pair: The (shape, colour) pair the question is about, if it is about one.
        box: The box to be found (grounding), pixels.
        boxes_in: The boxes asked about (referring), pixels.
    """

    task: str
    kind: str
    question: Content
    reply: Content
    answer: str
    pair: Pair | None = None
    box: list[int] | None = None
    boxes_in: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True)
class Asker:
    """Asks questions about one scene.

    Attributes:
        objects: The scene's objects.
        preset: Vocabulary.
        forbidden: Pairs that may not be mentioned.
    """

    objects: Sequence[SceneObject]
    preset: ScenePreset
    forbidden: frozenset[Pair] = frozenset()

    def count(self, rng: np.random.Generator) -> Turn:
        """How many objects there are, in all or with one attribute; every answer the scene allows is as likely."""
        options: dict[int, list[str]] = {len(self.objects): ["objects"]}
        for attribute, vocabulary in (
            ("colour", self.preset.colours),
            ("shape", self.preset.shapes),
            ("texture", self.preset.textures),
        ):
            present = Counter(getattr(thing, attribute) for thing in self.objects)
            for word in vocabulary:
                number = present[word]
                options.setdefault(number, []).append(plural(word) if attribute == "shape" else f"{word} objects")
        answer = sorted(options)[int(rng.integers(len(options)))]
        what = options[answer][int(rng.integers(len(options[answer])))]
        return _spoken("count", f"How many {what} are there?", str(answer))

    def colour(self, rng: np.random.Generator) -> Turn | None:
        """The colour of an object that can be named without it; None if there is no such object."""
        options = [
            (thing, names)
            for thing in self.objects
            for names in ((), ("texture",))
            if is_unique(mention(thing, *names), self.objects)
        ]
        if not options:
            return None
        thing, names = options[int(rng.integers(len(options)))]
        text = f"What colour is the {words(mention(thing, *names))}?"
        return _spoken("colour", text, thing.colour, thing.pair)

    def exists(self, rng: np.random.Generator, wanted: bool | None = None) -> Turn:
        """Whether something is there: "yes" and "no" as likely, half of the "no" about a confusable thing.

        Confusable means that its shape and its colour are both in the scene, but not in one object.
        """
        answer = bool(rng.random() < 0.5) if wanted is None else wanted
        subject = self._present(rng) if answer else self._absent(rng)
        what = words(subject) if "shape" in subject else f"{words(subject)} object"
        pair = (subject["shape"], subject["colour"]) if len(subject) == 2 else None
        return _spoken("exists", f"Is there {with_article(what)}?", "yes" if answer else "no", pair)

    def _present(self, rng: np.random.Generator) -> dict[str, str]:
        thing = self.objects[int(rng.integers(len(self.objects)))]
        said = mention(thing, "colour")
        kind = rng.random()
        if kind < 0.6:
            return said
        return {"colour": thing.colour} if kind < 0.8 else {"shape": thing.shape}

    def _absent(self, rng: np.random.Generator) -> dict[str, str]:
        shapes = {thing.shape for thing in self.objects}
        colours = {thing.colour for thing in self.objects}
        missing_colours = [colour for colour in self.preset.colours if colour not in colours]
        missing_shapes = [shape for shape in self.preset.shapes if shape not in shapes]
        kind = rng.random()
        if kind >= 0.8 and missing_shapes:
            return {"shape": missing_shapes[int(rng.integers(len(missing_shapes)))]}
        if kind >= 0.6 and missing_colours:
            return {"colour": missing_colours[int(rng.integers(len(missing_colours)))]}
        taken = {thing.pair for thing in self.objects} | self.forbidden
        absent = [(s, c) for s in self.preset.shapes for c in self.preset.colours if (s, c) not in taken]
        confusable = [(s, c) for s, c in absent if s in shapes and c in colours]
        pool = confusable if confusable and kind < 0.4 else absent
        shape, colour = pool[int(rng.integers(len(pool)))]
        return {"colour": colour, "shape": shape}

    def referring(self, rng: np.random.Generator, thing: SceneObject | None = None) -> Turn:
        """What the object in a box is; the answer names texture, colour and shape."""
        thing = thing or self.objects[int(rng.integers(len(self.objects)))]
        box = list(thing.box)
        question: Content = question_items(REFER, [{"box": box}])
        answer = canonical(thing)
        return Turn("referring", "referring", question, [text_item(answer)], answer, thing.pair, boxes_in=[box])

    def grounding(self, rng: np.random.Generator, thing: SceneObject | None = None) -> Turn | None:
        """Where an object is; None if no phrase names it alone. Without `thing`, any object that can be named."""
        pool = [thing] if thing else [self.objects[int(k)] for k in rng.permutation(len(self.objects))]
        for candidate in pool:
            said = sample_unique_mention(candidate, self.objects, rng)
            if said is not None:
                phrase, box = words(said), list(candidate.box)
                reply: Content = [text_item(f"{phrase} "), {"type": "region", "box": box, "phrase": phrase}]
                question = [text_item(GROUND.format(phrase=phrase))]
                return Turn("grounding", "grounding", question, reply, phrase, candidate.pair, box=box)
        return None


def _spoken(kind: str, question: str, answer: str, pair: Pair | None = None) -> Turn:
    return Turn("vqa", kind, [text_item(question)], [text_item(answer)], answer, pair)


def training_turns(asker: Asker, rng: np.random.Generator) -> list[Turn]:
    """The turns of one training conversation, in random order.

    Referring and grounding turns go round the objects in random order, so that a turn seldom repeats what an earlier
    one gave away. Turns that the scene does not allow are replaced by a counting or a referring one.
    """
    preset = asker.preset
    kinds: list[Callable[[np.random.Generator], Turn | None]] = [asker.count, asker.colour, asker.exists]
    chosen = rng.permutation(len(kinds))
    turns = [kinds[int(chosen[k % len(kinds)])](rng) or asker.exists(rng) for k in range(preset.vqa_turns)]
    order = [asker.objects[int(k)] for k in rng.permutation(len(asker.objects))]
    for k in range(preset.grounding_turns + preset.referring_turns):
        thing = order[k % len(order)]
        grounded = asker.grounding(rng, thing) if k < preset.grounding_turns else None
        turns.append(grounded or asker.referring(rng, thing))
    return [turns[int(k)] for k in rng.permutation(len(turns))]


def evaluation_turns(asker: Asker, rng: np.random.Generator, index: int) -> list[Turn]:
    """One question of each kind the scene allows; "exists" answers alternate with the scene's index."""
    turns = [
        asker.count(rng),
        asker.colour(rng),
        asker.exists(rng, wanted=index % 2 == 0),
        asker.referring(rng),
        asker.grounding(rng),
    ]
    return [turn for turn in turns if turn is not None]
