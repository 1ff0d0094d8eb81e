"""Next-token loss behind a large vocabulary: in chunks, beside the plain cross-entropy over all logits, forward and backward.

python benchmarks/loss_memory.py                                # a quarter of each size below, and of the chunk
python benchmarks/loss_memory.py device=cuda tokens=8192 width=2048 vocab=152064 chunk=1024    # in bf16; beside Liger where it is

The published case is 8,192 labelled tokens, states of 2,048 and a vocabulary of 152,064 (Qwen2). With all three sizes and the
chunk divided by one number, logits, the weight and its gradient keep their proportions. `layer` is a plain linear layer, whose
gradients are found in the forward pass; `called` any other head, which is computed a second time; `frozen` a layer that does not
train. Memory is the peak beside weights and states, gradients included. Prints one JSON line.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from alternating import arguments, now, report
from peaks import peak
from torch import Tensor, nn

from lightning_internvl.objectives import NextToken

Sizes = dict[str, Any]


def made(kind: str, sizes: Sizes) -> Callable[[], None]:
    """One way to compute loss and gradients, ready to run."""
    torch.manual_seed(0)
    device, dtype = sizes["device"], torch.bfloat16 if sizes["device"] == "cuda" else torch.float32
    layer = nn.Linear(sizes["width"], sizes["vocab"], bias=False, device=device, dtype=dtype)
    layer.requires_grad_("frozen" not in kind)
    states = torch.randn(1, sizes["tokens"], sizes["width"], device=device, dtype=dtype, requires_grad=True)
    labels = torch.randint(sizes["vocab"], (1, sizes["tokens"]), device=device)
    (states[..., :8] @ layer.weight[:8, :8].detach().T).sum().backward()  # libraries take their own memory at first use

    def loss() -> Tensor:
        if kind.startswith("full"):
            return F.cross_entropy(layer(states[0]).float(), labels[0])
        if kind == "liger":
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            return LigerFusedLinearCrossEntropyLoss()(layer.weight, states[0], labels[0])
        head = (lambda rows: layer(rows)) if kind == "called" else layer
        return NextToken(chunk=sizes["chunk"])(states, labels, head, shifts=False)

    def work() -> None:
        states.grad = layer.weight.grad = None
        loss().backward()

    return work


def seconds(kinds: list[str], sizes: Sizes, steps: int) -> dict[str, list[float]]:
    """Of every kind, taking turns."""
    works, found = {kind: made(kind, sizes) for kind in kinds}, {kind: list[float]() for kind in kinds}
    for step in range(steps + 1):
        for kind, work in works.items():
            begun = now()
            work()
            if step:  # the first one warms up
                found[kind].append(now() - begun)
    return found


def compared(kind: str, base: str, memory: dict[str, float], times: dict[str, list[float]]) -> dict[str, float]:
    """Medians, the spread between the quartiles, and ratios to `base`."""
    quarters, median = statistics.quantiles(times[kind], n=4), statistics.median(times[kind])
    return {
        "peak_MiB": memory[kind],
        "memory_ratio": round(memory[kind] / memory[base], 3),
        "ms": round(1e3 * median, 1),
        "quartiles_apart_ms": round(1e3 * (quarters[2] - quarters[0]), 1),
        "time_ratio": round(median / statistics.median(times[base]), 3),
    }


def main() -> None:
    """Measure and report."""
    sizes = arguments(tokens=2048, width=512, vocab=38016, chunk=256, steps=7, device="cpu")
    kinds = ["full", "layer", "called", "full frozen", "frozen"]
    if sizes["device"] == "cuda" and importlib.util.find_spec("liger_kernel"):
        kinds.append("liger")
    memory = {kind: peak(made, kind, sizes, device=sizes["device"]) for kind in kinds}
    times = seconds(kinds, sizes, sizes.pop("steps"))
    results = {kind: compared(kind, "full frozen" if "frozen" in kind else "full", memory, times) for kind in kinds}
    report("loss_memory", {}, {"sizes": sizes, "steps": len(times["full"]), "kinds": results})


if __name__ == "__main__":
    main()
