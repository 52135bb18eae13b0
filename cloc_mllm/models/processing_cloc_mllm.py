"""Messages to tensors and back: the one place where conversations become tokens, labels, images and boxes.

Training and generation go the same way, through :meth:`ClocMllmProcessor.encode`: one template, one tokenisation, one
rule for what is learnt. All boxes on its outside are pixels of the original image.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, LlavaProcessor, LogitsProcessorList, PreTrainedTokenizerBase
from transformers.processing_utils import MultiModalData
from transformers.utils import logging

from .answer_text import AnswerText, absent_phrases, read_answer
from .box_constraint import BoxConstraint, BoxTokens
from .boxes import BoxCodec
from .chat_template import (
    IGNORED,
    build_chat_template,
    chat_style,
    fence,
    has_generation_block,
    render_chat,
    tokenize_chat,
    unfence,
)
from .configuration_cloc import has_class_token
from .configuration_cloc_mllm import CONTROL_TOKENS, GROUNDING_MODES, check_region_tokens, feature_strategy
from .conversation_cloc_mllm import (
    REGION_FORMATS,
    Conversation,
    ConversationError,
    ConversationReader,
    Prompt,
    image_items,
    in_reading_order,
    picture_of,
)
from .image_tokens import ImageTokens
from .outputs_cloc_mllm import ClocGroundedOutput
from .packing import pack_rows, packed_tensors

logger = logging.get_logger(__name__)


class ClocMllmProcessor(LlavaProcessor):
    """Processor of the region-aware MLLM; make one with :meth:`from_parts`.

    Args:
        image_processor: A :class:`ClocImageProcessor`.
        tokenizer: The language model's tokenizer, with ``<image>``, ``<region>`` and ``<ground>`` added.
        patch_size: Side of the tower's patches in pixels.
        vision_feature_select_strategy: As in the model: ``default`` drops the class token.
        chat_template: A Jinja template; default the one :func:`.chat_template.build_chat_template` finds.
        image_token: LLaVA's; always ``<image>``.
        num_additional_image_tokens: Tokens of the tower beside its patches: 1 with a class token.
        region_format: How a user's region is written: ``token`` (``<region>``), ``coords``, or ``both``.
        grounding: As in the model: an assistant's box is ``<ground>`` (``head``) or coordinates (``text``).
        box_mode: How coordinates are written; see :class:`.boxes.BoxCodec`.
        projector_type: As in the model: it decides how many tokens an image takes.
        pixel_shuffle_factor: As in the model.
        num_region_tokens: As in the model: how many ``<region>`` placeholders a region takes.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str = "default",
        chat_template: str | None = None,
        image_token: str = "<image>",
        num_additional_image_tokens: int = 1,
        region_format: str = "token",
        grounding: str = "head",
        box_mode: str = "norm1000",
        projector_type: str = "mlp2x_gelu",
        pixel_shuffle_factor: int = 2,
        num_region_tokens: int = 1,
        **kwargs: Any,
    ) -> None:
        for name, value, known in (
            ("region_format", region_format, REGION_FORMATS),
            ("grounding", grounding, GROUNDING_MODES),
        ):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}: use one of {', '.join(known)}")
        check_region_tokens(num_region_tokens)
        self.region_format, self.grounding, self.box_mode = region_format, grounding, box_mode
        self.num_region_tokens = num_region_tokens
        self.codec = BoxCodec(box_mode)
        self.projector_type, self.pixel_shuffle_factor = projector_type, pixel_shuffle_factor
        self._box_tokens: BoxTokens | None = None  # read from the vocabulary when it is first needed
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template or build_chat_template(tokenizer),
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
            **kwargs,
        )
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in CONTROL_TOKENS if token not in vocabulary]
        if missing:
            raise ValueError(f"the tokenizer has no {', '.join(missing)}: use ClocMllmProcessor.from_parts")
        _ = self.image_layout  # a projector that does not fit is refused now, not with the first image
        self.region_token_id, self.ground_token_id = vocabulary["<region>"], vocabulary["<ground>"]

    @classmethod
    def from_parts(
        cls,
        image_processor: Any,
        tokenizer: PreTrainedTokenizerBase,
        vision_config: Any,
        *,
        vision_feature_select_strategy: str | None = None,
        region_format: str = "token",
        grounding: str = "head",
        box_mode: str = "norm1000",
        chat_style_name: str = "auto",
        chat_template: str | None = None,
        projector_type: str = "mlp2x_gelu",
        pixel_shuffle_factor: int = 2,
        image_mode: str | None = None,
        image_grid_pinpoints: list[list[int]] | None = None,
        num_region_tokens: int = 1,
    ) -> ClocMllmProcessor:
        """Make the processor of an MLLM.

        Args:
            image_processor: The encoder's.
            tokenizer: The language model's; copied, then given the control tokens, a padding token if it has none,
                and, as its end-of-sequence token, the one that ends a turn.
            vision_config: The tower's configuration.
            vision_feature_select_strategy: As in the model.
            region_format: How a user's region is written.
            grounding: As in the model.
            box_mode: How coordinates are written.
            chat_style_name: ``auto``, ``chatml``, ``llama3`` or ``plain``; see :mod:`.chat_template`.
            chat_template: A Jinja template of your own. The tokenizer's end-of-sequence token must be what ends a turn.
            projector_type: As in the model.
            pixel_shuffle_factor: As in the model.
            image_mode: ``pad``, ``resize`` or ``anyres``; ``None``: as the encoder's. With ``anyres`` the model is
                given this processor's ``image_processor.image_grid_pinpoints``.
            image_grid_pinpoints: Resolutions of ``anyres``; ``None``: LLaVA-NeXT's for the tower's size.
            num_region_tokens: As in the model.

        Raises:
            ValueError: If the images do not come in the size the tower takes, a name is unknown, the projector does not
                fit the tower's patches, or a template does not mark what the assistant says.
        """
        if chat_template is not None and not has_generation_block(chat_template):
            raise ValueError("the chat template lacks {% generation %} around what the assistant says, which is learnt")
        if image_processor.size != vision_config.image_size:
            raise ValueError(
                f"the image processor makes images of {image_processor.size} pixels, the tower takes "
                f"{vision_config.image_size}"
            )
        if image_mode is not None:
            image_processor = image_processor.in_mode(image_mode, image_grid_pinpoints)
        elif image_grid_pinpoints is not None:
            raise ValueError("image_grid_pinpoints are for image_mode 'anyres'")
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.add_tokens(list(CONTROL_TOKENS), special_tokens=True)
        if chat_template is None:
            chat_template = build_chat_template(tokenizer, chat_style_name)
            tokenizer.eos_token = chat_style(tokenizer, chat_style_name).end
        if tokenizer.pad_token is None:
            tokenizer.add_special_tokens({"pad_token": "<pad>"})
        return cls(
            image_processor,
            tokenizer,
            patch_size=vision_config.patch_size,
            vision_feature_select_strategy=feature_strategy(vision_config, vision_feature_select_strategy),
            chat_template=chat_template,
            num_additional_image_tokens=int(has_class_token(vision_config)),
            region_format=region_format,
            grounding=grounding,
            box_mode=box_mode,
            projector_type=projector_type,
            pixel_shuffle_factor=pixel_shuffle_factor,
            num_region_tokens=num_region_tokens,
        )

    @property
    def image_layout(self) -> ImageTokens:
        """How images become tokens; the model's ``ImageTokens.of(config)`` is the same."""
        return ImageTokens.plan(
            self.image_processor.size,
            self.patch_size,
            self.num_additional_image_tokens - (self.vision_feature_select_strategy == "default"),
            self.projector_type,
            self.pixel_shuffle_factor,
            self.image_processor.image_grid_pinpoints,
        )

    @property
    def num_image_tokens(self) -> int:
        """How many ``<image>`` placeholders an image takes that is not cut into tiles."""
        return self.image_layout.per_tile

    def image_tokens(self, width: int, height: int) -> int:
        """How many ``<image>`` placeholders an image of ``width`` x ``height`` original pixels takes."""
        return self.image_layout.count(height, width)

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        """What inference servers ask: placeholders and rows of ``pixel_values`` of images of some (height, width)."""
        if image_sizes is None:
            return MultiModalData()
        layout = self.image_layout
        return MultiModalData(
            num_image_tokens=[layout.count(height, width) for height, width in image_sizes],
            num_image_patches=[layout.num_tiles(height, width) for height, width in image_sizes],
        )

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """The placeholders of one image, for transformers' own way through a processor: ``processor(images, text)``."""
        sizes = image_inputs.get("image_sizes")
        count = self.num_image_tokens if sizes is None else self.image_layout.count(*map(int, sizes[image_idx]))
        return self.image_token * count

    @property
    def _reader(self) -> ConversationReader:
        return ConversationReader(
            self.image_processor.geometry,
            self.codec,
            lambda text: fence(text, self.tokenizer),
            self.region_format,
            self.grounding,
        )

    def encode(
        self,
        conversations: Sequence[Any],
        images: Sequence[Sequence[Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
        return_labels: bool = False,
        padding_side: str | None = None,
        max_length: int | None = None,
        chat_template: str | None = None,
        return_original_sizes: bool = False,
        packing: bool = False,
        pack_length: int | None = None,
    ) -> BatchFeature:
        """Turn conversations into model inputs.

        Args:
            conversations: A list of conversations, each a list of messages (see :mod:`.conversation_cloc_mllm`); or
                one conversation.
            images: For each conversation, pictures for the ``image`` items that hold none.
            add_generation_prompt: Whether the assistant is to speak next.
            return_labels: Whether to return what training needs.
            padding_side: Default ``left`` to generate, else ``right``.
            max_length: Longest sequence in tokens. What does not fit loses whole exchanges of user and assistant: the
                last ones in training; else the first ones that show no image. Nothing is cut within a turn.
            chat_template: Used in place of the processor's own.
            return_original_sizes: Whether to return ``original_sizes`` too.
            packing: Whether to lay several conversations into one row, for training; see :mod:`.packing`. There is no
                ``attention_mask`` then but ``position_ids``, and everything is in the order in which it is packed.
            pack_length: With ``packing``, most tokens of a row; default the longest conversation's.

        Returns:
            ``input_ids`` and ``attention_mask`` ``(B, T)``, and what there is of:

            * ``pixel_values`` ``(I, 3, H, W)``; with ``anyres`` one row a tile, and ``image_sizes`` ``(I, 2)``, height
              and width of the originals;
            * ``region_boxes`` ``(R, 4)`` float32 xyxy, normalised, model frame, and ``region_image_index`` ``(R,)``;
            * ``region_points`` ``(R, P, 2)`` float32, the same frame, if any region is a mask or a scribble: points on
              it, NaN where there are fewer;
            * ``ground_image_index`` ``(G,)``, the image of each ``<ground>``;
            * ``labels`` ``(B, T)``, -100 outside of what the assistant says; and ``ground_boxes`` ``(G, 4)`` and
              ``ground_phrases``, a list of G texts, with a grounding head: only with ``return_labels``;
            * ``original_sizes``: for each conversation, width and height of its images in pixels.

        Raises:
            ConversationError: A ``ValueError`` with the ``index`` of the conversation that is wrong, for example one
                that teaches nothing (``return_labels``) or cannot be made to fit.
        """
        batch = self._as_batch(conversations)
        if images is not None and len(images) != len(batch):
            raise ValueError(f"{len(batch)} conversations, but images for {len(images)}")
        read: list[tuple[Conversation, list[int], list[int]]] = []
        for number, messages in enumerate(batch):
            try:
                filled = self._reader.fill(messages, None if images is None else images[number])
                if return_labels:
                    filled = in_reading_order(filled)
                template = chat_template or self.chat_template
                read.append(self._fit(filled, template, add_generation_prompt, return_labels, max_length))
            except ValueError as error:
                raise ConversationError(number, str(error)) from error
        data: dict[str, Any] = {}
        if packing:
            if add_generation_prompt or padding_side == "left":
                raise ValueError("packed conversations are for training: nothing can be generated after them")
            rows = pack_rows([len(ids) for _, ids, _ in read], pack_length)
            packed = ([ids for _, ids, _ in read], [labels for *_, labels in read])
            data |= packed_tensors(*packed, rows, self.tokenizer.pad_token_id)
            # Images, regions and <ground>s below are counted in the order of their placeholders.
            read = [read[k] for row in rows for k in row]
        else:
            side = padding_side or ("left" if add_generation_prompt else "right")
            data |= self._pad([ids for _, ids, _ in read], [labels for *_, labels in read], side)
        if not return_labels:
            del data["labels"]
        data |= self._vision([conversation for conversation, *_ in read], return_labels)
        if return_original_sizes:
            data["original_sizes"] = [conversation.sizes for conversation, *_ in read]
        return BatchFeature(data)

    @staticmethod
    def _as_batch(conversations: Sequence[Any]) -> list[Sequence[Mapping[str, Any]]]:
        if not conversations:
            raise ValueError("there is no conversation")
        return [conversations] if isinstance(conversations[0], Mapping) else list(conversations)

    def _fit(
        self,
        messages: list[dict[str, Any]],
        template: str,
        add_generation_prompt: bool,
        for_training: bool,
        max_length: int | None,
    ) -> tuple[Conversation, list[int], list[int]]:
        """Read and tokenise, with whole exchanges left out until it fits."""
        while True:
            conversation = self._reader.read(messages)
            ids, labels = self._tokens(conversation, template, add_generation_prompt)
            if for_training and all(label == IGNORED for label in labels):
                said = any(message["role"] == "assistant" for message in messages)
                reason = "the chat template lacks {% generation %}" if said else "the assistant says nothing"
                raise ValueError(f"there is nothing to learn in it: {reason}")
            if max_length is None or len(ids) <= max_length:
                return conversation, ids, labels
            shorter = _without_one_exchange(messages, from_the_end=for_training)
            if shorter is None:
                raise ValueError(
                    f"it needs {len(ids)} tokens, but max_length is {max_length}: raise it or shorten the "
                    "conversation (images and turns are never cut)"
                )
            logger.warning("a conversation of %d tokens was shortened to fit max_length %d", len(ids), max_length)
            messages = shorter

    def _tokens(
        self, conversation: Conversation, template: str, add_generation_prompt: bool
    ) -> tuple[list[int], list[int]]:
        """Ids and labels of one conversation, ``<image>`` expanded."""
        chat = render_chat(conversation.messages, template, add_generation_prompt, **self.tokenizer.special_tokens_map)
        short_ids, short_labels = tokenize_chat(chat, self.tokenizer)
        for name, token, wanted in (
            ("<image>", self.image_token_id, len(conversation.images)),
            ("<region>", self.region_token_id, len(conversation.regions)),
            ("<ground>", self.ground_token_id, len(conversation.grounds)),
        ):
            if short_ids.count(token) != wanted:
                raise ValueError(
                    f"the text has {short_ids.count(token)} {name}, but the conversation holds {wanted}: "
                    "the chat template drops or repeats items"
                )
        ids: list[int] = []
        labels: list[int] = []
        counts = iter([self.image_tokens(*size) for size in conversation.sizes])
        for token, label in zip(short_ids, short_labels, strict=True):
            count = next(counts) if token == self.image_token_id else 1
            count = self.num_region_tokens if token == self.region_token_id else count
            ids += [token] * count
            labels += [label] * count
        return ids, labels

    def _pad(self, ids: list[list[int]], labels: list[list[int]], side: str) -> dict[str, torch.Tensor]:
        if side not in ("left", "right"):
            raise ValueError(f"unknown padding_side {side!r}: use left or right")
        width = max(map(len, ids))

        def padded(rows: list[list[int]], value: int) -> torch.Tensor:
            fill = [[value] * (width - len(row)) for row in rows]
            pairs = zip(fill, rows, strict=True) if side == "left" else zip(rows, fill, strict=True)
            return torch.tensor([first + second for first, second in pairs])

        return {
            "input_ids": padded(ids, self.tokenizer.pad_token_id),
            "attention_mask": padded([[1] * len(row) for row in ids], 0),
            "labels": padded(labels, IGNORED),
        }

    def _vision(self, conversations: list[Conversation], for_training: bool) -> dict[str, Any]:
        """Pictures and boxes of a batch, images counted over the whole of it."""
        pictures = [picture for conversation in conversations for picture in conversation.images]
        firsts = [0]
        for conversation in conversations[:-1]:
            firsts.append(firsts[-1] + len(conversation.images))

        def flat(name: str) -> tuple[torch.Tensor, torch.Tensor, list[Prompt]]:
            found = [(first, one) for first, c in zip(firsts, conversations, strict=True) for one in getattr(c, name)]
            boxes = torch.stack([one.box for _, one in found]) if found else torch.zeros(0, 4)
            index = torch.tensor([first + one.image for first, one in found], dtype=torch.long)
            return boxes, index, [one for _, one in found]

        data: dict[str, Any] = {}
        if pictures:
            data |= self.image_processor(pictures)
        boxes, index, regions = flat("regions")
        if regions:
            data |= {"region_boxes": boxes, "region_image_index": index}
            shapes = [torch.zeros(0, 2) if one.points is None else one.points for one in regions]
            if any(len(shape) for shape in shapes):
                data["region_points"] = pad_sequence(shapes, batch_first=True, padding_value=float("nan"))
        boxes, index, grounds = flat("grounds")
        if grounds or (for_training and self.grounding == "head"):
            data["ground_image_index"] = index
        if for_training and self.grounding == "head":
            data |= {"ground_boxes": boxes, "ground_phrases": [one.phrase for one in grounds]}
        return data

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_assistant_tokens_mask: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As every processor of transformers has it; with ``tokenize`` it is :meth:`encode`.

        Returns:
            The text, one for each conversation if there are several; with ``tokenize``, ``input_ids``; with
            ``return_dict`` too, all of :meth:`encode`'s output, and ``assistant_masks`` if asked for.

        Raises:
            ValueError: For options that do not apply to this model, such as tools.
        """
        options = {**kwargs, **(processor_kwargs or {})}
        for name in ("padding", "return_tensors", "sanitize_control_tokens", "truncation"):
            options.pop(name, None)  # always so: padded tensors of sanitised text, nothing cut
        sides = {name: options.pop(name) for name in ("padding_side", "max_length", "images") if name in options}
        unknown = [name for name, value in options.items() if value not in (None, False)]
        if unknown:
            raise ValueError(f"this chat template takes no {', '.join(unknown)}")
        if not tokenize:
            texts = [self._text(one, chat_template, add_generation_prompt) for one in self._as_batch(conversation)]
            return texts[0] if isinstance(conversation[0], Mapping) else texts
        data = self.encode(
            conversation,
            add_generation_prompt=add_generation_prompt,
            return_labels=return_assistant_tokens_mask,
            chat_template=chat_template,
            **sides,
        )
        if return_assistant_tokens_mask:
            data["assistant_masks"] = (data.pop("labels") != IGNORED).long()
            for name in ("ground_boxes", "ground_phrases"):
                data.pop(name, None)
        return data if return_dict else data["input_ids"]

    def _text(self, messages: Sequence[Mapping[str, Any]], template: str | None, add_generation_prompt: bool) -> str:
        """The rendered text, ``<image>`` not expanded; pictures may be missing if no coordinates are written."""
        if all(picture_of(item) is not None for item in image_items(messages)):
            ready = self._reader.read(self._reader.fill(messages)).messages
        else:
            ready = [dict(message) for message in messages]
        return unfence(render_chat(ready, template or self.chat_template, add_generation_prompt).text)

    def constrain_boxes(
        self, prompt_length: int, original_sizes: Sequence[Sequence[tuple[int, int]]]
    ) -> LogitsProcessorList:
        """What keeps every box that is written as text well-formed, for ``generate``'s ``logits_processor``.

        Args:
            prompt_length: Tokens of the prompt, ``input_ids.shape[1]``.
            original_sizes: What :meth:`encode` returned under that name: boxes are on the last image of each.

        Raises:
            ValueError: If the tokenizer cannot write a box letter by letter.
        """
        if self._box_tokens is None:
            self._box_tokens = BoxTokens(self.tokenizer, self.box_mode)
        last = [sizes[-1] if sizes else None for sizes in original_sizes]
        return LogitsProcessorList([BoxConstraint(self._box_tokens, prompt_length, last)])

    def post_process_grounding(
        self, generated: ClocGroundedOutput, original_sizes: Sequence[Sequence[tuple[int, int]]]
    ) -> list[AnswerText]:
        """Read the answers: text, and boxes in pixels of the original images.

        Args:
            generated: What ``generate_grounded`` returned.
            original_sizes: What :meth:`encode` returned under that name for the same conversations.

        Returns:
            For each row its text, coordinates printed as text whichever way they came; the boxes with the phrase
            before each; what the answer says is not there; and what could not be read.
        """
        sequences, boxes, images = generated.sequences, generated.pred_boxes, generated.ground_image_index
        if sequences is None:
            raise ValueError("there are no sequences: pass what generate_grounded returned")
        if len(original_sizes) != len(sequences):
            raise ValueError(f"{len(sequences)} answers, but the image sizes of {len(original_sizes)} conversations")
        answers, first = [], 0
        for row, sizes in enumerate(original_sizes):
            ids = sequences[row, generated.prompt_length :].tolist()
            if self.tokenizer.eos_token_id in ids:
                ids = ids[: ids.index(self.tokenizer.eos_token_id)]
            if boxes is None or images is None:
                text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
                answers.append(read_answer(text, sizes[-1] if sizes else None, len(sizes) - 1, self.codec))
            else:
                mine = (generated.ground_row == row).nonzero()[:, 0]  # type: ignore[union-attr]
                found = zip(boxes[mine].cpu(), images[mine].tolist(), strict=True)
                answers.append(self._put_boxes(ids, [(box, image - first) for box, image in found], sizes))
            answers[-1].num_tokens = len(ids)
            first += len(sizes)
        return answers

    def _put_boxes(
        self, ids: list[int], boxes: list[tuple[torch.Tensor, int]], sizes: Sequence[tuple[int, int]]
    ) -> AnswerText:
        """Put each box where its ``<ground>`` stood."""
        answer, done, rest = AnswerText(), 0, iter(boxes)
        for end in [*(k for k, token in enumerate(ids) if token == self.ground_token_id), len(ids)]:
            # Decoded from the start each time: a piece on its own may decode without the space before it.
            text = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
            answer.add_text(text[done:])
            done = len(text)
            if end == len(ids):
                break
            box, image = next(rest, (torch.full((4,), float("nan")), -1))
            if not 0 <= image < len(sizes) or bool(box.isnan().any()):
                answer.unparsed.append("<ground>")
                continue
            pixels = self.image_processor.geometry(*sizes[image]).boxes_from_model(box).tolist()
            answer.add_box(pixels, sizes[image], image, self.codec)
        answer.text = answer.text.strip()
        answer.absent = absent_phrases(answer.text)
        return answer


def _without_one_exchange(messages: list[dict[str, Any]], *, from_the_end: bool) -> list[dict[str, Any]] | None:
    """Messages less one exchange (a user's turn and what follows it), or ``None`` if none can go."""
    starts = [k for k, message in enumerate(messages) if message["role"] == "user"]
    if len(starts) < 2:
        return None
    if from_the_end:
        return messages[: starts[-1]]
    for start, end in itertools.pairwise(starts):
        if not any(image_items(messages[start:end])):
            return messages[:start] + messages[end:]
    return None
