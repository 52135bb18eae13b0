"""The scorers of referred objects: the published one's recorded decisions, the strict one's rules, hostile texts."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.scoring.referring import OUTCOMES, ferret_right, strict_right, which_named

PUBLISHED = [
    ("It is a cat.", "cat", ("cat", "kitty"), True),
    ("a Cat.", "cat", ("cat",), False),
    ("It belongs to this category.", "cat", ("cat",), True),
    ("It is a dog, not a cat.", "cat", ("cat",), False),
    ("It is not a cat", "cat", ("cat",), True),
    ("It is not a dog, but a cat.", "cat", ("cat",), True),
    ("It is not a dog but a cat.", "cat", ("cat",), False),
    ("No, it is a cat.", "cat", ("cat",), True),
    ("The object is a notebook.", "notebook", ("notebook",), False),
    ("The object is a notebook", "notebook", ("notebook",), True),
    ("notebook.", "notebook", ("notebook",), True),
    ("On the north side, a cat.", "cat", ("cat",), True),
    ("It lies north of the cat.", "cat", ("cat",), False),
    ("There is no dog, the thing is a cat.", "cat", ("cat",), True),
    ("is no not a, dog.", "dog", ("dog",), False),
    ("a cat or a dog", "cat", ("cat",), True),
    ("a baseball bat", "baseball_bat", ("baseball_bat",), True),
    ("a base-ball bat", "baseball_bat", ("baseball_bat",), False),
    ("It is a ribbon bow.", "bow_(decorative_ribbons)", ("bow_(decorative_ribbons)",), True),
    ("decorative ribbons", "bow_(decorative_ribbons)", ("bow_(decorative_ribbons)",), True),
    ("a bow (decorative ribbons)", "bow_(decorative_ribbons)", ("ribbon",), True),
    ("a bow", "bow_(decorative_ribbons)", ("ribbon",), False),
    ("television", "television_set", ("television_set", "tv", "tv_set"), False),
    ("It is a TV.", "television_set", ("television_set", "tv"), False),
    ("dogs", "dog", ("dog",), True),
    ("", "dog", ("dog",), False),
    ("I know. Not a dog.", "dog", ("dog",), True),
    ("nothing. dog", "dog", ("dog",), True),
    ("It shows nothing but a dog.", "dog", ("dog",), False),
    ("It is a dog\tnot\na cat, dog", "cat", ("cat",), False),
    ("a hotdog", "dog", ("dog",), True),
    ("It is a nose, a dog", "nose", ("nose",), False),
]
"""Answers with what the published `eval_lvis.py` decided when it was run on them."""

CAT_OR_DOG = ("cat", ("cat", "kitty"), "hot_dog", ("hot_dog", "wiener"))


@pytest.mark.parametrize(("answer", "name", "synonyms", "right"), PUBLISHED)
def test_the_published_scorers_decisions_are_kept(
    answer: str, name: str, synonyms: tuple[str, ...], right: bool
) -> None:
    assert ferret_right(answer, name, synonyms) is right


@pytest.mark.parametrize(
    ("answer", "pair", "named"),
    [
        ("It is a CAT.", ("cat", (), "dog", ()), "right"),
        ("cats", ("cat", (), "dog", ()), "right"),
        ("puppies", ("cat", (), "dog", ("puppy",)), "other"),
        ("It belongs to this category.", ("cat", (), "dog", ()), "neither"),
        ("a cat or a dog", ("cat", (), "dog", ()), "both"),
        ("It is not a dog but a cat.", ("cat", (), "dog", ()), "right"),
        ("It isn't a dog, it's a cat", ("cat", (), "dog", ()), "right"),
        ("a cat rather than a dog", ("cat", (), "dog", ()), "right"),
        ("Neither a cat nor a dog.", ("cat", (), "dog", ()), "neither"),
        ("It is not a dog.", ("cat", (), "dog", ()), "neither"),
        ("No. A cat.", ("cat", (), "dog", ()), "right"),
        ("The object is a notebook.", ("notebook", (), "cat", ()), "right"),
        ("It lies north of the notebook, a cat", ("cat", (), "dog", ()), "right"),
        ("It is a hot dog.", ("dog", (), "hot_dog", ()), "other"),
        ("a dog with a hot dog", ("dog", (), "hot_dog", ()), "both"),
        ("glasses", ("glass_(drink_container)", (), "spectacles", ("glasses",)), "other"),
        ("two glasses", ("glass_(drink_container)", (), "cat", ()), "right"),
        ("a base-ball bat", ("baseball_bat", ("base_ball_bat",), "cat", ()), "right"),
        ("decorative ribbons", ("bow_(decorative_ribbons)", (), "bow_(weapon)", ()), "right"),
        ("a bow", ("bow_(decorative_ribbons)", (), "bow_(weapon)", ()), "neither"),
        ("", ("cat", (), "dog", ()), "neither"),
    ],
)
def test_strict_wants_whole_words_and_one_name_only(
    answer: str, pair: tuple[str, tuple[str, ...], str, tuple[str, ...]], named: str
) -> None:
    assert which_named(answer, *pair) == named
    assert strict_right(answer, *pair) is (named == "right")


def by_hand(answer: str, name: str, synonyms: tuple[str, ...]) -> bool:
    """The published decisions once more, without a regular expression."""

    def without(text: str, word: str) -> str:
        at = 0
        while at < len(text):
            start = at
            while at < len(text) and text[at].isspace():
                at += 1
            if at > start and text.startswith(word, at):
                ends = [k for k in (text.find(",", at), text.find(".", at)) if k >= 0]
                if ends:
                    text, at = text[:start] + text[min(ends) + 1 :], start
                    # What was joined by the cut is not looked at again from before it.
                    continue
            at = max(at, start + 1)
        return text

    for word in ("not", "no"):
        answer = without(answer, word)
    parts = [part for one in synonyms for part in one.replace(")", "").split("(")]
    return any(one.replace("_", " ").strip() in answer for one in (name, *parts))


PIECES = ("cat", "Cat", "dog", "hot dog", "kitty", "wiener", "not", "no", "notebook", "nor", "but", "isn't", "a")
MARKS = (",", ".", " ", "\n", "\t", "(", ")", "-", "’", "\u00a0", "\u2003", "İ", "é", "\x00")


def check(answer: str) -> None:
    name, synonyms, other, others = CAT_OR_DOG
    assert ferret_right(answer, *CAT_OR_DOG) is by_hand(answer, name, synonyms)
    named = which_named(answer, *CAT_OR_DOG)
    assert named in OUTCOMES
    # The other way round the same is named, and the other name spoils a right answer.
    turned = {"right": "other", "other": "right"}
    assert which_named(answer, other, others, name, synonyms) == turned.get(named, named)
    assert not strict_right(f"{answer} . A wiener.", *CAT_OR_DOG)
    assert strict_right(f"{answer} . A cat.", *CAT_OR_DOG) is (named in ("right", "neither"))


@settings(max_examples=100, deadline=None, database=None)
@given(seed=st.integers(0, 2**32))
def test_ten_thousand_answers_break_no_scorer(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(100):
        words = rng.choices((*PIECES, *MARKS), k=rng.randint(0, 14))
        check("".join(word + rng.choice(("", " ")) for word in words))


@settings(max_examples=300, deadline=None, database=None)
@given(answer=st.text(max_size=60))
def test_any_text_breaks_no_scorer(answer: str) -> None:
    check(answer)


def test_a_long_answer_takes_no_time() -> None:
    for text in (" no" * 3_000, "not " * 3_000, " " * 3_000, "cat " * 3_000, "isn't" * 3_000):
        assert ferret_right(text, *CAT_OR_DOG) is ("cat" in text)
        assert which_named(text, *CAT_OR_DOG) in OUTCOMES


def test_names_with_odd_brackets_are_refused() -> None:
    for name in ("bow_(a", "bow_(a)_(b)"):
        with pytest.raises(ClocError, match="brackets do not pair up"):
            strict_right("a bow", name, (), "dog", ())
        with pytest.raises(ClocError, match="brackets do not pair up"):
            ferret_right("a bow", "cat", (name,))
