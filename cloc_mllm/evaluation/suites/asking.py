"""What the suites that put questions to MLLMs share: who is asked, how, and what the report says of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.mllms.answerers import Answerer, MllmSettings
from cloc_mllm.evaluation.mllms.stock import FRAMES, HOW, StockAnswerer
from cloc_mllm.evaluation.suites.options import MLLM, EvalOptions, batch_size_of, model_type
from cloc_mllm.inference.predictor import Predictor


@dataclass(frozen=True)
class AskingSettings:
    """The settings that all these suites know.

    Attributes:
        boxes: For models of other projects: how they write boxes, one of ``FRAMES``.
        suffix: Put behind every question, such as "Answer with a single word."
    """

    boxes: str | None = None
    suffix: str = ""

    def __post_init__(self) -> None:
        if self.boxes is not None and self.boxes not in FRAMES:
            raise ClocError(f"there is no frame of boxes '{self.boxes}'", remedy=f"Choose one of {', '.join(FRAMES)}.")
        if not isinstance(self.suffix, str):
            raise ClocError(f"suffix is {self.suffix!r}, not a text")


def load_answerer(options: EvalOptions, settings: AskingSettings, *, needs_boxes: bool = True) -> Answerer:
    """Load whom a suite asks: one of this project's MLLMs, or any image-text-to-text model of transformers.

    Args:
        options: Names the checkpoint.
        settings: How a model of another project writes boxes.
        needs_boxes: Whether the suite asks about boxes, or for them.

    Raises:
        ClocError: The checkpoint cannot be asked, or it is not known how it writes boxes.
    """
    if options.method is not None:
        raise ClocError("--method is for encoders: an MLLM reads regions in the way it was trained with")
    kind = model_type(options.model)
    if kind == MLLM:
        if settings.boxes is not None:
            raise ClocError("boxes=… is for models of other projects: this one says itself how it writes boxes")
        return Predictor.from_pretrained(
            options.model, device=options.device, trust_remote_code=options.trust_remote_code
        )
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ClocError(
            f"the checkpoint holds a '{kind}' model, which answers no questions about pictures",
            file=options.model,
            remedy=f"This suite takes '{MLLM}', and transformers' image-text-to-text models.",
        )
    if needs_boxes and settings.boxes is None:
        raise ClocError(f"it is not said how a '{kind}' model writes boxes", file=options.model, remedy=HOW)
    return StockAnswerer.from_pretrained(
        options.model, settings.boxes, options.device, trust_remote_code=options.trust_remote_code
    )


def refuse_asking(options: EvalOptions, settings: AskingSettings) -> None:
    """Refuse what only someone who is asked could heed, where an encoder searches.

    Args:
        options: Of the run.
        settings: The suite's; ``images`` and ``of`` say what is searched, all others how it is asked for.

    Raises:
        ClocError: Something of that kind is not as it is by default.
    """
    plain = {one.name: one.default for one in [*fields(settings), *fields(options)]}
    given = {one.name: getattr(settings, one.name) for one in fields(settings) if one.name not in ("images", "of")}
    given |= {name: getattr(options, name) for name in ("max_new_tokens", "trust_remote_code")}
    for name, value in given.items():
        if value != plain[name]:
            raise ClocError(
                f"{name.replace('_', '-') if hasattr(options, name) else name} is for MLLMs: an encoder is not asked, "
                f"it searches for the words themselves",
                remedy=f"Leave it out, or at its default ({plain[name]!r}).",
            )


def mllm_settings(options: EvalOptions) -> MllmSettings:
    """How much is asked, as the options say."""
    return MllmSettings(
        limit=options.limit, max_new_tokens=options.max_new_tokens, seed=options.seed, **batch_size_of(options)
    )


def question(
    picture: str | PathLike[str] | Any, items: str | Sequence[dict[str, Any]], suffix: str = ""
) -> list[dict[str, Any]]:
    """A conversation of one question about one picture.

    Args:
        picture: A path or an opened picture.
        items: The question, as a text or as items with regions among them.
        suffix: Put behind it, on a line of its own.
    """
    asked = [{"type": "text", "text": items}] if isinstance(items, str) else list(items)
    turn = [{"role": "user", "content": [{"type": "image", "image": picture}, *asked]}]
    return with_suffix(turn, suffix)


def with_suffix(messages: Sequence[dict[str, Any]], suffix: str) -> list[dict[str, Any]]:
    """A copy of a conversation whose last turn ends with the suffix, on a line of its own; none if it is empty."""
    if not suffix:
        return list(messages)
    last = messages[-1]
    content = last["content"]
    items = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    return [*messages[:-1], {**last, "content": [*items, {"type": "text", "text": f"\n{suffix}"}]}]


def grounding_mode(answerer: Answerer) -> str:
    """Whether boxes come from a grounding head or from text."""
    return getattr(getattr(getattr(answerer, "model", None), "config", None), "grounding", "text")
