"""Memory and time of the contrastive losses: plain, tiled, and open_clip's, forward and backward, in one process each.

    pip install -e '.[benchmarks]'
    python scripts/benchmarks/contrastive_losses.py --rows 2048 4096 8192 16384 32768

Two comparisons: images with captions against open_clip's `ClipLoss`, which does the same work; and regions with texts,
with the text filter, plain against tiled. A case that does not fit into memory is reported as such.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from common import MIB, argument_parser, device, measure, print_table, run_case, write_report
from torch import Tensor
from torch.nn import functional as F

from cloc_mllm.objectives import clip_loss, region_text_loss

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
PLAIN_COPIES = 7
"""(N, N) fp32 matrices that the plain forms are expected to need at most: a case that cannot fit is not tried."""


def open_clip_loss() -> Loss:
    """Return open_clip's loss, as one process uses it."""
    from open_clip.loss import ClipLoss

    return ClipLoss()


def losses(name: str, tile_size: int) -> Loss:
    """Return a loss by the name it has in the table."""
    if name == "open_clip ClipLoss":
        return open_clip_loss()
    if name == "clip plain":
        return clip_loss
    if name == "clip tiled":
        return lambda rows, texts, scale: clip_loss(rows, texts, scale, impl="tiled", tile_size=tile_size)
    if name == "region plain":
        return region_text_loss
    return lambda rows, texts, scale: region_text_loss(rows, texts, scale, impl="tiled", tile_size=tile_size)


NAMES = ("open_clip ClipLoss", "clip plain", "clip tiled", "region plain", "region tiled")


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Measure one loss at one size."""
    torch.manual_seed(0)
    loss = losses(case["loss"], case["tile_size"])
    scale = torch.tensor(50.0, device=device(), requires_grad=True)

    def inputs(rows: int) -> list[Tensor]:
        # Half of the texts are said twice, so that the filter has something to do.
        texts = torch.randn(rows, case["width"])[torch.arange(rows) % max(1, rows - rows // 4)]
        made = [torch.randn(rows, case["width"]), texts]
        return [F.normalize(x, dim=1).to(device()).requires_grad_() for x in made]

    def step(embeds: list[Tensor]) -> float:
        value = loss(embeds[0], embeds[1], scale)
        torch.autograd.grad(value, [*embeds, scale])
        return float(value.detach())

    step(inputs(64))  # what is made once, thread pools and the like, is not the loss's
    embeds = inputs(case["rows"])
    values: list[float] = []
    measured = measure(lambda: values.append(step(embeds)), case["repeats"])
    return {"value": values[-1], **measured}


def main() -> None:
    """Measure every case, print the table, write the JSON."""
    parser = argument_parser(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768], help="batch sizes N")
    parser.add_argument("--width", type=int, default=512, help="dimension of the embeddings")
    parser.add_argument("--tile-size", type=int, default=2048, help="rows and columns of a tile")
    parser.add_argument("--memory-gib", type=float, default=16.0, help="cases expected to need more are not tried")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(run(json.loads(args.case))))
        return
    results = []
    for rows in args.rows:
        for name in NAMES:
            case = {"loss": name, "rows": rows, "width": args.width, "tile_size": args.tile_size}
            if "tiled" not in name and PLAIN_COPIES * 4 * rows**2 > args.memory_gib * 1024 * MIB:
                results.append({**case, "failed": f"expected to need more than {args.memory_gib:g} GiB"})
            else:
                results.append(run_case(__file__, {**case, "repeats": args.repeats}, args.timeout))
    table = [["N", *(f"{name}, {unit}" for name in NAMES for unit in ("MiB", "s"))]]
    for rows in args.rows:
        row = [f"{rows:,}"]
        for found in (result for result in results if result["rows"] == rows):
            fits = "failed" not in found
            row += [f"{found['peak_mib']:,.0f}", f"{found['seconds']:.2f}"] if fits else ["–", "–"]
        table.append(row)
    print_table(table)
    for found in results:
        if "failed" in found:
            print(f"{found['loss']} at N = {found['rows']:,}: {found['failed']}")
    write_report(args.out, "contrastive_losses", results)


if __name__ == "__main__":
    main()
