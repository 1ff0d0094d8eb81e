"""What a stage's result depends on, piece by piece and under the names of settings.

Everything is a piece that is not named here: a setting that is new is one by itself.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_internvl.checkpoints.weight_source import state_of_weights
from lightning_internvl.choices import PARTS, Config
from lightning_internvl.config.consent import given_parts
from lightning_internvl.config.effects import PLANNED
from lightning_internvl.config.known_keys import KINDS
from lightning_internvl.config.stage_settings import COMMON, StageSettings
from lightning_internvl.config.targets import locate
from lightning_internvl.config.trust import FETCHING, WEIGHTS
from lightning_internvl.data.order.mixture import Mixture, known_length
from lightning_internvl.distributed.placement import place_of
from lightning_internvl.files import UnknownState, content_of, identity_of, state_of
from lightning_internvl.hub import PACKAGE, cached_folder, file_of_package
from lightning_internvl.layers.attention import choose_backend
from lightning_internvl.messages import flat, hidden
from lightning_internvl.model.compose import Build
from lightning_internvl.reuse.code import foreign_code, library_versions, machine, own_code

# Of the configuration: what is in the settings of a stage, or chooses their values,
IN_STAGES = {*PARTS, *COMMON, "stages", "data", "strategy", "callbacks", "attention", "seed", "max_steps", "epochs", "batch_size",
             "activation_checkpointing", "compile"}  # fmt: skip
# and what changes no result: names and places, what is only looked at, where weights lie (these are a
# piece by their bytes), and what a stage is shown by.
NO_PIECES = {
    *PLANNED, "name", "pipeline", "paths", "logger", "resume", "reuse", "trust", "plan", "doctor", "objective_metric",
    "init_from", "init_parts",
}  # fmt: skip
# The same of the settings of a stage; the trainer's are those of its node,
NO_PIECES_OF_STAGES = ("loggers", "device_memory", "data.num_workers", "feature_cache.gib", "feature_cache.path")
# of the trainer, of which a limit of time ends the process before the stage,
NO_PIECES_OF_TRAINERS = ("max_time", "enable_progress_bar", "enable_model_summary")
# and callbacks that watch or save.
WATCHING = {f"callbacks.{name}" for name in ("Throughput", "Samples", "Progress", "Checkpoint", "Report")}
READ = {*WEIGHTS, "folder", "tokenizer", "template"}  # settings that name what is read from its first byte to its last
LONGEST = 1000  # characters of a text that may name a file
MOST_BYTES = 2**32  # of weights that it reads through unasked, in seconds; of a large model that takes minutes
MOST = 20_000  # samples of files that a run looks at for others, unasked: it takes 3 seconds, and of a million minutes

Pieces = dict[str, Any]


def made_of(settings: StageSettings, config: Config, source: str | Path | None, build: Build, *, asked: bool = True) -> Pieces:
    """All that a stage's result depends on, by name, as plain values.

    Args:
        config: of its run.
        source: where its weights come from.
        build: makes the dataset, which says what its samples are made of.
        asked: whether the run takes stages itself; if not, data of many files and large weights are
            not looked at.

    Raises:
        ValueError: where something cannot be compared with what it was (`UnknownState`), or read.
    """
    own = _settings(settings)
    rest = {name: value for name, value in config.items() if name not in IN_STAGES | NO_PIECES}
    found = dict(flat({**rest, **own}))
    found["attention in force"], _ = choose_backend(settings.attention, *place_of(settings.trainer))
    found |= {f"the machine's {name}": value for name, value in machine(settings.trainer).items()}
    found |= {f"the version of {name}": value for name, value in library_versions().items()}
    found["the code of this project"] = own_code()
    found |= {f"the code of {name}": value for name, value in foreign_code(own).items()}
    most = math.inf if asked else MOST_BYTES
    found["the weights it starts from"] = state_of_weights(source, most)
    if source is not None:
        found |= {f"the {part} of init_parts": state_of_weights(place, most) for part, place in given_parts().items()}
    for name, node in (("data", settings.data.dataset(settings.reads)), ("held-out data", settings.data.measured_on)):
        found[f"the files of its {name}"] = _state_of_data(node, build, asked) if node else None
    found |= {f"the content of {place}": state for place, state in _named_places(own, most)}
    found = json.loads(json.dumps(found, default=str))
    if secret := [name for name, value in hidden(found).items() if value != found[name]]:
        raise UnknownState(f"{secret[0]} holds a secret, which is not kept to be compared")
    return found


def _settings(settings: StageSettings) -> Config:
    """The settings of a stage, nodes and all, but for those that change no result."""
    found = {one.name: getattr(settings, one.name) for one in dataclasses.fields(settings)}
    for name, value in found.items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            found[name] = dataclasses.asdict(value)
    found |= found.pop("parts")
    found["trainer"] = {name: value for name, value in settings.trainer.node.items() if name not in NO_PIECES_OF_TRAINERS}
    acting = {name: node for name, node in settings.callbacks.items() if node and node.get("_target_") not in WATCHING}
    found |= {"callbacks": acting, "order of callbacks": [*acting]}
    for kind in KINDS:
        if kind != settings.reads:
            del found["data"][kind]
    if settings.reads != "chats":
        found["data"] = {name: value for name, value in found["data"].items() if not name.startswith("packing")}
        if settings.parts.decoder is None:
            del found["data"]["chats_collate"]
    for path in NO_PIECES_OF_STAGES:
        group, _, name = path.rpartition(".")
        node = found[group] if group else found
        if node is not None:
            node.pop(name)
    return found


def _state_of_data(node: Config, build: Build, asked: bool) -> Any:
    # the class is asked first: one of the user's own may take long to read its files
    if not hasattr(locate(node["_target_"]), "identity"):
        raise UnknownState(f"{node['_target_']} has no identity(), which says what its samples are made of (docs/extend.md)")
    dataset = build(node)
    mixed = dataset.datasets.values() if isinstance(dataset, Mixture) else [dataset]
    if not asked and (samples := sum(known_length(one) or 0 for one in mixed)) > MOST:
        raise UnknownState(f"its {samples} samples are compared only where reuse asks for it")
    return identity_of(dataset)


def _named_places(node: Any, most: float, key: str = "") -> Iterator[tuple[str, str]]:
    """Files, folders and hub ids that settings name, but those of data, with what changes when their
    contents do."""
    if isinstance(node, Mapping):
        own_data = {*KINDS, "held_out"}
        for name, value in node.items():
            if not (key == "data" and name in own_data):
                yield from _named_places(value, most, str(name))
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _named_places(value, most, key)
    elif isinstance(node, str) and (key in READ or "/" in node or "." in node):
        place = Path(node)
        if len(node) < LONGEST and place.name and place.exists():
            read = key in READ or place.is_file()
            yield node, content_of(place, most) if read else state_of(sorted(place.rglob("*")))
        elif key in FETCHING and node.startswith(PACKAGE):
            yield node, content_of(file_of_package(node.removeprefix(PACKAGE)), most)
        elif key in WEIGHTS or (key == "tokenizer" and "/" in node):
            yield node, _commit(node)


def _commit(hub_id: str) -> str:
    """The revision of a hub id that this machine has."""
    try:
        return Path(cached_folder(hub_id)).name
    except OSError as error:
        raise UnknownState(f"{hub_id} is not on this machine yet, so that nobody knows its revision") from error
