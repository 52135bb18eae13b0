"""What lmms-eval costs beyond the model's own time: the same questions through it and straight through the Predictor.

    MODEL=runs/demo/mllm/cloc_prompter/instruct/export
    python scripts/benchmarks/lmms_overhead.py --model $MODEL --data runs/demo/data

The questions are those of the task `cloc_scenes_vqa`. Either way answers them in batches of the same size with the same
options, and must give the same answers. Start-up (imports, loading the model, finding and loading the task) is not
counted. The two take turns in one process, each with an empty memory of pictures, and medians count. On a CPU it is the
process's own time that counts, so that others' work on the machine does not; on a GPU it is the wall clock.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from typing import Any

import torch
from common import argument_parser, print_table, run_case, write_report

TASK = "cloc_scenes_vqa"
TOKENS = 48
"""Longest answer; what the task's YAML says."""


def clock() -> float:
    """Seconds on the clock that counts."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def directly(predictor: Any, case: dict[str, Any]) -> tuple[float, list[str]]:
    """Read the questions and answer them with the Predictor alone: seconds, and the answers."""
    from cloc_mllm.data.dataset import ConversationDataset
    from cloc_mllm.evaluation.lmms.tasks.documents import scene_questions

    docs = scene_questions(case["data"], "vqa")[: case["limit"]]
    questions = ConversationDataset(docs[0]["file"])
    predictor.cache.clear()
    start, said = clock(), []
    for first in range(0, len(docs), case["batch"]):
        conversations = [questions[doc["row"]]["messages"] for doc in docs[first : first + case["batch"]]]
        said += predictor.chat(conversations, max_new_tokens=TOKENS, batch_size=case["batch"])
    return clock() - start, [answer.text.strip() for answer in said]


def through_lmms_eval(predictor: Any, case: dict[str, Any]) -> tuple[float, list[str]]:
    """Evaluate the task, from building the requests to the figures: seconds, and the answers."""
    from lmms_eval import evaluator

    from cloc_mllm.evaluation.lmms.runs import Run, evaluate_here

    spent: list[float] = []
    whole = evaluator.evaluate

    def timed(*words: Any, **options: Any) -> Any:
        start = clock()
        try:
            return whole(*words, **options)
        finally:
            spent.append(clock() - start)

    predictor.cache.clear()
    evaluator.evaluate = timed
    try:
        with tempfile.TemporaryDirectory() as out:
            run = Run(case["model"], (TASK,), out, limit=case["limit"], batch_size=case["batch"])
            found = evaluate_here(run, predictor)
    finally:
        evaluator.evaluate = whole
    assert found is not None
    return spent[0], [sample["answer"] for sample in found.samples[TASK]]


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Measure both ways in turns."""
    os.environ["CLOC_SCENES"] = case["data"]
    from cloc_mllm.inference.predictor import Predictor

    predictor = Predictor.from_pretrained(case["model"])
    ways = {"predictor": directly, "lmms-eval": through_lmms_eval}
    for way in ways.values():
        way(predictor, {**case, "limit": case["batch"]})  # warms up: imports, and what torch sets up once
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(case["repeats"]):
        said = {}
        for name, way in ways.items():
            spent, said[name] = way(predictor, case)
            seconds[name].append(spent)
        assert said["predictor"] == said["lmms-eval"], "the two ways gave different answers"
    middle = case["repeats"] // 2
    turns = zip(seconds["lmms-eval"], seconds["predictor"], strict=True)
    found = {f"{name}_seconds": sorted(times)[middle] for name, times in seconds.items()}
    return {**found, "share": sorted(theirs / ours - 1 for theirs, ours in turns)[middle], "n": len(said["predictor"])}


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argument_parser(__doc__)
    parser.add_argument("--model", metavar="M", help="an MLLM")
    parser.add_argument("--data", metavar="D", help="the folder that `cloc-mllm data scenes` wrote")
    parser.add_argument("--limit", type=int, default=128, help="questions (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="questions answered together (default: %(default)s)")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(run(json.loads(args.case))))
        return
    if args.model is None or args.data is None:
        parser.error("--model and --data are needed")
    case = {"model": args.model, "data": args.data, "limit": args.limit, "batch": args.batch, "repeats": args.repeats}
    result = run_case(__file__, case, args.timeout)
    table = [["questions", "Predictor, s", "lmms-eval, s", "more"]]
    if "failed" in result:
        table.append([str(args.limit), result["failed"], "–", "–"])
    else:
        times = [f"{result[f'{name}_seconds']:.2f}" for name in ("predictor", "lmms-eval")]
        table.append([str(result["n"]), *times, f"{100 * result['share']:.1f} %"])
    print_table(table)
    write_report(args.out, "lmms_overhead", [result])


if __name__ == "__main__":
    main()
