"""Time of the MLLM against stock LLaVA of the same size and weights: a training step, and a greedy answer.

    python scripts/benchmarks/mllm_step.py
    python scripts/benchmarks/mllm_step.py --size base --tokens 32

Both sides run transformers' own tower, projector and language model; what is compared is what this package's class does
around them. They take turns in one process. In `of the same size` both have the same weights; the cases behind it show
what a Prompter, trained, idle or in use, and a grounding head cost. Stock LLaVA has nothing to set against them, so the
ratio there is to LLaVA without.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from common import argument_parser, device, measure, print_table, run_case, write_report
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from cloc_mllm.models.configuration_cloc import ClocPrompterConfig
from cloc_mllm.models.configuration_cloc_mllm import ClocMllmConfig
from cloc_mllm.models.modeling_cloc_mllm import ClocMllmForConditionalGeneration

IMAGE, REGION, GROUND = 3, 4, 5
SIZES: dict[str, tuple[dict[str, int], dict[str, int], int]] = {
    "small": (
        {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6},
        {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6},
        160,
    ),
    "base": (
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
        224,
    ),
}
"""Tower, language model, side of the frame in pixels."""
CASES = {
    "answer": "greedy answer",
    "answer, regions": "greedy answer to a question with 4 regions",
    "step": "training step, of the same size",
    "step, idle": "training step with a Prompter, no region in the batch",
    "step, regions": "training step with a Prompter, 4 regions in the question",
    "step, boxes": "training step with a Prompter and a grounding head, 4 regions and 4 boxes",
}


def build(size: str, prompter: bool, head: bool) -> ClocMllmForConditionalGeneration:
    """Build our model, with a Prompter and a grounding head or without."""
    tower, language, side = SIZES[size]
    vision = CLIPVisionConfig(**tower, image_size=side, patch_size=16)
    text = LlamaConfig(**language, vocab_size=8192, max_position_embeddings=4096, tie_word_embeddings=True)
    reader = ClocPrompterConfig(hidden_size=vision.hidden_size, projection_dim=512, num_attention_heads=6)
    torch.manual_seed(0)
    config = ClocMllmConfig(
        vision_config=vision,
        text_config=text,
        region_encoder="prompter" if prompter else "none",
        prompter_config=reader if prompter else None,
        grounding="head" if head else "text",
        grounding_config=ClocPrompterConfig(**reader.to_dict()) if head else None,
        image_token_index=IMAGE,
        region_token_index=REGION,
        ground_token_index=GROUND,
        image_seq_length=(side // 16) ** 2,
    )
    return ClocMllmForConditionalGeneration(config).to(device())


def build_stock(ours: ClocMllmForConditionalGeneration) -> LlavaForConditionalGeneration:
    """Build stock LLaVA with the weights that it has a place for."""
    config = LlavaConfig(
        vision_config=ours.config.vision_config,
        text_config=ours.config.text_config,
        image_token_index=IMAGE,
        image_seq_length=ours.config.image_seq_length,
    )
    stock = LlavaForConditionalGeneration(config)
    names = stock.state_dict().keys()
    stock.load_state_dict({name: value for name, value in ours.state_dict().items() if name in names})
    return stock.to(device())


def make_inputs(case: dict[str, Any], regions: int, grounds: int) -> dict[str, Tensor]:
    """Make a batch: an image, a question, and for a training step an answer of 32 tokens."""
    *_, side = SIZES[case["size"]]
    generator = torch.Generator().manual_seed(0)

    def words(count: int) -> list[int]:
        return torch.randint(10, 8192, (count,), generator=generator).tolist()

    rows = []
    for _ in range(case["batch"]):
        answer = words(32)
        answer[:grounds] = [GROUND] * grounds
        rows.append([IMAGE] * (side // 16) ** 2 + words(32) + [REGION] * regions + answer)
    ids = torch.tensor(rows)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(case["batch"], 3, side, side, generator=generator),
        "labels": ids.masked_fill(torch.arange(ids.shape[1]) < ids.shape[1] - 32, -100),
    }
    if regions:
        corners = torch.rand(case["batch"] * regions, 2, 2, generator=generator).sort(1).values
        inputs["region_boxes"] = corners.flatten(1)
        inputs["region_image_index"] = torch.arange(case["batch"]).repeat_interleave(regions)
    return {name: value.to(device()) for name, value in inputs.items()}


def training_step(model: Any, inputs: dict[str, Tensor]) -> Callable[[], None]:
    """Return a step with the tower frozen and all else trained, as LLaVA's second stage does it."""
    model.train()
    model.model.vision_tower.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step() -> None:
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def answer(model: Any, inputs: dict[str, Tensor], tokens: int) -> Callable[[], Tensor]:
    """Return a greedy answer of so many tokens."""
    model.eval()
    asked = {name: value for name, value in inputs.items() if name != "labels"}
    options: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    return lambda: model.generate(**asked, **options, pad_token_id=0)


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Let both sides take turns; return the median of each and of the ratios."""
    regions = 4 if "regions" in case["case"] or "boxes" in case["case"] else 0
    grounds = 4 if "boxes" in case["case"] else 0
    ours = build(case["size"], prompter=case["case"] != "step", head=bool(grounds))
    stock = build_stock(ours)
    inputs, plain = make_inputs(case, regions, grounds), make_inputs(case, 0, 0)
    if case["case"].startswith("answer"):
        works = [answer(ours, inputs, case["tokens"]), answer(stock, plain, case["tokens"])]
    else:
        works = [training_step(ours, inputs), training_step(stock, plain)]
    first = [work() for work in works]
    if case["case"] == "answer" and not torch.equal(*first):
        raise RuntimeError("the answers differ: this is not the same work")
    seconds: list[list[float]] = [[], []]
    for _ in range(case["repeats"]):
        for taken, work in zip(seconds, works, strict=True):
            taken.append(measure(work, 1)["seconds"])
    middle = case["repeats"] // 2
    mine, other = (sorted(taken)[middle] for taken in seconds)
    ratios = sorted(a / b for a, b in zip(*seconds, strict=True))
    return {"seconds": mine, "base_seconds": other, "ratio": ratios[middle]}


def main() -> None:
    """Measure every case, print the table, write the JSON."""
    parser = argument_parser(__doc__)
    parser.add_argument("--size", choices=list(SIZES), default="small", help="size of tower and language model")
    parser.add_argument("--batch", type=int, default=4, help="images, questions and answers")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of a greedy answer")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(run(json.loads(args.case))))
        return
    shared = {"size": args.size, "batch": args.batch, "tokens": args.tokens, "repeats": args.repeats}
    found = [run_case(__file__, {"case": case, **shared}, args.timeout) for case in CASES]
    table = [["ours against stock LLaVA", "s", "s of LLaVA", "ratio"]]
    for result, label in zip(found, CASES.values(), strict=True):
        numbers = [f"{result[key]:.3f}" for key in ("seconds", "base_seconds", "ratio") if key in result]
        table.append([label, *(numbers or [result["failed"], "–", "–"])])
    print_table(table)
    write_report(args.out, "mllm_step", found)


if __name__ == "__main__":
    main()
