"""The paper's phrases: noun phrases by a grammar over the tags of words.

After CLOC (arXiv 2410.02746): lower-case, cut into words, drop generic words, tag, chunk
`NP: {<DT>?<JJ.*>*<NN.*>+}`, drop phrases of stop words alone, keep the first 20 of a picture. The paper is silent on
the rest, and this is ours: a phrase does not reach over a place where a generic word was dropped ("the background
wall" gives "wall", not "the wall"); words that are not in Latin letters are no nouns; "no people" is no phrase; two
phrases that differ in leading determiners only are one, and keep the first's spelling. A picture's captions are read
in order.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Protocol

from pydantic import PositiveInt

from cloc_mllm.errors import ClocError
from cloc_mllm.labeling.phrases.tokens import BREAK, Words, collect, is_readable, sentences
from cloc_mllm.labeling.phrases.words import DETERMINERS, GENERIC_WORDS, NEGATIONS, STOP_WORDS
from cloc_mllm.labeling.stage_options import StageOptions, digest_of, no_argument, read_options
from cloc_mllm.labeling.stages import PhraseExtractor

GRAMMAR = "<DT>?<JJ.*>*<NN.*>+"
_CHUNK = re.compile("D?J*N+")
_SYMBOL = {"DT": "D", "JJ": "J", "NN": "N"}
SPACY_MODEL = "en_core_web_sm"
_ARTICLES = frozenset({"a", "an", "the", "another", "every"})
"""Those that cannot stand for a noun themselves, as "that" and "some" can."""

_QUANTITIES = STOP_WORDS | {"several"}
"""Adjectives that can: "several sit on a bench"."""


class NounPhraseOptions(StageOptions):
    """Options of `textblob` and `spacy`.

    Attributes:
        max_phrases: Most phrases of a picture; the paper keeps 20.
    """

    max_phrases: PositiveInt = 20


class Tagger(Protocol):
    """Tells the parts of speech in Penn Treebank's tags."""

    def tag(self, sentences: Sequence[Words]) -> list[list[str]]:
        """The tag of each word of each sentence."""
        ...

    def identity(self) -> Mapping[str, Any]:
        """What the tags depend on."""
        ...


class TextBlobTagger:
    """The tagger of TextBlob's `pattern`: a lexicon and rules inside the package, no corpora to download.

    The lexicon knows words as newspapers use them, where "sink", "bear" and "stop" are verbs. So we mend what cannot be
    in English: a finite verb straight after an article, a possessive or an adjective, or one in -s after a number.
    """

    def __init__(self) -> None:
        try:
            self._tag = importlib.import_module("textblob.en").tag
        except ImportError as error:
            raise ClocError("'textblob' needs the package textblob", remedy="pip install 'cloc-mllm[label]'") from error

    def tag(self, sentences: Sequence[Words]) -> list[list[str]]:
        """The tag of each word of each sentence."""
        return [
            mend_verbs(words, [tag for _, tag in self._tag(" ".join(words), tokenize=False)]) for words in sentences
        ]

    def identity(self) -> Mapping[str, Any]:
        """Name and version."""
        return {"name": "textblob", "version": version("textblob"), "verbs_mended": True}


def mend_verbs(words: Sequence[str], tags: Sequence[str]) -> list[str]:
    """Make nouns of finite verbs that stand where none can.

    Args:
        words: The words of a sentence, lower-cased.
        tags: The tag of each.
    """
    mended = list(tags)
    for k in range(1, len(mended)):
        if mended[k] not in ("VB", "VBP", "VBZ") or words[k] in STOP_WORDS:
            continue
        before, word = mended[k - 1], words[k - 1]
        modified = before in ("PRP$", "POS") or (before.startswith("JJ") and word not in _QUANTITIES)
        counted = before == "CD" and word not in ("1", "one") and mended[k] == "VBZ"
        if word in _ARTICLES or modified or counted:
            mended[k] = "NNS" if mended[k] == "VBZ" else "NN"
    return mended


class SpacyTagger:
    """The tagger of an installed spaCy package.

    Args:
        model: Name of the package, such as `en_core_web_sm`, or a folder.
    """

    def __init__(self, model: str) -> None:
        try:
            spacy = importlib.import_module("spacy")
        except ImportError as error:
            remedy = f"pip install spacy && python -m spacy download {SPACY_MODEL}"
            raise ClocError("'spacy' needs the package spacy", remedy=remedy) from error
        unused = ["parser", "senter", "ner", "lemmatizer", "attribute_ruler"]
        try:
            self._nlp = spacy.load(model, exclude=unused)
        except OSError as error:
            remedy = f"python -m spacy download {model}, or name a package you have: spacy:NAME"
            raise ClocError(f"spaCy has no package '{model}'", remedy=remedy) from error
        if not self._nlp.has_pipe("tagger"):
            problem = f"spaCy's package '{model}' has no tagger"
            raise ClocError(problem, remedy=f"Take one for English, such as {SPACY_MODEL}.")
        self._doc = importlib.import_module("spacy.tokens").Doc

    def tag(self, sentences: Sequence[Words]) -> list[list[str]]:
        """The tag of each word of each sentence."""
        docs = (self._doc(self._nlp.vocab, words=list(words)) for words in sentences)
        return [[token.tag_ for token in doc] for doc in self._nlp.pipe(docs)]

    def identity(self) -> Mapping[str, Any]:
        """Name and version of the package and of spaCy."""
        meta = self._nlp.meta
        model = f"{meta['lang']}_{meta['name']}"
        return {"name": "spacy", "version": version("spacy"), "model": model, "model_version": meta["version"]}


class NounPhrases:
    """Noun phrases of captions; see the top of this file.

    Args:
        tagger: Who tells the parts of speech.
        options: How many to keep.
    """

    def __init__(self, tagger: Tagger, options: NounPhraseOptions | None = None) -> None:
        self._tagger, self._options = tagger, options or NounPhraseOptions()

    def __call__(self, captions: Sequence[Sequence[str]]) -> list[list[str]]:
        """Extract phrases.

        Args:
            captions: For each picture its captions.

        Returns:
            For each picture its distinct phrases, in order of appearance, lower-cased.
        """
        read = [[words for caption in one for words in sentences(caption)] for one in captions]
        tags = iter(self._tagger.tag([words for one in read for words in one]))
        found = []
        for one in read:
            chunks = [chunk for words in one for chunk in chunk_noun_phrases(words, next(tags))]
            found.append(collect(chunks)[: self._options.max_phrases])
        return found

    def identity(self) -> Mapping[str, Any]:
        """Tagger, grammar, word lists and bounds."""
        return {
            "tagger": dict(self._tagger.identity()),
            "grammar": GRAMMAR,
            "words": digest_of([sorted(words) for words in (GENERIC_WORDS, STOP_WORDS, DETERMINERS, NEGATIONS)]),
            "rules": 1,
            **self._options.model_dump(),
        }


def chunk_noun_phrases(words: Sequence[str], tags: Sequence[str]) -> Iterator[Sequence[str]]:
    """Find `GRAMMAR` in a sentence, from left to right, each as long as can be; what is negated is left out.

    Args:
        words: The words, lower-cased.
        tags: The tag of each.

    Returns:
        The words of each phrase.
    """
    pairs = zip(words, tags, strict=True)
    symbols = "".join(_SYMBOL.get(tag[:2], ".") if word != BREAK and is_readable(word) else "." for word, tag in pairs)
    for match in _CHUNK.finditer(symbols):
        if words[match.start()] not in NEGATIONS:
            yield words[match.start() : match.end()]


def build(name: str, argument: str | None, device: str, options: Mapping[str, Any]) -> PhraseExtractor:
    """Build `textblob` or `spacy[:MODEL]`; both run on the CPU.

    Raises:
        ClocError: The package, or the model's, is not installed, or an option is wrong.
    """
    read = read_options(NounPhraseOptions, options, name)
    if name == "spacy":
        return NounPhrases(SpacyTagger(argument or SPACY_MODEL), read)
    no_argument(name, argument)
    return NounPhrases(TextBlobTagger(), read)
