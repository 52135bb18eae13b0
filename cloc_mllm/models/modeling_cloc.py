"""The CLOC encoder: a stock tower, a stock text encoder, the Prompter and the BoxHead.

One image is encoded once; any number of boxes, points and phrases follow. Without a Prompter the model is a plain CLIP.
The model computes no loss: it returns embeddings, boxes and temperatures, and the objectives do the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModel,
    CLIPModel,
    CLIPVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipModel,
    SiglipTextConfig,
    SiglipTextModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from .complete_loading import CompleteLoadingMixin
from .configuration_cloc import ClocConfig, ClocPrompterConfig, ClocVisionConfig
from .grid_search import GridSearch
from .patch_dropout import choose_patches, reading_only
from .position_embeddings import fit_positions
from .prompter import BoxHead, ClocPrompter, ImageSide, PromptTable, RoiAlignPooler, grid_centers
from .text_buckets import encode_in_buckets

SIGLIP_LOGIT_SCALE_MAX = 6.9078
"""ln 1000. SigLIP has no cap, and its checkpoints have learnt multipliers above CLIP's cap of 100."""
SIGLIP_LOGIT_BIAS = -10.0
"""What SigLIP's bias starts from (arXiv 2303.15343)."""


@dataclass
class ClocOutput(ModelOutput):
    """What one forward pass gives; all embeddings are L2-normalised, all boxes normalised xyxy of the model frame.

    Attributes:
        image_embeds: ``(B, D)``.
        text_embeds: ``(T, D)``.
        region_embeds: ``(R, D)`` of the boxes, or ``None``.
        region_text_embeds: ``(R, D)`` of each box's phrase, or ``None``.
        pred_boxes: ``(R, 4)`` float32 boxes that the phrases were localised at, or ``None``.
        logit_scale: ``(1,)`` image-text temperature's inverse, exponentiated and capped.
        region_logit_scale: ``(1,)`` the same for regions, or ``None``.
        logit_bias: ``(1,)`` added to image-text logits by the sigmoid loss, or ``None``.
        region_logit_bias: ``(1,)`` the same for regions, or ``None``.
    """

    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    region_embeds: torch.Tensor | None = None
    region_text_embeds: torch.Tensor | None = None
    pred_boxes: torch.Tensor | None = None
    logit_scale: torch.Tensor | None = None
    region_logit_scale: torch.Tensor | None = None
    logit_bias: torch.Tensor | None = None
    region_logit_bias: torch.Tensor | None = None


class ClocPreTrainedModel(CompleteLoadingMixin, PreTrainedModel):
    """Weight initialisation and loading shared by the CLOC models."""

    config_class = ClocConfig
    base_model_prefix = "cloc"
    main_input_name = "pixel_values"
    input_modalities: tuple[str, ...] = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["ClocPrompter"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights scaled by fan-in, zero biases; the towers initialise themselves.

        CLIP scales its attention and projection weights by the width; a fixed 0.02 suits 768 and starves a narrow
        Prompter of signal: at width 96 it passed on a hundredth of what its attention read.
        """
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if isinstance(module, ClocModel):
            # Shape (1,): DeepSpeed cannot broadcast a parameter without dimensions.
            nn.init.constant_(module.logit_scale, self.config.logit_scale_init_value)
            if module.region_logit_scale is not None:
                nn.init.constant_(module.region_logit_scale, self.config.logit_scale_init_value)
            for bias in (module.logit_bias, module.region_logit_bias):
                if bias is not None:
                    nn.init.constant_(bias, self.config.logit_bias_init_value)


def _as_float(bias: torch.Tensor | None) -> torch.Tensor | None:
    # A new tensor: what a module returns may not be a parameter itself where ZeRO-3 partitions parameters.
    return None if bias is None else bias.float() * 1.0


def build_text_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The text encoder of a configuration; SigLIP's is not among those that transformers' Auto classes know."""
    if isinstance(config, SiglipTextConfig):
        return SiglipTextModel._from_config(config)
    return AutoModel.from_config(config)


def build_projection(config: ClocConfig | ClocVisionConfig, width: int) -> nn.Module:
    """A tower's way from its pooled output to the shared space; nothing at all where its own head ends there."""
    return nn.Linear(width, config.projection_dim, bias=False) if config.has_projections else nn.Identity()


def build_region_encoder(config: ClocPrompterConfig) -> ClocPrompter | RoiAlignPooler:
    """The Prompter, or RoI-Align in its place, as ``config.kind`` says."""
    return ClocPrompter(config) if config.kind == "prompter" else RoiAlignPooler(config)


def encode_boxes(
    region_encoder: ClocPrompter | RoiAlignPooler,
    image_tokens: torch.Tensor | ImageSide,
    boxes: torch.Tensor,
    image_index: torch.Tensor | PromptTable,
) -> torch.Tensor:
    """Embed ``(R, 4)`` normalised boxes of the model frame in the shared space, ``(R, D)``, not normalised."""
    if isinstance(region_encoder, RoiAlignPooler):
        return region_encoder.projection(region_encoder(image_tokens, boxes, image_index))
    prompts = region_encoder.embed_boxes(boxes)
    return region_encoder.projection(region_encoder(image_tokens, prompts, image_index))


class ClocModel(ClocPreTrainedModel):
    """CLOC (arXiv 2410.02746): CLIP plus a Prompter and a BoxHead.

    Sub-modules: ``vision_model`` and ``visual_projection`` (the tower), ``text_model`` and ``text_projection``,
    ``prompter`` and ``box_head`` (both ``None`` without ``config.prompter_config``), ``logit_scale`` and
    ``region_logit_scale`` of shape ``(1,)``, and with ``config.logit_bias_init_value`` a bias beside each. The Prompter
    reads the tower's ``last_hidden_state``: every token, class token included, before pooling, post-norm and
    projection.
    """

    def __init__(self, config: ClocConfig) -> None:
        super().__init__(config)
        self.vision_model = AutoModel.from_config(config.vision_config)
        self.text_model = build_text_model(config.text_config)
        self.visual_projection = build_projection(config, config.vision_config.hidden_size)
        self.text_projection = build_projection(config, config.text_config.hidden_size)
        self.logit_scale = nn.Parameter(torch.full((1,), config.logit_scale_init_value))
        # How training saves work; a trainer sets them, a checkpoint does not carry them.
        self.patch_dropout, self.text_buckets, self.text_multiple_of = 0.0, 1, 1
        self.prompter: ClocPrompter | RoiAlignPooler | None = None
        self.box_head: BoxHead | None = None
        for name in ("region_logit_scale", "logit_bias", "region_logit_bias"):
            self.register_parameter(name, None)
        if config.prompter_config is not None:
            self.prompter = build_region_encoder(config.prompter_config)
            self.region_logit_scale = nn.Parameter(torch.full((1,), config.logit_scale_init_value))
            if config.prompter_config.kind == "prompter":
                self.box_head = BoxHead(config.prompter_config)
        if config.logit_bias_init_value is not None:
            self.add_logit_biases(config.logit_bias_init_value)
        self.post_init()

    def add_logit_biases(self, value: float) -> None:
        """Give the model what the sigmoid loss needs, if it was trained without.

        Args:
            value: First bias (SigLIP: -10).
        """
        self.config.logit_bias_init_value = value
        for name in ("logit_bias", "region_logit_bias"):
            if getattr(self, name) is None and (name == "logit_bias" or self.prompter is not None):
                setattr(self, name, nn.Parameter(torch.full_like(self.logit_scale, value)))

    @classmethod
    def from_clip(cls, clip: CLIPModel, prompter_config: ClocPrompterConfig | None = None) -> ClocModel:
        """Start from a trained CLIP; the Prompter, if asked for, is new.

        The paper measured that fine-tuning a finished CLIP for 100 k steps ends below training from scratch
        (64.1 / 19.1 against 70.1 / 27.2 mAcc on COCO / LVIS).

        Args:
            clip: Any ``CLIPModel``; its weights are copied.
            prompter_config: The Prompter; its widths must be those of the tower and of the shared space.
        """
        config = ClocConfig(
            vision_config=clip.config.vision_config,
            text_config=clip.config.text_config,
            prompter_config=prompter_config,
            projection_dim=clip.config.projection_dim,
        )
        model = cls(config).to(clip.dtype)
        model.copy_towers(clip)
        return model

    @classmethod
    def from_siglip(cls, siglip: SiglipModel, prompter_config: ClocPrompterConfig | None = None) -> ClocModel:
        """Start from a trained SigLIP, or a SigLIP2 of fixed resolution; the Prompter, if asked for, is new.

        Args:
            siglip: Any ``SiglipModel``; its weights are copied, temperature and bias too.
            prompter_config: The Prompter; made for a tower without class token.
        """
        text = siglip.config.text_config
        config = ClocConfig(
            vision_config=siglip.config.vision_config,
            text_config=text,
            prompter_config=prompter_config,
            projection_dim=text.projection_size,
            has_projections=False,
            logit_scale_max=SIGLIP_LOGIT_SCALE_MAX,
            logit_bias_init_value=SIGLIP_LOGIT_BIAS,
        )
        model = cls(config).to(siglip.dtype)
        model.copy_towers(siglip)
        return model

    @torch.no_grad()
    def copy_towers(self, source: CLIPModel | SiglipModel) -> None:
        """Take both towers, and the image-text temperature and bias, from a trained model.

        The tower's position embeddings are interpolated where this model's frame has another number of patches. The
        bias is left where this model has none: the softmax loss does not see it.

        Args:
            source: A model whose towers are those of this configuration.
        """
        for name in ("vision_model", "text_model", "visual_projection", "text_projection"):
            part = getattr(source, name, None)
            if part is not None:
                mine = getattr(self, name)
                mine.load_state_dict(fit_positions(part.state_dict(), mine))
        self.logit_scale.fill_(float(source.logit_scale))
        if self.logit_bias is not None and getattr(source, "logit_bias", None) is not None:
            self.logit_bias.fill_(float(source.logit_bias))

    def require_prompter(self) -> ClocPrompter | RoiAlignPooler:
        """The region encoder.

        Raises:
            ValueError: If this encoder was trained without one.
        """
        if self.prompter is None:
            raise ValueError("this encoder has no Prompter (prompter_config is None): it embeds whole images only")
        return self.prompter

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Encode images.

        Args:
            pixel_values: ``(B, 3, H, W)`` from :class:`ClocImageProcessor`.
            **kwargs: Passed to the tower, for example ``interpolate_pos_encoding``.

        Returns:
            ``last_hidden_state`` ``(B, N, width)``, the tokens that every region method takes as ``image_tokens``, and
            ``pooler_output`` ``(B, D)``, projected, not normalised.
        """
        outputs = self.vision_model(pixel_values=pixel_values.to(self.dtype), **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state, pooler_output=self.visual_projection(outputs.pooler_output)
        )

    def get_text_features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Encode ``(T, L)`` token ids; ``pooler_output`` is ``(T, D)``, projected, not normalised."""
        outputs = self.text_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state, pooler_output=self.text_projection(outputs.pooler_output)
        )

    def get_region_features(
        self,
        image_tokens: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        input_boxes: torch.Tensor | None = None,
        input_points: torch.Tensor | None = None,
        text_embeds: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
    ) -> BaseModelOutputWithPooling:
        """Embed prompts on images, each image encoded once.

        Exactly one of ``image_tokens`` and ``pixel_values``, and exactly one kind of prompt, is given.

        Args:
            image_tokens: ``(B, N, width)`` from :meth:`get_image_features`.
            pixel_values: ``(B, 3, H, W)``.
            input_boxes: ``(R, 4)`` float32 xyxy, normalised, model frame, as :class:`ClocProcessor` makes them; or
                ``(B, M, 4)`` for the same number of boxes on every image.
            input_points: ``(R, 2)`` or ``(B, M, 2)`` points in the same frame.
            text_embeds: ``(R, D)`` phrase embeddings of :meth:`get_text_features`.
            input_ids: ``(R, L)`` phrases as token ids.
            attention_mask: ``(R, L)`` for ``input_ids``.
            image_index: ``(R,)`` the image of each prompt; may be left out for a single image and for ``(B, M, ...)``.

        Returns:
            ``pooler_output`` ``(R, D)``, projected, not normalised, in the order of the prompts.

        Raises:
            ValueError: If the model has no Prompter, or inputs are missing, doubled or do not match.
        """
        region_encoder = self.require_prompter()
        if (image_tokens is None) == (pixel_values is None):
            raise ValueError("give exactly one of image_tokens and pixel_values")
        kinds = {"input_boxes": input_boxes, "input_points": input_points, "text_embeds": text_embeds}
        given = [name for name, value in {**kinds, "input_ids": input_ids}.items() if value is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one kind of prompt, not {len(given)}: {', '.join(given) or 'none'}")
        if pixel_values is not None:
            image_tokens = self.get_image_features(pixel_values).last_hidden_state
        assert image_tokens is not None
        if input_ids is not None:
            text_embeds = self.get_text_features(input_ids, attention_mask).pooler_output
        prompts = next(value for value in (input_boxes, input_points, text_embeds) if value is not None)
        prompts, image_index = _flatten_prompts(prompts, image_index, len(image_tokens))
        if isinstance(region_encoder, RoiAlignPooler):
            if input_boxes is None:
                raise ValueError("RoI-Align takes boxes only, neither points nor phrases")
            return BaseModelOutputWithPooling(
                pooler_output=encode_boxes(region_encoder, image_tokens, prompts, image_index)
            )
        if input_boxes is not None:
            tokens = region_encoder.embed_boxes(prompts)
        elif input_points is not None:
            tokens = region_encoder.embed_points(prompts)
        else:
            tokens = region_encoder.embed_texts(prompts)
        features = region_encoder(image_tokens, tokens, image_index)
        return BaseModelOutputWithPooling(pooler_output=region_encoder.projection(features))

    def predict_boxes(
        self, image_tokens: torch.Tensor, text_embeds: torch.Tensor, image_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Localise phrases with the BoxHead (paper, section 3.2).

        Args:
            image_tokens: ``(B, N, width)``.
            text_embeds: ``(R, D)`` phrase embeddings, normalised or not.
            image_index: ``(R,)`` the image each phrase is looked for in.

        Returns:
            ``(R, 4)`` float32 xyxy boxes, normalised, model frame.

        Raises:
            ValueError: If the model has no BoxHead.
        """
        prompter = self.require_prompter()
        if self.box_head is None or isinstance(prompter, RoiAlignPooler):
            raise ValueError("this encoder has no BoxHead: RoI-Align takes no phrases")
        text_embeds, image_index = _flatten_prompts(text_embeds, image_index, len(image_tokens))
        return self.box_head(prompter(image_tokens, prompter.embed_texts(text_embeds), image_index))

    @torch.no_grad()
    def ground_features(
        self,
        image_tokens: torch.Tensor,
        text_embeds: torch.Tensor,
        image_index: torch.Tensor | None = None,
        content: torch.Tensor | None = None,
        search: GridSearch | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Localise phrases by searching boxes, with no training beyond the contrastive losses (ours).

        Args:
            image_tokens: ``(B, N, width)``.
            text_embeds: ``(R, D)`` phrase embeddings, normalised or not.
            image_index: ``(R,)`` the image each phrase is looked for in.
            content: ``(B, 4)`` the part of the frame each picture fills (:attr:`Geometry.content`); default all of it.
            search: How to search; default :class:`GridSearch`'s own settings.

        Returns:
            ``(R, 4)`` float32 xyxy boxes, normalised, model frame, and ``(R,)`` cosine scores.
        """
        text_embeds, image_index = _flatten_prompts(text_embeds, image_index, len(image_tokens))

        def embed(boxes: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            return self.get_region_features(image_tokens, input_boxes=boxes, image_index=index).pooler_output

        scale = float(self.region_logit_scale.exp()) if self.region_logit_scale is not None else 1.0
        if content is None:
            content = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(len(image_tokens), 4)
        return (search or GridSearch())(embed, text_embeds, image_index, content, scale)

    @torch.no_grad()
    def ground(self, image: Any, phrases: Sequence[str], processor: Any) -> tuple[list[list[float]], list[float]]:
        """Find phrases in one image.

        Args:
            image: Anything :func:`load_image` takes.
            phrases: What to look for.
            processor: The :class:`ClocProcessor` saved beside the model.

        Returns:
            A box ``[x1, y1, x2, y2]`` in pixels of the original image for each phrase, and its cosine score.
        """
        inputs = processor(images=[image], text=list(phrases)).to(self.device)
        tokens = self.get_image_features(inputs["pixel_values"]).last_hidden_state
        text_embeds = self.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
        content = processor.geometry(image).content[None]
        boxes, scores = self.ground_features(tokens, text_embeds, content=content)
        return processor.post_process_boxes(boxes, image).tolist(), scores.tolist()

    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        input_boxes: torch.Tensor | None = None,
        box_image_index: torch.Tensor | None = None,
        region_input_ids: torch.Tensor | None = None,
        region_attention_mask: torch.Tensor | None = None,
        region_text_index: torch.Tensor | None = None,
    ) -> ClocOutput:
        """Embed a batch of images, captions and regions.

        Args:
            pixel_values: ``(B, 3, H, W)``.
            input_ids: ``(T, L)`` captions.
            attention_mask: ``(T, L)``.
            input_boxes: ``(R, 4)`` float32 xyxy boxes, normalised, model frame, of all images one after the other.
            box_image_index: ``(R,)`` the image of each box.
            region_input_ids: ``(U, L)`` the distinct phrases of the batch, each encoded once.
            region_attention_mask: ``(U, L)``.
            region_text_index: ``(R,)`` the phrase of each box.

        Returns:
            A :class:`ClocOutput`. Temperatures are returned rather than applied, so that no parameter is used outside
            this call (ZeRO-3 has them partitioned then).
        """
        image, centers = self.read_images(pixel_values, input_boxes, box_image_index)
        output = ClocOutput(
            image_embeds=functional.normalize(image.pooler_output, dim=-1),
            text_embeds=functional.normalize(self._read_texts(input_ids, attention_mask), dim=-1),
            logit_scale=self._capped(self.logit_scale),
            logit_bias=_as_float(self.logit_bias),
        )
        phrases = None
        if region_input_ids is not None:
            phrases = self._read_texts(region_input_ids, region_attention_mask)
            if region_text_index is not None:
                phrases = phrases[region_text_index]
            output.region_text_embeds = functional.normalize(phrases, dim=-1)
        if self.prompter is None or input_boxes is None:
            return output
        tokens: torch.Tensor | ImageSide = image.last_hidden_state
        boxes, index = _flatten_prompts(input_boxes, box_image_index, len(pixel_values))
        table: torch.Tensor | PromptTable = index
        if isinstance(self.prompter, ClocPrompter):  # boxes and phrases share what depends on the image alone
            tokens = self.prompter.read_images(image.last_hidden_state, centers)
            table = PromptTable.of(index, len(pixel_values))
        regions = encode_boxes(self.prompter, tokens, boxes, table)
        output.region_embeds = functional.normalize(regions, dim=-1)
        output.region_logit_scale = self._capped(self.region_logit_scale)
        output.region_logit_bias = _as_float(self.region_logit_bias)
        if self.box_head is not None and phrases is not None:
            assert isinstance(self.prompter, ClocPrompter)
            output.pred_boxes = self.box_head(self.prompter(tokens, self.prompter.embed_texts(phrases), table))
        return output

    def read_images(
        self, pixel_values: torch.Tensor, boxes: torch.Tensor | None, image_index: torch.Tensor | None
    ) -> tuple[BaseModelOutputWithPooling, torch.Tensor | None]:
        """Encode images; while training with patch dropout, some of their patches, whose centres come with them."""
        if not (self.training and self.patch_dropout > 0):
            return self.get_image_features(pixel_values), None
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size
        if boxes is not None:
            boxes, image_index = _flatten_prompts(boxes, image_index, len(pixel_values))
        patches = choose_patches(
            boxes, image_index, len(pixel_values), side, self.patch_dropout, device=pixel_values.device
        )
        with reading_only(self.vision_model, patches):
            return self.get_image_features(pixel_values), grid_centers(side, pixel_values.device)[patches]

    def _read_texts(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Encode texts, ``(T, D)``, in batches of like length if a trainer asks for that."""
        if attention_mask is None or self.text_buckets * self.text_multiple_of == 1:
            return self.get_text_features(input_ids, attention_mask).pooler_output
        return encode_in_buckets(
            lambda ids, mask: self.get_text_features(ids, mask).pooler_output,
            input_ids,
            attention_mask,
            self.text_buckets,
            self.text_multiple_of,
            self.config.text_config.max_position_embeddings,
        )

    def _capped(self, log_scale: torch.Tensor) -> torch.Tensor:
        """Exponentiated in float32 and capped; the trainer also clamps the parameter, so the cap stops no gradient."""
        return log_scale.float().clamp(max=self.config.logit_scale_max).exp()

    @torch.no_grad()
    def clamp_logit_scales(self) -> None:
        """Keep both temperatures at or below CLIP's cap, in place (call after an optimiser step)."""
        for parameter in (self.logit_scale, self.region_logit_scale):
            if parameter is not None:
                parameter.clamp_(0.0, self.config.logit_scale_max)

    def save_clip_vision_tower(self, path: str) -> None:
        """Write the tower alone, as a stock ``CLIPVisionModel`` checkpoint: a drop-in replacement for CLIP's.

        Raises:
            ValueError: If the tower is not a CLIP vision model.
        """
        if not isinstance(self.vision_model, CLIPVisionModel):
            raise ValueError(f"the tower is a {type(self.vision_model).__name__}, not a CLIPVisionModel")
        self.vision_model.save_pretrained(path)


class ClocVisionModel(ClocPreTrainedModel):
    """The image side of CLOC alone: tower, projection and, if there is one, the Prompter."""

    config_class = ClocVisionConfig
    input_modalities: tuple[str, ...] = ("image",)

    def __init__(self, config: ClocVisionConfig) -> None:
        super().__init__(config)
        self.vision_model = AutoModel.from_config(config.vision_config)
        self.visual_projection = build_projection(config, config.vision_config.hidden_size)
        has_prompter = config.prompter_config is not None
        self.prompter = build_region_encoder(config.prompter_config) if has_prompter else None
        self.post_init()

    @classmethod
    def from_cloc(cls, model: ClocModel) -> ClocVisionModel:
        """The image side of a :class:`ClocModel`, weights copied."""
        config = ClocVisionConfig(
            vision_config=model.config.vision_config,
            prompter_config=model.config.prompter_config,
            projection_dim=model.config.projection_dim,
            has_projections=model.config.has_projections,
        )
        vision = cls(config).to(model.dtype)
        for name in ("vision_model", "visual_projection", "prompter"):
            part = getattr(model, name)
            if part is not None:
                getattr(vision, name).load_state_dict(part.state_dict())
        return vision

    def forward(
        self,
        pixel_values: torch.Tensor,
        input_boxes: torch.Tensor | None = None,
        box_image_index: torch.Tensor | None = None,
    ) -> ClocOutput | BaseModelOutputWithPooling:
        """Encode images and, if boxes are given, their regions.

        Args:
            pixel_values: ``(B, 3, H, W)``.
            input_boxes: ``(R, 4)`` float32 xyxy, normalised, model frame.
            box_image_index: ``(R,)`` the image of each box.

        Returns:
            Without boxes, tokens and the projected embedding as :meth:`ClocModel.get_image_features` gives them. With
            boxes, a :class:`ClocOutput` with normalised ``image_embeds`` and ``region_embeds``.
        """
        outputs = self.vision_model(pixel_values=pixel_values.to(self.dtype))
        pooled = self.visual_projection(outputs.pooler_output)
        if input_boxes is None:
            return BaseModelOutputWithPooling(last_hidden_state=outputs.last_hidden_state, pooler_output=pooled)
        if self.prompter is None:
            raise ValueError("this tower has no Prompter (prompter_config is None): it embeds whole images only")
        boxes, index = _flatten_prompts(input_boxes, box_image_index, len(pixel_values))
        regions = encode_boxes(self.prompter, outputs.last_hidden_state, boxes, index)
        return ClocOutput(
            image_embeds=functional.normalize(pooled, dim=-1), region_embeds=functional.normalize(regions, dim=-1)
        )


def _flatten_prompts(
    prompts: torch.Tensor, image_index: torch.Tensor | None, num_images: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(B, M, ...)`` or ``(R, ...)`` prompts as ``(R, ...)`` with the image of each.

    Raises:
        ValueError: If it cannot be told which image a prompt is about.
    """
    if prompts.dim() == 3:
        if image_index is not None or len(prompts) != num_images:
            raise ValueError(f"(B, M, ...) prompts need B = {num_images} images and no image_index")
        image_index = torch.arange(num_images, device=prompts.device).repeat_interleave(prompts.shape[1])
        return prompts.flatten(0, 1), image_index
    if image_index is None:
        if num_images != 1:
            raise ValueError(f"{len(prompts)} prompts on {num_images} images need an image_index")
        image_index = torch.zeros(len(prompts), dtype=torch.long, device=prompts.device)
    if len(image_index) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts, but image_index has {len(image_index)} entries")
    return prompts, image_index
