"""The model card of what a run exports: what it is, how it is used, how it was made, and how it did on validation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from cloc_mllm import __version__
from cloc_mllm.errors import ClocError
from cloc_mllm.training.presets.config import AnyConfig, PretrainConfig, write_config

HERE = "."
"""What the snippets load: the folder that the card lies in. Pushing to the hub puts the repository's name there."""

_TABLE = "| figure at the end of training | value |\n|---|---|\n"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_MLLM = f"""\
from PIL import Image
from cloc_mllm.inference.predictor import Predictor

predictor = Predictor.from_pretrained("{HERE}")
picture = Image.new("RGB", (320, 240), "white")  # or the path of one
question = [
    {{"type": "image", "image": picture}},
    {{"type": "text", "text": "What is at "}},
    {{"type": "region", "box": [10, 20, 110, 160]}},  # x1, y1, x2, y2 in pixels of the picture
    {{"type": "text", "text": "?"}},
]
answer = predictor.chat([[{{"role": "user", "content": question}}]], max_new_tokens=64)[0]
print(answer.text, answer.boxes)
"""
_ENCODER = f"""\
import torch
from PIL import Image
import cloc_mllm
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{HERE}").eval()
processor = AutoProcessor.from_pretrained("{HERE}")
picture = Image.new("RGB", (320, 240), "white")  # or the path of one
inputs = processor(images=[picture], text=["a dog", "a red ball"])
with torch.no_grad():
    output = model(**inputs)
print(output.image_embeds @ output.text_embeds.T)
"""
_ADAPTER = """\
An adapter for the base named in `base.json`. Merge it first, then load the result:

```bash
cloc-mllm merge {here} --out merged
```
"""


def write_card(folder: Path, config: AnyConfig, metrics: dict[str, float]) -> None:
    """Write `README.md` and `run.yaml` of an exported folder.

    Args:
        folder: The folder, weights already in it.
        config: The run's.
        metrics: Final figures.
    """
    write_config(config, folder / "run.yaml")
    is_adapter = (folder / "adapter_config.json").exists()
    body = [
        f"# {Path(config.run.output).name}",
        f"Made by the stage `{config.stage}` of cloc_mllm {__version__}"
        + (", an adapter." if is_adapter else ", ready to use."),
        "## Use",
        _ADAPTER.format(here=HERE) if is_adapter else f"```python\n{_snippet(config)}```",
        "## How it was made",
        "".join(f"* {what}: `{value}`\n" for what, value in _origins(config).items()),
        f"All of it, as `run.yaml`:\n\n```yaml\n{(folder / 'run.yaml').read_text(encoding='utf-8')}```",
    ]
    if metrics:
        figures = "".join(f"| {name} | {value:.4g} |\n" for name, value in sorted(metrics.items()))
        body.append(f"{_TABLE}{figures}")
    header = yaml.safe_dump(_header(config), sort_keys=False, allow_unicode=True)
    (folder / "README.md").write_text(f"---\n{header}---\n\n" + "\n\n".join(body).rstrip() + "\n", encoding="utf-8")


def read_metrics(card: Path) -> dict[str, float]:
    """The final figures of a card that `write_card` wrote; empty if it has none."""
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    table = text.partition(_TABLE)[2]
    return {name: float(value) for name, value in re.findall(r"^\| (\w+) \| (\S+) \|$", table, re.MULTILINE)}


def read_header(card: Path) -> dict[str, Any]:
    """The YAML at the head of a model card; empty if there is none.

    Raises:
        ClocError: It is not valid.
    """
    if not card.is_file():
        return {}
    found = re.match(r"---\n(.*?)\n---\n", card.read_text(encoding="utf-8"), re.DOTALL)
    try:
        header = yaml.safe_load(found.group(1)) if found else {}
    except yaml.YAMLError as error:
        raise ClocError(f"its header is not valid YAML: {' '.join(str(error).split())}", file=card) from None
    return header if isinstance(header, dict) else {}


def _snippet(config: AnyConfig) -> str:
    return _ENCODER if isinstance(config, PretrainConfig) else _MLLM


def _origins(config: AnyConfig) -> dict[str, Any]:
    """What the run started from and saw, in the words of the preset."""
    model = config.model
    found: dict[str, Any] = {"init": model.init}
    if not isinstance(config, PretrainConfig):
        found |= {"encoder": config.model.encoder, "language model": config.model.llm}
    found["data"] = ", ".join(source.path for source in config.data.sources)
    found["validation data"] = config.data.validation
    return {what: value for what, value in found.items() if value is not None}


def _header(config: AnyConfig) -> dict[str, Any]:
    """What the hub reads: names of the hub only, since it refuses others; a base's own card is asked for its bases."""
    header: dict[str, Any] = {"library_name": "transformers"}
    starts = [config.model.init.partition(":")[2]]
    if not isinstance(config, PretrainConfig):
        header["pipeline_tag"] = "image-text-to-text"
        if config.model.init == "parts":
            starts = [config.model.encoder or "", config.model.llm]
    bases: list[str] = []
    for start in filter(None, starts):
        if Path(start).is_dir():
            own = read_header(Path(start) / "README.md")
            above = own.get("base_model", [])
            bases += above if isinstance(above, list) else [above]
        elif _HUB_NAME.fullmatch(start):
            bases.append(start)
    if config.run.license:
        header["license"] = config.run.license
    if bases:
        header["base_model"] = list(dict.fromkeys(bases))
    paths = [source.path for source in config.data.sources]
    sets = [path.removeprefix("hf://datasets/") for path in paths if path.startswith("hf://datasets/")]
    if sets:
        header["datasets"] = sorted({"/".join(name.split("/")[:2]) for name in sets})
    return header | {"tags": ["cloc", "region-text", "grounding"]}
