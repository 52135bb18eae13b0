"""Models that answer lmms-eval: a tiny real one, and one that is told what to say."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import ImageFile

from cloc_mllm.data.messages import image_items
from cloc_mllm.inference.predictor import Predictor
from cloc_mllm.models.answer_text import AnswerText, read_answer
from tests.builders_mllm import tiny_mllm

Say = Callable[[str, Any], str]


class Told(Predictor):
    """A model that says what it is told to; all but its `chat` is real.

    Args:
        say: Gives the answer to a question in words and its conversation.
    """

    def __init__(self, say: Say) -> None:
        super().__init__(*tiny_mllm(grounding="text"))
        self.say, self.options = say, {}

    def chat(self, conversations: Sequence[Any], *args: Any, **options: Any) -> list[AnswerText]:
        self.options = options
        answers = []
        for conversation in conversations:
            content = conversation[-1]["content"]
            question = "".join(item.get("text", "") for item in content if item["type"] == "text")
            sizes = [picture.size for picture in image_items(list(conversation))]
            text = self.say(question, conversation)
            answers.append(read_answer(text, sizes[-1] if sizes else None, len(sizes) - 1, self.processor.codec))
        return answers


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what `datasets` writes out of the home folder; lmms-eval reads the variable once."""
    before = os.environ.get("LMMS_EVAL_DATASETS_CACHE")
    os.environ["LMMS_EVAL_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets"))
    yield
    if before is None:
        del os.environ["LMMS_EVAL_DATASETS_CACHE"]
    else:
        os.environ["LMMS_EVAL_DATASETS_CACHE"] = before


@pytest.fixture(scope="session")
def predictor() -> Predictor:
    """A tiny real model with a grounding head."""
    return Predictor(*tiny_mllm())


@pytest.fixture
def out(tmp_path: Path) -> str:
    return str(tmp_path / "out")


@pytest.fixture(autouse=True)
def pillow_as_it_was() -> Iterator[None]:
    """The import of lmms-eval changes how Pillow reads, for all tests that come after in this process."""
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    yield
    ImageFile.LOAD_TRUNCATED_IMAGES = False
