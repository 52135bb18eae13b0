"""Where everything of a demo lies: known to what runs it and to what reports on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DATA = "data"


@dataclass(frozen=True)
class DemoFiles:
    """Where everything of a demo lies.

    Attributes:
        out: The output folder.
        programs: The folder of the training programs.
        seeds: How many seeds are run; with several, each has a folder of its own.
    """

    out: Path
    programs: Path
    seeds: int

    def encoder(self, name: str, seed: int) -> str:
        """Stage name, and folder, of an encoder's pre-training."""
        return f"{self._prefix(seed)}encoders/{name}"

    def mllm(self, name: str, seed: int, stage: str) -> str:
        """Stage name, and folder, of an MLLM's `align` or `instruct`."""
        return f"{self._prefix(seed)}mllm/{name}/{stage}"

    def evaluation(self, kind: str, name: str, seed: int) -> str:
        """Stage name, and folder, of the evaluation of an encoder (`encoders`) or an MLLM (`mllm`)."""
        return f"{self._prefix(seed)}evaluation/{kind}/{name}"

    def export(self, stage: str) -> Path:
        """The weights that a training stage leaves."""
        return self.out / stage / "export"

    def _prefix(self, seed: int) -> str:
        return f"seed{seed}/" if self.seeds > 1 else ""
