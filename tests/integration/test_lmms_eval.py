"""lmms-eval's own command on our tasks, and the same on two processes: the same answers, the same figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")

from cloc_mllm.data.scenes.generator import generate_scenes
from cloc_mllm.evaluation.lmms.runs import OWN_TASKS, Found, Run, evaluate
from tests.builders_mllm import tiny_mllm

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 3

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and scenes."""
    folder = tmp_path_factory.mktemp("lmms")
    for part in tiny_mllm():
        part.save_pretrained(folder / "model")
    generate_scenes(folder / "scenes", "quick", n=1, n_val=4, n_test=12, seed=3, progress=False, overwrite=True)
    return folder


def plugin_path(folder: Path) -> list[str]:
    """What makes the entry point known where the package is on the path without being installed."""
    if any(one.name == "cloc_mllm" for one in entry_points(group="lmms_eval.models")):
        return []
    info = folder / "site" / "cloc_mllm-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: cloc-mllm\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[lmms_eval.models]\ncloc_mllm = cloc_mllm.evaluation.lmms.plugin:MANIFESTS\n"
    )
    return [str(info.parent)]


def test_the_command_and_two_processes_agree(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A question is answered alike by lmms-eval's command, alone and in a batch, and by either of two processes.

    The three tasks have 3 questions each, so one of the two processes has one question more than the other.
    """
    monkeypatch.setenv("CLOC_SCENES", str(prepared / "scenes"))
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(prepared / "datasets"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*plugin_path(prepared), str(ROOT)]))
    scores, said = by_command(prepared)
    two = by_two_processes(prepared)
    assert set(two.samples) == set(said) == {f"cloc_scenes_{task}" for task in ("vqa", "referring", "grounding")}
    for task, samples in two.samples.items():
        assert [sample["answer"] for sample in samples] == said[task]
        assert len(said[task]) == LIMIT
        figures = {key: value for key, value in scores[task].items() if key.endswith(",none") and "stderr" not in key}
        assert {key: two.scores[task][key] for key in figures} == pytest.approx(figures)


def by_command(folder: Path) -> tuple[dict[str, dict[str, float]], dict[str, list[str]]]:
    """The figures and the answers of each task, as `python -m lmms_eval` writes them."""
    words = [sys.executable, "-m", "lmms_eval", "--model", "cloc_mllm", "--tasks", "cloc_scenes"]
    words += ["--model_args", f"pretrained={folder / 'model'}", "--include_path", str(OWN_TASKS), "--batch_size", "2"]
    words += ["--device", "cpu", "--limit", str(LIMIT), "--output_path", str(folder / "out"), "--log_samples"]
    # Without DEBUG the command exits with 0 whatever happens.
    done = subprocess.run([*words, "--verbosity", "DEBUG"], capture_output=True, text=True, cwd=folder, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads(next((folder / "out").rglob("*_results.json")).read_text())
    said = {}
    for task in results["n-samples"]:
        lines = next((folder / "out").rglob(f"*_samples_{task}.jsonl")).read_text().splitlines()
        rows = sorted((json.loads(line) for line in lines), key=lambda row: row["doc_id"])
        said[task] = [row["filtered_resps"] for row in rows]
        assert all(row["token_counts"][0]["output_tokens"] > 0 for row in rows)
    answers = {task: [row[0] if isinstance(row, list) else row for row in rows] for task, rows in said.items()}
    return results["results"], answers


def by_two_processes(folder: Path) -> Found:
    """The same as the suite runs it on two processes."""
    run = Run(str(folder / "model"), ("cloc_scenes",), str(folder / "two"), limit=LIMIT, batch_size=1, device="cpu")
    return evaluate(run, processes=2)
