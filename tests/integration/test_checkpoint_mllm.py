"""A checkpoint stands alone: other processes, with the package or without it, get the same numbers from it."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cloc_mllm.models.modeling_cloc_mllm import ClocMllmForConditionalGeneration
from tests.builders import tiny_cloc
from tests.builders_mllm import region, text, tiny_mllm, user

pytestmark = pytest.mark.integration

# What another process does with a checkpoint. Without the package it is made impossible to import, not merely absent.
READER = """
import json, sys
import torch
folder, package, trust, dtype = sys.argv[1], sys.argv[2] == "package", sys.argv[3] == "trust", sys.argv[4]
if package:
    import cloc_mllm
else:
    sys.modules["cloc_mllm"] = None
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=trust, dtype=dtype).eval()
assert AutoConfig.from_pretrained(folder, trust_remote_code=trust).model_type == "cloc_mllm"
turns = json.load(open(folder + "/turns.json"))
batch = processor.encode(turns, add_generation_prompt=True)
with torch.no_grad():
    output = model(**batch)
    said = model.generate(**batch, max_new_tokens=6)
save_file(
    {"logits": output.logits.float(), "boxes": output.pred_boxes, "said": said, "regions": batch["region_boxes"]},
    folder + "/out.safetensors",
)
model.save_pretrained(folder + "/again")
processor.save_pretrained(folder + "/again")
from transformers import pipeline
# The pipeline asks in transformers' own words: messages, no tensors.
asked = pipeline("image-text-to-text", model=model, processor=processor)
print("PIPELINE SAID", json.dumps(asked(text=turns[0], max_new_tokens=6, return_full_text=False)[0]["generated_text"]))
where = {type(model).__module__.split(".")[0], type(processor).__module__.split(".")[0]}
print("CLASSES FROM", *where)
"""


def read(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
        "HF_MODULES_CACHE": str(folder / "hf" / "modules"),
        "OMP_NUM_THREADS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONPATH": str(Path(__file__).parents[2]) if arguments[0] == "package" else "",
    }
    return subprocess.run(
        [sys.executable, "-c", READER, str(folder), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


KINDS = [("llama", False, "prompter"), ("qwen2", True, "roi_align")]
once = pytest.mark.parametrize("saved", KINDS[:1], indirect=True)
"""For what a second kind of model would only repeat: another process takes many seconds to start."""


@pytest.fixture(scope="module", params=KINDS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    family, tied, region_encoder = request.param
    model, processor = tiny_mllm(family, tied=tied, region_encoder=region_encoder, region_format="both")
    folder = tmp_path_factory.mktemp("a-folder")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    Image.effect_noise((40, 30), 60).save(folder / "picture.png")
    picture = {"type": "image", "image": str(folder / "picture.png")}
    regions = (region(3, 4, 20, 25), {"type": "region", "scribble": [[1, 2], [30, 9]]})
    turns = [[user(picture, text("what is "), *regions, text("?"))], [user("how many crosses are there")]]
    (folder / "turns.json").write_text(json.dumps(turns))
    return folder, model, processor


def expected(saved: tuple[Path, Any, Any]) -> dict[str, torch.Tensor]:
    folder, model, processor = saved
    batch = processor.encode(json.loads((folder / "turns.json").read_text()), add_generation_prompt=True)
    with torch.no_grad():
        output = model(**batch)
        said = model.generate(**batch, max_new_tokens=6)
    return {"logits": output.logits, "boxes": output.pred_boxes, "said": said, "regions": batch["region_boxes"]}


def said_by(saved: tuple[Path, Any, Any]) -> str:
    """What the model in this process answers to the first question."""
    folder, model, processor = saved
    turns = json.loads((folder / "turns.json").read_text())[0]
    batch = processor.encode(turns, add_generation_prompt=True)
    said = model.generate(**batch, max_new_tokens=6)[0, batch["input_ids"].shape[1] :]
    return processor.tokenizer.decode(said, skip_special_tokens=True)


def pipeline_answer(done: subprocess.CompletedProcess[str]) -> str:
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("PIPELINE SAID "))
    return json.loads(line.removeprefix("PIPELINE SAID "))


@pytest.mark.parametrize(("package", "trust"), [("package", "no"), ("without", "trust")])
def test_another_process_gets_the_same_numbers(saved: tuple[Path, Any, Any], package: str, trust: str) -> None:
    done = read(saved[0], package, trust, "auto")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("CLASSES FROM ")[1].split() == [
        "cloc_mllm" if package == "package" else "transformers_modules"
    ]
    theirs = load_file(saved[0] / "out.safetensors")
    for name, value in expected(saved).items():
        assert torch.equal(theirs[name], value), name
    assert pipeline_answer(done) == said_by(saved)
    # What it saved is the same checkpoint again, code included.
    ours, again = load_file(saved[0] / "model.safetensors"), load_file(saved[0] / "again" / "model.safetensors")
    assert set(ours) == set(again)
    assert all(torch.equal(value, again[name]) for name, value in ours.items())
    assert (saved[0] / "again" / "modeling_cloc_mllm.py").exists()


@once
def test_without_trust_it_is_refused_plainly(saved: tuple[Path, Any, Any]) -> None:
    done = read(saved[0], "without", "no", "auto")
    assert done.returncode != 0
    assert "trust_remote_code=True" in done.stderr.splitlines()[-1]
    assert "contains custom code" in done.stderr


@once
def test_bf16_in_shards_in_another_process(saved: tuple[Path, Any, Any], tmp_path: Path) -> None:
    _, model, processor = saved
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    rounded.save_pretrained(tmp_path, max_shard_size="50KB")
    processor.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    (tmp_path / "turns.json").write_text((saved[0] / "turns.json").read_text())
    done = read(tmp_path, "without", "trust", "auto")
    assert done.returncode == 0, done.stderr
    theirs = load_file(tmp_path / "out.safetensors")
    # Loaded here as well: `.to` has rounded the rotary frequencies of the model in memory.
    here = ClocMllmForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert here.dtype == torch.bfloat16
    for name, value in expected((tmp_path, here, processor)).items():
        assert torch.equal(theirs[name], value.float() if name == "logits" else value), name


@once
def test_the_code_in_a_checkpoint_is_flat_and_self_contained(saved: tuple[Path, Any, Any]) -> None:
    code = {path.name: path.read_text(encoding="utf-8") for path in saved[0].glob("*.py")}
    assert {"configuration_cloc_mllm.py", "modeling_cloc_mllm.py", "processing_cloc_mllm.py"} <= set(code)
    for name, source in code.items():
        assert "import cloc_mllm" not in source, name
        assert "from cloc_mllm" not in source, name
        assert "from .." not in source, name


@once
def test_what_is_said_about_a_checkpoint_is_in_it(saved: tuple[Path, Any, Any]) -> None:
    folder, model, processor = saved
    config = json.loads((folder / "processor_config.json").read_text())
    assert {name: config[name] for name in ("region_format", "grounding", "box_mode", "patch_size")} == {
        "region_format": "both",
        "grounding": "head",
        "box_mode": "norm1000",
        "patch_size": 8,
    }
    assert (folder / "chat_template.jinja").read_text() == processor.chat_template
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["suppress_tokens"] == model.generation_config.suppress_tokens


def test_keys_are_llavas_and_ours(saved: tuple[Path, Any, Any]) -> None:
    parts = {".".join(name.split(".")[:2]) for name in load_file(saved[0] / "model.safetensors")}
    ours = {"model.prompter", "model.region_projector", "model.grounding_head"}
    llavas = {"model.vision_tower", "model.multi_modal_projector", "model.language_model"}
    tied = saved[1].config.text_config.tie_word_embeddings
    assert parts == ours | llavas | (set() if tied else {"lm_head.weight"})


def test_an_encoder_checkpoint_carries_its_code_too(tmp_path: Path) -> None:
    encoder, processor = tiny_cloc()
    encoder.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    program = (
        "import sys; sys.modules['cloc_mllm'] = None\n"
        "import torch; from transformers import AutoModel, AutoProcessor\n"
        "m = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval()\n"
        "p = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "b = p(text=['a red ring']); print('SUM', m.get_text_features(**b).pooler_output.double().sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        ours = encoder.get_text_features(**processor(text=["a red ring"])).pooler_output.double().sum().item()
    assert float(done.stdout.split("SUM")[1]) == ours
