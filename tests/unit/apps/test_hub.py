"""What is pushed, and what is refused before any network is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloc_mllm.apps.cli import main
from cloc_mllm.apps.hub import card_for, push
from cloc_mllm.errors import ClocError


def made(folder: Path, *names: str) -> Path:
    for name in ("config.json", *names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_hidden_files_stay_behind(tmp_path: Path) -> None:
    folder = made(tmp_path / "m", "model.safetensors", "README.md", ".cache/x", "__pycache__/a.pyc", "sub/a.json")
    done = push(folder, "me/it", dry_run=True)
    assert done.url is None
    assert done.files == {"README.md": 9, "config.json": 11, "model.safetensors": 17, "sub/a.json": 10}


def test_refusals(tmp_path: Path) -> None:
    made(tmp_path / "run" / "export")
    with pytest.raises(ClocError, match=r"no config\.json or adapter_config\.json.*Did you mean '.*export'"):
        push(tmp_path / "run", "me/it", dry_run=True)
    with pytest.raises(ClocError, match="is a pickle"):
        push(made(tmp_path / "old", "pytorch_model.bin"), "me/it", dry_run=True)
    for name in ("it", "me/it/too", "me/", "https://hub/me/it"):
        with pytest.raises(ClocError, match="is not the name of a repository"):
            push(made(tmp_path / "m"), name, dry_run=True)


def test_a_cards_snippets_load_the_repository() -> None:
    card = 'A.from_pretrained(".") B.from_pretrained("cloc-llava", x=1) C.from_pretrained("other")'
    assert card_for(card, Path("/runs/cloc-llava"), "me/it") == (
        'A.from_pretrained("me/it") B.from_pretrained("me/it", x=1) C.from_pretrained("other")'
    )


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(made(tmp_path / "m", "a.json")), "me/it", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("17  bytes in 2 files: not uploaded (dry run)")
