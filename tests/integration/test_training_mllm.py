"""Alignment and tuning over processes: losses, frozen parts, adapters and exports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from cloc_mllm.training.tuning.adapters import merge_adapter
from cloc_mllm.training.tuning.mllm import load_mllm
from tests.builders import noise_image
from tests.builders_training import (
    TINY_ENCODER,
    TINY_LLM,
    TINY_MLLM,
    losses,
    metrics,
    run_preset,
    write_conversations,
    write_regions,
)
from tests.harness import RankError

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of both kinds, an encoder trained for two steps, and an MLLM aligned on it in one plain process."""
    folder = tmp_path_factory.mktemp("mllm")
    write_regions(folder / "data", 48)
    write_conversations(folder / "data", 48)
    options = ("run.steps=2", "run.batch_size=4", "run.zero=none", f"data.train={folder / 'data'}")
    run_preset(1, "pretrain_cloc", "pretrain_quick", *TINY_ENCODER, *options, f"run.output={folder / 'encoder'}")
    align(folder, "align", 1, "run.zero=none")
    return folder


def align(folder: Path, name: str, world: int, *overrides: str) -> Path:
    options = (f"data.train={folder / 'data'}", f"model.encoder={folder / 'encoder' / 'export'}")
    sizes = ("run.steps=4", "run.batch_size=4", f"run.output={folder / name}")
    run_preset(world, "align", "align_quick", *TINY_MLLM, *TINY_LLM, *options, *sizes, *overrides)
    return folder / name


def instruct(folder: Path, name: str, world: int, *overrides: str) -> Path:
    encoder = folder / "encoder" / "export"
    start = (f"model.init=mllm:{folder / 'align' / 'export'}", f"model.encoder={encoder}")
    sizes = ("run.steps=6", "run.batch_size=4", f"run.output={folder / name}", f"data.train={folder / 'data'}")
    run_preset(world, "instruct", "instruct_quick", *TINY_MLLM, *start, *sizes, *overrides)
    return folder / name


@pytest.fixture(scope="module")
def reference(folder: Path) -> Path:
    return instruct(folder, "plain", 1, "run.zero=none")


@pytest.mark.parametrize("zero", ["none", "1", "2", "3"])
def test_two_processes_equal_one_although_some_see_text_only(zero: str, folder: Path, reference: Path) -> None:
    """A third of the conversations has no image, so at two samples a process some ranks have none."""
    run = instruct(folder, f"zero{zero}", 2, f"run.zero={zero}")
    assert losses(run) == pytest.approx(losses(reference), abs=2e-4)
    for mine, theirs in zip(metrics(run), metrics(reference), strict=True):
        for name in ("loss_lm", "loss_box", "loss_text_box", "loss_distill"):
            assert mine[name] == pytest.approx(theirs[name], abs=2e-4), name


def test_accumulation_changes_nothing_in_the_language_loss(folder: Path, reference: Path) -> None:
    off = ("objective.box_weight=0", "objective.text_box_weight=0", "objective.distill_weight=0")
    whole = instruct(folder, "lm_whole", 1, "run.zero=none", *off)
    parts = instruct(folder, "lm_parts", 2, "run.zero=2", "run.micro_batch_size=1", *off)
    assert losses(parts) == pytest.approx(losses(whole), abs=2e-4)


def test_frozen_parts_leave_training_as_they_came(folder: Path, reference: Path) -> None:
    before, after = (load_mllm(run / "export")[0].state_dict() for run in (folder / "align", reference))
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed
    assert not {name for name in changed if name.startswith(("model.vision_tower.", "model.prompter."))}
    for part in ("multi_modal_projector", "region_projector", "grounding_head", "language_model"):
        assert any(name.startswith(f"model.{part}.") for name in changed), f"{part} was not trained"


def test_lora_at_stage_3_in_bf16_exports_a_whole_merged_model(folder: Path) -> None:
    lora = ("parts.llm={mode: lora, rank: 4, alpha: 8}", "run.zero=3", "run.precision=bf16", "run.save_every=3")
    lora += ("run.export=both",)
    whole = instruct(folder, "lora", 2, *lora, "run.keep=null")
    before, _ = load_mllm(folder / "align" / "export")
    after, _ = load_mllm(whole / "export")
    # The adapter on its own, merged later, is the same model.
    later, _ = load_mllm(merge_adapter(whole / "adapter", folder / "lora_merged"))
    for name, value in after.state_dict().items():
        torch.testing.assert_close(later.state_dict()[name], value, atol=1e-6, rtol=0, msg=name)
    changed = {n for n, v in after.state_dict().items() if not torch.equal(v, before.state_dict()[n])}
    assert any("language_model.layers.0.self_attn.q_proj" in name for name in changed)
    assert not any("layernorm" in name for name in changed), "LoRA must leave the LLM's norms alone"
    embeddings = {name for name in changed if "embed_tokens" in name}
    assert embeddings, "the rows of the new tokens have to be learnt"
    config = after.config
    new = {config.image_token_index, config.region_token_index, config.ground_token_index}
    difference = (after.get_input_embeddings().weight - before.get_input_embeddings().weight).abs().sum(dim=1)
    assert set(difference.nonzero()[:, 0].tolist()) <= new
    before_resume = losses(whole)
    for later in ("checkpoint-6",):
        (whole / later / "run_state.json").unlink()
    instruct(folder, "lora", 2, *lora, "run.keep=null", "--resume")
    assert losses(whole) == before_resume


def test_adapters_beside_frozen_parts_go_on_in_another_number_of_processes(folder: Path) -> None:
    """What is frozen is not in DeepSpeed's universal form: it has to come from where the run began."""
    lora = ("parts.llm={mode: lora, rank: 4, alpha: 8}", "run.zero=2", "run.save_every=3", "run.keep=null")
    whole = instruct(folder, "lora_whole", 2, *lora)
    cut = folder / "lora_cut"
    shutil.copytree(whole, cut)
    for later in ("checkpoint-6", "export"):
        shutil.rmtree(cut / later)
    instruct(folder, "lora_cut", 1, *lora, "--resume")
    assert losses(cut) == pytest.approx(losses(whole), abs=1e-4)
    mine, theirs = (load_mllm(run / "export")[0].state_dict() for run in (cut, whole))
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], atol=2e-3, rtol=0, msg=name)


def test_a_blind_model_answers_alike_whatever_it_is_shown(folder: Path) -> None:
    run = align(folder, "blind", 1, "run.zero=none", "model.blind=true", "model.region_encoder=none", "run.steps=2")
    model, processor = load_mllm(run / "export")
    model.eval()
    seen = []
    for seed in (1, 2):
        content = [{"type": "image", "image": noise_image(seed=seed)}, {"type": "text", "text": "What is this?"}]
        batch = processor.encode([[{"role": "user", "content": content}]], add_generation_prompt=True)
        with torch.no_grad():
            seen.append(model(**batch).logits)
    assert torch.equal(*seen)


def test_what_does_not_go_together_is_said_before_training(folder: Path) -> None:
    with pytest.raises(RankError, match="holds a model of type 'cloc_mllm', not 'cloc'"):
        align(folder, "wrong", 1, f"model.encoder={folder / 'align' / 'export'}")
    with pytest.raises(RankError, match="there is no model here"):
        instruct(folder, "wrong", 1, "model.init=mllm:/nowhere")
    frozen = [f"parts.{part}=frozen" for part in ("projector", "region_projector", "grounding_head", "llm")]
    with pytest.raises(RankError, match="there is nothing to train"):
        instruct(folder, "wrong", 1, *frozen)


def test_a_text_grounded_model_trains_without_a_head(folder: Path) -> None:
    run = align(folder, "text", 2, "run.zero=2", "model.grounding=text", "run.steps=2")
    assert json.loads((run / "export" / "config.json").read_text())["grounding"] == "text"
    assert "loss_box" not in metrics(run)[0]
