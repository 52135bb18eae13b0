"""Pre-training on streams: mixtures of shards, over processes and workers, broken samples, and an interruption."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pytest

from cloc_mllm.data.readers import open_samples
from cloc_mllm.data.tar_writer import WebDatasetWriter
from cloc_mllm.data.writers import ParquetWriter
from tests.builders_training import CONFIGS, TINY_ENCODER, losses, metrics, run_program, write_regions
from tests.harness import run_ranks

pytestmark = pytest.mark.integration


def write_down(rank: int, argv: list[str], record: str) -> None:
    """Train while writing down which samples each micro-batch holds, told apart by the sums of their pixels."""
    from cloc_mllm.training.pretraining.pretrain import PretrainTrainer

    original = PretrainTrainer.compute_loss

    def compute_loss(self: PretrainTrainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        sums = inputs["pixel_values"].double().sum(dim=(1, 2, 3)).tolist()
        with Path(f"{record}.{rank}").open("a") as file:
            file.write(json.dumps([self.state.global_step, [f"{value:.6f}" for value in sums]]) + "\n")
        return original(self, model, inputs, *args, **kwargs)

    PretrainTrainer.compute_loss = compute_loss  # type: ignore[method-assign]
    # Workers as a launcher's process has them; a rank would start its own the way it was started itself, which is slow.
    multiprocessing.set_start_method("fork", force=True)
    run_program(rank, "pretrain_cloc", argv)


def samples_of_steps(record: Path, ranks: int) -> dict[int, list[str]]:
    steps: dict[int, list[str]] = {}
    for rank in range(ranks):
        for line in Path(f"{record}.{rank}").read_text().splitlines():
            step, samples = json.loads(line)
            steps.setdefault(step, []).extend(samples)
    return {step: sorted(samples) for step, samples in steps.items()}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Tar shards with one broken sample, without indexes, and Parquet with half their weight."""
    folder = tmp_path_factory.mktemp("mixture")
    source = open_samples(write_regions(folder / "json", 48))
    with WebDatasetWriter(folder / "tar", shard=9) as tar, ParquetWriter(folder / "parquet") as parquet:
        for k in range(32):
            sample = source[k] if k != 7 else {**source[k], "caption": ""}
            tar.write(sample, source.folder(k))
        for k in range(32, 48):
            parquet.write(source[k], source.folder(k))
    for index in (folder / "tar").glob("*.index"):
        index.unlink()
    return f"[{{path: {folder / 'tar'}, weight: 2}}, {{path: {folder / 'parquet'}}}]"


def test_a_mixture_trains_and_resumes_with_exactly_the_rest(mixture: str, tmp_path: Path) -> None:
    def train(output: Path, record: str, world: int, *overrides: str) -> Path:
        argv = ["--config", str(CONFIGS / "pretrain_quick.yaml"), *TINY_ENCODER, f"data.train={mixture}"]
        argv += [f"run.output={output}", "run.steps=8", "run.batch_size=8", "data.lanes=8", "data.chunk=2"]
        argv += ["data.shuffle_block=5", "data.on_bad_sample=skip", "run.save_every=3", "run.keep=null", *overrides]
        run_ranks(write_down, world, argv, str(tmp_path / record), init_group=False, timeout=200)
        return output

    whole = train(tmp_path / "whole", "whole", 2, "run.zero=2", "run.workers=2")
    alone = train(tmp_path / "alone", "alone", 1, "run.zero=none")
    assert samples_of_steps(tmp_path / "whole", 2) == samples_of_steps(tmp_path / "alone", 1)
    assert losses(whole) == pytest.approx(losses(alone), abs=1e-4)
    assert metrics(whole)[-1]["skipped"] >= 1
    assert metrics(alone)[-1]["skipped"] >= 1

    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    for later in ("checkpoint-6", "checkpoint-8", "export"):
        shutil.rmtree(cut / later, ignore_errors=True)
    train(cut, "cut", 2, "run.zero=2", "run.workers=1", "--resume")
    assert losses(cut) == losses(whole)
    seen = samples_of_steps(tmp_path / "whole", 2)
    assert samples_of_steps(tmp_path / "cut", 2) == {step: seen[step] for step in range(3, 8)}
