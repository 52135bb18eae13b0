"""The baseline of the paper's ablation: all n-grams of a text, no grammar.

The paper has "alt-text n-grams" in VESL's place, as OWLv2's training data (arXiv 2306.09683) come from, and leaves the
rest open. Here: n consecutive words within a sentence with no generic word or punctuation between, n from 1 to
`max_n`; those of stop words alone are dropped, and those that differ in leading determiners only are one. If more than
`max_phrases` are left, as many are taken evenly from all of them: the first ones would all be about the first words.
Of a picture's captions the first `LONGEST_TEXT` words are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import PositiveInt

from cloc_mllm.labeling.phrases.tokens import Words, collect, is_readable, sentences
from cloc_mllm.labeling.phrases.words import DETERMINERS, GENERIC_WORDS, STOP_WORDS
from cloc_mllm.labeling.stage_options import StageOptions, digest_of, no_argument, read_options
from cloc_mllm.labeling.stages import PhraseExtractor

LONGEST_TEXT = 2000
"""Words that are read: each gives up to `max_n` phrases to compare."""


class NgramOptions(StageOptions):
    """Options of `ngrams`.

    Attributes:
        max_n: Most words of a phrase.
        max_phrases: Most phrases of a picture.
    """

    max_n: PositiveInt = 10
    max_phrases: PositiveInt = 100


class Ngrams:
    """All n-grams of captions; see the top of this file.

    Args:
        options: How long and how many.
    """

    def __init__(self, options: NgramOptions | None = None) -> None:
        self._options = options or NgramOptions()

    def __call__(self, captions: Sequence[Sequence[str]]) -> list[list[str]]:
        """Extract phrases.

        Args:
            captions: For each picture its captions.

        Returns:
            For each picture its distinct n-grams, by their first word and then by length, lower-cased.
        """
        return [self._of_picture(one) for one in captions]

    def _of_picture(self, captions: Sequence[str]) -> list[str]:
        found = collect(gram for words in self._read(captions) for gram in ngrams(words, self._options.max_n))
        most = self._options.max_phrases
        if len(found) <= most:
            return found
        return [found[k * len(found) // most] for k in range(most)]

    @staticmethod
    def _read(captions: Sequence[str]) -> Iterator[Words]:
        left = LONGEST_TEXT
        for words in (words for caption in captions for words in sentences(caption)):
            if left <= 0:
                return
            yield words[:left]
            left -= len(words)

    def identity(self) -> Mapping[str, Any]:
        """Word lists and bounds."""
        words = digest_of([sorted(words) for words in (GENERIC_WORDS, STOP_WORDS, DETERMINERS)])
        return {"name": "ngrams", "words": words, "rules": 1, **self._options.model_dump()}


def ngrams(words: Words, max_n: int) -> Iterator[Words]:
    """All runs of 1 to `max_n` words of a sentence that nothing else than words is between."""
    start = 0
    for end in range(len(words) + 1):
        if end == len(words) or not (is_readable(words[end]) or words[end].isdecimal()):
            run = words[start:end]
            yield from (run[i : i + n] for i in range(len(run)) for n in range(1, min(max_n, len(run) - i) + 1))
            start = end + 1


def build(name: str, argument: str | None, device: str, options: Mapping[str, Any]) -> PhraseExtractor:
    """Build `ngrams`; it needs no device.

    Raises:
        ClocError: An option is wrong.
    """
    no_argument(name, argument)
    return Ngrams(read_options(NgramOptions, options, name))
