"""T5's tokenizer for CLIP's text encoder: a sentencepiece model without a token for the beginning of a text."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
import torch
from transformers import PreTrainedTokenizerFast, T5Tokenizer

from cloc_mllm.errors import ClocError
from cloc_mllm.models.modeling_cloc import ClocModel
from cloc_mllm.models.processing_cloc import ClocProcessor
from cloc_mllm.training.presets.config import PretrainConfig, load_config
from cloc_mllm.training.presets.options import TokenizerOptions
from cloc_mllm.training.pretraining.encoder import build_encoder, load_encoder
from cloc_mllm.training.pretraining.tokenizer import load_tokenizer, train_text_tokenizer
from cloc_mllm.training.running.launch import World
from tests.builders import CORPUS, tiny_tokenizer
from tests.builders_training import CONFIGS, TINY_ENCODER, write_regions

ALONE = World(0, 0, 1, 1, True)
TEXTS = ["A red square", "the SMALL yellow star left of two blue rings", "ring"]


def train_spiece(folder: Path, **ids: int) -> Path:
    """A folder with nothing but a sentencepiece model, as T5's first checkpoints came."""
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(folder / "spiece"),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
        **(ids or {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}),
    )
    (folder / "spiece.vocab").unlink()
    return folder


def built(tmp_path: Path, *overrides: str) -> tuple[ClocModel, ClocProcessor]:
    if not (tmp_path / "data").exists():
        write_regions(tmp_path / "data", 12)
    where = (f"run.output={tmp_path / 'run'}", f"data.train={tmp_path / 'data'}")
    config = load_config(CONFIGS / "pretrain_quick.yaml", [*TINY_ENCODER, *where, *overrides])
    assert isinstance(config, PretrainConfig)
    model, processor = build_encoder(config, ALONE)
    return model.eval(), processor


def test_t5_from_a_bare_sentencepiece_model_reads_it_as_sentencepiece_does(tmp_path: Path) -> None:
    folder = train_spiece(tmp_path / "t5")
    tokenizer = load_tokenizer(str(folder))
    assert isinstance(tokenizer, T5Tokenizer)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, None)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    for text in CORPUS:
        assert tokenizer(text)["input_ids"] == [*reference.encode(text), 1]


@torch.no_grad()
def test_every_text_is_read_at_its_own_end_whatever_its_padding(tmp_path: Path) -> None:
    model, processor = built(tmp_path, f"tokenizer.path={train_spiece(tmp_path / 't5')}", "tokenizer.max_length=77")
    assert model.config.text_config.eos_token_id == 1
    inputs = processor.tokenize(TEXTS)
    output = model.text_model(**inputs)
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        end = ids.index(1)
        assert set(ids[end + 1 :]) <= {0}
        # CLIP's text encoder normalises before it picks the token.
        torch.testing.assert_close(output.pooler_output[row], output.last_hidden_state[row, end])
        alone = model.text_model(**processor.tokenize([TEXTS[row]])).pooler_output[0]
        torch.testing.assert_close(output.pooler_output[row], alone, atol=1e-6, rtol=1e-5)
    lower, upper = (processor.tokenize([text])["input_ids"].tolist() for text in ("a red square", "A RED Square"))
    assert lower == upper


def test_long_texts_are_cut_at_77_tokens_and_keep_their_end(tmp_path: Path) -> None:
    model, processor = built(tmp_path, f"tokenizer.path={train_spiece(tmp_path / 't5')}", "tokenizer.max_length=77")
    ids = processor.tokenize(["red square " * 100])["input_ids"]
    assert ids.shape == (1, 77)
    assert ids[0, -1] == 1
    assert model.config.text_config.max_position_embeddings == 77


@torch.no_grad()
def test_the_export_holds_the_tokenizer(tmp_path: Path) -> None:
    model, processor = built(tmp_path, f"tokenizer.path={train_spiece(tmp_path / 't5')}")
    for part in (model, processor):
        part.save_pretrained(tmp_path / "export")
    again, reloaded = load_encoder(tmp_path / "export")
    first, second = (p.tokenize(TEXTS) for p in (processor, reloaded))
    assert torch.equal(first["input_ids"], second["input_ids"])
    expected = model.get_text_features(**first).pooler_output
    torch.testing.assert_close(again.eval().get_text_features(**second).pooler_output, expected)


def test_a_sentencepiece_model_is_trained_from_the_captions(tmp_path: Path) -> None:
    model, processor = built(tmp_path, "tokenizer.kind=sentencepiece")
    assert isinstance(processor.tokenizer, T5Tokenizer)
    assert model.config.text_config.vocab_size == len(processor.tokenizer) <= 300
    ids = processor.tokenize(["Red Square"])["input_ids"][0].tolist()
    assert ids[-1] == 1
    assert processor.tokenizer.unk_token_id not in ids


def test_both_kinds_cover_what_they_were_trained_on() -> None:
    for kind in ("bpe", "sentencepiece"):
        tokenizer = train_text_tokenizer(CORPUS, TokenizerOptions.model_validate({"kind": kind, "vocab_size": 300}))
        for text in CORPUS:
            decoded = tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True)
            assert decoded.strip() == text


def test_an_end_at_2_or_one_that_is_never_written_is_refused(tmp_path: Path) -> None:
    llama_like = train_spiece(tmp_path / "two", unk_id=0, bos_id=1, eos_id=2, pad_id=3)
    tokenizer = T5Tokenizer.from_pretrained(str(llama_like), extra_ids=0)
    assert tokenizer.eos_token_id == 2
    tokenizer.save_pretrained(tmp_path / "saved")
    with pytest.raises(ClocError, match="end of text at id 2"):
        built(tmp_path, f"tokenizer.path={tmp_path / 'saved'}")
    core = tiny_tokenizer()
    core.backend_tokenizer.post_processor = None
    bare = PreTrainedTokenizerFast(
        tokenizer_object=core.backend_tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(ClocError, match="does not end texts with <eos>"):
        built(tmp_path, f"tokenizer.path={tmp_path / 'bare'}")
