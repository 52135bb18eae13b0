"""The ``ferret-bench`` suite: 3 x 40 open questions about regions, marked by a language model beside reference answers.

The published layout is read (github.com/apple/ml-ferret, `ferret/eval/ferret_gpt4_data`): a folder for each category
(description of a region, reasoning about one, grounding in conversation) with `question.jsonl`, `answer.jsonl` (the
reference) and `context.jsonl` (what the judge is told of the picture), all boxes in shares of width and height. The
score of a category is the mean mark of the model over that of the reference. Replies of the judge from which no marks
can be read are reported and left out: they are no marks.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cloc_mllm.data.importers.pictures import picture_in, picture_size
from cloc_mllm.data.readers import JsonLines
from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.encoders.region_data import draw
from cloc_mllm.evaluation.mllms.answerers import Answered, Answerer, MllmSettings, answer_record, ask_each
from cloc_mllm.evaluation.mllms.judge import Judge, ReplyFile, judge_of
from cloc_mllm.evaluation.reporting.report import DatasetRef
from cloc_mllm.evaluation.scoring.metrics import Metric, relative_metric
from cloc_mllm.evaluation.suites.asking import (
    AskingSettings,
    grounding_mode,
    load_answerer,
    mllm_settings,
    question,
)
from cloc_mllm.evaluation.suites.options import EvalOptions, Outcome, settings_of
from cloc_mllm.inference.templates import REGION, question_items
from cloc_mllm.models.boxes import BoxCodec

CATEGORIES = ("refer_desc", "refer_reason", "ground_conv")
QUESTIONS_OF_EACH = 40
REPLIES = "judge.jsonl"
MARKS = (1.0, 10.0)

_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)"
_BOX = re.compile(r"[\[(]\s*" + r"(?:\s*[,;]\s*|\s+)".join([_NUMBER] * 4) + r"\s*[\])]")
"""What :class:`BoxCodec` may take for a box."""
_SHARES = BoxCodec("norm1")
_TASK = (
    "Two assistants answered the question above, which is about an image that you cannot see. The context tells what "
    "is in it: its objects with their boxes, relations between objects, and descriptions of regions. All boxes are "
    "[x1, y1, x2, y2], left, top, right and bottom, in shares of the image's width and height from 0 to 1.\n"
    "Mark each answer from 1 (useless) to 10 (as good as can be). {what}\n"
    "Write both marks on the first line, that of assistant 1 first, with a space between them and nothing else. Then "
    "explain them in a few sentences. Which answer stands first must not matter."
)
RULES = {
    "refer_desc": _TASK.format(
        what="Ask whether it describes the object in the box, what surrounds it and how it relates to that; whether "
        "it is true, to the point, and as detailed as the question wants."
    ),
    "refer_reason": _TASK.format(
        what="Ask whether it knows the object in the box, and whether what it concludes about it follows from what is "
        "in the image and from common knowledge; whether it is to the point and complete."
    ),
    "ground_conv": _TASK.format(
        what="Ask whether it answers the question truly and helpfully, and whether it gives the box of each thing it "
        "speaks of. A box whose sides are off by less than a fifth of the object's width or height is right; the "
        "further off it is, the more it costs."
    ),
}
"""What the judge is told, unless the data bring a `rule.json`."""


@dataclass(frozen=True)
class FerretBenchSettings(AskingSettings):
    """The settings of this suite.

    Attributes:
        images: The folder of pictures (COCO val2017); needed.
        judge_url: The judge's base address; default the environment's ``OPENAI_BASE_URL``.
        judge_model: The judge's name there; needed.
        judge_key: The environment variable that holds its key.
        temperature: Of the judge.
        retries: How often a request that failed for a passing reason is repeated.
        retry_wait: Seconds before the first repetition; doubled with each.
    """

    images: str | None = None
    judge_url: str | None = None
    judge_model: str | None = None
    judge_key: str = "OPENAI_API_KEY"
    temperature: float = 0.2
    retries: int = 6
    retry_wait: float = 1.0

    def judge(self) -> Judge:
        """Who marks the answers; `ClocError` if it is not said."""
        return judge_of(
            self.judge_url,
            self.judge_model,
            self.judge_key,
            temperature=float(self.temperature),
            retries=self.retries,
            wait=float(self.retry_wait),
        )


def run(options: EvalOptions) -> Outcome:
    """Ask the MLLM that a folder holds, and the judge about its answers."""
    settings = settings_of(FerretBenchSettings, options)
    judge = settings.judge()
    if settings.images is None:
        raise ClocError("the pictures of Ferret-Bench are not named", remedy="Add --set images=DIR (COCO val2017).")
    bench = load_bench(options.data_path, settings.images, options.limit, options.seed)
    Path(options.out).mkdir(parents=True, exist_ok=True)
    replies = ReplyFile(Path(options.out) / REPLIES)
    return evaluate_bench(load_answerer(options, settings), bench, judge, replies, mllm_settings(options), settings)


@dataclass(frozen=True)
class BenchQuestion:
    """One question of the bench.

    Attributes:
        id: Its number within the category.
        category: One of ``CATEGORIES``.
        image: The picture's file name.
        text: The question, boxes in shares within it.
        reference: The reference answer.
        context: What the judge is told of the picture.
    """

    id: str
    category: str
    image: str
    text: str
    reference: str
    context: str


@dataclass(frozen=True)
class Bench:
    """Some or all questions.

    Attributes:
        ref: What to call them.
        questions: The questions, category by category.
        pictures: The folder of pictures.
        rules: What the judge is told, by category.
        own_rules: Whether that is this project's wording, and not the data's.
    """

    ref: DatasetRef
    questions: list[BenchQuestion]
    pictures: Path
    rules: Mapping[str, str]
    own_rules: bool


def load_bench(folder: str | Path, pictures: str | Path, limit: int | None = None, seed: int = 0) -> Bench:
    """Read the published layout.

    Args:
        folder: Holds a folder for each category, and perhaps ``rule.json``.
        pictures: The folder of pictures.
        limit: So many questions of each category, drawn with ``seed``; None takes all.
        seed: Of the draw.

    Raises:
        ClocError: A file is missing or malformed, or question, answer and context do not belong together.
    """
    by_category: dict[str, list[BenchQuestion]] = {}
    files = sorted(Path(folder).glob("*/question.jsonl"))
    if not files:
        raise ClocError("this is no folder of Ferret-Bench (no */question.jsonl)", file=folder)
    for file in files:
        for one in _read_category(file):
            by_category.setdefault(one.category, []).append(one)
    chosen = [
        by_category[category][k]
        for category in sorted(by_category, key=CATEGORIES.index)
        for k in draw(len(by_category[category]), limit, seed)
    ]
    found = sum(len(questions) for questions in by_category.values())
    total = max(found, QUESTIONS_OF_EACH * len(CATEGORIES))
    rules = _read_rules(Path(folder) / "rule.json")
    drawn = seed if len(chosen) < found else None
    ref = DatasetRef("ferret-bench", "all", len(chosen), total, drawn, "questions")
    return Bench(ref, chosen, Path(pictures), rules or RULES, rules is None)


def _read_category(file: Path) -> list[BenchQuestion]:
    answers, contexts = (_by_id(file.with_name(f"{name}.jsonl")) for name in ("answer", "context"))
    questions = []
    for name, raw in _by_id(file).items():
        if raw.get("category") not in CATEGORIES:
            problem = f"the category {raw.get('category')!r} is none of {', '.join(CATEGORIES)}"
            raise ClocError(problem, file=file, sample=name)
        parts = {"answer": answers.get(name), "context": contexts.get(name)}
        for what, part in parts.items():
            if part is None or part["image"] != raw["image"]:
                problem = f"has no {what}" if part is None else f"its {what} is about another picture"
                raise ClocError(problem, file=file, sample=name, remedy="Fetch the data again.")
        texts = [part["text"] for part in (raw, *parts.values()) if part is not None]
        questions.append(BenchQuestion(name, raw["category"], raw["image"], *texts))
    return questions


def _by_id(file: Path) -> dict[str, dict[str, Any]]:
    lines = JsonLines(file)
    found: dict[str, dict[str, Any]] = {}
    for number in range(len(lines)):
        raw, where = lines[number], lines.where(number)[1]
        name = str(raw.get("question_id"))
        lacks = [key for key in ("image", "text") if not isinstance(raw.get(key), str)]
        if "question_id" not in raw or lacks or name in found:
            problem = f"question {name} stands there twice" if name in found else f"has no {(*lacks, 'question_id')[0]}"
            raise ClocError(problem, file=file, sample=where)
        found[name] = raw
    return found


def _read_rules(file: Path) -> dict[str, str] | None:
    """The rules that the data bring, by category; None if they bring none."""
    if not file.is_file():
        return None
    try:
        rules = json.loads(file.read_text(encoding="utf-8"))
        return {category: str(rules[category]["prompt"]) for category in CATEGORIES}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ClocError(f"holds no rules for the judge: {type(error).__name__}: {error}", file=file) from error


def evaluate_bench(
    answerer: Answerer,
    bench: Bench,
    judge: Judge,
    replies: ReplyFile,
    asking: MllmSettings | None = None,
    settings: AskingSettings | None = None,
) -> Outcome:
    """Ask the model every question, then the judge about every answer.

    Args:
        answerer: Who is asked.
        bench: The questions.
        judge: Who marks.
        replies: Where the judge's replies are kept.
        asking: How to ask.
        settings: What to put behind every question.
    """
    asking, settings = asking or MllmSettings(), settings or AskingSettings()
    questions = bench.questions
    pictures = [picture_in(bench.pictures, one.image) for one in questions]
    sizes = [picture_size(picture) for picture in pictures]

    def conversation(k: int) -> list[dict[str, Any]]:
        return question(pictures[k], with_regions(questions[k].text, sizes[k]), settings.suffix)

    answers = ask_each(answerer, len(questions), conversation, asking, "questions")
    records = []
    with tqdm(total=len(questions), unit="reply", desc="judge", disable=None if asking.progress else True) as bar:
        for one, answer, size, picture in zip(questions, answers, sizes, pictures, strict=True):
            told = answer_for_judge(one.category, answer, size)
            prompt = judge_prompt(one, told, bench.rules[one.category])
            reply = replies.reply(judge, prompt, {"id": one.id, "category": one.category, "answer": told})
            marks = read_marks(reply)
            about: dict[str, Any] = {"id": one.id, "category": one.category, "image": one.image, "question": one.text}
            if marks is not None:
                about |= {"picture": str(picture), "truth": one.reference, "score": marks[1] / MARKS[1]}
                about |= {"right": marks[1] >= marks[0]}
            records.append(about | {"told": told, "marks": marks, "judge": reply} | answer_record(answer))
            bar.update()
    marked = [record for record in records if record["marks"] is not None]
    unmarked = Counter(record["category"] for record in records if record["marks"] is None)
    details = {
        "grounding_mode": grounding_mode(answerer),
        "judge": {
            "model": judge.model,
            "temperature": judge.temperature,
            "rules": "this project's wording" if bench.own_rules else "rule.json of the data",
            "replies asked for now": replies.asked,
            "replies without marks, left out": dict(unmarked) or 0,
        },
        "mean marks": _mean_marks(marked),
    }
    wanted = list(dict.fromkeys(one.category for one in questions))
    metrics = _scores(marked, wanted, asking.seed)
    return Outcome(bench.ref, metrics, details, 1 - len(marked) / len(records), records)


def with_regions(text: str, size: tuple[int, int]) -> list[dict[str, Any]]:
    """A question as items of a message, its boxes (in shares) as regions in pixels.

    Args:
        text: The question.
        size: Width and height of the picture.
    """
    found = _SHARES.decode(text, *size)
    parts, end = [], 0
    for start, stop in found.spans:
        parts += [text[end:start], REGION]
        end = stop
    return question_items("".join([*parts, text[end:]]), [{"box": box} for box in found.boxes])


def answer_for_judge(category: str, answer: Answered, size: tuple[int, int]) -> str:
    """An answer as the judge sees it, as the published bench has it.

    Where a region is asked about, boxes are taken out of the answer. Where boxes are asked for, they are shares of
    width and height with three decimals, as in the context, whatever form the model writes them in.

    Args:
        category: Of the question.
        answer: The answer, boxes in pixels.
        size: Width and height of the picture.
    """
    unread = list(answer.unparsed)
    boxes = iter(answer.boxes)

    def written(match: re.Match[str]) -> str:
        if match.group() in unread:
            unread.remove(match.group())
            return ""
        found = next(boxes, None)
        if category != "ground_conv" or found is None:
            return ""
        return _SHARES.encode(found["box"], *size)

    text = _BOX.sub(written, answer.text)
    return re.sub(r" +(?=[.,;:!?])", "", re.sub(r" {2,}", " ", text)).strip()


def judge_prompt(one: BenchQuestion, answer: str, rule: str) -> str:
    """What the judge is asked about one answer; the reference is assistant 1, as in the published bench."""
    return (
        f"[Context]\n{one.context}\n\n[Question]\n{one.text}\n\n"
        f"[Assistant 1]\n{one.reference}\n[End of assistant 1]\n\n"
        f"[Assistant 2]\n{answer}\n[End of assistant 2]\n\n[Task]\n{rule}\n"
    )


def read_marks(reply: str) -> tuple[float, float] | None:
    r"""The marks of reference and model in the first line of a judge's reply; None if they cannot be read.

    >>> read_marks("8 7.5\nBoth know the object.")
    (8.0, 7.5)
    """
    lines = reply.strip().splitlines() or [""]
    parts = lines[0].replace(",", " ").split()
    try:
        marks = [float(part) for part in parts]
    except ValueError:
        return None
    if len(marks) != 2 or not all(MARKS[0] <= mark <= MARKS[1] for mark in marks):
        return None
    return marks[0], marks[1]


def _scores(marked: Sequence[Mapping[str, Any]], wanted: Sequence[str], seed: int) -> dict[str, Metric]:
    """The mean over categories, then each; NaN where no reply could be read."""

    def score(records: Sequence[Mapping[str, Any]]) -> Metric:
        references, scores = ([record["marks"][k] for record in records] for k in (0, 1))
        categories, images = ([record[key] for record in records] for key in ("category", "image"))
        return relative_metric(scores, references, categories, images, seed=seed)

    parts = {category: [record for record in marked if record["category"] == category] for category in wanted}
    # A mean over the categories that happened to be marked would not be the same number.
    average = score(marked if all(parts.values()) else [])
    found = {"ferret_bench_average": average}
    return found | {f"ferret_bench_{category}": score(mine) for category, mine in parts.items()}


def _mean_marks(marked: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    found = {}
    for category in CATEGORIES:
        marks = [record["marks"] for record in marked if record["category"] == category]
        if marks:
            reference, model = (sum(pair[k] for pair in marks) / len(marks) for k in (0, 1))
            found[category] = f"reference {reference:.2f}, model {model:.2f}, {len(marks)} answers"
    return found
