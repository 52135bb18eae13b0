"""The ``scenes`` suite: procedural scenes, for an encoder or an MLLM, told apart by ``config.json``."""

from __future__ import annotations

from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.encoders.localizers import build_localizers
from cloc_mllm.evaluation.encoders.measure import EncoderSettings
from cloc_mllm.evaluation.encoders.readouts import ClocEncoder, build_readouts
from cloc_mllm.evaluation.encoders.region_data import SceneTruth
from cloc_mllm.evaluation.mllms.questions import MllmSettings, evaluate_mllm, load_questions
from cloc_mllm.evaluation.suites.options import (
    ENCODER,
    MLLM,
    EvalOptions,
    NoSettings,
    Outcome,
    batch_size_of,
    model_type,
    other_model,
    settings_of,
)
from cloc_mllm.evaluation.suites.scenes_encoder import evaluate_encoder
from cloc_mllm.inference.predictor import Predictor

_VALIDATION = "validation"
_KNOWN_QUESTIONS = 1000


def run(options: EvalOptions) -> Outcome:
    """Measure the encoder or MLLM that a folder holds."""
    settings_of(NoSettings, options)
    kind = model_type(options.model)
    if kind == ENCODER:
        return _scenes_encoder(options)
    if kind == MLLM:
        return _scenes_mllm(options)
    raise other_model(kind, options)


def _scenes_encoder(options: EvalOptions) -> Outcome:

    settings = EncoderSettings(seed=options.seed, **batch_size_of(options))
    truth = SceneTruth.load(options.data_path)
    split = truth.load_split(options.split or "test", options.limit, options.seed)
    validation = truth.load_split(_VALIDATION, settings.validation_images, options.seed)
    encoder = ClocEncoder.from_pretrained(options.model, options.device)
    metrics, details = evaluate_encoder(
        encoder,
        build_readouts(encoder, [options.method] if options.method else None),
        build_localizers(encoder, options.method),
        truth,
        split,
        validation,
        settings,
    )
    return Outcome(split.ref, metrics, details)


def _scenes_mllm(options: EvalOptions) -> Outcome:

    if options.method is not None:
        raise ClocError("--method is for encoders: an MLLM reads regions in the way it was trained with")
    settings = MllmSettings(
        limit=options.limit, max_new_tokens=options.max_new_tokens, seed=options.seed, **batch_size_of(options)
    )
    truth = SceneTruth.load(options.data_path)
    name = options.split or "test"
    split = load_questions(
        truth.split_folder(name), name=truth.name, split=name, limit=settings.limit, seed=settings.seed
    )
    known = load_questions(
        truth.split_folder(_VALIDATION), name=truth.name, split=_VALIDATION, limit=_KNOWN_QUESTIONS, seed=options.seed
    )
    predictor = Predictor.from_pretrained(
        options.model, device=options.device, trust_remote_code=options.trust_remote_code
    )
    metrics, unparsed, details, answers = evaluate_mllm(predictor, split, known, settings)
    return Outcome(split.ref, metrics, details, unparsed, answers)
