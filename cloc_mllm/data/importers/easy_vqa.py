"""easy-VQA, the set that the Python package `easy-vqa` carries: one shape a picture, short questions, 13 answers.

Source: https://github.com/vzhou842/easy-VQA (package `easy-vqa` 1.0), MIT licence. 4,000 + 1,000 pictures of 64 x 64
pixels with 38,575 + 9,673 questions. `<split>/questions.json` is a list of [question, answer, number of the picture],
pictures are `<split>/images/<number>.png`. There are no boxes.

Each question becomes a conversation of its own, question and answer as they are written; with `--together` all
questions about a picture are turns of one, which teaches as much for a fraction of the time. The files of the installed
package are read; its code is not imported.
"""

from __future__ import annotations

import argparse
import importlib.util
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cloc_mllm.data.importers.conversations import (
    Messages,
    Origin,
    add_output_arguments,
    common_options,
    convert_conversations,
    read_samples,
)
from cloc_mllm.data.importers.pictures import Pictures
from cloc_mllm.errors import ClocError

SUMMARY = "easy-VQA: questions about one drawn shape, from the installed package"
EXAMPLE = "cloc-mllm data convert easy-vqa --split train --out data/easy_vqa"

SPLITS = {"train": (4_000, 38_575), "test": (1_000, 9_673)}
"""Pictures and questions of each split."""

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
_ORIGIN = Origin("easy-vqa", "https://github.com/vzhou842/easy-VQA", "MIT", "There are no boxes.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `cloc-mllm data convert easy-vqa`."""
    parser.add_argument("--split", required=True, choices=tuple(SPLITS), help="which questions")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with train and test (default: the package's)")
    parser.add_argument("--together", action="store_true", help="all questions about a picture in one conversation")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write to")
    add_output_arguments(parser)


def convert(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the conversion that parsed arguments ask for."""
    folder = data_folder(args.data) / args.split
    result = convert_conversations(
        folder / "questions.json",
        folder / "images",
        args.out,
        _ORIGIN,
        _messages,
        read=read_pictures if args.together else read_questions,
        **common_options(args),
    )
    read, what = result["counts"]["samples_read"], ("questions", "pictures")[args.together]
    whole = SPLITS[args.split][0 if args.together else 1]
    if read != whole:
        warnings.warn(f"{folder} is not the whole split: {read:,} {what}, not {whole:,}", stacklevel=2)
    return result


def data_folder(given: str | Path | None = None) -> Path:
    """The folder that holds `train` and `test`.

    Args:
        given: The folder, or None for the installed package's.

    Raises:
        ClocError: The package is not installed, or the folder holds no such data.
    """
    folder = None if given is None else Path(given)
    if folder is None:
        # Only found, not imported: of the package nothing but its files is wanted.
        package = importlib.util.find_spec("easy_vqa")
        if package is None or not package.submodule_search_locations:
            raise ClocError(
                "the package easy-vqa, which carries the data, is not installed", remedy="pip install easy-vqa"
            )
        folder = Path(package.submodule_search_locations[0]) / "data"
    if not (folder / "test" / "questions.json").is_file():
        raise ClocError("this is no easy-VQA folder (no test/questions.json)", file=folder)
    return folder


def read_questions(path: str | Path) -> Iterator[tuple[Any, str]]:
    """Yields each question of a split, `{"id", "image", "asked": [[question, answer]]}`, and where it stands.

    Raises:
        ClocError: The file cannot be read, or an entry is no [question, answer, picture].
    """
    split = Path(path).parent.name
    for number, (entry, where) in enumerate(read_samples(path)):
        if not (
            isinstance(entry, list)
            and [type(part) for part in entry] == [str, str, int]
            and all(part.strip() for part in entry[:2])
        ):
            raise ClocError("not a [question, answer, number of a picture]", file=path, sample=where)
        yield {"id": f"{split}-{number}", "image": f"{entry[2]}.png", "asked": [entry[:2]]}, where


def read_pictures(path: str | Path) -> Iterator[tuple[Any, str]]:
    """Yields each picture of a split with all that is asked about it, as :func:`read_questions` yields one question."""
    pictures: dict[str, dict[str, Any]] = {}
    for sample, _ in read_questions(path):
        known = pictures.setdefault(sample["image"], {**sample, "asked": []})
        known["asked"] += sample["asked"]
    for sample in pictures.values():
        yield {**sample, "id": f"{Path(path).parent.name}-{Path(sample['image']).stem}"}, f"picture {sample['image']}"


def kind_of_answer(answer: str) -> str:
    """What an answer is: `yesno`, `shape` or `colour`.

    Raises:
        ClocError: It is none of the 13 answers.
    """
    for kind, answers in (("yesno", ("yes", "no")), ("shape", SHAPES), ("colour", COLOURS)):
        if answer in answers:
            return kind
    raise ClocError(f"'{answer}' is none of the 13 answers of easy-VQA")


def _messages(raw: Mapping[str, Any], pictures: Pictures, counts: Counter[str]) -> Messages:
    messages: Messages = []
    for question, answer in raw["asked"]:
        counts[f"answers_{kind_of_answer(answer)}"] += 1
        image = [] if messages else [{"type": "image", "image": pictures.place(raw["image"])}]
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages
