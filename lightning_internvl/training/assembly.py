"""One stage from its configuration: model, data, callbacks, trainer, all but weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import nn

from lightning_internvl.choices import Config
from lightning_internvl.config.hardware import processes
from lightning_internvl.config.stage_settings import LIGHT, StageSettings, TrainerSettings
from lightning_internvl.data.collate.packed import grouping_of
from lightning_internvl.data.module import StageData
from lightning_internvl.distributed.clusters import stage_clock, trainer_plugins
from lightning_internvl.distributed.tensor_parallel import check_layers
from lightning_internvl.distributed.weight_broadcast import starts_empty
from lightning_internvl.inference.collators import View, make_view
from lightning_internvl.inference.predictor import Predictor
from lightning_internvl.model.compose import Build, compose_model
from lightning_internvl.model.feature_cache import WHOLE
from lightning_internvl.model.vlm import VLM
from lightning_internvl.stages import Stage
from lightning_internvl.stages.freezing import FreezePlan
from lightning_internvl.training.compile import AUTO
from lightning_internvl.training.context import StageContext
from lightning_internvl.training.time_left import TimeLeft


class Assembly(NamedTuple):
    """What `trainer.fit(stage, data)` needs."""

    settings: StageSettings
    stage: Stage
    data: StageData
    trainer: L.Trainer


def assemble(
    settings: StageSettings, run_dir: Path, build: Build, start_step: int = 0, time_left: TimeLeft | None = None
) -> Assembly:
    """One stage with fresh weights. Writes nothing.

    Args:
        start_step: the optimizer step from which the stage goes on; 0 starts it.
        time_left: of the run that it belongs to.

    Raises:
        ValueError: for settings that do not fit together.
    """
    parts, trainer_settings = settings.parts, settings.trainer
    with torch.device("meta") if starts_empty(settings.strategy, parts.quantization) else nullcontext():
        model, tokenizers = compose_model(parts.config, build)
    stage = build_stage(settings, model, run_dir, build, start_step)
    view = make_view(settings, model, tokenizers, build)
    callbacks = build_callbacks(settings.callbacks, stage_context(settings, view, tokenizers, build, time_left))
    trainer = build(
        {key: value for key, value in trainer_settings.node.items() if key not in ("max_time", "plugins")},
        max_steps=settings.max_steps,
        strategy=build_strategy(settings.strategy, trainer_settings, build),
        callbacks=[*stage_clock(trainer_settings.max_time), *callbacks],
        plugins=trainer_plugins(trainer_settings.plugins, build),
        # nothing is written or looked for where the command was started
        default_root_dir=stage.folder,
        logger=[build(node) for node in logger_nodes(settings, run_dir, start_step)],
    )
    if (shares := getattr(trainer.strategy, "tensor_parallel_size", 1)) > 1:
        compiled = {name: word for name, word in settings.compile.items() if word != AUTO}
        check_layers(model, shares, {kind: getattr(parts, kind) for kind in LIGHT}, compiled)
    data = build_data(settings, start_step, view, build, stage.folder)
    if settings.feature_cache is not None:
        check_cache(model.encoder, stage.plan, view.training.processor, trainer.strategy, endless=data.endless)
        view.training.picture_keys = True
    return Assembly(settings, stage, data, trainer)


def build_strategy(node: Config, trainer: TrainerSettings, build: Build) -> Any:
    """The strategy, or its name. What Lightning would choose for several devices refuses weights
    that a stage does not use."""
    if "_target_" in node:
        return build(node)
    several = (processes(trainer.node) or torch.cuda.device_count()) > 1
    return "ddp_find_unused_parameters_true" if several else node["name"]


def build_stage(settings: StageSettings, model: VLM, run_dir: Path, build: Build, start_step: int = 0) -> Stage:
    """The stage around its model."""
    return build(
        settings.module,
        model=model,
        name=settings.name,
        run_dir=run_dir,
        parts=settings.parts.config,
        max_steps=settings.max_steps,
        optimizer=build(settings.optimizer),
        scheduler=build(settings.scheduler),
        seed=settings.seed,
        start_step=start_step,
    )


def stage_context(
    settings: StageSettings, view: View, tokenizers: Mapping[str, Any], build: Build, time_left: TimeLeft | None = None
) -> StageContext:
    """What callbacks can know of a stage."""
    predictor, held_out = None, settings.data.measured_on
    if held_out is not None:
        predictor = Predictor(view.model, build(held_out), pairs=view.pairs, chats=view.chats, labels=view.labels)
    tasks = {name: build(task) for name, task in settings.evaluation.items() if task}
    return StageContext(settings, view, predictor, tasks, tokenizers, build, time_left)


def build_callbacks(nodes: Mapping[str, Config | None], context: StageContext) -> list[Any]:
    """Callbacks in the order of their configuration, told of the stage by `setup_stage`."""
    callbacks = [context.build(node) for node in nodes.values() if node]
    for callback in callbacks:
        if hasattr(callback, "setup_stage"):
            callback.setup_stage(context)
    return callbacks


def logger_nodes(settings: StageSettings, run_dir: Path, start_step: int) -> list[Config]:
    """Logger configurations with the stage's places filled in: `{run_dir}`, `{stage}` and `{run}`,
    the last two folders of `run_dir`, which are the name and the time of a run."""
    run = "/".join(run_dir.absolute().parts[-2:])
    places = {"{run_dir}": str(run_dir), "{stage}": settings.name, "{run}": run}
    nodes = [node for node in settings.loggers.values() if node is not None]
    found = [_with_places(node, places) for node in nodes]
    return [node | ({"start_step": start_step} if "start_step" in node else {}) for node in found]


def _with_places(value: Any, places: Mapping[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _with_places(inner, places) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_places(inner, places) for inner in value]
    for place, text in places.items():
        value = value.replace(place, text) if isinstance(value, str) else value
    return value


def build_data(settings: StageSettings, start_step: int, view: View, build: Build, folder: Path) -> StageData:
    """The stage's training data from the next sample on; `folder` lists unusable samples."""
    data, accumulate = settings.data, settings.trainer.accumulate_grad_batches
    dataset = build(data.dataset(settings.reads))
    return StageData(
        dataset,
        view.training,
        batch_size=settings.batch_size,
        batches=settings.max_steps * accumulate,
        start_batch=start_step * accumulate,
        seed=settings.seed,
        endless=data.endless,
        num_workers=data.num_workers,
        max_bad_fraction=data.max_bad_fraction,
        max_sample_seconds=data.max_sample_seconds,
        max_unread_fraction=data.max_unread_fraction,
        folder=folder,
        held_out=dataset.held_out() if hasattr(dataset, "held_out") else None,
        grouping=grouping_of(settings.packing, view.training, settings.batch_size, data.packing_window),
        accumulate=accumulate,
    )


def check_cache(encoder: nn.Module, plan: FreezePlan, processor: Any, strategy: Any, *, endless: bool) -> None:
    """Refuse a cache that would give wrong features, or never any.

    Raises:
        ValueError: with the reason.
    """
    trained = [rule.name for name, _ in encoder.named_parameters() if (rule := plan.rule(f"encoder.{name}"))]
    fault = None
    if trained:
        fault = f"the encoder trains in this stage (module.train names {trained[0]}), so that its features change"
    elif endless:
        fault = "this data is endless and shows no picture twice; set data.endless=false and a length, or take other data"
    elif processor.random:
        fault = f"{type(processor).__name__} draws another part of a picture each time; choose another processor"
    elif processor.jpeg_quality:
        fault = f"data.jpeg_quality={list(processor.jpeg_quality)} changes a picture each time; set it to null"
    elif read := getattr(encoder, "inputs", ()):
        fault = f"{type(encoder).__name__} reads {', '.join(read)} beside the pixels, which is not kept by picture"
    elif not WHOLE & {kind.__name__ for kind in type(strategy).__mro__}:
        fault = f"{type(strategy).__name__} divides the encoder among processes, which must then run it together; choose ddp"
    if fault:
        raise ValueError(f"feature_cache: {fault}; or leave feature_cache out")
