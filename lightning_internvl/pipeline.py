"""The alignment stages, one after the other in one process, each starting from the weights that the
one before handed over."""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from lightning_internvl.checkpoints import handoff
from lightning_internvl.checkpoints.load_report import LoadReport
from lightning_internvl.checkpoints.weight_source import SourceWeights, fingerprint, handoff_of, is_run_or_handoff, read_weights
from lightning_internvl.choices import PARTS, Config
from lightning_internvl.config.consent import given_parts
from lightning_internvl.config.filter_settings import FilterSettings
from lightning_internvl.config.run_settings import RunSettings
from lightning_internvl.config.stage_settings import StageSettings
from lightning_internvl.console import console
from lightning_internvl.distributed.checkpoint_files import checkpoint_step, read_checkpoint
from lightning_internvl.distributed.collectives import world_size
from lightning_internvl.distributed.fsdp2 import FSDP2, check_weights
from lightning_internvl.distributed.placement import check_type, place_of, set_products
from lightning_internvl.distributed.signals import RunStopped, tell_of_dead_processes
from lightning_internvl.files import read_json
from lightning_internvl.filtering.command import is_finished, run_filter, settings_after
from lightning_internvl.filtering.job import FilterJob, rehearse_filter
from lightning_internvl.layers import peft
from lightning_internvl.layers.attention import choose_backend
from lightning_internvl.layers.quantization import BLOCK, quantize
from lightning_internvl.layers.stacked_weights import unreached
from lightning_internvl.layers.state_dict import own_tensors
from lightning_internvl.model.compose import Build
from lightning_internvl.model.feature_cache import open_cache
from lightning_internvl.model.vlm import VLM
from lightning_internvl.plan.cost import counted_flops
from lightning_internvl.report.metrics_table import metrics_table
from lightning_internvl.reuse.keep import keyed
from lightning_internvl.reuse.take import take_finished
from lightning_internvl.stages import Stage
from lightning_internvl.stages.base import BaseWeights
from lightning_internvl.training.activation_checkpointing import recompute_blocks
from lightning_internvl.training.assembly import assemble
from lightning_internvl.training.compile import check_compiler, chosen_blocks, compile_blocks
from lightning_internvl.training.length import describe_length
from lightning_internvl.training.out_of_memory import explain_out_of_memory
from lightning_internvl.training.time_left import TimeLeft

LOST = ("Connection closed by peer", "Connection reset by peer", "Socket closed", "NCCL communicator was aborted")
NEVER_MET = (torch.distributed.DistNetworkError, torch.distributed.DistStoreError)
Settings = StageSettings | FilterSettings
NO_WEIGHTS = "a start without weights (init_from=RUN gives some)"


def run_pipeline(config: Config, run_dir: Path, build: Build) -> dict[str, dict[str, float]]:
    """Run the stages of `config["pipeline"]` that have not finished in this run folder, nor in
    another one from which they may be taken (`reuse`).

    Args:
        config: the resolved configuration as plain containers.
        run_dir: the run's folder; a stage whose hand-off is there is taken as it is, a stage with a
            checkpoint goes on from it.
        build: makes an object from a configuration with `_target_` (Hydra's `instantiate`).

    Returns:
        the metrics of all stages, as in `metrics.json`

    Raises:
        ValueError: for a fault of the configuration or the data; those of any stage's configuration
            before the first one trains.
    """
    quiet_lightning()
    run = RunSettings.of(config)
    source: str | Path | None = run.init_from
    for one in unfinished(run, run_dir):  # a refusal comes before a model is built
        choose_attention(one)
    take_finished(run, run_dir, build)
    ahead = unfinished(run, run_dir)
    finished = run.stages.keys() - {one.name for one in ahead}
    attention = announce_attention((ahead or [*run.stages.values()])[0])
    rehearse(ahead, run_dir, build, fresh=not (source or finished & {one.name for one in run.trained}))
    time_left = TimeLeft([*run.stages], ahead, run_dir, partial(counted_flops, build=build))
    for name in [*run.stages]:
        one = run.stages[name]
        set_products(run.matmul_precision, place_of(one.trainer)[0])
        is_filter = isinstance(one, FilterSettings)
        folder = run_dir / name if is_filter else run_dir / "handoff" / name
        if name in finished:
            console.print(f"{name}: finished earlier, taken from {folder}", soft_wrap=True)
        elif isinstance(one, FilterSettings):
            attention = announce_attention(one, attention)
            with explain_stop(one, run_dir):
                run_filter(FilterJob(one, folder, build, source), run_dir)
        else:
            attention = announce_attention(one, attention)
            with explain_out_of_memory(one), explain_stop(one, run_dir), keyed(one, run.config, run_dir, source, build):
                run_stage(one, run_dir, build, source, time_left)
        run = settings_after(run, folder) if is_filter else run
        source = source if is_filter else folder  # a filter hands on what it was given
    metrics = read_json(run_dir / "metrics.json", {})
    console.print(metrics_table(metrics))
    files = {"metrics": run_dir / "metrics.json", "report": run_dir / "report.html"}
    for what, place in {"run folder": run_dir, **files}.items():
        console.print(f"{what:12} {place}", soft_wrap=True)
    return metrics


def unfinished(run: RunSettings, run_dir: Path) -> list[Settings]:
    """The stages and filters that this run has not finished, nor taken from another."""
    done = {name for name in run.stages if (run_dir / "handoff" / name).exists() or is_finished(run_dir / name)}
    return [one for name, one in run.stages.items() if name not in done]


def choose_attention(settings: Settings) -> str:
    """Choose the attention of a stage for its device and precision, which must fit together;
    returns what is told."""
    place = place_of(settings.trainer)
    check_type(*place, settings.trainer.precision)
    try:
        backend, reason = choose_backend(settings.attention, *place)
    except torch.OutOfMemoryError as error:
        full = f"{place[0]} has not even room for the few tokens with which attention is tried"
        raise ValueError(f"out of memory: {full}; another process may hold it (nvidia-smi shows which)") from error
    return f"attention: {backend} ({reason})"


def announce_attention(settings: Settings, before: str = "") -> str:
    """Choose the attention of a stage, and say it unless the same was said before."""
    line = choose_attention(settings)
    if line != before:
        console.print(line, soft_wrap=True, markup=False)
    return line


def rehearse(stages: Iterable[Settings], run_dir: Path, build: Build, *, fresh: bool) -> None:
    """Find the faults of the last stage before the first one has trained.

    Assembles the stages on the meta device, which takes no memory, and compares the names that each
    hands over with those that the next one expects.

    Args:
        fresh: whether the first of them starts without weights.

    Raises:
        ValueError: naming the stage and the fault.
    """
    before: tuple[str, dict[str, Tensor], dict[str, Any]] | None = (NO_WEIGHTS, {}, {}) if fresh else None
    for settings in stages:
        try:
            if isinstance(settings, FilterSettings):
                own, adapters = settings.scorer, {}
                model = rehearse_filter(FilterJob(settings, run_dir / settings.name, build, None))
            else:
                own, adapters = settings, settings.parts.peft
                model = _rehearsed_model(settings, run_dir, build)
            if before and model is not None:
                title, tensors, earlier = before
                found = SourceWeights(tensors, earlier).for_model(adapters)
                new = [*own.new, *_with_weights(own)] if title == NO_WEIGHTS else own.new
                LoadReport.of(model, found, source=title, new=new, dropped=own.dropped)
        except (ValueError, TypeError) as error:
            raise ValueError(f"stages.{settings.name}: {error}") from error
        if isinstance(settings, StageSettings) and model is not None:
            before = f"stage {settings.name}", own_tensors(model), adapters


def _with_weights(settings: StageSettings) -> list[str]:
    """The parts that bring weights of their own, so that a start without any does not lack them."""
    return [part for part in PARTS if (getattr(settings.parts, part) or {}).get("pretrained")]


def _rehearsed_model(settings: StageSettings, run_dir: Path, build: Build) -> VLM:
    """The model of a stage on the meta device that could be trained and handed over."""
    with torch.device("meta"):
        _, stage, _, trainer = assemble(settings, run_dir, build)
        stage.configure_optimizers()
        if isinstance(trainer.strategy, FSDP2):
            check_weights(stage)
        # what nothing could open is told before it is trained
        handoff.manifest_config(stage.model, settings.parts.config)
    check_compiler(settings.compile, settings.trainer.accelerator)
    return stage.model


def run_stage(
    settings: StageSettings, run_dir: Path, build: Build, source: str | Path | None, time_left: TimeLeft | None = None
) -> None:
    """Build one stage, give it its weights (or its checkpoint) and train it."""
    name = settings.name
    console.rule(f"[bold]{name}")
    checkpoint = run_dir / "checkpoints" / name / "last.ckpt"
    start_step = checkpoint_step(checkpoint)
    torch.manual_seed(settings.seed)
    _, stage, data, trainer = assemble(settings, run_dir, build, start_step or 0, time_left)
    if start_step is not None:
        console.print(f"{name}: goes on from step {start_step} ({checkpoint})", soft_wrap=True)
    needs = None if start_step is None else read_checkpoint(checkpoint).get("source")
    if source and (start_step is None or stage.light or needs or stage.swaps_a_part):
        take_over(stage, source, settings.new, settings.dropped)
    if needs and (stage.source is None or stage.source.fingerprint != needs):
        fault = f"{checkpoint} leaves out frozen weights of its start, and {source} holds others now"
        raise ValueError(f"{fault}; put them back, or delete the checkpoint to start the stage again")
    for line in unreached(stage.model, settings.parts.config, stage.trained_names()):
        console.print(line, soft_wrap=True, markup=False)
    for part, done in quantize(stage.model, settings.parts.quantization, keep=stage.trained_names()).items():
        left = f"; {done.left} linear layers are left, their rows are no multiples of {BLOCK}" if done.left else ""
        size = f"{done.before / 2**20:,.1f} -> {done.after / 2**20:,.1f} MiB"
        console.print(f"quantised: {part}, {done.changed} layers and tables, {size}{left}", soft_wrap=True)
    stage.model.feature_cache = cache = open_cache(settings, stage.model.encoder, data.collate)
    if described := describe_length(settings, data):
        console.print(described, soft_wrap=True, markup=False)
    recompute_blocks(stage.model, settings.activation_checkpointing)
    compile_blocks(stage.model, chosen_blocks(settings, stage.model))
    try:
        with explain_lost_process(run_dir), first_error():
            saved = None if start_step is None else checkpoint
            trainer.fit(stage, data, ckpt_path=saved, weights_only=True)
    finally:
        finish_loggers(trainer.loggers)
    if cache is not None:
        console.print(cache.summary(), soft_wrap=True)


def finish_loggers(loggers: Iterable[Any]) -> None:
    """End what a logger keeps for the whole process (W&B's own), lest the next stage write to it.
    What has not begun is not begun by that."""
    for logger in loggers:
        finish = getattr(getattr(logger, "_experiment", None), "finish", None)
        if callable(finish):
            finish()


@contextmanager
def explain_stop(settings: Settings, run_dir: Path) -> Iterator[None]:
    """Let a run that is stopped say in one sentence what is saved and how to go on."""
    try:
        yield
    except RunStopped as stop:
        name = settings.name
        if isinstance(settings, FilterSettings):
            state = "what it has done is kept"
        else:
            checkpoint, last = run_dir / "checkpoints" / name / "last.ckpt", settings.max_steps
            step = checkpoint_step(checkpoint)
            state = f"step {step} of {last} is saved in {checkpoint}" if step else f"no step of {last} is saved"
        advice = f"go on with python train.py resume={run_dir}"
        raise stop.told(f"{stop}; stage {name}: {state}; {advice}") from stop


@contextmanager
def explain_lost_process(run_dir: Path) -> Iterator[None]:
    """Say in plain words that another process has ended, which is all that is known.

    Raises:
        ValueError: with the way to go on.
    """
    try:
        yield
    except RuntimeError as error:
        # before all have met there is no group yet, and no size of it
        lost = world_size() > 1 and any(sign in str(error) for sign in LOST)
        if lost or isinstance(error, NEVER_MET):
            raise ValueError(
                f"another process of this run has ended ({str(error).splitlines()[0][:200]}); what "
                f"it said itself is the reason. Go on with resume={run_dir}"
            ) from error
        raise


@contextmanager
def first_error() -> Iterator[None]:
    """Raise what ended training where the trainer cannot clean up after it, as after a signal or an
    error while data processes start: its second error says nothing and would be told instead."""
    first: BaseException | None = None
    try:
        yield
    except Exception as error:
        if any(frame.name == "_teardown" for frame in traceback.extract_tb(error.__traceback__)):
            first = error.__context__
        if first is None:
            raise
    if first is not None:
        raise first


def quiet_lightning() -> None:
    """Leave out what the trainer says at every start and what is so by design here."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    tell_of_dead_processes()
    for message in (
        ".*module\\(s\\) in eval mode at the start of training.*",  # frozen parts are, on purpose
        ".*does not have many workers.*",
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        "The \\.grad attribute of a Tensor that is not a leaf .*",  # torch.compile looks at it
        # nothing writes into what a block returns
        "FSDP2-wrapped module .* returned a view tensor.*",
    ):
        warnings.filterwarnings("ignore", message)


def take_over(stage: Stage, source: str | Path, new: list[str], dropped: list[str]) -> None:
    """Load a source strictly into a stage's model; print what is loaded, new and dropped.

    Args:
        source: see `read_weights`. Adapters that the stage does not go on with are added to their
            weights.
        new, dropped: patterns of names that may be missing in the source, and of those that may be
            left over.
    """
    model, device = stage.model, next(stage.model.parameters()).device
    start = read_weights(source, device)
    tensors, elsewhere = stage.start_tensors(
        start.for_model(stage.parts.get("peft")), lambda place: read_weights(place, device).for_model(None)
    )
    report = LoadReport.of(model, tensors, source=str(source), new=new, dropped=dropped)
    report.load(model, tensors)
    same = set(report.loaded) - set(report.resized) - stage.trained_names() - elsewhere
    ours = is_run_or_handoff(Path(source))
    place = handoff_of(Path(source)) if ours else source
    given = {} if ours else {part: {"place": one, "fingerprint": fingerprint(one)} for part, one in given_parts().items()}
    stage.take_from(BaseWeights(str(place), frozenset(same), fingerprint(place), given))
    if other := peft.differing(start.peft, stage.parts.get("peft")):
        adapters = f"the adapters of {source} on {', '.join(other)}"
        console.print(f"{adapters} were added to their weights", soft_wrap=True)
    console.print(f"weights from {source}", soft_wrap=True)
    table = Table(header_style="bold")
    for column in ("group", "loaded", "new", "dropped"):
        table.add_column(column, justify="left" if column == "group" else "right")
    for group, row in report.counts().items():
        table.add_row(group, *(str(row[kind] or "") for kind in ("loaded", "new", "dropped")))
    console.print(table)
    for name in report.resized:
        shape = tuple(model.get_parameter(name).shape)
        console.print(f"resized: {name} to {shape}", soft_wrap=True)
