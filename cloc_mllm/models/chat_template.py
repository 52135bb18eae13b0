r"""One chat template for training and generation, and the tokens of what it renders.

Which template: it must use the markers the language model was trained with. ``build_chat_template`` finds them in the
tokenizer's vocabulary, or takes a style by name:

* ``chatml`` (Qwen, SmolLM2, ...): ``<|im_start|>user\n ... <|im_end|>\n``;
* ``llama3``: ``<|start_header_id|>user<|end_header_id|>\n\n ... <|eot_id|>``;
* ``plain``, for a base model without markers: ``USER:\n ... </s>\n`` with the tokenizer's own end-of-sequence token.

For any other family, pass a Jinja template of your own to the processor. It must wrap what the assistant says, its end
marker included, in ``{% generation %}``: that is what is learnt. A model that ships a template of its own is best given
the style with the same markers: stock templates lack that tag, and add system prompts of their own.

Text that people wrote never becomes a control token: a ``<region>`` or ``<|im_end|>`` typed by a user is marked before
rendering and then tokenised as the letters it consists of.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

STYLES = ("chatml", "llama3", "plain")
IGNORED = -100

# Private-use characters: they fence text that must not be read as control tokens.
_OPEN, _CLOSE = "\U000f10c0", "\U000f10c1"
_FENCED = re.compile(f"{_OPEN}(.*?){_CLOSE}", re.DOTALL)

_TEMPLATE = """\
{%- macro show(content) -%}
{%- if content is string -%}{{- content -}}{%- else -%}
{%- for item in content -%}
{%- if item.type == 'image' -%}{{- "<image>\\n" -}}
{%- elif item.type == 'region' -%}{{- "<region>" -}}
{%- elif item.type == 'ground' -%}{{- "<ground>" -}}
{%- else -%}{{- item.text -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{{- @BEGIN -}}
{%- for message in messages -%}
{{- @BEFORE + message.role@CASE + @AFTER -}}
{%- if message.role == 'assistant' -%}
{%- generation -%}{{- show(message.content) + @END -}}{%- endgeneration -%}
{%- else -%}{{- show(message.content) + @END -}}{%- endif -%}
{{- @BETWEEN -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- @BEFORE + 'assistant'@CASE + @AFTER -}}{%- endif -%}
"""


_CAPTION_TEMPLATE = """\
{{- @BEGIN -}}
{%- for message in messages -%}{%- for item in message.content -%}
{%- if item.type == 'image' -%}{{- "<image>" -}}
{%- elif message.role == 'assistant' -%}{%- generation -%}{{- item.text + "\\n" -}}{%- endgeneration -%}
{%- else -%}{{- item.text -}}{%- endif -%}
{%- endfor -%}{%- endfor -%}
"""


@dataclass(frozen=True)
class ChatStyle:
    """The markers around turns.

    Attributes:
        before: Before the role's name.
        after: Between the role's name and the text.
        end: Ends a turn; generation stops there.
        between: After the end of a turn.
        upper: Whether roles are written in capitals.
    """

    before: str
    after: str
    end: str
    between: str
    upper: bool = False


def detect_style(tokenizer: PreTrainedTokenizerBase) -> str:
    """The style whose markers the tokenizer has as tokens of their own."""
    own = tokenizer.added_tokens_encoder
    if "<|im_start|>" in own and "<|im_end|>" in own:
        return "chatml"
    if "<|start_header_id|>" in own and "<|eot_id|>" in own:
        return "llama3"
    return "plain"


def chat_style(tokenizer: PreTrainedTokenizerBase, style: str = "auto") -> ChatStyle:
    """The markers of a style.

    Raises:
        ValueError: If the style is unknown, or the tokenizer has not its markers.
    """
    name = detect_style(tokenizer) if style == "auto" else style
    if name not in STYLES:
        raise ValueError(f"unknown chat style {style!r}: use one of auto, {', '.join(STYLES)}")
    if name == "chatml":
        found = ChatStyle("<|im_start|>", "\n", "<|im_end|>", "\n")
    elif name == "llama3":
        found = ChatStyle("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>", "")
    elif tokenizer.eos_token is None:
        raise ValueError("the tokenizer has no end-of-sequence token to end a turn with: set tokenizer.eos_token")
    else:
        found = ChatStyle("", ":\n", str(tokenizer.eos_token), "\n", upper=True)
    missing = [m for m in (found.before, found.end) if m and m not in tokenizer.added_tokens_encoder]
    if missing:
        raise ValueError(f"the tokenizer has no {' or '.join(missing)}: chat style {name!r} is not this model's")
    return found


def build_chat_template(tokenizer: PreTrainedTokenizerBase, style: str = "auto") -> str:
    """The Jinja template of a style; it writes the tokenizer's begin-of-sequence token where that is no marker."""
    markers = chat_style(tokenizer, style)
    template = _TEMPLATE
    for name, value in (
        ("@BEGIN", _begin(tokenizer, markers)),
        ("@BEFORE", markers.before),
        ("@AFTER", markers.after),
        ("@END", markers.end),
        ("@BETWEEN", markers.between),
    ):
        template = template.replace(name, json.dumps(value))
    return template.replace("@CASE", "|upper" if markers.upper else "")


def caption_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The Jinja template of an image and its caption with nothing around them, ended by a line break.

    What LLaVA's first stage reads (its conversation `plain`): no roles, no markers, no question.
    """
    return _CAPTION_TEMPLATE.replace("@BEGIN", json.dumps(_begin(tokenizer, chat_style(tokenizer))))


def _begin(tokenizer: PreTrainedTokenizerBase, markers: ChatStyle) -> str:
    """What a text begins with: the tokenizer's token for it, unless that is a marker of turns."""
    begin = tokenizer.bos_token
    return "" if begin is None or begin in (markers.before, markers.end, tokenizer.eos_token) else str(begin)


def fence(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Text that a person wrote, with whatever reads like one of the tokenizer's added tokens fenced in."""
    text = text.replace(_OPEN, "").replace(_CLOSE, "")
    # The longest first: of two tokens that start alike, the tokenizer reads the longer.
    tokens = sorted(tokenizer.added_tokens_encoder, key=len, reverse=True)
    pattern = "|".join(re.escape(token) for token in tokens)
    return re.sub(pattern, lambda found: f"{_OPEN}{found.group()}{_CLOSE}", text) if pattern else text


def unfence(text: str) -> str:
    """The text as it was before :func:`fence`."""
    return text.replace(_OPEN, "").replace(_CLOSE, "")


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as the template wrote it.

    Attributes:
        text: The whole text, people's control-token look-alikes fenced.
        learnt: Start and end characters of what the assistant says, in order.
    """

    text: str
    learnt: list[tuple[int, int]]

    def pieces(self) -> Iterator[tuple[str, bool, bool]]:
        """``(text, is_learnt, is_plain)`` pieces in order; plain ones hold no control tokens."""
        position = 0
        for start, end in [*self.learnt, (len(self.text), len(self.text))]:
            for is_learnt, part in ((False, self.text[position:start]), (True, self.text[start:end])):
                for k, piece in enumerate(_FENCED.split(part)):
                    if piece:
                        yield piece, is_learnt, k % 2 == 1
            position = end


def render_chat(
    messages: list[dict[str, Any]], template: str, add_generation_prompt: bool = False, **variables: Any
) -> RenderedChat:
    """Run the template on one conversation whose texts went through :func:`fence`."""
    rendered, learnt = render_jinja_template(
        conversations=[messages],
        chat_template=template,
        return_assistant_tokens_mask=True,
        add_generation_prompt=add_generation_prompt,
        **variables,
    )
    return RenderedChat(rendered[0], [(start, end) for start, end in learnt[0]])


def tokenize_chat(chat: RenderedChat, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids and labels, built together, piece by piece.

    The text is cut where the assistant starts and stops speaking, so that a prompt's tokens are the same in training
    as in generation, where the text ends there.

    Returns:
        Ids, and labels that are the ids where the assistant speaks and -100 elsewhere.
    """
    ids: list[int] = []
    labels: list[int] = []
    newline = tokenizer.encode("\n", add_special_tokens=False)
    for text, is_learnt, is_plain in chat.pieces():
        piece = _encode_piece(tokenizer, text, is_plain, newline if ids else None)
        ids += piece
        labels += piece if is_learnt else [IGNORED] * len(piece)
    return ids, labels


def _encode_piece(tokenizer: PreTrainedTokenizerBase, text: str, plain: bool, newline: list[int] | None) -> list[int]:
    """Tokens of a piece; behind a line break where it is not the first, which SentencePiece would give a space."""
    if newline is not None:
        behind = _encode(tokenizer, "\n" + text, plain)
        if newline and behind[: len(newline)] == newline:
            return behind[len(newline) :]
    return _encode(tokenizer, text, plain)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, plain: bool) -> list[int]:
    if not plain:
        return tokenizer.encode(text, add_special_tokens=False)
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    # `split_special_tokens` leaves added tokens that are not special whole, so the pipeline is run without any of them.
    if core.normalizer is not None:
        text = core.normalizer.normalize_str(text)
    words = [text] if core.pre_tokenizer is None else [word for word, _ in core.pre_tokenizer.pre_tokenize_str(text)]
    return [token.id for word in words for token in core.model.tokenize(word)]
