"""One stage put together from its configuration: model, data, callbacks and trainer, everything but the weights."""

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
from lightning_internvl.config.stage_settings import stage_settings
from lightning_internvl.data.collate.packed import grouping_of
from lightning_internvl.data.module import StageData
from lightning_internvl.distributed.clusters import stage_clock, trainer_plugins
from lightning_internvl.distributed.tensor_parallel import check_layers
from lightning_internvl.distributed.weight_broadcast import starts_empty
from lightning_internvl.inference.collators import View, make_view
from lightning_internvl.inference.predictor import Predictor
from lightning_internvl.model.compose import Build, completed, compose_model
from lightning_internvl.model.feature_cache import WHOLE
from lightning_internvl.model.vlm import VLM
from lightning_internvl.stages import Stage
from lightning_internvl.stages.freezing import FreezePlan


class Assembly(NamedTuple):
    """What `trainer.fit(stage, data)` needs."""

    settings: Config
    stage: Stage
    data: StageData
    trainer: L.Trainer


def assemble(name: str, config: Config, run_dir: Path, build: Build, start_step: int = 0) -> Assembly:
    """Build one stage with fresh weights. Writes nothing.

    Args:
        start_step: the optimizer step from which the stage goes on; 0 starts it.

    Raises:
        ValueError: for settings that do not fit together.
    """
    settings = stage_settings(config, name)
    with torch.device("meta") if starts_empty(config["strategy"], settings["parts"]) else nullcontext():
        model, tokenizers = compose_model(settings["parts"], build)
    stage = build_stage(name, settings, model, run_dir, build, start_step)
    view = make_view(settings, model, tokenizers, build)
    trainer = build(
        {key: value for key, value in settings["trainer"].items() if key not in ("max_time", "plugins")},
        max_steps=settings["max_steps"],
        strategy=build_strategy(config["strategy"], settings["trainer"], build),
        callbacks=[*stage_clock(settings["trainer"]), *build_callbacks(settings, view, build, tokenizers)],
        plugins=trainer_plugins(settings["trainer"], build),
        default_root_dir=stage.folder,  # nothing is written or looked for where the command was started
        logger=[build(logger) for logger in stage_loggers(config, name, run_dir, start_step)],
    )
    if (shares := getattr(trainer.strategy, "tensor_parallel_size", 1)) > 1:
        check_layers(model, settings, shares)
    data = build_data(settings, start_step, view, build, stage.folder)
    if settings.get("feature_cache"):
        check_cache(model.encoder, stage.plan, view.training.processor, trainer.strategy, endless=data.endless)
        view.training.picture_keys = True
    return Assembly(settings, stage, data, trainer)


def build_strategy(strategy: Config, trainer: Config, build: Build) -> Any:
    """The strategy, or its name. What Lightning would choose for several devices refuses weights that a stage does not use."""
    if "_target_" in strategy:
        return build(strategy)
    several = (processes(trainer) or torch.cuda.device_count()) > 1
    return "ddp_find_unused_parameters_true" if several else strategy["name"]


def build_stage(name: str, settings: Config, model: VLM, run_dir: Path, build: Build, start_step: int = 0) -> Stage:
    """The stage around its model."""
    return build(
        settings["module"],
        model=model,
        name=name,
        run_dir=run_dir,
        parts=settings["parts"],
        max_steps=settings["max_steps"],
        optimizer=build(settings["optimizer"]),
        scheduler=build(settings["scheduler"]),
        seed=settings["seed"],
        start_step=start_step,
    )


def build_callbacks(settings: Config, view: View, build: Build, tokenizers: Mapping[str, Any]) -> list[Any]:
    """The callbacks of the configuration, in its order; those that look at held-out data get a bench."""
    held_out = settings["data_group"].get("held_out") or {}  # data without any may still be given sizes for it, by debug=fast
    bench = (
        Predictor(view.model, build(held_out), pairs=view.pairs, chats=view.chats, labels=view.labels)
        if "_target_" in held_out
        else None
    )
    known = {
        "bench": bench,
        "view": view,
        "settings": settings,
        "builder": build,
        "tokenizers": tokenizers,
        "tasks": {name: build(task) for name, task in (settings.get("evaluation") or {}).items() if task},
        **(settings.get("samples") or {"mode": "c", "writer": None}),
    }
    return [completed(build, callback, **known) for callback in settings["callbacks"].values() if callback]


def stage_loggers(config: Config, name: str, run_dir: Path, start_step: int) -> list[Config]:
    """Logger configurations with the stage's places filled in."""
    places = {"{run_dir}": str(run_dir), "{stage}": name}
    loggers = []
    for logger in (config.get("logger") or {}).values():
        if logger is None:
            continue
        logger = {k: _fill(v, places) for k, v in logger.items()}
        if "start_step" in logger:
            logger["start_step"] = start_step
        loggers.append(logger)
    return loggers


def _fill(value: Any, places: Mapping[str, str]) -> Any:
    for place, text in places.items():
        value = value.replace(place, text) if isinstance(value, str) else value
    return value


def build_data(settings: Config, start_step: int, view: View, build: Build, folder: Path) -> StageData:
    """The stage's training data, from the next sample on; `folder` is where samples that cannot be used are listed."""
    data = settings["data_group"]
    if not data.get(settings["data"]):
        offers = [kind for kind in ("pairs", "chats", "labels") if data.get(kind)]
        raise ValueError(
            f"this data group has no {settings['data']!r}; it offers {', '.join(offers)}; choose another with data=GROUP"
        )
    accumulate = settings["trainer"].get("accumulate_grad_batches") or 1
    dataset = build(data[settings["data"]])
    return StageData(
        dataset,
        view.training,
        batch_size=settings["batch_size"],
        batches=settings["max_steps"] * accumulate,
        start_batch=start_step * accumulate,
        seed=settings["seed"],
        endless=data["endless"],
        num_workers=data["num_workers"],
        max_bad_fraction=data.get("max_bad_fraction") or 0.0,
        folder=folder,
        held_out=dataset.held_out() if hasattr(dataset, "held_out") else None,
        grouping=grouping_of(settings, view.training),
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
    elif read := getattr(encoder, "inputs", ()):
        fault = f"{type(encoder).__name__} reads {', '.join(read)} beside the pixels, which is not kept by picture"
    elif not WHOLE & {kind.__name__ for kind in type(strategy).__mro__}:
        fault = f"{type(strategy).__name__} divides the encoder among processes, which must then run it together; choose ddp"
    if fault:
        raise ValueError(f"feature_cache: {fault}; or leave feature_cache out")
