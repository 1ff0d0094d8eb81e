"""The settings of `export.py`, checked before PyTorch is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_internvl.config.model_source import dtype_faults
from lightning_internvl.config.trust import folder_faults
from lightning_internvl.messages import ConfigError, number_faults


@dataclass(frozen=True)
class ExportSettings:
    """What the command line asks for; see `conf/export.yaml`."""

    run: Path
    to: Path
    layout: str | None
    dtype: str
    max_shard_bytes: int
    adapter: bool
    licence: str | None
    licence_link: str | None
    trust: tuple[str, ...] = ()
    transformers4: str | None = None


def check_settings(plain: Mapping[str, Any]) -> ExportSettings:
    """The settings, complete and right in themselves, from plain values.

    Raises:
        ConfigError: with all faults, each naming the setting, its value and what is valid.
    """
    to, size = Path(str(plain["to"])), plain["max_shard_gb"]
    faults = []
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        faults.append(f"to={to} exists and is not an empty folder; choose another one")
    if not Path(str(plain["run"])).is_dir():
        faults.append(f"run={plain['run']}: there is no such folder; give a run, or a hand-off folder of one")
    faults += folder_faults(plain["run"], plain.get("trust"))
    faults += dtype_faults(plain["dtype"])
    faults += number_faults("max_shard_gb", size, above=0)
    if not isinstance(plain["adapter"], bool):
        faults.append(f"adapter={plain['adapter']!r} must be true (adapters alone) or false (the whole model)")
    faults += reader_faults(plain)
    if faults:
        raise ConfigError(faults)
    names = ("layout", "dtype", "adapter", "transformers4")
    return ExportSettings(
        run=Path(str(plain["run"])),
        to=to,
        max_shard_bytes=int(size * 1e9),
        licence=plain["license"],
        licence_link=plain["license_link"],
        trust=tuple(plain.get("trust") or ()),
        **{name: plain[name] for name in names},
    )


READERS = ("transformers", "transformers4")


def reader_faults(plain: Mapping[str, Any]) -> list[str]:
    """What is wrong with the readers that check the folder; transformers always does."""
    asked, python = plain["check"], plain["transformers4"]
    if not isinstance(asked, list) or not set(asked) <= set(READERS):
        return [f"check={asked!r} must be a list of some of {', '.join(READERS)}"]
    if "transformers4" not in asked:
        return [f"transformers4={python} has no effect without check=[transformers,transformers4]"] if python else []
    if plain["adapter"]:
        return ["check=[transformers4] reads whole models; use adapter=false"]
    if python is None or not Path(str(python)).is_file():
        wanted = (
            "give transformers4=PYTHON, the Python of an environment with torch and transformers 4 (none is installed for you)"
        )
        return [f"check=[transformers4] with transformers4={python}: there is no such file; {wanted}"]
    return []
