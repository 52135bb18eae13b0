"""A checkpoint goes up to a hub and comes back down: real client, real command, a stand-in for the server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load

from tests.builders_mllm import tiny_mllm
from tests.hub_stand_in import Hub, running_hub

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
# Reads the repository as a stranger does: by name, into an empty cache, with the package out of reach.
READER = """
import sys
sys.modules["cloc_mllm"] = None
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained("me/tiny", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("me/tiny", trust_remote_code=True)
assert processor.grounding == "head" and type(model).__module__.startswith("transformers_modules")
model.save_pretrained(sys.argv[1])
"""


def run(hub: Hub, home: Path, *words: str, token: str = "hf_secret") -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": token, "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    return subprocess.run(
        [sys.executable, *words], cwd=home.parent, env=environment, capture_output=True, text=True, timeout=300
    )


def test_up_and_down_again(tmp_path: Path) -> None:
    model, processor = tiny_mllm()
    folder = tmp_path / "export"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "README.md").write_text('---\ntags: [cloc]\n---\nAutoModel.from_pretrained(".")\n')
    (folder / ".DS_Store").write_text("not for others")
    command = ("-m", "cloc_mllm.apps.cli", "push", str(folder), "me/tiny")
    with running_hub() as hub:
        dry = run(hub, tmp_path / "hf", *command, "--dry-run")
        assert dry.returncode == 0, dry.stderr
        assert "not uploaded (dry run)" in dry.stdout
        assert not hub.requests
        refused = run(hub, tmp_path / "hf", *command, token="hf_wrong")
        assert refused.returncode == 2
        assert "Log in first" in refused.stderr
        assert not hub.repos
        done = run(hub, tmp_path / "hf", *command, "--private")
        assert done.returncode == 0, done.stderr
        assert f"{hub.url}/me/tiny/commit/" in done.stdout
        files = hub.repos["me/tiny"]
        assert set(files) == {path.name for path in folder.iterdir()} - {".DS_Store", "__pycache__"}
        assert hub.private["me/tiny"]
        assert b'from_pretrained("me/tiny")' in files["README.md"]
        sent = load(files["model.safetensors"])
        assert all((sent[name] == value).all() for name, value in sent.items())
        again = run(hub, tmp_path / "hf2", "-c", READER, str(tmp_path / "back"))
        assert again.returncode == 0, again.stderr
        assert any("GET /me/tiny/resolve/" in request and "safetensors" in request for request in hub.requests)
    assert (tmp_path / "back" / "model.safetensors").exists()
    back, ours = (
        load((tmp_path / "back" / "model.safetensors").read_bytes()),
        load((folder / "model.safetensors").read_bytes()),
    )
    assert set(back) == set(ours)
    assert all((back[name] == value).all() for name, value in ours.items())


def test_a_hub_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    with running_hub() as hub:
        gone = hub
    done = run(gone, tmp_path / "hf", "-m", "cloc_mllm.apps.cli", "push", str(tmp_path / "m"), "me/tiny")
    assert done.returncode == 2
    assert "the hub does not take it" in done.stderr
    assert "Traceback" not in done.stderr
