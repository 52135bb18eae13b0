"""How an encoder is read: images and texts in, one embedding for each box out.

CLIP has no region embedding of its own, so it is read in three ways: crop the box and encode it as an image; pool the
patch tokens under the box and send them through CLIP's projection; or pool what the last layer's values hold there.
CLOC is read through its Prompter. All satisfy :class:`RegionReadout`, so no suite knows which one it measures, and a
test can hand it an oracle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import Any, Protocol

import torch
from PIL import Image
from torch.nn import functional
from transformers import CLIPVisionModel, SiglipVisionModel

from cloc_mllm.errors import ClocError
from cloc_mllm.models.geometry import Geometry
from cloc_mllm.models.modeling_cloc import ClocModel
from cloc_mllm.models.processing_cloc import ClocProcessor
from cloc_mllm.training.pretraining.encoder import load_any_encoder

Box = Sequence[float]

CROP_MARGIN = 0.1
"""Crops are widened on every side by this share of the box's longer side, so that an outline is not cut through."""
ROI_SAMPLES = 4
"""Bilinear samples of RoI pooling along each side of a box."""
_TEXT_BATCH = 256
_CROP_BATCH = 128


@dataclass(frozen=True)
class EncodedImages:
    """Some images, each encoded once; what every read-out of a box or a phrase starts from.

    Attributes:
        ids: (B,) what to call the images in messages.
        pictures: (B,) RGB originals, for read-outs that crop.
        geometries: (B,) original to model frame.
        embeds: (B, D) whole-image embeddings, L2-normalised.
        tokens: (B, N, width) the tower's tokens before pooling and projection.
        patches_of: Makes `patches`; None for towers without.
        values_of: Makes `values`; None for towers that cannot be read so.
    """

    ids: Sequence[str]
    pictures: Sequence[Image.Image]
    geometries: Sequence[Geometry]
    embeds: torch.Tensor
    tokens: torch.Tensor
    patches_of: Callable[[], torch.Tensor] | None = None
    values_of: Callable[[], torch.Tensor] | None = None

    @cached_property
    def patches(self) -> torch.Tensor | None:
        """(B, side * side, D) patch tokens in the shared space, not normalised; made when first asked for."""
        return None if self.patches_of is None else self.patches_of()

    @cached_property
    def values(self) -> torch.Tensor | None:
        """The same of the last layer's values alone."""
        return None if self.values_of is None else self.values_of()

    def dense(self, source: str) -> torch.Tensor:
        """Return ``patches`` (source ``roi``) or ``values`` (source ``value``).

        Raises:
            ClocError: The tower cannot be read so.
        """
        found = self.patches if source == "roi" else self.values
        if found is None:
            raise ClocError(f"this tower cannot be read by '{source}': its patches do not lead to the shared space so")
        return found


class Encoder(Protocol):
    """What the suites need of an encoder, whoever made it.

    Attributes:
        name: What reports call it.
        methods: The ways its regions can be read, its own first; see :func:`build_readouts`.
        why_not: For the other ways, why they make no sense here.
        preprocessing: How whole images are prepared, in words.
    """

    name: str
    methods: list[str]
    why_not: dict[str, str]
    preprocessing: str

    @property
    def scale(self) -> float:
        """Multiplier of the cosine that the model was trained with: for regions if it has one for them."""
        ...

    @property
    def bias(self) -> float | None:
        """What the sigmoid loss added to that; None for models trained with the softmax."""
        ...

    def encode_images(self, pictures: Sequence[Image.Image], ids: Sequence[str]) -> EncodedImages:
        """Encode RGB images, placed whole in the model's frame so that no box is cut off."""
        ...

    def embed_images(self, pictures: Sequence[Image.Image], ids: Sequence[str], framed: bool = False) -> torch.Tensor:
        """Embed whole RGB images: ``(B, D)``, L2-normalised.

        Args:
            pictures: The images.
            ids: What to call them in messages.
            framed: Prepare them as ``encode_images`` does, instead of in the model's own way (CLIP's crops).
        """
        ...

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Embed texts: ``(T, D)``, L2-normalised."""
        ...


class RegionReadout(Protocol):
    """One way to embed boxes."""

    name: str

    def embed(self, images: EncodedImages, boxes: Sequence[Sequence[Box]]) -> torch.Tensor:
        """Embed boxes.

        Args:
            images: B encoded images.
            boxes: For each image its boxes, xyxy in pixels of the original.

        Returns:
            ``(R, D)``, L2-normalised, in order of images, then boxes.
        """
        ...


class ClocEncoder:
    """A :class:`ClocModel` (with a Prompter, or without one: plain CLIP) behind the :class:`Encoder` protocol.

    Args:
        model: The encoder; put into eval mode.
        processor: The processor saved beside it.
        name: What reports call it.
        own_images: Turns RGB images into pixel values as the checkpoint's makers did, where that is not the frame.
        preprocessing: What ``own_images`` does, in words.
    """

    def __init__(
        self,
        model: ClocModel,
        processor: ClocProcessor,
        name: str,
        own_images: Callable[[list[Image.Image]], torch.Tensor] | None = None,
        preprocessing: str | None = None,
    ) -> None:
        self.model = model.eval()
        self.processor = processor
        self.name = name
        self.own_images = own_images
        frame = processor.image_processor
        self.preprocessing = preprocessing or f"resize_mode {frame.resize_mode} to {frame.size} pixels"
        patchwise = ["roi", "crop", *(["value"] if self.is_clip_tower else [])]
        self.methods = [*([] if model.prompter is None else ["prompter"]), *patchwise]
        self.why_not = {
            "prompter": "this encoder has no Prompter, so it cannot be read through one",
            "value": "this tower pools by attention over all its patches, which were all trained to be read: 'roi' "
            "already sends each alone through the values of that pooling head",
        }

    @classmethod
    def from_pretrained(cls, path: str | PathLike[str], device: str | None = None) -> ClocEncoder:
        """Load an encoder of this package; see :func:`cloc_mllm.evaluation.encoders.loading.load_encoder` for others.

        Raises:
            ClocError: The folder holds no encoder that can be loaded.
        """
        model, processor = load_any_encoder(str(path))
        return cls(model.to(default_device(device)), processor, str(path))

    @property
    def scale(self) -> float:
        """Multiplier of the cosine that the model's soft-max was trained with: for regions if it has one for them."""
        learned = self.model.region_logit_scale
        learned = self.model.logit_scale if learned is None else learned
        return float(learned.detach().float().clamp(max=self.model.config.logit_scale_max).exp())

    @property
    def bias(self) -> float | None:
        """What the sigmoid loss added to the scaled cosine: for regions if there is one for them."""
        learned = self.model.region_logit_bias
        learned = self.model.logit_bias if learned is None else learned
        return None if learned is None else float(learned.detach())

    @torch.no_grad()
    def embed_images(self, pictures: Sequence[Image.Image], ids: Sequence[str], framed: bool = False) -> torch.Tensor:
        """Embed whole RGB images; see :class:`Encoder`."""
        own = None if framed else self.own_images
        pixels = own(list(pictures)) if own else self.processor.image_processor(list(pictures))["pixel_values"]
        embeds = self.model.get_image_features(pixels.to(self.model.device)).pooler_output
        return functional.normalize(embeds.float(), dim=-1)

    @torch.no_grad()
    def encode_images(self, pictures: Sequence[Image.Image], ids: Sequence[str]) -> EncodedImages:
        """Encode RGB images; see :class:`EncodedImages`."""
        pixels = self.processor.image_processor(list(pictures))["pixel_values"].to(self.model.device)
        before_last = _LastLayerInput(self.model.vision_model)
        with before_last:
            output = self.model.get_image_features(pixels)
        tokens, seen = output.last_hidden_state, before_last.seen
        return EncodedImages(
            ids=ids,
            pictures=pictures,
            geometries=[self.processor.image_processor.geometry(*picture.size) for picture in pictures],
            embeds=functional.normalize(output.pooler_output.float(), dim=-1),
            tokens=tokens,
            patches_of=lambda: self._project_patches(tokens),
            values_of=None if seen is None else lambda: self._project_patches(self._values(seen)),
        )

    @torch.no_grad()
    def _values(self, hidden: torch.Tensor) -> torch.Tensor:
        """What each token would tell the class token in the last layer, were the class token to attend to it alone."""
        layer = self.model.vision_model.encoder.layers[-1]
        return layer.self_attn.out_proj(layer.self_attn.v_proj(layer.layer_norm1(hidden)))

    @property
    def is_clip_tower(self) -> bool:
        """Whether the tower is a stock CLIP one, whose class token is pooled."""
        return isinstance(self.model.vision_model, CLIPVisionModel)

    @torch.no_grad()
    def _project_patches(self, tokens: torch.Tensor) -> torch.Tensor:
        """Send patch tokens the way the pooled token goes: post-norm (where the tower leaves it out), projection.

        SigLIP pools by attention: a patch token alone in its pool is what the whole would be, were all patches like it.
        """
        tower = self.model.vision_model
        side = self.model.config.vision_config.image_size // self.model.config.vision_config.patch_size
        patches = tokens[:, -side * side :]
        if self.is_clip_tower:
            patches = tower.post_layernorm(patches)
        elif isinstance(tower, SiglipVisionModel):
            patches = tower.head(patches.flatten(0, 1)[:, None]).unflatten(0, patches.shape[:2])
        return self.model.visual_projection(patches).float()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Embed texts, short ones together, so that little is padded: ``(T, D)``, L2-normalised."""
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
        result = torch.zeros(len(texts), self.model.config.projection_dim, device=self.model.device)
        for start in range(0, len(texts), _TEXT_BATCH):
            rows = order[start : start + _TEXT_BATCH]
            inputs = self.processor.tokenize([texts[row] for row in rows])
            features = self.model.get_text_features(**{k: v.to(self.model.device) for k, v in inputs.items()})
            result[rows] = functional.normalize(features.pooler_output.float(), dim=-1)
        return result


class PrompterReadout:
    """CLOC's own region embedding: the Prompter, or RoI-Align where the checkpoint was trained with it instead."""

    name = "prompter"

    def __init__(self, encoder: ClocEncoder) -> None:
        encoder.model.require_prompter()
        self.encoder = encoder

    @torch.no_grad()
    def embed(self, images: EncodedImages, boxes: Sequence[Sequence[Box]]) -> torch.Tensor:
        """See :class:`RegionReadout`."""
        placed, owner = place_boxes(images, boxes)
        features = self.encoder.model.get_region_features(images.tokens, input_boxes=placed, image_index=owner)
        return functional.normalize(features.pooler_output.float(), dim=-1)


class RoiReadout:
    """Mean of the patch embeddings sampled under the box. Works for any encoder, trained for it or not.

    Args:
        source: ``roi``: the tower's last patch tokens. ``value``: the last layer's values alone (MaskCLIP, arXiv
            2112.01071). The last tokens of a CLIP were never trained to mean anything in the shared space; the values
            are what its class token is made of, and say far better what is where.
    """

    def __init__(self, source: str = "roi") -> None:
        self.name = source

    @torch.no_grad()
    def embed(self, images: EncodedImages, boxes: Sequence[Sequence[Box]]) -> torch.Tensor:
        """See :class:`RegionReadout`."""
        placed, owner = place_boxes(images, boxes)
        return functional.normalize(pool_patches(images.dense(self.name), placed, owner), dim=-1)


class CropReadout:
    """The box, cut out with a small margin and encoded as an image of its own. Loses the object's size."""

    name = "crop"

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def embed(self, images: EncodedImages, boxes: Sequence[Sequence[Box]]) -> torch.Tensor:
        """See :class:`RegionReadout`."""
        crops = [
            crop_box(picture, box) for picture, of_image in zip(images.pictures, boxes, strict=True) for box in of_image
        ]
        parts = [
            self.encoder.embed_images(part, [str(number) for number in range(len(part))], framed=True)
            for part in (crops[start : start + _CROP_BATCH] for start in range(0, len(crops), _CROP_BATCH))
        ]
        return torch.cat(parts) if parts else images.embeds[:0]


def build_readouts(encoder: Encoder, names: Sequence[str] | None = None) -> list[RegionReadout]:
    """Make read-outs by name.

    Args:
        encoder: The encoder.
        names: Of ``prompter``, ``roi``, ``value``, ``crop``. Default with a Prompter that and RoI pooling, without one
            all that the encoder has.

    Raises:
        ClocError: A name is unknown, or the encoder cannot be read so.
    """
    own = [name for name in ("prompter", "roi") if name in encoder.methods]
    found: list[RegionReadout] = []
    for name in names or (own if "prompter" in own else encoder.methods):
        if name not in encoder.methods:
            problem = encoder.why_not.get(name, f"there is no read-out '{name}'")
            raise ClocError(problem, file=encoder.name, remedy=f"Choose one of {', '.join(encoder.methods)}.")
        if name == "prompter":
            assert isinstance(encoder, ClocEncoder)
            found.append(PrompterReadout(encoder))
        else:
            found.append(CropReadout(encoder) if name == "crop" else RoiReadout(name))
    return found


def default_device(device: str | None) -> str:
    """Return the device asked for, or a GPU if there is one."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


class _LastLayerInput:
    """While it is entered, remembers what went into the last layer of a CLIP tower; of other towers, nothing."""

    def __init__(self, tower: torch.nn.Module) -> None:
        self.layer = tower.encoder.layers[-1] if isinstance(tower, CLIPVisionModel) else None
        self.seen: torch.Tensor | None = None

    def __enter__(self) -> None:
        if self.layer is not None:
            self._hook = self.layer.register_forward_pre_hook(self._remember, with_kwargs=True)

    def _remember(self, layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.seen = args[0] if args else kwargs["hidden_states"]

    def __exit__(self, *error: object) -> None:
        if self.layer is not None:
            self._hook.remove()


def place_boxes(images: EncodedImages, boxes: Sequence[Sequence[Box]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Take ragged pixel boxes to the model frame.

    Returns:
        ``(R, 4)`` float32 normalised boxes and ``(R,)`` the image of each, on the images' device.
    """
    placed, owner = [torch.zeros(0, 4)], []
    for number, (geometry, of_image) in enumerate(zip(images.geometries, boxes, strict=True)):
        if len(of_image):
            placed.append(geometry.boxes_to_model([list(box) for box in of_image]))
            owner += [number] * len(of_image)
    device = images.tokens.device
    return torch.cat(placed).to(device), torch.tensor(owner, dtype=torch.long, device=device)


def pool_patches(patches: torch.Tensor, boxes: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    """RoI-Align with one sample a bin, averaged over the bins, as one matrix product an image.

    Bilinear sampling on a grid is separable and linear, so the mean over a box's samples is a weighting of the patches;
    thousands of boxes on one image (the grid search) then cost one small product, and patches are never copied.

    Args:
        patches: ``(B, side * side, D)``.
        boxes: ``(R, 4)`` normalised, model frame.
        owner: ``(R,)`` the image of each box.

    Returns:
        ``(R, D)``, the same as :func:`cloc_mllm.models.prompter.roi_align` with 4 x 4 samples, averaged.
    """
    side = math.isqrt(patches.shape[1])
    weights_x = _bilinear_weights(boxes[:, 0], boxes[:, 2], side)
    weights_y = _bilinear_weights(boxes[:, 1], boxes[:, 3], side)
    weights = (weights_y[:, :, None] * weights_x[:, None, :]).flatten(1)
    pooled = patches.new_zeros(len(boxes), patches.shape[2])
    for image in owner.unique().tolist():
        rows = owner == image
        pooled[rows] = weights[rows] @ patches[image]
    return pooled


def _bilinear_weights(low: torch.Tensor, high: torch.Tensor, side: int) -> torch.Tensor:
    """``(R, side)`` mean weight of each column of patches over evenly spread samples between ``low`` and ``high``."""
    steps = (torch.arange(ROI_SAMPLES, device=low.device, dtype=torch.float32) + 0.5) / ROI_SAMPLES
    at = ((low[:, None] + (high - low)[:, None] * steps) * side - 0.5).clamp(0, side - 1)
    columns = torch.arange(side, device=low.device, dtype=torch.float32)
    return (1 - (at[..., None] - columns).abs()).clamp(min=0).mean(dim=1)


def crop_box(picture: Image.Image, box: Box) -> Image.Image:
    """Cut a box (pixels, xyxy) out with :data:`CROP_MARGIN` around it; never past the picture, never empty."""
    margin = CROP_MARGIN * max(box[2] - box[0], box[3] - box[1])
    left = min(max(0, math.floor(box[0] - margin)), picture.width - 1)
    top = min(max(0, math.floor(box[1] - margin)), picture.height - 1)
    right = max(left + 1, min(picture.width, math.ceil(box[2] + margin)))
    bottom = max(top + 1, min(picture.height, math.ceil(box[3] + margin)))
    return picture.crop((left, top, right, bottom))
