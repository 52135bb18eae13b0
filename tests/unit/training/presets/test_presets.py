"""Presets that are shipped: the paper's recipe, sizes as published, and what each trains."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloc_mllm.training.planning.explain import count_parts, explain
from cloc_mllm.training.presets.config import AlignConfig, InstructConfig, PretrainConfig, load_config
from cloc_mllm.training.presets.parts import PartReport
from tests.builders import save_tiny_siglip, tiny_cloc
from tests.builders_mllm import tiny_mllm
from tests.builders_training import CONFIGS
from tests.unit.training.pretraining.test_towers import save_clip

SCRATCH = ("cloc_vit_b16_224", "cloc_vit_l14_336", "cloc_vit_h14_336")

# open_clip's docs/model_profile.csv: image and text parameters in millions, with CLIP's vocabulary of 49,408 and, for
# ViT-H-14, at 224 pixels (256 patches for 576).
PUBLISHED = {
    "cloc_vit_b16_224": (86.19, 63.43),
    "cloc_vit_l14_336": (304.29, 123.65),
    "cloc_vit_h14_336": (632.08 + 320 * 1280e-6, 354.03),
}


def preset(name: str, *overrides: str) -> PretrainConfig:
    config = load_config(CONFIGS / f"{name}.yaml", overrides)
    assert isinstance(config, PretrainConfig)
    return config


def parts(name: str, *overrides: str) -> dict[str, PartReport]:
    return {report.name: report for report in count_parts(preset(name, *overrides))}


@pytest.mark.parametrize("name", SCRATCH)
def test_towers_have_their_published_sizes(name: str) -> None:
    config, counted = preset(name), parts(name)
    image, text = PUBLISHED[name]
    assert counted["vision_tower"].total / 1e6 == pytest.approx(image, abs=0.006)
    fewer_words = (49408 - config.tokenizer.vocab_size) * config.model.text.hidden_size
    assert (counted["text_tower"].total + fewer_words) / 1e6 == pytest.approx(text, abs=0.006)
    assert all(report.trained == report.total for report in counted.values())


@pytest.mark.parametrize("name", SCRATCH)
def test_the_recipe_is_the_papers(name: str) -> None:
    """Chen et al., arXiv 2410.02746, as docs of this project quote it."""
    config = preset(name)
    run, optim, objective, tokens = config.run, config.optim, config.objective, config.tokenizer
    assert (run.batch_size, run.steps) == (32768, 439087)
    assert (optim.lr, optim.betas, optim.weight_decay) == (5e-4, (0.9, 0.98), 0.2)
    assert (optim.warmup, optim.schedule) == (2000, "cosine")
    assert (tokens.path, tokens.lowercase, tokens.max_length) == ("google-t5/t5-small", True, 77)
    assert (config.data.max_regions, objective.filter_threshold) == (4, 0.9)
    assert (objective.region_weight, objective.grounding_weight, objective.grounding_loss) == (1, 1, "mse")
    assert config.model.prompter is not None
    assert (config.model.prompter.pooling, config.model.prompter.num_attention_heads) == ("mean", 1)
    assert config.model.resize_mode == "pad"
    assert config.model.image_size == int(name.rsplit("_", 1)[1])


def test_presets_without_a_hub_are_explained_to_the_end() -> None:
    for name in (*SCRATCH, "cloc_tiny"):
        shown = explain(str(CONFIGS / f"{name}.yaml"), world_size=8)
        assert "<- this preset" in shown
        assert "others, those of the whole batch" in shown


@pytest.mark.parametrize(
    ("name", "kind", "checkpoint"),
    [
        ("cloc_finetune_clip_l14_336", "clip", "openai/clip-vit-large-patch14-336"),
        ("prompter_only", "clip", "openai/clip-vit-large-patch14-336"),
        ("cloc_siglip2_so400m", "siglip", "google/siglip2-so400m-patch14-384"),
    ],
)
def test_presets_that_start_from_a_checkpoint(name: str, kind: str, checkpoint: str, tmp_path: Path) -> None:
    config = preset(name)
    assert config.model.init == f"{kind}:{checkpoint}"
    shown = explain(str(CONFIGS / f"{name}.yaml"), [f"model.init={kind}:{tmp_path / 'nowhere'}"])
    assert "unknown until this is there" in shown
    if kind == "clip":
        save_clip(tmp_path / "here")
    else:
        save_tiny_siglip(tmp_path / "here", image_size=48)
        assert config.objective.contrast == "sigmoid"
        assert config.model.image_size == 384 // 14 * 14, "the same patches as the checkpoint's"
    counted = parts(name, f"model.init={kind}:{tmp_path / 'here'}", "model.image_size=null")
    towers = {counted[part].trained == counted[part].total for part in ("vision_tower", "text_tower", "temperature")}
    assert towers == ({False} if name == "prompter_only" else {True})
    for new in ("prompter", "box_head", "region_temperature"):
        assert counted[new].trained == counted[new].total > 0
    # What is finished moves more slowly than what is new.
    assert name == "prompter_only" or counted["vision_tower"].lr < counted["prompter"].lr


@pytest.mark.parametrize("name", [*SCRATCH, "cloc_finetune_clip_l14_336", "cloc_siglip2_so400m", "prompter_only"])
def test_batches_divide_over_whole_nodes(name: str) -> None:
    for world in (1, 8, 16):
        explain(str(CONFIGS / f"{name}.yaml"), ["model.init=clip:/nowhere"], world_size=world)


def test_fine_tuning_says_what_the_paper_measured() -> None:
    for name in ("cloc_finetune_clip_l14_336", "cloc_siglip2_so400m"):
        header = (CONFIGS / f"{name}.yaml").read_text().split("stage:")[0]
        for figure in ("64.1", "19.1", "70.1", "27.2"):
            assert figure in header


# -- the MLLM's -------------------------------------------------------------------------------------------------------

TUNING = (
    *("llava15_align", "llava15_instruct", "llava15_lora", "llavanext_instruct", "ferret_instruct", "qlora"),
    *("mllm_tiny_align", "mllm_tiny_instruct"),
)
# Learning rate, samples a step, passes, longest sequence; of the projects' own scripts, as the presets quote them.
RECIPES = {
    "llava15_align": (1e-3, 256, 1, 2048),
    "llava15_instruct": (2e-5, 128, 1, 2048),
    "llava15_lora": (2e-4, 128, 1, 2048),
    "llavanext_instruct": (2e-5, 128, 1, 4096),
    "ferret_instruct": (2e-5, 128, 3, 2048),
    "qlora": (2e-4, 16, 1, 2048),
}


def tuning(name: str, *overrides: str) -> AlignConfig | InstructConfig:
    config = load_config(CONFIGS / f"{name}.yaml", overrides)
    assert isinstance(config, (AlignConfig, InstructConfig))
    return config


@pytest.mark.parametrize("name", list(RECIPES))
def test_tuning_follows_the_projects_recipes(name: str) -> None:
    config = tuning(name)
    run, optim, data = config.run, config.optim, config.data
    assert (optim.lr, run.batch_size, run.epochs, data.max_length) == RECIPES[name]
    assert (optim.weight_decay, optim.warmup, optim.betas) == (0, 0.03, (0.9, 0.999))
    assert (optim.schedule, optim.max_grad_norm) == (
        ("constant_with_warmup", 0.3) if name == "qlora" else ("cosine", 1)
    )
    assert (run.precision, run.activation_checkpointing) == ("bf16", True)
    if name.startswith("llava15") and config.stage == "instruct":
        assert (run.zero, data.grouping) == (3, "modality_length")
    for world in (1,) if name == "qlora" else (1, 8):
        explain(str(CONFIGS / f"{name}.yaml"), world_size=world)


def test_what_sets_one_tuning_preset_apart() -> None:
    align = tuning("llava15_align")
    assert isinstance(align, AlignConfig)
    assert (align.data.prompts, align.run.zero, align.model.vision_layer) == ("plain", 2, -2)
    lora = tuning("llava15_lora").parts
    assert (lora.llm.mode, lora.llm.rank, lora.llm.alpha, lora.projector.lr) == ("lora", 128, 256, 2e-5)
    tower = tuning("llavanext_instruct").parts.vision_tower
    assert (tower.mode, tower.lr) == ("full", 2e-6)
    weights = [source.weight for source in tuning("ferret_instruct").data.sources]
    assert weights == [3, 1, 0.2, 0.2, 1, 1, 1, 1]
    llm = tuning("qlora").parts.llm
    assert (llm.quantization, llm.rank, llm.alpha, llm.dropout) == ("nf4", 64, 16, 0.1)


@pytest.mark.parametrize("name", TUNING)
def test_tuning_presets_validate_and_tell_what_they_train(name: str, tmp_path: Path) -> None:
    config = tuning(name)
    assert config.data.validation is not None
    assert config.run.eval_every is not None
    path = str(CONFIGS / f"{name}.yaml")
    assert "unknown until this is there" in explain(path, ["model.encoder=/nowhere", f"model.init={_init(config)}"])
    here = ["data.validation=null", "run.eval_every=null"]
    if config.stage == "align":
        model, processor = tiny_cloc()
        here += [f"model.encoder={tmp_path}", "model.llm=scratch"]
    else:
        model, processor = tiny_mllm(grounding="head" if "tiny" in name else "text")
        here += [f"model.init=mllm:{tmp_path}"]
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    shown = explain(path, here)
    assert "<- this preset" in shown
    trained = {report.name for report in count_parts(load_config(path, here)) if report.trained}
    language = set() if name == "llava15_align" else {"llm"}
    tower = {"vision_tower"} if name == "llavanext_instruct" else set()
    regions = {"region_projector"} if name != "llava15_align" else set()
    assert trained == {"projector"} | language | tower | regions | ({"grounding_head"} if "tiny" in name else set())


def _init(config: AlignConfig | InstructConfig) -> str:
    return "parts" if config.stage == "align" else "mllm:/nowhere"
