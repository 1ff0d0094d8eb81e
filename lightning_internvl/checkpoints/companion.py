"""A part that a checkpoint lacks because its files name another checkpoint that holds it, as LLaVA
names its tower."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from lightning_internvl.checkpoints.name_rules import Config
from lightning_internvl.checkpoints.weight_files import OPEN_CLIP, WeightFiles, read_config, spare_files
from lightning_internvl.config.consent import Untrusted, given_parts, place_faults
from lightning_internvl.hub import local_folder


class Companion(NamedTuple):
    """The checkpoint that a config names for a part.

    Attributes:
        part: what it holds, `encoder` or `decoder`.
        name: where `setting` of the config says that it lies; None where it says nothing.
        missing: what the files lack, for messages.
        names: canonical names by those of files that hold the part, empty for other files.
        join: of the config, that of the companion and its tensors, the config with what they say.
    """

    part: str
    name: str | None
    setting: str
    missing: str
    names: Callable[[Iterable[str]], dict[str, str]]
    join: Callable[[Config, Config, WeightFiles], Config]

    def open(self, place: Path, taken: Collection[Path]) -> tuple[str, Config, WeightFiles]:
        """Where it lies, its config, empty without one, and its tensors: what the user gives for the
        part; a file among those of the checkpoint `place` that its index does not name; a folder
        beside it, or of that name on this machine; else the hub's cache, and the hub if the user
        trusts the id.

        Args:
            taken: the files that hold the rest.

        Raises:
            ValueError: if what is found holds no such part, or several files hold one.
            Untrusted: if it is at none of these places.
        """
        given = given_parts().get(self.part)
        if given is None and (files := self._beside(place, taken)):
            return str(place), {}, files
        if given:
            try:
                config, files = _read(local_folder(given))
            except ValueError as error:
                raise ValueError(f"{self.part}.pretrained={given}: {error}") from error
        elif not self.name:
            fault = f"{place} {self.missing}, and names none as {self.setting}"
            raise ValueError(f"{fault}; give {self.part}.pretrained=FOLDER_OR_ID")
        else:
            folder = named_folder(place, self.name, self.setting, self.missing, self.part)
            config, files = _read(folder)
        if not self.names(files.shapes):
            said = f"{self.part}.pretrained={given}" if given else f"{self.setting}={self.name!r}"
            advice = f"give {self.part}.pretrained=FOLDER_OR_ID of the one that belongs to the model"
            raise ValueError(f"{place} {self.missing}, and {said} holds none under names that are known; {advice}")
        return given or str(folder), config, files

    def _beside(self, place: Path, taken: Collection[Path]) -> WeightFiles | None:
        found = [files for files in spare_files(place, taken) if self.names(files.shapes)]
        if len(found) > 1:
            names = " and ".join(files.files[0].name for files in found)
            raise ValueError(f"{place} {self.missing}, and {names} beside them hold one each; keep one of them")
        return found[0] if found else None


def _read(folder: Path) -> tuple[Config, WeightFiles]:
    """The config of a folder or file, empty without one, and its tensors."""
    has_config = folder.is_file() or (folder / "config.json").is_file() or (folder / OPEN_CLIP).is_file()
    return read_config(folder) if has_config else {}, WeightFiles(folder)


def named_folder(place: Path, name: str, setting: str, missing: str, part: str | None = None) -> Path:
    """The folder that a checkpoint at `place` names in `setting`: beside it, on this machine, in the
    hub's cache, or fetched if the user trusts the id.

    Args:
        missing: what the checkpoint lacks, for messages.
        part: that the user may give in its place.

    Raises:
        Untrusted: if it is at none of these places.
    """
    around = place if place.is_dir() else place.parent
    inner = Path(name).name
    beside = [around / name, around / inner, around.parent / name, around.parent / inner]
    for folder in [*beside, Path(name)]:
        if folder.is_dir() and folder.resolve() != around.resolve():
            return folder
    more = f"; give {part}.pretrained=FOLDER_OR_ID," if part else ","
    advice = f"{more} or put its folder there as {around.resolve() / inner}"
    if faults := list(place_faults(setting, name)):
        raise Untrusted([f"{place} {missing}; {faults[0]}{advice}"])
    if Path(name).is_absolute() or name.count("/") > 1:
        raise Untrusted([f"{place} {missing}; {setting}={name!r} is no folder on this machine{advice}"])
    return local_folder(name)
