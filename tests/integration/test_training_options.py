"""Options of pre-training through the real program: averages of the weights, validation, frozen parts, other towers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import SiglipModel, T5Tokenizer

from cloc_mllm.training.presets.config import PretrainConfig, load_config
from cloc_mllm.training.pretraining.encoder import build_encoder, load_encoder
from cloc_mllm.training.running.launch import World
from cloc_mllm.training.tuning.mllm import load_mllm
from tests.builders import save_tiny_siglip, tiny_cloc
from tests.builders_training import (
    CONFIGS,
    TINY_ENCODER,
    TINY_LLM,
    TINY_MLLM,
    losses,
    metrics,
    run_program,
    write_regions,
)
from tests.harness import run_ranks

pytestmark = pytest.mark.integration

SIZES = tuple(word for word in TINY_ENCODER if word.startswith(("model.", "tokenizer.")))
SILENT = ("run.log_every=1", "run.save_every=null", "run.eval_every=null", "run.log_to=[]")
QUIET = (*SILENT, "optim.warmup=2", "data.max_regions=2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_regions(tmp_path_factory.mktemp("data"), 30)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Validation samples that fill no batch of two processes."""
    return write_regions(tmp_path_factory.mktemp("few"), 7, seed=1, without=0.3)


def pretrain(preset: str, data: Path, output: Path, world: int, *overrides: str) -> Path:
    argv = ["--config", str(CONFIGS / f"{preset}.yaml"), *QUIET, f"data.train={data}", f"run.output={output}"]
    argv += ["data.validation=null", "run.batch_size=4", "run.micro_batch_size=null", "run.workers=0", *overrides]
    run_ranks(run_program, world, "pretrain_cloc", argv, init_group=False, timeout=200)
    return output


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_encoder(folder)[0].state_dict()


# -- the average of the weights -------------------------------------------------------------------------------------

# A large epsilon: where the gradient is nothing but rounding, Adam would otherwise walk wherever that points.
STEADY = ("optim.lr=1e-2", "optim.eps=1e-4", "optim.schedule=constant_with_warmup")
AVERAGED = (*SIZES, *STEADY, "run.steps=6", "optim.ema=0.9")


@pytest.fixture(scope="module")
def plain(data: Path, few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain torch, one process, with everything that is looked at below."""
    output = tmp_path_factory.mktemp("plain") / "run"
    return pretrain("pretrain_quick", data, output, 1, "run.zero=none", *AVERAGED, f"data.validation={few}")


@pytest.mark.parametrize("zero", ["none", "0", "1", "zero2_offload", "3", "zero3_offload"])
def test_every_stage_keeps_the_same_average(
    zero: str, data: Path, few: Path, plain: Path, whole_shards: str, tmp_path: Path
) -> None:
    stage = whole_shards if zero == "3" else zero
    validation = (f"data.validation={few}", "run.eval_batch_size=2")
    run = pretrain("pretrain_quick", data, tmp_path / "run", 2, f"run.zero={stage}", *AVERAGED, *validation)
    assert losses(run) == pytest.approx(losses(plain), abs=1e-4), "looking at the average must not disturb the run"
    for name in ("export", "export_raw"):
        mine, theirs = weights(run / name), weights(plain / name)
        for key, value in mine.items():
            torch.testing.assert_close(value, theirs[key], atol=1e-3, rtol=0, msg=f"{name}: {key}")
    averaged, raw = (weights(run / name)["visual_projection.weight"] for name in ("export", "export_raw"))
    shift = averaged - raw
    assert shift.abs().max() > 3e-3, "the average is the weights themselves"
    norms, expected = ([line["grad_norm"] for line in metrics(r)] for r in (run, plain))
    assert norms == pytest.approx(expected, rel=1e-3)
    assert_same_validation(run, plain)


def assert_same_validation(run: Path, other: Path) -> None:
    """The last validation is of the averaged weights, and does not depend on how many processes shared the samples."""
    mine, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (run, other))
    names = [name for name in theirs if name.startswith("eval_") and "loss" not in name]
    counted = {"eval_samples", "eval_regions", "eval_region_texts"}
    compared = {f"eval_{n}" for n in ("i2t_r1", "region_r2t_r1", "region_macc", "region_t2r_r1", "grounding_mean_iou")}
    assert counted | compared <= set(names)
    for name in counted:
        assert mine[name] == theirs[name]
    for name in compared:
        assert mine[name] == pytest.approx(theirs[name], abs=1e-3), name
    assert theirs["eval_samples"] == 7
    assert theirs["ema"] == 0.9


@pytest.mark.parametrize("stage", ["none", "2", "3"])
def test_an_average_in_bf16_is_of_the_fp32_weights_and_resumes_exactly(
    stage: str, data: Path, whole_shards: str, tmp_path: Path
) -> None:
    precision = "fp32" if stage == "none" else "bf16"
    zero = whole_shards if stage == "3" else stage
    overrides = (*AVERAGED, f"run.zero={zero}", f"run.precision={precision}", "run.save_every=3", "run.keep=null")
    whole = pretrain("pretrain_quick", data, tmp_path / "whole", 2, *overrides)
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    for later in ("checkpoint-6", "export", "export_raw"):
        shutil.rmtree(cut / later)
    pretrain("pretrain_quick", data, cut, 2, *overrides, "--resume")
    for name in ("export", "export_raw"):
        files = [folder / name / "model.safetensors" for folder in (cut, whole)]
        assert files[0].read_bytes() == files[1].read_bytes(), name
        value = weights(whole / name)["visual_projection.weight"]
        assert not torch.equal(value, value.bfloat16().float()), "rounded"


# -- validation while training --------------------------------------------------------------------------------------


def test_zero_shot_classes_and_figures_are_logged_at_zero_3(
    data: Path, few: Path, whole_shards: str, tmp_path: Path
) -> None:
    pictures = sorted((data / "images").iterdir())[:5]
    labels = [{"image": str(p), "label": ("red square", "nothing at all")[k % 2]} for k, p in enumerate(pictures)]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(line) + "\n" for line in labels))
    shot = (f"data.zero_shot={{path: {tmp_path / 'labels.jsonl'}, templates: ['a {{}}', '{{}}']}}",)
    shared = (*SIZES, "run.steps=4", "run.log_every=2", "run.eval_every=2", f"data.validation={few}", *shot)
    one = pretrain("pretrain_quick", data, tmp_path / "one", 1, "run.zero=none", *shared)
    two = pretrain("pretrain_quick", data, tmp_path / "two", 2, f"run.zero={whole_shards}", *shared)
    figures = [validations(run) for run in (one, two)]
    assert [line["step"] for line in figures[0]] == [2, 4, 4]
    for mine, theirs in zip(*figures, strict=True):
        for name in ("eval_zero_shot_top1", "eval_zero_shot_macc", "eval_i2t_r1", "eval_region_r2t_r1"):
            assert mine[name] == pytest.approx(theirs[name], abs=1e-3), name
    lines = metrics(two)
    assert [line["step"] for line in lines] == [1, 2, 4]
    wanted = {"memory_gib", "grad_norm", "samples_per_second", "data_wait", "scale", "scale_region", "filtered"}
    for line in lines:
        assert wanted | {"learning_rate"} <= set(line)
        assert 0 <= line["data_wait"] <= 1
        assert 0.01 < line["memory_gib"] < 100


def validations(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval_loss" in line]


# -- frozen parts, other towers, other tokenizers -------------------------------------------------------------------


@pytest.mark.parametrize(("zero", "precision"), [("none", "fp32"), ("2", "bf16")])
def test_prompter_only_leaves_everything_else_as_it_was_to_the_bit(
    zero: str, precision: str, data: Path, tmp_path: Path
) -> None:
    model, processor = tiny_cloc(seed=4)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "start")
    start = (f"model.init=cloc:{tmp_path / 'start'}", f"run.zero={zero}", f"run.precision={precision}")
    run = pretrain("prompter_only", data, tmp_path / "run", 2, *start, "run.steps=4", "run.micro_batch_size=1")
    before, after = model.state_dict(), weights(run / "export")
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"prompter", "box_head", "region_logit_scale"}
    assert len({line["scale"] for line in metrics(run)}) == 1


@pytest.mark.parametrize("zero", ["1", "3"])
def test_a_siglip_trains_and_is_exported(zero: str, data: Path, whole_shards: str, tmp_path: Path) -> None:
    save_tiny_siglip(tmp_path / "siglip")
    stage = whole_shards if zero == "3" else zero
    start = (f"model.init=siglip:{tmp_path / 'siglip'}", f"run.zero={stage}", "run.precision=fp32", "run.steps=3")
    run = pretrain("cloc_siglip2_so400m", data, tmp_path / "run", 2, *start, "model.image_size=48")
    model, processor = load_encoder(run / "export")
    assert not model.config.has_projections
    assert (processor.image_processor.size, processor.fixed_length, processor.max_length) == (48, True, 24)
    assert len(losses(run)) == 3
    assert metrics(run)[0]["scale"] > 100, "SigLIP's temperature must survive the first step"


def test_a_preset_of_the_papers_size_shrunk_runs_on_a_tokenizer_of_its_own(data: Path, tmp_path: Path) -> None:
    own = ("tokenizer.path=null", "run.steps=3", "run.precision=fp32", "run.micro_batch_size=2")
    run = pretrain("cloc_vit_b16_224", data, tmp_path / "run", 2, *SIZES, *own)
    _, processor = load_encoder(run / "export")
    assert isinstance(processor.tokenizer, T5Tokenizer)
    assert len(losses(run)) == 3


def test_a_language_model_is_aligned_behind_a_siglip_tower_and_averaged(data: Path, tmp_path: Path) -> None:
    """Adapters on the LLM, averaged over shards, and merged into both exports."""
    save_tiny_siglip(tmp_path / "siglip")
    preset = tmp_path / "preset.yaml"
    preset.write_text(f"stage: pretrain\nrun: {{steps: 1}}\ndata: {{train: {data}}}\n")
    config = load_config(preset, [f"model.init=siglip:{tmp_path / 'siglip'}"])
    assert isinstance(config, PretrainConfig)
    for part in build_encoder(config, World(0, 0, 1, 1, True)):
        part.save_pretrained(tmp_path / "encoder")
    argv = ["--config", str(CONFIGS / "align_quick.yaml"), *TINY_MLLM, *TINY_LLM, f"data.train={data}"]
    argv += [f"model.encoder={tmp_path / 'encoder'}", f"run.output={tmp_path / 'run'}", "run.steps=3", "run.zero=2"]
    argv += ["run.batch_size=4", "parts.llm=lora", "optim.ema=0.9", "optim.lr=1e-2"]
    run_ranks(run_program, 2, "align", argv, init_group=False, timeout=200)
    (model, processor), (raw, _) = (load_mllm(tmp_path / "run" / name) for name in ("export", "export_raw"))
    assert model.config.vision_feature_select_strategy == "full"
    assert processor.num_image_tokens == 16
    before = SiglipModel.from_pretrained(tmp_path / "siglip").vision_model.state_dict()
    averaged, last = model.state_dict(), raw.state_dict()
    for name, value in before.items():
        assert torch.equal(averaged[f"model.vision_tower.{name}"], value), name
    moved = {name for name in averaged if not torch.equal(averaged[name], last[name])}
    for part in ("language_model", "multi_modal_projector", "region_projector"):
        assert any(part in name for name in moved), part
