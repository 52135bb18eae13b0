"""Which encoder a name means: one of this package, a CLIP or SigLIP of transformers, or an open_clip model.

What a folder or hub name holds is read from its ``config.json``, never guessed from its name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor
from transformers.image_processing_base import ImageProcessingMixin

from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.encoders.readouts import ClocEncoder, Encoder, default_device
from cloc_mllm.models.modeling_cloc import SIGLIP_LOGIT_BIAS
from cloc_mllm.models.processing_cloc import ClocProcessor
from cloc_mllm.training.presets.options import TokenizerOptions
from cloc_mllm.training.pretraining.encoder import encoder_kind, stock_encoder, stock_options
from cloc_mllm.training.pretraining.towers import BARE_TOWERS, FAMILIES

OPEN_CLIP = "open_clip:"
NAFLEX = "siglip2"


def load_encoder(name: str, device: str | None = None) -> Encoder:
    """Load an encoder to evaluate.

    Args:
        name: The folder of an encoder of this package; the folder or hub name of a CLIP, SigLIP or SigLIP2 of fixed
            resolution; or ``open_clip:NAME/PRETRAINED``, see :mod:`cloc_mllm.evaluation.encoders.open_clip_encoder`.
        device: Default a GPU if there is one.

    Raises:
        ClocError: There is none, or it embeds no images and texts alike.
    """
    if name.startswith(OPEN_CLIP):
        from cloc_mllm.evaluation.encoders.open_clip_encoder import OpenClipEncoder

        return OpenClipEncoder.from_name(name.removeprefix(OPEN_CLIP), device)
    kind = encoder_kind(name)
    if kind == "cloc":
        return ClocEncoder.from_pretrained(name, device)
    if kind in BARE_TOWERS:
        raise ClocError(
            f"holds an image tower alone ('{kind}'), and without texts there is nothing to compare images with",
            file=name,
            remedy="Name the whole CLIP or SigLIP.",
        )
    # A NaFlex SigLIP2 goes the same way, where it is refused with the reason.
    if kind not in (*FAMILIES, NAFLEX):
        raise ClocError(
            f"the checkpoint holds a '{kind}' model, which this suite cannot evaluate",
            file=name,
            remedy="It takes encoders: 'cloc', 'clip', 'siglip', or open_clip:NAME/PRETRAINED.",
        )
    family = "siglip" if kind == NAFLEX else kind
    options = stock_options(family, name)
    if family == "siglip":
        options = options.model_copy(update={"logit_bias_init": SIGLIP_LOGIT_BIAS})  # where the checkpoint's goes
    model, processor = stock_encoder(family, name, options, TokenizerOptions())
    own, words = _own_images(name, processor)
    return ClocEncoder(model.to(default_device(device)), processor, name, own, words)


def _own_images(
    name: str, processor: ClocProcessor
) -> tuple[Callable[[list[Image.Image]], torch.Tensor] | None, str | None]:
    """Return the checkpoint's own way with whole images; its interpolation goes to the frame as well.

    Returns:
        The function, and what it does in words; nothing for a checkpoint that comes without an image processor.
    """
    try:
        stated, _ = ImageProcessingMixin.get_image_processor_dict(name)
        found: Any = AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError):
        return None, None
    if stated.get("resample") is not None:
        # On this object alone: what a trained CLOC was shown is bicubic, and its processor does not store the choice.
        processor.image_processor.resample = Image.Resampling(stated["resample"])
    words = f"the checkpoint's own {type(found).__name__}"
    if stated.get("do_center_crop"):
        words += " (cuts out the centre)"
    return lambda pictures: found(images=pictures, return_tensors="pt")["pixel_values"], words
