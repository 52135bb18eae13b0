"""Tokenizers, loaded or trained from a run's own texts, so that models from scratch can be small and need no hub."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, T5Tokenizer

from cloc_mllm.data.messages import messages_of
from cloc_mllm.data.readers import open_samples
from cloc_mllm.errors import ClocError
from cloc_mllm.training.presets.options import SourceOptions, TokenizerOptions
from cloc_mllm.training.running import launch

# `<eos>` must not be 2: transformers' CLIP takes 2 as a sign of an old checkpoint and pools at the largest id.
TEXT_TOKENS = ("<pad>", "<bos>", "<unk>", "<eos>")

SENTENCEPIECE_FILE = "spiece.model"

CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""ChatML's markers: the processor recognises them and picks its template by them."""


def build_tokenizer(
    options: TokenizerOptions, train: Callable[[], PreTrainedTokenizerFast], folder: Path, world: launch.World
) -> PreTrainedTokenizerFast:
    """Load or train a tokenizer; the main process trains, and every process loads the same file.

    Args:
        options: The preset's `tokenizer` block.
        train: Trains one, where the options name none.
        folder: Where a trained tokenizer is kept in the run folder.
        world: This process's place.

    Raises:
        ClocError: The path holds no tokenizer.
    """
    if options.path is None:
        if world.is_main:
            train().save_pretrained(str(folder))
        launch.barrier()
    return load_tokenizer(str(folder) if options.path is None else options.path)


def load_tokenizer(path: str) -> PreTrainedTokenizerFast:
    """Load a tokenizer.

    Args:
        path: A hub name or a folder; one that holds nothing but a `spiece.model` is read as T5's.

    Raises:
        ClocError: There is none.
    """
    folder = Path(path)
    described = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    try:
        if (folder / SENTENCEPIECE_FILE).is_file() and not described:
            return T5Tokenizer.from_pretrained(path)
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ClocError(f"holds no tokenizer: {error}", file=path) from error


def train_text_tokenizer(texts: Iterable[str], options: TokenizerOptions) -> PreTrainedTokenizerFast:
    """Train the tokenizer of a text encoder, of the kind that the options name.

    Byte-level BPE wraps every text in `<bos>` and `<eos>`; a sentencepiece model ends it with `</s>`, as T5 does.

    Args:
        texts: The corpus.
        options: Kind, vocabulary size, and whether texts are lower-cased (by the processor, hence here as well).
    """
    if options.kind == "sentencepiece":
        return _train_sentencepiece(texts, options)
    core = _train(texts, options, TEXT_TOKENS, add_prefix_space=True)
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>",
        special_tokens=[("<bos>", TEXT_TOKENS.index("<bos>")), ("<eos>", TEXT_TOKENS.index("<eos>"))],
    )
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk")}
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=options.max_length, **names)


def _train_sentencepiece(texts: Iterable[str], options: TokenizerOptions) -> PreTrainedTokenizerFast:
    """Train a unigram model with T5's special tokens: `<pad>` 0, `</s>` 1, `<unk>` 2, no beginning of text."""
    # Imported here: nothing else needs it.
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(text.lower() if options.lowercase else text for text in texts),
        model_writer=model,
        model_type="unigram",
        vocab_size=options.vocab_size,
        hard_vocab_limit=False,  # a small corpus has fewer pieces than that
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, SENTENCEPIECE_FILE).write_bytes(model.getvalue())
        # T5's sentinels are for its own task.
        return T5Tokenizer.from_pretrained(folder, extra_ids=0, model_max_length=options.max_length)


def train_chat_tokenizer(texts: Iterable[str], options: TokenizerOptions) -> PreTrainedTokenizerFast:
    """Train the tokenizer of a language model from scratch, with ChatML's markers.

    Args:
        texts: The corpus.
        options: Vocabulary size, and whether texts are lower-cased.
    """
    # The template writes roles and line breaks around every turn: they deserve tokens of their own.
    turns = (text for line in texts for text in (line, "user\n", "assistant\n"))
    core = _train(turns, options, CHAT_TOKENS, add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|endoftext|>", eos_token="<|im_end|>")


def corpus(
    paths: str | Sequence[str] | Sequence[SourceOptions], files: Sequence[str] = ("regions.jsonl",)
) -> Iterator[str]:
    """Yield every text of region-text samples or conversations, without opening an image.

    Args:
        paths: A data folder or file, or several, or the sources of a mixture.
        files: Which files of a folder to read, those of them that it has.

    Raises:
        ClocError: A path cannot be opened, or none holds a text.
    """
    found = False
    for source in [paths] if isinstance(paths, str) else paths:
        path = source.path if isinstance(source, SourceOptions) else source
        wanted = [name for name in files if Path(path, name).is_file()] or list(files[:1])
        for name in wanted:
            samples = open_samples(path, name)
            for index in range(len(samples)):
                for text in texts_of(samples[index]):
                    found = True
                    yield text
    if not found:
        raise ClocError("holds no text to train a tokenizer on", file=str(paths))


def texts_of(sample: Mapping[str, Any]) -> Iterator[str]:
    """Yield the texts of one sample as read from its file, whatever its kind; malformed parts are left out."""
    captions = sample.get("captions") or [sample.get("caption")]
    regions = sample.get("regions")
    named = [r.get("text") for r in regions if isinstance(r, Mapping)] if isinstance(regions, list) else []
    yield from (text for text in [*captions, *named] if isinstance(text, str) and text)
    if "messages" not in sample and "conversations" not in sample:
        return
    for message in messages_of(sample):
        content = message.get("content") if isinstance(message, Mapping) else None
        items = [{"text": content}] if isinstance(content, str) else content or []
        for item in items:
            if isinstance(item, Mapping):
                yield from (v for v in (item.get("text"), item.get("phrase")) if isinstance(v, str) and v)


def _train(
    texts: Iterable[str], options: TokenizerOptions, special: Sequence[str], *, add_prefix_space: bool
) -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocab_size,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator((text.lower() if options.lowercase else text for text in texts), trainer)
    return core
