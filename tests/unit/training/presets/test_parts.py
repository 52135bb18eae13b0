"""One table decides what is trained: every parameter has a part, and a part is trained as the table says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cloc_mllm.errors import ClocError
from cloc_mllm.models.assembly_cloc_mllm import control_ids
from cloc_mllm.training.export import gather_weights, save_weights
from cloc_mllm.training.presets.options import EncoderParts, MllmParts, OptimOptions, PartOptions
from cloc_mllm.training.presets.parts import (
    ENCODER_PARTS,
    MLLM_PARTS,
    apply_parts,
    describe,
    parameter_groups,
    part_of,
    trained_and_total,
)
from cloc_mllm.training.tuning.mllm import load_mllm
from tests.builders import tiny_cloc
from tests.builders_mllm import grounding_turn, image, region, text, tiny_mllm, user

OPTIM = OptimOptions(lr=1e-3, weight_decay=0.1)
FED = ("input_ids", "attention_mask", "labels", "pixel_values", "region_boxes", "region_image_index")


def lora(**others: str) -> MllmParts:
    return MllmParts.model_validate({"llm": {"mode": "lora", "rank": 4}, **others})


@pytest.mark.parametrize("kind", ["prompter", "roi_align", None])
def test_every_encoder_parameter_has_exactly_one_part(kind: str | None) -> None:
    model, _ = tiny_cloc(kind=kind)
    _, reports = apply_parts(model, EncoderParts(), OPTIM)
    assert trained_and_total(reports) == (sum(p.numel() for p in model.parameters()),) * 2
    modes = {report.name: report.mode for report in reports}
    assert modes["prompter"] == ("full" if kind else "absent")
    assert modes["box_head"] == ("full" if kind == "prompter" else "absent")


@pytest.mark.parametrize("part", list(ENCODER_PARTS))
def test_freezing_a_part_freezes_it_alone(part: str) -> None:
    model, _ = tiny_cloc()
    _, reports = apply_parts(model, EncoderParts.model_validate({part: "frozen"}), OPTIM)
    for report in reports:
        assert report.trained == (0 if report.name == part else report.total)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if part_of(name, ENCODER_PARTS) == part}


def test_the_default_parts_of_an_mllm() -> None:
    model, _ = tiny_mllm()
    _, reports = apply_parts(model, MllmParts(), OPTIM)
    trained = {report.name for report in reports if report.trained}
    assert trained == {"projector", "region_projector", "grounding_head", "llm"}
    assert sum(report.total for report in reports) == sum(p.numel() for p in model.parameters())
    assert "vision_tower" in describe(reports)


def test_a_parameter_without_a_part_is_an_error() -> None:
    model, _ = tiny_cloc()
    model.stray = torch.nn.Linear(2, 2)
    with pytest.raises(ClocError, match=r"'stray\.weight' belongs to none of the parts"):
        apply_parts(model, EncoderParts(), OPTIM)


def test_all_frozen_is_an_error() -> None:
    parts = EncoderParts.model_validate(dict.fromkeys(ENCODER_PARTS, "frozen"))
    with pytest.raises(ClocError, match="nothing to train"):
        apply_parts(tiny_cloc()[0], parts, OPTIM)


def test_groups_hold_every_trained_parameter_once_with_its_own_rate() -> None:
    parts = EncoderParts.model_validate(
        {"vision_tower": {"mode": "full", "lr": 1e-5}, "text_tower": "frozen", "prompter": {"weight_decay": 0.3}}
    )
    model, _ = apply_parts(tiny_cloc()[0], parts, OPTIM)
    groups = {group["name"]: group for group in parameter_groups(model, parts, OPTIM)}
    held = [id(parameter) for group in groups.values() for parameter in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert groups["vision_tower/decay"]["lr"] == 1e-5
    assert groups["prompter/decay"]["lr"] == OPTIM.lr
    assert groups["prompter/decay"]["weight_decay"] == 0.3
    assert not any(name.startswith("text_tower") for name in groups)
    assert "temperature/no_decay" in groups
    assert not {"temperature/decay", "region_temperature/decay"} & set(groups)
    for name, group in groups.items():
        assert (group["weight_decay"] > 0) == name.endswith("/decay")
        assert all((p.dim() >= 2) == name.endswith("/decay") for p in group["params"])


@pytest.mark.parametrize("tied", [True, False])
def test_lora_reaches_the_language_model_only(tied: bool) -> None:
    model, _ = tiny_mllm(tied=tied)
    parts = lora(prompter="full")
    adapted, reports = apply_parts(model, parts, OPTIM)
    adapters = [name for name, _ in adapted.named_parameters() if "lora_" in name]
    assert adapters
    assert all("language_model" in name for name in adapters)
    by_name = {report.name: report for report in reports}
    assert 0 < by_name["llm"].trained < by_name["llm"].total / 4
    for whole in ("projector", "region_projector", "grounding_head", "prompter"):
        assert by_name[whole].trained == by_name[whole].total
    assert by_name["vision_tower"].trained == 0
    trained = {p.dtype for p in adapted.parameters() if p.requires_grad}
    assert trained == {torch.float32}


def test_lora_may_be_on_some_layers_alone() -> None:
    model, _ = tiny_mllm()
    adapted, _ = apply_parts(model, MllmParts.model_validate({"llm": {"mode": "lora", "layers": ["v_proj"]}}), OPTIM)
    adapters = {name.split(".lora_")[0] for name, _ in adapted.named_parameters() if "lora_" in name}
    assert adapters == {f"base_model.model.model.language_model.layers.{k}.self_attn.v_proj" for k in range(2)}


@pytest.mark.parametrize("tied", [True, False])
def test_tokens_train_nothing_of_the_language_model_but_the_control_tokens(tied: bool) -> None:
    model, processor = tiny_mllm(tied=tied)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parts = MllmParts.model_validate({"llm": "tokens", "grounding_head": "frozen"})
    adapted, reports = apply_parts(model, parts, OPTIM)
    width, matrices = model.config.text_config.hidden_size, 1 if tied else 2
    assert {report.name: report.trained for report in reports}["llm"] == 3 * width * matrices
    optimizer = torch.optim.AdamW(parameter_groups(adapted, parts, OPTIM))
    turns = [user(image(), text("what is "), region(2, 3, 20, 22)), grounding_turn()]
    adapted(**{k: v for k, v in processor.encode([turns], return_labels=True).items() if k in FED}).loss.backward()
    optimizer.step()
    after: Any = adapted.merge_and_unload().state_dict()  # type: ignore[operator]
    ground = model.config.ground_token_index
    for name, old in before.items():
        changed = (after[name] != old).nonzero()
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            rows = set(changed[:, 0].tolist())
            assert ground in rows
            assert rows <= set(control_ids(processor.tokenizer).values())
        elif not name.startswith(("model.multi_modal_projector", "model.region_projector")):
            assert not len(changed), name


@pytest.mark.parametrize("mode", ["lora", "tokens"])
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_the_export_of_an_adapted_model_answers_as_the_adapted_model(mode: str, tied: bool, tmp_path: Any) -> None:
    model, processor = tiny_mllm(tied=tied)
    parts = MllmParts.model_validate({"llm": {"mode": mode, "rank": 4}})
    adapted, _ = apply_parts(model, parts, OPTIM)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    turns = [user(image(), text("what is "), region(2, 3, 20, 22)), grounding_turn()]
    batch = processor.encode([turns])
    expected = adapted.eval()(**batch)
    weights = gather_weights(adapted, None, keep=True)
    save_weights(
        weights, lambda: apply_parts(type(model)(model.config), parts, OPTIM)[0], processor, tmp_path, source=model
    )
    found, _ = load_mllm(tmp_path)
    assert (found.lm_head.weight is found.get_input_embeddings().weight) == tied
    got = found.eval()(**batch)
    torch.testing.assert_close(got.logits, expected.logits, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(got.pred_boxes, expected.pred_boxes, atol=1e-5, rtol=1e-5)


def test_a_language_model_that_lora_does_not_fit_is_named() -> None:
    model, _ = tiny_mllm()
    for layer in model.model.language_model.layers:
        del layer.self_attn, layer.mlp
    with pytest.raises(ClocError, match=r"'parts\.llm: lora' does not fit"):
        apply_parts(model, lora(), OPTIM)


def test_tables_and_presets_name_the_same_parts() -> None:
    assert list(EncoderParts.model_fields) == list(ENCODER_PARTS)
    assert list(MllmParts.model_fields) == list(MLLM_PARTS)
    assert PartOptions.model_validate("frozen").mode == "frozen"
