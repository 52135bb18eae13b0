"""What a run of the MLLM starts from is looked at before it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from cloc_mllm.apps.exporters.llava import without_generation_tags
from cloc_mllm.errors import ClocError
from cloc_mllm.training.presets.config import InstructConfig, load_config
from cloc_mllm.training.tuning.mllm import build_mllm
from tests.builders_mllm import tiny_mllm


def test_a_checkpoint_whose_template_teaches_nothing_is_refused(tmp_path: Path) -> None:
    model, processor = tiny_mllm()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    config = cast(InstructConfig, load_config("train/configs/instruct_quick.yaml", [f"model.init=mllm:{tmp_path}"]))
    world: Any = None  # asked for by models from parts only
    assert build_mllm(config, world)[0].training
    template = tmp_path / "chat_template.jinja"
    template.write_text(without_generation_tags(template.read_text()))
    with pytest.raises(
        ClocError, match=r"its chat template lacks \{% generation %\}.*Mend chat_template\.jinja"
    ) as caught:
        build_mllm(config, world)
    assert caught.value.file == str(tmp_path)
