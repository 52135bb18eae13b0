"""One small set of procedural scenes, and one tiny MLLM, for all tests of the evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloc_mllm.data.scenes.generator import generate_scenes
from cloc_mllm.evaluation.encoders.region_data import SceneTruth
from tests.builders import tiny_cloc
from tests.builders_mllm import tiny_mllm


@pytest.fixture(scope="session")
def scenes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 validation and 40 test scenes."""
    folder = tmp_path_factory.mktemp("scenes")
    generate_scenes(folder, "quick", n=1, n_val=24, n_test=40, seed=3, progress=False, overwrite=True)
    return folder


@pytest.fixture(scope="session")
def scene_truth(scenes_folder: Path) -> SceneTruth:
    """What the scenes' dataset.json says."""
    return SceneTruth.load(scenes_folder)


@pytest.fixture(scope="session")
def mllm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a tiny random MLLM that writes boxes as text."""
    folder = tmp_path_factory.mktemp("mllm")
    model, processor = tiny_mllm(grounding="text")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a tiny random CLOC."""
    folder = tmp_path_factory.mktemp("encoder")
    model, processor = tiny_cloc()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
