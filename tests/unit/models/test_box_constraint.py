"""Boxes as text that are always well-formed: any tokenizer, any model, and ordinary text left as it is."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast

from cloc_mllm.inference.predictor import Predictor
from cloc_mllm.models.box_constraint import OUTSIDE, BoxConstraint, BoxGrammar, BoxTokens, is_open
from cloc_mllm.models.boxes import BOX_MODES, BoxCodec
from cloc_mllm.models.processing_cloc_mllm import ClocMllmProcessor
from cloc_mllm.training.presets.options import TokenizerOptions
from cloc_mllm.training.pretraining.tokenizer import train_text_tokenizer
from tests.builders_mllm import assistant, image, text, tiny_llm_tokenizer, tiny_mllm, user

SIZE = (437, 85)
LINES = [
    "a red ring [12, 40, 530, 999], and a cross [0, 0, 1, 7].",
    "see [1] and [a] or [10, 20, 100, 200] [345, 678, 900, 901]",
    "0.125, 0.500] [0.001, 0.999, 1.000, 1.000]; 3.5 or [ 12, -3 [-5, .5 [.5, ]],",
    "the digits 0 1 2 3 4 5 6 7 8 9 are [here]",
]
# What the decoder would call a box that cannot be read, where the model has begun one.
SPOILT = re.compile(r"\[[\s.+-]*\d")


def byte_level() -> PreTrainedTokenizerFast:
    """As Qwen's and Llama 3's, with numbers, brackets and separators in pieces of any length."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "merged_with_next"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|im_start|>", "<|im_end|>"]
    core.train_from_iterator(
        LINES * 3,
        trainers.BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """As Llama 2's: spaces are letters, the first of a text is added and dropped, bytes stand in for what is rare."""
    pieces = ["<unk>", "<s>", "</s>", "▁", *sorted(set("".join(LINES)) - {" "}), "<0x0A>", "<0x31>"]
    merges = [
        ("▁", "["),
        ("1", "2"),
        (",", "▁"),
        ("▁", "4"),
        ("▁4", "0"),
        ("]", ","),
        ("0", "]"),
        ("[", "1"),
        ("0", "0"),
    ]
    merges += [("[1", "2"), ("00", "0"), ("]", ".")]
    words = [*pieces, *("".join(pair) for pair in merges)]
    core = Tokenizer(
        models.BPE({word: k for k, word in enumerate(words)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    return tokenizer


def unigram() -> Any:
    options = TokenizerOptions(kind="sentencepiece", vocab_size=400, lowercase=False)
    return train_text_tokenizer(LINES * 20, options)


TOKENIZERS = {"byte_level": byte_level, "sentencepiece_like": sentencepiece_like, "unigram": unigram}


@pytest.fixture(scope="module")
def vocabularies() -> dict[tuple[str, str], tuple[Any, BoxTokens]]:
    made = {name: make() for name, make in TOKENIZERS.items()}
    return {
        (name, mode): (tokenizer, BoxTokens(tokenizer, mode)) for name, tokenizer in made.items() for mode in BOX_MODES
    }


def boxes_and_faults(said: str, mode: str) -> tuple[int, list[str]]:
    """How many boxes a text has, and what was begun as one and is none."""
    found = BoxCodec(mode).decode(said, *SIZE)
    return len(found.boxes), [piece for piece in found.unparsed if SPOILT.match(piece)]


@given(st.sampled_from(BOX_MODES), st.lists(st.floats(0, 1), min_size=4, max_size=4))
@settings(max_examples=200, deadline=None)
def test_every_box_the_codec_writes_is_in_the_grammar(mode: str, shares: list[float]) -> None:
    (x1, x2), (y1, y2) = sorted(shares[::2]), sorted(shares[1::2])
    box = [x1 * SIZE[0], y1 * SIZE[1], x2 * SIZE[0], y2 * SIZE[1]]
    written = BoxCodec(mode).encode(box, *SIZE)
    grammar = BoxGrammar(mode, SIZE)
    assert grammar.advance(OUTSIDE, f"a ring {written}, and") == OUTSIDE
    for end in range(2, len(written)):
        assert grammar.advance(OUTSIDE, written[:end]) == written[:end]


@given(st.sampled_from(BOX_MODES), st.data())
@settings(max_examples=150, deadline=None)
def test_every_way_through_the_grammar_ends_in_a_box(mode: str, data: st.DataObject) -> None:
    grammar = BoxGrammar(mode, SIZE)
    state, said = "[", "["
    while state:
        ways = [letter for letter in grammar.alphabet if grammar.advance(state, letter) is not None]
        if state == "[":
            ways = [letter for letter in ways if letter.isdigit()]
        assert ways, f"a dead end: {said}"
        said += data.draw(st.sampled_from(ways))
        state = grammar.advance(state, said[-1])  # type: ignore[assignment]
    assert boxes_and_faults(said, mode) == (1, [])
    assert BoxCodec(mode).encode(BoxCodec(mode).decode(said, *SIZE).boxes[0], *SIZE) == said


def test_a_number_may_start_so_if_some_number_does() -> None:
    """Against all numbers written out."""
    for low, high in ((0, 117), (23, 117), (99, 117), (110, 117), (7, 9), (0, 0), (10, 1000)):
        grammar, written = BoxGrammar("pixel", (high, high)), [str(value) for value in range(low, high + 1)]
        for start in [str(value) for value in range(1200)] + ["00", "01", "."]:
            expected = any(number.startswith(start) for number in written)
            assert grammar._can_become(start, low, high) == expected, (start, low, high)
    grammar = BoxGrammar("norm1")
    for low in (0, 7, 500, 994, 1000):
        written = [f"{value / 1000:.3f}" for value in range(low, 1001)]
        for start in (
            "0",
            "1",
            "2",
            "0.",
            "1.",
            "0.0",
            "0.9",
            "1.0",
            "1.1",
            "0.00",
            "0.99",
            "0.995",
            "00",
            ".",
            "0.9990",
        ):
            assert grammar._can_become(start, low, 1000) == any(number.startswith(start) for number in written)


@pytest.mark.parametrize(
    ("said", "state"),
    [
        ("a ring", ""),
        ("see [a] and (3)", ""),
        ("[", "["),
        ("[ ", "[ "),
        ("[[", "["),
        ("[.", "[."),
        ("[...]", ""),
        ("[12", "[12"),
        ("[12, ", "[12, "),
        ("[12]", None),
        ("[ 12", None),
        ("[-5", None),
        ("[.5", None),
        ("[1000", None),
        ("[007", None),
        ("[12,40", None),
        ("[12, 40, 5", "[12, 40, 5"),
        ("[12, 40, 5,", None),
        ("[12, 40, 51, 40", "[12, 40, 51, 40"),
        ("[12, 40, 51, 39", "[12, 40, 51, 39"),
        ("[12, 40, 51, 39]", None),
        ("[12, 40, 11,", None),
        ("[12, 40, 51, 400, ", None),
        ("[12, 40, 51, 400]", ""),
        ("[12 a", None),
        ("[12, 40, 51, 400] [1", "[1"),
    ],
)
def test_states(said: str, state: str | None) -> None:
    assert BoxGrammar("norm1000").advance(OUTSIDE, said) == state


def say(tokenizer: Any, tokens: BoxTokens, seed: int, length: int = 60, constrained: bool = True) -> tuple[str, str]:
    """What a random model says that likes brackets, and what is left open."""
    torch.manual_seed(seed)
    constraint = BoxConstraint(tokens, 0, [SIZE])
    likes = torch.tensor([3.0 * ("[" in word) + 1.5 * bool(set(word) & set("0123456789,]")) for word in tokens.texts])
    ids = torch.zeros(1, 0, dtype=torch.long)
    ends = set(tokenizer.all_special_ids)
    for _ in range(length):
        scores = torch.randn(1, tokens.size) * 2 + likes
        scores = constraint(ids, scores) if constrained else scores
        assert scores.isfinite().any(), "nothing left to say"
        following = torch.multinomial(scores.softmax(dim=-1), 1)
        if int(following) in ends:
            break
        ids = torch.cat([ids, following], dim=1)
    said = tokenizer.decode(ids[0], skip_special_tokens=True)
    state = constraint._state(tuple(ids[0].tolist()), SIZE)
    return said, state if is_open(state) else ""


@pytest.mark.parametrize("mode", BOX_MODES)
@pytest.mark.parametrize("kind", list(TOKENIZERS))
def test_whatever_a_random_model_says_every_box_can_be_read(kind: str, mode: str, vocabularies: Any) -> None:
    tokenizer, tokens = vocabularies[kind, mode]
    boxes, spoilt = 0, 0
    for seed in range(25):
        said, rest = say(tokenizer, tokens, seed)
        assert said.endswith(rest)
        whole, faults = boxes_and_faults(said.removesuffix(rest), mode)
        assert not faults, said
        boxes += whole
        spoilt += len(boxes_and_faults(say(tokenizer, tokens, seed, constrained=False)[0], mode)[1])
    assert boxes > 10
    assert spoilt > 10, "without the constraint it would have said nothing wrong either"


@pytest.mark.parametrize("kind", list(TOKENIZERS))
def test_ordinary_text_is_left_alone(kind: str, vocabularies: Any) -> None:
    tokenizer, tokens = vocabularies[kind, "norm1000"]
    constraint = BoxConstraint(tokens, 1)
    scores = torch.randn(1, tokens.size + 5)
    for said in ("a red ring", "3 of (12, 40", "see [a] and [here", "1, 2] or 0.5", "[12, 40, 530, 999] and"):
        ids = torch.tensor([[7, *tokenizer.encode(said, add_special_tokens=False)]])
        changed = (constraint(ids, scores) != scores)[0].nonzero()[:, 0].tolist()
        assert all(SPOILT.search(tokens.texts[token]) for token in changed), said
    inside = torch.tensor([[7, *tokenizer.encode("a [12, 4", add_special_tokens=False)]])
    left = constraint(inside, scores)[0].isfinite().nonzero()[:, 0].tolist()
    assert left
    assert set("".join(tokens.texts[token] for token in left)) <= set("0123456789, ]")
    assert not set(left) & set(tokenizer.all_special_ids)


def test_tokens_are_read_as_they_are_decoded(vocabularies: Any) -> None:
    for (kind, _), (tokenizer, tokens) in vocabularies.items():
        ids = tokenizer.encode("a ring [12, 40, 530, 999]", add_special_tokens=False)
        assert "".join(tokens.texts[token] for token in ids).strip() == "a ring [12, 40, 530, 999]", kind
        assert all(not tokens.texts[token] for token in tokenizer.all_special_ids)


def test_a_tokenizer_without_the_letters_is_refused() -> None:
    words = ["[unk]", "</s>", "a", "1", ",", "]"]
    core = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, "[unk]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="[unk]")
    with pytest.raises(ValueError, match=r"no token for \[' ', ',', '0'"):
        BoxTokens(tokenizer, "norm1000")


def test_boxes_in_pixels_need_the_image(vocabularies: Any) -> None:
    with pytest.raises(ValueError, match="its width and height are needed"):
        BoxGrammar("pixel")
    with pytest.raises(ValueError, match="the sizes of the images are needed"):
        BoxConstraint(vocabularies["byte_level", "pixel"][1], 0)
    with pytest.raises(ValueError, match="unknown box mode 'norm'"):
        BoxGrammar("norm", SIZE)
    scores = torch.randn(2, 500)
    tokenizer, tokens = vocabularies["byte_level", "pixel"]
    ids = torch.tensor([tokenizer.encode("[1", add_special_tokens=False)] * 2)
    changed = (BoxConstraint(tokens, 0, [None, (9, 9)])(ids, scores) != scores).any(dim=1)
    assert changed.tolist() == [False, True]


class Likes(LogitsProcessor):
    """Makes an untrained model like what boxes are made of."""

    def __init__(self, tokens: BoxTokens) -> None:
        self.more = torch.tensor([6.0 * ("[" in word) + 4.0 * word.isdigit() for word in tokens.texts])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, : len(self.more)] += self.more
        return scores


@pytest.mark.parametrize(("mode", "beams"), [("norm1000", 1), ("norm1", 1), ("pixel", 1), ("pixel", 2)])
def test_generating(mode: str, beams: int) -> None:
    model, own = tiny_mllm(grounding="text")
    processor = ClocMllmProcessor.from_parts(
        own.image_processor, tiny_llm_tokenizer(), model.config.vision_config, grounding="text", box_mode=mode
    )
    questions = [[user(image(1, 437, 85), text("where?"))], [user(image(2, 20, 300), text("where is it now?"))]]
    inputs = processor.encode(questions, add_generation_prompt=True, return_original_sizes=True)
    sizes = inputs.pop("original_sizes")
    constraint = processor.constrain_boxes(inputs["input_ids"].shape[1], sizes)
    torch.manual_seed(0)
    boxes = 0
    for _ in range(2):
        output = model.generate_grounded(
            **inputs,
            do_sample=True,
            num_beams=beams,
            max_new_tokens=80,
            logits_processor=LogitsProcessorList([Likes(constraint[0].tokens), *constraint]),
        )
        for row, answer in enumerate(processor.post_process_grounding(output, sizes)):
            cut = output.sequences[row, -1] != processor.tokenizer.eos_token_id
            faults = [piece for piece in answer.unparsed if SPOILT.match(piece)]
            assert len(faults) <= int(cut), answer.text
            assert all(answer.text.endswith(piece) for piece in faults)
            boxes += len(answer.boxes)
            for box in answer.boxes:
                assert 0 <= box["box"][0] <= box["box"][2] <= sizes[row][0][0]
                assert 0 <= box["box"][1] <= box["box"][3] <= sizes[row][0][1]
    assert boxes > 0


def test_the_predictor_constrains_when_asked(tmp_path: Any) -> None:
    model, processor = tiny_mllm(grounding="text")
    predictor = Predictor(model, processor)
    talk = [user(image(1), text("where?")), assistant("[3, 4"), user("where?")]
    plain = predictor.chat([talk], max_new_tokens=8)[0]
    again = predictor.chat([talk], max_new_tokens=8, constrain_boxes=True)[0]
    stream = predictor.stream(talk, max_new_tokens=8, constrain_boxes=True)
    assert "".join(stream).strip() == again.text == stream.answer.text
    # Of what stood in the prompt nothing is open; a model that never opens a bracket answers as it did.
    if "[" not in plain.text:
        assert again.text == plain.text
    processor.save_pretrained(tmp_path)
    assert "box_tokens" not in (tmp_path / "processor_config.json").read_text()


def test_the_state_is_read_anew_where_the_text_went_back(vocabularies: Any) -> None:
    """Beams are re-ordered and drafts are taken back: the ids are what counts."""
    tokenizer, tokens = vocabularies["byte_level", "norm1000"]
    constraint = BoxConstraint(tokens, 0)
    said = [tokenizer.encode(one, add_special_tokens=False) for one in ("a [12, 4", "a ring", "a [1", "a [12, 40, 5")]
    scores = torch.randn(1, tokens.size)
    fresh = [BoxConstraint(tokens, 0)(torch.tensor([ids]), scores) for ids in said]
    for first, second in itertools.permutations(range(len(said)), 2):
        constraint(torch.tensor([said[first]]), scores)
        assert torch.equal(constraint(torch.tensor([said[second]]), scores), fresh[second])
