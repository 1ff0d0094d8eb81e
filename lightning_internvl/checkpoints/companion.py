"""A part that a checkpoint lacks because its files name another checkpoint that holds it, as LLaVA
names its tower."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from lightning_internvl.checkpoints.name_rules import Config
from lightning_internvl.checkpoints.weight_files import WeightFiles, read_config
from lightning_internvl.config.consent import Untrusted, place_faults
from lightning_internvl.hub import local_folder


class Companion(NamedTuple):
    """The checkpoint that a config names for a part.

    Attributes:
        name: where `setting` of the config says that it lies.
        missing: what the files lack, for messages.
        join: called with the companion's config and names of tensors; gives the config with what
            that one says, and canonical names by those of the companion.
    """

    name: str
    setting: str
    missing: str
    join: Callable[[Config, Iterable[str]], tuple[Config, dict[str, str]]]

    def open(self, place: Path) -> tuple[Config, WeightFiles]:
        """Its config, empty without one, and its tensors: of a folder beside the checkpoint `place`,
        of a folder of that name on this machine, else of the hub's cache; it is fetched from the hub
        if the user trusts the id.

        Raises:
            Untrusted: if it is at none of these places.
        """
        folder = named_folder(place, self.name, self.setting, self.missing)
        config = read_config(folder) if (folder / "config.json").is_file() else {}
        return config, WeightFiles(folder)


def named_folder(place: Path, name: str, setting: str, missing: str) -> Path:
    """The folder that a checkpoint at `place` names in `setting`: beside it, on this machine, in the
    hub's cache, or fetched if the user trusts the id.

    Raises:
        Untrusted: if it is at none of these places; `missing` says what the checkpoint lacks then.
    """
    around = place if place.is_dir() else place.parent
    inner = Path(name).name
    beside = [around / name, around / inner, around.parent / name, around.parent / inner]
    for folder in [*beside, Path(name)]:
        if folder.is_dir() and folder.resolve() != around.resolve():
            return folder
    if faults := list(place_faults(setting, name)):
        advice = f"or put its folder there as {around.resolve() / inner}"
        raise Untrusted([f"{place} {missing}; {faults[0]}, {advice}"])
    return local_folder(name)
