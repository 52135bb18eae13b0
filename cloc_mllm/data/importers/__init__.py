"""One module for each public data set that can be converted to the project's schemas.

A module has `SUMMARY` (one line of help), `EXAMPLE` (a command), `add_arguments(parser)`, and `convert(args) -> dict`
whose "counts" are exact. Modules are light to import: what the work needs is imported when the work starts.
"""

from __future__ import annotations

IMPORTERS: dict[str, str] = {
    "coco": "cloc_mllm.data.importers.coco",
    "llava": "cloc_mllm.data.importers.llava",
    "ferret": "cloc_mllm.data.importers.ferret",
    "ms-swift": "cloc_mllm.data.importers.ms_swift",
}
"""Kind of data set, as `cloc-mllm data convert KIND` calls it, to the module that converts it."""
