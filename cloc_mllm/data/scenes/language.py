"""Turns the truth about a scene into English: region texts, captions with a relation, and unambiguous phrases.

A *mention* is the set of attributes a text names, as a dict in the order they are spoken. Whether a text fits one
object only is decided on mentions and truth, never on strings: "circle" fits a red circle however that is described.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from cloc_mllm.data.english import with_article
from cloc_mllm.data.scenes.objects import SceneObject
from cloc_mllm.data.scenes.vocabulary import ScenePreset

Mention = dict[str, str]

_ORDER = ("size", "texture", "colour", "shape")


def mention(thing: SceneObject, *names: str) -> Mention:
    """The named attributes of an object, in speaking order; the shape is always among them."""
    return {name: getattr(thing, name) for name in _ORDER if name in names or name == "shape"}


def words(said: Mapping[str, str]) -> str:
    """A mention as a phrase: "[size] [texture] [colour] shape"."""
    return " ".join(said.values())


def fits(said: Mapping[str, str], thing: SceneObject) -> bool:
    """Whether a mention is true of an object."""
    return all(getattr(thing, name) == word for name, word in said.items())


def is_unique(said: Mapping[str, str], objects: Sequence[SceneObject]) -> bool:
    """Whether a mention is true of one object of the scene only."""
    return sum(fits(said, thing) for thing in objects) == 1


def canonical(thing: SceneObject) -> str:
    """The name every object is referred to by: texture, colour and shape, without the size."""
    return words(mention(thing, "texture", "colour"))


def sample_mention(thing: SceneObject, preset: ScenePreset, rng: np.random.Generator) -> Mention:
    """A description as a person might give it: shape always, colour nearly always, the rest sometimes."""
    chances = {"size": preset.say_size, "texture": preset.say_texture, "colour": preset.say_colour}
    draws = rng.random(3)
    return mention(thing, *[name for (name, chance), draw in zip(chances.items(), draws, strict=True) if draw < chance])


def sample_unique_mention(
    thing: SceneObject, objects: Sequence[SceneObject], rng: np.random.Generator
) -> Mention | None:
    """A mention without size that fits `thing` only, or None if there is none; the full name is the most likely."""
    options = [("texture", "colour"), ("colour",), ("texture",), ()]
    weights = np.asarray([0.6, 0.25, 0.1, 0.05])
    usable = [k for k, names in enumerate(options) if is_unique(mention(thing, *names), objects)]
    if not usable:
        return None
    weights = weights[usable] / weights[usable].sum()
    return mention(thing, *options[usable[int(rng.choice(len(usable), p=weights))]])


def relation(a: SceneObject, b: SceneObject) -> str:
    """Where `a` is, seen from `b`, along the axis on which their centres are farther apart."""
    across, down = a.centre[0] - b.centre[0], a.centre[1] - b.centre[1]
    if abs(across) >= abs(down):
        return "left of" if across < 0 else "right of"
    return "above" if down < 0 else "below"


def caption(objects: Sequence[SceneObject], preset: ScenePreset, rng: np.random.Generator) -> str:
    """A caption that names up to three objects and how the first two stand to each other.

    Example: "a striped red circle left of a solid blue star and a large green ring".
    """
    order = rng.permutation(len(objects))[:3]
    named = [objects[int(k)] for k in order]
    phrases = [with_article(words(sample_mention(thing, preset, rng))) for thing in named]
    if len(named) == 1:
        return phrases[0]
    text = f"{phrases[0]} {relation(named[0], named[1])} {phrases[1]}"
    return text if len(named) == 2 else f"{text} and {phrases[2]}"
