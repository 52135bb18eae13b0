"""Models of the open_clip library behind the :class:`Encoder` protocol, so that they can be compared.

A name is ``ARCHITECTURE/PRETRAINED`` as open_clip calls them (``ViT-B-16/laion2b_s34b_b88k``; the second part may be a
checkpoint file), or an address of its own (``hf-hub:owner/name``, ``local-dir:PATH``). Any model can be read by crops.
The built-in vision transformers that pool their class token can be read patch by patch as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch.nn import functional

from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.encoders.readouts import EncodedImages, default_device
from cloc_mllm.models.image_processing_cloc import ClocImageProcessor

_TEXT_BATCH = 256
_INSTALL = "Install it: pip install open_clip_torch."


class OpenClipEncoder:
    """An open_clip model.

    Args:
        model: Put into eval mode.
        own_images: The library's transform of validation images.
        tokenizer: Texts to token ids.
        name: What reports call it.

    Raises:
        ClocError: Its images are not square.
    """

    def __init__(self, model: Any, own_images: Any, tokenizer: Any, name: str) -> None:
        self.model = model.eval()
        self.own_images = own_images
        self.tokenizer = tokenizer
        self.name = name
        stated = model.visual.preprocess_cfg
        sides = stated["size"] if isinstance(stated["size"], (tuple, list)) else (stated["size"],) * 2
        if sides[0] != sides[1]:
            raise ClocError(f"its images are {sides[1]} x {sides[0]} pixels, and boxes need a square frame", file=name)
        self.frame = ClocImageProcessor(int(sides[0]), "pad", list(stated["mean"]), list(stated["std"]))
        if stated["interpolation"] in ("bilinear", "bicubic"):
            self.frame.resample = Image.Resampling[stated["interpolation"].upper()]
        self.preprocessing = f"open_clip's own transform ({stated['resize_mode']}, {stated['interpolation']})"
        self.patchwise = _pools_class_token(model.visual)
        self.methods = ["roi", "crop", "value"] if self.patchwise else ["crop"]
        no_patches = (
            "this open_clip tower is no plain ViT with a class token, so its patches lead nowhere by themselves"
        )
        self.why_not = {
            "prompter": "open_clip models have no Prompter, so this one cannot be read through one",
            "roi": no_patches,
            "value": no_patches,
        }

    @classmethod
    def from_name(cls, spec: str, device: str | None = None) -> OpenClipEncoder:
        """Make or load a model.

        Args:
            spec: See the top of this file.
            device: Default a GPU if there is one.

        Raises:
            ClocError: open_clip is not installed, knows no such model, or cannot load it.
        """
        try:
            import open_clip
        except ImportError as error:
            raise ClocError(f"open_clip models need the package open_clip_torch ({error})", remedy=_INSTALL) from error
        address = spec.startswith(("hf-hub:", "local-dir:"))
        architecture, _, pretrained = (spec, "", "") if address else spec.partition("/")
        if not address and not pretrained:
            raise ClocError(
                f"'open_clip:{spec}' names no weights, and those of a new model are noise",
                remedy=f"Write open_clip:{spec}/PRETRAINED, where PRETRAINED is a tag of open_clip's or a file.",
            )
        try:
            model, _, transform = open_clip.create_model_and_transforms(
                architecture, pretrained=pretrained or None, device=default_device(device)
            )
            tokenizer = open_clip.get_tokenizer(architecture)
        except (OSError, ValueError, RuntimeError, KeyError, AssertionError) as error:
            raise ClocError(f"open_clip cannot load '{spec}': {error}") from error
        return cls(model, transform, tokenizer, f"open_clip:{spec}")

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def scale(self) -> float:
        """Multiplier of the cosine that the model was trained with."""
        return float(self.model.logit_scale.detach().float().exp())

    @property
    def bias(self) -> float | None:
        """What the sigmoid loss added to the scaled cosine."""
        learned = getattr(self.model, "logit_bias", None)
        return None if learned is None else float(learned.detach())

    @torch.no_grad()
    def encode_images(self, pictures: Sequence[Image.Image], ids: Sequence[str]) -> EncodedImages:
        """Encode RGB images; see :class:`~cloc_mllm.evaluation.encoders.readouts.Encoder`."""
        pixels = self._framed(pictures)
        seen: list[torch.Tensor] = []
        if self.patchwise:
            layer = self.model.visual.transformer.resblocks[-1]
            hook = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
            after = layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
            try:
                embeds = self.model.encode_image(pixels)
            finally:
                hook.remove()
                after.remove()
            tokens = seen[1]
        else:
            embeds = self.model.encode_image(pixels)
            tokens = embeds[:, None]
        return EncodedImages(
            ids=ids,
            pictures=pictures,
            geometries=[self.frame.geometry(*picture.size) for picture in pictures],
            embeds=functional.normalize(embeds.float(), dim=-1),
            tokens=tokens,
            patches_of=(lambda: self._project(tokens[:, 1:])) if seen else None,
            values_of=(lambda: self._project(_values(layer, seen[0])[:, 1:])) if seen else None,
        )

    @torch.no_grad()
    def embed_images(self, pictures: Sequence[Image.Image], ids: Sequence[str], framed: bool = False) -> torch.Tensor:
        """Embed whole RGB images; see :class:`~cloc_mllm.evaluation.encoders.readouts.Encoder`."""
        own = torch.stack([self.own_images(picture) for picture in pictures]) if not framed else None
        pixels = self._framed(pictures) if own is None else own.to(self.device)
        return functional.normalize(self.model.encode_image(pixels).float(), dim=-1)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Embed texts: ``(T, D)``, L2-normalised. The tokenizer is open_clip's: it cuts, pads and lower-cases."""
        parts = [
            self.model.encode_text(self.tokenizer(list(texts[start : start + _TEXT_BATCH])).to(self.device)).float()
            for start in range(0, len(texts), _TEXT_BATCH)
        ]
        return functional.normalize(torch.cat(parts), dim=-1)

    def _framed(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        return self.frame(list(pictures))["pixel_values"].to(self.device)

    @torch.no_grad()
    def _project(self, patches: torch.Tensor) -> torch.Tensor:
        """Send patch tokens the way the class token goes: post-norm, projection."""
        return (self.model.visual.ln_post(patches) @ self.model.visual.proj).float()


def _pools_class_token(tower: Any) -> bool:
    """Whether a tower is open_clip's own ViT whose class token is normed and projected, with a stock last layer."""
    return (
        getattr(tower, "pool_type", None) == "tok"
        and getattr(tower, "attn_pool", None) is None
        and getattr(tower, "proj", None) is not None
        and isinstance(tower.transformer.resblocks[-1].attn, torch.nn.MultiheadAttention)
    )


@torch.no_grad()
def _values(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    """What each token would tell the class token in the last layer, were the class token to attend to it alone."""
    attention = layer.attn
    width = attention.embed_dim
    bias = None if attention.in_proj_bias is None else attention.in_proj_bias[2 * width :]
    values = functional.linear(layer.ln_1(hidden), attention.in_proj_weight[2 * width :], bias)
    return layer.ls_1(attention.out_proj(values))
