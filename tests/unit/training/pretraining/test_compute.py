"""What saves work in pre-training: exact where it says so, and refused where it cannot work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cloc_mllm.data.collate import RegionTextCollator
from cloc_mllm.data.dataset import RegionTextDataset
from cloc_mllm.errors import ClocError
from cloc_mllm.training.presets.config import PretrainConfig, load_config
from cloc_mllm.training.presets.options import ComputeOptions
from cloc_mllm.training.pretraining.compute import apply_compute
from cloc_mllm.training.pretraining.gradient_cache import plan_replays, restore_random_state
from cloc_mllm.training.pretraining.pretrain import MODEL_INPUTS
from tests.builders import tiny_cloc
from tests.builders_training import CONFIGS, TINY_ENCODER, losses, run_program, write_regions


@pytest.fixture
def batch(tmp_path: Path) -> dict[str, Any]:
    dataset = RegionTextDataset(write_regions(tmp_path, 4, seed=3, without=0.0), max_regions=3)
    _, processor = tiny_cloc()
    made = RegionTextCollator(processor)([dataset[k] for k in range(4)])
    return {key: made[key] for key in MODEL_INPUTS if key in made}


def test_compiled_towers_give_the_same_embeddings_under_the_same_names(batch: dict[str, Any]) -> None:
    found = []
    for backend in (None, "aot_eager"):
        model, _ = tiny_cloc()
        apply_compute(model.train(), ComputeOptions(compile=backend, patch_dropout=0.25))
        torch.manual_seed(0)
        output = model(**batch)
        gradient = torch.autograd.grad(output.region_embeds.sum(), model.vision_model.embeddings.patch_embedding.weight)
        found.append((output, gradient[0], list(model.state_dict())))
    torch.testing.assert_close(found[0][0].region_embeds, found[1][0].region_embeds, rtol=0, atol=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)
    assert found[0][2] == found[1][2]


def test_the_second_pass_drops_the_patches_that_the_first_did(batch: dict[str, Any]) -> None:
    model, _ = tiny_cloc()
    apply_compute(model.train(), ComputeOptions(patch_dropout=0.5, text_buckets=2))
    first: list[torch.Tensor] = []

    def embed(inputs: Any) -> Any:
        output = model(**inputs)
        first.append(output.region_embeds.detach())
        return output

    replays = plan_replays(embed, [batch, batch], lambda out, inputs: (out.region_embeds.sum(), {}))
    assert not torch.equal(first[0], first[1]), "each micro-batch draws its own"
    for replay, seen in zip(replays, first, strict=True):
        restore_random_state(replay.random_state)
        assert torch.equal(model(**batch).region_embeds, seen)


def config(*overrides: str) -> PretrainConfig:
    loaded = load_config(CONFIGS / "pretrain_quick.yaml", overrides)
    assert isinstance(loaded, PretrainConfig)
    return loaded


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ClocError, match="RoI-Align"):
        config("compute.patch_dropout=0.5", "model.prompter={kind: roi_align}")
    with pytest.raises(ClocError, match="stage 3 is refused"):
        config("compute.compile=inductor", "run.zero=3")
    with pytest.raises(ClocError, match=r"compute\.patch_dropout"):
        config("compute.patch_dropout=1.0")
    assert config("compute.compile=inductor", "run.zero=2").compute.compile == "inductor"


def test_a_run_with_everything_on(tmp_path: Path) -> None:
    data = write_regions(tmp_path / "data", 16, seed=1)
    arguments = [
        "--config", str(CONFIGS / "pretrain_quick.yaml"), f"run.output={tmp_path / 'run'}", f"data.train={data}",
        *TINY_ENCODER, "run.steps=3", "run.batch_size=8", "run.micro_batch_size=4", "run.zero=none",
        "run.activation_checkpointing=true", "model.prompter={pooling: mean}", "compute.patch_dropout=0.25",
        "compute.text_buckets=2", "compute.text_multiple_of=4",
    ]  # fmt: skip
    run_program(0, "pretrain_cloc", arguments)
    assert len(losses(tmp_path / "run")) == 3
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()
