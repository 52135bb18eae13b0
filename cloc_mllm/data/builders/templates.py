"""All wording of questions and answers about regions, for tuning data, alignment and the one-line tasks of inference.

The first of each list is the plain form, which alignment, the procedural scenes and the Predictor use; `cloc-mllm data
build` draws from all. In a template

* `<region>` stands for a region, in an answer for all boxes of the phrase before it;
* `{phrase}` for a name without its article, `{a_phrase}` for one with it, `{phrases}` for its plural;
* `{text}` for a text just as the data has it.

A box belongs to the phrase right before it, so in an answer nothing but a clause's end stands before a phrase.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from cloc_mllm.data.english import is_mass, is_plural, plural, with_article, without_article

REFER = "What is <region>?"
GROUND = "Where is the {phrase}?"
GROUND_EACH = "Where is every {phrase}?"
DESCRIBE = "Describe <region>."
DESCRIBE_IMAGE = "Describe the image."


@dataclass(frozen=True)
class Wording:
    """How something may be asked, and answered.

    Attributes:
        questions: Templates of the question.
        answers: Templates of the answer; any of them answers any of the questions.
    """

    questions: tuple[str, ...]
    answers: tuple[str, ...]


_WHERE = (
    GROUND,
    "Find the {phrase}.",
    "Point out the {phrase} in the image.",
    "What is the location of the {phrase}?",
    "Give the box of the {phrase}.",
)
_IS_THERE = (
    "Is there {a_phrase} in the image?",
    "Is there {a_phrase}?",
    "Do you see {a_phrase} in the picture?",
    "Can you find {a_phrase} here?",
    "Does the image show {a_phrase}?",
)

WORDINGS: Mapping[str, Wording] = {
    "name": Wording(
        (
            REFER,
            "What is at <region>?",
            "Name the object at <region>.",
            "Which object is <region>?",
            "Can you tell me what <region> is?",
        ),
        ("{text}", "It is {a_phrase}.", "This is {a_phrase}."),
    ),
    "find": Wording(_WHERE, ("{text} <region>", "Here: {text} <region>", "Found it: {text} <region>")),
    "find every": Wording(
        (
            GROUND_EACH,
            "Find all {phrases}.",
            "Point out each {phrase} in the image.",
            "Give the boxes of all {phrases}.",
        ),
        ("{text} <region>", "Here: {text} <region>"),
    ),
    "list": Wording(
        (
            "Find all objects in the image.",
            "What is in the image? Give the box of each thing.",
            "List what you see, with boxes.",
        ),
        ("{text} <region>",),  # one for each name, joined by commas
    ),
    "describe": Wording(
        (DESCRIBE, "What can you say about <region>?", "Tell me about <region>.", "Give a description of <region>."),
        ("{text}",),
    ),
    "caption": Wording(
        (DESCRIBE_IMAGE, "What does the picture show?", "Give a caption for the image.", "What is in the picture?"),
        ("{text}",),
    ),
    "is there, yes": Wording(_IS_THERE, ("Yes, there is {a_phrase}.", "Yes.")),
    "is there, no": Wording(_IS_THERE, ("No, there is no {phrase}.", "No.")),
    "find what is absent": Wording(_WHERE, ("There is no {phrase}.", "There is no {phrase} in the image.")),
}

LVIS_REFERRING = "Is the object <region> of the image a {first} or a {second}?"
"""The question of LVIS referred-object classification, as its protocol has it."""

_OF_SEVERAL = (
    (re.compile(r"\bis every \{phrase\}"), "are all {phrase}"),
    (re.compile(r"\beach \{phrase\}"), "all {phrase}"),
    (re.compile(r"\bis the (?=\{phrase\})"), "are the "),
    (re.compile(r"\b([Tt])here is\b"), r"\1here are"),
    (re.compile(r"\bIs there\b"), "Are there"),
    (re.compile(r"\bThis is\b"), "These are"),
    (re.compile(r"\bIt is\b"), "They are"),
)
"""What changes where a name speaks of several things."""
_UNCOUNTED = ((re.compile(r"\b(?:every|each) \{phrase\}"), "all the {phrase}"),)
_OWN_DETERMINER = re.compile(r"^(?:his|her|its|their|my|your|our|this|that|these|those)\s", re.IGNORECASE)


def worded(template: str, text: str) -> str:
    """Put a name into a template, in the number that it has; `<region>` stays.

    >>> worded("Is there {a_phrase} in the image?", "an orange"), worded("Is there {a_phrase}?", "scissors")
    ('Is there an orange in the image?', 'Are there scissors?')
    """
    phrase = without_article(text)
    for pattern, form in _OF_SEVERAL if is_plural(text) else _UNCOUNTED if is_mass(text) else ():
        template = pattern.sub(form, template)
    if _OWN_DETERMINER.match(phrase):
        template = template.replace("the {phrase}", "{phrase}")
    # Braces in the data are text, so nothing that was put in is looked at again.
    parts = {"phrase": phrase, "a_phrase": with_article(phrase), "phrases": plural(phrase), "text": text}
    return re.sub(r"\{(\w+)\}", lambda found: parts[found.group(1)], template)
