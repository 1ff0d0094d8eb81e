"""A supervised step over packed rows beside padded rows and batches of one length: real tokens a second, the same model in turns.

python benchmarks/packed_step.py                     # toy size, on a CPU
python benchmarks/packed_step.py steps=20 longest=2048 device=cuda

Conversations have log-normal lengths (a median of a quarter of `longest`, sigma 0.8) and up to three pictures, half of their text
is learnt. All three ways read the same stream of samples, about `tokens` real tokens a step; padded batches hold samples as they
come. Every step is loss, gradients, clipping and fused AdamW. On a CPU seconds are those of the processor, which other programs
do not lengthen. Prints one JSON line.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from alternating import WARM_UP, arguments, now, plain_step, report
from supervised_step import IMAGE, LR, SIZES, native_folder
from torch import Tensor

from lightning_internvl import load_pretrained
from lightning_internvl.data.collate.base import Prepared
from lightning_internvl.data.collate.packed import LengthBuckets, PackedChats, PackedRows
from lightning_internvl.data.collate.packing import Grouping, PackingWindow
from lightning_internvl.data.processors.basic import Tiles
from lightning_internvl.data.templates import load_template
from lightning_internvl.data.tokenizer import toy_tokenizer
from lightning_internvl.stages import SupervisedStage


def samples(number: int, size: dict[str, Any], longest: int) -> list[Prepared]:
    """Prepared conversations."""
    rng = np.random.default_rng(0)
    tokens = (size["image"] // 14) ** 2 // 4
    found = []
    for key in range(number):
        squares = int(rng.integers(0, 4))
        pictures = rng.integers(0, 256, (squares, 1, size["image"], size["image"], 3), dtype=np.uint8)
        room = longest - squares * tokens
        words = int(np.clip(np.exp(rng.normal(np.log(longest / 4), 0.8)), 8, room))
        text = rng.integers(10, size["vocab"], words).tolist()
        hidden = squares * tokens + words // 2
        ids = [IMAGE] * (squares * tokens) + text
        row = ids, [-100] * hidden + ids[hidden:]
        found.append({"key": str(key), "row": row, "pictures": list(pictures), "videos": []})
    return found


def batches(grouping: Grouping, prepared: list[Prepared]) -> list[dict[str, Any]]:
    """All batches that the samples give while a window of them waits."""
    samples, found = iter(enumerate(prepared)), []
    window = PackingWindow(grouping, lambda: [next(samples)])
    with contextlib.suppress(StopIteration):
        while True:
            found.append(grouping.batch(window.choose(grouping.choices)))
    return found


def measure(size: dict[str, Any], steps: int, longest: int, tokens: int, device: str) -> dict[str, Any]:
    """Real tokens a second of the three ways."""
    torch.manual_seed(0)
    chats = PackedChats(
        toy_tokenizer(), load_template("chatml", ""), Tiles(size["image"], max_tiles=1), (size["image"] // 14) ** 2 // 4, longest
    )
    prepared = samples(40 * (steps + WARM_UP) * tokens // longest, size, longest)
    mean = statistics.fmean(len(one["row"][0]) for one in prepared)
    rows, single = max(1, round(tokens / longest)), max(1, round(tokens / mean))
    ways = {
        "packed": batches(PackedRows(chats, rows), prepared)[: steps + WARM_UP],
        "bucketed": batches(LengthBuckets(chats, single), prepared)[: steps + WARM_UP],
        "padded": [chats.stack(prepared[i : i + single]) for i in range(0, (steps + WARM_UP) * single, single)],
    }
    assert all(len(found) == steps + WARM_UP for found in ways.values())
    with tempfile.TemporaryDirectory() as folder:
        native_folder(size, Path(folder, "native"))
        model = load_pretrained(Path(folder, "native")).to(device)
        stage = SupervisedStage(
            model, name="supervised", run_dir=Path(folder), parts={}, train=["encoder", "middleware", "decoder"],
            optimizer=lambda *_: None, scheduler=lambda *_: None, max_steps=steps,
        )  # fmt: skip
    clock = now if device == "cuda" else time.process_time
    current: dict[str, Any] = {}

    def loss_of(number: int) -> Tensor:
        batch = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in current["batches"][number].items()}
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            return stage.losses(batch)["next_token"]

    step = plain_step(stage, loss_of, LR)
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(steps + WARM_UP):
        for way, found in ways.items():
            current["batches"], begun = found, clock()
            step(number)
            rates[way].append(int(found[number]["attention_mask"].sum()) / (clock() - begun))
    return _told(ways, {way: found[WARM_UP:] for way, found in rates.items()}) | {"mean_over_longest": round(mean / longest, 3)}


def _told(ways: dict[str, list[dict[str, Any]]], rates: dict[str, list[float]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for way, speeds in rates.items():
        quarters = statistics.quantiles(speeds, n=4)
        masks = [batch["attention_mask"] for batch in ways[way]]
        found[way] = {
            "tokens_per_s": round(statistics.median(speeds), 1),
            "quartiles_apart": round(quarters[2] - quarters[0], 1),
            "padding_share": round(1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks), 4),
        }
    for way in ("packed", "bucketed"):
        ratios = [one / other for one, other in zip(rates[way], rates["padded"], strict=True)]
        found[f"{way}_over_padded"] = round(statistics.median(ratios), 3)
    return found


def main() -> None:
    """Measure the size asked for."""
    options = arguments(size="toy", steps=20, longest=1024, tokens=2048, device="cpu")
    found = measure(SIZES[options["size"]], options["steps"], options["longest"], options["tokens"], options["device"])
    report("packed_step", {}, {name: options[name] for name in ("size", "steps", "longest", "tokens")} | found)


if __name__ == "__main__":
    main()
