"""The alignment stages, one after the other in one process, each starting from the weights that the one before handed over."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from lightning_internvl.attention import choose_backend
from lightning_internvl.checkpoints import handoff
from lightning_internvl.compose import Build, completed, compose_model
from lightning_internvl.console import console
from lightning_internvl.data.collate import ChatCollator, PairCollator
from lightning_internvl.data.module import StageData
from lightning_internvl.data.templates import load_template
from lightning_internvl.evaluation.bench import Bench
from lightning_internvl.evaluation.tables import metrics_table
from lightning_internvl.files import read_json
from lightning_internvl.model import VLM
from lightning_internvl.stages import Stage

Config = dict[str, Any]


def run_pipeline(config: Config, run_dir: Path, build: Build) -> dict[str, dict[str, float]]:
    """Run the stages of `config["pipeline"]` that have not finished in this run folder.

    Args:
        config: the resolved configuration as plain containers.
        run_dir: the run's folder; a stage whose hand-off is there is taken as it is, a stage with a checkpoint goes on from it.
        build: makes an object from a configuration with `_target_` (Hydra's `instantiate`).

    Returns:
        the metrics of all stages, as in `metrics.json`
    """
    quiet_lightning()
    backend, reason = choose_backend(config["attention"])
    console.print(f"attention: {backend} ({reason})")
    source = config["init_from"]
    for name in config["pipeline"]:
        folder = run_dir / "handoff" / name
        if folder.exists():
            console.print(f"{name}: finished earlier, taken from {folder}")
        else:
            run_stage(name, config, run_dir, build, source)
        source = folder
    metrics = read_json(run_dir / "metrics.json", {})
    console.print(metrics_table(metrics))
    console.print(f"run folder   {run_dir}\nmetrics      {run_dir / 'metrics.json'}\nreport       {run_dir / 'report.html'}", soft_wrap=True)
    return metrics


def run_stage(name: str, config: Config, run_dir: Path, build: Build, source: str | Path | None) -> None:
    """Build one stage from its weights (or its checkpoint) and train it."""
    settings = stage_settings(config, name)
    console.rule(f"[bold]{name}")
    torch.manual_seed(config["seed"])
    model, tokenizers = compose_model(settings["parts"], build)
    checkpoint = run_dir / "checkpoints" / name / "last.ckpt"
    start_step = checkpoint_step(checkpoint)
    if start_step is not None:
        console.print(f"{name}: goes on from step {start_step} ({checkpoint})")
    elif source is not None:
        take_over(model, source, settings["new"], settings["dropped"])
    stage = build(
        settings["module"], model=model, name=name, run_dir=run_dir, parts=settings["parts"], max_steps=settings["max_steps"],
        optimizer=build(settings["optimizer"]), scheduler=build(settings["scheduler"]), seed=config["seed"], start_step=start_step or 0,
    )  # fmt: skip
    view = make_view(settings, model, tokenizers)
    trainer = build(
        settings["trainer"],
        max_steps=settings["max_steps"],
        strategy=build(config["strategy"]) if "_target_" in config["strategy"] else config["strategy"]["name"],
        callbacks=build_callbacks(settings, view, build),
        logger=[build(logger) for logger in stage_loggers(config, name, run_dir, stage.start_step)],
    )
    data = build_data(settings, stage, view, build)
    trainer.fit(stage, data, ckpt_path=checkpoint if start_step is not None else None, weights_only=True)


def quiet_lightning() -> None:
    """Leave out what the trainer says at every start and what is so by design here."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        ".*module\\(s\\) in eval mode at the start of training.*",  # frozen parts are, on purpose
        ".*does not have many workers.*",
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
        ".*Checkpoint directory .* exists and is not empty.*",
    ):
        warnings.filterwarnings("ignore", message)


def stage_settings(config: Mapping[str, Any], name: str) -> Config:
    """One stage's settings, complete: its own over the common ones.

    A stage may carry a change to any common group (`optimizer: {lr: 1e-4}`); one with a `_target_` replaces the group.
    """
    stage = copy.deepcopy(dict(config["stages"][name]))
    for group in ("encoder", "middleware", "decoder", "optimizer", "scheduler", "trainer"):
        own, common = stage.get(group) or {}, copy.deepcopy(config[group])
        stage[group] = own if "_target_" in own else _merged(common, own)
    parts = {part: stage.pop(part) if part in stage["parts"] else None for part in ("encoder", "middleware", "decoder")}
    parts |= {"objectives": stage.pop("objectives"), "image_token": config["data"]["image_token"]}
    return stage | {"parts": parts, "data_group": config["data"], "callbacks": config["callbacks"], "seed": config["seed"]}


def _merged(common: Config, own: Mapping[str, Any]) -> Config:
    for key, value in own.items():
        both = isinstance(value, Mapping) and isinstance(common.get(key), Mapping)
        common[key] = _merged(common[key], value) if both else value
    return common


def checkpoint_step(path: Path) -> int | None:
    """The step of a stage's checkpoint; None without one.

    Raises:
        ValueError: if the file is damaged.
    """
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    except Exception as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); delete it to start the stage again") from error


def take_over(model: VLM, source: str | Path, new: list[str], dropped: list[str]) -> handoff.LoadReport:
    """Load what the source holds for this model, strictly, and print what was loaded, is new, and was dropped."""
    report = handoff.LoadReport.of(model, tensors := read_weights(source), source=str(source), new=new, dropped=dropped)
    report.load(model, tensors)
    console.print(f"weights from {source}", soft_wrap=True)
    table = Table(header_style="bold")
    for column in ("group", "loaded", "new", "dropped"):
        table.add_column(column, justify="left" if column == "group" else "right")
    for group, row in report.counts().items():
        table.add_row(group, *(str(row[kind] or "") for kind in ("loaded", "new", "dropped")))
    console.print(table)
    return report


def read_weights(source: str | Path) -> dict[str, Tensor]:
    """Tensors under our names from a run (its last hand-off), a hand-off folder, or an official checkpoint."""
    name, source = source, Path(source)
    if (source / handoff.MANIFEST).exists():
        return handoff.read(source)[0]
    if (source / "handoff").is_dir():
        finished = sorted((source / "handoff").glob(f"*/{handoff.MANIFEST}"), key=lambda path: path.stat().st_mtime_ns)
        if not finished:
            raise ValueError(f"init_from={source}: no stage of this run has finished; use resume={source} to go on with it")
        return handoff.read(finished[-1].parent)[0]
    from lightning_internvl.checkpoints.pretrained import load_pretrained

    return load_pretrained(name).state_dict()


class View(NamedTuple):
    """How a stage sees data: its collators, and which of them makes the training batches."""

    pairs: PairCollator | None
    chats: ChatCollator | None
    training: Any
    model: VLM


def make_view(settings: Config, model: VLM, tokenizers: Mapping[str, Any]) -> View:
    """The collators that the stage's parts can use: pairs for a middleware that reads text, chats for a decoder."""
    data, collate = settings["data_group"], settings.get("collate") or {}
    pairs = chats = None
    if "middleware" in tokenizers:
        pairs = PairCollator(tokenizers["middleware"], **data["pairs_collate"], **(collate if settings["data"] == "pairs" else {}))
    if "decoder" in tokenizers:
        visual_tokens = model.middleware.tokens_out(model.encoder.num_tokens(data["image_size"]))
        options = dict(data["chats_collate"]) | (collate if settings["data"] == "chats" else {})
        template = load_template(options.pop("template"), options.pop("system", None))
        max_length = options.pop("max_text_tokens") + visual_tokens
        chats = ChatCollator(tokenizers["decoder"], template, visual_tokens, max_length, image_size=data["image_size"], **options)
    training = {"pairs": pairs, "chats": chats}.get(settings["data"])
    if training is None:
        raise ValueError(f"data: {settings['data']!r} does not fit the stage's parts; pairs need a middleware that reads text, chats a decoder")
    return View(pairs, chats, training, model)


def build_callbacks(settings: Config, view: View, build: Build) -> list[Any]:
    """The callbacks of the configuration, in its order; those that look at held-out data get a bench."""
    held_out = settings["data_group"].get("held_out")
    bench = Bench(view.model, build(held_out), pairs=view.pairs, chats=view.chats) if held_out else None
    known = {
        "bench": bench,
        "tasks": {name: build(task) for name, task in (settings.get("evaluation") or {}).items()},
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


def build_data(settings: Config, stage: Stage, view: View, build: Build) -> StageData:
    """The stage's training data, from the next sample on."""
    data = settings["data_group"]
    if not data.get(settings["data"]):
        raise ValueError(f"this data group has no {settings['data']!r}; it offers {[k for k in ('pairs', 'chats') if data.get(k)]}")
    accumulate = settings["trainer"].get("accumulate_grad_batches") or 1
    return StageData(
        build(data[settings["data"]]),
        view.training,
        batch_size=settings["batch_size"],
        batches=settings["max_steps"] * accumulate,
        start_batch=stage.start_step * accumulate,
        seed=settings["seed"],
        endless=data["endless"],
        num_workers=data["num_workers"],
    )
