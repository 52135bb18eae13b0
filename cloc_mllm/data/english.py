"""The little English that questions about names need: articles, plurals, and which words say the same.

Names in data sets are nouns ("traffic light", "scissors", "cup of coffee"); what the rules and their lists of
exceptions do not know is treated as a regular, countable noun. Phrases in other languages pass through unharmed.
"""

from __future__ import annotations

import re

_DETERMINER = re.compile(
    r"^(?:an?|the|some|any|one|two|three|four|five|six|several|many|both|another|each|every|no"
    r"|his|her|its|their|my|your|our|this|that|these|those)\s+",
    re.IGNORECASE,
)
_ARTICLE = re.compile(r"^(?:an?|the)\s+", re.IGNORECASE)
_BEHIND_HEAD = re.compile(
    r"\s+(?:of|in|on|at|with|without|for|from|to|by|near|behind|under|over|beside|between|above|below|next|and|that|which"
    r"|who|is|are)\b.*$",
    re.IGNORECASE,
)
_SAID_AS_CONSONANT = re.compile(
    r"(?:uni(?!n|m)|us[ae]|ut[eio]|eu|ewe|one\b|once|u\b|ufo|urin|uran|ukulele)", re.IGNORECASE
)
_SILENT_H = re.compile(r"(?:hour(?!i)|honest|honou?r|heir)", re.IGNORECASE)
_SPELT_OUT = re.compile(r"[A-Z]+(?![A-Za-z])")
_IRREGULAR = {
    "person": "people",
    "child": "children",
    "foot": "feet",
    "tooth": "teeth",
    "goose": "geese",
    "mouse": "mice",
    "ox": "oxen",
    "die": "dice",
    "cactus": "cacti",
    **{word: f"{word[:-1]}ves" for word in ("leaf", "loaf", "shelf", "wolf", "calf", "half", "thief", "scarf")},
    **{word: f"{word[:-2]}ves" for word in ("knife", "wife", "life")},
    **{word: f"{word}es" for word in ("potato", "tomato", "hero", "mango", "volcano")},
}
_SINGULARS = {plural: singular for singular, plural in _IRREGULAR.items()} | {
    f"{word}s": word for word in ("bikini", "kiwi", "menu", "taxi", "zucchini")
}
_UNCHANGED = frozenset(["sheep", "deer", "fish", "moose", "bison", "aircraft", "salmon", "shrimp", "squid", "swine"])
_PLURAL_ONLY = frozenset(
    ["binoculars", "clothes", "glasses", "goggles", "headphones", "jeans", "leggings", "pajamas", "pants", "pliers"]
).union(["scissors", "shorts", "skis", "spectacles", "stairs", "sunglasses", "tights", "tongs", "trousers", "tweezers"])
_MASS = frozenset(
    ["bread", "broccoli", "butter", "cheese", "cereal", "clothing", "coffee", "corn", "fire", "fog", "food", "fruit"]
).union(
    ["furniture", "garlic", "grass", "hair", "ice", "jewelry", "juice", "lettuce", "luggage", "meat", "milk"],
    [
        "mud",
        "paper",
        "pasta",
        "rice",
        "salt",
        "sand",
        "smoke",
        "snow",
        "soup",
        "spaghetti",
        "spinach",
        "steam",
        "sugar",
    ],
    ["tea", "tinfoil", "toast", "toilet paper", "traffic", "water", "wine", "wood"],
)
_NOT_PLURAL = ("ss", "us", "is")
_NO_PLURALS = frozenset(
    ["atlas", "bias", "canvas", "christmas", "gas", "has", "lens", "news", "series", "species", "was", "yes"]
)
_IN_IE = frozenset(["cookies", "movies", "brownies", "smoothies", "zombies", "selfies", "hoodies", "collies", "genies"])
_IN_SES = frozenset(["buses", "gases", "viruses", "octopuses", "walruses", "cactuses"])
_PERSONS = frozenset(
    ["person", "man", "woman", "boy", "girl", "child", "kid", "guy", "lady", "baby", "human", "player", "adult"]
)


def without_article(phrase: str) -> str:
    """`phrase` without an article in front.

    >>> without_article("The red cube")
    'red cube'
    """
    return _ARTICLE.sub("", phrase.strip())


def head(phrase: str) -> str:
    """The noun that a phrase is about, in lower case: the last word before a preposition.

    >>> head("a cup of coffee on the table")
    'cup'
    """
    words = _BEHIND_HEAD.sub("", without_article(phrase)).split()
    return words[-1].lower() if words else ""


def is_plural(phrase: str) -> bool:
    """Whether a phrase speaks of several things, or of one that English treats so ("scissors")."""
    word = head(phrase)
    return word in _PLURAL_ONLY or singular(word) != word


def is_mass(phrase: str) -> bool:
    """Whether a phrase names something that is not counted ("broccoli")."""
    return head(phrase) in _MASS or without_article(phrase).lower() in _MASS


def plural(phrase: str) -> str:
    """The plural of a name; one that already speaks of several, or cannot be counted, stays.

    >>> plural("traffic light"), plural("cup of coffee"), plural("scissors"), plural("fireman")
    ('traffic lights', 'cups of coffee', 'scissors', 'firemen')
    """
    phrase, word = without_article(phrase), head(phrase)
    if not word.isascii() or not word or is_plural(phrase) or is_mass(phrase) or word in _UNCHANGED:
        return phrase
    tail = _BEHIND_HEAD.search(phrase)
    front, behind = (phrase, "") if tail is None else (phrase[: tail.start()], phrase[tail.start() :])
    said, several = front.rstrip(), _plural_word(word)
    # "TV" becomes "TVs", "Berry" "Berries": only letters that change are written anew, in lower case.
    kept = next((k for k, letter in enumerate(word) if not several.startswith(letter, k)), len(word))
    return f"{said[: len(said) - len(word) + kept]}{several[kept:]}{behind}"


def _plural_word(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith("man") and word not in ("human", "german", "talisman", "ottoman"):
        return f"{word[:-3]}men"
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return f"{word}es"
    return f"{word[:-1]}ies" if re.search(r"[^aeiou]y$", word) else f"{word}s"


def singular(word: str) -> str:
    """A word as it is said of one thing; what is no plural stays.

    >>> [singular(word) for word in ("dogs", "buses", "berries", "women", "cross", "skis")]
    ['dog', 'bus', 'berry', 'woman', 'cross', 'skis']
    """
    if word in _SINGULARS:
        return _SINGULARS[word]
    if word.endswith("men") and word not in ("omen", "abdomen", "specimen", "regimen"):
        return f"{word[:-2]}an"
    if word in _PLURAL_ONLY | _NO_PLURALS or len(word) < 3 or not word.endswith("s") or word.endswith(_NOT_PLURAL):
        return word
    if word.endswith("ies") and len(word) > 4 and word not in _IN_IE:
        return f"{word[:-3]}y"
    return word[:-2] if word.endswith(("sses", "xes", "zzes", "ches", "shes")) or word in _IN_SES else word[:-1]


def with_article(phrase: str) -> str:
    """`phrase` with the indefinite article that fits it, if it takes one and has no other determiner.

    >>> [with_article(name) for name in ("apple", "dog", "uniform", "hourglass", "scissors", "broccoli", "his hat")]
    ['an apple', 'a dog', 'a uniform', 'an hourglass', 'scissors', 'broccoli', 'his hat']
    """
    phrase = phrase.strip()
    if not phrase or not phrase[0].isascii() or _DETERMINER.match(phrase) or is_plural(phrase) or is_mass(phrase):
        return phrase
    return f"{'an' if _vowel_sound(phrase) else 'a'} {phrase}"


def _vowel_sound(phrase: str) -> bool:
    if spelt := _SPELT_OUT.match(phrase):  # "an LCD screen", "a TV", "an X-ray"
        return spelt.group()[0] in "AEFHILMNORSX"
    if _SILENT_H.match(phrase):
        return True
    return phrase[0].lower() in "aeiou" and not _SAID_AS_CONSONANT.match(phrase)


SMALL_WORDS = frozenset(
    ["a", "an", "and", "at", "by", "for", "from", "her", "his", "in", "is", "it", "its", "of", "on", "one", "or", "the"]
).union(["their", "this", "to", "two", "with"])
"""Words that two phrases may share without being about the same."""


def content_words(text: str) -> set[str]:
    """The words of a text that say what it is about, in lower case and singular; all words for persons are one.

    >>> sorted(content_words("Two women on the striped benches"))
    ['bench', 'person', 'striped']
    """
    words = (singular(word) for word in re.findall(r"\w+", text.lower()) if word not in SMALL_WORDS)
    return {"person" if word in _PERSONS else word for word in words}
