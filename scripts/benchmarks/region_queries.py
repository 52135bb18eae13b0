"""N boxes of one image: encoded once and asked N times with CLOC, against cropped and encoded N times with CLIP.

    python scripts/benchmarks/region_queries.py
    python scripts/benchmarks/region_queries.py --counts 1 16 --repeats 1

Both towers are ViTs of one size at 224 pixels with random weights: CLIP's is transformers' own
`CLIPVisionModelWithProjection`, CLOC's has the Prompter behind it, with either read-out (`mean`, the paper's, and
`prompt`). From pixels to N embeddings; cutting out and resizing the crops is not counted, in CLIP's favour. The
sides take turns in one process, and a ratio is the median of those of each turn.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from common import argument_parser, device, measure, print_table, run_case, write_report
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from cloc_mllm.models.configuration_cloc import ClocPrompterConfig, ClocVisionConfig
from cloc_mllm.models.modeling_cloc import ClocVisionModel

MODELS = {"ViT-B-16": {"patch_size": 16}, "ViT-B-32": {"patch_size": 32}}
POOLINGS = ("mean", "prompt")
CROPS = "crops"


def crop_side(case: dict[str, Any]) -> Callable[[], torch.Tensor]:
    """Return CLIP's work: every box is a picture of its own, in batches."""
    model = CLIPVisionModelWithProjection(_tower(case)).to(device()).eval()
    crops = torch.randn(case["boxes"], 3, 224, 224, device=device())
    model(crops[:1])  # warms up

    def work() -> torch.Tensor:
        return torch.cat([model(some).image_embeds for some in crops.split(case["batch"])])

    return work


def region_side(case: dict[str, Any], pooling: str) -> Callable[[], torch.Tensor]:
    """Return CLOC's work: one picture and its boxes."""
    prompter = ClocPrompterConfig(hidden_size=768, pooling=pooling)
    model = ClocVisionModel(ClocVisionConfig(vision_config=_tower(case), prompter_config=prompter))
    model = model.to(device()).eval()
    pixels = torch.randn(1, 3, 224, 224, device=device())
    corner = torch.rand(case["boxes"], 2, device=device()) * 0.5
    boxes = torch.cat([corner, corner + 0.3], dim=1)
    model(pixels, boxes[:1])  # warms up
    return lambda: model(pixels, boxes).region_embeds


def _tower(case: dict[str, Any]) -> CLIPVisionConfig:
    return CLIPVisionConfig(**MODELS[case["model"]], num_hidden_layers=case["layers"], image_size=224)


@torch.inference_mode()
def run(case: dict[str, Any]) -> dict[str, Any]:
    """Measure all sides for one number of boxes."""
    torch.manual_seed(0)
    works = {CROPS: crop_side(case), **{name: region_side(case, name) for name in POOLINGS}}
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(case["repeats"]):
        for name, work in works.items():
            made: list[torch.Tensor] = []
            seconds[name].append(measure(lambda work=work, made=made: made.append(work()), 1)["seconds"])
            assert made[0].shape == (case["boxes"], 512), f"{name}: {tuple(made[0].shape)}"
    middle = case["repeats"] // 2
    found = {f"{name}_seconds": sorted(times)[middle] for name, times in seconds.items()}
    for name in POOLINGS:
        turns = zip(seconds[CROPS], seconds[name], strict=True)
        found[f"{name}_speedup"] = sorted(theirs / ours for theirs, ours in turns)[middle]
    return found


def main() -> None:
    """Measure every number of boxes, print the table, write the JSON."""
    parser = argument_parser(__doc__)
    parser.add_argument("--model", choices=list(MODELS), default="ViT-B-16", help="size of the towers")
    parser.add_argument("--layers", type=int, default=12, help="layers of the towers; fewer only to try it out")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 4, 16, 64, 100, 256], help="boxes on the image")
    parser.add_argument("--batch", type=int, default=32, help="crops that CLIP encodes at a time")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(run(json.loads(args.case))))
        return
    shared = {"model": args.model, "layers": args.layers, "batch": args.batch, "repeats": args.repeats}
    results = [run_case(__file__, {"boxes": count, **shared}, args.timeout) for count in args.counts]
    table = [["boxes", "CLIP on crops, s", "CLOC mean, s", "times faster", "CLOC prompt, s", "times faster"]]
    for found in results:
        if "failed" in found:
            table.append([str(found["boxes"]), found["failed"], *["–"] * 4])
            continue
        cells = [f"{found[f'{CROPS}_seconds']:.3f}"]
        for name in POOLINGS:
            cells += [f"{found[f'{name}_seconds']:.3f}", f"{found[f'{name}_speedup']:.1f}"]
        table.append([str(found["boxes"]), *cells])
    print_table(table)
    write_report(args.out, "region_queries", results)


if __name__ == "__main__":
    main()
