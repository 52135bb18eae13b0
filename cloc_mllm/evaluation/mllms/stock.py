"""Any image-text-to-text model of transformers (LLaVA-HF, say) as an answerer: regions and boxes are numbers in text.

Such a model knows of no region items. What is asked about is written as `[x1, y1, x2, y2]` in the frame that the model
was trained with, and boxes are read from its answers in the same frame. Which frame that is stands in no checkpoint, so
it has to be stated; read in the wrong one, every box is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor

from cloc_mllm.errors import ClocError
from cloc_mllm.inference.images import read_image
from cloc_mllm.models.answer_text import AnswerText, read_answer
from cloc_mllm.models.boxes import BOX_MODES, BoxCodec, ParsedBoxes
from cloc_mllm.models.region_shapes import mask_shape, scribble_shape

SQUARE = "-square"
FRAMES = (*BOX_MODES, *(f"{mode}{SQUARE}" for mode in BOX_MODES if mode != "pixel"))
"""How boxes may be written; `-square` ones are shares of the picture padded to a square (LLaVA-1.5's)."""


class FramedCodec(BoxCodec):
    """Boxes as text in one of :data:`FRAMES`.

    Args:
        frame: The frame.

    Raises:
        ClocError: There is no such frame.
    """

    def __init__(self, frame: str) -> None:
        if frame not in FRAMES:
            raise ClocError(f"there is no frame of boxes '{frame}'", remedy=f"Choose one of {', '.join(FRAMES)}.")
        super().__init__(frame.removesuffix(SQUARE))
        self.square = frame.endswith(SQUARE)

    def encode(self, box: Sequence[float], width: float, height: float) -> str:
        """See :meth:`.BoxCodec.encode`."""
        if not self.square:
            return super().encode(box, width, height)
        left, top, side = _margins(width, height)
        return super().encode([value + (left, top)[k % 2] for k, value in enumerate(box)], side, side)

    def decode(self, text: str, width: float, height: float) -> ParsedBoxes:
        """See :meth:`.BoxCodec.decode`; what reaches into the padding is cut off."""
        if not self.square:
            return super().decode(text, width, height)
        left, top, side = _margins(width, height)
        found = super().decode(text, side, side)
        limits = (width, height) * 2
        inside = [[value - (left, top)[k % 2] for k, value in enumerate(box)] for box in found.boxes]
        cut = [[min(max(v, 0.0), float(high)) for v, high in zip(box, limits, strict=True)] for box in inside]
        return ParsedBoxes(cut, found.spans, found.unparsed)


def _margins(width: float, height: float) -> tuple[float, float, float]:
    """Left and top margin of a picture in the middle of a square, and the square's side."""
    side = max(width, height)
    return (side - width) // 2, (side - height) // 2, side


class StockAnswerer:
    """A model of transformers and its processor.

    Args:
        model: An image-text-to-text model.
        processor: Its processor, with a chat template.
        frame: How boxes are written, one of :data:`FRAMES`; ``None`` where none are asked for.

    Raises:
        ClocError: The processor has no chat template, or there is no such frame.
    """

    def __init__(self, model: Any, processor: Any, frame: str | None = None) -> None:
        if getattr(processor, "chat_template", None) is None:
            raise ClocError("the processor has no chat template", remedy="Use the checkpoint's chat version.")
        self.model, self.processor = model.eval(), processor
        self.codec = None if frame is None else FramedCodec(frame)
        # Rows end together, so that all of them go on at the same place.
        processor.tokenizer.padding_side = "left"
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token

    @classmethod
    def from_pretrained(
        cls,
        path: str | PathLike[str],
        frame: str | None = None,
        device: str | None = None,
        trust_remote_code: bool = False,
    ) -> StockAnswerer:
        """Load a checkpoint.

        Args:
            path: A folder with model and processor.
            frame: As in the class.
            device: Where it runs; default a GPU if there is one.
            trust_remote_code: Whether code in the checkpoint may run.

        Raises:
            ClocError: It cannot be loaded.
        """
        try:
            processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
            model = AutoModelForImageTextToText.from_pretrained(
                path, trust_remote_code=trust_remote_code, dtype="auto", use_safetensors=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ClocError(f"the checkpoint cannot be loaded: {error}", file=path) from error
        return cls(model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), processor, frame)

    @torch.no_grad()
    def chat(self, conversations: Sequence[Any], max_new_tokens: int = 256, batch_size: int = 16) -> list[AnswerText]:
        """Answer the last turn of each conversation, greedily.

        Args:
            conversations: Conversations about one picture each that end with a user's turn, in messages format.
            max_new_tokens: Longest answer in tokens.
            batch_size: How many are answered together.

        Raises:
            ClocError: A conversation has not one picture, or a region though no frame of boxes was stated.
        """
        answers: list[AnswerText] = []
        for start in range(0, len(conversations), batch_size):
            batch = conversations[start : start + batch_size]
            pictures = [self._picture(conversation, start + k) for k, conversation in enumerate(batch)]
            texts = [
                self.processor.apply_chat_template(self._written(one, picture), add_generation_prompt=True)
                for one, picture in zip(batch, pictures, strict=True)
            ]
            inputs = self.processor(
                images=[[picture] for picture in pictures], text=texts, padding=True, return_tensors="pt"
            ).to(self.model.device, self.model.dtype)
            ids = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            said = self.processor.tokenizer.batch_decode(
                ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            answers += [self._read(text.strip(), picture) for text, picture in zip(said, pictures, strict=True)]
        return answers

    def _picture(self, conversation: Any, number: int) -> Image.Image:
        found = [item["image"] for message in conversation for item in _items(message) if item["type"] == "image"]
        if len(found) != 1:
            raise ClocError(f"the question is about {len(found)} pictures, and can be about one only", sample=number)
        return read_image(found[0])

    def _written(self, conversation: Any, picture: Image.Image) -> list[dict[str, Any]]:
        """The conversation with its regions as text; texts that follow each other are one."""
        messages = []
        for message in conversation:
            items: list[dict[str, Any]] = []
            for item in _items(message):
                if item["type"] == "image":
                    items.append({"type": "image"})
                    continue
                text = item["text"] if item["type"] == "text" else self._region(item, picture.size)
                if items and items[-1]["type"] == "text":
                    text = items.pop()["text"] + text
                items.append({"type": "text", "text": text})
            messages.append({"role": message["role"], "content": items})
        return messages

    def _region(self, item: Mapping[str, Any], size: tuple[int, int]) -> str:
        """A region in words: a box, a point as its two numbers, any other shape as the box around it."""
        if self.codec is None:
            raise ClocError("boxes are asked about, and it is not said how the model writes them", remedy=HOW)
        if "point" in item:
            numbers = self.codec.encode([*item["point"], *item["point"]], *size).strip("[]").split(", ")
            return f"[{', '.join(numbers[:2])}]"
        if "mask" in item:
            return self.codec.encode(mask_shape(item["mask"], *size).box, *size)
        if "scribble" in item:
            return self.codec.encode(scribble_shape(item["scribble"], *size).box, *size)
        return self.codec.encode(item["box"], *size)

    def _read(self, text: str, picture: Image.Image) -> AnswerText:
        return AnswerText(text) if self.codec is None else read_answer(text, picture.size, 0, self.codec)


HOW = f"Add --set boxes=FRAME, one of {', '.join(FRAMES)}: its model card says which."


def _items(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
