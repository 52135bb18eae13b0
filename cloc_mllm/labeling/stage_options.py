"""What a stage may be asked for: a typed model of its options, and an error for people where an option is wrong."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from cloc_mllm.errors import ClocError


class StageOptions(BaseModel):
    """Options of a stage: unknown ones are refused, and nothing changes afterwards.

    Words from a command line will do: `"20"` is 20.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


Options = TypeVar("Options", bound=StageOptions)


def read_options(model: type[Options], options: Mapping[str, Any], stage: str) -> Options:
    """Check the options of a stage.

    Args:
        model: Which options there are.
        options: What was asked for.
        stage: The stage's name, for the message.

    Returns:
        The options, defaults filled in.

    Raises:
        ClocError: An option is unknown, or its value is of another type or out of range.
    """
    known = list(model.model_fields)
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            remedy = f"Did you mean '{near[0]}'?" if near else f"There are: {', '.join(known)}."
            raise ClocError(f"'{stage}' has no option '{name}'", remedy=remedy)
    try:
        return model.model_validate(dict(options))
    except ValidationError as error:
        problems = [
            f"option '{'.'.join(map(str, item['loc']))}' of '{stage}' is {item['input']!r}: {item['msg']}"
            for item in error.errors(include_url=False)
        ]
        raise ClocError("; ".join(problems)) from None


def no_argument(name: str, argument: str | None) -> None:
    """Refuse the argument of a stage that takes none."""
    if argument is not None:
        raise ClocError(f"'{name}' takes no argument, but was given '{argument}'", remedy=f"Write only '{name}'.")


def digest_of(value: Any) -> str:
    """A short hash of plain data, the same in every process and on every machine."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
