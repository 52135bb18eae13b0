"""Pre-training over processes, ZeRO stages and interruptions: the losses must not know the difference."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cloc_mllm.data.dataset import RegionTextDataset
from cloc_mllm.models.modeling_cloc import ClocModel
from cloc_mllm.training.presets.config import plan_batch
from cloc_mllm.training.pretraining.encoder import load_encoder
from cloc_mllm.training.running.stream import StepStream
from tests.builders_training import CONFIGS, TINY_ENCODER, losses, run_program, write_regions
from tests.harness import RankError, run_ranks

pytestmark = pytest.mark.integration

STEPS, BATCH = 10, 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_regions(tmp_path_factory.mktemp("data"), 48)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def arguments(data: Path, output: Path, *overrides: str) -> list[str]:
    return [
        "--config",
        str(CONFIGS / "pretrain_quick.yaml"),
        *TINY_ENCODER,
        f"data.train={data}",
        f"run.output={output}",
        f"run.steps={STEPS}",
        f"run.batch_size={BATCH}",
        *overrides,
    ]


def pretrain(data: Path, output: Path, world: int, *overrides: str) -> Path:
    run_ranks(run_program, world, "pretrain_cloc", arguments(data, output, *overrides), init_group=False, timeout=200)
    return output


@pytest.fixture(scope="module")
def reference(data: Path, runs: Path) -> Path:
    """Plain torch, one process."""
    return pretrain(data, runs / "plain", 1, "run.zero=none")


def test_some_ranks_see_no_region_at_all(data: Path) -> None:
    """What makes the equalities below worth something: a rank without regions, beside one that has some."""
    stream = StepStream(RegionTextDataset(data), plan_batch(BATCH, None, 2), steps=STEPS)
    has = [
        [any(stream[position]["regions"] for position in stream.positions(step, rank)) for rank in (0, 1)]
        for step in range(STEPS)
    ]
    assert [True, False] in has or [False, True] in has


@pytest.mark.parametrize("zero", ["none", "0", "1", "2", "3", "zero2_offload", "zero3_offload"])
def test_two_processes_at_every_stage_equal_one_plain_process(
    zero: str, data: Path, runs: Path, reference: Path, whole_shards: str
) -> None:
    stage = whole_shards if zero == "3" else zero
    run = pretrain(data, runs / f"zero{zero}", 2, f"run.zero={stage}")
    assert len(losses(run)) == STEPS
    assert losses(run) == pytest.approx(losses(reference), abs=1e-4)
    mine, theirs = (load_encoder(folder / "export")[0].state_dict() for folder in (run, reference))
    assert list(mine) == list(theirs)
    for name, value in mine.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, theirs[name], atol=2e-3, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("world", "zero", "micro"), [(1, "none", 1), (2, "none", 1), (2, "0", 1), (2, "2", 1), (2, "3", 1)]
)
def test_micro_batches_contrasted_together_equal_one_batch(
    world: int, zero: str, micro: int, data: Path, runs: Path, reference: Path, whole_shards: str
) -> None:
    stage = whole_shards if zero == "3" else zero
    run = pretrain(data, runs / f"cache{world}{zero}", world, f"run.zero={stage}", f"run.micro_batch_size={micro}")
    assert losses(run) == pytest.approx(losses(reference), abs=1e-4)


def test_micro_batches_in_bf16_follow_one_batch_in_fp32(data: Path, runs: Path, reference: Path) -> None:
    run = pretrain(data, runs / "cache_bf16", 2, "run.zero=2", "run.precision=bf16", "run.micro_batch_size=1")
    # Before the first step only rounding differs; later the runs drift apart, as bf16 in one batch does from fp32.
    assert losses(run)[0] == pytest.approx(losses(reference)[0], rel=0.01)
    assert losses(run)[:4] == pytest.approx(losses(reference)[:4], rel=0.1)


def test_tiles_and_the_sigmoid_loss_train_over_processes(data: Path, runs: Path, reference: Path) -> None:
    tiled = pretrain(data, runs / "tiled", 2, "run.zero=1", "objective.loss_impl=tiled", "objective.tile_size=2")
    assert losses(tiled) == pytest.approx(losses(reference), abs=1e-4)
    sigmoid = ("objective.contrast=sigmoid", "model.logit_bias_init=-10", "objective.loss_impl=tiled")
    one = pretrain(data, runs / "sigmoid1", 1, "run.zero=none", *sigmoid)
    two = pretrain(data, runs / "sigmoid2", 2, "run.zero=3", *sigmoid)
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)
    model, _ = load_encoder(two / "export")
    assert model.logit_bias is not None
    assert float(model.logit_bias.detach()) != -10.0


def test_deepspeed_in_a_single_process_equals_plain_torch(data: Path, runs: Path, reference: Path) -> None:
    run = pretrain(data, runs / "alone", 1, "run.zero=1", "run.steps=4", "optim.schedule=constant_with_warmup")
    assert losses(run)[:2] == pytest.approx(losses(reference)[:2], abs=1e-4)


def test_bf16_follows_fp32_and_exports_its_master_weights(data: Path, runs: Path, reference: Path) -> None:
    run = pretrain(data, runs / "bf16", 2, "run.zero=2", "run.precision=bf16")
    assert losses(run)[:4] == pytest.approx(losses(reference)[:4], rel=0.05)
    model, _ = load_encoder(run / "export")
    weights = model.visual_projection.weight
    assert weights.dtype == torch.float32
    assert not torch.equal(weights, weights.bfloat16().float()), "the export holds rounded weights"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resuming_repeats_the_uninterrupted_run_exactly(
    precision: str, data: Path, runs: Path, whole_shards: str
) -> None:
    overrides = (f"run.zero={whole_shards}", f"run.precision={precision}", "run.save_every=4", "run.keep=null")
    whole = pretrain(data, runs / f"whole_{precision}", 2, *overrides)
    cut = runs / f"cut_{precision}"
    shutil.copytree(whole, cut)
    for later in ("checkpoint-8", "checkpoint-10", "export"):
        shutil.rmtree(cut / later)
    pretrain(data, cut, 2, *overrides, "--resume")
    assert losses(cut) == losses(whole)
    assert (cut / "export" / "model.safetensors").read_bytes() == (whole / "export" / "model.safetensors").read_bytes()
    load_encoder(whole / "checkpoint-4")  # a checkpoint's weights can start another run


def test_resuming_what_would_not_be_the_same_run_is_refused_by_name(data: Path, runs: Path) -> None:
    overrides = ("run.zero=2", "run.save_every=2", "run.steps=2")
    pretrain(data, runs / "two", 2, *overrides)
    alone = ("run.micro_batch_size=1", "objective.grad_cache=false")
    with pytest.raises(RankError, match=r"contrasted or averaged at once .* was 4 and is 2 now"):
        pretrain(data, runs / "two", 2, *overrides, *alone, "--resume")
    with pytest.raises(RankError, match="the ZeRO stage was 2 and is 3 now"):
        pretrain(data, runs / "two", 2, *overrides, "run.zero=3", "--resume")
    with pytest.raises(RankError, match="already holds checkpoint-2 of an earlier run"):
        pretrain(data, runs / "two", 2, *overrides)


def watch_inputs(rank: int, argv: list[str], record: str) -> None:
    """Train while writing down what reaches the model."""
    original = ClocModel.forward

    def forward(self: ClocModel, **inputs: Any) -> Any:
        seen = {name: str(inputs[name].dtype) for name in ("pixel_values", "input_boxes")}
        seen["boxes"] = inputs["input_boxes"].double().tolist()
        with Path(f"{record}.{rank}").open("a") as file:
            file.write(json.dumps(seen) + "\n")
        return original(self, **inputs)

    ClocModel.forward = forward  # type: ignore[method-assign,assignment]
    run_program(rank, "pretrain_cloc", argv)


def test_boxes_reach_the_model_in_fp32_while_pixels_are_bf16(tmp_path: Path) -> None:
    data, box = write_regions(tmp_path / "data", 4, size=1200, without=0.0), [1003.37, 11.71, 1101.13, 99.19]
    lines = [json.loads(line) for line in (data / "regions.jsonl").read_text().splitlines()]
    for line in lines:
        line["regions"] = [{"box": box, "text": "red square"}]
    (data / "regions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ("run.zero=1", "run.precision=bf16", "run.steps=1", "run.export=false")
    argv = arguments(data, tmp_path / "run", *options)
    run_ranks(watch_inputs, 2, argv, str(tmp_path / "seen"), init_group=False, timeout=200)
    for rank in (0, 1):
        seen = json.loads((tmp_path / f"seen.{rank}").read_text().splitlines()[0])
        assert (seen["pixel_values"], seen["input_boxes"]) == ("torch.bfloat16", "torch.float32")
        for row in seen["boxes"]:
            assert [1200 * value for value in row] == pytest.approx(box, abs=1e-3)


def test_accumulation_keeps_the_sum_of_samples(data: Path, runs: Path) -> None:
    """Accumulated micro-batches make up the batch; contrasted alone, each has fewer negatives, hence a lower loss."""
    size = ("run.zero=2", "run.batch_size=8", "run.micro_batch_size=2", "run.steps=3")
    together = pretrain(data, runs / "together", 2, *size)
    alone = pretrain(data, runs / "alone_each", 2, *size, "objective.grad_cache=false")
    for run in (together, alone):
        assert len(losses(run)) == 3
        assert json.loads((run / "summary.json").read_text())["steps"] == 3
    assert losses(alone)[0] < losses(together)[0] - 0.1


def test_the_controls_train_and_export(data: Path, runs: Path) -> None:
    clip = pretrain(data, runs / "clip", 2, "run.zero=1", "model.prompter=null", "run.steps=3")
    captions = pretrain(
        *(data, runs / "captions", 2, "run.zero=1", "model.prompter=null", "objective.extra_captions=true"),
        "run.steps=3",
    )
    for run in (clip, captions):
        assert load_encoder(run / "export")[0].prompter is None
    assert losses(clip)[0] < losses(captions)[0], "region texts as captions must add a loss of their own"
