"""What large runs meet: other machines to go on with, full disks, broken samples, ranks that stand still."""

from __future__ import annotations

import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from cloc_mllm.data.collate import RegionTextCollator
from cloc_mllm.data.dataset import RegionTextDataset
from cloc_mllm.models.modeling_cloc import ClocModel
from cloc_mllm.training.presets.config import plan_batch
from cloc_mllm.training.pretraining.encoder import load_encoder
from cloc_mllm.training.running.checkpoint import SAVING_FOLDER, checkpoints
from cloc_mllm.training.running.stream import StepStream
from cloc_mllm.training.running.trainer import ClocTrainer
from cloc_mllm.training.running.watch import STALLED
from tests.builders_training import CONFIGS, ROOT, TINY_ENCODER, losses, run_program, write_regions
from tests.harness import RankError, run_ranks

pytestmark = pytest.mark.integration

STEPS, BATCH = 6, 4
# What a resumed optimiser could get wrong without a word: decay on some groups only, a rate of its own for a part.
# The large epsilon keeps Adam from making whole steps of gradients that are rounding and nothing else.
GROUPS = (
    "optim.eps=1.0e-4",
    "optim.weight_decay=0.5",
    "parts.prompter={mode: full, lr: 5.0e-3}",
    "parts.temperature={mode: full, lr: 0.2}",
    "parts.region_temperature={mode: full, lr: 0.2}",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_regions(tmp_path_factory.mktemp("data"), 48)


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
        ("1", "fp32", 1, 2, 1e-5),
        ("2", "bf16", 2, 1, 1e-2),
        ("3", "fp32", 2, 1, 1e-5),
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


# -- disks and kills --------------------------------------------------------------------------------------------------


def run_out_of_room(rank: int, argv: list[str], step: int) -> None:
    """Train until, from some step on, no file may grow beyond a few bytes: what a quota or a full disk looks like."""
    save = ClocTrainer._save_checkpoint

    def limited(self: ClocTrainer, model: Any, trial: Any) -> None:
        if self.state.global_step == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        save(self, model, trial)

    with mock.patch.object(ClocTrainer, "_save_checkpoint", limited):
        run_program(rank, "pretrain_cloc", argv)


def test_a_disk_that_runs_full_leaves_the_last_checkpoint_to_go_on_from(data: Path, tmp_path: Path) -> None:
    argv = arguments(data, tmp_path / "run", "run.zero=2", "run.save_every=2", "run.keep=1")
    with pytest.raises(RankError, match=r"could not be written .*--resume goes on from checkpoint-2, which is whole"):
        run_ranks(run_out_of_room, 2, argv, 4, init_group=False, timeout=100)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    assert not (tmp_path / "run" / "checkpoint-4").exists()
    pretrain(data, tmp_path / "run", 2, "run.zero=2", "run.save_every=2", "run.keep=1", "--resume", "auto")
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-6"]
    assert not (tmp_path / "run" / SAVING_FOLDER).exists()
    assert len(losses(tmp_path / "run")) == STEPS


def test_killed_twice_and_resumed_ends_in_the_same_weights(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "checks" / "kill_and_resume.py"
    words = ["--kills", "2", "--seed", "3", "--zero", "1", "--steps", "40", "--out", str(tmp_path / "out")]
    command = [sys.executable, str(script), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["weights_equal"], report["losses_equal"]) == (True, True)
    assert len(report["kills"]) == 2
    assert report["hits"]["starting"] == 0, "these two are aimed at a run that is under way"


# -- numbers that are not finite --------------------------------------------------------------------------------------


def poison(rank: int, argv: list[str], what: str, culprit: int) -> None:
    """Train on data of which one sample is not finite, or gives a gradient that is not; the file of it is in order."""
    original = RegionTextCollator.__call__
    forward = ClocModel.forward

    def collate(self: RegionTextCollator, samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = original(self, samples)
        for row, sample in enumerate(samples):
            if sample["index"] == culprit and what == "sample":
                batch["pixel_values"][row, 0, 0, 0] = math.inf
            if sample["index"] == culprit and what == "gradient":
                batch["pixel_values"][row, 0, 0, 0] = MARK
        return batch

    def marked(self: ClocModel, **inputs: Any) -> Any:
        output = forward(self, **inputs)
        if bool((inputs["pixel_values"] == MARK).any()) and output.image_embeds.requires_grad:
            output.image_embeds.register_hook(lambda gradient: gradient * math.nan)
        return output

    with mock.patch.object(RegionTextCollator, "__call__", collate), mock.patch.object(ClocModel, "forward", marked):
        run_program(rank, "pretrain_cloc", argv)


MARK = 123.0


def first_seen(data: Path, world: int, after: int) -> tuple[int, int, int]:
    """Return a sample that is first seen some steps into the run, with its step and process."""
    stream = StepStream(RegionTextDataset(data), plan_batch(BATCH, None, world), steps=STEPS)
    rank = world - 1
    position = stream.positions(after, rank)[-1]
    return stream.locate(position)[1], after + 1, rank


@pytest.mark.parametrize("micro", [1, 2])
def test_the_one_broken_sample_of_a_step_is_named(micro: int, data: Path, tmp_path: Path) -> None:
    culprit, step, rank = first_seen(data, 2, 3)
    argv = arguments(data, tmp_path / "run", "run.zero=2", "run.save_every=1", f"run.micro_batch_size={micro}")
    with pytest.raises(RankError, match=f"the loss is nan .* at step {step}") as error:
        run_ranks(poison, 2, argv, "sample", culprit, init_group=False, timeout=100)
    assert f"sample '{culprit} (sample 's{culprit}'" in str(error.value) or f"'{culprit} (s{culprit}" in str(
        error.value
    )
    assert f"{data / 'regions.jsonl'}" in str(error.value)
    kept = torch.load(tmp_path / "run" / f"not-finite-step{step}-process{rank}.pt")
    assert len(kept["batches"]) == BATCH // 2 // micro
    assert culprit in [index for index, _, _ in kept["samples"]]
    assert any(not batch["pixel_values"].isfinite().all() for batch in kept["batches"])
    # What was saved before is whole and sound.
    assert [path.name for path in checkpoints(tmp_path / "run")] == [f"checkpoint-{step - 2}", f"checkpoint-{step - 1}"]
    model, _ = load_encoder(tmp_path / "run" / f"checkpoint-{step - 1}")
    assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.parametrize(("zero", "precision"), [("none", "fp32"), ("0", "fp32"), ("1", "bf16"), ("3", "fp32")])
def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_saved(
    zero: str, precision: str, data: Path, tmp_path: Path
) -> None:
    culprit, step, _ = first_seen(data, 2, 2)
    options = (f"run.zero={zero}", f"run.precision={precision}", "run.save_every=1", "run.keep=null")
    argv = arguments(data, tmp_path / "run", *options)
    with pytest.raises(RankError, match=f"the loss is finite, but its gradient is not, at step {step}"):
        run_ranks(poison, 2, argv, "gradient", culprit, init_group=False, timeout=100)
    assert checkpoints(tmp_path / "run")[-1].name == f"checkpoint-{step - 1}"
    assert (tmp_path / "run" / f"not-finite-step{step}-process1.pt").is_file()


# -- ranks that stand still -------------------------------------------------------------------------------------------


def stand_still(rank: int, argv: list[str], who: int, how: str) -> None:
    """Train until one process falls asleep, in its data or in its forward pass, or is frozen while it reads data."""
    original = ClocModel.forward
    load = RegionTextDataset._load
    calls = 0

    def counted() -> None:
        nonlocal calls
        calls += 1
        if rank == who and calls == 4:
            if how == "frozen":
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(1000)

    def forward(self: ClocModel, **inputs: Any) -> Any:
        if how == "forward":
            counted()
        return original(self, **inputs)

    def read(self: RegionTextDataset, index: int, epoch: int) -> dict[str, Any]:
        if how != "forward":
            counted()
        return load(self, index, epoch)

    with mock.patch.object(RegionTextDataset, "_load", read), mock.patch.object(ClocModel, "forward", forward):
        run_program(rank, "pretrain_cloc", argv)


@pytest.mark.parametrize(
    ("who", "how", "words"),
    [
        (1, "loading data", r"loading data for \d+ s, at .* in counted"),
        (0, "forward", r"forward for \d+ s, at .* in counted"),
        (1, "frozen", r"does not respond, without a sign for \d+ s"),
    ],
)
def test_a_process_that_stands_still_is_named_and_ends_the_run(
    who: int, how: str, words: str, data: Path, tmp_path: Path
) -> None:
    argv = arguments(data, tmp_path / "run", "run.zero=2", "run.stall_timeout=3")
    started = time.monotonic()
    with pytest.raises(RankError, match=f"exit code {STALLED}") as error:
        run_ranks(stand_still, 2, argv, who, how, init_group=False, timeout=120)
    assert time.monotonic() - started < 90
    assert re.search(rf"stalled: process {who} on \S+ \(pid \d+\) at step \d: {words}", str(error.value))
    assert f"stalled: process {1 - who} on" not in str(error.value)
    if how != "frozen":
        assert "in counted" in (tmp_path / "run" / "stalls" / f"process{who}.txt").read_text()
