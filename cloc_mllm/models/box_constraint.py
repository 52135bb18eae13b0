"""Boxes as text that can always be read: while one is being written, only what can go on to a well-formed box is said.

A box is open from a ``[`` with a digit right behind it; there the language model has begun to write one, and until its
``]`` only such tokens are left that continue the form :class:`.boxes.BoxCodec` writes, with numbers of the frame and
corners in order. Everywhere else nothing is touched, except a token that would itself begin a box that cannot be one.
It works on the letters of tokens, so that it fits every tokenizer, whatever pieces it cuts numbers into.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from .boxes import BOX_MODES

_DIGITS = "0123456789"
_SEPARATOR = ", "
# What may stand between a bracket and a number that is none of the codec's: `[ 12`, `[-3`, `[.5`.
_LOOSE = re.compile(r"\[[\s.+-]*")

OUTSIDE = ""
"""The state outside of brackets; any other is the text from the bracket on."""


class BoxGrammar:
    """Which texts can go on to a box; a state is the text since the bracket, or :data:`OUTSIDE`.

    Args:
        mode: The codec's: ``norm1000``, ``norm1`` or ``pixel``.
        size: Width and height of the image in pixels, for ``pixel``.
    """

    def __init__(self, mode: str, size: tuple[int, int] | None = None) -> None:
        if mode not in BOX_MODES:
            raise ValueError(f"unknown box mode {mode!r}: use one of {', '.join(BOX_MODES)}")
        if mode == "pixel" and size is None:
            raise ValueError("boxes in pixels end where the image ends: its width and height are needed")
        self.decimals = 3 if mode == "norm1" else 0
        full = {"norm1000": 999, "norm1": 1000}
        self.limits = (full[mode],) * 2 if size is None or mode != "pixel" else size
        """Largest x and y, in units of the last digit."""

    @property
    def alphabet(self) -> str:
        """The letters a box is written with, less its opening bracket."""
        return _DIGITS + _SEPARATOR + "]" + "." * bool(self.decimals)

    def advance(self, state: str, text: str) -> str | None:
        """The state after some text; ``None`` if the text opens or continues a box that cannot be one."""
        for letter in text:
            if is_open(state):
                if not self.continues(state, letter):
                    return None
                state = OUTSIDE if letter == "]" else state + letter
            elif letter == "[":
                state = letter
            elif state and letter in _DIGITS:
                if state != "[" or not self.continues(state, letter):
                    return None
                state += letter
            elif state:
                state = state + letter if _LOOSE.fullmatch(state + letter) else OUTSIDE
        return state

    def continues(self, state: str, letter: str) -> bool:
        """Whether an open box can go on with a letter."""
        *done, number = state[1:].split(",")
        if done and not number.startswith(" "):
            return letter == " " and not number
        number = number.removeprefix(" ")
        low, high = self._range(done)
        if letter in _DIGITS or letter == ".":
            return self._can_become(number + letter, low, high)
        if letter not in ",]" or (letter == "]") != (len(done) == 3):
            return False
        return self._is_number(number) and low <= self._value(number) <= high

    def _range(self, done: Sequence[str]) -> tuple[int, int]:
        """The smallest and largest value of the number after those that are done."""
        high = self.limits[len(done) % 2]
        return (self._value(done[len(done) - 2].strip()) if len(done) > 1 else 0), high

    def _is_number(self, text: str) -> bool:
        if self.decimals:
            return re.fullmatch(rf"[01]\.\d{{{self.decimals}}}", text) is not None
        return re.fullmatch(r"0|[1-9]\d*", text) is not None

    @staticmethod
    def _value(number: str) -> int:
        return int(number.replace(".", ""))

    def _can_become(self, start: str, low: int, high: int) -> bool:
        """Whether some number from ``low`` to ``high``, as the codec writes it, starts so."""
        if self.decimals:
            if re.fullmatch(rf"\d(\.\d{{0,{self.decimals}}})?", start) is None:
                return False
            digits = start.replace(".", "")
            first, step = int(digits), 10 ** (1 + self.decimals - len(digits))
            return first * step <= high and (first + 1) * step - 1 >= low
        if re.fullmatch(r"0|[1-9]\d*", start) is None:
            return False
        first, step = int(start), 1
        while first * step <= high:
            if (first + 1) * step - 1 >= low:
                return True
            if not first:
                return False
            step *= 10
        return False


def is_open(state: str) -> bool:
    """Whether a box has been begun: a bracket and a digit."""
    return len(state) > 1 and state[1] in _DIGITS


class BoxTokens:
    """A tokenizer's vocabulary as letters, made ready for :class:`BoxConstraint` once.

    Args:
        tokenizer: Any tokenizer of transformers.
        mode: The codec's.

    Raises:
        ValueError: If some letter of a box has no token of its own: then a box could come to a dead end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, mode: str) -> None:
        self.mode = mode
        self.size = len(tokenizer)
        self.texts = token_texts(tokenizer)
        missing = sorted(set(BoxGrammar(mode, (1, 1)).alphabet) - {text for text in self.texts if len(text) == 1})
        if missing:
            raise ValueError(f"the tokenizer has no token for {missing} alone, so boxes cannot be kept well-formed")
        letters = set(BoxGrammar(mode, (1, 1)).alphabet)
        # Inside a box: what is made of its letters, up to where it ends.
        self.inside = [k for k, text in enumerate(self.texts) if text and set(text.split("]")[0]) <= letters]
        # Elsewhere only these can do harm: a bracket of their own, or a number behind the last token's bracket.
        self.outside = [k for k, text in enumerate(self.texts) if "[" in text or _starts_number(text)]


def _starts_number(text: str) -> bool:
    return re.match(r"[\s.+-]*\d", text) is not None


def token_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What each token adds to a text when it is decoded; nothing for special tokens.

    Decoded behind another token, not alone: SentencePiece drops the space that begins a text. A token with a part of a
    letter only is some other letter, never one of a box.
    """
    special = set(tokenizer.all_special_ids)
    special |= {k for k, token in tokenizer.added_tokens_decoder.items() if token.special}
    options: dict[str, Any] = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    anchor = next(k for k in range(len(tokenizer)) if k not in special and tokenizer.decode([k], **options).strip())
    pairs = [[anchor, k] for k in range(len(tokenizer))]
    start = len(tokenizer.decode([anchor], **options))
    texts = tokenizer.batch_decode(pairs, **options)
    return ["" if k in special else text[start:] for k, text in enumerate(texts)]


class BoxConstraint(LogitsProcessor):
    """Leaves only tokens that keep every box of the answers well-formed; for ``generate``'s ``logits_processor``.

    What has been said is read from the ids each time, so that beams and assisted generation may go back in the text.

    Args:
        tokens: The vocabulary.
        prompt_length: Tokens of the prompts, which are left out.
        sizes: For each prompt the width and height, in pixels, of the image that boxes are on; ``None`` without one.
            Needed for boxes in pixels: prompts without an image are then left alone.
    """

    def __init__(
        self,
        tokens: BoxTokens,
        prompt_length: int,
        sizes: Sequence[tuple[int, int] | None] | None = None,
    ) -> None:
        if sizes is None and tokens.mode == "pixel":
            raise ValueError("boxes in pixels end where the image ends: the sizes of the images are needed")
        self.tokens, self.prompt_length = tokens, prompt_length
        self.sizes = None if tokens.mode != "pixel" else sizes
        self._grammar = lru_cache(maxsize=None)(partial(BoxGrammar, tokens.mode))
        self._verdict = lru_cache(maxsize=4096)(self._judge)
        self._seen: dict[tuple[int, ...], str] = {}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Set the scores of all tokens that would spoil a box to minus infinity."""
        scores = scores.clone()
        seen: dict[tuple[int, ...], str] = {}
        sizes = self.sizes or [None]
        for row, ids in enumerate(input_ids[:, self.prompt_length :].tolist()):
            size = sizes[row * len(sizes) // len(input_ids)]
            if self.tokens.mode == "pixel" and size is None:
                continue
            state = self._state(tuple(ids), size)
            seen[tuple(ids)] = state
            allowed, chosen = self._verdict(state, size)
            if allowed:
                kept = scores[row, chosen].clone()
                scores[row] = float("-inf")
                scores[row, chosen] = kept
            else:
                scores[row, chosen] = float("-inf")
        self._seen = seen
        return scores

    def _state(self, ids: tuple[int, ...], size: tuple[int, int] | None) -> str:
        """The state after some tokens, from the one before the last where it is known."""
        known = self._seen.get(ids[:-1]) if ids else None
        state, rest = (known, ids[-1:]) if known is not None else (OUTSIDE, ids)
        for token in rest:
            text = self.tokens.texts[token] if token < self.tokens.size else ""
            after = self._grammar(size).advance(state, text)
            # Only what was said before the constraint, or against it, can be malformed: it is over with.
            state = OUTSIDE if after is None else after
        return state

    def _judge(self, state: str, size: tuple[int, int] | None) -> tuple[bool, torch.Tensor]:
        """Whether the ids returned are the only ones allowed, or the ones forbidden."""
        grammar, texts = self._grammar(size), self.tokens.texts
        if is_open(state):
            return True, torch.tensor([k for k in self.tokens.inside if grammar.advance(state, texts[k]) is not None])
        forbidden = [k for k in self.tokens.outside if grammar.advance(state, texts[k]) is None]
        return False, torch.tensor(forbidden, dtype=torch.long)
