"""Whether an answer to "Is the object … a A or a B?" names the right one of the two, by two scorers.

:func:`ferret_right` takes the decisions of Ferret's published scorer (github.com/apple/ml-ferret,
`ferret/eval/eval_lvis.py`), so that figures can be held beside published ones. It looks for the name or a synonym
anywhere in the text, inside other words too ("cat" in "category"), heeds capitals, never looks at the other name, and
first deletes whatever reaches from a word that begins with "no" ("not", but "notebook" and "north" as well) to the next
comma or full stop. An answer that names both is right by it.

:func:`strict_right` looks for whole words, does not heed capitals, and wants the right name without the other one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from cloc_mllm.errors import ClocError

_PUBLISHED_NEGATIONS = tuple(re.compile(rf"\s+{word}[^,.]*[,.]") for word in ("not", "no"))
"""Deleted one after the other, in this order: what the first leaves can make the second reach further."""

_NEGATION = re.compile(
    r"(?<![\w-])(?:not|no|never|neither|nor|without|cannot|\w+n['’]t|rather\s+than|instead\s+of)(?![\w-])"
    r"(?:(?!\bbut\b)[^,.;:!?\n])*",
    re.IGNORECASE,
)
_WORD = re.compile(r"\w+")

OUTCOMES = ("right", "other", "both", "neither")
"""What :func:`which_named` tells."""


def ferret_right(
    answer: str, name: str, synonyms: Sequence[str], negative: str = "", negative_synonyms: Sequence[str] = ()
) -> bool:
    """Tell whether Ferret's published scorer takes an answer for right.

    Args:
        answer: What was said.
        name: The right name, as LVIS writes it (underscores count as spaces).
        synonyms: Its synonyms; a bracket in one parts it in two.
        negative: The other name offered; that scorer does not look at it.
        negative_synonyms: Nor at its synonyms.

    Raises:
        ClocError: A synonym has brackets that the published scorer stops at.
    """
    names = [_spaced(name), *(part for synonym in synonyms for part in _parts(synonym))]
    text = answer
    for pattern in _PUBLISHED_NEGATIONS:
        text = pattern.sub("", text)
    return any(one in text for one in names)


def strict_right(
    answer: str, name: str, synonyms: Sequence[str], negative: str, negative_synonyms: Sequence[str]
) -> bool:
    """Tell whether an answer names the right thing, in whole words, and not the other one.

    What is said not to be there does not count as named ("not a dog but a cat" names a cat). Within a longer name of
    the pair a shorter one is not named ("hot dog" names no dog), and a name that both things have tells nothing. A
    plural counts as its singular.

    Args:
        answer: What was said.
        name: The right name.
        synonyms: Its synonyms.
        negative: The other name offered.
        negative_synonyms: Its synonyms.

    Raises:
        ClocError: As :func:`ferret_right`.
    """
    return which_named(answer, name, synonyms, negative, negative_synonyms) == "right"


def which_named(
    answer: str, name: str, synonyms: Sequence[str], negative: str, negative_synonyms: Sequence[str]
) -> str:
    """Return which of two things an answer names, one of :data:`OUTCOMES`; see :func:`strict_right`."""
    mine, others = _word_names([name, *synonyms]), _word_names([negative, *negative_synonyms])
    told = {"right": mine - others, "other": others - mine}
    owner = {words: whose for whose, names in told.items() for words in names}
    longest_first = sorted(owner, key=lambda words: (-len(words), words))
    said = _WORD.findall(_NEGATION.sub(" ", answer).lower())
    found, at = set(), 0
    while at < len(said):
        words = _name_at(said, at, longest_first)
        if words is not None:
            found.add(owner[words])
        at += 1 if words is None else len(words)
    return "both" if len(found) == 2 else found.pop() if found else "neither"


def _name_at(said: Sequence[str], at: int, longest_first: Sequence[tuple[str, ...]]) -> tuple[str, ...] | None:
    """The longest name that the words from a place on say, itself before in the plural."""
    best: tuple[str, ...] | None = None
    for words in longest_first:
        if best is not None and len(words) < len(best):
            break
        here = tuple(said[at : at + len(words)])
        if here == words:
            return words
        if best is None and here[:-1] == words[:-1] and len(here) == len(words) and here[-1] in _plurals(words[-1]):
            best = words
    return best


def _plurals(word: str) -> tuple[str, ...]:
    return (f"{word}s", f"{word}es", f"{word[:-1]}ies" if word.endswith("y") else f"{word}s")


def _word_names(names: Iterable[str]) -> set[tuple[str, ...]]:
    """Names as sequences of lower-case words; the two parts of one with brackets are names of their own."""
    parts = (tuple(_WORD.findall(part.lower())) for name in names for part in _parts(name))
    return {words for words in parts if words}


def _parts(name: str) -> list[str]:
    """A name as it is written in a sentence; `bow_(decorative_ribbons)` is two."""
    if "(" not in name:
        return [_spaced(name)]
    before, inside, *more = name.split("(")
    if more or ")" not in name:
        raise ClocError(f"'{name}' is no name of LVIS: its brackets do not pair up", remedy="Mend the question file.")
    return [_spaced(before), _spaced(inside.replace(")", ""))]


def _spaced(name: str) -> str:
    return name.replace("_", " ").strip()
