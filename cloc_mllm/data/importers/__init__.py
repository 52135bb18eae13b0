"""One module for each public data set that can be converted to the project's schemas.

A module has `SUMMARY` (one line of help), `EXAMPLE` (a command), `add_arguments(parser)`, and `convert(args) -> dict`
whose "counts" are exact. Modules are light to import: what the work needs is imported when the work starts.
"""

from __future__ import annotations

_HERE = "cloc_mllm.data.importers"

IMPORTERS: dict[str, str] = {
    "coco": f"{_HERE}.coco",
    "lvis": f"{_HERE}.lvis",
    "objects365": f"{_HERE}.objects365",
    "open-images": f"{_HERE}.open_images",
    "visual-genome": f"{_HERE}.visual_genome",
    "flickr30k-entities": f"{_HERE}.flickr30k_entities",
    "refcoco": f"{_HERE}.refcoco",
    "grit": f"{_HERE}.grit",
    "llava": f"{_HERE}.llava",
    "ferret": f"{_HERE}.ferret",
    "ms-swift": f"{_HERE}.ms_swift",
    "easy-vqa": f"{_HERE}.easy_vqa",
}
"""Kind of data set, as `cloc-mllm data convert KIND` calls it, to the module that converts it."""
