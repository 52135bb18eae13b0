"""The backend: it answers as the Predictor does, in the order asked, whatever the batch and the task's options."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")

from lmms_eval.api.instance import Instance
from lmms_eval.models.registry_v2 import ModelRegistryV2

from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.lmms.chat import ClocMllmChat
from cloc_mllm.evaluation.lmms.plugin import MANIFESTS, MODEL_NAME
from cloc_mllm.inference.predictor import Predictor
from tests.builders import noise_image
from tests.unit.evaluation.lmms.conftest import Told

QUESTIONS = ["what is this", "where is the small red ring", "how many crosses are there", "a red circle left of", "two"]


def messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
    picture = {"type": "image", "url": noise_image(40, 30, doc["seed"])}
    return [{"role": "user", "content": [picture, {"type": "text", "text": doc["question"]}, *doc.get("more", [])]}]


def requests(model: ClocMllmChat, options: list[dict[str, Any]], **more: Any) -> list[Instance]:
    """One request for each of the options, as lmms-eval makes them."""
    docs = [{"question": QUESTIONS[k % 5], "seed": k, **more} for k in range(len(options))]
    model.task_dict = {"t": {"test": docs}}
    return [
        Instance("generate_until", ("", messages, option, k, "t", "test"), 0, {"task": "t", "doc_id": k, "repeats": 1})
        for k, option in enumerate(options)
    ]


def test_the_entry_point_names_a_chat_class() -> None:
    registry = ModelRegistryV2()
    for manifest in MANIFESTS:
        registry.register_manifest(manifest)
    assert registry.get_model_class(MODEL_NAME) is ClocMllmChat
    assert registry.resolve(MODEL_NAME).model_type == "chat"


@pytest.mark.parametrize("batch_size", [1, "3", 8])
def test_answers_are_the_predictors_in_the_order_asked(predictor: Predictor, batch_size: int | str) -> None:
    """Requests with differing options share no batch, and come back where they were."""
    lengths = [8, 3, 8, 3, 8]
    model = ClocMllmChat(predictor=predictor, batch_size=batch_size, box_format="model")
    found = model.generate_until(requests(model, [{"max_new_tokens": n} for n in lengths]))
    for k, (result, length) in enumerate(zip(found, lengths, strict=True)):
        alone = predictor.vqa(noise_image(40, 30, k), QUESTIONS[k], max_new_tokens=length)
        assert result.text == alone.text
        assert result.token_counts.output_tokens == alone.num_tokens <= length
        assert result.token_counts.input_tokens == alone.num_prompt_tokens > len(QUESTIONS[k].split())


def test_answers_to_what_evens_out_the_processes_are_not_made() -> None:
    model = ClocMllmChat(predictor=Told(lambda question, _: question))
    asked = requests(model, [{}, {}])
    asked[1].metadata["__padding_only__"] = True
    assert [one.text for one in model.generate_until(asked)] == [QUESTIONS[0], ""]


def test_only_what_generate_knows_is_passed_on() -> None:
    told = Told(lambda *_: "first ASSISTANT: second\n\nthird")
    model = ClocMllmChat(predictor=told, max_new_tokens=7)

    def answered(**options: Any) -> tuple[str, dict[str, Any]]:
        text = model.generate_until(requests(model, [options]))[0].text
        return text, {key: value for key, value in told.options.items() if key not in ("batch_size", "constrain_boxes")}

    text, given = answered(until=["ASSISTANT:"], temperature=0, top_p=1.0, num_beams=1, image_aspect_ratio="pad")
    assert text == "first "
    assert given == {"max_new_tokens": 7, "num_beams": 1, "do_sample": False}
    text, given = answered(until=["\n\n"], temperature=0.2, max_new_tokens=5)
    assert text.endswith("third"), "the stop that lmms-eval adds on its own would cut answers of several paragraphs"
    assert given == {"max_new_tokens": 5, "temperature": 0.2, "do_sample": True}
    _, given = answered(temperature=0.2, do_sample=False)
    assert given == {"max_new_tokens": 7, "do_sample": False}
    _, given = answered(max_new_tokens=4096)
    assert given["max_new_tokens"] == 256, "half of the 512 positions that the model has"


def test_a_model_outlives_its_cleaning(predictor: Predictor) -> None:
    model = ClocMllmChat(predictor=predictor)
    before = model.generate_until(requests(model, [{"max_new_tokens": 4}]))[0].text
    model.clean()
    assert predictor.cache.mib == 0
    assert model.generate_until(requests(model, [{"max_new_tokens": 4}]))[0].text == before


def test_a_failure_names_task_and_document() -> None:
    model = ClocMllmChat(predictor=Told(lambda *_: ""))
    with pytest.raises(ClocError, match="task t: sample '0': the question shows a video"):
        model.generate_until(requests(model, [{}], more=[{"type": "video", "url": "a.mp4"}]))


def test_a_fault_of_one_question_of_a_batch_is_its_own(predictor: Predictor) -> None:
    model = ClocMllmChat(predictor=predictor, batch_size=4)
    asked = requests(model, [{"max_new_tokens": 2}] * 3)
    model.task_dict["t"]["test"][2]["more"] = [{"type": "region", "box": [1, 2, 3]}]
    with pytest.raises(ClocError, match="task t: sample '2'"):
        model.generate_until(asked)


@pytest.mark.parametrize("kind", ["loglikelihood", "generate_until_multi_round"])
def test_other_requests_are_refused(predictor: Predictor, kind: str) -> None:
    model = ClocMllmChat(predictor=predictor)
    with pytest.raises(ClocError, match=kind):
        getattr(model, kind)(requests(model, [{}]))


def test_bad_arguments_are_named(predictor: Predictor) -> None:
    with pytest.raises(ClocError, match="batch_size is 'auto'"):
        ClocMllmChat(predictor=predictor, batch_size="auto")
    with pytest.raises(ClocError, match="no model is named"):
        ClocMllmChat()
    with pytest.raises(ClocError, match="no box_format"):
        ClocMllmChat(predictor=predictor, box_format="xywh")
