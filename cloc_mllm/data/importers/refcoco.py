"""RefCOCO, RefCOCO+ and RefCOCOg as region-text samples: expressions that single out one thing of a picture.

Source: https://github.com/lichengunc/refer; boxes and pictures are COCO 2014's (annotations CC BY 4.0). Boxes there are
[x, y, width, height] in pixels of the picture. Two forms are read:

* the original one, `refs(unc).p` (or `google`, `umd`) with `instances.json` beside it. The `.p` file is a Python
  pickle; it is read by an unpickler that builds lists, dictionaries, texts and numbers and refuses everything else, so
  nothing in it can run;
* the Parquet files of the hub (columns `image`, `answer`, `bbox`, `file_name`), whose rows hold their pictures.

Policy: each expression is a region, marked `unique` since it was written to name this box alone. The caption, which the
sets lack, is COCO's with `--captions`, else made of the names of the things that are referred to (of the expressions,
where there are no names).
"""

from __future__ import annotations

import argparse
import io
import pickle
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cloc_mllm.data.importers.annotation_index import Event
from cloc_mllm.data.importers.coco import caption_of_names
from cloc_mllm.data.importers.conversion import ConvertOptions, RawSample, Source, add_common_arguments, reading
from cloc_mllm.data.importers.conversion import convert as convert_source
from cloc_mllm.data.importers.held_images import read_held
from cloc_mllm.data.importers.json_stream import stream_lists
from cloc_mllm.errors import ClocError

SUMMARY = "RefCOCO, RefCOCO+, RefCOCOg: referring expressions and their boxes"
EXAMPLE = (
    "cloc-mllm data convert refcoco --refs 'refcoco/refs(unc).p' --split train --images train2014 --out data/refcoco"
)

KNOWN = {
    ("refcoco", "unc", "train"): (42_404, 120_624),
    ("refcoco", "unc", "val"): (3_811, 10_834),
    ("refcoco", "unc", "testA"): (1_975, 5_657),
    ("refcoco", "unc", "testB"): (1_810, 5_095),
    ("refcoco+", "unc", "train"): (42_278, 120_191),
    ("refcoco+", "unc", "val"): (3_805, 10_758),
    ("refcoco+", "unc", "testA"): (1_975, 5_726),
    ("refcoco+", "unc", "testB"): (1_798, 4_889),
    ("refcocog", "umd", "train"): (42_226, 80_512),
    ("refcocog", "umd", "val"): (2_573, 4_896),
    ("refcocog", "umd", "test"): (5_023, 9_602),
}
"""Things referred to and expressions of each split, by the folder's name, the partition and the split."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `cloc-mllm data convert refcoco`."""
    parser.add_argument("--refs", required=True, type=Path, nargs="+", help="refs(...).p, or the hub's .parquet files")
    parser.add_argument("--instances", type=Path, help="instances.json; default the one beside the .p file")
    parser.add_argument("--split", help="train, val, testA, testB or test; needed with a .p file")
    parser.add_argument("--captions", type=Path, help="COCO's captions_*2014.json")
    parser.add_argument("--images", type=Path, help="COCO's pictures of 2014; not needed with Parquet")
    add_common_arguments(parser, images=False)


def convert(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the conversion that parsed arguments ask for."""
    if args.refs[0].suffix == ".parquet":
        return convert_source(RefCocoParquet(args.refs), ConvertOptions.of(args))
    if args.split is None or args.images is None or len(args.refs) > 1:
        raise ClocError("one .p file needs --split and --images", file=args.refs[0])
    source = RefCocoSource(args.refs[0], args.instances, args.split, args.captions)
    return convert_source(source, ConvertOptions.of(args))


class _PlainUnpickler(pickle.Unpickler):
    """Builds lists, dictionaries, texts and numbers; whatever would import something is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which plain data never does")


def read_refs(path: str | Path) -> list[dict[str, Any]]:
    """Return the references of a `refs(...).p` file, without running anything in it.

    Args:
        path: The file, a pickle of Python 2.

    Raises:
        ClocError: The file cannot be read, or holds something other than plain data.
    """
    try:
        content = Path(path).read_bytes()
        refs = _PlainUnpickler(io.BytesIO(content), encoding="utf-8").load()
    except (OSError, EOFError, pickle.UnpicklingError, ValueError, AttributeError, IndexError, TypeError) as error:
        raise ClocError(
            f"cannot be read as plain pickled data: {error}", file=path, remedy="Fetch refs(...).p again."
        ) from error
    if not isinstance(refs, list):
        raise ClocError("does not hold a list of references", file=path)
    return refs


class RefCocoSource(Source):
    """The original files.

    Args:
        refs: `refs(...).p`.
        instances: `instances.json`; default the one beside `refs`.
        split: Which references.
        captions: COCO's captions of the same pictures.
    """

    kind = "refcoco"
    frame = "xywh pixels of the picture"
    licence = "annotations CC BY 4.0"

    def __init__(
        self, refs: str | Path, instances: str | Path | None, split: str, captions: str | Path | None = None
    ) -> None:
        self.refs, self.split = Path(refs), split
        self.instances = self.refs.with_name("instances.json") if instances is None else Path(instances)
        self.captions = None if captions is None else Path(captions)
        partition = self.refs.stem.partition("(")[2].rstrip(")")
        name = self.refs.parent.name.lower()
        known = KNOWN.get((name, partition, split))
        # Google's partition has splits of the same names and other things in them, so it is no set that is known.
        self.name = name if known else f"{name} ({partition})" if name in {owner for owner, _, _ in KNOWN} else None
        if known is not None:
            counts = {"references_read": known[0], "expressions_read": known[1]}
            self.expected = {"refs": counts}

    def stated(self) -> dict[str, str]:
        """Which of the three sets this is, where the folder's name tells, and the split."""
        return ({"set": self.name} if self.name else {}) | {"split": self.split}

    @property
    def files(self) -> list[Path]:
        """References, boxes, captions."""
        return [self.refs, self.instances, *([] if self.captions is None else [self.captions])]

    def events(self, counts: Counter[str]) -> Iterator[Event]:
        """Read the references of the split, then the boxes and pictures they are about."""
        refs = [ref for ref in self._refs() if ref["split"] == self.split]
        if not refs:
            splits = sorted({ref["split"] for ref in self._refs()})
            raise ClocError(
                f"has no references of the split '{self.split}': it has {', '.join(splits)}", file=self.refs
            )
        wanted: dict[int, list[dict[str, Any]]] = {}
        for ref in refs:
            wanted.setdefault(ref["ann_id"], []).append(ref)
        images = {ref["image_id"] for ref in refs}
        names: dict[str, str] = {}
        for name, item in stream_lists(self.instances, ("images", "annotations", "categories")):
            with reading(self.instances, name, item):
                if name == "categories":
                    names[str(item["id"])] = item["name"]
                elif name == "images" and item["id"] in images:
                    yield "image", item["id"], {"file": item["file_name"], "size": [item["width"], item["height"]]}
                elif name == "annotations" and item["id"] in wanted:
                    x, y, w, h = (float(value) for value in item["bbox"])
                    for ref in wanted.pop(item["id"]):
                        counts["references_read"] += 1
                        texts = [" ".join(str(one.get("sent", one.get("raw"))).split()) for one in ref["sentences"]]
                        counts["expressions_read"] += len(texts)
                        note = {"box": [x, y, x + w, y + h], "texts": texts, "category": str(item["category_id"])}
                        yield "ref", ref["image_id"], note
        if wanted:
            problem = f"lacks the boxes of {len(wanted)} references, the first of them {min(wanted)}"
            raise ClocError(problem, file=self.instances, remedy="Both files must be of the same set.")
        yield "about", "categories", names
        if self.captions is not None:
            for _, item in stream_lists(self.captions, ("annotations",)):
                with reading(self.captions, "annotations", item):
                    text = " ".join(str(item["caption"]).split())
                    if item["image_id"] in images and text:
                        counts["captions_read"] += 1
                        yield "caption", item["image_id"], {"id": item["id"], "text": text}

    def _refs(self) -> Iterator[dict[str, Any]]:
        for ref in read_refs(self.refs):
            with reading(self.refs, "references", ref):
                for key in ("ann_id", "image_id", "split", "sentences"):
                    ref[key]
            yield ref

    def sample(
        self, image: str, facts: dict[str, Any], notes: list[tuple[str, dict[str, Any]]], counts: Counter[str]
    ) -> RawSample:
        """A region for each expression."""
        refs = [note for kind, note in notes if kind == "ref"]
        captions = [text for _, text in sorted((n["id"], n["text"]) for kind, n in notes if kind == "caption")]
        if not captions:
            captions = caption_of_names([self.about["categories"][ref["category"]] for ref in refs])
        regions = [{"box": ref["box"], "text": text, "unique": True} for ref in refs for text in ref["texts"] if text]
        return RawSample(facts["file"], (facts["size"][0], facts["size"][1]), captions, regions)


class RefCocoParquet(Source):
    """The hub's Parquet files, a row a thing that is referred to.

    Args:
        paths: Files of one split.
    """

    kind = "refcoco"
    frame = "xywh pixels of the picture"
    licence = "annotations CC BY 4.0"

    def __init__(self, paths: list[Path]) -> None:
        self.paths = [Path(path) for path in paths]

    @property
    def files(self) -> list[Path]:
        """The Parquet files."""
        return self.paths

    def events(self, counts: Counter[str]) -> Iterator[Event]:
        """Read all but the pictures; rows about the same picture come together."""
        import pyarrow
        import pyarrow.parquet

        for path in self.paths:
            try:
                file = pyarrow.parquet.ParquetFile(path)
                for group in range(file.num_row_groups):
                    rows = file.read_row_group(group, columns=["file_name", "answer", "bbox"]).to_pylist()
                    for number, row in enumerate(rows):
                        with reading(path, "rows", row):
                            # COCO_train2014_000000581857_16.jpg: the picture's name, and the number of the thing on it.
                            image = Path(row["file_name"]).stem.rpartition("_")[0]
                            x, y, w, h = (float(value) for value in row["bbox"])
                            texts = [" ".join(str(text).split()) for text in row["answer"]]
                        counts["references_read"] += 1
                        counts["expressions_read"] += len(texts)
                        yield "image", image, {"held": ["parquet", str(path), group, number]}
                        yield "ref", image, {"box": [x, y, x + w, y + h], "texts": texts}
            except (OSError, pyarrow.ArrowInvalid, KeyError) as error:
                raise ClocError(f"cannot be read as the hub's RefCOCO: {error}", file=path) from error

    def sample(
        self, image: str, facts: dict[str, Any], notes: list[tuple[str, dict[str, Any]]], counts: Counter[str]
    ) -> RawSample:
        """A region for each expression; there are no names, so the first expressions make the caption."""
        refs = [note for _, note in notes]
        regions = [{"box": ref["box"], "text": text, "unique": True} for ref in refs for text in ref["texts"] if text]
        captions = caption_of_names([ref["texts"][0] for ref in refs if ref["texts"] and ref["texts"][0]])
        return RawSample(read_held(facts["held"]), None, captions, regions)
