"""Writes procedural scenes to disk, in any number of processes, with the same bytes for the same seed.

Scene `index` of a split depends on (seed, split, index) alone, through three separate random streams: what stands
where, how it is painted, and what is said. Changing the wording leaves every picture as it was.
"""

from __future__ import annotations

import json
import multiprocessing
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from cloc_mllm.data.scenes import language, questions
from cloc_mllm.data.scenes.layout import sample_layout
from cloc_mllm.data.scenes.objects import Pair, SceneObject
from cloc_mllm.data.scenes.render import render
from cloc_mllm.data.scenes.vocabulary import SPLITS, ScenePreset, get_preset, heldout_pairs
from cloc_mllm.errors import ClocError

FORMAT_VERSION = 1
_CHUNK = 200
_SAVE: dict[str, dict[str, Any]] = {
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    "png": {"format": "PNG", "compress_level": 1},
}


@dataclass(frozen=True)
class SceneSource:
    """Makes any scene of a data set on demand.

    Attributes:
        preset: Vocabulary and difficulty.
        seed: Seed of the data set.
        side: Width and height of a picture in pixels.
        image_format: "jpg" or "png".
        heldout: (shape, colour) pairs that occur in the test split only.
    """

    preset: ScenePreset
    seed: int
    side: int
    image_format: str
    heldout: frozenset[Pair]

    def rng(self, split: str, index: int, stream: int) -> np.random.Generator:
        """The random stream of one scene: 0 layout, 1 painting, 2 language."""
        return np.random.default_rng([self.seed, SPLITS.index(split), index, stream])

    def forbidden(self, split: str) -> frozenset[Pair]:
        """Pairs that may not occur in a split."""
        return frozenset() if split == "test" else self.heldout

    def objects(self, split: str, index: int) -> list[SceneObject]:
        """The truth about one scene."""
        return sample_layout(self.preset, self.rng(split, index, 0), self.side, self.forbidden(split))

    def picture(self, split: str, index: int, objects: list[SceneObject]) -> Image.Image:
        """The picture of one scene."""
        return render(objects, self.rng(split, index, 1), self.side)

    def records(self, split: str, index: int, objects: list[SceneObject]) -> dict[str, list[dict[str, Any]]]:
        """The lines that one scene adds to each file of its split, by file name."""
        rng = self.rng(split, index, 2)
        name = f"{split}-{index:07d}"
        image = f"images/{name}.{self.image_format}"
        caption = language.caption(objects, self.preset, rng)
        regions = []
        for thing in objects:
            said = language.sample_mention(thing, self.preset, rng)
            unique = language.is_unique(said, objects)
            regions.append(
                {
                    "box": list(thing.box),
                    "text": language.words(said),
                    "unique": unique,
                    "attributes": thing.attributes(),
                }
            )
        asker = questions.Asker(objects, self.preset, self.forbidden(split))
        size = {"width": self.side, "height": self.side}
        return {
            "regions.jsonl": [{"id": name, "image": image, **size, "caption": caption, "regions": regions}],
            "captions.jsonl": [_caption_record(name, image, caption)],
            "conversations.jsonl": [_conversation_record(name, image, questions.training_turns(asker, rng))],
            "questions.jsonl": []
            if split == "train"
            else [self._question_record(name, image, turn) for turn in questions.evaluation_turns(asker, rng, index)],
        }

    def summary(self, counts: dict[str, int]) -> dict[str, Any]:
        """What `dataset.json` says about a data set with so many scenes in each split."""
        return {
            "format_version": FORMAT_VERSION,
            "seed": self.seed,
            "side": self.side,
            "image_format": self.image_format,
            "counts": counts,
            "vocabulary": self.preset.vocabulary(),
            "heldout_pairs": sorted([shape, colour] for shape, colour in self.heldout),
            "preset": self.preset.to_dict(),
        }

    def _question_record(self, name: str, image: str, turn: questions.Turn) -> dict[str, Any]:
        record: dict[str, Any] = {
            "id": f"{name}-{turn.kind}",
            "image": image,
            "task": turn.task,
            "kind": turn.kind,
            "messages": [{"role": "user", "content": [{"type": "image", "image": image}, *turn.question]}],
            "answer": turn.answer,
            "heldout": turn.pair in self.heldout,
        }
        if turn.box is not None:
            record["box"] = turn.box
        if turn.boxes_in:
            record["boxes_in"] = turn.boxes_in
        return record


def _caption_record(name: str, image: str, caption: str) -> dict[str, Any]:
    return {
        "id": name,
        "task": "caption",
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": image}]},
            {"role": "assistant", "content": [{"type": "text", "text": caption}]},
        ],
    }


def _conversation_record(name: str, image: str, turns: list[questions.Turn]) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    for k, turn in enumerate(turns):
        first = [{"type": "image", "image": image}] if k == 0 else []
        messages.append({"role": "user", "content": [*first, *turn.question]})
        messages.append({"role": "assistant", "content": turn.reply})
    return {"id": name, "task": "+".join(turn.kind for turn in turns), "messages": messages}


def _write_chunk(source: SceneSource, folder: Path, split: str, start: int, stop: int) -> tuple[int, dict[str, str]]:
    """Draws and saves some scenes of a split; returns their number and their lines for each file."""
    lines: dict[str, list[str]] = {}
    for index in range(start, stop):
        objects = source.objects(split, index)
        records = source.records(split, index, objects)
        picture = source.picture(split, index, objects)
        picture.save(folder / records["regions.jsonl"][0]["image"], **_SAVE[source.image_format])
        for file, entries in records.items():
            lines.setdefault(file, []).extend(json.dumps(entry) + "\n" for entry in entries)
    return stop - start, {file: "".join(entries) for file, entries in lines.items()}


def _chunks(
    source: SceneSource, folder: Path, split: str, count: int, workers: int
) -> Iterator[tuple[int, dict[str, str]]]:
    """Results of `_write_chunk` in order of index, from this process or from several."""
    jobs = [(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]
    if workers <= 1 or len(jobs) <= 1:
        yield from (_write_chunk(source, folder, split, *job) for job in jobs)
        return
    # Spawned, not forked: the caller may already hold threads of a training framework.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context) as pool:
        futures = deque(pool.submit(_write_chunk, source, folder, split, *job) for job in jobs)
        while futures:
            yield futures.popleft().result()


def _write_split(source: SceneSource, out: Path, split: str, count: int, workers: int, bar: tqdm[Any]) -> None:
    folder = out / split
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        files: dict[str, IO[str]] = {}
        for written, lines in _chunks(source, folder, split, count, workers):
            for file, text in lines.items():
                if file == "questions.jsonl" and split == "train":
                    continue
                if file not in files:
                    files[file] = stack.enter_context((folder / file).open("w", encoding="utf-8"))
                files[file].write(text)
            bar.update(written)


def _check_request(out: Path, counts: dict[str, int], side: int, image_format: str, overwrite: bool) -> None:
    for split, count in counts.items():
        if count < 1:
            raise ClocError(f"the {split} split would have {count} pictures", remedy="Ask for at least one.")
    if side < 64:
        raise ClocError(f"pictures of {side} pixels are too small for the objects", remedy="Ask for 64 or more.")
    if image_format not in _SAVE:
        raise ClocError(f"unknown image format '{image_format}'", remedy=f"Choose one of {', '.join(_SAVE)}.")
    if out.exists() and not out.is_dir():
        raise ClocError("is a file, not a folder", file=out, remedy="Choose another --out.")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ClocError("the folder is not empty", file=out, remedy="Choose another --out, or pass --overwrite.")


def generate_scenes(
    out: str | Path,
    preset: str | ScenePreset = "quick",
    n: int = 10_000,
    seed: int = 0,
    *,
    n_val: int | None = None,
    n_test: int | None = None,
    workers: int = 1,
    side: int = 96,
    image_format: str = "jpg",
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes a data set of procedural scenes.

    Args:
        out: Folder to write to; must be empty unless `overwrite`.
        preset: Name of a preset, or a preset of your own.
        n: Pictures of the train split.
        seed: Decides everything; the number of processes decides nothing.
        n_val: Pictures of the validation split (default: a tenth of `n`, at least 1).
        n_test: Pictures of the test split (default: as many).
        workers: Processes that draw.
        side: Width and height of a picture in pixels; objects grow with it.
        image_format: "jpg" (quality 95, full chroma) or "png".
        overwrite: Write into a folder that holds something already.
        progress: Show a progress bar, if standard error is a terminal.

    Returns:
        What is also written to `dataset.json`, last of all: a folder without it is unfinished.

    Raises:
        ClocError: A count, size, format, preset or folder that cannot be used.
    """
    out = Path(out)
    chosen = get_preset(preset) if isinstance(preset, str) else preset
    fallback = max(1, n // 10)
    counts = dict(
        zip(SPLITS, (n, fallback if n_val is None else n_val, fallback if n_test is None else n_test), strict=True)
    )
    _check_request(out, counts, side, image_format, overwrite)
    source = SceneSource(chosen, seed, side, image_format, heldout_pairs(chosen, seed))
    summary = source.summary(counts)
    try:
        (out / "dataset.json").unlink(missing_ok=True)
        with tqdm(total=sum(counts.values()), unit="img", desc="scenes", disable=None if progress else True) as bar:
            for split, count in counts.items():
                _write_split(source, out, split, count, workers, bar)
        (out / "dataset.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ClocError(f"cannot write: {error.strerror or error}", file=error.filename or out) from error
    return summary
