"""What several integration tests need."""

from __future__ import annotations

import json

import pytest

from tests.builders_training import CONFIGS


@pytest.fixture(scope="session")
def whole_shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Stage 3 that shards even the smallest parameter: by default it keeps those of tiny models whole."""
    config = json.loads((CONFIGS.parent / "zero" / "zero3.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = tmp_path_factory.mktemp("zero") / "zero3_all.json"
    path.write_text(json.dumps(config))
    return str(path)
