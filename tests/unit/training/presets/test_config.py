"""Presets: what is wrong with one is said by file and key, and what is shipped is right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cloc_mllm.errors import ClocError
from cloc_mllm.training.presets.config import (
    AlignConfig,
    InstructConfig,
    PretrainConfig,
    load_config,
    plan_batch,
    write_config,
)
from cloc_mllm.training.running.launch import resolve_zero
from tests.builders_training import CONFIGS, ROOT

CLASSES = {"pretrain": PretrainConfig, "align": AlignConfig, "instruct": InstructConfig}
SHIPPED = sorted(CONFIGS.glob("*.yaml"))
MINIMAL = "stage: pretrain\nrun: {steps: 3}\ndata: {train: here}\n"


def stage_of(preset: Path) -> str:
    """The stage a shipped preset's name says it is of; those named after an encoder are of the first."""
    words = preset.stem.split("_")
    if words[0] in ("cloc", "prompter"):
        return "pretrain"
    if words[-1] in ("lora", "qlora"):  # ways of instruction tuning
        return "instruct"
    return next(word for word in words if word in CLASSES)


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(MINIMAL)
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_preset_is_valid_and_says_how_to_launch_it(path: Path) -> None:
    config = load_config(path)
    assert type(config) is CLASSES[stage_of(path)]
    program = {"pretrain": "pretrain_cloc.py"}.get(config.stage, f"{config.stage}.py")
    header = path.read_text().split("stage:")[0]
    assert f"train/{program}" in header
    assert f"--config {path.relative_to(ROOT)}" in header


def test_there_are_presets_of_every_stage() -> None:
    assert {stage_of(path) for path in SHIPPED} == set(CLASSES)


@pytest.mark.parametrize("path", sorted((ROOT / "train" / "zero").glob("*.json")), ids=lambda path: path.stem)
def test_zero_files_leave_optimizer_and_scheduler_to_the_preset(path: Path) -> None:
    config = json.loads(path.read_text())
    assert not {"optimizer", "scheduler"} & set(config)
    assert resolve_zero(path.stem) == config
    assert config["zero_optimization"]["stage"] == int(path.stem.removeprefix("zero")[0])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_stage_names_its_file(stage: int) -> None:
    config = resolve_zero(stage)
    assert config is not None
    assert config["zero_optimization"]["stage"] == stage
    assert resolve_zero(str(stage)) == config


def test_a_user_file_with_an_optimizer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "z.json"
    for block in ("optimizer", "scheduler"):
        path.write_text(json.dumps({"zero_optimization": {"stage": 1}, block: {}}))
        with pytest.raises(ClocError, match=f"holds a block '{block}'"):
            resolve_zero(str(path))


@pytest.mark.parametrize("text", ["{", "[]", '{"zero_optimization": {"stage": 4}}'])
def test_a_broken_zero_file_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "z.json"
    path.write_text(text)
    with pytest.raises(ClocError, match=r"z\.json"):
        resolve_zero(str(path))


def test_none_is_no_deepspeed() -> None:
    assert resolve_zero("none") is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", r"mine\.yaml: unknown key 'optim\.lrr' \(did you mean 'optim\.lr'\?\)"),
        ("lr=1", r"unknown key 'lr' \(did you mean 'optim\.lr'"),
        ("run.precision=fp16", r"'run\.precision' is 'fp16'"),
        ("run.epochs=1", "exactly one of 'steps' and 'epochs'"),
        ("run.steps=null", "exactly one of 'steps' and 'epochs'"),
        ("run.steps=-1", r"'run\.steps' is -1"),
        ("optim.lr=fast", r"'optim\.lr' is 'fast'"),
        ("model.patch_size=15", "not a multiple of patch_size 15"),
        ("model.vision.num_attention_heads=5", "not a multiple of 5 heads"),
        ("model.init=magic", "'magic' is not one of scratch, clip:PATH, siglip:PATH, cloc:PATH"),
        ("parts.vision_tower=lora", "lora' is not supported"),
        ("parts.vision_towr=full", r"did you mean 'parts\.vision_tower'\?"),
        ("run.eval_every=5", r"'run\.eval_every' is set, but there is nothing to validate on"),
        ("data.zero_shot={path: x}", r"'data\.zero_shot' is set, but there is nothing to validate on"),
        ("optim.ema=1", r"'optim\.ema' is 1"),
        ("objective.extra_captions=true", r"set model\.prompter=null"),
        ("stage=tune", "'stage' must be one of pretrain, align, instruct"),
        ("run", "Write key=value"),
        ("run.seed.x=1", "'run.seed' is a value"),
        ("run.steps=[", "not valid YAML"),
    ],
)
def test_what_is_wrong_is_named(override: str, message: str, preset: Path) -> None:
    with pytest.raises(ClocError, match=message):
        load_config(preset, ["run.seed=1", override])


def test_bf16_at_stage_0_is_refused_with_the_reason(preset: Path) -> None:
    with pytest.raises(ClocError, match=r"bf16 with ZeRO stage 0 is refused: DeepSpeed advances Adam"):
        load_config(preset, ["run.zero=0", "run.precision=bf16"])
    for zero in ("1", "2", "3", "none"):
        load_config(preset, [f"run.zero={zero}", "run.precision=bf16"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage: [", "not valid YAML"),
        ("- a", "keys and values"),
        ("", "keys and values"),
        (MINIMAL + "run: {steps: 4}\n", "key 'run' is given twice"),
        ("stage: pretrain\nrun: {steps: 3}\n", "'data' is missing"),
    ],
)
def test_a_broken_file_is_named(text: str, message: str, preset: Path) -> None:
    preset.write_text(text)
    with pytest.raises(ClocError, match=message) as error:
        load_config(preset)
    assert error.value.file == str(preset)


def test_a_missing_file_suggests_its_neighbours() -> None:
    with pytest.raises(ClocError, match=r"Did you mean .*pretrain_quick\.yaml"):
        load_config(CONFIGS / "pretrain_quik.yaml")


def test_a_preset_of_another_stage_is_refused(preset: Path) -> None:
    with pytest.raises(ClocError, match="for the stage 'pretrain', not for 'align'"):
        load_config(preset, stage="align")


def test_overrides_reach_into_blocks_and_parse_yaml(preset: Path) -> None:
    config = load_config(
        preset, ["optim.lr=1e-4", "model.prompter=null", "parts.text_tower=frozen", "parts.text_tower.lr=3.0e-5"]
    )
    assert isinstance(config, PretrainConfig)
    assert config.optim.lr == 1e-4
    assert config.model.prompter is None
    assert (config.parts.text_tower.mode, config.parts.text_tower.lr) == ("frozen", 3e-5)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_written_configuration_reproduces_itself(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    write_config(config, tmp_path / "run.yaml")
    assert load_config(tmp_path / "run.yaml") == config
    assert next(iter(yaml.safe_load((tmp_path / "run.yaml").read_text()))) == "stage"


@given(micro=st.integers(1, 64), accumulation=st.integers(1, 16), world=st.integers(1, 64))
def test_batch_arithmetic_inverts_itself(micro: int, accumulation: int, world: int) -> None:
    plan = plan_batch(micro * accumulation * world, micro, world)
    assert (plan.micro_batch, plan.accumulation, plan.world_size) == (micro, accumulation, world)


@given(total=st.integers(1, 512), micro=st.none() | st.integers(1, 64), world=st.integers(1, 16))
def test_a_batch_that_does_not_divide_is_refused_and_no_other(total: int, micro: int | None, world: int) -> None:
    fits = total % world == 0 and (micro is None or (total // world) % micro == 0)
    if not fits:
        with pytest.raises(ClocError, match="does not divide"):
            plan_batch(total, micro, world)
        return
    plan = plan_batch(total, micro, world)
    assert plan.micro_batch * plan.accumulation * plan.world_size == plan.global_batch == total
    assert micro in (None, plan.micro_batch)


# -- options of tuning ------------------------------------------------------------------------------------------------

INSTRUCT = "stage: instruct\nrun: {steps: 3}\nmodel: {init: 'mllm:there'}\ndata: {train: here}\n"


@pytest.fixture
def tuning(tmp_path: Path) -> Path:
    path = tmp_path / "tuning.yaml"
    path.write_text(INSTRUCT)
    return path


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.pack_length=64"], "'pack_length' is for packed rows: set packing=true"),
        (["data.packing=true", "data.pack_length=64"], "'pack_length' 64 must hold the longest sequence"),
        (["data.packing=true", "data.pack_length=64", "data.max_length=65"], "set max_length to it or less"),
        (["data.train=[]"], "names no data"),
        (["data.train=[{path: a, weight: 0}]"], "greater than 0"),
        (["parts.llm={mode: lora, quantization: nf4}", "run.zero=3"], "with ZeRO stage 3 is refused"),
        (["parts.llm={mode: full, quantization: nf4}"], "'quantization' is for 'mode: lora', not for 'mode: full'"),
        (["parts.llm={mode: tokens, layers: [q_proj]}"], "'layers' is for 'mode: lora'"),
        (["objective.label_smoothing=1"], "less than 1"),
        (["optim.neftune_alpha=0"], "greater than 0"),
    ],
)
def test_tuning_options_that_contradict_each_other_are_named(tuning: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ClocError, match=message):
        load_config(tuning, overrides)


def test_a_mixture_is_read_and_written(tuning: Path, tmp_path: Path) -> None:
    config = load_config(tuning, ["data.train=[{path: a, weight: 0.2}, {path: b}]"])
    assert isinstance(config, InstructConfig)
    assert [(source.path, source.weight) for source in config.data.sources] == [("a", 0.2), ("b", 1.0)]
    write_config(config, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml") == config
    single = load_config(tuning)
    assert isinstance(single, InstructConfig)
    assert [(source.path, source.weight) for source in single.data.sources] == [("here", 1.0)]


def test_noise_on_the_embeddings_needs_a_language_model(preset: Path) -> None:
    with pytest.raises(ClocError, match=r"'optim\.neftune_alpha' is for alignment and instruction tuning"):
        load_config(preset, ["optim.neftune_alpha=5"])
