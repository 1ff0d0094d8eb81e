"""A few steps of stages on the claimed GPU, without the callbacks that measure: whether they run, and where a step waits.

    python tests/claimed_gpu/device.py tests/claimed_gpu/steps.py "NAME=WORD WORD" ...

Each argument is a case: a name, and what stands behind `python train.py`. The kernels of xformers and of PyTorch's attention for
uneven lengths load where the name has the word "xformers" or "varlen". Prints a line of JSON for every stage of every case.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from formulas import calls, kernels_load
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from runs import ROOT, once

import lightning_internvl.cli  # noqa: F401 (registers what configurations compute)
from lightning_internvl.config.stage_settings import stage_settings
from lightning_internvl.config.targets import build
from lightning_internvl.layers.attention import choose_backend
from lightning_internvl.pipeline import choose_attention, quiet_lightning
from lightning_internvl.training.assembly import Assembly, assemble

LEFT_OUT = ("samples", "evaluation", "report", "handoff", "validation", "checkpoint", "progress", "tracking")
FIXED = (
    "debug=fast", "logger=[history]", "trainer.log_every_n_steps=1000", "trainer.precision=bf16-mixed", "max_steps=3",
    "data.num_workers=0", "++callbacks.guard.every_n_steps=1000", *(f"~callbacks.{name}" for name in LEFT_OUT),
)  # fmt: skip
STEP = 1  # the first one whose waits count; what is made once was made in the one before


class Steps(L.Callback):
    """Losses of all steps, and the waits between the starts of two of them."""

    def __init__(self, waits: Counter[Any]) -> None:
        self.waits, self.before, self.found = waits, Counter[Any](), Counter[Any]()
        self.losses: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer: Any, stage: Any, batch: Any, number: int) -> None:
        if number == STEP + 1:
            self.found = self.waits - self.before
        self.before = Counter(self.waits)

    def on_train_batch_end(self, trainer: Any, stage: Any, outputs: Any, batch: Any, number: int) -> None:
        self.losses.append(outputs["loss"].detach())


def stages(words: Sequence[str], folder: Path, *more: str) -> Iterator[tuple[str, str, Assembly]]:
    """Each stage of a command line, made when asked for: its name, what is told of its attention, and all that trains it."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        words = once(*FIXED, *words, *more, f"paths.run={folder}")
        config: Any = OmegaConf.to_container(compose("config", overrides=list(words)), resolve=True)
    quiet_lightning()
    for name in config["pipeline"]:
        config["stages"][name]["batch_size"] = min(config["stages"][name].get("batch_size") or 4, 4)
    for name in config["pipeline"]:
        torch.manual_seed(0)
        settings = stage_settings(config, name)
        yield name, choose_attention(settings), assemble(settings, folder, build)


def run(words: Sequence[str], waits: Counter[Any], folder: Path) -> Iterator[dict[str, Any]]:
    """What each stage of a command line gives."""
    for name, told, (_, stage, data, trainer) in stages(words, folder):
        steps = Steps(waits)
        calls.clear()
        trainer.callbacks.append(steps)
        trainer.fit(stage, data)
        found = {f"{kind}: {line}": times for (kind, line), times in steps.found.items()}
        losses = [round(float(loss), 4) for loss in steps.losses]
        yield {"stage": name, "attention": told, "losses": losses, "waits": found, "calls": calls}


def real_waits(assembly: Assembly) -> list[str]:
    """What PyTorch says of each wait in the steps of a stage but the first three, on a GPU that is there."""
    began, original = list[int](), assembly.stage.on_train_batch_start

    def start(batch: Any, number: int) -> None:
        began.append(len(caught))
        original(batch, number)

    assembly.stage.on_train_batch_start = start
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            assembly.trainer.fit(assembly.stage, assembly.data)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    steps = caught[began[3] : began[-1]]
    return [f"{one.filename}:{one.lineno}: {one.message}" for one in steps if "synchroniz" in str(one.message)]


def main(cases: list[str], waits: Counter[Any]) -> None:
    for case in cases:
        name, _, words = case.partition("=")
        with tempfile.TemporaryDirectory() as folder:
            try:
                with kernels_load(*{"xformers", "varlen"}.intersection(name.split())):
                    for line in run(words.split(), waits, Path(folder)):
                        print(json.dumps({"case": name, **line}), flush=True)
            except Exception as error:
                print(json.dumps({"case": name, "error": f"{type(error).__name__}: {error}"}), flush=True)
                traceback.print_exc()
        choose_backend("auto")


if __name__ == "__main__":
    from device import _gpu

    main(sys.argv[1:], _gpu.waits)
