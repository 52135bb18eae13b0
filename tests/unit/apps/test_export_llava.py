"""An exported MLLM is transformers' own LLaVA: same keys as published, same text, same ids, same logits."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from cloc_mllm.apps.cli import main
from cloc_mllm.apps.exporters import llava
from cloc_mllm.apps.exporters.common import stock_image_processor
from cloc_mllm.apps.exporters.llava import export_llava, without_generation_tags
from cloc_mllm.errors import ClocError
from cloc_mllm.models.chat_template import build_chat_template, fence, render_chat, unfence
from cloc_mllm.models.image_processing_cloc import ClocImageProcessor
from cloc_mllm.models.modeling_cloc import ClocModel
from cloc_mllm.models.modeling_cloc_mllm import ClocMllmForConditionalGeneration
from cloc_mllm.training.card import read_header
from tests.builders import noise_image, save_tiny_siglip
from tests.builders_mllm import assistant, image, region, text, tiny_llm_tokenizer, tiny_mllm, user

TURNS = [
    user(image(width=40, height=40), text("what is this")),
    assistant("a red ring"),
    user("how many crosses are there"),
]


def save(folder: Path, **options: Any) -> tuple[Any, Any]:
    model, processor = tiny_mllm(**options)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def load(folder: Path) -> tuple[Any, Any]:
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval(), AutoProcessor.from_pretrained(folder)


@pytest.mark.parametrize(
    ("family", "tied", "strategy", "layer"),
    [
        ("llama", False, "default", -2),
        ("llama", True, "full", -1),
        ("qwen2", True, "default", [-2, -1]),
        ("qwen2", False, "full", [-1, -3]),
    ],
)
def test_stock_llava_gives_the_same_logits(family: str, tied: bool, strategy: str, layer: Any, tmp_path: Path) -> None:
    options = {"vision_feature_select_strategy": strategy, "vision_feature_layer": layer}
    ours, processor = save(tmp_path / "m", family=family, tied=tied, **options)
    done = export_llava(tmp_path / "m", tmp_path / "out")
    stock, stock_processor = load(tmp_path / "out")
    assert (stock.lm_head.weight is stock.get_input_embeddings().weight) == tied
    assert type(stock_processor) is LlavaProcessor
    batch = processor.encode(TURNS, add_generation_prompt=True)
    same = stock_processor.apply_chat_template(
        TURNS, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert torch.equal(same["input_ids"], batch["input_ids"])
    with torch.no_grad():
        expected = ours(**batch).logits
        assert float((stock(**batch).logits - expected).abs().max()) == 0.0
        # With its own pixels too: the picture is square, so that there is no padding.
        torch.testing.assert_close(stock(**same).logits, expected, atol=1e-5, rtol=0)
        said = stock.generate(**batch, max_new_tokens=6)
    assert torch.equal(said, ours.generate(**batch, max_new_tokens=6))
    assert "the region encoder" in done.notes[0]
    assert "the grounding head" in done.notes[0]


def test_the_layout_is_that_of_published_checkpoints(tmp_path: Path) -> None:
    save(tmp_path / "m", family="qwen2", tied=False)
    export_llava(tmp_path / "m", tmp_path / "out")
    keys = set(load_file(tmp_path / "out" / "model.safetensors"))
    layers = {re.sub(r"layers\.\d+\..*", "layers", key) for key in keys}
    assert layers == {
        "language_model.lm_head.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers",
        "language_model.model.norm.weight",
        *(f"multi_modal_projector.linear_{k}.{leaf}" for k in (1, 2) for leaf in ("weight", "bias")),
        *(f"vision_tower.vision_model.embeddings.{leaf}" for leaf in ("class_embedding", "patch_embedding.weight")),
        "vision_tower.vision_model.embeddings.position_embedding.weight",
        "vision_tower.vision_model.encoder.layers",
        *(f"vision_tower.vision_model.{norm}.weight" for norm in ("pre_layrnorm", "post_layernorm")),
        *(f"vision_tower.vision_model.{norm}.bias" for norm in ("pre_layrnorm", "post_layernorm")),
    }  # fmt: skip
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["text_config"]["architectures"] == ["Qwen2ForCausalLM"]
    assert config["text_config"]["rope_theta"] == config["text_config"]["rope_parameters"]["rope_theta"]
    assert config["torch_dtype"] == config["dtype"] == config["text_config"]["torch_dtype"] == "float32"
    assert not {"prompter_config", "grounding", "region_token_index", "auto_map"} & set(config)


def test_bf16_and_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny_mllm(tied=True)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "m")
    processor.save_pretrained(tmp_path / "m")
    monkeypatch.setattr(llava, "SHARD_SIZE", "40KB")
    export_llava(tmp_path / "m", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    stock, _ = load(tmp_path / "out")
    assert stock.dtype == torch.bfloat16
    batch = processor.encode(TURNS, add_generation_prompt=True)
    # Loaded too: `.to` has rounded the rotary frequencies of the model in memory.
    ours = ClocMllmForConditionalGeneration.from_pretrained(tmp_path / "m").eval()
    assert torch.equal(stock(**batch).logits, ours(**batch).logits)


def test_a_siglip_tower(tmp_path: Path) -> None:
    encoder = ClocModel.from_siglip(save_tiny_siglip(tmp_path / "siglip")).eval()
    options = {"encoder_kind": None, "region_encoder": "none", "grounding": "text", "region_format": "coords"}
    ours, processor = save(tmp_path / "m", encoder=encoder, vision_feature_select_strategy="full", **options)
    export_llava(tmp_path / "m", tmp_path / "out")
    keys = load_file(tmp_path / "out" / "model.safetensors")
    assert "vision_tower.vision_model.post_layernorm.weight" in keys
    stock, _ = load(tmp_path / "out")
    batch = processor.encode(TURNS, add_generation_prompt=True)
    assert torch.equal(stock(**batch).logits, ours(**batch).logits)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda m: setattr(m.model, "multi_modal_projector", torch.nn.Linear(2, 2)), "its projector is"),
        (lambda m: setattr(m, "lm_head", torch.nn.Linear(2, 2)), "head has a bias"),
        (lambda m: setattr(m.config.text_config, "final_logit_softcapping", 3.0), "a scale or a cap"),
        (lambda m: setattr(m.model, "vision_tower", torch.nn.Identity()), "its tower is a Identity"),
        (lambda m: setattr(m.config, "image_grid_pinpoints", [[64, 64]]), "anyres"),
    ],
)
def test_what_llava_has_no_place_for_is_refused(change: Any, problem: str) -> None:
    model, _ = tiny_mllm()
    change(model)
    with pytest.raises(ClocError, match=problem):
        llava._refuse_what_llava_is_not(model, "m")


def test_weights_without_a_place_are_refused() -> None:
    model, _ = tiny_mllm()
    model.model.stray = torch.nn.Linear(2, 2)
    with pytest.raises(ClocError, match=r"it has no place for 'model\.stray\.bias'"):
        llava.llava_model(model)


def test_logits_that_differ_are_refused() -> None:
    model, _ = tiny_mllm()
    stock = llava.llava_model(model)
    llava._require_same_logits(model, stock, "m")
    with torch.no_grad():
        model.lm_head.weight[3] += 1e-2  # shared with the stock model: still the same
    llava._require_same_logits(model, stock, "m")
    stock.lm_head.weight = torch.nn.Parameter(stock.lm_head.weight * 1.001)
    with pytest.raises(ClocError, match="logits differ by"):
        llava._require_same_logits(model, stock, "m")


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 200), st.integers(1, 200), st.sampled_from([24, 32]))
def test_the_stock_image_processor_differs_in_the_padding_only(width: int, height: int, size: int) -> None:
    picture = noise_image(width, height)
    for mode in ("pad", "resize"):
        ours = ClocImageProcessor(size=size, resize_mode=mode)
        stock, notes = stock_image_processor(ours)
        difference = (stock(picture, return_tensors="pt")["pixel_values"] - ours(picture)["pixel_values"]).abs()
        place = ours.geometry(width, height)
        rows = slice(place.top, place.top + place.scaled_height)
        assert difference[..., rows, place.left : place.left + place.scaled_width].max() <= 1e-6
        assert difference.max() <= (1 / 255 / min(ours.image_std) + 1e-6 if notes else 1e-6)


@pytest.mark.parametrize("style", ["chatml", "plain"])
def test_templates_without_generation_tags_render_the_same(style: str) -> None:
    tokenizer = tiny_llm_tokenizer()
    template = build_chat_template(tokenizer, style)
    stripped = without_generation_tags(template)
    assert "generation %" not in stripped
    assert "{%- generation" not in stripped
    turns = [user(fence("what is <image>", tokenizer)), assistant("  yes "), user("no")]
    for prompt in (True, False):
        one, two = (unfence(render_chat(turns, t, prompt).text) for t in (template, stripped))
        assert one == two
    spaced = "a {% generation %} b {% endgeneration %} c"
    assert render_chat(turns, without_generation_tags(spaced)).text == render_chat(turns, spaced).text


def test_the_command_and_its_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "m")
    (tmp_path / "m" / "README.md").write_text("---\nlicense: mit\nbase_model: [org/llm]\ntags: [cloc]\n---\n")
    assert main(["export", str(tmp_path / "m"), "--format", "llava", "--out", str(tmp_path / "out")]) == 0
    header = {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "license": "mit"}
    assert read_header(tmp_path / "out" / "README.md") == {**header, "base_model": ["org/llm"]}
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("Left out, as LLaVA has no place for it: the region encoder")
    assert printed[-1] == str(tmp_path / "out")
    assert "the region encoder" in (tmp_path / "out" / "README.md").read_text()
    again = ["export", str(tmp_path / "m"), "--format", "llava", "--out", str(tmp_path / "out")]
    assert main(again) == 2
    assert "not empty" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "out"), "--format", "llava", "--out", str(tmp_path / "x")]) == 2
    assert "type 'llava'; --format llava takes an MLLM" in capsys.readouterr().err
    assert main([*again, "--part", "tower"]) == 2
    weights = load_file(tmp_path / "m" / "model.safetensors")
    lost = weights.pop("model.multi_modal_projector.linear_1.weight")
    assert lost is not None
    from safetensors.torch import save_file

    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    assert main(["export", str(tmp_path / "m"), "--format", "llava", "--out", str(tmp_path / "y")]) == 2
    assert "model.multi_modal_projector.linear_1.weight" in capsys.readouterr().err
    assert not (tmp_path / "y").exists()


def test_regions_in_a_prompt_stay_placeholders(tmp_path: Path) -> None:
    """The stock model reads `<region>` as an ordinary token: what our template writes for one, its template writes."""
    _, processor = save(tmp_path / "m")
    export_llava(tmp_path / "m", tmp_path / "out")
    turns = [user(image(), text("what is "), region(3, 4, 20, 25))]
    theirs = AutoProcessor.from_pretrained(tmp_path / "out").apply_chat_template(turns, add_generation_prompt=True)
    assert theirs == processor.apply_chat_template(turns, add_generation_prompt=True)
