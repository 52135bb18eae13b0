"""Configurations of the CLOC encoder: tower and text encoder are stock, the Prompter is ours."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, CLIPTextConfig, CLIPVisionConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

# No `from __future__ import annotations` here: transformers' strict configurations read the annotations at run time.

# SigLIP pools by an attention head, so that all of its tokens are patches.
TOWERS_WITHOUT_CLASS_TOKEN = ("siglip_vision_model",)


def has_class_token(vision_config: PreTrainedConfig) -> bool:
    """Whether a tower's first token is a class token, which has no place in the grid of patches."""
    return vision_config.model_type not in TOWERS_WITHOUT_CLASS_TOKEN


@strict
class ClocPrompterConfig(PreTrainedConfig):
    """Configuration of the :class:`ClocPrompter` and of the BoxHead that sits on it.

    Where the paper (arXiv 2410.02746) is silent the choice is ours and is marked so.

    Args:
        hidden_size: Width of the vision tower whose tokens are read; the Prompter is as wide (paper, section 3.2).
        projection_dim: Dimension of the embedding space shared with the text encoder.
        intermediate_size: Width of the layer's MLP; ``None`` is four times ``hidden_size`` (ours).
        num_attention_heads: Heads of the one encoder layer (paper: 1).
        kind: ``prompter``, or ``roi_align``: RoI-Align on the tower's tokens in the Prompter's place (the paper's
            ablation, table 2).
        pooling: ``mean`` averages all output tokens (the paper's global average pool), before the last norm, which
            saves half of the MLP's work (ours); ``prompt`` averages the output at the prompt's own tokens, which never
            needs the image tokens' outputs and is far cheaper (ours).
        num_pos_feats: Sine and cosine frequencies for each coordinate (ours).
        max_frequency: Highest of the geometrically spaced frequencies, in periods across the frame (ours).
        image_positions: Whether each patch token gets the same encoding of its centre before the layer, as SAM adds
            to its image embedding (ours). Corners then find their patches, and phrases their box, by one code.
        box_head_hidden_size: Width of the BoxHead's hidden layer; ``None`` is ``hidden_size`` (ours).
        has_class_token: Whether the first token of the tower is a class token, which has no place in the
            grid.
        roi_output_size: Bins on each side that RoI-Align samples before it averages them.
        hidden_act: Activation of the MLPs (paper: GELU).
        layer_norm_eps: Epsilon of the layer norms.
        initializer_range: Standard deviation of new weights.
    """

    model_type = "cloc_prompter"

    hidden_size: int = 768
    projection_dim: int = 512
    intermediate_size: int | None = None
    num_attention_heads: int = 1
    kind: str = "prompter"
    pooling: str = "mean"
    num_pos_feats: int = 32
    max_frequency: float = 32.0
    image_positions: bool = True
    box_head_hidden_size: int | None = None
    has_class_token: bool = True
    roi_output_size: int = 4
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def validate_architecture(self) -> None:
        """Refuse combinations that have no meaning (called by transformers' strict validation)."""
        if self.kind not in ("prompter", "roi_align"):
            raise ValueError(f"unknown Prompter kind {self.kind!r}: use 'prompter' or 'roi_align'")
        if self.pooling not in ("mean", "prompt"):
            raise ValueError(f"unknown Prompter pooling {self.pooling!r}: use 'mean' or 'prompt'")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"the Prompter's width {self.hidden_size} is not a multiple of its {self.num_attention_heads} heads"
            )


@strict
class ClocVisionConfig(PreTrainedConfig):
    """Configuration of :class:`ClocVisionModel`: a stock tower, its projection and, if there is one, its Prompter.

    Args:
        vision_config: Any vision tower transformers' Auto classes know; default a CLIP ViT-B/16 at 224.
        prompter_config: The Prompter, or ``None`` for a plain tower.
        projection_dim: Dimension of the shared embedding space.
        has_projections: Whether a matrix takes the tower's pooled output to the shared space; see :class:`ClocConfig`.
    """

    model_type = "cloc_vision"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "prompter_config": SubConfigSpec(config_class=ClocPrompterConfig, optional=True),
    }

    vision_config: Any = None  # a configuration, a dictionary of one, or None
    prompter_config: Any = None  # a configuration, a dictionary of one, or None
    projection_dim: int = 512
    has_projections: bool = True
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        """Build the sub-configurations from dictionaries or defaults."""
        if self.vision_config is None:
            self.vision_config = CLIPVisionConfig(patch_size=16)
        super().__post_init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Width of the tower: what DeepSpeed sizes its buckets by."""
        return self.vision_config.hidden_size


@strict
class ClocConfig(PreTrainedConfig):
    """Configuration of :class:`ClocModel`.

    Args:
        vision_config: The vision tower; default a CLIP ViT-B/16 at 224.
        text_config: The text encoder; default CLIP's.
        prompter_config: The Prompter and BoxHead. ``None`` makes the model a plain CLIP, the baseline CLOC is
            compared with: the same class, the same programs, one part less.
        projection_dim: Dimension of the shared embedding space.
        has_projections: Whether a matrix takes each tower's pooled output to the shared space, as in CLIP. ``False``:
            the towers' own heads end there, as in SigLIP.
        logit_scale_init_value: Logarithm of both initial temperatures' inverses. CLIP's value is ln(1/0.07); the
            region temperature is its own parameter (ours, the paper is silent).
        logit_scale_max: Largest logarithm allowed (CLIP: ln 100).
        logit_bias_init_value: First bias of the logits, for the sigmoid loss (SigLIP: -10), one for images and one for
            regions; ``None``: the model has none, as the softmax loss needs none.
    """

    model_type = "cloc"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_text_model"),
        "prompter_config": SubConfigSpec(config_class=ClocPrompterConfig, optional=True),
    }

    vision_config: Any = None  # a configuration, a dictionary of one, or None
    text_config: Any = None  # a configuration, a dictionary of one, or None
    prompter_config: Any = None  # a configuration, a dictionary of one, or None
    projection_dim: int = 512
    has_projections: bool = True
    logit_scale_init_value: float = 2.6592
    logit_scale_max: float = 4.6052
    logit_bias_init_value: float | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        """Build the sub-configurations from dictionaries or defaults."""
        if self.vision_config is None:
            self.vision_config = CLIPVisionConfig(patch_size=16)
        if self.text_config is None:
            self.text_config = CLIPTextConfig()
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Everything must end in the shared space, and the Prompter be as wide as the tower."""
        if not self.has_projections:
            ends = (self.vision_config.hidden_size, getattr(self.text_config, "projection_size", None))
            if ends != (self.projection_dim,) * 2:
                raise ValueError(
                    f"without projections the towers must end in the {self.projection_dim} dimensions of the shared "
                    f"space, not in {ends[0]} (images) and {ends[1]} (texts)"
                )
        prompter = self.prompter_config
        if prompter is None or isinstance(prompter, dict):
            return
        width = self.vision_config.hidden_size
        if prompter.hidden_size != width:
            raise ValueError(f"the Prompter is {prompter.hidden_size} wide, the tower {width}: they must be equal")
        if prompter.projection_dim != self.projection_dim:
            raise ValueError(
                f"the Prompter projects to {prompter.projection_dim} dimensions, the model to {self.projection_dim}"
            )
        if prompter.has_class_token and not has_class_token(self.vision_config):
            raise ValueError(
                f"a tower of type '{self.vision_config.model_type}' has no class token: set the Prompter's "
                "has_class_token to false"
            )

    @property
    def hidden_size(self) -> int:
        """Width of the tower: what DeepSpeed sizes its buckets by."""
        return self.vision_config.hidden_size
