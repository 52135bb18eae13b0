"""An adapter merged into its base answers as the unmerged model; on any other base it is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from cloc_mllm.apps.cli import main
from cloc_mllm.errors import ClocError
from cloc_mllm.inference.predictor import Predictor
from cloc_mllm.models.modeling_cloc_mllm import ClocMllmForConditionalGeneration
from cloc_mllm.training.card import write_card
from cloc_mllm.training.export import filled_skeleton, gather_weights
from cloc_mllm.training.presets.config import load_config
from cloc_mllm.training.presets.options import MllmParts, OptimOptions
from cloc_mllm.training.presets.parts import apply_parts
from cloc_mllm.training.tuning.adapters import base_fingerprint, merge_adapter, save_adapter
from cloc_mllm.training.tuning.mllm import load_mllm
from tests.builders_mllm import grounding_turn, image, region, text, tiny_mllm, user

TURNS = [user(image(), text("what is "), region(2, 3, 20, 22)), grounding_turn()]


def adapter_of(base: Path, folder: Path, mode: str, *, tied: bool = False) -> tuple[Any, Any]:
    """A base and an adapter as a run would have left them; the adapted model's output, and the processor."""
    model, processor = tiny_mllm(tied=tied)
    model.save_pretrained(base)
    processor.save_pretrained(base)
    parts = MllmParts.model_validate({"llm": {"mode": mode, "rank": 4}, "prompter": "full"})
    optim = OptimOptions(lr=1e-3)
    adapted, _ = apply_parts(load_mllm(base)[0], parts, optim)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        expected = adapted.eval()(**processor.encode([TURNS]))
    weights = gather_weights(adapted, None, keep=True)
    skeleton = filled_skeleton(weights, lambda: apply_parts(type(model)(model.config), parts, optim)[0])
    save_adapter(skeleton, base, processor, folder)
    return expected, processor


@pytest.mark.parametrize(("mode", "tied"), [("lora", False), ("lora", True), ("tokens", True), ("tokens", False)])
def test_merged_is_unmerged(mode: str, tied: bool, tmp_path: Path) -> None:
    expected, processor = adapter_of(tmp_path / "base", tmp_path / "adapter", mode, tied=tied)
    batch = processor.encode([TURNS])
    found, merged_processor = load_mllm(merge_adapter(tmp_path / "adapter", tmp_path / "out"))
    assert merged_processor.chat_template == processor.chat_template
    assert (found.lm_head.weight is found.get_input_embeddings().weight) == tied
    # peft by itself loads the folder too, and everything that was trained is in it.
    base = ClocMllmForConditionalGeneration.from_pretrained(tmp_path / "base")
    plain = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        for output in (found.eval()(**batch), plain(**batch)):
            torch.testing.assert_close(output.logits, expected.logits, atol=2e-5, rtol=1e-5)
            torch.testing.assert_close(output.pred_boxes, expected.pred_boxes, atol=1e-6, rtol=0)
        untouched = ClocMllmForConditionalGeneration.from_pretrained(tmp_path / "base").eval()(**batch)
    assert (untouched.logits - expected.logits).abs().max() > 0.01
    kept = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(v.numel() for v in kept.values()) < sum(v.numel() for v in found.state_dict().values()) / 2


def test_the_merged_models_card_is_no_adapters(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "adapter", tmp_path / "a")
    config = load_config("train/configs/instruct_quick.yaml", ["model.init=mllm:some/where", "run.output=runs/mine"])
    write_card(tmp_path / "a", config, {"eval_loss": 1.25})
    merge_adapter(tmp_path / "a", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "ready to use" in text
    assert "| eval_loss | 1.25 |" in text
    assert "cloc-mllm merge" in (tmp_path / "a" / "README.md").read_text()
    assert load_config(tmp_path / "out" / "run.yaml") == config


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    adapter_of(folder / "base", folder / "adapter", "lora")
    return folder


def test_an_adapter_for_another_base_is_refused(made: Path, tmp_path: Path) -> None:
    weights = load_file(made / "base" / "model.safetensors")
    changes: dict[str, tuple[dict[str, torch.Tensor], str]] = {
        "values": ({"model.language_model.layers.0.mlp.up_proj.weight": weights[
            "model.language_model.layers.0.mlp.up_proj.weight"] + 1e-3}, "the weights differ, the first being"),
        "sizes": ({"lm_head.weight": weights["lm_head.weight"][:-1].clone()}, "of other sizes or parts"),
    }  # fmt: skip
    for name, (change, problem) in changes.items():
        shutil.copytree(made / "base", tmp_path / name)
        save_file({**weights, **change}, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ClocError, match=problem):
            merge_adapter(made / "adapter", tmp_path / "out", tmp_path / name)
    shutil.copytree(made / "base", tmp_path / "kind")
    config = json.loads((tmp_path / "kind" / "config.json").read_text())
    (tmp_path / "kind" / "config.json").write_text(json.dumps({**config, "model_type": "llava"}))
    with pytest.raises(ClocError, match="a model of another type"):
        merge_adapter(made / "adapter", tmp_path / "out", tmp_path / "kind")
    assert not (tmp_path / "out").exists()


def test_the_same_base_in_shards_is_the_same_base(made: Path, tmp_path: Path) -> None:
    load_mllm(made / "base")[0].save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert base_fingerprint(tmp_path) == base_fingerprint(made / "base")


def test_what_is_missing_is_named(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def merge(adapter: Path, *words: str) -> str:
        assert main(["merge", str(adapter), "--out", str(tmp_path / "out"), *words]) == 2
        return capsys.readouterr().err

    assert "there is no adapter here" in merge(tmp_path)
    assert "holds no model. Name the folder that it lies in: --base DIR." in merge(
        made / "adapter", "--base", str(tmp_path / "nowhere")
    )
    shutil.copytree(made / "adapter", tmp_path / "a")
    weights = load_file(tmp_path / "a" / "adapter_model.safetensors")
    lost = min(weights)
    save_file({n: v for n, v in weights.items() if n != lost}, tmp_path / "a" / "adapter_model.safetensors")
    assert f"1 weights are missing, the first being '{lost}'" in merge(tmp_path / "a")
    save_file({**weights, "stray": weights[lost].clone()}, tmp_path / "a" / "adapter_model.safetensors")
    assert "1 weights have no place, the first being 'stray'" in merge(tmp_path / "a")
    (tmp_path / "a" / "base.json").unlink()
    assert "it is not known what this adapter was trained on (no base.json)" in merge(tmp_path / "a")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("kept")
    assert "the folder is not empty" in merge(made / "adapter")


def test_who_loads_an_adapter_is_told_the_command(made: Path) -> None:
    for load in (Predictor.from_pretrained, load_mllm):
        with pytest.raises(ClocError, match=r"this is an adapter.*cloc-mllm merge .*adapter --out DIR"):
            load(made / "adapter")


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["run.export=adapter"], "set 'parts.llm' to lora or tokens"),
        (["run.export=both", "parts.llm=lora"], "set 'model.init' to mllm:PATH"),
        (["run.export=everything"], "'run.export' is 'everything'"),
    ],
)
def test_an_adapter_that_cannot_be_written_is_refused_at_once(overrides: list[str], problem: str) -> None:
    with pytest.raises(ClocError, match=problem):
        load_config("train/configs/align_quick.yaml", overrides)


def test_words_and_truths_for_the_export() -> None:
    for word, meaning in (("true", "merged"), ("false", "none"), ("merged", "merged")):
        assert load_config("train/configs/align_quick.yaml", [f"run.export={word}"]).run.export == meaning
    wanted = ["run.export=both", "parts.llm=lora", "model.init=mllm:some/where"]
    assert load_config("train/configs/instruct_quick.yaml", wanted).run.export == "both"
