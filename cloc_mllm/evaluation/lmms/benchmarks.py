"""The benchmarks by the names that people use, and what must be known about each to report it honestly."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from cloc_mllm.evaluation.reporting.known_splits import KNOWN_EXPRESSIONS


@dataclass(frozen=True)
class Benchmark:
    """One benchmark that lmms-eval ships.

    Attributes:
        tasks: Its tasks in lmms-eval.
        folder: Where they lie below `lmms_eval/tasks`: reading one folder saves half a minute over reading all.
        note: What the figures do not say of themselves.
    """

    tasks: tuple[str, ...]
    folder: str
    note: str = ""


_POPE = (
    "the whole answer, in lower case, must be yes or no: 'yes.' counts as wrong; pope_yes_ratio is the share of yes "
    "among the truths, not among the answers"
)
_REC = "boxes are asked for, printed and read as shares (0 to 1) of the original picture's sides"
_MIXED = f"{_REC}; the hub's val is a mixture of the UNC (or UMD) and the Google split, its test is Google's"
_CAPTION = "captioning of a boxed region (CIDEr), not grounding"
_JSON = "each box is tried as pixels and as 0-1000, and the best IoU over boxes and readings counts: inflated"

BENCHMARKS: dict[str, Benchmark] = {
    "gqa": Benchmark(("gqa",), "gqa"),
    "textvqa": Benchmark(("textvqa_val",), "textvqa"),
    "vqav2": Benchmark(("vqav2_val",), "vqav2"),
    "pope": Benchmark(("pope",), "pope", _POPE),
    "mme": Benchmark(("mme",), "mme", "points: of 2,000 for perception and of 800 for cognition"),
    "mm-vet": Benchmark(("mmvet",), "mmvet", "judged"),
    "llava-w": Benchmark(("llava_in_the_wild",), "llava-in-the-wild", "judged"),
    "ferret": Benchmark(("ferret",), "ferret", "judged"),
    "seed": Benchmark(("seedbench",), "seedbench", "seed_all counts video questions too; seed_image is the pictures'"),
    "mmbench": Benchmark(("mmbench_en_dev_static",), "mmbench", "options are matched by rules, without a judge"),
    "scienceqa": Benchmark(("scienceqa_img",), "scienceqa", "the questions that have a picture"),
    "refcoco-rec": Benchmark(("refcoco_bbox_rec_testA", "refcoco_bbox_rec_testB"), "refcoco", _REC),
    "refcoco+-rec": Benchmark(("refcoco+_bbox_rec_testA", "refcoco+_bbox_rec_testB"), "refcoco+", _REC),
    "refcocog-rec": Benchmark(("refcocog_bbox_rec_test",), "refcocog", _REC),
}
"""What `tasks=gqa,pope` may name beside lmms-eval's own names."""

_SEGMENT = "captioning of a region with its outline drawn (CIDEr), not segmentation"

TASK_NOTES = {
    "refcoco_bbox_rec_val": _MIXED,
    "refcoco_bbox_rec_test": _MIXED,
    "refcocog_bbox_rec_val": _MIXED,
    "refcoco*_bbox_rec_*": _REC,
    "refcoco*_bbox_*": _CAPTION,
    "refcoco*_seg_*": _SEGMENT,
    "refcoco*_grounding_*": _JSON,
}
"""By pattern of the task's name; the first that fits counts."""

ZERO_BOXES = ("refcoco*_bbox_rec_*", "refcoco*_grounding_*")
"""Shipped tasks that take an answer without a readable box for the box [0, 0, 0, 0]."""

KNOWN_SIZES = {
    "gqa": 12_578,
    "textvqa_val": 5_000,
    "vqav2_val": 214_354,
    "pope": 9_000,
    "mme": 2_374,
    "mmvet": 218,
    "llava_in_the_wild": 60,
    "ferret": 120,
    "seedbench": 17_990,
    "mmbench_en_dev_static": 4_329,
    "scienceqa_img": 2_017,
    **{
        f"cloc_{name.replace('+', '_plus')}_rec_{split}": KNOWN_EXPRESSIONS[name][split]
        for name in ("refcoco", "refcoco+", "refcocog")
        for split in KNOWN_EXPRESSIONS[name]
        if split != "train"
    },
    "cloc_flickr30k_entities": 14_481,
}
"""Questions of the published splits. A copy with another number of them is never called by the split's name."""


POINTS = ("mme_perception_score", "mme_cognition_score")
"""Metrics that are sums of points, not shares."""

MEANS = ("pope_accuracy",)
"""Metrics of shipped tasks that are means over questions without being declared as such. That a figure happens to equal
the mean of its samples' scores, as a recall of 0 does, tells nothing."""


@dataclass(frozen=True)
class Judged:
    """How a judged task's samples tell a call that failed.

    Attributes:
        pairs: Whether a sample's `scores` are the reference's and the model's; else there is one `score`, and a failed
            call has no `eval_model`.
    """

    pairs: bool


JUDGED = {
    "ferret": Judged(pairs=True),
    "llava_in_the_wild": Judged(pairs=True),
    "llava_bench_coco": Judged(pairs=True),
    "mmvet": Judged(pairs=False),
}
"""The judged tasks whose failed calls can be told from their samples. No other judged task is run: lmms-eval averages
a failed call as if it were a score, up to 100 where all of them failed."""

SHEETS = "mmbench*"
"""The tasks whose metric `submission` is a spreadsheet, written by openpyxl when all questions have been answered."""

STATIC = ("mmbench_en_dev_static",)
"""Tasks whose metrics are named after a judge they do not ask."""


def needs_judge(task: str, metrics: list[str]) -> bool:
    """Whether a task's figures come from a judge, going by the names of its metrics."""
    return task not in STATIC and any(name.startswith(("gpt_eval", "llm_as_judge", "llm_judge")) for name in metrics)


def note_on(task: str) -> str:
    """Return what a reader of a task's figures must know, or nothing."""
    by_benchmark = next((one.note for one in BENCHMARKS.values() if task in one.tasks), "")
    return next((note for pattern, note in TASK_NOTES.items() if fnmatchcase(task, pattern)), by_benchmark)
