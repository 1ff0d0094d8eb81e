"""Every stage of a pipeline checked on a few of its samples, a line for each check: nothing is
written and nothing is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from rich.text import Text

from lightning_internvl.choices import Config
from lightning_internvl.config.run_settings import RunSettings
from lightning_internvl.config.stage_settings import StageSettings
from lightning_internvl.console import console
from lightning_internvl.distributed.placement import place_of
from lightning_internvl.doctor import equivalences as equals, single_stage as checks
from lightning_internvl.doctor.harness import Harness, Result
from lightning_internvl.layers.attention import choose_backend
from lightning_internvl.layers.quantization import quantize
from lightning_internvl.model.compose import Build
from lightning_internvl.pipeline import quiet_lightning, take_over
from lightning_internvl.training.assembly import assemble

SAMPLES = 8  # they make two micro-batches
Check = Callable[[Harness], Iterable[Result]]
CHECKS: dict[str, Check] = {
    # First what needs no whole step: on a GPU a wrong number of placeholders ends all that comes
    # after that step.
    "one group": checks.one_group,
    "labels": checks.labels,
    "placeholders": checks.placeholders,
    "step by step": checks.step_by_step,
    "saved activations": checks.saved_activations,
    "packed": equals.check_packed_rows,
    "accumulated": equals.check_accumulation,
    "resumed": equals.check_resume,
    "backends": equals.check_backends,
    "merged": equals.check_merge,  # the last one: it takes the adapters away
}
MARKS = {True: ("PASS", "green"), False: ("FAIL", "bold red"), None: ("  - ", "dim")}


def run_doctor(config: Config, build: Build) -> bool:
    """Check all stages of the pipeline and print a line for each check.

    Returns:
        whether all have passed

    Raises:
        ValueError: naming the stage whose settings do not fit together, or whose data cannot be
            read.
    """
    quiet_lightning()
    begun, found = time.monotonic(), list[Result]()
    source = config["init_from"]
    for settings in RunSettings.of(config).trained:
        console.rule(f"[bold]{settings.name}")
        harness, source = harness_of(settings, build, source), None
        for result in results_of(harness):
            found.append(result)
            word, style = MARKS[result.passed]
            console.print(Text.assemble((word, style), f"  {result.name}: {result.detail}"), soft_wrap=True)
    failed = sum(result.passed is False for result in found)
    seconds = time.monotonic() - begun
    passed = sum(result.passed is True for result in found)
    console.print(f"{passed} checks passed, {failed} failed, {len(found) - passed - failed} do not apply; {seconds:.0f} s")
    return failed == 0


def harness_of(settings: StageSettings, build: Build, source: str | None = None) -> Harness:
    """One stage, with the weights of a source or fresh ones, and a few of its samples.

    Raises:
        ValueError: naming the stage and the fault.
    """
    try:
        torch.manual_seed(settings.seed)
        choose_backend(settings.attention, *place_of(settings.trainer))
        parts = assemble(settings, Path(), build)
        if source:
            take_over(parts.stage, source, settings.new, settings.dropped)
        else:
            console.print("weights: fresh ones, the checks do not depend on what the stage before it has learnt", soft_wrap=True)
        quantize(parts.stage.model, settings.parts.quantization, keep=parts.stage.trained_names())
        return Harness.of(parts, SAMPLES)
    except (ValueError, TypeError) as error:
        raise ValueError(f"stages.{settings.name}: {error}") from error


def results_of(harness: Harness) -> Iterator[Result]:
    """What all checks find. One that cannot go on has failed, for the reason that stopped it."""
    for name, check in CHECKS.items():
        try:
            yield from check(harness)
        except Exception as error:  # of any kind: what a step of the run would have met
            first = next(iter(str(error).splitlines()), "")
            yield Result(name, False, f"it stopped with {type(error).__name__}: {first}")
