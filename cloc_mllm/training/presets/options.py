"""What a training preset may say: one small typed model for each block of the YAML file.

Every key has a type, a default and a line of help, and a key that is not here is an error. The three stages share
these blocks; :mod:`cloc_mllm.training.presets.config` puts them together and reads files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from cloc_mllm.data.prompt_templates import templates_of
from cloc_mllm.errors import ClocError

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Precision = Literal["fp32", "bf16"]


def option(default: Any, meaning: str) -> Any:
    """Return a field with a default, and with the line of help that `train explain` prints."""
    return Field(default=default, description=meaning)


def block(factory: Callable[[], Any], meaning: str) -> Any:
    """Return a field that holds a block of its own."""
    return Field(default_factory=factory, description=meaning)


class Block(BaseModel):
    """A block of a preset: unknown keys are refused, and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class RunOptions(Block):
    """How long, how large, where to, and on what machinery."""

    output: str = option("checkpoints/run", "the run folder")
    overwrite: bool = option(False, "start anew in a run folder that already holds checkpoints")
    seed: Count = option(0, "seeds weights, order of samples and sampled regions")
    steps: Positive | None = option(None, "optimiser steps; give this or epochs")
    epochs: Annotated[float, Field(gt=0)] | None = option(None, "passes over the data; give this or steps")
    batch_size: Positive = option(64, "samples a step over all processes: the global batch")
    micro_batch_size: Positive | None = option(None, "samples a process takes at once; null: no accumulation")
    eval_batch_size: Positive | None = option(None, "samples a process evaluates at once; null: as in training")
    precision: Precision = option("fp32", "fp32 or bf16")
    zero: Literal[0, 1, 2, 3, "none"] | str = option("none", "ZeRO stage, none (no DeepSpeed) or a JSON file")
    activation_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory")
    workers: Count = option(0, "processes a rank that load data; 0: load in the training process")
    log_every: Positive = option(10, "steps between two log lines")
    eval_every: Positive | None = option(None, "steps between two validations; null: none while training")
    save_every: Positive | None = option(None, "steps between two checkpoints; null: only the final export")
    keep: Positive | None = option(2, "checkpoints kept; null: all")
    stall_timeout: Annotated[float, Field(gt=0)] | None = option(
        600.0, "seconds a process may hold up the others before the run ends and names it; null: unwatched"
    )
    log_to: list[Literal["tensorboard", "wandb"]] = option(["tensorboard"], "beside metrics.jsonl")
    export: Literal["merged", "adapter", "both", "none"] = option(
        "merged", "at the end: merged: export/, the weights to use; adapter: adapter/, LoRA or tokens alone; both; none"
    )
    license: str | None = option(None, "licence of the weights, for the model card's header; null: none is stated")

    @field_validator("export", mode="before")
    @classmethod
    def _export_or_not(cls, value: Any) -> Any:
        return {True: "merged", False: "none"}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _one_length(self) -> RunOptions:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of 'steps' and 'epochs'")
        return self


class OptimOptions(Block):
    """AdamW and its schedule. Learning rates of single parts are in `parts`."""

    lr: NonNegative = option(1e-3, "peak learning rate")
    betas: tuple[Fraction, Fraction] = option((0.9, 0.98), "AdamW's betas")
    eps: Annotated[float, Field(gt=0)] = option(1e-8, "AdamW's epsilon")
    weight_decay: NonNegative = option(0.0, "on matrices only, not on biases and norms")
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = option("cosine", "after the warm-up")
    warmup: NonNegative = option(0.0, "steps if 1 or more, else share of all steps")
    max_grad_norm: NonNegative = option(1.0, "gradient clipping; 0: none")
    neftune_alpha: Annotated[float, Field(gt=0)] | None = option(
        None, "tuning: noise on the text's embeddings while training, alpha / sqrt(tokens x width); null: none"
    )
    ema: Annotated[float, Field(gt=0, lt=1)] | None = option(
        None, "decay of a moving average of the weights, which export/ then holds; null: none"
    )


PartMode = Literal["frozen", "full", "lora", "tokens"]


class PartOptions(Block):
    """What training does to one part of the model. A bare word in YAML is short for `{mode: word}`."""

    mode: PartMode = option("full", "frozen, full, lora, or tokens: frozen but for the control tokens' embeddings")
    lr: NonNegative | None = option(None, "peak learning rate of this part; null: optim.lr")
    weight_decay: NonNegative | None = option(None, "null: optim.weight_decay")
    rank: Positive = option(16, "lora: rank")
    alpha: Annotated[float, Field(gt=0)] = option(32.0, "lora: scale, alpha / rank")
    dropout: Fraction = option(0.0, "lora: dropout on the input")
    layers: list[str] | None = option(
        None, "lora: names of the LLM's linear layers that get adapters; null: all of its decoder's"
    )
    quantization: Literal["nf4", "fp4"] | None = option(
        None, "lora: the LLM's linear layers in 4 bits (QLoRA, needs bitsandbytes); null: as they are"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_word(cls, value: Any) -> Any:
        return {"mode": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _adapters_options(self) -> PartOptions:
        for name in ("layers", "quantization"):
            if getattr(self, name) is not None and self.mode != "lora":
                raise ValueError(f"'{name}' is for 'mode: lora', not for 'mode: {self.mode}'")
        return self


def _part(mode: PartMode, description: str) -> Any:
    return block(lambda: PartOptions(mode=mode), description)


class EncoderParts(Block):
    """The parts of the encoder, `ClocModel`."""

    vision_tower: PartOptions = _part("full", "image tower and its projection")
    text_tower: PartOptions = _part("full", "text encoder and its projection")
    prompter: PartOptions = _part("full", "Prompter, if the model has one")
    box_head: PartOptions = _part("full", "BoxHead, if the model has one")
    temperature: PartOptions = _part("full", "logit scale of images and texts; never decayed")
    region_temperature: PartOptions = _part("full", "logit scale of regions and texts; never decayed")
    bias: PartOptions = _part("full", "logit bias of the sigmoid loss, images and texts, if the model has one")
    region_bias: PartOptions = _part("full", "logit bias of the sigmoid loss, regions and texts, if the model has one")


class MllmParts(Block):
    """The parts of the MLLM, `ClocMllmForConditionalGeneration`."""

    vision_tower: PartOptions = _part("frozen", "image tower")
    projector: PartOptions = _part("full", "connector from the tower to the LLM")
    prompter: PartOptions = _part("frozen", "Prompter that reads region prompts, if there is one")
    region_projector: PartOptions = _part("full", "from region embeddings to the LLM, if there are any")
    grounding_head: PartOptions = _part("full", "<ground> query to box, if grounding is 'head'")
    llm: PartOptions = _part("full", "language model")


class TowerOptions(Block):
    """Size of a transformer trained from scratch."""

    hidden_size: Positive = option(96, "width")
    num_hidden_layers: Positive = option(3, "layers")
    num_attention_heads: Positive = option(3, "heads")
    intermediate_size: Positive = option(384, "width of the MLP")
    hidden_act: str = option("gelu", "activation")

    @model_validator(mode="after")
    def _heads_divide(self) -> TowerOptions:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of {self.num_attention_heads} heads")
        return self


class PrompterOptions(Block):
    """The Prompter of an encoder from scratch; see `ClocPrompterConfig` for what each does."""

    kind: Literal["prompter", "roi_align"] = option("prompter", "Prompter, or RoI-Align in its place")
    pooling: Literal["mean", "prompt"] = option("prompt", "mean: the paper's; prompt: far cheaper")
    intermediate_size: Positive | None = option(None, "null: 4 x the tower's width")
    num_attention_heads: Positive = option(1, "heads (paper: 1)")
    num_pos_feats: Positive = option(32, "frequencies for each coordinate")
    max_frequency: Annotated[float, Field(gt=0)] = option(32.0, "highest frequency, periods across the frame")
    image_positions: bool = option(True, "patch tokens get the code of their places, as corners do")


SCRATCH_IMAGE_SIZE = 96


class EncoderModelOptions(Block):
    """The encoder to train."""

    init: str = option("scratch", "scratch, clip:PATH, siglip:PATH (also fixed-size SigLIP2) or cloc:PATH")
    image_size: Positive | None = option(
        None, "side of the model frame in pixels; null: 96 from scratch, else the checkpoint's own"
    )
    patch_size: Positive = option(16, "side of a patch in pixels, from scratch")
    resize_mode: Literal["pad", "resize"] = option("pad", "how images become square")
    vision: TowerOptions = block(TowerOptions, "image tower, from scratch")
    text: TowerOptions = block(lambda: TowerOptions(num_hidden_layers=2), "text encoder, from scratch")
    position_init: Literal["normal", "sincos"] = option("normal", "first position embeddings of a tower from scratch")
    projection_dim: Positive = option(96, "dimension of the shared space")
    prompter: PrompterOptions | None = block(PrompterOptions, "null: a plain CLIP")
    logit_scale_init: Annotated[float, Field(gt=0)] = option(1 / 0.07, "initial multiplier of the cosines, where new")
    logit_scale_max: Annotated[float, Field(gt=0)] | None = option(
        None, "largest multiplier allowed; null: 100 (CLIP), 1000 with siglip (which has no cap)"
    )
    logit_bias_init: float | None = option(
        None, "first bias of the logits (SigLIP: -10); null without the sigmoid loss"
    )

    @field_validator("init")
    @classmethod
    def _known_init(cls, value: str) -> str:
        kind, _, path = value.partition(":")
        if value != "scratch" and (kind not in ("clip", "siglip", "cloc") or not path):
            raise ValueError(f"'{value}' is not one of scratch, clip:PATH, siglip:PATH, cloc:PATH")
        return value

    @model_validator(mode="after")
    def _patches_tile(self) -> EncoderModelOptions:
        if self.init == "scratch" and self.frame_size % self.patch_size:
            raise ValueError(f"image_size {self.frame_size} is not a multiple of patch_size {self.patch_size}")
        return self

    @property
    def frame_size(self) -> int:
        """Side of the model frame of an encoder from scratch, in pixels."""
        return self.image_size or SCRATCH_IMAGE_SIZE


class TokenizerOptions(Block):
    """The text encoder's tokenizer, if it is from scratch; with another `init` the checkpoint's own is used."""

    path: str | None = option(None, "a tokenizer's folder or hub name; null: train one from the training captions")
    kind: Literal["bpe", "sentencepiece"] = option(
        "bpe", "what is trained without a path: byte-level BPE, or a sentencepiece model with T5's special tokens"
    )
    vocab_size: Annotated[int, Field(ge=261)] = option(512, "most entries of a trained tokenizer")
    lowercase: bool = option(True, "lower-case the text first (paper: yes)")
    max_length: Positive = option(77, "longest text in tokens")
    corpus: list[str] | None = option(None, "data whose texts a tokenizer is trained on; null: data.train")


class ZeroShotOptions(Block):
    """Images with a class each, classified by the names of their classes at every validation."""

    path: str = Field(description="a folder with a folder of pictures a class, or samples with 'image' and 'label'")
    templates: list[str] = option(
        ["a photo of a {}."], "texts of a class, averaged; {} is its name; or 'imagenet' for CLIP's 80"
    )
    samples: Positive | None = option(1000, "images classified, spread evenly over the classes; null: all")

    @field_validator("templates", mode="before")
    @classmethod
    def _place_the_name(cls, value: Any) -> list[str]:
        try:
            return list(templates_of(value))
        except (ClocError, TypeError) as error:
            raise ValueError(str(error)) from error


class SourceOptions(Block):
    """One source of a mixture."""

    path: str = Field(description="region-text samples: a folder, file, pattern or URL")
    weight: Annotated[float, Field(gt=0)] = option(1.0, "how often it is drawn from, relative to the others")


class RegionTextOptions(Block):
    """Region-text data for pre-training. A mixture in `train` is a list of {path: …, weight: …}."""

    train: str | list[SourceOptions] = Field(description="a folder, file, pattern or URL; or a list of path and weight")
    validation: str | None = option(None, "a folder or file, for validation")
    max_regions: Positive = option(4, "regions sampled from an image each time it is seen (paper: 4)")
    validation_samples: Positive = option(256, "samples validated on, from the start of the file")
    zero_shot: ZeroShotOptions | None = option(None, "zero-shot classification at every validation; null: none")
    on_bad_sample: Literal["error", "skip"] = option("error", "error: stop; skip: another stands in, and is counted")
    streaming: bool | None = option(None, "read in lanes with constant memory; null: for mixtures, .tar and URLs")
    lanes: Positive = option(64, "streaming: places of the data that are read at once")
    chunk: Positive | None = option(None, "streaming: samples in a row from a lane; null: by batch_size and lanes")
    shuffle_block: Positive = option(64, "streaming: samples shuffled with each other; held for every lane")

    @field_validator("train")
    @classmethod
    def _some_source(cls, value: str | list[SourceOptions]) -> str | list[SourceOptions]:
        if not value:
            raise ValueError("names no data")
        return value

    @model_validator(mode="after")
    def _mixtures_are_streamed(self) -> RegionTextOptions:
        if self.streaming is False and len(self.sources) > 1:
            raise ValueError("'train' is a mixture, which is streamed: leave 'streaming' null")
        return self

    @property
    def sources(self) -> list[SourceOptions]:
        """The sources of `train`, also if it is but one."""
        return [SourceOptions(path=self.train)] if isinstance(self.train, str) else self.train


class PretrainObjective(Block):
    """Weights of L = clip + lambda (region + grounding_weight * grounding); lambda = region_weight * regions' share."""

    region_weight: NonNegative = option(1.0, "weight of the region terms (paper: 1)")
    grounding_weight: NonNegative = option(1.0, "weight of the grounding term (paper: 1)")
    grounding_loss: Literal["mse", "l1_giou"] = option("mse", "mse: the paper's; l1_giou: DETR's")
    filter_threshold: Fraction | None = option(0.9, "text filter's cosine (paper: 0.9); null: off")
    extra_captions: bool = option(False, "control without Prompter: region texts as extra captions")
    contrast: Literal["softmax", "sigmoid"] = option("softmax", "softmax: CLIP's; sigmoid: SigLIP's")
    loss_impl: Literal["plain", "tiled"] = option("plain", "plain: the reference; tiled: memory linear in the batch")
    grad_cache: bool = option(True, "contrast all micro-batches of a step, at one more forward pass; else each alone")
    tile_size: Positive = option(2048, "tiled: rows and columns of a tile")


class ComputeOptions(Block):
    """How pre-training saves work; exact, but for patch dropout."""

    patch_dropout: Annotated[float, Field(ge=0, lt=1)] = option(
        0.0, "share of patches that the tower does not read while trained; those under the sampled boxes stay"
    )
    text_buckets: Positive = option(1, "captions and phrases are each encoded in so many batches of like length")
    text_multiple_of: Positive = option(1, "lengths of texts are rounded up to a multiple: fewer shapes to compile")
    compile: str | None = option(None, "torch.compile's backend for the towers' layers, as inductor; null: none")


class ScratchLlmOptions(Block):
    """A small Llama trained from scratch, for demonstrations and tests."""

    hidden_size: Positive = option(96, "width")
    num_hidden_layers: Positive = option(3, "layers")
    num_attention_heads: Positive = option(4, "heads")
    num_key_value_heads: Positive | None = option(None, "null: as many as heads")
    intermediate_size: Positive = option(384, "width of the MLP")
    max_position_embeddings: Positive = option(1024, "longest sequence in tokens")
    tie_word_embeddings: bool = option(True, "share input and output embeddings")
    initializer_range: Annotated[float, Field(gt=0)] = option(
        0.06, "deviation of new weights; Llama's 0.02 is made for widths in the thousands"
    )


class MllmModelOptions(Block):
    """The MLLM to train: put together from an encoder and an LLM, or a finished MLLM to go on from."""

    init: str = option("parts", "parts, or mllm:PATH (an export of align or instruct)")
    encoder: str | None = option(
        None, "an encoder's export folder: the tower with `parts`, and the phrases' text embeddings"
    )
    llm: str = option("scratch", "parts: scratch, or a folder or hub name of a causal LM")
    scratch_llm: ScratchLlmOptions = block(ScratchLlmOptions, "size of `llm: scratch`")
    chat_style: Literal["auto", "chatml", "phi4", "llama3", "gemma", "phi3", "mistral", "vicuna", "plain"] = option(
        "auto", "the markers around turns; auto: those the LLM's tokenizer has"
    )
    vision_layer: int | list[int] = option(
        -2, "layer of the tower whose patches the LLM sees (LLaVA: the last but one); of a list, all side by side"
    )
    image_mode: Literal["pad", "resize", "anyres"] | None = option(
        None,
        "pad, resize: one square an image; anyres: also tiles of it, as LLaVA-NeXT; null: as what it starts from",
    )
    grid_pinpoints: list[tuple[Positive, Positive]] | None = option(
        None, "anyres: [height, width] in pixels to choose from, multiples of the tower's size; null: LLaVA-NeXT's five"
    )
    projector: Literal["linear", "mlp2x_gelu", "pixel_shuffle"] = option(
        "mlp2x_gelu", "parts: one layer, LLaVA-1.5's two, or two behind a reduction of tokens"
    )
    pixel_shuffle_factor: Positive = option(2, "pixel_shuffle: patches along each side that become one token")
    region_encoder: Literal["none", "prompter", "roi_align"] = option("prompter", "how a <region> is read")
    region_format: Literal["token", "coords", "both"] = option("both", "how a user's region is written")
    num_region_tokens: Literal[1, 5, 10, 17] = option(1, "parts: <region> tokens a region: itself, and a grid of parts")
    grounding: Literal["text", "head"] = option("head", "boxes out: as text, or by <ground> and a head")
    boxes_per_phrase: Positive = option(1, "parts: boxes of one phrase that the grounding head tells apart")
    grounding_head: PrompterOptions | None = option(
        None, "its Prompter; null: as the encoder's, or the paper's default"
    )
    grounding_init: Literal["encoder", "new"] = option(
        "encoder", "what the head starts from: the encoder's BoxHead where it fits, or nothing"
    )
    box_format: Literal["norm1000", "norm1", "pixel"] = option("norm1000", "coordinates in text")
    blind: bool = option(False, "control: the tower's patch weights are zeroed for good, so no image gets through")

    @field_validator("init")
    @classmethod
    def _known_init(cls, value: str) -> str:
        kind, _, path = value.partition(":")
        if value != "parts" and (kind != "mllm" or not path):
            raise ValueError(f"'{value}' is not one of parts, mllm:PATH")
        return value

    @model_validator(mode="after")
    def _resolutions_are_for_tiles(self) -> MllmModelOptions:
        if self.grid_pinpoints is not None and self.image_mode != "anyres":
            raise ValueError("'grid_pinpoints' are for 'image_mode: anyres'")
        return self

    @model_validator(mode="after")
    def _needs_encoder(self) -> MllmModelOptions:
        if self.init == "parts" and not self.encoder:
            raise ValueError("'init: parts' needs 'encoder', the export folder of a pre-training run")
        return self

    @model_validator(mode="after")
    def _boxes_need_a_head(self) -> MllmModelOptions:
        if self.boxes_per_phrase > 1 and self.grounding != "head":
            raise ValueError("'boxes_per_phrase' is the grounding head's: as text, a phrase has what boxes are said")
        return self


class TuningSourceOptions(SourceOptions):
    """One source of what an MLLM is tuned on."""

    path: str = Field(description="a folder or a file of samples")
    weight: Annotated[float, Field(gt=0)] = option(
        1.0, "how often it is seen in one pass over the data: 3 is three times, 0.2 another fifth of it each pass"
    )


class TuningDataOptions(Block):
    """What alignment and instruction tuning share: sources, lengths, and how samples make a batch."""

    train: str | list[TuningSourceOptions] = Field(description="a folder or file; or a list of path and weight")
    validation: str | None = option(None, "a folder or file, for validation")
    validation_samples: Positive = option(256, "samples validated on, from the start of the file")
    max_length: Positive | None = option(None, "longest sequence in tokens; longer ones lose whole exchanges")
    on_bad_sample: Literal["error", "skip"] = option("error", "error: stop; skip: go on without it, and count it")
    packing: bool = option(False, "lay the conversations of a micro-batch into few rows; exact, see docs/training.md")
    pack_length: Positive | None = option(None, "tokens of a packed row; null: max_length, or the longest conversation")
    grouping: Literal["none", "length", "modality_length"] = option(
        "none", "samples of like length share a batch; modality_length: and those without an image are by themselves"
    )
    grouping_steps: Positive = option(16, "steps whose samples are sorted with each other; 1: within each step only")

    @field_validator("train")
    @classmethod
    def _some_source(cls, value: str | list[TuningSourceOptions]) -> str | list[TuningSourceOptions]:
        if not value:
            raise ValueError("names no data")
        return value

    @model_validator(mode="after")
    def _rows_hold_a_sample(self) -> TuningDataOptions:
        if self.pack_length is None:
            return self
        if not self.packing:
            raise ValueError("'pack_length' is for packed rows: set packing=true")
        if self.max_length is None or self.max_length > self.pack_length:
            raise ValueError(
                f"'pack_length' {self.pack_length} must hold the longest sequence: set max_length to it or less"
            )
        return self

    @property
    def sources(self) -> list[TuningSourceOptions]:
        """The sources of `train`, also if it is but one."""
        return [TuningSourceOptions(path=self.train)] if isinstance(self.train, str) else self.train


class AlignDataOptions(TuningDataOptions):
    """Region-text data turned into short conversations: a caption, then regions to name and to find."""

    prompts: Literal["questions", "plain"] = option(
        "questions", "questions: asked for in words; plain: the image and its caption, nothing else (LLaVA's stage 1)"
    )
    referring: Count = option(2, "regions an image that are given and must be named")
    grounding: Count = option(2, "phrases an image that are given and must be found")
    several: Count = option(0, "phrases an image that name several regions, all to be found")
    absent: Count = option(0, "phrases an image that are not on it: asked for, and answered that there is none")

    @model_validator(mode="after")
    def _plain_has_no_questions(self) -> AlignDataOptions:
        asked = [name for name in ("referring", "grounding", "several", "absent") if getattr(self, name)]
        if self.prompts == "plain" and asked:
            raise ValueError(f"'prompts: plain' has no questions: set {', '.join(f'{name}=0' for name in asked)}")
        return self


class InstructDataOptions(TuningDataOptions):
    """Conversations, in messages or LLaVA format."""


class MllmObjective(Block):
    """LM loss + box_weight * boxes + distill_weight * (1 - cos to the phrase's text embedding)."""

    box_weight: NonNegative = option(1.0, "l1_giou of the box read off <ground>")
    text_box_weight: NonNegative = option(1.0, "l1_giou of the box read off the phrase's text embedding")
    distill_weight: NonNegative = option(2.0, "pulls <ground>'s query to the phrase's text embedding")
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = option(
        0.0, "share of a token's target that goes to all tokens alike; in training only"
    )
