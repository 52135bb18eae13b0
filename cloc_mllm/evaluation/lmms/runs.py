"""One evaluation by lmms-eval, in this process or in several, reduced to what a report needs.

lmms-eval's command exits with 0 when an evaluation fails; here a failure is a :class:`ClocError`. Several processes run
the same function under accelerate, so that one process and many give the same results.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import ImageFile

from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.lmms.benchmarks import BENCHMARKS, JUDGED, MEANS, SHEETS, needs_judge

OWN_TASKS = Path(__file__).parent / "tasks"
_PACKAGES = ("lmms_eval", "evaluate", "pytablewriter", "sacrebleu", "sklearn", "loguru", "tenacity")


@dataclass(frozen=True)
class Run:
    """What is evaluated, and how.

    Attributes:
        model: A checkpoint.
        tasks: Names of lmms-eval's tasks, tags and groups, of ours, or of :data:`.BENCHMARKS`.
        out: Where tasks put files of their own, such as submissions.
        include_path: A further folder of tasks.
        limit: The first so many questions of each task; None for all.
        batch_size: Questions answered together.
        device: Where the model runs; default a GPU if there is one.
        max_new_tokens: Longest answer in tokens where a task names none.
        box_format: See :func:`.frames.codec_for`.
        constrain_boxes: Whether boxes written as text must come out well-formed.
        trust_remote_code: Whether code in the checkpoint may run.
        gen_kwargs: Options of generation that win over the tasks', as in `num_beams=3`.
        judge: Base URL of an OpenAI-compatible server, as in `https://host/v1`; default OpenAI's, if there is a key.
        judge_model: The model to ask there.
        judge_key_variable: The environment variable that holds the key.
    """

    model: str
    tasks: tuple[str, ...]
    out: str
    include_path: str | None = None
    limit: int | None = None
    batch_size: int = 1
    device: str | None = None
    max_new_tokens: int = 128
    box_format: str = "auto"
    constrain_boxes: bool = False
    trust_remote_code: bool = False
    gen_kwargs: str | None = None
    judge: str | None = None
    judge_model: str | None = None
    judge_key_variable: str = "OPENAI_API_KEY"


@dataclass(frozen=True)
class Found:
    """What an evaluation came to.

    Attributes:
        scores: Of each task and metric, what lmms-eval made of all samples.
        samples: Of each task, its samples in order: `doc_id`, `doc` (pictures left out), `target`, `answer`, `tokens`,
            and `metrics`, what the task made of each answer.
        sizes: Of each task, how many questions its data hold.
        means: Of each task, the metrics that are means over its questions.
        version: Of lmms-eval.
    """

    scores: Mapping[str, Mapping[str, Any]]
    samples: Mapping[str, Sequence[Mapping[str, Any]]]
    sizes: Mapping[str, int]
    means: Mapping[str, Sequence[str]]
    version: str


def evaluate(run: Run, processes: int = 1) -> Found:
    """Run an evaluation to its end.

    Args:
        run: What and how.
        processes: On how many processes; each loads the model.

    Raises:
        ClocError: lmms-eval is not installed, a task is unknown or cannot be judged, or anything fails on the way.
    """
    require_lmms_eval()
    if processes == 1:
        found = evaluate_here(run)
        assert found is not None, "one process is the first of all"
        return found
    return _in_processes(run, processes)


def require_lmms_eval() -> None:
    """Check that lmms-eval can be imported.

    Raises:
        ClocError: It, or something that it needs at once, is not installed.
    """
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise ClocError(
            f"lmms-eval cannot run: {', '.join(missing)} is not installed",
            remedy="Install it: pip install 'cloc-mllm[eval]', or the light way that docs/lmms-eval.md tells.",
        )


@contextmanager
def _pillow_as_it_was() -> Iterator[None]:
    """Undo what the import of lmms-eval sets for the whole process: pictures that are cut off are read as if whole."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


@_pillow_as_it_was()
def evaluate_here(run: Run, predictor: Any = None) -> Found | None:
    """Run an evaluation in this process, which may be one of several.

    Args:
        run: What and how.
        predictor: The model, if it is loaded already.

    Returns:
        What it came to; None on every process but the first.

    Raises:
        ClocError: As :func:`evaluate`.
    """
    with _environment(run):
        from lmms_eval.evaluator import simple_evaluate

        from cloc_mllm.evaluation.lmms.chat import ClocMllmChat

        manager, names = find_tasks(run)
        model = ClocMllmChat(
            pretrained=run.model,
            predictor=predictor,
            batch_size=run.batch_size,
            device=run.device,
            max_new_tokens=run.max_new_tokens,
            box_format=run.box_format,
            constrain_boxes=run.constrain_boxes,
            trust_remote_code=run.trust_remote_code,
        )
        # Some tasks look these up to write files of their own.
        arguments = argparse.Namespace(output_path=run.out, process_with_media=False, reasoning_tags=None)
        try:
            results = simple_evaluate(
                model,
                tasks=names,
                limit=run.limit,
                batch_size=run.batch_size,
                gen_kwargs=run.gen_kwargs,
                task_manager=manager,
                cli_args=arguments,
                bootstrap_iters=0,
                process_docs_parallel=1,
            )
        except ClocError:
            raise
        except Exception as error:
            raise _failure(error) from error
    return None if results is None else _reduced(results)


@_pillow_as_it_was()
def find_tasks(run: Run) -> tuple[Any, list[str]]:
    """Find tasks by their names, without reading all of lmms-eval's 1,900 files where that can be helped.

    Returns:
        lmms-eval's `TaskManager`, and the names as it knows them.

    Raises:
        ClocError: There is no such task, or it needs a judge or a package that there is not.
    """
    import lmms_eval
    from lmms_eval.tasks import TaskManager

    from cloc_mllm.evaluation.lmms.plugin import MODEL_NAME

    shipped = Path(lmms_eval.__file__).parent / "tasks"
    names = [task for name in run.tasks for task in (BENCHMARKS[name].tasks if name in BENCHMARKS else (name,))]
    places = [OWN_TASKS]
    if run.include_path is not None:
        if not Path(run.include_path).is_dir():
            raise ClocError("there is no such folder of tasks", file=run.include_path)
        places.append(Path(run.include_path))
    # The first place that has a name wins: a folder of one's own can point a shipped task at a local copy of its data.
    places += [shipped / BENCHMARKS[name].folder for name in run.tasks if name in BENCHMARKS]
    where = [str(place) for place in dict.fromkeys(places)]
    manager = TaskManager("ERROR", include_path=where, include_defaults=False, model_name=MODEL_NAME)
    if any(name not in manager.all_tasks for name in names):
        manager = TaskManager("ERROR", include_path=where, include_defaults=True, model_name=MODEL_NAME)
    for name in names:
        if name not in manager.all_tasks:
            raise ClocError(
                f"there is no task '{name}'",
                remedy=f"Name one of lmms-eval's (lmms-eval tasks list), of ours (cloc_…), or {', '.join(BENCHMARKS)}.",
            )
        for leaf, config in _leaves(manager, name):
            _require_judge(leaf, config, run)
            _require_sheets(leaf, config)
    return manager, list(dict.fromkeys(names))


def _leaves(manager: Any, name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the tasks behind a name, and their YAML without the functions (importing some fails without a judge)."""
    from lmms_eval.utils import load_yaml_config

    entry = manager.task_index.get(name)
    if entry is None:
        return
    if entry["type"] == "task":
        yield name, load_yaml_config(entry["yaml_path"], mode="simple")
    elif entry["type"] == "tag":
        for one in entry["task"]:
            yield from _leaves(manager, one)
    elif entry["yaml_path"] != -1:
        for one in load_yaml_config(entry["yaml_path"], mode="simple")["task"]:
            yield from _leaves(manager, one if isinstance(one, str) else one["task"])


def _require_judge(task: str, config: Mapping[str, Any], run: Run) -> None:
    """Refuse a judged task without a judge, or one whose failed calls could not be told from scores."""
    metrics = [str(one["metric"]) for one in config.get("metric_list") or ()]
    if not needs_judge(task, metrics):
        return
    if task not in JUDGED and str(config.get("task")) not in JUDGED:
        raise ClocError(
            f"the task '{task}' is scored by a judge, and its samples do not tell failed calls from scores",
            remedy=f"Judged tasks that can be trusted: {', '.join(JUDGED)}. For MMBench, use mmbench.",
        )
    if run.judge is None and not os.environ.get(run.judge_key_variable):
        raise ClocError(
            f"the task '{task}' is scored by a judge, and there is none",
            remedy=f"Set {run.judge_key_variable}, or name an OpenAI-compatible server: --set judge=http://host:8000/v1.",
        )


def _require_sheets(task: str, config: Mapping[str, Any]) -> None:
    """Refuse a task that would fail once all is answered, because what it writes then needs a package."""
    writes = any(one["metric"] == "submission" for one in config.get("metric_list") or ())
    if writes and fnmatchcase(task, SHEETS) and find_spec("openpyxl") is None:
        raise ClocError(
            f"the task '{task}' writes a spreadsheet, and openpyxl is not installed",
            remedy="Install it: pip install openpyxl.",
        )


@contextmanager
def _environment(run: Run) -> Iterator[None]:
    """What the judged tasks of lmms-eval read from the environment while they are imported."""
    wanted = {}
    if run.judge is not None:
        base = run.judge.rstrip("/")
        wanted = {
            "OPENAI_API_URL": f"{base}/chat/completions",
            "OPENAI_BASE_URL": base,
            "OPENAI_API_KEY": os.environ.get(run.judge_key_variable) or "none",
            "API_TYPE": "openai",
        }
    if run.judge_model is not None:
        wanted["MODEL_VERSION"] = run.judge_model
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _failure(error: Exception) -> ClocError:
    """What went wrong: lmms-eval tries some steps several times and wraps the last error."""
    attempt = getattr(error, "last_attempt", None)
    cause = attempt.exception() if attempt is not None else error
    if isinstance(cause, ClocError):
        return cause
    return ClocError(f"lmms-eval failed ({type(cause).__name__}: {cause})")


def _reduced(results: Mapping[str, Any]) -> Found:
    """What of lmms-eval's results is needed, as plain JSON values: the same from one process and from many."""
    samples = {}
    for task, rows in results["samples"].items():
        kept = [_sample(row) for row in sorted(rows, key=lambda row: row["doc_id"])]
        samples[task] = json.loads(json.dumps(kept, default=_plain))
    scores = json.loads(json.dumps({task: results["results"][task] for task in samples}, default=_plain))
    sizes = {task: int(results["n-samples"][task]["original"]) for task in samples}
    means = {task: _means(task, results["configs"][task]) for task in samples}
    return Found(scores, samples, sizes, means, version("lmms-eval"))


def _means(task: str, config: Mapping[str, Any]) -> list[str]:
    """The metrics of a task that are means over its questions: those declared so, and all of ours."""
    rows = config["metric_list"]
    return [
        row["metric"]
        for row in rows
        if row.get("aggregation") == "mean" or row["metric"] in MEANS or task.startswith("cloc_")
    ]


_SAMPLE_KEYS = ("doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "token_counts", "doc_hash")


def _sample(row: Mapping[str, Any]) -> dict[str, Any]:
    answers = row["filtered_resps"]
    return {
        "doc_id": row["doc_id"],
        "doc": row["doc"],
        "target": row["target"],
        "answer": answers[0] if len(answers) == 1 else answers,
        "tokens": row["token_counts"][0],
        "metrics": {key: row[key] for key in row if key not in (*_SAMPLE_KEYS, "input_media")},
    }


def _plain(value: Any) -> Any:
    """A number of numpy as a number, anything else as text."""
    return value.item() if hasattr(value, "item") else str(value)


def _in_processes(run: Run, processes: int) -> Found:
    """Run the same on several processes under accelerate."""
    out = Path(run.out)
    out.mkdir(parents=True, exist_ok=True)
    asked, answered = out / "lmms_run.json", out / "lmms_found.json"
    asked.write_text(json.dumps(dataclasses.asdict(run)), encoding="utf-8")
    answered.unlink(missing_ok=True)
    words = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    words += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    words += ["--main_process_port", str(_free_port())]
    words += ["--cpu"] if run.device == "cpu" or not torch.cuda.is_available() else ["--multi_gpu"]
    words += ["-m", "cloc_mllm.evaluation.lmms.runs", str(asked), str(answered)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode != 0 or not answered.exists():
        said = [line for line in done.stderr.splitlines() if line.startswith("runs: error:")]
        (out / "lmms_error.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
        problem = said[0].removeprefix("runs: error:").strip() if said else f"a process ended with {done.returncode}"
        raise ClocError(problem, remedy=f"All that the processes said is in {out / 'lmms_error.txt'}.")
    found = json.loads(answered.read_text(encoding="utf-8"))
    asked.unlink()
    answered.unlink()
    return Found(**found)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main(argv: Sequence[str]) -> int:
    """One of several processes: read what to run, run it, and, as the first, write what it came to."""
    given = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    try:
        found = evaluate_here(Run(**{**given, "tasks": tuple(given["tasks"])}))
    except ClocError as error:
        print(f"runs: error: {error}", file=sys.stderr)
        return 2
    if found is not None:
        Path(argv[1]).write_text(json.dumps(dataclasses.asdict(found)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
