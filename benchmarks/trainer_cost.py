"""What the trainer costs: its step time beside that of a bare PyTorch loop over the same model and batches.

python benchmarks/trainer_cost.py                       # the default recipe, all stages
python benchmarks/trainer_cost.py steps=60 rounds=5 experiment=internvl_chat_toy

Both loops take turns in one process, with the same weights at their start, the same ready batches, optimizer, schedule and
clipping. The trainer runs with its usual callbacks and loggers but for those that look at held-out data or end a stage. A step
is the time between two requests for a batch, so everything between them counts. Prints one JSON line.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lightning_internvl.assembly import Config, assemble
from lightning_internvl.cli import CONF, build
from lightning_internvl.console import console
from lightning_internvl.pipeline import quiet_lightning

WARM_UP = 5  # steps of each round that do not count
LEFT_OUT = ("samples", "evaluation", "report", "handoff")


class Batches:
    """Ready batches, again and again, and the moments at which they were asked for."""

    def __init__(self, batches: list[Any], steps: int) -> None:
        self.batches, self.steps, self.moments = batches, steps, list[float]()

    def __iter__(self) -> Iterator[Any]:
        self.moments.clear()
        for step in range(self.steps):
            self.moments.append(time.perf_counter())
            yield self.batches[step % len(self.batches)]

    def __len__(self) -> int:
        return self.steps

    def step_times(self) -> list[float]:
        """Seconds of each step after the warm-up."""
        return [after - before for before, after in zip(self.moments[WARM_UP:], self.moments[WARM_UP + 1 :], strict=False)]


def bare_loop(name: str, config: Config, folder: Path, batches: Batches) -> None:
    """The shortest loop that trains the same model in the same way."""
    stage = assemble(name, config, folder, build).stage
    stage.plan.apply(stage.model, 0)
    made = stage.configure_optimizers()
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for batch in batches:
        loss = sum(stage.losses(batch).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config["trainer"]["gradient_clip_val"])
        optimizer.step()
        scheduler.step()


def trainer_loop(name: str, config: Config, folder: Path, batches: Batches) -> None:
    """The same steps through the stage's trainer."""
    _, stage, _, trainer = assemble(name, config, folder, build)
    trainer.fit(stage, batches)


def measure(name: str, config: Config, folder: Path, steps: int, rounds: int) -> dict[str, float]:
    """Milliseconds a step of both loops and their ratio, as medians over all rounds."""
    data = assemble(name, config, folder, build).data
    samples = [[data.dataset[i * data.batch_size + j] for j in range(data.batch_size)] for i in range(8)]
    batches = Batches([data.collate(s) for s in samples], steps)
    times: dict[str, list[float]] = {"bare": [], "trainer": []}
    for turn in range(rounds):
        for kind, loop in (("bare", bare_loop), ("trainer", trainer_loop)):
            torch.manual_seed(0)
            loop(name, config, folder / f"{name}_{turn}_{kind}", batches)
            times[kind] += batches.step_times()
    bare, trainer = (statistics.median(times[kind]) * 1e3 for kind in ("bare", "trainer"))
    mean = statistics.fmean(times["trainer"]) / statistics.fmean(times["bare"])
    return {
        "bare_ms": round(bare, 2),
        "trainer_ms": round(trainer, 2),
        "ratio": round(trainer / bare, 3),
        "mean_ratio": round(mean, 3),
    }


def main(arguments: list[str]) -> None:
    """Read `steps=`, `rounds=` and Hydra overrides, measure every stage of the pipeline, print one JSON line."""
    own = dict(a.split("=") for a in arguments if a.startswith(("steps=", "rounds=")))
    overrides = [a for a in arguments if not a.startswith(("steps=", "rounds="))]
    steps, rounds = int(own.get("steps", 50)) + WARM_UP + 1, int(own.get("rounds", 4))
    with initialize_config_dir(str(CONF), version_base="1.3"), tempfile.TemporaryDirectory() as folder:
        fixed = [f"paths.run={folder}", "stages.generative.module.mined_from_step=0", *(f"~callbacks.{c}" for c in LEFT_OUT)]
        composed = compose("config", overrides=[*fixed, *overrides])
        config = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        quiet_lightning()
        console.quiet = True
        for stage in config["stages"].values():
            stage["max_steps"] = steps
        stages = {name: measure(name, config, Path(folder), steps, rounds) for name in config["pipeline"]}
    record = {"benchmark": "trainer_cost", "torch": torch.__version__, "threads": torch.get_num_threads(), "stages": stages}
    print(json.dumps(record))


if __name__ == "__main__":
    main(sys.argv[1:])
