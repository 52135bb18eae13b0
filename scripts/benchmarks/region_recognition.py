"""Region recognition as the suite `region` does it: through the Prompter, against cropping every box and encoding it.

    python scripts/benchmarks/region_recognition.py
    python scripts/benchmarks/region_recognition.py --images 2 --layers 2 --repeats 1

Pictures of 640 x 480 with 7 boxes each (COCO has 7.3), ViT-B/16 at 224 with random weights. Every side goes from
pictures to the best of 80 classes with the read-outs that the evaluation uses: resizing and cutting out included, texts
not. The sides take turns in one process, and a ratio is the median of those of each turn.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from common import argument_parser, device, measure, print_table, run_case, write_report
from PIL import Image
from tokenizers import Tokenizer, models
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPVisionConfig, PreTrainedTokenizerFast

from cloc_mllm.evaluation.encoders.readouts import (
    ClocEncoder,
    CropReadout,
    EncodedImages,
    PrompterReadout,
    RegionReadout,
)
from cloc_mllm.models.configuration_cloc import ClocConfig, ClocPrompterConfig
from cloc_mllm.models.image_processing_cloc import ClocImageProcessor
from cloc_mllm.models.modeling_cloc import ClocModel
from cloc_mllm.models.processing_cloc import ClocProcessor

CLASSES, WIDTH, HEIGHT = 80, 640, 480
POOLINGS = ("mean", "prompt")


class _OnlyCrops:
    """The crops alone: the whole pictures, which the suite encodes for retrieval as well, are not counted."""

    def __init__(self, encoder: ClocEncoder) -> None:
        self.encoder = encoder

    def __call__(self, pictures: Sequence[Image.Image], boxes: Sequence[Any]) -> torch.Tensor:
        nothing = torch.zeros(0, 512)
        images = EncodedImages([], pictures, [], nothing, nothing)
        return CropReadout(self.encoder).embed(images, boxes)


class _Reading:
    """Whole pictures once, then their boxes."""

    def __init__(self, encoder: ClocEncoder, readout: RegionReadout) -> None:
        self.encoder, self.readout = encoder, readout

    def __call__(self, pictures: Sequence[Image.Image], boxes: Sequence[Any]) -> torch.Tensor:
        images = self.encoder.encode_images(pictures, [str(k) for k in range(len(pictures))])
        return self.readout.embed(images, boxes)


def encoder_of(case: dict[str, Any], pooling: str) -> ClocEncoder:
    """Return a ViT-B/16 with a Prompter; the text encoder is small, since no text is timed."""
    config = ClocConfig(
        vision_config=CLIPVisionConfig(patch_size=16, num_hidden_layers=case["layers"]),
        text_config=CLIPTextConfig(num_hidden_layers=1),
        prompter_config=ClocPrompterConfig(hidden_size=768, pooling=pooling),
    )
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}))
    )  # a processor has to have one
    return ClocEncoder(ClocModel(config).to(device()), ClocProcessor(ClocImageProcessor(), words), pooling)


@torch.inference_mode()
def run(case: dict[str, Any]) -> dict[str, Any]:
    """Measure all sides."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (case["images"], HEIGHT, WIDTH, 3), dtype=np.uint8)
    pictures = [Image.fromarray(one) for one in noise]
    corner = rng.uniform(0, 0.5, (case["images"], case["boxes"], 2))
    share = np.concatenate([corner, corner + rng.uniform(0.1, 0.5, corner.shape)], axis=-1)
    boxes = (share * [WIDTH, HEIGHT, WIDTH, HEIGHT]).tolist()
    classes = functional.normalize(torch.randn(CLASSES, 512, device=device()), dim=-1)
    encoders = {name: encoder_of(case, name) for name in POOLINGS}
    sides: dict[str, Callable[..., torch.Tensor]] = {"crop": _OnlyCrops(encoders["mean"])}
    sides |= {name: _Reading(each, PrompterReadout(each)) for name, each in encoders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(case["repeats"] + 1):
        for name, embed in sides.items():
            named: list[torch.Tensor] = []

            def work(embed: Any = embed, named: list[torch.Tensor] = named) -> None:
                named.append((embed(pictures, boxes) @ classes.T).argmax(dim=-1).cpu())

            spent = measure(work, 1)["seconds"]
            assert named[0].shape == (case["images"] * case["boxes"],), f"{name}: {tuple(named[0].shape)}"
            if turn:  # the first one warms up
                seconds[name].append(spent)
    middle = case["repeats"] // 2
    found = {f"{name}_images_per_second": case["images"] / sorted(times)[middle] for name, times in seconds.items()}
    for name in POOLINGS:
        turns = zip(seconds["crop"], seconds[name], strict=True)
        ratios = sorted(theirs / ours for theirs, ours in turns)
        found |= {f"{name}_speedup": ratios[middle], f"{name}_slowest": ratios[0], f"{name}_fastest": ratios[-1]}
    return found


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argument_parser(__doc__)
    parser.add_argument("--images", type=int, default=8, help="pictures, encoded as one batch")
    parser.add_argument("--boxes", type=int, default=7, help="boxes on each")
    parser.add_argument("--layers", type=int, default=12, help="layers of the tower; fewer only to try it out")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(run(json.loads(args.case))))
        return
    case = {name: getattr(args, name) for name in ("images", "boxes", "layers", "repeats")}
    found = run_case(__file__, case, args.timeout)
    table = [["read-out", "images/s", "times crop-and-encode", "of all turns"]]
    if "failed" in found:
        table.append([found["failed"], "–", "–", "–"])
    else:
        table.append(["crop and encode", f"{found['crop_images_per_second']:.2f}", "1.0", "–"])
        for name in POOLINGS:
            middle, low, high = (f"{found[f'{name}_{which}']:.1f}" for which in ("speedup", "slowest", "fastest"))
            rate = f"{found[f'{name}_images_per_second']:.2f}"
            table.append([f"Prompter, {name}", rate, middle, f"{low} to {high}"])
    print_table(table)
    write_report(args.out, "region_recognition", [found])


if __name__ == "__main__":
    main()
