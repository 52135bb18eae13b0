r"""One chat template for training and generation, and the tokens of what it renders.

Which template: it must use the markers the language model was trained with. ``build_chat_template`` finds them in the
tokenizer's vocabulary, or takes a style by name:

* ``chatml`` (Qwen, SmolLM2, ...): ``<|im_start|>user\n ... <|im_end|>\n``;
* ``phi4``: the same with ``<|im_sep|>`` in place of the line break;
* ``llama3``: ``<|start_header_id|>user<|end_header_id|>\n\n ... <|eot_id|>``;
* ``gemma``: ``<start_of_turn>user\n ... <end_of_turn>\n``; a system prompt opens the first user's turn;
* ``phi3``: ``<|user|>\n ... <|end|>\n``;
* ``mistral``: ``[INST] ... [/INST] ...</s>``, with ``[SYSTEM_PROMPT]`` where the tokenizer has it (and then without
  spaces), else with a system prompt that opens the first user's turn;
* ``vicuna`` (LLaVA-1.5; no markers, so never found by itself): ``USER: ... ASSISTANT: ...</s>``;
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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

STYLES = ("chatml", "phi4", "llama3", "gemma", "phi3", "mistral", "vicuna", "plain")
IGNORED = -100

# Private-use characters: they fence text that must not be read as control tokens.
_OPEN, _CLOSE = "\U000f10c0", "\U000f10c1"
_FENCED = re.compile(f"{_OPEN}(.*?){_CLOSE}", re.DOTALL)

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

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
{%- set openings = @OPENINGS -%}
{%- set closings = @CLOSINGS -%}
{%- set kept = namespace(system='') -%}
{{- @BEGIN -}}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{- openings.assistant -}}
{%- generation -%}{{- @LEAD + show(message.content) + @END -}}{%- endgeneration -%}
{{- closings.assistant -}}
{%- elif message.role == 'system' and 'system' not in openings -%}
{%- set kept.system = show(message.content) + "\n\n" -%}
{%- else -%}
{{- openings[message.role] + kept.system + show(message.content) + closings[message.role] -}}
{%- set kept.system = '' -%}
{%- endif -%}
{%- endfor -%}
{%- if kept.system -%}{{- raise_exception("a system prompt with no user's turn behind it") -}}{%- endif -%}
{%- if add_generation_prompt -%}{{- openings.assistant -}}{%- endif -%}
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
    """What is written around turns.

    Attributes:
        openings: Before each role's text. Without one for ``system``, a system prompt opens the next user's turn.
        closings: After each role's text; the assistant's follows its ``end`` and is not learnt.
        end: What the assistant ends a turn with; generation stops there.
        lead: What the assistant starts a turn with: a space, where the prompt ends without one.
        markers: Tokens a tokenizer must have for this style.
    """

    openings: Mapping[str, str]
    closings: Mapping[str, str]
    end: str
    lead: str = ""
    markers: tuple[str, ...] = ()


def _even_style(
    before: str,
    after: str,
    end: str,
    between: str,
    names: Mapping[str, str] | None = None,
    markers: tuple[str, ...] = (),
) -> ChatStyle:
    """A style that writes every turn alike: ``before``, the role's name, ``after``, the text, ``end``, ``between``."""
    names = names or {role: role for role in ("system", "user", "assistant")}
    openings = {role: f"{before}{name}{after}" for role, name in names.items()}
    closings = {role: between if role == "assistant" else f"{end}{between}" for role in names}
    return ChatStyle(openings, closings, end, markers=markers or tuple(m for m in (before, end) if m))


def _mistral_style(tokenizer: PreTrainedTokenizerBase) -> ChatStyle:
    """With tokens for system prompts (Mistral's tokenizer v7 and later) there are no spaces, before that there are."""
    end, markers = str(tokenizer.eos_token), ("[INST]", "[/INST]")
    if "[SYSTEM_PROMPT]" not in tokenizer.added_tokens_encoder:
        openings, closings = {"user": "[INST] ", "assistant": ""}, {"user": "[/INST]", "assistant": ""}
        return ChatStyle(openings, closings, end, lead=" ", markers=markers)
    openings = {"system": "[SYSTEM_PROMPT]", "user": "[INST]", "assistant": ""}
    closings = {"system": "[/SYSTEM_PROMPT]", "user": "[/INST]", "assistant": ""}
    return ChatStyle(openings, closings, end, markers=markers)


def detect_style(tokenizer: PreTrainedTokenizerBase) -> str:
    """The style whose markers the tokenizer has as tokens of their own."""
    own = tokenizer.added_tokens_encoder
    for style, markers in (
        ("phi4", ("<|im_start|>", "<|im_sep|>", "<|im_end|>")),
        ("chatml", ("<|im_start|>", "<|im_end|>")),
        ("llama3", ("<|start_header_id|>", "<|eot_id|>")),
        ("gemma", ("<start_of_turn>", "<end_of_turn>")),
        ("phi3", ("<|user|>", "<|assistant|>", "<|end|>")),
        ("mistral", ("[INST]", "[/INST]")),
    ):
        if all(marker in own for marker in markers):
            return style
    return "plain"


def chat_style(tokenizer: PreTrainedTokenizerBase, style: str = "auto") -> ChatStyle:
    """What a style writes around turns.

    Raises:
        ValueError: If the style is unknown, or the tokenizer has not its markers.
    """
    name = detect_style(tokenizer) if style == "auto" else style
    if name not in STYLES:
        raise ValueError(f"unknown chat style {style!r}: use one of auto, {', '.join(STYLES)}")
    if name in ("mistral", "vicuna", "plain") and tokenizer.eos_token is None:
        raise ValueError("the tokenizer has no end-of-sequence token to end a turn with: set tokenizer.eos_token")
    found = _style(tokenizer, name)
    missing = [marker for marker in found.markers if marker not in tokenizer.added_tokens_encoder]
    if missing:
        raise ValueError(f"the tokenizer has no {' or '.join(missing)}: chat style {name!r} is not this model's")
    return found


def _style(tokenizer: PreTrainedTokenizerBase, name: str) -> ChatStyle:
    end = str(tokenizer.eos_token)
    if name == "chatml":
        return _even_style("<|im_start|>", "\n", "<|im_end|>", "\n")
    if name == "phi4":
        return _even_style("<|im_start|>", "<|im_sep|>", "<|im_end|>", "")
    if name == "llama3":
        return _even_style("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>", "")
    if name == "gemma":
        names = {"user": "user", "assistant": "model"}
        return _even_style("<start_of_turn>", "\n", "<end_of_turn>", "\n", names)
    if name == "phi3":
        return _even_style("<|", "|>\n", "<|end|>", "\n", markers=("<|user|>", "<|assistant|>", "<|end|>"))
    if name == "mistral":
        return _mistral_style(tokenizer)
    if name == "vicuna":
        openings = {"system": "", "user": "USER: ", "assistant": "ASSISTANT:"}
        closings = {"system": " ", "user": " ", "assistant": ""}
        return ChatStyle(openings, closings, end, lead=" ", markers=(end,))
    names = {"system": "SYSTEM", "user": "USER", "assistant": "ASSISTANT"}
    return _even_style("", ":\n", end, "\n", names)


def build_chat_template(tokenizer: PreTrainedTokenizerBase, style: str = "auto") -> str:
    """The Jinja template of a style; it writes the tokenizer's begin-of-sequence token where that is no marker."""
    found = chat_style(tokenizer, style)
    template = _TEMPLATE
    for name, value in (
        ("@BEGIN", _begin(tokenizer, found)),
        ("@OPENINGS", dict(found.openings)),
        ("@CLOSINGS", dict(found.closings)),
        ("@LEAD", found.lead),
        ("@END", found.end),
    ):
        template = template.replace(name, json.dumps(value))
    return template


def has_generation_block(template: str) -> bool:
    """Whether a template marks what the assistant says, which is what training learns."""
    return _GENERATION.search(template) is not None


def caption_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The Jinja template of an image and its caption with nothing around them, ended by a line break.

    What LLaVA's first stage reads (its conversation `plain`): no roles, no markers, no question.
    """
    return _CAPTION_TEMPLATE.replace("@BEGIN", json.dumps(_begin(tokenizer, chat_style(tokenizer))))


def _begin(tokenizer: PreTrainedTokenizerBase, style: ChatStyle) -> str:
    """What a text begins with: the tokenizer's token for it, unless that is a marker of turns."""
    begin = tokenizer.bos_token
    return "" if begin is None or begin in (*style.markers, style.end, tokenizer.eos_token) else str(begin)


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
    """Run the template on one conversation whose texts went through :func:`fence`.

    Raises:
        ValueError: If the template refuses the conversation, or is no Jinja template.
    """
    try:
        rendered, learnt = render_jinja_template(
            conversations=[messages],
            chat_template=template,
            return_assistant_tokens_mask=True,
            add_generation_prompt=add_generation_prompt,
            **variables,
        )
    except TemplateError as error:
        raise ValueError(f"the chat template refuses it: {error}") from error
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
