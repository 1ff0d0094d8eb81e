"""Faults of a configuration, found before PyTorch is imported or any model is built."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_internvl.choices import (
    BACKENDS,
    BLOCKWISE,
    GIVEN_PARTS,
    INHERITED,
    METHODS,
    PACKINGS,
    PARTS,
    PRODUCTS,
    SWEEP,
    block_faults,
    cache_faults,
    is_step,
    trained_stages,
)
from lightning_internvl.config.effects import PLANNED
from lightning_internvl.config.fit import fit_faults
from lightning_internvl.config.hardware import hardware_faults, precision_faults, processes
from lightning_internvl.config.known_keys import KINDS, full_names, key_faults, stage_key_faults
from lightning_internvl.config.logger_checks import logger_faults
from lightning_internvl.config.pair_checks import pair_faults
from lightning_internvl.config.part_values import adapter_faults
from lightning_internvl.config.stage_settings import merged, stage_settings
from lightning_internvl.files import RUN_CONFIG
from lightning_internvl.launch import is_helper
from lightning_internvl.messages import ConfigError, did_you_mean, number_faults

KEYS = (
    "name", "seed", "pipeline", "max_steps", "epochs", "batch_size", "init_from", "init_parts", "resume", "trust",
    "attention", "matmul_precision", "plan", "doctor", "reuse", *PLANNED, "objective_metric",
    "encoder", "middleware", "decoder", "stages", "data", "peft", "quantization",
    "optimizer", "scheduler", "strategy", "trainer", "callbacks", "logger", "paths",
    *BLOCKWISE,
)  # fmt: skip
# settings of data from shards that are looked into before the start
STREAMED = ("shards", "sources", "weights", "schedule")

NO_EPOCHS = "max_steps=N or epochs=N is the length of all stages, stages.NAME.max_steps=N of one"
MEASURED = "callbacks.validation.samples=N and callbacks.tracking.samples=N say how much is measured"
OF_TASKS = "evaluate.py measures a finished run, on as many samples as its tasks say"
NO_VALIDATION = "callbacks.tracking.every_n_steps=N measures while a stage trains, callbacks.validation at its end"
SHORTER = "max_steps=N makes all stages shorter, debug=fast tries them with four steps each"
# of Lightning's Trainer that the program sets itself, or that break its counting:
OWN_ARGUMENTS: dict[str, tuple[Any, str]] = {
    "max_steps": (None, NO_EPOCHS),  # what they may be, and what does it here
    "min_steps": (None, NO_EPOCHS),
    "max_epochs": (-1, NO_EPOCHS),
    "min_epochs": (None, NO_EPOCHS),
    "limit_train_batches": (1.0, SHORTER),
    "fast_dev_run": (False, SHORTER),
    "overfit_batches": (0, "debug=overfit trains on sixteen samples again and again"),
    "limit_val_batches": (1.0, MEASURED),
    "limit_test_batches": (1.0, OF_TASKS),
    "limit_predict_batches": (1.0, OF_TASKS),
    "val_check_interval": (1.0, NO_VALIDATION),
    "check_val_every_n_epoch": (1, NO_VALIDATION),
    "num_sanity_val_steps": (0, NO_VALIDATION),
    "callbacks": (None, "+callbacks.NAME={_target_: CLASS} adds one"),
    "logger": (None, "logger=[tensorboard,history] chooses them, +logger.NAME={_target_: CLASS} adds one"),
    "strategy": (None, "strategy=auto, ddp or fsdp2 is a setting of its own, beside the trainer"),
    "default_root_dir": (None, "paths.run=FOLDER, or paths.root=FOLDER for all runs"),
    "enable_checkpointing": (False, "callbacks.checkpoint.every_n_steps=N saves, and resume=RUN goes on exactly"),
    "use_distributed_sampler": (False, "each process has its own samples already"),
    "reload_dataloaders_every_n_epochs": (0, NO_EPOCHS),
    "barebones": (False, "logger=[] and ~callbacks.NAME leave out what is not wanted"),
}


def check_config(config: Mapping[str, Any], variables: Collection[str] | None = None) -> None:
    """Check what can be checked without building anything.

    Args:
        config: resolved, as plain containers.
        variables: what other settings refer to (see `key_faults`); None for the configuration of a
            run.

    Raises:
        ConfigError: with all faults, each naming the setting, its value and what is valid.
    """
    faults = [*_common_faults(config), *_pipeline_faults(config), *key_faults(config, variables)]
    faults += [] if faults else [*hardware_faults(config), *precision_faults(config)]
    for name in [] if faults else config["pipeline"]:
        stage = config["stages"][name]
        found = _step_faults(config, name) if is_step(stage) else _stage_faults(config, stage)
        faults += [f"stages.{name}: {fault}" for fault in found]
    faults += [] if faults else _unfit(config)
    if faults:
        raise ConfigError(faults)


def _unfit(config: Mapping[str, Any]) -> list[str]:
    """What does not fit together, each fault once with all stages that have it."""
    stages: dict[str, list[str]] = {}
    for name in trained_stages(config):
        if config["stages"][name]["parts"] != INHERITED:
            settings = stage_settings(config, name)
            for fault in (*fit_faults(settings, only_planned=config["plan"]), *pair_faults(config, settings)):
                stages.setdefault(fault, []).append(f"stages.{name}")
    return [f"{', '.join(dict.fromkeys(names))}: {fault}" for fault, names in stages.items()]


def _step_faults(config: Mapping[str, Any], name: str) -> Iterable[str]:
    from lightning_internvl.config.filter_checks import step_faults  # which needs this file

    return step_faults(config, name)


def _common_faults(config: Mapping[str, Any]) -> Iterable[str]:
    for key in config:
        if key not in KEYS:
            full = " or ".join(full_names(key, {name: node for name, node in config.items() if name != key}))
            yield f"there is no setting {key!r}; {f'did you mean {full}?' if full else did_you_mean(key, KEYS)}"
    name, start = config["name"], config["init_from"]
    if not isinstance(name, str) or not name or "/" in name or not name.isprintable():
        yield f"name={name!r} must be a word; it names the run's folder"
    yield from number_faults("seed", config["seed"], least=0, whole=True)
    if config["attention"] not in BACKENDS:
        attention = config["attention"]
        yield f"{attention=} is not known; {did_you_mean(attention, BACKENDS)}"
    products = config.get("matmul_precision", PRODUCTS[0])  # runs from before it have none
    if products not in PRODUCTS:
        yield f"matmul_precision={products!r} is not known; {did_you_mean(products, PRODUCTS)}"
    if not isinstance(config["plan"], bool):
        yield f"plan={config['plan']!r} must be true (print what the run needs) or false (run)"
    if not isinstance(config.get("doctor", False), bool):  # runs from before it have none
        choices = "true (check each stage on a few samples) or false (run)"
        yield f"doctor={config['doctor']!r} must be {choices}"
    yield from _reuse_faults(config)
    if config.get("max_steps") is not None:
        yield from number_faults("max_steps", config["max_steps"], above=0, whole=True)
    if config.get("epochs") is not None:
        yield from number_faults("epochs", config["epochs"], above=0)
    if config.get("batch_size") is not None:
        yield from number_faults("batch_size", config["batch_size"], above=0, whole=True)
    for name in PLANNED:  # runs from before they were there have not all
        if config.get(name) is not None:
            most = 1 if name == "device_utilisation" else None
            yield from number_faults(name, config[name], above=0, most=most)
    workers = config["data"].get("num_workers", 0)
    if workers != "auto":
        yield from number_faults("data.num_workers", workers, least=0, whole=True, note=", or auto, by the cores of the machine")
    if not isinstance(config["data"].get("validate", False), bool):
        validate = config["data"]["validate"]
        yield f"data.{validate=} must be true (check the data) or false (train)"
    bad = config["data"].get("max_bad_fraction", 0.0)
    yield from number_faults("data.max_bad_fraction", bad, least=0, most=1)
    if (seconds := config["data"].get("max_sample_seconds")) is not None:
        yield from number_faults("data.max_sample_seconds", seconds, least=0)
    unread = config["data"].get("max_unread_fraction", 1.0)
    yield from number_faults("data.max_unread_fraction", unread, least=0, most=1)
    yield from _packing_faults(config["data"])
    yield from _range_faults(config["data"], config["data"].get("chats_collate") or {})
    yield from _stream_faults(config, {}, look=not config["plan"])
    yield from _schedule_faults(config["optimizer"], config["scheduler"])
    yield from adapter_faults(config)
    yield from block_faults(config)
    yield from _trainer_faults(config["trainer"])
    yield from logger_faults(config.get("logger"))
    yield from _objective_faults(config.get("objective_metric"), config["pipeline"] or ())
    if not (config["callbacks"] or {}).get("handoff"):
        without = "without it no stage hands its weights over (see conf/callbacks/default.yaml)"
        yield f"callbacks.handoff is missing; {without}"
    if start and not Path(start).exists() and not _may_be_hub_id(str(start)):
        sources = "a run, a hand-off folder, an official checkpoint or a hub id"
        yield f"init_from={start}: there is no such folder; give {sources}"
    yield from _init_part_faults(config)
    yield from _trust_faults(config)


def _reuse_faults(config: Mapping[str, Any]) -> Iterable[str]:
    reuse = config.get("reuse", False)  # runs from before it have none
    choices = "sweep (from jobs of the same sweep), true (from the runs in paths.root), a folder of runs, or false"
    if not isinstance(reuse, bool | str):
        yield f"reuse={reuse!r:.80} must be {choices}"
    elif isinstance(reuse, str) and reuse != SWEEP and not config["resume"] and not Path(reuse).is_dir():
        yield f"reuse={reuse}: there is no such folder; give {choices}"


def _init_part_faults(config: Mapping[str, Any]) -> Iterable[str]:
    """Faults of where parts lie that a start only names."""
    from lightning_internvl.config.trust import MANIFEST  # which needs this file

    parts, start = config.get("init_parts") or {}, config["init_from"]  # runs from before it have none
    for part, place in parts.items():
        inherited = (config.get(part) or {}).get("_target_") == INHERITED  # whose recipe has a setting for it
        said = f"{part}.pretrained" if inherited else f"init_parts.{part}"
        if part not in GIVEN_PARTS:
            yield f"init_parts: {part!r} is no part that a start may only name; {did_you_mean(part, GIVEN_PARTS)}"
        elif place is not None and not start and not config["resume"]:
            yield f"{said}={place} has no effect without init_from=FOLDER_OR_ID"
        elif place is not None and start and any((Path(start) / name).exists() for name in (RUN_CONFIG, MANIFEST)):
            yield f"{said}={place} has no effect: init_from={start} is a run, which has all its parts"
        elif place is not None and not Path(str(place)).exists() and not _may_be_hub_id(str(place)):
            yield f"{said}={place}: there is no such folder; give one, or a hub id"


def _trust_faults(config: Mapping[str, Any]) -> Iterable[str]:
    # which need this file
    from lightning_internvl.config.trust import folder_faults, foreign_targets, trust_faults

    named = config.get("trust") or []
    if faults := list(trust_faults(named)):
        yield from faults
    elif config["init_from"]:
        # the user's own parts are named already
        yield from folder_faults(config["init_from"], [*named, *foreign_targets(config)])


def _trainer_faults(trainer: Mapping[str, Any] | None) -> Iterable[str]:
    for name, value in (trainer or {}).items():
        allowed, instead = OWN_ARGUMENTS.get(name, (value, ""))
        if value is not None and (value != allowed or isinstance(value, bool) != isinstance(allowed, bool)):
            yield f"trainer.{name}={value!r} is not for the trainer to say: {instead}"


def _packing_faults(data: Mapping[str, Any]) -> Iterable[str]:
    packing = data.get("packing")
    if not isinstance(packing, bool | str | None) or packing not in PACKINGS:
        choices = "null, true (the same as packed), packed, bucketed"
        yield f"data.{packing=} is not known; valid choices: {choices}"
    for name in ("tokens", "tiles", "window"):
        if data.get(f"packing_{name}") is not None:
            yield from number_faults(f"data.packing_{name}", data[f"packing_{name}"], above=0, whole=True)


def _range_faults(data: Mapping[str, Any], collate: Mapping[str, Any]) -> Iterable[str]:
    """Faults of settings that are the least and the most of something."""
    settings = (
        ("data.jpeg_quality", data.get("jpeg_quality"), 100, "[75, 100]: qualities of JPEG from 1 to 100"),
        ("data.chats_collate.video_frames", collate.get("video_frames"), math.inf, "[8, 32]: frames of a video, one or more"),
    )
    for name, value, most, example in settings:
        numbers = isinstance(value, list) and len(value) == 2 and all(type(one) is int for one in value)
        if value is not None and not (numbers and 1 <= value[0] <= value[1] <= most):
            yield f"{name}={value!r:.80} must be null or two whole numbers that rise, as in {example}"


def _stream_faults(config: Mapping[str, Any], stage: Mapping[str, Any], look: bool) -> Iterable[str]:
    data = merged(config["data"], stage.get("datasets"))
    if "lanes" not in data:
        return
    from lightning_internvl.config.stream_checks import stream_faults  # for data from shards alone

    count = processes({**config["trainer"], **(stage.get("trainer") or {})})
    # processes that read the same samples
    layers = config["strategy"].get("tensor_parallel_size", 1)
    readers = count // layers if count and isinstance(layers, int) and layers > 0 else None
    yield from stream_faults(data, readers, look=look and not is_helper())


def _may_be_hub_id(text: str) -> bool:
    """Whether it reads OWNER/NAME and does not begin with a folder that is here."""
    owner, _, name = text.partition("/")
    return bool(re.fullmatch(r"[\w.-]+", name)) and bool(re.fullmatch(r"\w[\w.-]*", owner)) and not Path(owner).exists()


def _objective_faults(objective: Any, pipeline: Any) -> Iterable[str]:
    for name in objective if isinstance(objective, list) else [objective]:
        stage, _, metric = str(name).partition("/")
        if name is not None and not (metric and stage in pipeline):
            form = "must be STAGE/METRIC with a metric of a stage of the pipeline"
            yield f"objective_metric={name!r} {form}; {did_you_mean(stage, pipeline)}"


def _pipeline_faults(config: Mapping[str, Any]) -> Iterable[str]:
    pipeline, stages = config["pipeline"], config["stages"]
    if not isinstance(pipeline, list) or not pipeline:
        example = f"as in pipeline=[{next(iter(stages), '')}]; {did_you_mean(str(pipeline), stages)}"
        yield f"{pipeline=} must be a list of stages, {example}"
        return
    for name in pipeline:
        if name not in stages:
            yield f"pipeline: there is no stage {name!r}; {did_you_mean(name, stages)}"
    if all(stages.get(name, {}).get("parts") != INHERITED for name in pipeline):
        for setting, value in _inheritable(config["data"]).items():
            if value == INHERITED:
                names = ", ".join(pipeline)
                yield (f"{setting}={INHERITED} is for stages with parts={INHERITED}; pipeline=[{names}] has none; choose another")
    for name in {n for n in pipeline if pipeline.count(n) > 1}:
        yield f"pipeline: stage {name!r} is listed twice; give the second one a name of its own under stages"


def _inheritable(data: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the data that a stage with inherited parts may take from where it starts."""
    processor, chats = data.get("processor") or {}, data.get("chats_collate") or {}
    return {
        "data.tokenizer": data.get("tokenizer"),
        "processor@data.processor": processor.get("_target_"),
        **{f"data.processor.{name}": value for name, value in processor.items() if name != "_target_"},
        **{f"data.chats_collate.{name}": value for name, value in chats.items()},
    }


def _stage_faults(config: Mapping[str, Any], stage: Mapping[str, Any]) -> Iterable[str]:
    yield from stage_key_faults(config, stage)
    epochs = stage.get("epochs")
    if epochs is not None:
        yield from number_faults("epochs", epochs, above=0)
    for key in ("max_steps", "batch_size"):
        if key == "batch_size" or epochs is None or stage.get(key) is not None:
            yield from number_faults(key, stage.get(key), above=0, whole=True)
    if not stage.get("module", {}).get("train"):
        yield "module.train is empty: the stage would train nothing; name parts, e.g. [encoder, middleware]"
    if stage["parts"] == INHERITED:
        if not config["init_from"]:
            sources = "a checkpoint, a run or a hand-off folder"
            yield f"its parts are those of init_from; give init_from=FOLDER_OR_ID: {sources}"
        parts = PARTS
    else:
        parts = stage["parts"]
    for part in parts:
        if part not in PARTS:
            yield f"parts: {part!r} is no part; {did_you_mean(part, PARTS)}"
    if missing := [part for part in ("encoder", "middleware") if part not in parts]:
        yield f"parts={stage['parts']} lacks {' and '.join(missing)}; only the decoder may be left out"
    yield from adapter_faults({kind: merged(config.get(kind), stage.get(kind)) for kind in METHODS})
    yield from _packing_faults(stage.get("datasets") or {})
    yield from _range_faults(stage.get("datasets") or {}, stage.get("collate") or {})
    yield from _trainer_faults(stage.get("trainer"))
    own = stage.get("datasets") or {}
    yield from _reading_faults(merged(config["data"], own), stage.get("data"))
    yield from _stream_faults(config, stage, look=not config["plan"] and not own.keys().isdisjoint(STREAMED))
    yield from block_faults(stage)
    yield from cache_faults(stage.get("feature_cache"))
    kinds = ("optimizer", "scheduler")
    optimizer, scheduler = ({**config[kind], **(stage.get(kind) or {})} for kind in kinds)
    yield from _schedule_faults(optimizer, scheduler)


def _reading_faults(data: Mapping[str, Any], reads: Any) -> Iterable[str]:
    """Faults of the kind of data that a stage reads."""
    offers = [kind for kind in KINDS if "_target_" in (data.get(kind) or {})]
    if reads in KINDS and reads not in offers:
        own = f"or give +data.{reads}._target_=CLASS (docs/extend.md)"
        offered = f"the data offers {', '.join(offers) or 'nothing'}"
        yield f"it reads {reads}, and {offered}; choose another data=GROUP, {own}"


def _schedule_faults(optimizer: Mapping[str, Any], scheduler: Mapping[str, Any]) -> Iterable[str]:
    yield from number_faults("optimizer.lr", optimizer.get("lr"), above=0)
    for pattern, rate in (optimizer.get("part_lr") or {}).items():
        yield from number_faults(f"optimizer.part_lr.{pattern}", rate, above=0)
    yield from number_faults("optimizer.weight_decay", optimizer.get("weight_decay", 0.0), least=0)
    yield from number_faults("scheduler.warmup_steps", scheduler.get("warmup_steps", 0), least=0, whole=True)
