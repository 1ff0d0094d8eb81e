"""The alignment stage with a feature cache: this trainer, which finds the frozen tower's features, beside the usual loop.

python benchmarks/feature_cache.py                          # toy size and half of InternVL2-1B in width and depth, on a CPU
python benchmarks/feature_cache.py sizes=half steps=6 where=disk
python benchmarks/feature_cache.py sizes=1B device=cuda     # InternVL2-1B's own size; both in bf16 autocast

The usual loop, the sizes and `tower_graph` are those of `benchmarks/alignment_step.py`. Eight batches come again and again, as
epochs do; the cache has seen them before the first step, so its first epoch takes what `alignment_step` says. What is left of a
step is the connector and the language model. `fill_ms` is the time of a batch that is computed and kept, `fingerprint_ms` what a
start costs for the name of the tower's weights. Preparing pictures costs both sides the same and is left out. Prints one JSON
line.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from alignment_step import SIZES, both_sides, captions
from alternating import against, arguments, plain_step, report
from supervised_step import LR
from torch import Tensor

from lightning_internvl.data.processors.basic import Squash
from lightning_internvl.model.feature_cache import GIB, FeatureCache, fingerprint
from lightning_internvl.model.feature_stores import DiskStore, MemoryStore


def measure(size: dict[str, Any], steps: int, device: str, tower_graph: bool, where: str) -> dict[str, Any]:
    """Both sides over the same eight batches."""
    torch.manual_seed(0)
    batches: list[dict[str, Any]] = [{name: x.to(device) for name, x in captions(size).items()} for _ in range(8)]
    for number, batch in enumerate(batches):
        batch["keys"] = batch["picture_keys"] = [f"{number}/{row}" for row in range(size["rows"])]
    with tempfile.TemporaryDirectory() as folder:
        theirs, stage, autocast = both_sides(size, Path(folder), steps, device, tower_graph)
        model = stage.model
        plain = [{name: x for name, x in batch.items() if isinstance(x, Tensor)} for batch in batches]

        def their_loss(number: int) -> Tensor:
            with autocast():
                return theirs(**plain[number]).loss

        def our_loss(number: int) -> float:
            with autocast(), torch.no_grad():
                return float(stage.losses(batches[number])["next_token"])

        without = our_loss(0)
        store = MemoryStore(64 * GIB) if where == "memory" else DiskStore(Path(folder, "features"), 64 * GIB)
        cache = model.feature_cache = FeatureCache(store, lambda: name)
        began = time.perf_counter()
        name = fingerprint(model.encoder, Squash(size["image"]))
        named = time.perf_counter()
        with autocast(), torch.no_grad():
            for batch in batches:
                model.visual_tokens(batch["pixel_values"], picture_keys=batch["picture_keys"])
        filled = time.perf_counter()
        losses = {"without": without, "with": our_loss(0)}
        found = against(stage, batches, steps, plain_step(theirs, their_loss, LR), "usual_loop", device)
        assert cache.computed == 8 * size["rows"]
        return {
            "parameters_M": round(sum(p.numel() for p in model.parameters()) / 1e6, 2),
            **found,
            "times_as_fast": round(1 / found["ratio"], 2),
            "fingerprint_ms": round(1e3 * (named - began), 1),
            "fill_ms": round(1e3 * (filled - named) / 8, 1),
            "kept_MiB_a_picture": round(store.used / 2**20 / cache.computed, 2),
            "losses": losses,
        }


def main() -> None:
    """Measure the sizes asked for."""
    options = arguments(sizes="toy,half", steps=0, device="cpu", tower_graph="true", where="memory")
    default = {"toy": 60, "half": 10, "1B": 30}
    results = {
        name: measure(
            SIZES[name], options["steps"] or default[name], options["device"], options["tower_graph"] == "true", options["where"]
        )
        for name in options["sizes"].split(",")
    }
    about = {"transformers": transformers.__version__, "tower_graph": options["tower_graph"], "where": options["where"]}
    report("feature_cache", about, {"sizes": results})


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    main()
