"""Stages that take their parts from where they start: an official checkpoint, a run, or a hand-off folder.

A stage says `parts: inherited`; this turns it into one that names its parts with all their sizes, so that a run's folder says
what it trained, wherever its start may be by then. `inherited` may also stand for the processor of pictures, the chat format and
its system message.
"""

from __future__ import annotations

import copy
from pathlib import Path

from lightning_internvl.checkpoints import handoff
from lightning_internvl.checkpoints.origin import handoff_of, is_ours
from lightning_internvl.checkpoints.pretrained import local_folder, meta_model
from lightning_internvl.checks import INHERITED, PARTS
from lightning_internvl.compose import Config
from lightning_internvl.official import SAVED, chat_format, layout_of, load_tokenizer, placeholder
from lightning_internvl.opened import settings_of
from lightning_internvl.systems import SYSTEMS, named, picture_fields, processor_name, processor_settings


def inherit(config: Config) -> Config:
    """A configuration in which nothing is inherited any more.

    Raises:
        ValueError: for a start that does not answer, or does not say what is to be inherited from it.
    """
    config = copy.deepcopy(config)
    heirs = [stage for name, stage in config["stages"].items() if name in config["pipeline"] and stage["parts"] == INHERITED]
    start = config["init_from"]
    found = _of_run(Path(start)) if is_ours(Path(start)) else _of_checkpoint(start)
    for stage in heirs:
        stage["parts"] = [part for part in PARTS if found[part]]
        stage |= {part: found[part] for part in stage["parts"]}
    data = config["data"]
    data["image_token"] = found["image_token"]
    data |= {"video_token": found["video_token"]} if found["video_token"] else {}
    if data["processor"].get("_target_") == INHERITED:
        data["processor"] = found["processor"] | {key: v for key, v in data["processor"].items() if key != "_target_"}
    collate = data["chats_collate"]
    if collate["template"] == INHERITED:
        collate["template"], collate["image_frame"] = found["template"], found["image_frame"]
    if collate["system"] == INHERITED:
        collate["system"] = found["system"]
    return config


def _of_run(place: Path) -> Config:
    """What a hand-off says of its parts, and the run around it of how they read."""
    folder = handoff_of(place)
    known, settings = handoff.read_manifest(folder)["config"], settings_of(folder)
    if not known.get("decoder"):
        raise ValueError(f"init_from={place}: the stage {folder.name} has no decoder; start from one that answers")
    for part in PARTS:
        if (folder / handoff.TOKENIZERS / part).is_dir():
            known[part]["tokenizer"]["folder"] = str((folder / handoff.TOKENIZERS / part).resolve())
    data, own = settings["data_group"], settings.get("collate") or {}
    chats = {**data["chats_collate"], **{key: value for key, value in own.items() if key in data["chats_collate"]}}
    return {
        **{part: known[part] for part in PARTS},
        "image_token": known["image_token"],
        "video_token": known.get("video_token"),
        "processor": {**data["processor"], **(own.get("processor") or {})},
        "template": chats["template"],
        "system": chats.get("system"),
        "image_frame": chats.get("image_frame"),
    }


def _of_checkpoint(start: str) -> Config:
    """What the files of an official checkpoint say, and how its system was published."""
    folder = local_folder(start)
    layout, config, native = layout_of(folder)
    model = meta_model(folder)
    if model.decoder is None:
        raise ValueError(f"init_from={start} ({layout}) has no decoder; name the parts of the stage instead")
    words, known, found = load_tokenizer(folder), SYSTEMS[layout], picture_fields(folder)
    parts = {part: getattr(model, part).config for part in PARTS}
    video = words.convert_ids_to_tokens(model.video_token_id) if model.video_token_id is not None else None
    rows, context = len(words), placeholder(model, words)
    added = {"extra_tokens": [context]} if len(words) > rows else {}
    parts["decoder"] |= {"tokenizer": {"_target_": SAVED, "folder": str(folder.resolve()), **added}}
    if getattr(model.middleware, "instructed", False):
        parts["middleware"]["tokenizer"] = {"_target_": SAVED, "folder": str((folder / "qformer_tokenizer").resolve())}
    template, frame, _ = chat_format(words, known, context, named(known.template, config, model), False)
    name = processor_name(known, found, config, model, by_class=native)
    return {
        **parts,
        "image_token": context,
        "video_token": video,
        "processor": processor_settings(name, model, found, config, known.statistics),
        "template": template.name,
        "system": template.system,
        "image_frame": list(frame) if frame else [],
    }
