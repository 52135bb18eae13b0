"""The encoder against transformers' CLIP, its plain twins, and its own save and load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel

from cloc_mllm.models.configuration_cloc import ClocConfig, ClocPrompterConfig
from cloc_mllm.models.modeling_cloc import ClocModel, ClocVisionModel
from cloc_mllm.models.processing_cloc import ClocProcessor
from tests.builders import noise_image, tiny_cloc, tiny_cloc_config

BOXES = [[[2, 3, 20, 25], [0, 0, 40, 30]], [], [[5.5, 6.25, 30, 29]]]


def inputs_for(processor: ClocProcessor) -> dict[str, torch.Tensor]:
    images = [noise_image(seed=seed) for seed in range(3)]
    return dict(processor(images=images, text=["a red circle", "a blue square", "two stars"], input_boxes=BOXES))


def test_without_prompter_it_is_transformers_clip():
    config = tiny_cloc_config(kind=None)
    clip = CLIPModel(
        CLIPConfig(
            text_config=config.text_config.to_dict(), vision_config=config.vision_config.to_dict(), projection_dim=24
        )
    ).eval()
    ours = ClocModel.from_clip(clip).eval()
    _, processor = tiny_cloc(kind=None)
    batch = inputs_for(processor)
    batch = {name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask")}
    with torch.no_grad():
        expected, got = clip(**batch), ours(**batch)
    torch.testing.assert_close(got.image_embeds, expected.image_embeds, rtol=0, atol=1e-6)
    torch.testing.assert_close(got.text_embeds, expected.text_embeds, rtol=0, atol=1e-6)
    logits = got.logit_scale * got.image_embeds @ got.text_embeds.T
    torch.testing.assert_close(logits, expected.logits_per_image, rtol=1e-5, atol=1e-5)
    assert got.region_embeds is None
    assert got.pred_boxes is None


@pytest.mark.parametrize("pooling", ["mean", "prompt"])
def test_sharing_the_image_side_changes_nothing(pooling: str):
    model, processor = tiny_cloc(pooling=pooling)
    batch = inputs_for(processor)
    tokens = model.get_image_features(batch["pixel_values"]).last_hidden_state.detach().double()
    prompter = model.prompter.double()
    for prompts in (prompter.embed_boxes(batch["input_boxes"]), prompter.embed_texts(torch.randn(3, 24))):
        shared = prompter(tokens, prompts, batch["box_image_index"])
        plain = prompter(tokens, prompts, batch["box_image_index"], plain=True)
        torch.testing.assert_close(shared, plain, rtol=0, atol=1e-12)
        grads = [torch.autograd.grad(out.square().sum(), prompter.layer.k_proj.weight)[0] for out in (shared, plain)]
        torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["prompter", "roi_align"])
def test_ragged_regions_equal_one_image_at_a_time(kind: str):
    model, processor = tiny_cloc(kind=kind)
    batch = inputs_for(processor)
    together = model.get_region_features(
        pixel_values=batch["pixel_values"], input_boxes=batch["input_boxes"], image_index=batch["box_image_index"]
    ).pooler_output
    assert together.shape == (3, 24)
    alone = []
    for seed, boxes in enumerate(BOXES):
        if boxes:
            one = processor(images=[noise_image(seed=seed)], input_boxes=[boxes])
            alone.append(
                model.get_region_features(
                    pixel_values=one["pixel_values"], input_boxes=one["input_boxes"]
                ).pooler_output
            )
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-6)


def test_every_kind_of_prompt_reads_the_image_and_the_prompt():
    model, processor = tiny_cloc()
    batch = inputs_for(processor)
    index = torch.tensor([0, 2])
    points = torch.tensor([[0.2, 0.3], [0.7, 0.7]])
    prompts = {
        "input_boxes": torch.tensor([[0.1, 0.1, 0.5, 0.5], [0.2, 0.2, 0.9, 0.9]]),
        "input_points": points,
        "input_ids": batch["input_ids"][:2],
    }
    for name, value in prompts.items():
        mask = {"attention_mask": batch["attention_mask"][:2]} if name == "input_ids" else {}

        def embed(image_index: torch.Tensor, value=value, name=name, mask=mask) -> torch.Tensor:
            return model.get_region_features(
                pixel_values=batch["pixel_values"], image_index=image_index, **{name: value}, **mask
            ).pooler_output

        features = embed(index)
        assert features.shape == (2, 24)
        assert (features[0] - features[1]).abs().max() > 1e-6
        assert (features - embed(index.flip(0))).abs().max() > 1e-6
    box_of_no_size = model.get_region_features(
        pixel_values=batch["pixel_values"], image_index=index, input_boxes=torch.cat([points, points], dim=-1)
    ).pooler_output
    point = model.get_region_features(
        pixel_values=batch["pixel_values"], image_index=index, input_points=points
    ).pooler_output
    assert (box_of_no_size - point).abs().max() > 1e-6, "a point has a role of its own"


def test_prompts_that_cannot_be_placed_are_refused():
    model, processor = tiny_cloc()
    batch = inputs_for(processor)
    boxes = batch["input_boxes"]
    with pytest.raises(ValueError, match="need an image_index"):
        model.get_region_features(pixel_values=batch["pixel_values"], input_boxes=boxes)
    with pytest.raises(ValueError, match="exactly one kind of prompt"):
        model.get_region_features(pixel_values=batch["pixel_values"][:1])
    with pytest.raises(ValueError, match="exactly one of image_tokens and pixel_values"):
        model.get_region_features(input_boxes=boxes)
    clip, _ = tiny_cloc(kind=None)
    with pytest.raises(ValueError, match="no Prompter"):
        clip.get_region_features(pixel_values=batch["pixel_values"][:1], input_boxes=boxes)
    roi, _ = tiny_cloc(kind="roi_align")
    with pytest.raises(ValueError, match="boxes only"):
        roi.get_region_features(pixel_values=batch["pixel_values"][:1], input_points=torch.rand(2, 2))


def test_boxes_reach_the_prompter_exactly_in_bf16():
    model, processor = tiny_cloc()
    image = noise_image(2000, 1500)
    place = processor.geometry(image)
    boxes = place.boxes_to_model([[1003.37, 200.0, 1900.0, 1400.0], [1004.0, 200.0, 1900.0, 1400.0]])
    assert boxes.dtype == torch.float32
    prompts = model.bfloat16().prompter.embed_boxes(boxes)
    assert prompts.dtype == torch.bfloat16
    exact = model.float().prompter.embed_boxes(boxes)
    torch.testing.assert_close(prompts.float(), exact, rtol=0.05, atol=0.02)


def test_forward_returns_unit_embeddings_and_finite_gradients_for_every_parameter():
    model, processor = tiny_cloc()
    model.train()
    batch = inputs_for(processor)
    phrases = processor.tokenize(["red ring", "blue square"])
    output = model(
        **batch,
        region_input_ids=phrases["input_ids"],
        region_attention_mask=phrases["attention_mask"],
        region_text_index=torch.tensor([0, 1, 0]),
    )
    for name in ("image_embeds", "text_embeds", "region_embeds", "region_text_embeds"):
        norm = output[name].norm(dim=-1)
        torch.testing.assert_close(norm, torch.ones_like(norm))
    assert torch.equal(output.region_text_embeds[0], output.region_text_embeds[2])
    loss = (output.image_embeds @ output.text_embeds.T * output.logit_scale).logsumexp(1).sum()
    loss = loss + (output.region_embeds @ output.region_text_embeds.T * output.region_logit_scale).logsumexp(1).sum()
    (loss + output.pred_boxes.square().sum()).backward()
    # CLIP's post-norm sits on the class token only, and each k bias cancels in the soft-max: its gradient is zero.
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert missing == []


def test_temperatures_are_one_dimensional_and_clamped():
    model, _ = tiny_cloc()
    assert model.logit_scale.shape == model.region_logit_scale.shape == (1,)
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    model.clamp_logit_scales()
    assert model.logit_scale.item() == pytest.approx(model.config.logit_scale_max)
    assert all(p.dim() > 0 for p in model.parameters()), "DeepSpeed cannot broadcast 0-dim parameters"


def test_tower_export_is_a_stock_clip_vision_model(tmp_path: Path):
    model, processor = tiny_cloc()
    model.save_clip_vision_tower(str(tmp_path))
    tower, info = CLIPVisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    pixels = inputs_for(processor)["pixel_values"]
    ours = model.get_image_features(pixels).last_hidden_state
    torch.testing.assert_close(tower(pixels).last_hidden_state, ours, rtol=0, atol=0)


def test_vision_model_is_the_image_side(tmp_path: Path):
    model, processor = tiny_cloc()
    vision = ClocVisionModel.from_cloc(model)
    vision.save_pretrained(tmp_path)
    vision = ClocVisionModel.from_pretrained(tmp_path).eval()
    batch = inputs_for(processor)
    expected = model(**batch, region_input_ids=batch["input_ids"])
    got = vision(batch["pixel_values"], batch["input_boxes"], batch["box_image_index"])
    torch.testing.assert_close(got.region_embeds, expected.region_embeds, rtol=0, atol=0)
    torch.testing.assert_close(got.image_embeds, expected.image_embeds, rtol=0, atol=0)


def test_save_and_load_in_another_process_gives_the_same_numbers(tmp_path: Path):
    model, processor = tiny_cloc()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    program = (
        "import sys, torch\n"
        "from cloc_mllm.models.modeling_cloc import ClocModel\n"
        "from cloc_mllm.models.processing_cloc import ClocProcessor\n"
        "from tests.builders import noise_image\n"
        "model, processor = ClocModel.from_pretrained(sys.argv[1]).eval(), ClocProcessor.from_pretrained(sys.argv[1])\n"
        "batch = processor(images=[noise_image()], text=['a red circle'], input_boxes=[[[2, 3, 20, 25]]])\n"
        "torch.save(model(**batch, region_input_ids=batch['input_ids']).to_tuple(), sys.argv[2])\n"
    )
    out = tmp_path / "out.pt"
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", program, str(tmp_path), str(out)], check=True, cwd=root, timeout=120)
    batch = processor(images=[noise_image()], text=["a red circle"], input_boxes=[[[2, 3, 20, 25]]])
    expected = model(**batch, region_input_ids=batch["input_ids"]).to_tuple()
    for got, want in zip(torch.load(out, weights_only=True), expected, strict=True):
        torch.testing.assert_close(got, want.detach(), rtol=0, atol=0)


def test_ground_returns_pixels_of_the_original_image():
    model, processor = tiny_cloc()
    image = noise_image(400, 100)
    boxes, scores = model.ground(image, ["a red circle", "a star"], processor)
    assert len(boxes) == len(scores) == 2
    for x1, y1, x2, y2 in boxes:
        assert 0 <= x1 < x2 <= 400
        assert 0 <= y1 < y2 <= 100


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("kind", "sampler", "kind"), ("pooling", "cls", "pooling"), ("num_attention_heads", 5, "multiple")],
)
def test_prompter_config_refuses_what_has_no_meaning(field: str, value: object, message: str):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        ClocPrompterConfig(**{"hidden_size": 48, "projection_dim": 24, field: value})


def test_widths_of_prompter_and_tower_must_agree():
    config = tiny_cloc_config()
    wrong = ClocPrompterConfig(hidden_size=64, projection_dim=24)
    with pytest.raises(StrictDataclassClassValidationError, match="must be equal"):
        ClocConfig(
            vision_config=config.vision_config, text_config=config.text_config, prompter_config=wrong, projection_dim=24
        )
