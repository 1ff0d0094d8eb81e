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
from lightning_internvl.choices import GIVEN_PARTS, INHERITED, PARTS, Config
from lightning_internvl.config.effects import swaps_a_part
from lightning_internvl.config.known_keys import SIZES
from lightning_internvl.config.signatures import attributes_of
from lightning_internvl.config.targets import build
from lightning_internvl.files import RUN_CONFIG
from lightning_internvl.hub import local_folder
from lightning_internvl.inference.load_run import settings_of
from lightning_internvl.inference.published_systems import picture_fields

RECIPE = "the recipe of its system, as experiment=blip2 encoder=NAME, aligns it with another part in the usual way"
DECODER_STAGE = "lightning_internvl.stages.DecoderTransplantStage"
CALLED = {"encoder": "tower", "decoder": "language model"}
UNTAUGHT = {
    "encoder": "a tower that has learnt nothing sees nothing",
    "decoder": "a language model that has read nothing says nothing",
}


def with_new_part(config: Config, given: Mapping[str, Config | None], old: Mapping[str, Config], processor: Config) -> Config:
    """A configuration whose stages have the new part, and whose first one knows the old.

    Args:
        config: in which nothing is inherited any more.
        given: the parts as the user gives them.
        old: the parts of the start.
        processor: of pictures, as the old tower reads them.

    Raises:
        ValueError: unless one part is new, and its connector can be solved.
    """
    stages = [name for name in config["pipeline"] if swaps_a_part(config["stages"][name])]
    if not stages:
        return config
    if stages != config["pipeline"][:1]:
        raise ValueError(f"pipeline: {stages[0]} replaces a part of init_from, and comes first and once; put it there")
    part, stage = new_part(given), config["stages"][stages[0]]
    _check_connector(old["middleware"])
    if part == "encoder":
        node = new_encoder(given)
        _check_towers(old["encoder"], node)
        known = {name: old[name] for name in ("encoder", "middleware")} | _pixels(processor, config["data"]["processor"])
    else:
        node, known = config["decoder"], {name: dict(old[name]) for name in PARTS}
        _check_decoders(old["decoder"], node)
        stage["module"]["_target_"] = DECODER_STAGE
        stage["new"] = ["decoder", "middleware"]
    asked = given[part] or {}
    stage["module"] |= {"old": known, "weights_of": asked["pretrained"] if asked["_target_"] == INHERITED else None}
    config[part] = node
    config["middleware"] = {key: value for key, value in old["middleware"].items() if key not in SIZES}
    return config


def _pixels(old: Config, new: Config) -> Config:
    """How pixels that the old tower reads come from those of the new one."""
    before, now = build(old), build(new)
    return {
        "image_size": before.image_size,
        "scale": [n / b for n, b in zip(now.std, before.std, strict=True)],
        "shift": [(n - b) / s for n, b, s in zip(now.mean, before.mean, before.std, strict=True)],
    }


def new_part(given: Mapping[str, Config | None]) -> str:
    """Which part the user gives in place of that of the start: `encoder` or `decoder`.

    Raises:
        ValueError: if none is new, or both are, or the new one has no weights.
    """
    nodes = {part: given[part] or {} for part in GIVEN_PARTS}
    new = [part for part, node in nodes.items() if node.get("_target_") != INHERITED or node.get("pretrained")]
    if not new:
        choices = "encoder.pretrained=RUN_OR_FOLDER_OR_ID (its tower) or decoder.pretrained=... (its language model)"
        raise ValueError(f"nothing is another part than in init_from; give {choices}; experiment=finetune trains it as it is")
    if len(new) > 1:
        fault = "encoder and decoder: both are new, and then nothing is left that says what a picture is to become"
        raise ValueError(f"{fault}; swap one, then the other with init_from=RUN_OF_THE_FIRST")
    (part,) = new
    if not nodes[part].get("pretrained"):
        name = str(nodes[part].get("_target_")).rpartition(".")[2]
        fault = f"{part}: {name} has no weights, and {UNTAUGHT[part]}"
        raise ValueError(f"{fault}; give {part}.pretrained=RUN_OR_FOLDER_OR_ID alone, which says what its {CALLED[part]} is")
    return part


def new_encoder(given: Mapping[str, Config | None]) -> Config:
    """The configuration of the tower that a user gives in place of that of the start."""
    encoder = given["encoder"] or {}
    return _encoder_of(encoder["pretrained"]) if encoder["_target_"] == INHERITED else dict(encoder)


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


def _check_connector(middleware: Config) -> None:
    if not attributes_of(middleware["_target_"]).get("projection"):
        name = str(middleware["_target_"]).rpartition(".")[2]
        why = "is no chain of linear layers from patches to words (it has queries of its own, or several branches)"
        raise ValueError(f"init_from: its middleware {name} {why}, so that no closed form gives it; {RECIPE}")


def _check_towers(old: Config, new: Config) -> None:
    for what, node in {"init_from": old, "encoder.pretrained": new}.items():
        tower = attributes_of(node["_target_"])
        if tower.get("gives", "rows") != "rows" or tower.get("inputs"):
            kind = str(node["_target_"]).rpartition(".")[2]
            fault = (
                f"{what}: {kind} reads more than square pictures, so that places of old and new tower cannot be laid side by side"
            )
            raise ValueError(f"{fault}; {RECIPE}")


def _check_decoders(old: Config, new: Config) -> None:
    for what, node in {"init_from": old, "decoder.pretrained": new}.items():
        if "visual" in (attributes_of(node["_target_"]).get("inputs") or ()):
            kind = str(node["_target_"]).rpartition(".")[2]
            fault = f"{what}: {kind} attends to visual tokens with layers of its own, so that they stand among no words"
            raise ValueError(f"{fault}; the recipe of its system, as experiment=flamingo, aligns it in the usual way")
