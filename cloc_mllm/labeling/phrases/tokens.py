"""Captions cut into sentences and words, without corpora; what one phrase is and when two are the same.

Words are cut as the Penn Treebank has them, on which the taggers were trained: `'s` and `n't` stand apart, hyphens
stay inside.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache

from cloc_mllm.labeling.phrases.words import DETERMINERS, GENERIC_WORDS, STOP_WORDS

Caption = str
Words = list[str]

LONGEST_WORD = 40
"""Letters of a word; what is longer is a code or a mishap, not a name of something."""

LONGEST_SENTENCE = 200
"""Words after which a sentence is cut, before a determiner or a sign, where no phrase is cut in two; at twice as many
anywhere. Tags depend on a few neighbours only, and a tagger's memory grows with the length.
"""

_TOKEN = re.compile(
    r"""
    (?P<link>   https?://\S+ | www\.\S+ | \S+@\S+\.\w+ | \w[\w-]*\.(?:jpe?g|png|gif|webp|bmp|tiff?|svg|html?|pdf)\b )
  | (?P<number> \d+ (?:[.,:/]\d+)+ )
  | (?P<word>   [^\W_]+ (?:['-][^\W_]+)* )
  | (?P<stop>   [.!?;\n]+ )
  | (?P<other>  \S )
    """,
    re.VERBOSE,
)
_CLITIC = re.compile(r"(?<=\w)('s|'re|'ve|'ll|'d|'m|n't)$")
_APOSTROPHES = str.maketrans(dict.fromkeys("’‘ʼ`´", "'"))
_HYPHENS = str.maketrans(dict.fromkeys("‐‑‒", "-"))
BREAK = "|"
"""Stands where something was dropped, so that its neighbours do not become one phrase."""


def normalise(text: str) -> str:
    """A caption in one spelling: lower case, composed letters, plain apostrophes and hyphens, no control characters.

    Line breaks stay: they end a sentence. Invisible characters (soft hyphens, joiners, marks of direction) vanish,
    other control characters become blanks, and so does what is no valid Unicode.
    """
    composed = unicodedata.normalize("NFKC", text).translate(_APOSTROPHES).translate(_HYPHENS)
    return unicodedata.normalize("NFC", "".join(map(_visible, composed)).lower())


def _visible(character: str) -> str:
    if character in "\n\r\u2028\u2029":
        return "\n"
    category = unicodedata.category(character)
    if category == "Cf":
        return ""
    return " " if category.startswith(("C", "Z")) else character


def sentences(caption: Caption) -> Iterator[Words]:
    """The words of each sentence of a caption, punctuation included, generic words and addresses as `BREAK`."""
    words: Words = []
    for match in _TOKEN.finditer(normalise(caption)):
        if match.lastgroup == "stop":
            if words:
                yield words
            words = []
            continue
        found = [BREAK] if match.lastgroup == "link" else _split_clitic(match[0])
        if len(words) >= LONGEST_SENTENCE and (_begins_anew(found[0]) or len(words) >= 2 * LONGEST_SENTENCE):
            yield words
            words = []
        words += [BREAK if word in GENERIC_WORDS else word for word in found]
    if words:
        yield words


def _begins_anew(word: str) -> bool:
    return word in DETERMINERS or not is_readable(word)


def _split_clitic(word: str) -> Words:
    cut = _CLITIC.search(word)
    return [word[: cut.start()], cut[0]] if cut else [word]


@lru_cache(maxsize=65536)
def is_readable(word: str) -> bool:
    """Whether a word is one that may be English, digits allowed: taggers of English take all others for nouns."""
    letters = [character for character in word if character.isalpha()]
    latin = all(unicodedata.name(letter, "").startswith("LATIN") for letter in letters)
    return bool(letters) and latin and len(word) <= LONGEST_WORD


def key_of(words: Sequence[str]) -> tuple[str, ...]:
    """What two phrases share that are the same: their words without leading determiners."""
    for start, word in enumerate(words):
        if word not in DETERMINERS:
            return tuple(words[start:])
    return ()


def says_something(words: Iterable[str]) -> bool:
    """Whether there is a word that is no stop word and has a letter."""
    return any(word not in STOP_WORDS and is_readable(word) for word in words)


def collect(candidates: Iterable[Sequence[str]], keep: Callable[[Sequence[str]], bool] = says_something) -> list[str]:
    """The distinct phrases among candidates, in order; of those that are the same the first spelling stays.

    Args:
        candidates: The words of each.
        keep: Which may stay.
    """
    found: dict[tuple[str, ...], str] = {}
    for words in candidates:
        if keep(words):
            found.setdefault(key_of(words), " ".join(words))
    return list(found.values())
