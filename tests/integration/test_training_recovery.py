"""What large runs meet: other machines to go on with, full disks, broken samples, ranks that stand still."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from cloc_mllm.training.encoder import load_encoder
from tests.builders_training import CONFIGS, TINY_ENCODER, losses, run_program, write_regions
from tests.harness import run_ranks

pytestmark = pytest.mark.integration

STEPS, BATCH = 6, 4
# What a resumed optimiser could get wrong without a word: decay on some groups only, a rate of its own for a part.
# The large epsilon keeps Adam from making whole steps of gradients that are rounding and nothing else.
GROUPS = (
    "optim.eps=1.0e-4",
    "optim.weight_decay=0.5",
    "parts.prompter={mode: full, lr: 5.0e-3}",
    "parts.temperatures={mode: full, lr: 0.2}",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_regions(tmp_path_factory.mktemp("data"), 48)


@pytest.fixture(scope="module")
def whole_shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Stage 3 that shards even the smallest parameter: by default it keeps those of tiny models whole."""
    config = json.loads((CONFIGS.parent / "zero" / "zero3.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = tmp_path_factory.mktemp("zero") / "zero3_all.json"
    path.write_text(json.dumps(config))
    return str(path)


def arguments(data: Path, output: Path, *overrides: str) -> list[str]:
    sizes = (f"run.steps={STEPS}", f"run.batch_size={BATCH}", f"data.train={data}", f"run.output={output}")
    return ["--config", str(CONFIGS / "pretrain_quick.yaml"), *TINY_ENCODER, *sizes, *overrides]


def pretrain(data: Path, output: Path, world: int, *overrides: str) -> Path:
    run_ranks(run_program, world, "pretrain_cloc", arguments(data, output, *overrides), init_group=False, timeout=200)
    return output


# -- another number of processes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("zero", "precision", "before", "after", "tolerance"),
    [
        ("none", "fp32", 2, 1, 1e-5),
        ("0", "fp32", 1, 2, 1e-5),
        ("1", "fp32", 1, 2, 1e-5),
        ("2", "fp32", 2, 1, 1e-5),
        ("3", "fp32", 2, 1, 1e-5),
        ("3", "fp32", 1, 2, 1e-5),
        ("1", "bf16", 1, 2, 1e-2),
        ("2", "bf16", 2, 1, 1e-2),
        ("3", "bf16", 2, 1, 1e-2),
    ],
)
def test_another_number_of_processes_goes_on_as_the_first_would_have(
    zero: str, precision: str, before: int, after: int, tolerance: float, data: Path, tmp_path: Path, whole_shards: str
) -> None:
    stage = whole_shards if zero == "3" else zero
    options = (f"run.zero={stage}", f"run.precision={precision}", "run.save_every=3", "run.keep=null", *GROUPS)
    whole = pretrain(data, tmp_path / "whole", before, *options)
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    for later in ("checkpoint-6", "export"):
        shutil.rmtree(cut / later)
    pretrain(data, cut, after, *options, "run.micro_batch_size=1", "--resume")
    assert losses(cut) == pytest.approx(losses(whole), abs=tolerance)
    mine, theirs = (load_encoder(run / "export")[0].state_dict() for run in (cut, whole))
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], atol=tolerance, rtol=0, msg=name)
    assert (cut / "checkpoint-3" / "latest_universal").exists() == (zero in "123")
    assert not list(cut.glob("checkpoint-6/*universal*")), "new checkpoints are ordinary ones"
