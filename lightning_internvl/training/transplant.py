"""A recipe whose stages take their parts from where they start, but one: what that is, and what of the
start the stage needs that solves the connector (see `lightning_internvl.stages.transplant`).

All faults are found here, from configurations and names of files, before a weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lightning_internvl.checkpoints import handoff, load_handoff
from lightning_internvl.checkpoints.official import meta_model
from lightning_internvl.checkpoints.weight_source import handoff_of, is_run_or_handoff
from lightning_internvl.choices import GIVEN_PARTS, INHERITED, Config
from lightning_internvl.config.effects import swaps_a_part
from lightning_internvl.config.known_keys import SIZES
from lightning_internvl.config.signatures import attributes_of
from lightning_internvl.config.targets import build
from lightning_internvl.files import RUN_CONFIG
from lightning_internvl.hub import local_folder
from lightning_internvl.inference.load_run import settings_of
from lightning_internvl.inference.published_systems import picture_fields

RECIPE = "the recipe of its system, as experiment=blip2 encoder=NAME, aligns it with another tower in the usual way"


def with_new_part(config: Config, given: Mapping[str, Config | None], processor: Config) -> Config:
    """A configuration whose stages have the new part, and whose first one knows the old.

    Args:
        config: in which nothing is inherited any more.
        given: the parts as the user gives them.
        processor: of pictures, as the old tower reads them.

    Raises:
        ValueError: unless one part is new, and its connector can be solved.
    """
    stages = [name for name in config["pipeline"] if swaps_a_part(config["stages"][name])]
    if not stages:
        return config
    if stages != config["pipeline"][:1]:
        raise ValueError(f"pipeline: {stages[0]} replaces a part of init_from, and comes first and once; put it there")
    node = new_encoder(given)
    old = {part: config[part] for part in ("encoder", "middleware")}
    _check_parts(old["encoder"], node, old["middleware"])
    before, now = build(processor), build(config["data"]["processor"])
    pixels = {
        "image_size": before.image_size,
        "scale": [n / b for n, b in zip(now.std, before.std, strict=True)],
        "shift": [(n - b) / s for n, b, s in zip(now.mean, before.mean, before.std, strict=True)],
    }
    encoder = given["encoder"] or {}
    place = encoder["pretrained"] if encoder["_target_"] == INHERITED else None
    config["stages"][stages[0]]["module"] |= {"old": old | pixels, "weights_of": place}
    config["encoder"] = node
    config["middleware"] = {key: value for key, value in old["middleware"].items() if key not in SIZES}
    return config


def new_encoder(given: Mapping[str, Config | None]) -> Config:
    """The configuration of the tower that a user gives in place of that of the start.

    Raises:
        ValueError: if there is none, if it has no weights, or if the decoder is another one too.
    """
    encoder, decoder = (given[part] or {} for part in GIVEN_PARTS)
    if decoder.get("_target_") != INHERITED or decoder.get("pretrained"):
        raise ValueError("decoder: the language model is that of init_from, to which the connector is fitted; leave it out")
    if encoder.get("_target_") != INHERITED:
        if not encoder.get("pretrained"):
            name = str(encoder.get("_target_")).rpartition(".")[2]
            fault = f"encoder: {name} has no weights, and a tower that has learnt nothing sees nothing"
            raise ValueError(f"{fault}; give encoder.pretrained=RUN_OR_FOLDER_OR_ID alone, which says what its tower is")
        return dict(encoder)
    if not encoder.get("pretrained"):
        choices = "encoder.pretrained=RUN_OR_FOLDER_OR_ID (its tower), or encoder=hf encoder.pretrained=FOLDER_OR_ID"
        raise ValueError(f"nothing is another part than in init_from; give {choices}; experiment=finetune trains it as it is")
    return _encoder_of(encoder["pretrained"])


def pictures_of(given: Mapping[str, Config | None], processor: Config) -> Config:
    """How pictures are prepared for the new tower: as for the old one, but at its size and with the
    mean and deviation of the channels that it was trained with."""
    node = new_encoder(given)
    place = str((given["encoder"] or {})["pretrained"])
    found: Config = {"image_size": node.get("image_size")}
    if is_run_or_handoff(Path(place)):
        folder = handoff_of(Path(place))
        if folder.resolve().parents[1].joinpath(RUN_CONFIG).is_file():
            own = build(settings_of(folder).data.processor)
            found |= {"mean": list(own.mean), "std": list(own.std)}
    else:
        fields = picture_fields(local_folder(place))
        found |= {name: fields.get(f"image_{name}") for name in ("mean", "std")}
    return processor | {key: value for key, value in found.items() if value is not None}


def _encoder_of(place: str) -> Config:
    """The configuration of the tower that a run, hand-off or released checkpoint has."""
    if is_run_or_handoff(Path(place)):
        folder = handoff_of(Path(place))
        return dict(load_handoff.trusted_config(folder, handoff.read_manifest(folder))["encoder"])
    return dict(meta_model(local_folder(place)).encoder.config)


def _check_parts(old: Config, new: Config, middleware: Config) -> None:
    name = str(middleware["_target_"]).rpartition(".")[2]
    told = attributes_of(middleware["_target_"])
    if not told.get("projection"):
        why = "is no chain of linear layers from patches to words (it has queries of its own, or several branches)"
        raise ValueError(f"init_from: its middleware {name} {why}, so that no closed form gives it; {RECIPE}")
    for what, node in {"init_from": old, "encoder.pretrained": new}.items():
        tower = attributes_of(node["_target_"])
        if tower.get("gives", "rows") != "rows" or tower.get("inputs"):
            kind = str(node["_target_"]).rpartition(".")[2]
            fault = (
                f"{what}: {kind} reads more than square pictures, so that places of old and new tower cannot be laid side by side"
            )
            raise ValueError(f"{fault}; {RECIPE}")
