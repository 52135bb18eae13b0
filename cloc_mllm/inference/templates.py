"""What is asked on a user's behalf, and, by the names that callers know, how questions with regions become content.

The questions are those that alignment and the procedural scenes teach (``What is <region>?``, ``Where is the ...?``),
and the first of those that `cloc-mllm data build` draws from. A model that was tuned on others is asked best in the
words of its data: pass a :class:`Templates` of your own.
"""

from __future__ import annotations

from dataclasses import dataclass

from cloc_mllm.data.builders import templates
from cloc_mllm.data.english import without_article
from cloc_mllm.data.messages import REGION, is_region, question_items, region_item
from cloc_mllm.errors import ClocError

__all__ = ["REGION", "Templates", "is_region", "question_items", "region_item"]


@dataclass(frozen=True)
class Templates:
    """The questions behind the one-line tasks.

    Attributes:
        describe: Asks for a description of ``<region>``.
        describe_image: Asks for a description of a whole picture.
        refer: Asks what ``<region>`` is.
        ground: Asks where ``{phrase}`` is; a leading article of the phrase is left out.
    """

    describe: str = templates.DESCRIBE
    describe_image: str = templates.DESCRIBE_IMAGE
    refer: str = templates.REFER
    ground: str = templates.GROUND

    def __post_init__(self) -> None:
        for name, part in (("describe", REGION), ("refer", REGION), ("ground", "{phrase}")):
            if getattr(self, name).count(part) != 1:
                raise ClocError(f"the template '{name}' needs {part} exactly once: {getattr(self, name)!r}")

    def where_is(self, phrase: str) -> str:
        """The question for a phrase.

        >>> Templates().where_is("a red circle")
        'Where is the red circle?'

        Raises:
            ClocError: The phrase is blank.
        """
        if not isinstance(phrase, str) or not phrase.strip():
            raise ClocError("there is no phrase to look for", remedy='Give one, such as "red circle".')
        return self.ground.replace("{phrase}", without_article(phrase))
