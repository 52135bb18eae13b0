"""An MLLM as stock LLaVA: what `LlavaForConditionalGeneration` and inference servers load.

What a stock LLaVA has no place for is dropped and said: the region encoder, its projector and the grounding head. Keys
are those of LLaVA's published checkpoints (`language_model.model.*`, `language_model.lm_head.*`,
`vision_tower.vision_model.*`), which transformers 4 and 5 and the servers all read; names that transformers 5 has
changed in configurations stand beside the old ones. Nothing is believed: before anything is written, the stock model is
built from the weights and has to give the same logits.
"""

from __future__ import annotations

import copy
import json
import re
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from cloc_mllm.apps.exporters.common import Exported, card, require_type, stock_image_processor
from cloc_mllm.apps.outputs import empty_output_folder
from cloc_mllm.errors import ClocError

SHARD_SIZE = "5GB"
OURS = ("model.prompter.", "model.region_projector.", "model.grounding_head.")
_SHARED_FIELDS = (
    "image_token_index",
    "image_seq_length",
    "projector_hidden_act",
    "vision_feature_select_strategy",
    "vision_feature_layer",
    "multimodal_projector_bias",
    "tie_word_embeddings",
)
_WRAPPED_TOWERS = ("clip_vision_model", "siglip_vision_model")
"""Towers that published checkpoints keep one level deeper, in `vision_model`."""

_SNIPPET = """\
from transformers import AutoProcessor, LlavaForConditionalGeneration

model = LlavaForConditionalGeneration.from_pretrained("{folder}")
processor = AutoProcessor.from_pretrained("{folder}")
"""


def export_llava(model: str | PathLike[str], out: str | PathLike[str]) -> Exported:
    """Write an MLLM in the layout of stock LLaVA.

    Args:
        model: Folder of an MLLM, the `export/` of an alignment or instruction-tuning run.
        out: Folder to write; it may exist if it is empty.

    Returns:
        The folder, and what was left out or differs.

    Raises:
        ClocError: `model` is not such a checkpoint, or has a part that LLaVA has no place for.
    """
    require_type(model, "cloc_mllm", "llava", "an MLLM, the export/ of an alignment or instruction-tuning run")
    from cloc_mllm.inference.predictor import Predictor

    predictor = Predictor.from_pretrained(model, device="cpu")
    ours, processor = predictor.model, predictor.processor
    _refuse_what_llava_is_not(ours, model)
    images, notes = stock_image_processor(processor.image_processor)
    stock = llava_model(ours)
    _require_same_logits(ours, stock, model)
    folder = empty_output_folder(out)
    notes = [_left_out(ours), *notes]
    _write_config(stock, folder)
    _write_weights(stock, folder)
    ours.generation_config.save_pretrained(str(folder))
    stock_processor(processor, images).save_pretrained(str(folder))
    text = card(
        model,
        f"{Path(model).resolve().parent.name} as LLaVA",
        "A stock `LlavaForConditionalGeneration`: the tower, the projector and the language model of a region-aware "
        "MLLM. It answers questions on whole images.",
        _SNIPPET.format(folder=folder.name),
        notes,
        pipeline_tag="image-text-to-text",
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    return Exported(folder, notes)


def llava_model(ours: Any) -> Any:
    """The part of an MLLM that is stock LLaVA, as transformers' own class; the weights are shared, not copied.

    Raises:
        ClocError: Weights beside those of our own parts have no place in it.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=copy.deepcopy(ours.config.vision_config),
        text_config=copy.deepcopy(ours.config.text_config),
        **{name: getattr(ours.config, name) for name in _SHARED_FIELDS},
    )
    config.dtype = ours.dtype
    with torch.device("meta"):
        stock = LlavaForConditionalGeneration(config)
    weights = {name: value for name, value in ours.state_dict().items() if not name.startswith(OURS)}
    # Rotary frequencies and positions are computed, not saved; the meta device has computed nothing.
    for name, buffer in ours.named_buffers():
        if not name.startswith(OURS) and name not in weights:
            owner, _, leaf = name.rpartition(".")
            setattr(stock.get_submodule(owner), leaf, buffer)
    if homeless := sorted(set(weights) - set(stock.state_dict())):
        raise ClocError(f"cannot be exported as LLaVA: it has no place for '{homeless[0]}'")
    stock.load_state_dict(weights, strict=True, assign=True)
    stock.tie_weights()
    stock.generation_config = ours.generation_config
    return stock.eval()


def _refuse_what_llava_is_not(ours: Any, path: str | PathLike[str]) -> None:
    """Name the first part that a stock LLaVA has no place for.

    Raises:
        ClocError: There is one.
    """
    from transformers import CLIPVisionModel, SiglipVisionModel
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    from cloc_mllm.models.language_head import is_plain_head

    problem = None
    projector, tower = ours.model.multi_modal_projector, ours.model.vision_tower
    if getattr(ours.config, "image_grid_pinpoints", None):
        problem = "it cuts images into tiles (anyres), which is LLaVA-NeXT's layout"
    elif type(projector) is not LlavaMultiModalProjector:
        kind = getattr(ours.config, "projector_type", type(projector).__name__)
        problem = f"its projector is '{kind}', not LLaVA's two layers"
    elif not isinstance(tower, (CLIPVisionModel, SiglipVisionModel)):
        problem = f"its tower is a {type(tower).__name__}, not CLIP's or SigLIP's"
    elif not is_plain_head(ours.config.text_config, bias=ours.lm_head.bias is not None):
        problem = "its language model's head has a bias, a scale or a cap"
    elif not _is_inside_model(ours.config.text_config):
        problem = f"its language model ({ours.config.text_config.model_type}) does not keep its layers in 'model'"
    if problem:
        raise ClocError(f"cannot be exported as LLaVA: {problem}", file=path)


def _causal_class(text_config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM._model_mapping[type(text_config)]


def _is_inside_model(text_config: Any) -> bool:
    return _causal_class(text_config).base_model_prefix == "model"


@torch.no_grad()
def _require_same_logits(ours: Any, stock: Any, path: str | PathLike[str]) -> None:
    """Compare both models on an image and some text.

    Raises:
        ClocError: They differ: the language model does more than LLaVA has a place for.
    """
    vision, text = ours.config.vision_config, ours.config.text_config
    pixels = torch.linspace(-1, 1, 3 * vision.image_size**2, dtype=ours.dtype)
    pixels = pixels.view(1, 3, vision.image_size, vision.image_size)
    words = torch.arange(8) % min(text.vocab_size, ours.config.image_token_index)
    ids = torch.cat([torch.full((ours.config.image_seq_length,), ours.config.image_token_index), words])[None]
    mine = ours(input_ids=ids, pixel_values=pixels).logits
    theirs = stock(input_ids=ids, pixel_values=pixels).logits
    difference = float((mine.float() - theirs.float()).abs().max())
    if not difference <= 1e-5 * max(1.0, float(mine.float().abs().max())):
        raise ClocError(f"cannot be exported as LLaVA: the stock model's logits differ by {difference:.3g}", file=path)


def _left_out(ours: Any) -> str:
    parts = {
        "the region encoder (<region> is read by nothing)": ours.model.prompter is not None,
        "the grounding head (<ground> finds no box)": ours.model.grounding_head is not None,
    }
    named = [part for part, is_there in parts.items() if is_there]
    return f"Left out, as LLaVA has no place for it: {', '.join(named) or 'nothing'}."


def published_key(name: str, tower_type: str) -> str:
    """The name of a weight in LLaVA's published checkpoints, of its name in transformers 5."""
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    name = name.removeprefix("model.")
    name = re.sub(r"^language_model\.", "language_model.model.", name)
    if tower_type in _WRAPPED_TOWERS:
        name = re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)
    return name


def _write_weights(stock: Any, folder: Path) -> None:
    """Write safetensors under the published names, in shards with an index if they are large."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    tower = stock.config.vision_config.model_type
    tied = stock.lm_head.weight is stock.get_input_embeddings().weight
    weights = {
        published_key(name, tower): value.contiguous()
        for name, value in stock.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    split = split_torch_state_dict_into_shards(
        weights, max_shard_size=SHARD_SIZE, filename_pattern="model{suffix}.safetensors"
    )
    for file, names in split.filename_to_tensors.items():
        save_file({name: weights[name] for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_config(stock: Any, folder: Path) -> None:
    """Write config.json with the names of transformers 4 beside those of 5 (4 ignores `rope_parameters`)."""
    config = json.loads(stock.config.to_json_string(use_diff=False))
    config["architectures"] = ["LlavaForConditionalGeneration"]
    text = config["text_config"]
    text["architectures"] = [_causal_class(stock.config.text_config).__name__]
    rope = text.get("rope_parameters") or {}
    if "rope_theta" in rope:
        text["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            text["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    dtype = str(stock.dtype).removeprefix("torch.")
    for block in (config, text, config["vision_config"]):
        block["dtype"] = block["torch_dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def stock_processor(processor: Any, images: Any) -> Any:
    """Transformers' `LlavaProcessor` that makes the same text and tokens of a conversation.

    Args:
        processor: Ours.
        images: The stock image processor.
    """
    from transformers import LlavaProcessor

    return LlavaProcessor(
        images,
        processor.tokenizer,
        patch_size=processor.patch_size,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        num_additional_image_tokens=processor.num_additional_image_tokens,
        chat_template=without_generation_tags(processor.chat_template),
    )


def without_generation_tags(template: str) -> str:
    """A chat template that renders the same text without `{% generation %}`, which only transformers understands."""
    return re.sub(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}", r"{#\1 \2#}", template)
