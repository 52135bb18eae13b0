"""Time of a training step: ours against open_clip's at the same ViT, batch and precision, and CLOC's by part.

    pip install -e '.[benchmarks]'
    python scripts/benchmarks/encoder_step.py --batch 16

A step is forward, loss, backward and AdamW on made-up pictures and texts, weights at random; reading data is another
benchmark's business. open_clip always reads 77 text tokens; ours is measured so too, and with captions and phrases cut
to their longest, as our collator does. Each of our steps takes turns with open_clip's in one process, or with our own
plain CLIP's for what CLOC adds to it. `--model` is the size of the towers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from common import argument_parser, device, measure, print_table, run_case, write_report
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPVisionConfig

from cloc_mllm.models.configuration_cloc import ClocConfig, ClocPrompterConfig
from cloc_mllm.models.modeling_cloc import ClocModel
from cloc_mllm.objectives import clip_loss, grounding_loss, region_text_loss

# open_clip's names of the models, and the same sizes in transformers' words.
MODELS = {
    "ViT-B-32": ({"patch_size": 32}, {}),
    "ViT-B-16": ({"patch_size": 16}, {}),
}
CONTEXT, CAPTION, PHRASE = 77, 20, 8
"""Tokens: open_clip's fixed length; a typical longest caption and phrase of a batch."""
STEPS = {
    ("clip padded", "open_clip"): "our CLIP, texts padded to 77 tokens, to open_clip's CLIP",
    ("clip", "open_clip"): "our CLIP, texts cut to the longest, to open_clip's CLIP",
    ("cloc", "clip"): "CLOC, prompt pooling, to our CLIP",
    ("cloc mean", "clip"): "CLOC, mean pooling (the paper's), to our CLIP",
    ("cloc", "open_clip"): "CLOC, prompt pooling, to open_clip's CLIP",
}
PARTS = {
    "image": "image tower",
    "captions": "captions",
    "phrases": "region texts, distinct ones, cut to the longest",
    "phrases padded": "region texts, every one, padded to 77 tokens",
    "boxes": "Prompter on boxes, prompt pooling",
    "boxes mean": "Prompter on boxes, mean pooling",
    "grounding": "Prompter on phrases, and BoxHead",
    "losses": "both contrastive losses",
}


def build(name: str, prompter: str | None) -> ClocModel:
    """Build our encoder at the size of an open_clip model."""
    vision, text = MODELS[name]
    model = ClocModel(
        ClocConfig(
            vision_config=CLIPVisionConfig(**vision),
            text_config=CLIPTextConfig(**text),
            prompter_config=None if prompter is None else ClocPrompterConfig(hidden_size=768, pooling=prompter),
        )
    )
    return model.to(device()).train()


def ids(rows: int, length: int) -> Tensor:
    """Made-up texts: random tokens, the end token last."""
    made = torch.randint(1000, 40000, (rows, length), device=device())
    made[:, -1] = 49407
    return made


class Batch:
    """Made-up inputs of one step."""

    def __init__(self, case: dict[str, Any]) -> None:
        count, regions = case["batch"], case["batch"] * case["regions"]
        torch.manual_seed(0)
        self.pixels = torch.randn(count, 3, 224, 224, device=device())
        self.captions, self.captions_padded = ids(count, CAPTION), ids(count, CONTEXT)
        # A third of region texts repeat within a batch, as names of things do.
        self.distinct = ids(max(1, regions * 2 // 3), PHRASE)
        self.which = torch.arange(regions, device=device()) % len(self.distinct)
        self.phrases_padded = ids(regions, CONTEXT)
        corner = torch.rand(regions, 2, device=device()) * 0.5
        self.boxes = torch.cat([corner, corner + 0.3], dim=1)
        self.owner = torch.arange(regions, device=device()) // case["regions"]


def open_clip_step(case: dict[str, Any], batch: Batch) -> Callable[[], None]:
    """Return a step of open_clip's model and loss."""
    import open_clip

    model = open_clip.create_model(case["model"], device=str(device())).train()
    loss = open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        images, texts, scale = model(batch.pixels, batch.captions_padded)[:3]
        _finish(loss(images, texts, scale), optimizer)

    return step


def our_step(case: dict[str, Any], batch: Batch) -> Callable[[], None]:
    """Return a step of ours: CLIP or CLOC."""
    name = case["case"]
    pooling = {"cloc": "prompt", "cloc mean": "mean"}.get(name)
    model = build(case["model"], pooling)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    captions = batch.captions_padded if name == "clip padded" else batch.captions

    def step() -> None:
        if pooling is None:
            out = model(batch.pixels, captions)
            _finish(clip_loss(out.image_embeds, out.text_embeds, out.logit_scale), optimizer)
            return
        out = model(batch.pixels, captions, None, batch.boxes, batch.owner, batch.distinct, None, batch.which)
        region = region_text_loss(out.region_embeds, out.region_text_embeds, out.region_logit_scale)
        total = clip_loss(out.image_embeds, out.text_embeds, out.logit_scale) + region
        _finish(total + grounding_loss(out.pred_boxes, batch.boxes), optimizer)

    return step


def part(case: dict[str, Any], batch: Batch) -> Callable[[], None]:
    """Return the forward and backward pass of one part of CLOC's step, its inputs computed beforehand."""
    name = case["case"]
    model = build(case["model"], "mean" if name == "boxes mean" else "prompt")
    with torch.no_grad():
        tokens = model.get_image_features(batch.pixels).last_hidden_state
        phrases = model.get_text_features(batch.distinct).pooler_output[batch.which]
        images, captions = (nn.functional.normalize(torch.randn(len(batch.pixels), 512), dim=1) for _ in range(2))
        regions, texts = (nn.functional.normalize(torch.randn(len(batch.boxes), 512), dim=1) for _ in range(2))
    leaves = [x.to(device()).requires_grad_() for x in (tokens, phrases, images, captions, regions, texts)]
    tokens, phrases, images, captions, regions, texts = leaves
    work: dict[str, Callable[[], Tensor]] = {
        "image": lambda: model.get_image_features(batch.pixels).last_hidden_state,
        "captions": lambda: model.get_text_features(batch.captions).pooler_output,
        "phrases": lambda: model.get_text_features(batch.distinct).pooler_output[batch.which],
        "phrases padded": lambda: model.get_text_features(batch.phrases_padded).pooler_output,
        "boxes": lambda: model.get_region_features(tokens, None, batch.boxes, image_index=batch.owner).pooler_output,
        "grounding": lambda: model.predict_boxes(tokens, phrases, batch.owner),
        "losses": lambda: clip_loss(images, captions, 50.0) + region_text_loss(regions, texts, 50.0),
    }
    work["boxes mean"] = work["boxes"]
    return lambda: work[name]().sum().backward()


def _finish(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Measure one part; or a step that takes turns with another."""
    batch = Batch(case)
    if case["case"] in PARTS:
        work = part(case, batch)
        work()
        return measure(work, case["repeats"])
    works = {}
    for name in (case["case"], case["base"]):
        works[name] = open_clip_step(case, batch) if name == "open_clip" else our_step({**case, "case": name}, batch)
        works[name]()  # the first step makes the optimiser's state
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(case["repeats"]):
        for name, work in works.items():
            seconds[name].append(measure(work, 1)["seconds"])
    mine, other = (sorted(seconds[name])[case["repeats"] // 2] for name in (case["case"], case["base"]))
    ratios = sorted(a / b for a, b in zip(seconds[case["case"]], seconds[case["base"]], strict=True))
    return {"seconds": mine, "base_seconds": other, "ratio": ratios[case["repeats"] // 2]}


def main() -> None:
    """Measure every case, print the tables, write the JSON."""
    parser = argument_parser(__doc__)
    parser.add_argument("--model", choices=list(MODELS), default="ViT-B-32", help="size of the towers")
    parser.add_argument("--batch", type=int, default=16, help="images a step")
    parser.add_argument("--regions", type=int, default=4, help="regions an image")
    parser.add_argument("--no-parts", action="store_true", help="measure whole steps only")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(run(json.loads(args.case))))
        return
    shared = {"model": args.model, "batch": args.batch, "regions": args.regions, "repeats": args.repeats}
    cases = [{"case": case, "base": base, **shared} for case, base in STEPS]
    steps = [run_case(__file__, case, args.timeout) for case in cases]
    table = [["step", "s", "s of the other", "ratio"]]
    for found, label in zip(steps, STEPS.values(), strict=True):
        numbers = [f"{found[key]:.3f}" for key in ("seconds", "base_seconds", "ratio") if key in found]
        table.append([label, *(numbers or [found["failed"], "–", "–"])])
    print_table(table)
    print()
    if args.no_parts:
        write_report(args.out, "encoder_step", steps)
        return
    parts = [run_case(__file__, {"case": name, **shared}, args.timeout) for name in PARTS]
    table = [["part of CLOC's step, forward and backward", "s", "times the image tower"]]
    for found, label in zip(parts, PARTS.values(), strict=True):
        both = "seconds" in found and "seconds" in parts[0]
        ratio = f"{found['seconds'] / parts[0]['seconds']:.2f}" if both else "–"
        table.append([label, found.get("failed") or f"{found['seconds']:.3f}", ratio])
    print_table(table)
    write_report(args.out, "encoder_step", [*steps, *parts])


if __name__ == "__main__":
    main()
