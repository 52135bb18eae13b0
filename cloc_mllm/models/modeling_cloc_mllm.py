"""The region-aware MLLM: LLaVA, with regions in and boxes out.

    image ─ tower ─┬─ projector ───────────────┐
                   ├─ Prompter(box) ─ projector ┼─ language model ─ text, <ground>
                   └─ grounding head ◀── hidden state at <ground> ──┘ ─ boxes

Placeholders are expanded by the processor; here they are filled, never spliced. Without the Prompter, the region
projector and the grounding head, what is left is a stock LLaVA: same modules, same keys, same logits.

Every rank runs every part once in each training step, in the same order, whatever its batch holds: where there is no
image, no region or no ``<ground>``, a dummy goes through the same code and is added with weight zero. Under ZeRO the
ranks would otherwise wait for each other for ever, or silently sum gradients of different weights.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    LlavaForConditionalGeneration,
    LlavaModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    initialization,
)
from transformers.cache_utils import Cache
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils.generic import can_return_tuple

from .assembly_cloc_mllm import assemble
from .complete_loading import CompleteLoadingMixin
from .configuration_cloc import ClocPrompterConfig
from .configuration_cloc_mllm import ClocMllmConfig
from .grounded_generation import GroundedGenerationMixin
from .grounding_head import ClocGroundingHead, image_before, places_in_run
from .image_tokens import ImageTokens
from .language_head import finish_logits
from .outputs_cloc_mllm import ClocMllmCausalLMOutputWithPast, ClocMllmImageOutput, ClocMllmModelOutputWithPast
from .packed_attention import packed_inputs
from .projectors import ImageNewline, build_projector, checked_tiles, pack_tiles
from .region_encoder import RegionProjector, build_region_reader, checked_image_index, with_parts


class ClocMllmModel(CompleteLoadingMixin, LlavaModel):
    """Tower, projector, Prompter, language model and grounding head; no language-model head."""

    config_class = ClocMllmConfig
    _no_split_modules = ["RegionPrompter", "RegionRoiAlign", "ClocGroundingHead"]

    def __init__(self, config: ClocMllmConfig) -> None:
        # Past LlavaModel.__init__: it would build and initialise the large parts a first time.
        super(LlavaModel, self).__init__(config)
        width = config.text_config.hidden_size
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = build_projector(config)
        self.image_newline: nn.Module | None = None
        if config.image_grid_pinpoints is not None:
            self.image_newline = ImageNewline(width)
        self.prompter: nn.Module | None = None
        self.region_projector: nn.Module | None = None
        self.grounding_head: nn.Module | None = None
        prompter_config: Any = config.prompter_config
        if prompter_config is not None:
            self.prompter = build_region_reader(prompter_config)
            self.region_projector = RegionProjector(prompter_config.projection_dim, width)
        self.language_model = AutoModel.from_config(config.text_config)
        grounding_config: Any = config.grounding_config
        if grounding_config is not None:
            self.grounding_head = ClocGroundingHead(grounding_config, width, config.boxes_per_phrase)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Scaled by fan-in: at the language model's fixed 0.02 a narrow connector would pass on next to nothing."""
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            initialization.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, ImageNewline):
            initialization.normal_(module.weight, std=len(module.weight) ** -0.5)
        elif isinstance(module, ClocGroundingHead) and module.ordinals is not None:
            initialization.zeros_(module.ordinals)

    def _runs_every_part(self) -> bool:
        # Partitioned weights are gathered by all ranks together, in evaluation too.
        return self.training or is_deepspeed_zero3_enabled()

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: torch.Tensor | None = None,
        region_boxes: torch.Tensor | None = None,
        region_image_index: torch.Tensor | None = None,
        region_points: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> ClocMllmImageOutput:
        """Encode images and the regions on them.

        ``generate`` calls this once, before the first token, with those of its arguments that this signature names.

        Args:
            pixel_values: ``(I, 3, H, W)``; with ``anyres`` one row a tile, or as LLaVA-NeXT's processor has it,
                ``(I, most tiles, 3, H, W)``.
            vision_feature_layer: Layer(s) of the tower the language model sees; default the configuration's.
            vision_feature_select_strategy: ``default`` drops the class token, ``full`` keeps it.
            image_sizes: ``(I, 2)`` height and width of the original images in pixels, which ``anyres`` needs; else for
                towers that take images of many sizes, see LLaVA.
            region_boxes: ``(R, 4)`` float32 xyxy, normalised, model frame; a box of no size is a point.
            region_image_index: ``(R,)`` the image of each region; may be left out if there is one image.
            region_points: ``(R, P, 2)`` float32, normalised, model frame: points on free-form regions; NaN where a
                region has fewer, or none.
            **kwargs: Passed to the tower.

        Returns:
            A :class:`ClocMllmImageOutput`.

        Raises:
            ValueError: If there are regions but no region encoder, an index does not fit, or there are more or fewer
                tiles than images of these sizes are cut into.
        """
        kwargs.pop("return_dict", None)
        sizes: list[tuple[int, int]] = []
        if self.image_newline is not None:
            pixel_values, sizes = checked_tiles(ImageTokens.of(self.config), pixel_values, image_sizes)
            image_sizes = None
        image = super().get_image_features(
            pixel_values=pixel_values.to(self.vision_tower.dtype),
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            image_sizes=image_sizes,
            return_dict=True,
            **kwargs,
        )
        output = ClocMllmImageOutput(
            last_hidden_state=image.last_hidden_state,
            pooler_output=list(image.pooler_output),
            hidden_states=image.hidden_states,
            attentions=image.attentions,
        )
        if self.image_newline is not None:
            self._join_tiles(output, sizes)
        self._encode_regions(output, region_boxes, region_image_index, region_points)
        return output

    def _join_tiles(self, output: ClocMllmImageOutput, sizes: list[tuple[int, int]]) -> None:
        """From one entry a tile to one an image of a (height, width): all of its features, its overview's tokens."""
        assert self.image_newline is not None
        layout = ImageTokens.of(self.config)
        features = torch.stack(output.pooler_output)
        newline = self.image_newline(features)
        tiles = [layout.num_tiles(*size) for size in sizes]
        each = zip(features.split(tiles), sizes, strict=True)
        # The newline is in each, if only with no rows: so it takes part in the backward pass on every rank.
        output.pooler_output = [pack_tiles(tiles_of, layout, *size, newline) for tiles_of, size in each]
        firsts = [end - count for end, count in zip(accumulate(tiles), tiles, strict=True)]
        output.last_hidden_state = output.last_hidden_state[firsts]

    def _encode_regions(
        self,
        output: ClocMllmImageOutput,
        boxes: torch.Tensor | None,
        image_index: torch.Tensor | None,
        points: torch.Tensor | None,
    ) -> None:
        """Add the regions' features to those of the images, or run the region encoder on a dummy."""
        tokens = output.last_hidden_state
        count = 0 if boxes is None else len(boxes)
        if self.prompter is None or self.region_projector is None:
            if count:
                raise ValueError(
                    f"{count} regions were given, but region_encoder is 'none': "
                    "this model takes regions as coordinates in the text"
                )
        elif boxes is not None and count:
            index = checked_image_index(image_index, count, len(tokens)).to(tokens.device)
            if points is not None:
                if len(points) != count:
                    raise ValueError(f"there are {count} regions, but region_points has {len(points)} entries")
                points = points.to(tokens.device, torch.float32)
            boxes, points = with_parts(boxes.to(tokens.device, torch.float32), points, self.config.num_region_tokens)
            index = index.repeat_interleave(self.config.num_region_tokens)
            # A batch of boxes takes the very path it took before there were shapes.
            shapes = () if points is None else (points,)
            output.region_features = self.region_projector(self.prompter(tokens, boxes, index, *shapes))
        elif self._runs_every_part():
            whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=tokens.device)
            embeds = self.prompter(tokens[:1], whole, torch.zeros(1, dtype=torch.long, device=tokens.device))
            output.pooler_output[0] = output.pooler_output[0] + 0.0 * self.region_projector(embeds).sum()

    @can_return_tuple
    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: torch.Tensor | None = None,
        region_boxes: torch.Tensor | None = None,
        region_image_index: torch.Tensor | None = None,
        region_points: torch.Tensor | None = None,
        ground_image_index: torch.Tensor | None = None,
        ground_queries: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, ClocMllmImageOutput] | None = None,
        predict_boxes: bool | None = None,
        **kwargs: Any,
    ) -> ClocMllmModelOutputWithPast:
        """Run every part; the inputs are those of :class:`ClocMllmForConditionalGeneration`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        image = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None and image is not None:
            raise ValueError("give either pixel_values or mm_encoder_outputs, not both")
        is_dummy = image is None and pixel_values is None
        if is_dummy and region_boxes is not None and len(region_boxes):
            raise ValueError(f"{len(region_boxes)} regions were given, but no image for them to be on")
        first = past_key_values is None or past_key_values.get_seq_length() == 0
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        # What was encoded beforehand, if it is nothing, was so on every rank: then no dummy is needed here.
        needs_dummy = first and mm_encoder_outputs is None and self._runs_every_part()
        if image is None and (pixel_values is not None or needs_dummy):
            if pixel_values is None:
                pixel_values, image_sizes = self._blank_image(inputs_embeds)
            image = self.get_image_features(
                pixel_values,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                image_sizes=image_sizes,
                region_boxes=region_boxes,
                region_image_index=region_image_index,
                region_points=region_points,
            )
        if first or image is not None:
            inputs_embeds = self._fill_placeholders(input_ids, inputs_embeds, image, is_dummy)
        if attention_mask is None and position_ids is not None and past_key_values is None:
            kwargs = packed_inputs(self.language_model, position_ids) | kwargs
            attention_mask = kwargs.pop("attention_mask", None)
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        result = ClocMllmModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=None if image is None or is_dummy else torch.cat(image.pooler_output),
        )
        # While generating (features come ready-made) nobody asks for boxes: `generate_grounded` does, at the end.
        asked = mm_encoder_outputs is None if predict_boxes is None else predict_boxes
        if self.grounding_head is not None and first and input_ids is not None and asked:
            self._ground(result, input_ids, image, is_dummy, ground_image_index, ground_queries)
        return result

    def _blank_image(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``pixel_values`` and ``image_sizes`` of a picture of nothing."""
        vision = self.config.vision_config
        side, channels = vision.image_size, getattr(vision, "num_channels", 3)
        if self.image_newline is None:
            return like.new_zeros(1, channels, side, side), None
        tiles = ImageTokens.of(self.config).num_tiles(side, side)
        return like.new_zeros(tiles, channels, side, side), torch.tensor([[side, side]])

    def placeholder_mask(
        self, token_id: int, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
    ) -> torch.Tensor:
        """``(B, T)`` where a token stands; without ids, where its embedding does."""
        if input_ids is not None and input_ids.numel():
            return input_ids == token_id
        if inputs_embeds is None:
            raise ValueError("placeholders are found by input_ids or by inputs_embeds: neither was given")
        wanted = self.get_input_embeddings()(torch.tensor([token_id], device=inputs_embeds.device))
        return (inputs_embeds == wanted).all(-1)

    def _fill_placeholders(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        image: ClocMllmImageOutput | None,
        is_dummy: bool,
    ) -> torch.Tensor:
        """Put image and region features where their placeholders are.

        Raises:
            ValueError: If placeholders and features are not equally many, with both counts.
        """
        pixels = None if image is None or image.pooler_output is None else torch.cat(image.pooler_output)
        regions = None if image is None else image.region_features
        if is_dummy and pixels is not None:
            inputs_embeds = inputs_embeds + 0.0 * pixels.sum().to(inputs_embeds)
            pixels = None
        places = (
            ("image", self.config.image_token_index, pixels),
            ("region", self.config.region_token_index, regions),
        )
        masks = [self.placeholder_mask(token_id, input_ids, inputs_embeds) for _, token_id, _ in places]
        for (name, _, features), mask in zip(places, masks, strict=True):
            found, given = int(mask.sum()), 0 if features is None else len(features)
            if found != given:
                hint = " Pass pixel_values." if name == "image" else " Pass region_boxes, one for each <region>."
                raise ValueError(
                    f"the text has {found} <{name}> placeholders, but there are {given} {name} features."
                    + (hint if given == 0 else "")
                )
            if features is not None and given:
                inputs_embeds = inputs_embeds.masked_scatter(mask[..., None], features.to(inputs_embeds))
        return inputs_embeds

    def _ground(
        self,
        result: ClocMllmModelOutputWithPast,
        input_ids: torch.Tensor,
        image: ClocMllmImageOutput | None,
        is_dummy: bool,
        image_index: torch.Tensor | None,
        queries: torch.Tensor | None,
    ) -> None:
        """Fill in the boxes of every ``<ground>``, or run the head on a dummy."""
        assert self.grounding_head is not None
        hidden, device = result.last_hidden_state, result.last_hidden_state.device
        at = input_ids == self.config.ground_token_index
        index = self._ground_images(input_ids, at, None if is_dummy else image, image_index, queries)
        known = index >= 0
        ordinals = places_in_run(at)[at]
        result.ground_image_index = index
        result.pred_boxes = torch.full((len(index), 4), float("nan"), device=device)
        result.ground_embeds = torch.zeros(len(index), self.config.grounding_config.projection_dim, device=device)
        result.text_prompted_boxes = None if queries is None else result.pred_boxes
        if image is not None and bool(known.any()):
            asked = None if queries is None else queries[known]
            embeds, boxes, text_boxes = self.grounding_head(
                hidden[at][known], image.last_hidden_state, index[known], asked, ordinals[known]
            )
            where = (known.nonzero()[:, 0],)
            result.pred_boxes = result.pred_boxes.index_put(where, boxes)
            result.ground_embeds = result.ground_embeds.index_put(where, embeds)
            if result.text_prompted_boxes is not None:
                result.text_prompted_boxes = result.text_prompted_boxes.index_put(where, text_boxes)
        elif image is not None and self._runs_every_part():
            nothing = torch.zeros(1, dtype=torch.long, device=device)
            asked = None if queries is None else result.ground_embeds.new_zeros(1, result.ground_embeds.shape[1])
            first = image.last_hidden_state[:1]
            embeds, boxes, text_boxes = self.grounding_head(hidden[:1, -1], first, nothing, asked)
            if not len(index):
                # No rows, but on the graph: ZeRO-3 counts which outputs the backward pass reaches, and every rank has
                # to come to the same number whether it has a `<ground>` or not.
                result.pred_boxes, result.ground_embeds = boxes[:0], embeds[:0]
                result.text_prompted_boxes = None if text_boxes is None else text_boxes[:0]
        else:
            return
        # Tied to the hidden states with weight zero, real or not: so the head takes part in the backward pass on every
        # rank, even if the trainer uses none of its outputs.
        result.last_hidden_state = hidden + 0.0 * (embeds.sum() + boxes.sum()).to(hidden)

    def _ground_images(
        self,
        input_ids: torch.Tensor,
        at: torch.Tensor,
        image: ClocMllmImageOutput | None,
        given: torch.Tensor | None,
        queries: torch.Tensor | None,
    ) -> torch.Tensor:
        """The image of each ``<ground>``, checked; -1 where there is none.

        Raises:
            ValueError: If something is not given once for each ``<ground>``, or points to no image; in training also
                if a ``<ground>`` has no image.
        """
        if given is None:
            counts = [] if image is None else [len(features) for features in image.pooler_output]
            given = image_before(input_ids == self.config.image_token_index, counts)[at]
        index = given.to(input_ids.device)
        count, images = int(at.sum()), 0 if image is None else len(image.last_hidden_state)
        for name, values in (("ground_image_index", index), ("ground_queries", queries)):
            if values is not None and len(values) != count:
                raise ValueError(f"the text has {count} <ground> tokens, but {name} has {len(values)} entries")
        if count and int(index.max()) >= images:
            raise ValueError(f"ground_image_index points to image {int(index.max())}, but there are {images} images")
        if self.training and bool((index < 0).any()):
            raise ValueError(
                f"{int((index < 0).sum())} of {count} <ground> tokens stand in a text without an image: nothing to find"
            )
        return index


class ClocMllmForConditionalGeneration(CompleteLoadingMixin, GroundedGenerationMixin, LlavaForConditionalGeneration):
    """The MLLM with its language-model head.

    Example::

        processor = ClocMllmProcessor.from_parts(image_processor, tokenizer, encoder.config.vision_config)
        model = ClocMllmForConditionalGeneration.from_parts(encoder, llm, processor.tokenizer)

    Inputs of :meth:`forward`, beside those of every language model:

    * ``input_ids`` ``(B, T)``, with one ``<image>`` for each visual token and ``config.num_region_tokens`` times
      ``<region>`` for each region;
    * ``pixel_values`` ``(I, 3, H, W)``, the batch's images in the order of their placeholders; with ``anyres`` one row
      a tile, the overview before the others, and ``image_sizes`` ``(I, 2)``, height and width of the originals;
    * ``region_boxes`` ``(R, 4)`` float32 xyxy, normalised, model frame, in the order of their placeholders, and
      ``region_image_index`` ``(R,)``, the image of each, which may be left out if there is one image; of a region that
      is no box or point, ``region_boxes`` has the box around it and ``region_points`` ``(R, P, 2)`` points on it (NaN
      where there are fewer);
    * ``position_ids`` ``(B, T)`` without ``attention_mask``, where several conversations are packed into a row
      (:mod:`.packing`);
    * ``labels`` ``(B, T)``, -100 where nothing is learnt; ``<ground>`` is learnt as any other token;
    * ``ground_image_index`` ``(G,)``, the image each ``<ground>`` is about; default the last one shown before it;
    * ``ground_queries`` ``(G, D)``, text embeddings of the grounded phrases: the head localises them too;
    * ``mm_encoder_outputs``: images and regions encoded beforehand, by :meth:`encode_inputs`;
    * ``predict_boxes``: whether every ``<ground>`` gets its box; default: unless ``mm_encoder_outputs`` is given.

    Further keyword arguments reach the language model and the loss (``num_items_in_batch``).
    """

    config_class = ClocMllmConfig

    def __init__(self, config: ClocMllmConfig) -> None:
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = ClocMllmModel(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=config.lm_head_bias)
        # LLaVA's is fixed to the name that Llama gives its embeddings; GPT-2, OPT and others have theirs elsewhere.
        embeddings = self.model.language_model.get_input_embeddings()
        name = next(n for n, module in self.model.language_model.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"model.language_model.{name}.weight"}
        self.post_init()

    @classmethod
    def from_parts(
        cls,
        encoder: PreTrainedModel,
        llm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        region_encoder: str = "prompter",
        grounding: str = "head",
        vision_feature_layer: int | list[int] = -2,
        vision_feature_select_strategy: str | None = None,
        projector_hidden_act: str = "gelu",
        projector_type: str = "mlp2x_gelu",
        pixel_shuffle_factor: int = 2,
        image_grid_pinpoints: list[list[int]] | None = None,
        prompter_config: ClocPrompterConfig | None = None,
        grounding_config: ClocPrompterConfig | None = None,
        grounding_init: str = "encoder",
        num_region_tokens: int = 1,
        boxes_per_phrase: int = 1,
    ) -> ClocMllmForConditionalGeneration:
        """Put an encoder and a language model together; both are copied, and the connectors are new.

        Args:
            encoder: A CLOC encoder with or without Prompter, transformers' CLIP or SigLIP (also SigLIP2 of a fixed
                resolution), or one of their image towers alone.
            llm: Any causal language model of transformers whose head is one linear layer, perhaps with a bias, a
                scale or a cap; see :mod:`.language_head`.
            tokenizer: The processor's tokenizer, control tokens included.
            region_encoder: ``prompter``, ``roi_align`` or ``none``. Weights come from the encoder if it has that kind
                of region encoder; otherwise they are new.
            grounding: ``head`` or ``text``.
            vision_feature_layer: Layer(s) of the tower the language model sees (LLaVA: the last but one). The Prompter
                and the head always read the last.
            vision_feature_select_strategy: ``default`` drops the class token, ``full`` keeps every token; ``None``:
                the patches, whether the tower has a class token or not.
            projector_hidden_act: Activation of the projector.
            projector_type: ``mlp2x_gelu`` (LLaVA's), ``linear`` or ``pixel_shuffle``; see :class:`ClocMllmConfig`.
            pixel_shuffle_factor: Patches along each side of what ``pixel_shuffle`` makes one token of.
            image_grid_pinpoints: The processor's ``image_processor.image_grid_pinpoints``, for ``anyres``.
            prompter_config: The region encoder, where the encoder has none of that kind.
            grounding_config: The head's Prompter and BoxHead, where they should differ from the encoder's.
            grounding_init: ``encoder``: the head starts from the encoder's Prompter and BoxHead if it has them and
                they fit; ``new``: untrained in any case.
            num_region_tokens: Tokens a region; as in the processor. See :class:`ClocMllmConfig`.
            boxes_per_phrase: Boxes of one phrase that the head tells apart. See :class:`ClocMllmConfig`.

        Returns:
            The model in evaluation mode and in the language model's dtype, with new rows in the embeddings for the
            control tokens, and a generation configuration that never emits ``<image>`` or ``<region>``.

        Raises:
            ValueError: If the tokenizer lacks the control tokens, the language model's head is of another form, or
                ``grounding_init`` is neither.
        """
        return assemble(
            cls,
            encoder,
            llm,
            tokenizer,
            region_encoder=region_encoder,
            grounding=grounding,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            projector_hidden_act=projector_hidden_act,
            projector_type=projector_type,
            pixel_shuffle_factor=pixel_shuffle_factor,
            image_grid_pinpoints=image_grid_pinpoints,
            prompter_config=prompter_config,
            grounding_config=grounding_config,
            grounding_init=grounding_init,
            num_region_tokens=num_region_tokens,
            boxes_per_phrase=boxes_per_phrase,
        )

    def get_image_features(  # type: ignore[override]
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        region_boxes: torch.Tensor | None = None,
        region_image_index: torch.Tensor | None = None,
        region_points: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> ClocMllmImageOutput:
        """See :meth:`ClocMllmModel.get_image_features`."""
        return self.model.get_image_features(
            pixel_values,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            region_boxes=region_boxes,
            region_image_index=region_image_index,
            region_points=region_points,
            **kwargs,
        )

    @can_return_tuple
    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_sizes: torch.Tensor | None = None,
        region_boxes: torch.Tensor | None = None,
        region_image_index: torch.Tensor | None = None,
        region_points: torch.Tensor | None = None,
        ground_image_index: torch.Tensor | None = None,
        ground_queries: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, ClocMllmImageOutput] | None = None,
        predict_boxes: bool | None = None,
        **kwargs: Any,
    ) -> ClocMllmCausalLMOutputWithPast:
        """Run the model; see the class for the inputs.

        Raises:
            ValueError: If placeholders and what fills them are not equally many, or a label is a placeholder.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            image_sizes=image_sizes,
            region_boxes=region_boxes,
            region_image_index=region_image_index,
            region_points=region_points,
            ground_image_index=ground_image_index,
            ground_queries=ground_queries,
            mm_encoder_outputs=mm_encoder_outputs,
            predict_boxes=predict_boxes,
            return_dict=True,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = finish_logits(self.lm_head(hidden[:, kept]), self.config.text_config)
        loss = None
        if labels is not None:
            if bool(((labels == self.config.image_token_index) | (labels == self.config.region_token_index)).any()):
                raise ValueError("<image> or <region> stands in the labels: they are inputs, never to be learnt")
            loss = self.loss_function(logits, labels, vocab_size=self.config.text_config.vocab_size, **kwargs)
        rest = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return ClocMllmCausalLMOutputWithPast(loss=loss, logits=logits, **rest)
