"""What the trainer costs: its step time beside that of a bare PyTorch loop over the same model and batches.

python benchmarks/trainer_cost.py                       # the default recipe, all stages
python benchmarks/trainer_cost.py steps=300 experiment=internvl_chat_toy

The two loops take turns step by step, so that a machine that speeds up or slows down does so for both. They train equal models
on the same ready batches with the same optimizer, schedule and clipping. The trainer runs with its usual callbacks and loggers
but for those that look at held-out data or end a stage; its step is the time from one batch to the next request, so everything
between counts. Prints one JSON line.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lightning_internvl.choices import Config
from lightning_internvl.cli import CONF
from lightning_internvl.config.stage_settings import stage_settings
from lightning_internvl.config.targets import build
from lightning_internvl.console import console
from lightning_internvl.pipeline import quiet_lightning
from lightning_internvl.training.assembly import assemble

WARM_UP = 10  # steps that do not count
LEFT_OUT = ("samples", "evaluation", "validation", "tracking", "report", "handoff")


class Alternating:
    """Ready batches for the trainer; before each one the bare loop takes a step of its own with the same batch."""

    def __init__(self, batches: list[Any], steps: int, bare_step: Callable[[Any], None]) -> None:
        self.batches, self.steps, self.bare_step = batches, steps, bare_step
        self.bare, self.trainer = list[float](), list[float]()

    def __iter__(self) -> Iterator[Any]:
        for step in range(self.steps):
            batch = self.batches[step % len(self.batches)]
            asked = time.perf_counter()
            self.bare_step(batch)
            given = time.perf_counter()
            yield batch
            self.bare.append(given - asked)
            self.trainer.append(time.perf_counter() - given)

    def __len__(self) -> int:
        return self.steps


def bare_loop(name: str, config: Config, folder: Path) -> Callable[[Any], None]:
    """One step of the shortest loop that trains the same model in the same way."""
    stage = assemble(stage_settings(config, name), folder, build).stage
    stage.plan.apply(stage.model, 0)
    made = stage.configure_optimizers()
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def step(batch: Any) -> None:
        loss = sum(stage.losses(batch).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config["trainer"]["gradient_clip_val"])
        optimizer.step()
        scheduler.step()

    return step


def measure(name: str, config: Config, folder: Path, steps: int) -> dict[str, float]:
    """Milliseconds a step of both loops and their ratio: medians, and the ratio of the means."""
    _, stage, data, trainer = assemble(stage_settings(config, name), folder, build)
    samples = [[data.dataset[i * data.batch_size + j] for j in range(data.batch_size)] for i in range(8)]
    loop = Alternating([data.collate(s) for s in samples], steps, bare_loop(name, config, folder))
    trainer.fit(stage, loop)
    bare, ours = ([1e3 * seconds for seconds in times[WARM_UP:]] for times in (loop.bare, loop.trainer))
    return {
        "bare_ms": round(statistics.median(bare), 2),
        "trainer_ms": round(statistics.median(ours), 2),
        "ratio": round(statistics.median(ours) / statistics.median(bare), 3),
        "ratio_of_means": round(statistics.fmean(ours) / statistics.fmean(bare), 3),
    }


def main(arguments: list[str]) -> None:
    """Read `steps=` and Hydra overrides, measure every stage of the pipeline, print one JSON line."""
    steps = WARM_UP + next((int(a.removeprefix("steps=")) for a in arguments if a.startswith("steps=")), 150)
    overrides = [a for a in arguments if not a.startswith("steps=")]
    with initialize_config_dir(str(CONF), version_base="1.3"), tempfile.TemporaryDirectory() as folder:
        fixed = [f"paths.run={folder}", "stages.generative.module.mined_from_step=0", *(f"~callbacks.{c}" for c in LEFT_OUT)]
        composed = compose("config", overrides=[*fixed, *overrides])
        config = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        quiet_lightning()
        console.quiet = True
        for stage in config["stages"].values():
            stage["max_steps"] = steps
        stages = {name: measure(name, config, Path(folder), steps) for name in config["pipeline"]}
    print(
        json.dumps(
            {"benchmark": "trainer_cost", "torch": torch.__version__, "threads": torch.get_num_threads(), "stages": stages}
        )
    )


if __name__ == "__main__":
    main(sys.argv[1:])
