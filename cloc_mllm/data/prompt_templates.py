"""The sentences that class names are put into for zero-shot recognition.

Source of the 80: the notebook "Prompt engineering for ImageNet" beside CLIP (https://github.com/openai/CLIP), which its
published ImageNet figures rest on. They are written here by their pattern: most come with "a" and with "the".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from cloc_mllm.errors import ClocError

BARE = ("{}",)
SIMPLE = ("a photo of a {}.",)

_PLAIN = [
    "a bad photo of {}.",
    "a black and white photo of {}.",
    "a blurry photo of {}.",
    "a bright photo of {}.",
    "a close-up photo of {}.",
    "a cropped photo of {}.",
    "a dark photo of {}.",
    "a doodle of {}.",
    "a drawing of {}.",
    "a good photo of {}.",
    "a jpeg corrupted photo of {}.",
    "a low resolution photo of {}.",
    "a painting of {}.",
    "a photo of {}.",
    "a pixelated photo of {}.",
    "a rendering of {}.",
    "a rendition of {}.",
    "a sculpture of {}.",
    "a sketch of {}.",
    "a tattoo of {}.",
    "art of {}.",
    "graffiti of {}.",
    "itap of {}.",
    "{} in a video game.",
]
_LOOKS = ("clean", "cool", "dirty", "hard to see", "large", "nice", "small", "weird")
_MADE_OF = ("cartoon", "embroidered", "origami", "plastic", "plushie", "toy")
_ALONE = ("a photo of many {}.", "a photo of my {}.", "a photo of one {}.", "itap of my {}.")


def _eighty() -> Iterator[str]:
    for article in ("a", "the"):
        yield from (sentence.format(f"{article} {{}}") for sentence in _PLAIN)
        yield from (f"a photo of {article} {look} {{}}." for look in _LOOKS)
        yield from (f"{article} {made} {{}}." for made in _MADE_OF)
    yield from _ALONE


IMAGENET = tuple(_eighty())
"""CLIP's 80 templates for ImageNet."""

NAMED = {"bare": BARE, "simple": SIMPLE, "imagenet": IMAGENET}


def templates_of(value: str | Iterable[str]) -> tuple[str, ...]:
    """Return templates by name (``bare``, ``simple``, ``imagenet``), or as they are given.

    Raises:
        ClocError: There is no such name, or a template does not say once where the class's name goes.
    """
    if isinstance(value, str):
        if value not in NAMED:
            raise ClocError(f"there are no templates '{value}'", remedy=f"Name {', '.join(NAMED)}, or list your own.")
        return NAMED[value]
    templates = tuple(value)
    for template in templates:
        if not isinstance(template, str) or template.count("{}") != 1 or set(template.replace("{}", "")) & set("{}"):
            raise ClocError(f"the template {template!r} must hold {{}} once, where the class's name goes")
    if not templates:
        raise ClocError("give at least one template")
    return templates
