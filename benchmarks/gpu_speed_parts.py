"""The parts of `gpu_acceptance.py` that say how fast it is (see `gpu_parts.py`)."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import runpy
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from alternating import now, plain_step
from gpu_parts import NotHereError, place, real
from torch import Tensor

from lightning_internvl.layers.attention import choose_backend
from lightning_internvl.training.activation_checkpointing import recompute_blocks
from lightning_internvl.training.compile import compile_blocks


def packed(dry: bool, folder: Path) -> dict[str, Any]:
    """A step over a packed row of 16k tokens with 48 pictures, about 0.8 B parameters: what it takes, and the roofline says."""
    return _packed(dry, compiled=False)


def compiled(dry: bool, folder: Path) -> dict[str, Any]:
    """The same with compiled blocks, as is the default on a GPU."""
    real(dry)
    return _packed(dry, compiled=True)


def _packed(dry: bool, compiled: bool) -> dict[str, Any]:
    import roofline

    small = {"size": "tiny", "tokens": 96, "tiles": 2}
    options = roofline.OPTIONS | (small if dry else {"activation_checkpointing": "selective"})
    options |= {"compile": str(compiled).lower()}
    predicted = roofline.measure(options)
    tera = predicted["mfu"] * options["rated_tflops"] * predicted["ms"] / 1e3  # of the model, a step
    size, device = roofline.SIZES[options["size"]], place()
    choose_backend("auto", device, torch.bfloat16)
    with torch.device(device):
        stage = roofline.build(size, options)
        batch = _filled(roofline.batch_of(size, options["tokens"], options["tiles"]), size, options)
    parts = ("encoder", "decoder")
    recompute_blocks(stage.model, dict.fromkeys(parts, None if dry else "selective"))
    compile_blocks(stage.model, dict.fromkeys(parts, compiled))

    def loss_of(_: int) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return stage.losses(batch)["next_token"]

    step, times = plain_step(stage, loss_of, 1e-5), []
    for number in range(3 if dry else 12):
        begun = now()
        step(number)
        times.append(now() - begun)
    seconds = statistics.median(times[1 if dry else 4 :])
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    found = {"ms": round(1e3 * seconds, 1), "mfu": round(tera / seconds / options["rated_tflops"], 3), "GiB": round(memory, 1)}
    return found | {"predicted_ms": predicted["ms"], "predicted_mfu": predicted["mfu"]}


def _filled(batch: dict[str, Any], size: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Values for a row: its pictures' tokens, then text, of which an eighth of the row is learnt."""
    import roofline

    tokens, visual = options["tokens"], options["tiles"] * (size["tower"]["image_size"] // size["tower"]["patch_size"]) ** 2 // 4
    ids = torch.randint(roofline.IMAGE + 1, size["vocab"], (1, tokens))
    ids[:, :visual] = roofline.IMAGE
    labels = ids.clone()
    labels[:, : max(visual, tokens - tokens // 8)] = -100
    values = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    counts = {"counts": {"next_token": int((labels != -100).sum())}}
    return {**batch, **values, **counts, "pixel_values": torch.randn(batch["pixel_values"].shape)}


def contrastive(dry: bool, folder: Path) -> dict[str, Any]:
    """A contrastive step beside open_clip's."""
    if importlib.util.find_spec("open_clip") is None:
        raise NotHereError("open_clip is not installed")
    return _beside("contrastive_step", "open_clip", dry)


def supervised(dry: bool, folder: Path) -> dict[str, Any]:
    """A supervised step beside transformers'."""
    return _beside("supervised_step", "transformers", dry)


def _beside(benchmark: str, other: str, dry: bool) -> dict[str, Any]:
    """A benchmark of this folder: milliseconds of both sides and their ratio."""
    words = ["sizes=toy", "steps=3"] if dry else [f"sizes={'60M' if other == 'open_clip' else '170M'}", "steps=30"]
    out = io.StringIO()
    with patch.object(sys, "argv", [benchmark, *words, f"device={place().type}"]), contextlib.redirect_stdout(out):
        runpy.run_path(str(Path(__file__).parent / f"{benchmark}.py"), run_name="__main__")
    told = json.loads(out.getvalue().splitlines()[-1])["sizes"]
    return dict(_ratios(told))


def _ratios(told: dict[str, Any], before: str = "") -> Iterator[tuple[str, float]]:
    for name, value in told.items():
        if isinstance(value, dict):
            yield from _ratios(value, f"{before}{name} ")
        elif name == "ratio" or (name.endswith("_ms") and "apart" not in name):
            yield f"{before}{name}", value


def transfer(dry: bool, folder: Path) -> dict[str, Any]:
    """48 pictures to the device, as bytes and as float32, pinned: milliseconds; and GB a second."""
    device, side = place(), 28 if dry else 448
    pin: Callable[[Tensor], Tensor] = Tensor.pin_memory if device.type == "cuda" else Tensor.clone
    found: dict[str, Any] = {}
    for dtype in (torch.uint8, torch.float32):
        pictures, times = pin(torch.ones(48, 3, side, side, dtype=dtype)), []
        for _ in range(6):
            begun = now()
            pictures.to(device, non_blocking=True)
            times.append(now() - begun)
        name, best = str(dtype).removeprefix("torch."), min(times)
        found |= {f"{name}_ms": round(1e3 * best, 2), f"{name}_GB_per_s": round(pictures.nbytes / best / 1e9, 1)}
    return found
