"""Articles, plurals and words: names as data sets have them, and whatever else a text may hold."""

from __future__ import annotations

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloc_mllm.data import english, phrases
from cloc_mllm.data.builders import templates
from cloc_mllm.data.builders.absent import is_name
from cloc_mllm.data.builders.templates import WORDINGS, worded
from cloc_mllm.data.english import content_words, is_plural, plural, singular, with_article, without_article
from cloc_mllm.models.answer_text import absent_answer, absent_phrases, phrase_before

NAMES = [
    ("person", "a person", "people"),
    ("fireman", "a fireman", "firemen"),
    ("bus", "a bus", "buses"),
    ("cross", "a cross", "crosses"),
    ("hourglass", "an hourglass", "hourglasses"),
    ("wine glass", "a wine glass", "wine glasses"),
    ("knife", "a knife", "knives"),
    ("giraffe", "a giraffe", "giraffes"),
    ("berry", "a berry", "berries"),
    ("cookie", "a cookie", "cookies"),
    ("monkey", "a monkey", "monkeys"),
    ("potato", "a potato", "potatoes"),
    ("sheep", "a sheep", "sheep"),
    ("scissors", "scissors", "scissors"),
    ("skis", "skis", "skis"),
    ("broccoli", "broccoli", "broccoli"),
    ("cup of coffee", "a cup of coffee", "cups of coffee"),
    ("woman in red", "a woman in red", "women in red"),
    ("umbrella", "an umbrella", "umbrellas"),
    ("uniform", "a uniform", "uniforms"),
    ("LCD screen", "an LCD screen", "LCD screens"),
    ("TV", "a TV", "TVs"),
    ("X-ray", "an X-ray", "X-rays"),
    ("猫", "猫", "猫"),
]


@pytest.mark.parametrize(("name", "one", "several"), NAMES, ids=[name for name, *_ in NAMES])
def test_names(name: str, one: str, several: str) -> None:
    assert with_article(name) == one
    assert with_article(one) == one
    assert plural(name) == plural(one) == several
    assert plural(several) == several
    assert without_article(one) == name
    if " " not in name and name.isascii() and name != "sheep":
        assert singular(several) == name


@pytest.mark.parametrize("module", [english, phrases, templates])
def test_examples(module: object) -> None:
    found = doctest.testmod(module)  # type: ignore[arg-type]
    assert found.attempted > 0
    assert found.failed == 0


@given(st.text(max_size=30))
def test_any_text_passes_through(text: str) -> None:
    assert with_article(text).endswith(text.strip())
    assert plural(text).startswith(without_article(text)[:1].strip())
    is_plural(text)
    is_name(text)
    content_words(text)
    for wording in WORDINGS.values():
        for template in wording.questions + wording.answers:
            worded(template, text)


def test_words_that_say_the_same() -> None:
    assert content_words("a man on the bench") == content_words("People, benches")
    assert not content_words("the of") | content_words("")


nouns = st.sampled_from([name for name, *_ in NAMES] + ["red cube", "a large green ring", "the dog", "men", "two dogs"])


@given(nouns)
def test_wording_can_be_read_back(name: str) -> None:
    """What an answer says is what the reader of answers finds in it; and no brace is left."""
    bare = without_article(name)
    for what in ("find what is absent", "is there, no"):
        for answer in WORDINGS[what].answers:
            assert absent_phrases(worded(answer, name)) == ([bare] if "{" in answer else [])
    for what in ("find", "find every", "list"):
        for answer in WORDINGS[what].answers:
            before, _, behind = worded(answer, name).partition("<region>")
            assert phrase_before(before) == name
            assert behind == ""
    for what, wording in WORDINGS.items():
        assert not any("{" in worded(text, name) for text in wording.questions + wording.answers), what
    if not is_plural(name):
        assert worded(WORDINGS["find what is absent"].answers[0], name) == absent_answer(bare)


def test_number_agrees() -> None:
    assert worded("Where is the {phrase}?", "scissors") == "Where are the scissors?"
    assert worded("What is the location of the {phrase}?", "skis") == "What is the location of the skis?"
    assert worded("Where is every {phrase}?", "the men") == "Where are all men?"
    assert worded("Point out each {phrase}.", "broccoli") == "Point out all the broccoli."
    assert worded("Find the {phrase}.", "his hat") == "Find his hat."
    assert worded("{text}", "{phrase}") == "{phrase}"


def test_letters_that_stay_keep_their_case() -> None:
    said = [plural(word) for word in ("TV", "BY", "Berry", "Fireman", "Teddy Bear")]
    assert said == ["TVs", "Bies", "Berries", "Firemen", "Teddy Bears"]
