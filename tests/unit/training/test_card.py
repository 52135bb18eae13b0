"""The model card says what the hub reads, and its snippets run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cloc_mllm.errors import ClocError
from cloc_mllm.training.card import read_header, write_card
from cloc_mllm.training.presets.config import load_config
from tests.builders import tiny_cloc
from tests.builders_mllm import tiny_mllm

METRICS = {"eval_loss": 1.23456, "eval_grounding_acc50": 0.5}


def body_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def run_snippet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Execute the card's Python as someone would who stands in the folder."""
    (code,) = re.findall(r"```python\n(.*?)```", body_of(folder), re.DOTALL)
    monkeypatch.chdir(folder)
    exec(compile(code, "README.md", "exec"), {})


def config(preset: str, *overrides: str) -> Any:
    return load_config(f"train/configs/{preset}.yaml", overrides)


def test_an_mllms_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model, processor = tiny_mllm()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    words = ("model.encoder=me/encoder", "model.llm=org/llm", "data.train=hf://datasets/me/talk/train")
    written = config("instruct_quick", *words, "model.init=parts", "run.license=apache-2.0", "run.output=runs/mine")
    write_card(tmp_path, written, METRICS)
    header = read_header(tmp_path / "README.md")
    assert header == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "license": "apache-2.0",
        "base_model": ["me/encoder", "org/llm"],
        "datasets": ["me/talk"],
        "tags": ["cloc", "region-text", "grounding"],
    }
    text = body_of(tmp_path)
    assert "# mine" in text
    assert "| eval_loss | 1.235 |" in text
    assert "* language model: `org/llm`" in text
    assert load_config(tmp_path / "run.yaml") == written
    assert yaml.safe_dump(written.run.model_dump()["steps"]).split()[0] in text
    run_snippet(tmp_path, monkeypatch)
    assert capsys.readouterr().out


def test_an_encoders_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model, processor = tiny_cloc()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    write_card(tmp_path, config("pretrain_quick"), {})
    header = read_header(tmp_path / "README.md")
    assert "base_model" not in header
    assert "license" not in header
    assert "datasets" not in header
    assert "figure at the end" not in body_of(tmp_path)
    run_snippet(tmp_path, monkeypatch)
    assert "tensor" in capsys.readouterr().out


def test_local_bases_are_asked_for_theirs(tmp_path: Path) -> None:
    """A path of this machine is no name on the hub; what its own card names is."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nbase_model: [org/llm]\n---\ntext\n")
    write_card(tmp_path, config("instruct_quick", f"model.init=mllm:{base}"), {})
    assert read_header(tmp_path / "README.md")["base_model"] == ["org/llm"]
    (base / "README.md").write_text("---\nbase_model: org/other\n---\n")
    write_card(tmp_path, config("instruct_quick", f"model.init=mllm:{base}"), {})
    assert read_header(tmp_path / "README.md")["base_model"] == ["org/other"]
    (base / "README.md").write_text("---\n[\n---\n")
    with pytest.raises(ClocError, match="not valid YAML"):
        write_card(tmp_path, config("instruct_quick", f"model.init=mllm:{base}"), {})


def test_an_adapters_card_names_the_command(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    write_card(tmp_path, config("instruct_quick", "model.init=mllm:some/where"), {})
    assert "cloc-mllm merge . --out merged" in body_of(tmp_path)
    assert "```python" not in body_of(tmp_path)
