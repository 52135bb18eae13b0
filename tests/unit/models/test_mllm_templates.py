"""Chat templates: the right markers for each family, and the same reading as the stock tokeniser's."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cloc_mllm.models.answer_text import phrase_before
from cloc_mllm.models.chat_template import build_chat_template, detect_style
from cloc_mllm.models.conversation_cloc_mllm import ConversationError
from cloc_mllm.models.modeling_cloc_mllm import ClocMllmForConditionalGeneration
from cloc_mllm.models.processing_cloc_mllm import ClocMllmProcessor
from tests.builders import tiny_cloc
from tests.builders_mllm import assistant, image, text, tiny_llm_tokenizer, tiny_mllm, user

TURNS = [
    {"role": "system", "content": "be brief"},
    user(image(), text("what is this")),
    assistant("a ring"),
    user("why"),
]
LLAMA3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def processor_for(tokenizer: PreTrainedTokenizerFast, **options: str) -> ClocMllmProcessor:
    encoder, processor = tiny_cloc()
    return ClocMllmProcessor.from_parts(processor.image_processor, tokenizer, encoder.config.vision_config, **options)


def test_chatml_does_not_write_smollm2s_begin_token_twice() -> None:
    tokenizer = tiny_llm_tokenizer(bos_token="<|im_start|>", eos_token="<|im_end|>")
    processor = processor_for(tokenizer)
    assert detect_style(tokenizer) == "chatml"
    assert processor.apply_chat_template(TURNS, add_generation_prompt=True) == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n<image>\nwhat is this<|im_end|>\n"
        "<|im_start|>assistant\na ring<|im_end|>\n<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_base_models_end_token_gives_way_to_the_end_of_a_turn() -> None:
    processor = processor_for(tiny_llm_tokenizer(eos_token="<|endoftext|>"))
    assert processor.tokenizer.eos_token == "<|im_end|>"


def test_llama3() -> None:
    processor = processor_for(tiny_llm_tokenizer(LLAMA3, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"))
    assert processor.apply_chat_template(TURNS[2:], add_generation_prompt=True) == (
        "<|begin_of_text|><|start_header_id|>assistant<|end_header_id|>\n\na ring<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nwhy<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_a_base_model_without_markers() -> None:
    processor = processor_for(tiny_llm_tokenizer(("<s>", "</s>"), bos_token="<s>", eos_token="</s>"))
    assert processor.apply_chat_template(TURNS, add_generation_prompt=True) == (
        "<s>SYSTEM:\nbe brief</s>\nUSER:\n<image>\nwhat is this</s>\n"
        "ASSISTANT:\na ring</s>\nUSER:\nwhy</s>\nASSISTANT:\n"
    )
    batch = processor.encode(TURNS[:3], return_labels=True)
    assert processor.tokenizer.decode(batch["labels"][batch["labels"] != -100]) == "a ring</s>"
    assert int((batch["input_ids"] == processor.tokenizer.bos_token_id).sum()) == 1


USER = "<image>\nwhat is this"


@pytest.mark.parametrize(
    ("special", "style", "expected"),
    [
        (
            ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
            "gemma",
            f"<bos><start_of_turn>user\nbe brief\n\n{USER}<end_of_turn>\n<start_of_turn>model\na ring<end_of_turn>\n"
            "<start_of_turn>user\nwhy<end_of_turn>\n<start_of_turn>model\n",
        ),
        (
            ("<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
            "phi3",
            f"<s><|system|>\nbe brief<|end|>\n<|user|>\n{USER}<|end|>\n<|assistant|>\na ring<|end|>\n"
            "<|user|>\nwhy<|end|>\n<|assistant|>\n",
        ),
        (
            ("<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>"),
            "phi4",
            f"<|im_start|>system<|im_sep|>be brief<|im_end|><|im_start|>user<|im_sep|>{USER}<|im_end|>"
            "<|im_start|>assistant<|im_sep|>a ring<|im_end|><|im_start|>user<|im_sep|>why<|im_end|>"
            "<|im_start|>assistant<|im_sep|>",
        ),
        (
            ("<s>", "</s>", "[INST]", "[/INST]"),
            "mistral",
            f"<s>[INST] be brief\n\n{USER}[/INST] a ring</s>[INST] why[/INST]",
        ),
        (
            ("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
            "mistral",
            f"<s>[SYSTEM_PROMPT]be brief[/SYSTEM_PROMPT][INST]{USER}[/INST]a ring</s>[INST]why[/INST]",
        ),
    ],
)
def test_the_markers_of_other_families(special: tuple[str, ...], style: str, expected: str) -> None:
    """As the model cards of Gemma, Phi-3, Phi-4 and Mistral write a conversation."""
    ends = {"bos_token": special[0], "eos_token": special[1]} if special[1] in ("<eos>", "</s>") else {}
    tokenizer = tiny_llm_tokenizer(special, **(ends or {"eos_token": special[0]}))
    processor = processor_for(tokenizer)
    assert detect_style(tokenizer) == style
    assert processor.apply_chat_template(TURNS, add_generation_prompt=True) == expected
    batch = processor.encode(TURNS[:3], return_labels=True)
    learnt = processor.tokenizer.decode(batch["labels"][batch["labels"] != -100])
    assert learnt.strip() == f"a ring{processor.tokenizer.eos_token}"
    prompt = processor.encode(TURNS[:2], add_generation_prompt=True)["input_ids"][0].tolist()
    assert batch["input_ids"][0].tolist()[: len(prompt)] == prompt


def test_vicuna_is_asked_for_by_name() -> None:
    tokenizer = tiny_llm_tokenizer(("<s>", "</s>"), bos_token="<s>", eos_token="</s>")
    processor = processor_for(tokenizer, chat_style_name="vicuna")
    assert processor.apply_chat_template(TURNS, add_generation_prompt=True) == (
        f"<s>be brief USER: {USER} ASSISTANT: a ring</s>USER: why ASSISTANT:"
    )


def test_a_system_prompt_is_never_lost() -> None:
    special = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
    processor = processor_for(tiny_llm_tokenizer(special, bos_token="<bos>", eos_token="<eos>"))
    with pytest.raises(ConversationError, match="a system prompt with no user's turn behind it"):
        processor.encode([TURNS[0]])


def test_a_style_that_is_not_the_tokenizers_is_refused() -> None:
    with pytest.raises(ValueError, match="chat style 'llama3' is not this model's"):
        processor_for(tiny_llm_tokenizer(), chat_style_name="llama3")
    with pytest.raises(ValueError, match="unknown chat style 'chat'"):
        processor_for(tiny_llm_tokenizer(), chat_style_name="chat")
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        build_chat_template(tiny_llm_tokenizer(("<s>",), bos_token="<s>"))


def test_a_template_of_ones_own() -> None:
    own = (
        "{% for m in messages %}{{ m.role }}> {% if m.role == 'assistant' %}{% generation %}{{ m.content[0].text }}"
        "<|im_end|>{% endgeneration %}{% else %}{% for i in m.content %}"
        "{{ '<image>' if i.type == 'image' else i.text }}{% endfor %}{% endif %};{% endfor %}"
    )
    processor = processor_for(tiny_llm_tokenizer(), chat_template=own)
    batch = processor.encode(TURNS[1:3], return_labels=True)
    assert processor.tokenizer.decode(batch["labels"][batch["labels"] != -100]) == "a ring<|im_end|>"


def test_a_template_that_would_teach_nothing_or_lose_images_is_refused() -> None:
    own = "{% for m in messages %}{{ m.content[0].text }}{% endfor %}"
    with pytest.raises(ValueError, match=r"the chat template lacks \{% generation %\}"):
        processor_for(tiny_llm_tokenizer(), chat_template=own)
    silent = processor_for(tiny_llm_tokenizer())
    silent.chat_template = own  # as a checkpoint made elsewhere may have it
    with pytest.raises(ConversationError, match=r"the chat template lacks \{% generation %\}"):
        silent.encode([user("why"), assistant("yes")], return_labels=True)
    with pytest.raises(ConversationError, match="0 <image>, but the conversation holds 1: the chat template drops"):
        silent.encode(TURNS[1:2])


def test_a_tokenizer_that_puts_spaces_in_front() -> None:
    """SentencePiece's habit: a text on its own begins with a space, which a piece of a text must not."""
    letters = sorted(set("abcdefghijklmnopqrstuvwxyz ?\n:USERAITNM▁"))
    words = ["<unk>", "<s>", "</s>", *letters, "▁a", "▁r", "<0x0A>"]
    core = Tokenizer(models.BPE({word: k for k, word in enumerate(words)}, [("▁", "a"), ("▁", "r")], unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    processor = processor_for(tokenizer)
    batch = processor.encode([user("why"), assistant("a ring")], return_labels=True)
    pieces = tokenizer.convert_ids_to_tokens(batch["labels"][batch["labels"] != -100].tolist())
    assert pieces == ["a", "▁r", "i", "n", "g", "</s>"]


def test_words_kept_whole_are_still_read_plainly() -> None:
    """An added token that is not special is matched even where special ones are not: typed text must escape it too."""
    tokenizer = tiny_llm_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    processor = processor_for(tokenizer)
    ids = processor.encode([user("a <tool> b")])["input_ids"][0].tolist()
    assert tokenizer.convert_tokens_to_ids("<tool>") not in ids
    assert "a <tool> b" in processor.tokenizer.decode(ids)


def test_a_whitespace_pre_tokenizer_without_line_breaks() -> None:
    words = ["[unk]", "</s>", "USER", "ASSISTANT", ":", "a", "ring", "why", "<", "image", ">"]
    core = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, "[unk]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="[unk]")
    batch = processor_for(tokenizer).encode([user("why"), assistant("a ring")], return_labels=True)
    assert tokenizer.convert_ids_to_tokens(batch["labels"][batch["labels"] != -100].tolist()) == ["a", "ring", "</s>"]


@pytest.mark.parametrize(
    ("said", "phrase"),
    [
        ("a red ring", "a red ring"),
        ("It is here. The red ring ", "The red ring"),
        ("a ring, and a cross", "a cross"),
        ("a ring [1, 2, 3, 4] and then a cross", "a cross"),
        ("Here it is:", "Here it is"),
        ("Andrew", "Andrew"),
        ("a ring [1, 2, 3, 4]", ""),
        ("", ""),
    ],
)
def test_the_phrase_before_a_box(said: str, phrase: str) -> None:
    assert phrase_before(said) == phrase


def test_a_language_model_without_room_for_the_control_tokens_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fixed(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("embeddings of a fixed size")

    with monkeypatch.context() as patch:
        patch.setattr(ClocMllmForConditionalGeneration, "resize_token_embeddings", fixed)
        with pytest.raises(ValueError, match=r"for 350 tokens and cannot be given more, .* needs 354: embeddings of a"):
            tiny_mllm()
        patch.setattr(ClocMllmForConditionalGeneration, "resize_token_embeddings", lambda *args, **kwargs: None)
        with pytest.raises(ValueError, match="has embeddings for 350 tokens, but the tokenizer needs 354"):
            tiny_mllm()


def test_ids_beyond_the_number_of_tokens_get_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary may have gaps; its highest id, not its length, is what the embeddings have to hold."""
    real = PreTrainedTokenizerFast.get_vocab
    monkeypatch.setattr(PreTrainedTokenizerFast, "get_vocab", lambda self: {**real(self), "<far>": 500})
    model, _ = tiny_mllm()
    assert len(model.get_input_embeddings().weight) > 500
