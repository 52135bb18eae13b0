"""Statistics of texts that add up over parts of a data set: how many, how long, of which scripts, how often repeated.

Which texts repeat is known by 64-bit hashes of the texts without case and surplus spaces, 16 bytes a text: no text is
kept. Two different texts share a hash once in 2^64 pairs.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from cloc_mllm.data.inspection.faults import SampleView, regions_of

CAPTIONS, REGION_TEXTS = "captions", "region texts"
GROUPS = (CAPTIONS, REGION_TEXTS, "user's turns", "assistant's turns", "system messages", "answers", "conversations")
"""Groups of texts; the last holds each conversation's turns as one text."""

FLAWS = {
    "control characters": "holds characters that no one can see (controls, zero-width, directions of writing)",
    "replacement characters": "holds U+FFFD: it was decoded with the wrong encoding once",
    "surrounding spaces": "begins or ends with a space",
    "markup": "holds HTML tags or entities",
    "web address": "holds a web address",
}
"""What may be odd about a text, and how it is said of one."""

_MARKUP = re.compile(r"</?(?!region>)[a-zA-Z][^<>]*>|&(?:[a-zA-Z]{2,8}|#\d{2,6});")
_HARMLESS = "\n\t\r\u200c\u200d"  # the last two join or part letters of Persian and Hindi, and parts of emoji
_ADDRESS = re.compile(r"\bhttps?://|\bwww\.", re.I)
_SCRIPT_WORDS = {"FULLWIDTH": "LATIN", "HALFWIDTH": "KATAKANA", "IDEOGRAPHIC": "CJK"}


def normalized(text: str) -> str:
    """A text without case and surplus spaces: what two texts are compared by."""
    return " ".join(text.casefold().split())


def text_key(text: str) -> int:
    """The hash by which a text is known."""
    found = hashlib.blake2b(normalized(text).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(found, "little")


def texts_of(view: SampleView) -> Iterator[tuple[str, str]]:
    """The texts of a sample, each with its group; what is no text is left to the checks."""
    sample = view.sample
    if view.kind == "region-text":
        captions = sample.get("captions")
        if not isinstance(captions, (list, tuple)) or not captions:
            captions = [sample.get("caption")]
        yield from ((CAPTIONS, text) for text in captions if isinstance(text, str))
        yield from ((REGION_TEXTS, region.text) for region in regions_of(view) if region.text is not None)
        return
    names = {"user": "user's turns", "assistant": "assistant's turns", "system": "system messages"}
    turns = []
    for message in view.messages:
        role = message.get("role") if isinstance(message, dict) else None
        if isinstance(role, str) and role in names and (text := turn_text(message.get("content"))):
            turns.append(text)
            yield names[role], text
    if turns:
        yield "conversations", "\n".join(turns)
    if isinstance(sample.get("answer"), str):
        yield "answers", sample["answer"]


def turn_text(content: Any) -> str:
    """The text of a message's content, `<region>` where it has a region, images left out."""
    if isinstance(content, str):
        return content
    parts = []
    for item in content if isinstance(content, (list, tuple)) else ():
        if isinstance(item, dict) and item.get("type") == "text" and isinstance(item.get("text"), str):
            parts.append(item["text"])
        elif isinstance(item, dict) and item.get("type") == "region":
            parts.append("<region>")
    return "".join(parts)


def flaws_of(text: str) -> list[str]:
    """Which of `FLAWS` a text has."""
    found = []
    if not text.isprintable():
        kinds = {character: unicodedata.category(character) for character in set(text) if not character.isprintable()}
        if any(kind in ("Cc", "Cf", "Cs") and character not in _HARMLESS for character, kind in kinds.items()):
            found.append("control characters")
    if "\ufffd" in text:
        found.append("replacement characters")
    if text != text.strip():
        found.append("surrounding spaces")
    if ("<" in text or "&" in text) and _MARKUP.search(text):
        found.append("markup")
    if _ADDRESS.search(text):
        found.append("web address")
    return found


@lru_cache(maxsize=1 << 16)
def _script(character: str) -> str | None:
    """The script of a letter, told by its Unicode name; None for anything else."""
    if not character.isalpha():
        return None
    first = unicodedata.name(character, "UNKNOWN").split(" ")[0].split("-")[0]
    return _SCRIPT_WORDS.get(first, first).lower()


def scripts_of(text: str) -> set[str]:
    """The scripts that a text's letters are of: "latin", "cyrillic", "cjk", ….

    ``ª`` and ``º``, whose names tell none, are Latin's.
    """
    if text.isascii():
        return {"latin"} if any(character.isalpha() for character in text) else set()
    found = {script for character in set(text) if (script := _script(character)) is not None}
    return {"latin" if script in ("feminine", "masculine") else script for script in found}


@dataclass
class TextTally:
    """Counts of one group of texts.

    Attributes:
        count: Number of texts.
        blank: Texts of nothing but spaces; they count nowhere else.
        characters: Number of texts of each length in characters.
        words: The same in words, parts between spaces.
        tokens: The same in tokens, special ones included; empty without a tokenizer.
        scripts: Texts that have letters of a script.
        flaws: Texts that have a flaw of `FLAWS`.
        keys: Hash of every text.
        samples: The sample of every text, numbered over the whole set.
    """

    count: int = 0
    blank: int = 0
    characters: Counter[int] = field(default_factory=Counter)
    words: Counter[int] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)
    scripts: Counter[str] = field(default_factory=Counter)
    flaws: Counter[str] = field(default_factory=Counter)
    keys: array[int] = field(default_factory=lambda: array("Q"))
    samples: array[int] = field(default_factory=lambda: array("q"))

    def add(self, text: str, sample: int, keyed: bool = True) -> list[str]:
        """Count a text; return its flaws."""
        self.count += 1
        if not text.strip():
            self.blank += 1
            return []
        self.characters[len(text)] += 1
        self.words[len(text.split())] += 1
        self.scripts.update(scripts_of(text))
        found = flaws_of(text)
        self.flaws.update(found)
        if keyed:
            self.keys.append(text_key(text))
            self.samples.append(sample)
        return found

    def merge(self, other: TextTally) -> None:
        """Add the counts of another part of the set, which comes after this one."""
        self.count += other.count
        self.blank += other.blank
        for name in ("characters", "words", "tokens", "scripts", "flaws"):
            getattr(self, name).update(getattr(other, name))
        self.keys.extend(other.keys)
        self.samples.extend(other.samples)

    def distinct(self) -> int:
        """Number of different texts."""
        return len(np.unique(np.array(self.keys, np.uint64)))

    def most_frequent(self, count: int) -> list[tuple[int, int, int]]:
        """The texts that occur most often: hash, number, and the first sample that has one."""
        keys, first, number = np.unique(np.array(self.keys, np.uint64), return_index=True, return_counts=True)
        order = np.lexsort((first, -number))[:count]
        return [(int(keys[k]), int(number[k]), int(self.samples[int(first[k])])) for k in order]


def token_counts(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Tokens of each text, special ones included, nothing cut off."""
    if not texts:
        return []
    return [len(ids) for ids in tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]]


def histogram_summary(histogram: Counter[int]) -> dict[str, float | int]:
    """Number, mean, median, 95th and 99th percentile, least and most of what a histogram counted."""
    if not histogram:
        return {"count": 0}
    values = np.array(sorted(histogram), np.int64)
    numbers = np.array([histogram[int(value)] for value in values], np.int64)
    ends = np.cumsum(numbers)
    total = int(ends[-1])

    def quantile(share: float) -> int:
        return int(values[np.searchsorted(ends, share * total, side="left")])

    mean = round(float((values * numbers).sum() / total), 2)
    found: dict[str, float | int] = {"count": total, "mean": mean, "median": quantile(0.5)}
    return found | {"p95": quantile(0.95), "p99": quantile(0.99), "min": int(values[0]), "max": int(values[-1])}


def over(histogram: Counter[int], limit: int) -> int:
    """How many of what a histogram counted are above a limit."""
    return sum(number for value, number in histogram.items() if value > limit)


def matching_texts(view: SampleView, keys: npt.NDArray[np.uint64] | set[int]) -> Iterator[tuple[str, str, int]]:
    """Group, text and hash of the texts of a sample whose hash is among some."""
    wanted = keys if isinstance(keys, set) else {int(key) for key in keys}
    for group, text in texts_of(view):
        key = text_key(text)
        if key in wanted:
            yield group, text, key
