"""Configuration of the region-aware MLLM: LLaVA's, plus how regions go in and how boxes come out."""

import math

from huggingface_hub.dataclasses import strict
from transformers import LlavaConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_cloc import ClocPrompterConfig, has_class_token
from .image_tokens import PROJECTOR_TYPES, ImageTokens

# No `from __future__ import annotations` here: transformers' strict configurations read the annotations at run time.

CONTROL_TOKENS = ("<image>", "<region>", "<ground>")
REGION_ENCODERS = ("none", "prompter", "roi_align")
GROUNDING_MODES = ("text", "head")


def feature_strategy(vision_config: PreTrainedConfig, asked: str | None) -> str:
    """Which of the tower's tokens the language model sees: as asked for, or all patches and nothing else."""
    return asked or ("default" if has_class_token(vision_config) else "full")


def check_region_tokens(count: int) -> None:
    """Refuse a number of tokens a region that is none: 1, or one more than the square of at least 2."""
    if count != 1 and (count < 5 or math.isqrt(count - 1) ** 2 != count - 1):
        raise ValueError(f"num_region_tokens is {count}: use 1, or 1 + g * g for g by g parts (5, 10, 17, ...)")


@strict
class ClocMllmConfig(LlavaConfig):
    """Configuration of :class:`ClocMllmForConditionalGeneration`.

    Without its own fields it is a stock LLaVA's: the tower, the projector and the language model are transformers' own.

    Args:
        region_encoder: How a ``<region>`` placeholder is filled. ``prompter``: by the CLOC Prompter prompted with the
            box; ``roi_align``: by RoI-Align on the tower's tokens, the control; ``none``: never, the language model is
            told of regions as coordinates only.
        prompter_config: The region encoder; ``None`` exactly if ``region_encoder`` is ``none``.
        grounding: How boxes come out. ``head``: the language model emits ``<ground>`` after a phrase and a localisation
            head, queried by the hidden state there, gives the box; ``text``: coordinates are generated as text.
        grounding_config: The localisation head's own Prompter and BoxHead; ``None`` exactly if ``grounding`` is
            ``text``.
        num_region_tokens: How many ``<region>`` placeholders a region takes: 1, or 1 + g * g, which are the region and
            g by g parts of it (see :mod:`.region_encoder`).
        boxes_per_phrase: Most boxes that the head can tell apart for one phrase: the n-th of ``<ground>`` tokens in a
            row asks for the n-th of them. 1: it knows no difference.
        region_token_index: Id of ``<region>``.
        ground_token_index: Id of ``<ground>``.
        lm_head_bias: Whether the language model's head has a bias (Phi's has; stock LLaVA's has none).
        projector_type: From the tower to the language model. ``mlp2x_gelu``: LLaVA-1.5's two layers; ``linear``: one;
            ``pixel_shuffle``: ``pixel_shuffle_factor**2`` patches become one token, then two layers.
        pixel_shuffle_factor: Patches along each side of what ``pixel_shuffle`` makes one token of.
        image_grid_pinpoints: Resolutions ``[height, width]`` in pixels that ``anyres`` cuts into tiles, as LLaVA-NeXT;
            ``None``: every image is one square.

    Everything else (``vision_config``, ``text_config``, ``image_token_index``, ``vision_feature_layer``,
    ``vision_feature_select_strategy``, ...) is LLaVA's and means the same.
    """

    model_type = "cloc_mllm"
    attribute_map = {
        "image_token_id": "image_token_index",
        "region_token_id": "region_token_index",
        "ground_token_id": "ground_token_index",
    }
    sub_configs_defaults = {
        **LlavaConfig.sub_configs_defaults,
        "prompter_config": SubConfigSpec(config_class=ClocPrompterConfig, optional=True),
        "grounding_config": SubConfigSpec(config_class=ClocPrompterConfig, optional=True),
    }
    # What an evaluation loop would otherwise gather over a whole data set.
    keys_to_ignore_at_inference = ["past_key_values", "image_hidden_states", "ground_embeds", "ground_image_index"]

    region_encoder: str = "none"
    prompter_config: dict | PreTrainedConfig | None = None
    grounding: str = "text"
    grounding_config: dict | PreTrainedConfig | None = None
    num_region_tokens: int = 1
    boxes_per_phrase: int = 1
    region_token_index: int = 32001
    ground_token_index: int = 32002
    lm_head_bias: bool = False
    projector_type: str = "mlp2x_gelu"
    pixel_shuffle_factor: int = 2
    image_grid_pinpoints: list | None = None

    def validate_architecture(self) -> None:
        """Refuse combinations that have no meaning (called by transformers' strict validation)."""
        if self.region_encoder not in REGION_ENCODERS:
            raise ValueError(f"unknown region_encoder {self.region_encoder!r}: use one of {', '.join(REGION_ENCODERS)}")
        if self.grounding not in GROUNDING_MODES:
            raise ValueError(f"unknown grounding {self.grounding!r}: use one of {', '.join(GROUNDING_MODES)}")
        if self.projector_type not in PROJECTOR_TYPES:
            raise ValueError(f"unknown projector_type {self.projector_type!r}: use one of {', '.join(PROJECTOR_TYPES)}")
        if self.projector_type == "pixel_shuffle" or self.image_grid_pinpoints is not None:
            ImageTokens.of(self)
        check_region_tokens(self.num_region_tokens)
        if self.boxes_per_phrase < 1:
            raise ValueError(f"boxes_per_phrase is {self.boxes_per_phrase}: a phrase has at least one box")
        if self.boxes_per_phrase > 1 and self.grounding != "head":
            raise ValueError(
                "boxes_per_phrase is the grounding head's: as text, a phrase has as many boxes as are said"
            )
        for part, wanted, given in (
            (f"region_encoder {self.region_encoder!r}", self.region_encoder != "none", self.prompter_config),
            (f"grounding {self.grounding!r}", self.grounding == "head", self.grounding_config),
        ):
            if wanted != (given is not None):
                name = "prompter_config" if "region" in part else "grounding_config"
                raise ValueError(f"{part} {'needs' if wanted else 'takes no'} {name}")
        for name, kind in (("prompter_config", self.region_encoder), ("grounding_config", "prompter")):
            part_config = getattr(self, name)
            if part_config is None or isinstance(part_config, dict):
                continue
            if part_config.kind != kind:
                raise ValueError(f"{name} is of kind {part_config.kind!r}, but {kind!r} is needed")
            if part_config.hidden_size != self.vision_config.hidden_size:
                raise ValueError(
                    f"{name} is {part_config.hidden_size} wide, the tower {self.vision_config.hidden_size}: "
                    "they must be equal"
                )
