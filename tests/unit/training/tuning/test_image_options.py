"""What a preset says of images and projectors is what is built, counted, trained and adapted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cloc_mllm.errors import ClocError
from cloc_mllm.models.image_tokens import ImageTokens, default_pinpoints
from cloc_mllm.training.planning.explain import count_parts
from cloc_mllm.training.presets.config import AlignConfig, load_config
from cloc_mllm.training.presets.options import MllmParts, OptimOptions
from cloc_mllm.training.presets.parts import MLLM_PARTS, apply_parts, part_of
from cloc_mllm.training.running.launch import World
from cloc_mllm.training.tuning.mllm import build_mllm, first_sample_report, load_mllm
from tests.builders import tiny_cloc
from tests.builders_mllm import assistant, grounding_turn, image, model_inputs, region, text, tiny_mllm, user
from tests.builders_training import CONFIGS, TINY_LLM, TINY_MLLM, write_regions

ALONE = World(rank=0, local_rank=0, size=1, local_size=1, use_cpu=True)
ANYRES = ("model.image_mode=anyres",)
CASES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "as before": ((), {"projector_type": "mlp2x_gelu", "image_grid_pinpoints": None, "image_seq_length": 16}),
    "linear": (("model.projector=linear",), {"projector_type": "linear"}),
    "fewer tokens": (("model.projector=pixel_shuffle",), {"image_seq_length": 4}),
    "stretched": (("model.image_mode=resize",), {"image_grid_pinpoints": None}),
    "tiles": (ANYRES, {"image_grid_pinpoints": default_pinpoints(32)}),
    "own tiles": (
        (*ANYRES, "model.grid_pinpoints=[[32, 64], [64, 32]]"),
        {"image_grid_pinpoints": [[32, 64], [64, 32]]},
    ),
    "few tokens of tiles": (
        (*ANYRES, "model.projector=pixel_shuffle", "model.pixel_shuffle_factor=4", "model.vision_layer=[-2, -1]"),
        {"image_seq_length": 1, "vision_feature_layer": [-2, -1]},
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    model, processor = tiny_cloc()
    model.save_pretrained(folder / "encoder")
    processor.save_pretrained(folder / "encoder")
    write_regions(folder / "data", 4)
    return folder


def preset(folder: Path, *overrides: str) -> AlignConfig:
    files = (f"model.encoder={folder / 'encoder'}", f"data.train={folder / 'data'}", f"run.output={folder / 'run'}")
    config = load_config(CONFIGS / "align_quick.yaml", [*TINY_MLLM, *TINY_LLM, *files, *overrides])
    assert isinstance(config, AlignConfig)
    return config


@pytest.mark.parametrize("case", list(CASES))
def test_a_preset_decides_how_images_are_shown(case: str, folder: Path) -> None:
    overrides, expected = CASES[case]
    config = preset(folder, *overrides)
    model, processor = build_mllm(config, ALONE)
    assert {name: getattr(model.config, name) for name in expected} == expected
    assert processor.image_layout == ImageTokens.of(model.config)
    assert processor.image_processor.resize_mode == (config.model.image_mode or "pad")
    counted = {report.name: (report.total, report.trained) for report in count_parts(config)}
    _, reports = apply_parts(model, config.parts, config.optim)
    built = {report.name: (report.total, report.trained) for report in reports}
    for part in ("projector", "vision_tower", "prompter"):
        assert counted[part] == built[part], part
    batch = model_inputs(processor.encode([[user(image(1, 90, 33), text("?")), assistant("two")]], return_labels=True))
    assert model(**batch).loss.isfinite()


def test_a_finished_model_is_tuned_on_tiles(folder: Path) -> None:
    """LLaVA-NeXT's order: aligned on whole images, tuned on tiles; and back."""
    model, processor = tiny_mllm()
    model.save_pretrained(folder / "whole")
    processor.save_pretrained(folder / "whole")
    start = f"model.init=mllm:{folder / 'whole'}"
    unchanged, _ = build_mllm(preset(folder, start), ALONE)
    assert unchanged.config.image_grid_pinpoints is None
    tiled, images = build_mllm(preset(folder, start, *ANYRES), ALONE)
    assert tiled.config.image_grid_pinpoints == images.image_processor.image_grid_pinpoints == default_pinpoints(32)
    assert {name: value.tolist() for name, value in model.state_dict().items()} == {
        name: value.tolist() for name, value in tiled.state_dict().items() if "newline" not in name
    }
    newline = tiled.model.image_newline.weight
    assert newline.detach().std() == pytest.approx(32**-0.5, rel=0.5)
    assert {r.name: r.total for r in count_parts(preset(folder, start, *ANYRES))} == {
        r.name: r.total for r in apply_parts(tiled, MllmParts(), OptimOptions())[1]
    }
    tiled.save_pretrained(folder / "tiled")
    images.save_pretrained(folder / "tiled")
    again, _ = load_mllm(folder / "tiled")
    assert torch.equal(again.model.image_newline.weight, newline)
    back, whole = build_mllm(preset(folder, f"model.init=mllm:{folder / 'tiled'}", "model.image_mode=pad"), ALONE)
    assert back.model.image_newline is None
    question = [user(image(1, 90, 33), text("what?"))]
    with torch.no_grad():
        ours, theirs = back.eval()(**whole.encode(question)), model(**processor.encode(question))
    assert torch.equal(ours.logits, theirs.logits)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (("model.grid_pinpoints=[[32, 64]]",), "'grid_pinpoints' are for 'image_mode: anyres'"),
        ((*ANYRES, "model.grid_pinpoints=[[32, 60]]"), r"'model.grid_pinpoints'.*\[32, 60\] cannot be cut into tiles"),
        (
            ("model.projector=pixel_shuffle", "model.pixel_shuffle_factor=3"),
            "3 does not divide the tower's grid of 4 x 4",
        ),
        (("model.projector=magic",), "projector"),
    ],
)
@pytest.mark.parametrize("way", ["build", "count"])
def test_what_does_not_fit_is_said_before_training(
    overrides: tuple[str, ...], problem: str, way: str, folder: Path
) -> None:
    def prepare() -> None:
        config = preset(folder, *overrides)
        build_mllm(config, ALONE) if way == "build" else count_parts(config)

    with pytest.raises(ClocError, match=problem):
        prepare()


def test_the_first_sample_is_shown_with_the_tokens_of_each_image() -> None:
    _, processor = tiny_mllm(image_mode="anyres")
    turns = [user(image(1, 90, 33), image(2, 33, 33), text("say <image>"), region(1, 2, 20, 20)), assistant("a ring")]
    shown = first_sample_report(processor, {"messages": turns})
    first, second = processor.image_tokens(90, 33), processor.image_tokens(33, 33)
    assert first != second
    assert shown.index(f"<image> x {first} ") < shown.index(f"<image> x {second} ") < shown.index("say <image>")
    assert shown.count("<image>") == 3


# ---- training ------------------------------------------------------------------------------------------------------

BATCHES = {
    "image": [[user(image(1, 90, 33), text("what is "), region(3, 4, 20, 25)), assistant("a ring"), grounding_turn()]],
    "thin": [[user(image(1, 1000, 2), text("what?")), assistant("a line")]],
    "text": [[user("how many?"), assistant("two")]],
}


def test_the_newline_takes_part_in_every_step() -> None:
    model, processor = tiny_mllm(image_mode="anyres")
    model.train()
    calls: list[str] = []
    parts = ("vision_tower", "multi_modal_projector", "image_newline", "prompter", "language_model", "grounding_head")
    for name in parts:
        getattr(model.model, name).register_forward_pre_hook(lambda *args, name=name: calls.append(name))
    for name, conversations in BATCHES.items():
        calls.clear()
        model.zero_grad()
        batch = model_inputs(processor.encode(conversations, return_labels=True))
        output = model(**batch)
        output.loss.backward()
        assert calls == list(parts), name
        assert bool(model.model.image_newline.weight.grad.any()) == (name == "image")
        assert model.model.multi_modal_projector.linear_1.weight.grad is not None, name
        model.eval()
        with torch.no_grad():
            assert torch.equal(model(**batch).loss, output.loss)
        model.train()


def test_adapters_keep_the_newline_with_the_projector(tmp_path: Path) -> None:
    from peft import PeftModel

    model, processor = tiny_mllm(image_mode="anyres")
    assert part_of("model.image_newline.weight", MLLM_PARTS) == "projector"
    parts = MllmParts.model_validate({"llm": {"mode": "lora", "rank": 4}})
    adapted, reports = apply_parts(model, parts, OptimOptions())
    projector = next(report for report in reports if report.name == "projector")
    assert projector.trained == projector.total
    trained = [p for name, p in adapted.named_parameters() if "image_newline" in name and p.requires_grad]
    assert [p.shape for p in trained] == [(32,)]
    batch = model_inputs(processor.encode(BATCHES["image"], return_labels=True))
    adapted.train()
    adapted(**batch).loss.backward()
    assert trained[0].grad.any()
    with torch.no_grad():
        trained[0].add_(1.0)
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_mllm(image_mode="anyres")[0], tmp_path)
    adapted.eval()
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(**batch).logits, adapted(**batch).logits)
        torch.testing.assert_close(
            adapted.merge_and_unload()(**batch).logits, again(**batch).logits, atol=1e-5, rtol=1e-4
        )
