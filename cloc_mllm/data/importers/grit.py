"""GRIT (Kosmos-2) as region-text samples: noun chunks and referring expressions of web captions, with boxes.

Source: https://huggingface.co/datasets/zzliang/GRIT; annotations MS-PL, pictures under the terms of their sites. An
annotation there is [first character, end character, x1, y1, x2, y2, score], the box as shares of width and height. Two
forms are read:

* tar shards as img2dataset writes them when it fetches the pictures (`key.jpg` and `key.json` with the columns
  `noun_chunks` and `ref_exps` kept);
* Parquet files, whose rows hold their pictures in a column `image`, or whose pictures are `IMAGES/<key>.jpg`.

Policy, all of it counted: a box's text is the stretch of the caption; annotations below `--min-score` (default 0) are
left out; a referring expression that repeats a noun chunk's words and box is left out. Pictures that could not be
fetched (common for addresses of the web) are an error, or counted, with `--on-bad-sample skip`.
"""

from __future__ import annotations

import argparse
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cloc_mllm.data.importers.annotation_index import Event
from cloc_mllm.data.importers.conversion import ConvertOptions, RawSample, Source, add_common_arguments, reading
from cloc_mllm.data.importers.conversion import convert as convert_source
from cloc_mllm.data.importers.held_images import read_held
from cloc_mllm.data.tar_shards import ends_at
from cloc_mllm.errors import ClocError

SUMMARY = "GRIT: noun chunks and referring expressions of web captions"
EXAMPLE = "cloc-mllm data convert grit --annotations grit/*.tar --out data/grit --format webdataset --workers 8"

COLUMNS = ("key", "caption", "noun_chunks", "ref_exps")
_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `cloc-mllm data convert grit`."""
    parser.add_argument("--annotations", required=True, type=Path, nargs="+", help=".tar shards or .parquet files")
    parser.add_argument("--images", type=Path, help="folder of <key>.jpg, where Parquet files hold no pictures")
    parser.add_argument("--min-score", type=float, default=0.0, help="least score of a box (default: %(default)s)")
    add_common_arguments(parser, images=False)


def convert(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the conversion that parsed arguments ask for."""
    source = GritSource(args.annotations, args.images is not None, args.min_score)
    return convert_source(source, ConvertOptions.of(args))


class GritSource(Source):
    """GRIT's shards.

    Args:
        paths: Tar or Parquet files.
        in_folder: Whether the pictures of Parquet files lie in a folder.
        min_score: Least score of a box.
    """

    kind = "grit"
    frame = "shares of width and height"
    licence = "MS-PL"

    def __init__(self, paths: list[Path], in_folder: bool = False, min_score: float = 0.0) -> None:
        self.paths, self.in_folder, self.min_score = [Path(path) for path in paths], in_folder, min_score

    @property
    def files(self) -> list[Path]:
        """The shards."""
        return self.paths

    def events(self, counts: Counter[str]) -> Iterator[Event]:
        """Read all but the pictures."""
        for path in self.paths:
            rows = self._of_tar(path, counts) if path.suffix == ".tar" else self._of_parquet(path)
            for place, row in rows:
                with reading(path, "annotations", row):
                    # Keys count within a file of the set, so they repeat over files.
                    image = f"{path.stem}/{row['key']}"
                    if "damaged" in row:
                        yield "image", image, {"damaged": row["damaged"], "shard": str(path)}
                        continue
                    facts = {**place, "caption": str(row["caption"])}
                    notes = [list(map(float, chunk)) for name in COLUMNS[2:] for chunk in _listed(row.get(name))]
                    if any(len(note) != 7 for note in notes):
                        raise ValueError("an annotation is not 7 numbers")
                counts["captions_read"] += 1
                yield "image", image, facts
                for note in notes:
                    yield "chunk", image, {"values": note}

    def _of_tar(self, path: Path, counts: Counter[str]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        pictures: dict[str, list[Any]] = {}
        rows: dict[str, dict[str, Any]] = {}
        end = 0
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    key, ending = Path(member.name).stem, Path(member.name).suffix.lower()
                    if ending in _ENDINGS:
                        pictures[key] = ["tar", str(path), member.offset_data, member.size]
                    elif ending == ".json":
                        file = archive.extractfile(member)
                        rows[key] = _row(b"" if file is None else file.read())
                    if key in pictures and key in rows:
                        yield {"held": pictures.pop(key)}, {"key": key, **rows.pop(key)}
            if not ends_at(path, end):
                raise tarfile.ReadError("it is cut off, or a header in it is damaged")
        except (OSError, tarfile.TarError) as error:
            raise ClocError(f"cannot be read as a tar shard: {error}", file=path, remedy="Fetch it again.") from error
        counts["annotations_without_picture_left_out"] += len(rows)

    def _of_parquet(self, path: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        import pyarrow
        import pyarrow.parquet

        try:
            file = pyarrow.parquet.ParquetFile(path)
            for group in range(file.num_row_groups):
                rows = file.read_row_group(group, columns=list(COLUMNS)).to_pylist()
                for number, row in enumerate(rows):
                    held = {"held": ["parquet", str(path), group, number]}
                    yield {"file": f"{row['key']}.jpg"} if self.in_folder else held, row
        except (OSError, pyarrow.ArrowInvalid, KeyError) as error:
            raise ClocError(
                f"cannot be read as GRIT's Parquet: {error}", file=path, remedy="Fetch it again."
            ) from error

    def sample(
        self, image: str, facts: dict[str, Any], notes: list[tuple[str, dict[str, Any]]], counts: Counter[str]
    ) -> RawSample:
        """Noun chunks, then the referring expressions that say more."""
        if "damaged" in facts:
            raise ClocError(facts["damaged"], file=facts["shard"], remedy="Fetch the shard again, or skip the sample.")
        caption = facts["caption"]
        regions: dict[tuple[str, tuple[float, ...]], dict[str, Any]] = {}
        for _, note in notes:
            start, end, *box, score = note["values"]
            text = caption[int(start) : int(end)].strip()
            if not text:
                counts["boxes_without_text_left_out"] += 1
            elif score < self.min_score:
                counts["boxes_below_score_left_out"] += 1
            elif (text, tuple(box)) in regions:
                counts["regions_repeated_left_out"] += 1
            else:
                regions[text, tuple(box)] = {"share": box, "text": text, "score": round(score, 4)}
        held = facts["file"] if "file" in facts else read_held(facts["held"])
        spoken = " ".join(caption.split())
        return RawSample(held, None, [spoken] if spoken else [], list(regions.values()))


def _row(content: bytes) -> dict[str, Any]:
    """The annotations in a member of a shard, or under `damaged` what is wrong with it."""
    try:
        row = json.loads(content)
    except ValueError as error:
        return {"damaged": f"not valid JSON: {error}"}
    return row if isinstance(row, dict) else {"damaged": "not a JSON object"}


def _listed(value: Any) -> list[Any]:
    """A column's value; some versions of the set keep it as the text of a list."""
    if isinstance(value, str):
        return list(json.loads(value))
    return list(value or [])
