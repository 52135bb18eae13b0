"""An exported MLLM behind the real `transformers serve`: an OpenAI-style question with a picture, answered."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration
from transformers.utils.import_utils import is_serve_available

from cloc_mllm.apps.exporters.llava import export_llava
from cloc_mllm.labeling.captioners.openai_endpoint import data_uri
from cloc_mllm.labeling.stages import CAPTIONERS, build_stage
from tests.builders import noise_image
from tests.builders_mllm import text, tiny_mllm, user

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not is_serve_available(), reason="needs the extra 'serve'"),
]
PICTURE = noise_image(40, 40, seed=3)


@contextmanager
def serving(model: Path, home: Path) -> Iterator[str]:
    """The address of a server with the model loaded."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = "from transformers.cli.transformers import main; main()"
    log = home / "log"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "-c", program, "serve", str(model), *options],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()[-3000:]
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=5):
                    break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()


def ask(address: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=200) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        pytest.fail(error.read().decode()[-3000:])


@torch.no_grad()
def test_it_answers_as_generate_does(tmp_path: Path) -> None:
    model, processor = tiny_mllm("qwen2", tied=True)
    model.save_pretrained(tmp_path / "m")
    processor.save_pretrained(tmp_path / "m")
    folder = export_llava(tmp_path / "m", tmp_path / "llava").folder
    stock, stock_processor = (
        LlavaForConditionalGeneration.from_pretrained(folder),
        AutoProcessor.from_pretrained(folder),
    )
    turns = [user({"type": "image", "image": PICTURE}, text("what is this"))]
    batch = stock_processor.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    said = stock.eval().generate(**batch, max_new_tokens=8)[0, batch["input_ids"].shape[1] :]
    wanted = stock_processor.decode(said, skip_special_tokens=True)
    # The exported model says what the checkpoint says.
    ours = processor.encode(turns, add_generation_prompt=True)
    assert torch.equal(model.generate(**ours, max_new_tokens=8)[0, ours["input_ids"].shape[1] :], said)
    encoded = io.BytesIO()
    PICTURE.save(encoded, "PNG")
    data = base64.b64encode(encoded.getvalue()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "text", "text": "what is this"},
    ]
    home = tmp_path / "home"
    home.mkdir()
    with serving(folder, home) as address:
        body = {"model": str(folder), "messages": [{"role": "user", "content": content}], "max_tokens": 8}
        answer = ask(address, body)
        asked = {"prompt": "what is this", "max_new_tokens": 8}
        through_server = build_stage(CAPTIONERS, f"openai:{address}/v1#{folder}", options=asked)
        captions = through_server([PICTURE], [{"id": "1"}])
    # A captioner behind a server says what the same checkpoint says here, of the picture as it was sent.
    sent = Image.open(io.BytesIO(base64.b64decode(data_uri(PICTURE, 1024).partition(",")[2])))
    assert captions == build_stage(CAPTIONERS, f"hf:{folder}", options=asked)([sent], [{"id": "1"}])
    assert captions[0]
    found = answer["choices"][0]["message"]["content"]
    assert found
    assert found == wanted
    assert answer["usage"]["prompt_tokens"] == batch["input_ids"].shape[1]
