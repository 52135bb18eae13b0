"""Small copies of published benchmarks in their official columns, and YAML that points the shipped tasks at them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lmms_eval
from datasets import Dataset, Image, List

from tests.builders import noise_image

SHIPPED = Path(lmms_eval.__file__).parent / "tasks"


def held_image(seed: int, width: int = 40, height: int = 30) -> dict[str, Any]:
    """A picture as `datasets` stores one."""
    file = io.BytesIO()
    noise_image(width, height, seed).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": f"{seed}.png"}


def local_copy(
    folder: Path,
    task: str,
    yaml: str,
    split: str,
    rows: Sequence[Mapping[str, Any]],
    more: str = "",
    several: bool = False,
) -> None:
    """Write rows as Parquet, and a task of the shipped name that reads them.

    Args:
        folder: Where both go.
        task: The task's name.
        yaml: The shipped file, below lmms-eval's tasks.
        split: The split that it evaluates.
        rows: The questions.
        more: Further lines of YAML.
        several: Whether a question has a list of pictures.
    """
    pictures = List(Image()) if several else Image()
    folder.mkdir(parents=True, exist_ok=True)
    Dataset.from_list([dict(row) for row in rows]).cast_column("image", pictures).to_parquet(folder / f"{task}.parquet")
    lines = [
        f"include: {SHIPPED / yaml}",
        f"task: {task}",
        "dataset_path: parquet",
        "dataset_name: null",
        f"dataset_kwargs: {{data_files: {{{split}: {folder / f'{task}.parquet'}}}}}",
        more,
    ]
    (folder / f"{task}.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def pope(folder: Path, truths: Sequence[str]) -> None:
    """POPE: a question for each truth."""
    rows = [
        {
            "id": str(k),
            "question_id": str(k),
            "question": f"Is there a thing {k} in the image?",
            "answer": truth,
            "image_source": f"COCO_val2014_{k // 2}",
            "image": held_image(k // 2),
            "category": "random",
        }
        for k, truth in enumerate(truths)
    ]
    local_copy(folder, "pope", "pope/pope.yaml", "test", rows)


def mme(folder: Path, questions: Sequence[tuple[str, str, str]]) -> None:
    """MME: (category, picture, truth) each."""
    rows = [
        {
            "question_id": f"{category}/{picture}",
            "image": held_image(len(picture)),
            "question": f"Is thing {k} there? Please answer yes or no.",
            "answer": truth,
            "category": category,
        }
        for k, (category, picture, truth) in enumerate(questions)
    ]
    local_copy(folder, "mme", "mme/mme.yaml", "test", rows)


def textvqa(folder: Path, answers: Sequence[Sequence[str]]) -> None:
    """TextVQA: the ten people's answers to each question."""
    rows = [
        {
            "image_id": f"i{k}",
            "question_id": k,
            "question": f"what is said {k}?",
            "image": held_image(k),
            "answers": list(given),
            "ocr_tokens": ["stop"],
            "set_name": "val",
        }
        for k, given in enumerate(answers)
    ]
    # The shipped task names its target by a column that the data do not have; lmms-eval takes the word itself then.
    local_copy(folder, "textvqa_val", "textvqa/textvqa_val.yaml", "validation", rows)


def gqa(folder: Path, truths: Sequence[str]) -> None:
    """GQA; the shipped task joins pictures and questions from the hub, here they come together."""
    rows = [
        {"id": str(k), "imageId": f"n{k}", "question": f"What is it {k}?", "answer": truth, "image": held_image(k)}
        for k, truth in enumerate(truths)
    ]
    local_copy(folder, "gqa", "gqa/gqa.yaml", "testdev", rows, "process_docs: null")


def refcoco(folder: Path, things: Sequence[tuple[list[str], list[float]]], size: tuple[int, int] = (40, 30)) -> None:
    """RefCOCO on the hub: a row a thing, its expressions and its box as xywh pixels."""
    rows = [
        {
            "question_id": str(k),
            "image": held_image(k, *size),
            "question": "Please describe the area circled in the image.",
            "answer": list(texts),
            "segmentation": [0.0, 0.0, 1.0, 1.0],
            "bbox": [float(value) for value in box],
            "iscrowd": 0,
            "file_name": f"COCO_train2014_{k:012d}_0.jpg",
        }
        for k, (texts, box) in enumerate(things)
    ]
    for task, yaml, split in (
        ("refcoco_bbox_rec_testA", "refcoco/refcoco_bbox_rec_testA.yaml", "testA"),
        ("refcoco_grounding_testA", "refcoco_grounding/refcoco_grounding_testA.yaml", "testA"),
    ):
        local_copy(folder, task, yaml, split, rows)


def seedbench(folder: Path, truths: Sequence[tuple[str, str]]) -> None:
    """SEED-Bench: (letter, `image` or `video`) each; a video is a list of frames."""
    rows = [
        {
            "answer": letter,
            **{f"choice_{one}": f"choice {one} of {k}" for one in "abcd"},
            "data_id": f"d{k}",
            "data_type": kind,
            "question": f"What is it {k}?",
            "question_id": str(k),
            "question_type_id": 1,
            "image": [held_image(k + frame) for frame in range(3 if kind == "video" else 1)],
            "segment": [0, 1],
        }
        for k, (letter, kind) in enumerate(truths)
    ]
    local_copy(folder, "seedbench", "seedbench/seedbench.yaml", "test", rows, several=True)


def scienceqa(folder: Path, truths: Sequence[int]) -> None:
    """ScienceQA, the part with pictures: the number of the right choice each."""
    rows = [
        {
            "image": held_image(k),
            "question": f"Which is it {k}?",
            "choices": ["this", "that", "none"],
            "answer": truth,
            "hint": "Look." if k % 2 else "",
            "task": "closed choice",
            "grade": "grade2",
            "subject": "natural science",
            "topic": "physics",
            "category": "Magnets",
            "skill": "See",
            "lecture": "",
            "solution": "",
        }
        for k, truth in enumerate(truths)
    ]
    local_copy(folder, "scienceqa_img", "scienceqa/scienceqa_img.yaml", "test", rows)


def mmbench(folder: Path, truths: Sequence[str], more: str = "") -> None:
    """MMBench, the English dev split: the right letter each; and further lines of YAML."""
    rows = [
        {
            "index": k,
            "question": f"What is there {k}?",
            "hint": "nan",
            "answer": truth,
            "A": "apple",
            "B": "pear",
            "C": "plum",
            "D": "nan",
            "category": "object_localization" if k % 2 else "attribute_recognition",
            "image": held_image(k),
            "source": "x",
            "L2-category": "finegrained_perception",
            "comment": "nan",
            "split": "dev",
        }
        for k, truth in enumerate(truths)
    ]
    local_copy(folder, "mmbench_en_dev_static", "mmbench/mmbench_en_dev_static.yaml", "dev", rows, more)


def ferret(folder: Path, count: int) -> None:
    """Ferret-Bench: questions of its three categories in turn."""
    kinds = ("refer_desc", "refer_reason", "ground_conv")
    rows = [
        {
            "question_id": k,
            "image": held_image(k),
            "image_name": f"{k}.jpg",
            "question": f"What is the object {k} doing?",
            "context": ["a thing"],
            "category": kinds[k % 3],
            "gpt_answer": f"It is doing {k}.",
        }
        for k in range(count)
    ]
    local_copy(folder, "ferret", "ferret/ferret.yaml", "test", rows)
