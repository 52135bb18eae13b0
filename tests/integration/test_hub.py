"""A checkpoint goes up to a hub and comes back down: real client, real command, a stand-in for the server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.builders_mllm import tiny_mllm
from tests.hub_stand_in import Hub, running_hub

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
# Reads the repository as a stranger does: by name, into an empty cache, with the package out of reach.
READER = """
import sys
sys.modules["cloc_mllm"] = None
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained("me/tiny", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("me/tiny", trust_remote_code=True)
assert processor.grounding == "head" and type(model).__module__.startswith("transformers_modules")
model.save_pretrained(sys.argv[1])
"""


# Three attempts in one process, which takes long to start: nobody there, a wrong token, the right one.
PUSHER = """
import os, sys
from huggingface_hub import constants
from cloc_mllm.apps.cli import main
right = constants.ENDPOINT
codes = []
for endpoint, token in (("http://127.0.0.1:9", "hf_secret"), (right, "hf_wrong"), (right, "hf_secret")):
    constants.ENDPOINT = endpoint
    os.environ["HF_TOKEN"] = token
    codes.append(main(["push", sys.argv[1], "me/tiny", "--private"]))
assert codes == [2, 2, 0], codes
"""


def run(hub: Hub, home: Path, program: str, argument: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    # Xet, the hub's newer store, speaks a protocol of its own; without it the client uses git LFS's.
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    return subprocess.run(
        [sys.executable, "-c", program, str(argument)],
        cwd=home.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_up_and_down_again(tmp_path: Path) -> None:
    model, processor = tiny_mllm()
    folder = tmp_path / "export"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "README.md").write_text('---\ntags: [cloc]\n---\nAutoModel.from_pretrained(".")\n')
    (folder / ".DS_Store").write_text("not for others")
    with running_hub() as hub:
        done = run(hub, tmp_path / "hf", PUSHER, folder)
        assert done.returncode == 0, done.stderr
        nobody, stranger = done.stderr.split("the hub does not take it: ")[1:]
        assert "Connection refused" in nobody
        assert "Log in first: hf auth login." in stranger
        assert f"{hub.url}/me/tiny/commit/" in done.stdout
        assert hub.requests.count("POST /api/models/me/tiny/commit/main") == 1
        files = hub.repos["me/tiny"]
        assert set(files) == {path.name for path in folder.iterdir()} - {".DS_Store"}
        assert hub.private["me/tiny"]
        assert b'from_pretrained("me/tiny")' in files["README.md"]
        again = run(hub, tmp_path / "hf2", READER, tmp_path / "back")
        assert again.returncode == 0, again.stderr
        assert any("GET /me/tiny/resolve/" in request and "safetensors" in request for request in hub.requests)
    back, ours = load_file(tmp_path / "back" / "model.safetensors"), load_file(folder / "model.safetensors")
    assert set(back) == set(ours)
    assert all(torch.equal(back[name], value) for name, value in ours.items())
