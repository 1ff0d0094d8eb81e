"""Stages that take their parts from where they start: an official checkpoint, a run, or a hand-off
folder.

A stage says `parts: inherited`; this turns it into one whose parts are named with all their sizes,
so that a run's folder says what it trained, wherever its start may be by then. `connector` under
`train` becomes what the middleware has between tower and language model. `inherited` may also stand
for the tokenizer, the processor of pictures or settings of it, the chat format and its system
message; what is given instead of it stays.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lightning_internvl.checkpoints import handoff, load_handoff
from lightning_internvl.checkpoints.official import meta_model
from lightning_internvl.checkpoints.weight_source import handoff_of, is_run_or_handoff
from lightning_internvl.choices import GIVEN_PARTS, INHERITED
from lightning_internvl.config.checks import PARTS
from lightning_internvl.config.effects import swaps_a_part
from lightning_internvl.config.targets import locate
from lightning_internvl.data.collate.base import pad_id
from lightning_internvl.data.templates import template_names
from lightning_internvl.files import RUN_CONFIG
from lightning_internvl.hub import local_folder
from lightning_internvl.inference.load_official import (
    PLACEHOLDER,
    SAVED,
    chat_format,
    layout_of,
    load_tokenizer,
    own_processor,
    placeholder,
    tokenizer_place,
)
from lightning_internvl.inference.load_run import settings_of
from lightning_internvl.inference.published_systems import (
    HANDOFF,
    Lacking,
    named,
    picture_fields,
    processor_name,
    processor_settings,
    system_of,
)
from lightning_internvl.model.compose import Config, compose_model, trusted_build
from lightning_internvl.model.vlm import VLM
from lightning_internvl.training.transplant import new_part, pictures_of, with_new_part

GIVE = {"template": "data.chats_collate.template", "tokenizer": "data.tokenizer"}
# stands in `train` for the names of the middleware that a language model reads through
CONNECTOR = "connector"
NO_DECODER = "has no decoder, so it cannot answer; start from a stage or a checkpoint that has one"


class InheritedSettings(NamedTuple):
    """What there is to inherit.

    Attributes:
        data: `image_token` and, where videos have one, `video_token`.
        processor: a configuration.
        chats: `template`, `system` and `image_frame`, the tokens around a picture (None: those of
            the template).
    """

    parts: dict[str, Config]
    data: Config
    processor: Config
    chats: Config


def inherit(config: Config) -> Config:
    """A configuration in which nothing is inherited any more.

    Raises:
        ValueError: for a start that does not answer, or does not say what is to be inherited from
            it.
    """
    config = copy.deepcopy(config)
    data, start = config["data"], config["init_from"]
    chats, tokenizer = data["chats_collate"], _given_instead(data.pop("tokenizer", None))
    template, given = _given_instead(chats["template"]), {part: config[part] for part in GIVEN_PARTS}
    swapped = new_part(given) if any(swaps_a_part(config["stages"][name]) for name in config["pipeline"]) else None
    found = _told("init_from", start, template, None if swapped == "decoder" else tokenizer)
    connector = _connector(found.parts["middleware"]["_target_"])
    for stage in config["stages"].values():
        if stage["parts"] == INHERITED:
            stage["parts"] = list(PARTS)
            stage["module"]["train"] = [connector if rule == CONNECTOR else rule for rule in stage["module"]["train"]]
    before = found
    if swapped == "encoder":
        found = found._replace(processor=pictures_of(given, found.processor))
    elif swapped == "decoder":
        found = _with_language_model(found, given["decoder"], template, tokenizer)
    config |= found.parts
    data |= found.data
    whole = data["processor"].get("_target_") == INHERITED
    data["processor"] = (found.processor if whole else {}) | _with_inherited(data["processor"], found.processor)
    data["chats_collate"] = {"image_frame": found.chats["image_frame"]} | _with_inherited(chats, found.chats)
    return with_new_part(config, given, before.parts, before.processor)


def _told(setting: str, place: str, template: str | None, tokenizer: str | None) -> InheritedSettings:
    """As `_inherited_settings`; what is missing is said with the settings that give it.

    Args:
        setting: which names the place.
    """
    try:
        return _inherited_settings(place, template, tokenizer)
    except Lacking as error:
        raise ValueError(f"{setting}={place}: {error.what}; give {GIVE[error.setting]}={error.value}") from error


def _with_language_model(
    found: InheritedSettings, decoder: Config, template: str | None, tokenizer: str | None
) -> InheritedSettings:
    """What a start leaves to its stages where its language model is another one, which brings its
    tokenizer and its chat format.

    Raises:
        ValueError: for a language model alone without a chat format.
    """
    if decoder["_target_"] == INHERITED:
        other = _told("decoder.pretrained", decoder["pretrained"], template, tokenizer)
        return found._replace(parts=found.parts | {"decoder": other.parts["decoder"]}, data=other.data, chats=other.chats)
    if template is None:
        fault = f"decoder: {decoder['pretrained']} is a language model alone, which does not say its chat format"
        raise ValueError(f"{fault}; give {GIVE['template']}=NAME, one of {', '.join(template_names())}")
    chats = {"template": template, "system": None, "image_frame": None}
    return found._replace(parts=found.parts | {"decoder": decoder}, data={"image_token": PLACEHOLDER}, chats=chats)


def _connector(target: str) -> str:
    """What of a middleware stands between tower and language model, as a line of `train`."""
    names = getattr(locate(target), CONNECTOR, None)
    return f"middleware.{names}" if names else "middleware"


def _given_instead(value: str | None) -> str | None:
    """What the user asks for in place of what would be inherited."""
    return None if value == INHERITED else value


def _with_inherited(own: Config, found: Mapping[str, Any]) -> Config:
    return {key: found[key] if value == INHERITED else value for key, value in own.items() if value != INHERITED or key in found}


def _inherited_settings(start: str, template: str | None, tokenizer: str | None) -> InheritedSettings:
    """What a start leaves to its stages.

    Args:
        template, tokenizer: a chat format and a folder or hub id in place of those of the start.
    """
    if is_run_or_handoff(Path(start)) and (folder := handoff_of(Path(start))).resolve().parents[1].joinpath(RUN_CONFIG).is_file():
        found = _settings_of_run(folder, template)
    else:
        found = _settings_of_folder(start, template, tokenizer)
    if tokenizer:
        found.parts["decoder"]["tokenizer"] |= {"_target_": SAVED, "folder": tokenizer}
    return found


def _settings_of_run(folder: Path, template: str | None) -> InheritedSettings:
    """What a hand-off says of its parts, and the run around it of how they read."""
    known, settings = _manifest_parts(folder), settings_of(folder)
    data, own = settings.data, settings.collate
    chats = {**data.chats_collate, **own}
    videos = {"video_token": known["video_token"]} if known.get("video_token") else {}
    return InheritedSettings(
        parts={part: known[part] for part in PARTS},
        data={"image_token": known["image_token"], **videos},
        processor={**data.processor, **(own.get("processor") or {})},
        chats={
            "template": template or chats["template"],
            "system": None if template else chats.get("system"),
            "image_frame": chats.get("image_frame"),
        },
    )


def _manifest_parts(folder: Path) -> Config:
    """The configuration of the model in a hand-off folder, with the places of its tokenizers."""
    known = load_handoff.trusted_config(folder, handoff.read_manifest(folder))
    if not known.get("decoder"):
        raise ValueError(f"init_from={folder} {NO_DECODER}")
    return known


def _settings_of_folder(start: str, template: str | None, tokenizer: str | None) -> InheritedSettings:
    """What a checkpoint's or exported hand-off's files say, and its published system."""
    folder = local_folder(start)
    # of a hub id more is read than its weights
    place = str(folder.resolve()) if Path(start).exists() else start
    layout, config, native = layout_of(folder)
    model, parts = _exported_model(folder) if layout == HANDOFF else _published_model(folder)
    known = system_of(layout, config)
    assert known is not None, layout  # whose model answers
    own = str(tokenizer or tokenizer_place(place, folder))
    place = str(Path(own).resolve()) if Path(own).exists() else own
    words, fields = load_tokenizer(place), picture_fields(folder)
    size = len(words)
    words.add_tokens([*known.added], special_tokens=True)
    rows = model.decoder.vocab_size
    if pad_id(words) >= rows:
        fault = f"the tokenizer pads with id {pad_id(words)}, the language model has {rows} rows"
        raise Lacking(fault, "tokenizer", "FOLDER_OR_ID")
    video = words.convert_ids_to_tokens(model.video_token_id) if model.video_token_id is not None else None
    context = placeholder(model, words, known)
    new = [*dict.fromkeys([*known.added, context])]
    added = {"extra_tokens": new} if len(words) > size else {}
    parts["decoder"]["tokenizer"] = {"_target_": SAVED, "folder": place, **added}
    chosen = template or named(known.template, config, model)
    chats, frame = chat_format(words, known, context, chosen, bool(template))
    name = processor_name(known, fields, config, model, by_class=native)
    published = processor_settings(name, model, fields, config, known.statistics)
    return InheritedSettings(
        parts,
        data={"image_token": context} | ({"video_token": video} if video else {}),
        processor=own_processor(folder) or published,
        chats={"template": chats.name, "system": chats.system, "image_frame": list(frame or ())},
    )


def _exported_model(folder: Path) -> tuple[VLM, dict[str, Config]]:
    """The model of a hand-off without its weights, and its parts."""
    known = _manifest_parts(folder)
    with torch.device("meta"):
        model, _ = compose_model({name: value for name, value in known.items() if name != "peft"}, trusted_build)
    return model, {part: known[part] for part in PARTS}


def _published_model(folder: Path) -> tuple[VLM, dict[str, Config]]:
    """The model of an official checkpoint without its weights, and its parts."""
    model = meta_model(folder)
    if model.decoder is None:
        raise ValueError(f"init_from={folder} {NO_DECODER}")
    parts = {part: getattr(model, part).config for part in PARTS}
    if getattr(model.middleware, "instructed", False):
        parts["middleware"]["tokenizer"] = {"_target_": SAVED, "folder": str((folder / "qformer_tokenizer").resolve())}
    return model, parts
