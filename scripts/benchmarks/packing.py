"""Useful tokens a second of tuning: packed rows against padded ones, and against padded ones grouped by length.

    python scripts/benchmarks/packing.py --steps 16

All sides train an MLLM with random weights on the same samples: forward, loss, backward, and AdamW every two
micro-batches. Useful tokens are those that are not padding. The sides take turns in one process, round by round;
without a GPU, what is timed is the processor's time, so that other work on the machine does not count. Packed rows are
as long as the longest sample, and four times as long (`data.pack_length`): those fill better. Attention is torch's sdpa
on all sides: over the whole of a row with a mask, or block by block, which training takes where it can.

The samples are made up after LLaVA's 665 k mix. Its shares are those of LLaVA-1.5 (arXiv 2310.03744, table 7: 158 k
LLaVA-Instruct, 40 k ShareGPT without images, 83 k VQAv2, 72 k GQA, 9 k OKVQA, 80 k OCRVQA, 66 k A-OKVQA, 22 k TextCaps,
48 k RefCOCO, 86 k VG). How long the texts are is this script's assumption: log-normal about the medians below, cut at
2,048 tokens with an image's 576. Everything is divided by 9, so that an image has 64 tokens and a row 228.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import argument_parser, device, measure, print_table, run_case, write_report
from transformers import CLIPVisionConfig, LlamaConfig

from cloc_mllm.models.configuration_cloc_mllm import ClocMllmConfig
from cloc_mllm.models.modeling_cloc_mllm import ClocMllmForConditionalGeneration
from cloc_mllm.models.packed_attention import BLOCKS
from cloc_mllm.models.packing import pack_rows, packed_tensors
from cloc_mllm.training.running.grouping import Grouping

# Thousands of samples, whether there is an image, median of the text's tokens, spread of its logarithm.
MIX = {
    "LLaVA-Instruct": (158, True, 220, 0.5),
    "ShareGPT": (40, False, 1000, 0.8),
    "VQAv2": (83, True, 130, 0.5),
    "GQA": (72, True, 180, 0.5),
    "OKVQA": (9, True, 50, 0.3),
    "OCRVQA": (80, True, 120, 0.3),
    "A-OKVQA": (66, True, 90, 0.3),
    "TextCaps": (22, True, 60, 0.3),
    "RefCOCO": (48, True, 250, 0.5),
    "VG": (86, True, 300, 0.5),
}
SCALE, LONGEST, IMAGE = 9, 228, 576 // 9
VOCABULARY, IMAGE_ID = 4096, 4095
SIDES = {
    "padded": "padded",
    "grouped": "padded, grouped by modality and length over 16 steps",
    "masked": "packed, rows of 228, the whole row attended to and masked",
    "packed": "packed, rows of 228, attended to block by block",
    "packed long": "packed, rows of 912, attended to block by block",
}


class Samples:
    """Made-up samples: whether each has an image, and its tokens."""

    def __init__(self, count: int, seed: int = 0) -> None:
        drawn = np.random.default_rng(seed)
        shares = np.array([share for share, *_ in MIX.values()], float)
        kinds = drawn.choice(len(MIX), count, p=shares / shares.sum())
        _, shown, medians, spreads = (np.array(column) for column in zip(*MIX.values(), strict=True))
        texts = np.exp(np.log(medians[kinds] / SCALE) + spreads[kinds] * drawn.standard_normal(count))
        self.has_image = shown[kinds].astype(bool)
        room = LONGEST - IMAGE * self.has_image
        self.tokens = np.clip(texts.round().astype(int), 4, room) + IMAGE * self.has_image

    def __len__(self) -> int:
        return len(self.tokens)

    def lengths(self, image_tokens: Any, epoch: int) -> Any:
        """As a data set has it: images and tokens of each sample."""
        return np.stack([self.has_image.astype(np.int64), self.tokens], axis=1)

    def ids(self, index: int) -> list[int]:
        """An image's placeholders, then made-up text."""
        image = [IMAGE_ID] * (IMAGE * bool(self.has_image[index]))
        return image + (np.arange(self.tokens[index] - len(image)) * 37 % (VOCABULARY - 2) + 1).tolist()


def batches(samples: Samples, side: str, batch: int) -> list[dict[str, torch.Tensor]]:
    """Return one side's batches of all samples."""
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))
    if side == "grouped":
        order = Grouping(samples, IMAGE, by_modality=True, steps=16).order(order, batch, 0)
    return [one_batch(samples, order[k : k + batch].tolist(), side) for k in range(0, len(order), batch)]


def one_batch(samples: Samples, chosen: list[int], side: str) -> dict[str, torch.Tensor]:
    """Lay samples out as rows with a filling each, or packed."""
    ids = [samples.ids(k) for k in chosen]
    labels = [[-100 if token == IMAGE_ID else token for token in row] for row in ids]
    lengths = [len(row) for row in ids]
    capacity = {"masked": LONGEST, "packed": LONGEST, "packed long": 4 * LONGEST}.get(side)
    rows = [[k] for k in range(len(ids))] if capacity is None else pack_rows(lengths, capacity)
    made = packed_tensors(ids, labels, rows, pad_id=0)
    if capacity is None:
        width = made["input_ids"].shape[1]
        made["attention_mask"] = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
        del made["position_ids"]
    images = int(samples.has_image[chosen].sum())
    pixels = torch.randn(images, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return {name: value.to(device()) for name, value in (made | ({"pixel_values": pixels} if images else {})).items()}


def build(width: int, layers: int) -> ClocMllmForConditionalGeneration:
    """Build an MLLM whose tower is to its language model about as CLIP-L is to 7 B: a few percent of the work."""
    return (
        ClocMllmForConditionalGeneration(
            ClocMllmConfig(
                vision_config=CLIPVisionConfig(
                    image_size=64,
                    patch_size=8,
                    hidden_size=width // 4,
                    intermediate_size=width,
                    num_hidden_layers=layers,
                    num_attention_heads=2,
                ),
                text_config=LlamaConfig(
                    vocab_size=VOCABULARY,
                    hidden_size=width,
                    intermediate_size=width * 11 // 4,
                    num_hidden_layers=layers,
                    num_attention_heads=4,
                ),
                image_token_index=IMAGE_ID,
            )
        )
        .to(device())
        .train()
    )


def passes(case: dict[str, Any]) -> dict[str, tuple[Callable[[], None], int]]:
    """Return, for each side, what trains on all samples once, and how many tokens it lays out."""
    samples, works = Samples(case["steps"] * case["batch"]), {}
    for side in SIDES:
        model = build(case["width"], case["layers"])
        if side.startswith("packed"):
            model.model.language_model.set_attn_implementation(BLOCKS)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        made = batches(samples, side, case["batch"])

        def work(model: Any = model, optimizer: Any = optimizer, made: Any = made) -> None:
            for number, batch in enumerate(made, 1):
                model(**batch).loss.backward()
                if number % 2 == 0:
                    optimizer.step()
                    optimizer.zero_grad()

        works[side] = (work, sum(batch["input_ids"].numel() for batch in made))
    return works


def time_of(work: Callable[[], None]) -> float:
    """Return the seconds that some work takes: of the processor, where there is no GPU to wait for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return measure(work, 1)["seconds"]
    begun = time.process_time()
    work()
    return time.process_time() - begun


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Measure all sides, in turns."""
    works = passes(case)
    useful = int(Samples(case["steps"] * case["batch"]).tokens.sum())
    for work, _ in works.values():
        work()  # the first pass makes the optimiser's state
    seconds: dict[str, list[float]] = {side: [] for side in works}
    for _ in range(case["repeats"]):
        for side, (work, _) in works.items():
            seconds[side].append(time_of(work))
    found = {}
    for side, (_, laid_out) in works.items():
        ratios = sorted(a / b for a, b in zip(seconds["padded"], seconds[side], strict=True))
        found[side] = {
            "useful_share": useful / laid_out,
            "tokens_per_second": useful / sorted(seconds[side])[len(ratios) // 2],
            "ratio": ratios[len(ratios) // 2],
        }
    parameters = sum(p.numel() for p in build(case["width"], case["layers"]).parameters())
    return {"sides": found, "useful_tokens": useful, "parameters": parameters}


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argument_parser(__doc__)
    parser.add_argument("--batch", type=int, default=16, help="samples of a micro-batch")
    parser.add_argument("--steps", type=int, default=16, help="micro-batches of a pass")
    parser.add_argument("--width", type=int, default=256, help="width of the language model")
    parser.add_argument("--layers", type=int, default=4, help="layers of the language model, and of the tower")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(run(json.loads(args.case))))
        return
    names = ("batch", "steps", "width", "layers", "repeats")
    result = run_case(__file__, {name: getattr(args, name) for name in names}, args.timeout)
    if "failed" in result:
        print(f"failed: {result['failed']}")
    else:
        print(f"{result['parameters']:,} parameters, {result['useful_tokens']:,} useful tokens a pass\n")
        table = [["batches", "useful tokens", "useful tokens a second", "times padded"]]
        for side, label in SIDES.items():
            one = result["sides"][side]
            table.append(
                [label, f"{one['useful_share']:.0%}", f"{one['tokens_per_second']:,.0f}", f"{one['ratio']:.2f}"]
            )
        print_table(table)
    write_report(args.out, "packing", [result])


if __name__ == "__main__":
    main()
