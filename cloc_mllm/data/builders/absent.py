"""Names of things that a picture does not show, drawn from what other pictures of the set do.

A name may be asked for in vain if it shares no word with anything said of the picture. That is stricter than it need be
and still only as good as the annotations: where a set does not annotate everything, the thing may be there.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from cloc_mllm.data.builders.picture import Picture
from cloc_mllm.data.english import content_words, without_article
from cloc_mllm.data.readers import SampleSource
from cloc_mllm.errors import ClocError

WAYS = ("random", "popular", "adversarial")
"""How absent names are drawn, called as POPE calls them: all alike; as often as they occur; those first that occur
together with what the picture shows."""

_SAMPLED, _KEPT, _WORDS, _DRAWS, _NEAREST = 20_000, 2_000, 4, 64, 10


class Vocabulary:
    """The most frequent names of a set, and which occur together.

    Args:
        pictures: The distinct names of each picture, in lower case.

    Attributes:
        names: Name to the number of pictures that show it, the most frequent first.
    """

    def __init__(self, pictures: Iterable[list[str]]) -> None:
        listed = [sorted(set(names)) for names in pictures]
        counted = Counter(itertools.chain.from_iterable(listed))
        ranked = sorted(counted.items(), key=lambda item: (-item[1], item[0]))[:_KEPT]
        self.names = dict(ranked)
        self._together: dict[str, Counter[str]] = {}
        for names in listed:
            known = [name for name in names if name in self.names]
            for name in known:
                self._together.setdefault(name, Counter()).update(other for other in known if other != name)
        self._list = list(self.names)
        self._running = list(itertools.accumulate(self.names.values()))

    @classmethod
    def of(cls, source: SampleSource, seed: int) -> Vocabulary:
        """The vocabulary of a source, from at most twenty thousand of its samples, whatever its size.

        Samples that cannot be read or are malformed teach nothing here; they are refused or counted when their turn
        comes.
        """
        numbers: Iterable[int] = range(len(source))
        if len(source) > _SAMPLED:
            numbers = sorted(random.Random(f"{seed}-vocabulary").sample(range(len(source)), _SAMPLED))
        return cls(_names(source, number) for number in numbers)

    def absent(self, picture: Picture, way: str, taken: set[str], draw: random.Random) -> str | None:
        """A name of something that is not on a picture.

        Args:
            picture: The picture.
            way: One of :data:`WAYS`.
            taken: Names that may not be drawn again.
            draw: Decides.

        Returns:
            The name, or `None` if none was found.
        """
        if not self._list:
            return None
        here = picture.words()

        def free(name: str) -> bool:
            return name not in taken and not content_words(name) & here

        if way == "adversarial":
            near: Counter[str] = Counter()
            for thing in picture.things:
                for text in thing.texts:
                    near.update(self._together.get(_key(text), {}))
            ranked = (name for name, _ in sorted(near.items(), key=lambda item: (-item[1], item[0])) if free(name))
            if nearest := list(itertools.islice(ranked, _NEAREST)):
                return draw.choice(nearest)
        for _ in range(_DRAWS):
            weights = None if way == "random" else self._running
            (name,) = draw.choices(self._list, cum_weights=weights)
            if free(name):
                return name
        return None


def _key(text: str) -> str:
    return without_article(text).lower()


def is_name(text: str) -> bool:
    """Whether a text is short enough to ask for it, and says what it is on its own ("his hat" does not)."""
    words = _key(text).split()
    return 0 < len(words) <= _WORDS and words[0] not in _POINTING and bool(content_words(text))


_POINTING = frozenset(["his", "her", "its", "their", "my", "your", "our", "this", "that", "these", "those", "other"])


def _names(source: SampleSource, number: int) -> list[str]:
    try:
        regions: Any = source[number].get("regions")
    except ClocError:
        return []
    listed = regions if isinstance(regions, list) else []
    texts = [region.get("text") for region in listed if isinstance(region, Mapping)]
    return [_key(text) for text in texts if isinstance(text, str) and is_name(text)]
