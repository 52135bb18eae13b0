"""An encoder as CLIP: its image tower as a stock `CLIPVisionModel`, or both of its sides as a stock `CLIPModel`."""

from __future__ import annotations

import copy
from os import PathLike
from pathlib import Path
from typing import Any

from cloc_mllm.apps.exporters.common import Exported, card, require_type, stock_image_processor
from cloc_mllm.apps.outputs import empty_output_folder
from cloc_mllm.errors import ClocError

PARTS = ("tower", "encoder")

_TOWER = """\
from transformers import AutoImageProcessor, CLIPVisionModel

tower = CLIPVisionModel.from_pretrained("{folder}")
processor = AutoImageProcessor.from_pretrained("{folder}")
"""
_ENCODER = """\
from transformers import CLIPModel, CLIPProcessor

model = CLIPModel.from_pretrained("{folder}")
processor = CLIPProcessor.from_pretrained("{folder}")
"""


def export_clip(model: str | PathLike[str], out: str | PathLike[str], part: str = "tower") -> Exported:
    """Write an encoder, or its image tower alone, as CLIP's own classes.

    The text side is CLIP's if it is a `CLIPTextModel` with a projection behind it, whatever tokenizer feeds it.

    Args:
        model: Folder of a CLOC (or CLIP) encoder, the `export/` of a pre-training run.
        out: Folder to write; it may exist if it is empty.
        part: "tower": a `CLIPVisionModel` with its image processor; "encoder": a `CLIPModel` with its processor.

    Returns:
        The folder, and what was left out.

    Raises:
        ClocError: `model` is not such an encoder, a part of it is not CLIP's, or `out` cannot be used.
    """
    if part not in PARTS:
        raise ClocError(f"part is '{part}'", remedy=f"Write one of {', '.join(PARTS)}.")
    require_type(model, "cloc", "clip", "an encoder, the export/ of a pre-training run")
    folder = empty_output_folder(out)

    from cloc_mllm.evaluation.encoders.readouts import ClocEncoder

    encoder = ClocEncoder.from_pretrained(model, device="cpu")
    _refuse_what_is_not_clip(encoder.model, part, model)
    images, notes = stock_image_processor(encoder.processor.image_processor)
    notes.insert(0, _left_out(encoder.model, part))
    if part == "tower":
        encoder.model.save_clip_vision_tower(str(folder))
        images.save_pretrained(str(folder))
    else:
        stock = clip_model(encoder.model)
        notes += _logit_notes(encoder.model)
        stock.save_pretrained(str(folder))
        _clip_processor(encoder.processor, images).save_pretrained(str(folder))
    name = Path(model).resolve()
    title = {"tower": "Vision tower of", "encoder": "CLIP of"}[part] + f" {name.parent.name}"
    lead = {
        "tower": "A stock `CLIPVisionModel`, the image tower of a CLOC encoder:",
        "encoder": "A stock `CLIPModel`, both sides of a CLOC encoder:",
    }[part]
    snippet = {"tower": _TOWER, "encoder": _ENCODER}[part].format(folder=folder.name)
    (folder / "README.md").write_text(card(model, title, lead, snippet, notes), encoding="utf-8")
    return Exported(folder, notes)


def clip_model(model: Any) -> Any:
    """The two sides of a `ClocModel` as a stock `CLIPModel`, weights shared; the temperature is capped as ours is."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(
        vision_config=copy.deepcopy(model.config.vision_config).to_dict(),
        text_config=copy.deepcopy(model.config.text_config).to_dict(),
        projection_dim=model.config.projection_dim,
    )
    with torch.device("meta"):
        stock = CLIPModel(config)
    weights = {
        name: value
        for name, value in model.state_dict().items()
        if name.startswith(("vision_model.", "text_model.", "visual_projection.", "text_projection."))
    }
    weights["logit_scale"] = model.logit_scale.detach().clamp(max=model.config.logit_scale_max).squeeze(0)
    # Positions are numbers that are counted anew, not weights that are saved.
    for name, buffer in model.named_buffers():
        if name.endswith("position_ids"):
            owner, _, leaf = name.rpartition(".")
            setattr(stock.get_submodule(owner), leaf, buffer)
    stock.load_state_dict(weights, strict=True, assign=True)
    return stock.eval()


def _refuse_what_is_not_clip(model: Any, part: str, path: str | PathLike[str]) -> None:
    from transformers import CLIPTextModel, CLIPVisionModel

    wanted = [("tower", model.vision_model, CLIPVisionModel)]
    wanted += [("text side", model.text_model, CLIPTextModel)] if part == "encoder" else []
    for what, found, stock in wanted:
        if not isinstance(found, stock):
            problem = f"cannot be exported as CLIP: its {what} is a {type(found).__name__}, not a {stock.__name__}"
            raise ClocError(problem, file=path)
    if part == "encoder" and not model.config.has_projections:
        raise ClocError("cannot be exported as CLIP: it has no projections to the shared space", file=path)


def _left_out(model: Any, part: str) -> str:
    """What CLIP has no place for."""
    parts = []
    if part == "tower":
        parts += ["the projections", "the text side", "the temperature"]
    if model.prompter is not None:
        parts += ["the Prompter", "the regions' temperature"]
    if model.box_head is not None:
        parts.append("the BoxHead")
    return f"Left out, as this layout has no place for it: {', '.join(parts) or 'nothing'}."


def _logit_notes(model: Any) -> list[str]:
    if model.logit_bias is None:
        return []
    bias = float(model.logit_bias.detach())
    return [
        f"The encoder adds a bias of {bias:.4g} to its logits, which CLIP has not: its own are higher by that much."
    ]


def _clip_processor(processor: Any, images: Any) -> Any:
    """CLIP's processor; what ours does to texts (lower case, length) becomes a matter of the tokenizer."""
    from tokenizers import normalizers
    from transformers import CLIPProcessor

    tokenizer = copy.deepcopy(processor.tokenizer)
    if processor.lower_case:
        core = getattr(tokenizer, "backend_tokenizer", None)
        if core is None:
            raise ClocError(
                "this tokenizer cannot lower-case its texts, which stock CLIP's processor does not do itself"
            )
        own = [core.normalizer] if core.normalizer is not None else []
        core.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
    tokenizer.model_max_length = processor.max_length
    tokenizer.padding_side = "right"
    return CLIPProcessor(images, tokenizer)
