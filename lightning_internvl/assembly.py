"""One stage put together from its configuration: model, data, callbacks and trainer, everything but the weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch

from lightning_internvl.checks import merged
from lightning_internvl.compose import Build, completed, compose_model
from lightning_internvl.data.collate import ChatCollator, PairCollator
from lightning_internvl.data.encode import ImageTokens, token_id
from lightning_internvl.data.instructions import Instructions
from lightning_internvl.data.labelled import LabelCollator
from lightning_internvl.data.module import StageData
from lightning_internvl.data.packed import PackedChats, grouping_of, packing_of
from lightning_internvl.data.packing import PACKED
from lightning_internvl.data.processors import Processor
from lightning_internvl.data.templates import load_template
from lightning_internvl.evaluation.bench import Bench
from lightning_internvl.feature_cache import check_cache
from lightning_internvl.fitting import READERS, check_captions, check_packable, check_processor
from lightning_internvl.hardware import processes
from lightning_internvl.model import VLM, shifts_labels
from lightning_internvl.options import PARTS, block_settings
from lightning_internvl.spreading import starts_empty
from lightning_internvl.stages import Stage
from lightning_internvl.tensor_parallel import check_layers

Config = dict[str, Any]
LIGHT = ("peft", "quantization")  # groups with a setting for each part


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
        settings["trainer"],
        max_steps=settings["max_steps"],
        strategy=build_strategy(config["strategy"], settings["trainer"], build),
        callbacks=build_callbacks(settings, view, build, tokenizers),
        logger=[build(logger) for logger in stage_loggers(config, name, run_dir, start_step)],
    )
    if (shares := getattr(trainer.strategy, "layer_shares", 1)) > 1:
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


def stage_settings(config: Mapping[str, Any], name: str) -> Config:
    """One stage's settings, complete: its own over the common ones.

    A stage may carry a change to any common group (`optimizer: {lr: 1e-4}`); one with a `_target_` replaces the group. Changes
    to the data group are called `datasets`, because `data` says which of its kinds a stage reads.
    """
    stage = copy.deepcopy(dict(config["stages"][name]))
    stage["max_steps"] = min(stage["max_steps"], config.get("max_steps") or stage["max_steps"])
    for group in ("encoder", "middleware", "decoder", "optimizer", "scheduler", "trainer", *LIGHT):
        own, common = stage.get(group) or {}, copy.deepcopy(config.get(group) or {})
        stage[group] = own if "_target_" in own else merged(common, own)
    stage |= block_settings(config, stage)
    parts = {part: stage.pop(part) if part in stage["parts"] else None for part in PARTS}
    parts |= {"objectives": stage.pop("objectives"), "image_token": config["data"]["image_token"]}
    parts |= {"video_token": config["data"]["video_token"]} if config["data"].get("video_token") else {}
    for kind in LIGHT:
        own = {part: value for part, value in stage.pop(kind).items() if value and parts.get(part)}
        parts |= {kind: own} if own else {}
    data = _data_of(config["data"], stage.pop("datasets", None) or {})
    return stage | {"parts": parts, "data_group": data, "callbacks": config["callbacks"], "seed": config["seed"]}


def _data_of(common: Config, change: Mapping[str, Any]) -> Config:
    """The data group with a stage's changes; a dataset with a `_target_` takes the place of another."""
    filled = merged(copy.deepcopy(dict(common)), {key: value for key, value in change.items() if not _is_object(value)})
    return filled | {key: value for key, value in change.items() if _is_object(value)}


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping) and "_target_" in value


class View(NamedTuple):
    """How a stage sees data: `pairs` and `chats` prepare what is measured, `training` the batches of a step."""

    pairs: PairCollator | None
    chats: ChatCollator | None
    training: Any
    model: VLM
    labels: LabelCollator | None = None


def make_view(settings: Config, model: VLM, tokenizers: Mapping[str, Any], build: Build) -> View:
    """The collators that the stage's parts can use: pairs for a middleware that reads text, chats for a decoder.

    Pictures go through `data.processor` in training and, where it is given, `data.eval_processor` in evaluation; a stage with a
    `collate.processor` uses that for both. `eval_processor` and a stage's processor may be changes only, without a `_target_`.
    """
    data, own = settings["data_group"], (settings.get("collate") or {}).get("processor")
    processor = build(_changed(data["processor"], own))
    measured = build(_changed(data["processor"], own or data.get("eval_processor")))
    training = make_collators(settings, model, tokenizers, processor, packed=packing_of(settings) == PACKED)
    if settings["data"] not in training:
        raise ValueError(
            f"data: {settings['data']!r} does not fit the stage's parts; "
            "valid choices: pairs (with a middleware that reads text), chats (with a decoder), labels (with a probe)"
            f"{f'. {READERS}' if settings['data'] == 'pairs' else ''}"
        )
    found = make_collators(settings, model, tokenizers, measured, more_tiles=measured.max_tiles - processor.max_tiles)
    return View(found.get("pairs"), found.get("chats"), training[settings["data"]], model, found.get("labels"))


def make_collators(
    settings: Config,
    model: VLM,
    tokenizers: Mapping[str, Any],
    processor: Processor,
    more_tiles: int = 0,
    packed: bool = False,
) -> dict[str, Any]:
    """Collators by kind of data, with one processor.

    Args:
        more_tiles: by how many tiles a picture may exceed those that `max_length` was made for.
        packed: whether conversations share rows.

    Raises:
        ValueError: for rows that the decoder cannot read, or that could not hold a conversation.
    """
    data, found = settings["data_group"], {}
    collate = {name: value for name, value in (settings.get("collate") or {}).items() if name != "processor"}
    if "middleware" in tokenizers:
        options = dict(data["pairs_collate"]) | (collate if settings["data"] == "pairs" else {})
        found["pairs"] = pairs = PairCollator(tokenizers["middleware"], processor.whole(), **options)
        check_captions(model.middleware, pairs.max_length)
    if hasattr(model.middleware, "classes"):
        found["labels"] = LabelCollator(processor.whole())
    if "decoder" in tokenizers:
        check_processor(model.encoder, processor)
        tokens = model.placeholders(processor.image_size)
        options = dict(data["chats_collate"]) | (collate if settings["data"] == "chats" else {})
        template = load_template(options.pop("template"), options.pop("system", None))
        frame = options.pop("image_frame", None)
        start, end = (template.image_frame if frame is None else frame) or (None, None)
        names = ImageTokens(data["image_token"], start, end, data.get("video_token"))
        for name in filter(None, (names.start, names.end)):
            token_id(tokenizers["decoder"], name)
        options["image_tokens"] = names
        text, total = options.pop("max_text_tokens"), options.pop("max_length", None)
        max_length = total + max(0, more_tiles) * tokens if total else text + processor.max_tiles * tokens
        options["split_answers"] = not shifts_labels(model.decoder)
        if getattr(model.middleware, "instructed", False):
            options["instructions"] = Instructions(tokenizers["middleware"])
        if packed:
            check_packable(model.decoder)
            options |= {name: data.get(f"packing_{name.removeprefix('row_')}") for name in ("row_tokens", "row_tiles")}
        kind = PackedChats if packed else ChatCollator
        found["chats"] = kind(tokenizers["decoder"], template, processor, tokens, max_length, **options)
    return found


def _changed(processor: Config, change: Config | None) -> Config:
    """A processor's configuration with some settings changed, or another one."""
    return dict(change) if change and "_target_" in change else {**processor, **(change or {})}


def build_callbacks(settings: Config, view: View, build: Build, tokenizers: Mapping[str, Any]) -> list[Any]:
    """The callbacks of the configuration, in its order; those that look at held-out data get a bench."""
    held_out = settings["data_group"].get("held_out") or {}  # data without any may still be given sizes for it, by debug=fast
    bench = (
        Bench(view.model, build(held_out), pairs=view.pairs, chats=view.chats, labels=view.labels)
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
    for logger in (config["logger"] or {}).values():
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
