"""Questions and answers made of region-text data: one module for each way, all wording in `templates`.

A module has `SUMMARIES` (its kinds, each with a line of help), `EXAMPLES` (a command for each), `add_arguments(parser,
kind)` and `build(args) -> dict` whose "counts" are exact; `args.kind` is the kind. Modules are light to import.
"""

from __future__ import annotations

_HERE = "cloc_mllm.data.builders"

BUILDERS: tuple[str, ...] = (f"{_HERE}.tuning", f"{_HERE}.lvis_referring")
"""The modules whose kinds `cloc-mllm data build` knows."""
