"""Small data sets on disk and small presets for the tests of training, and a way to run a program inside a rank."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

from tests.harness import run_ranks

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "train" / "configs"
COLOURS = {"red": (230, 30, 30), "green": (20, 190, 40), "blue": (40, 60, 230), "yellow": (240, 230, 40)}

# A few thousand weights: what is tested is the machinery around them.
TINY_ENCODER = (
    "model.image_size=32",
    "model.patch_size=8",
    "model.vision={hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64}",
    "model.text={hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 64}",
    "model.projection_dim=16",
    "tokenizer.vocab_size=300",
    "data.validation=null",
    "data.max_regions=2",
    "optim.warmup=2",
    "run.log_every=1",
    "run.save_every=null",
    "run.log_to=[]",
)
TINY_MLLM = (
    "data.validation=null",
    "optim.warmup=2",
    "run.log_every=1",
    "run.save_every=null",
    "run.log_to=[]",
)
TINY_LLM = (
    "model.scratch_llm={hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64}",
    "tokenizer.vocab_size=320",
)


def write_regions(folder: Path, count: int, seed: int = 0, size: int = 48, without: float = 0.4) -> Path:
    """Write `regions.jsonl` with images of coloured squares; a share of them has no region at all."""
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        picture, regions = Image.new("RGB", (size, size), (rng.randrange(60),) * 3), []
        for colour in rng.sample(list(COLOURS), 0 if rng.random() < without else rng.randint(1, 3)):
            side = rng.randrange(10, size // 2)
            x, y = rng.randrange(size - side), rng.randrange(size - side)
            picture.paste(COLOURS[colour], (x, y, x + side, y + side))
            regions.append({"box": [x, y, x + side, y + side], "text": f"{colour} square"})
        picture.save(folder / "images" / f"{number}.png")
        caption = " and ".join(region["text"] for region in regions) or "nothing at all"
        lines.append({"id": f"s{number}", "image": f"images/{number}.png", "caption": caption, "regions": regions})
    return _write(folder / "regions.jsonl", lines)


def write_conversations(folder: Path, count: int, seed: int = 0, size: int = 48, text_only: float = 0.3) -> Path:
    """Write `conversations.jsonl` about noise: grounding and referring turns; a share of them has no image."""
    rng = random.Random(seed)
    (folder / "noise").mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = []
    for number in range(count):
        if rng.random() < text_only:
            messages = [_said("user", "How are you?"), _said("assistant", rng.choice(["well", "very well indeed"]))]
            lines.append({"id": f"c{number}", "messages": messages})
            continue
        pixels = np.random.default_rng([seed, number]).integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "noise" / f"{number}.png")
        x, y = rng.randrange(size - 12), rng.randrange(size - 12)
        box, name = [x, y, x + 12, y + 10], f"{rng.choice(list(COLOURS))} square"
        region = {"type": "region", "box": box}
        show = {"type": "image", "image": f"noise/{number}.png"}
        messages = [_said("user", show, "What is ", region, "?"), _said("assistant", name)]
        if rng.random() < 0.5:
            messages = [
                _said("user", show, f"Where is the {name}?"),
                _said("assistant", f"{name} ", {**region, "phrase": name}),
            ]
        lines.append({"id": f"c{number}", "messages": messages})
    return _write(folder / "conversations.jsonl", lines)


def run_program(rank: int, name: str, arguments: list[str]) -> None:
    """Run `train/NAME.py` in this process, whatever rank it is; errors are raised, not turned into exit codes."""
    spec = importlib.util.spec_from_file_location(f"program_{name}", ROOT / "train" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    with mock.patch.object(sys, "argv", [f"{name}.py", *arguments]):
        program.main()


def run_preset(world: int, name: str, preset: str, *overrides: str) -> None:
    """Run `train/NAME.py` on a preset in so many ranks."""
    argv = ["--config", str(CONFIGS / f"{preset}.yaml"), *overrides]
    run_ranks(run_program, world, name, argv, init_group=False, timeout=200)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The logged lines of training steps."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def losses(run: Path) -> list[float]:
    """The logged loss of every step."""
    return [line["loss"] for line in metrics(run)]


@contextlib.contextmanager
def nothing_left_in_shared_memory() -> Iterator[None]:
    """Fail if /dev/shm holds more files afterwards than before."""
    before = set(Path("/dev/shm").iterdir())
    yield
    left = {path for path in set(Path("/dev/shm").iterdir()) - before if "deepspeed" in path.name or "shm" in path.name}
    assert not left


def _said(role: str, *items: Any) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": i} if isinstance(i, str) else i for i in items]}


def _write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path.parent
