"""Loading a checkpoint completely or not at all, whichever Auto class or function loads it."""

from __future__ import annotations

from typing import Any


class CompleteLoadingMixin:
    """Refuses what transformers only warns of: weights that a checkpoint lacks, which would be left random."""

    @classmethod
    def from_pretrained(cls, source: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load as transformers does; who asks for ``output_loading_info`` is told what is missing there instead.

        Raises:
            ValueError: If weights are missing, naming the first.
        """
        model, info = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        if output_loading_info:
            return model, info
        lost = sorted(info["missing_keys"])
        if lost:
            raise ValueError(f"the checkpoint lacks {len(lost)} weights, the first being '{lost[0]}': {source}")
        return model
