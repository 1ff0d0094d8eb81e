"""The settings of `export.py`, checked before PyTorch is imported."""

from __future__ import annotations

import importlib.util
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
    gguf: bool = False
    readers: tuple[str, ...] = ()
    verify: Path | None = None
    base: Path | None = None
    trust: tuple[str, ...] = ()
    transformers4: str | None = None


def check_settings(plain: Mapping[str, Any]) -> ExportSettings:
    """The settings, complete and right in themselves, from plain values.

    Raises:
        ConfigError: with all faults, each naming the setting, its value and what is valid.
    """
    if plain["verify"] is not None:
        return _verify_settings(plain)
    if missing := [name for name in ("run", "to") if plain[name] is None]:
        raise ConfigError([f"{name} has no value; give {name}=VALUE, or verify=FOLDER alone" for name in missing])
    to, size = Path(str(plain["to"])), plain["max_shard_gb"]
    gguf = to.suffix.lower() == ".gguf"
    faults = gguf_faults(to, plain) if gguf else []
    if not gguf and to.exists() and (not to.is_dir() or any(to.iterdir())):
        faults.append(f"to={to} exists and is not an empty folder; choose another one")
    if not Path(str(plain["run"])).is_dir():
        faults.append(f"run={plain['run']}: there is no such folder; give a run, or a hand-off folder of one")
    faults += folder_faults(plain["run"], plain.get("trust"))
    faults += dtype_faults(plain["dtype"])
    faults += number_faults("max_shard_gb", size, above=0)
    if not isinstance(plain["adapter"], bool):
        faults.append(f"adapter={plain['adapter']!r} must be true (adapters alone) or false (the whole model)")
    faults += reader_faults(plain)
    if plain["base"] is not None:
        faults.append(f"base={plain['base']} has no effect without verify=FOLDER")
    if faults:
        raise ConfigError(faults)
    names = ("layout", "dtype", "adapter", "transformers4")
    return ExportSettings(
        run=Path(str(plain["run"])),
        to=to,
        gguf=gguf,
        readers=tuple(reader for reader in BY_RULES if reader in plain["check"]),
        max_shard_bytes=int(size * 1e9),
        licence=plain["license"],
        licence_link=plain["license_link"],
        trust=tuple(plain.get("trust") or ()),
        **{name: plain[name] for name in names},
    )


def _verify_settings(plain: Mapping[str, Any]) -> ExportSettings:
    """Those of `verify=FOLDER`, with which nothing is written."""
    folder, base = Path(str(plain["verify"])), plain["base"]
    faults = [
        f"{name}={plain[name]} has no effect with verify=; leave it out" for name in ("run", "to") if plain[name] is not None
    ]
    if not folder.is_dir():
        faults.append(f"verify={folder}: there is no such folder; give one that export.py wrote")
    if base is not None and not Path(str(base)).is_dir():
        faults.append(f"base={base}: there is no such folder; give that of the model that the run started from")
    if faults:
        raise ConfigError(faults)
    return ExportSettings(
        run=folder,
        to=folder,
        layout=None,
        dtype="float32",
        max_shard_bytes=0,
        adapter=False,
        licence=None,
        licence_link=None,
        verify=folder,
        base=None if base is None else Path(str(base)),
        trust=tuple(plain.get("trust") or ()),
    )


def gguf_faults(to: Path, plain: Mapping[str, Any]) -> list[str]:
    """What is wrong with `to=FILE.gguf`."""
    faults = [f"to={file} exists; choose another name" for file in (to, to.with_name(f"mmproj-{to.name}")) if file.exists()]
    if plain["adapter"] is True:
        faults.append(f"adapter=true writes a folder for peft, and to={to} is a GGUF file; use adapter=false")
    if importlib.util.find_spec("gguf") is None:
        faults.append(f"to={to} needs the package gguf:  pip install -r requirements-gguf.txt")
    return faults


BY_RULES = ("vllm", "llama_cpp")
READERS = ("transformers", "transformers4", *BY_RULES)


def reader_faults(plain: Mapping[str, Any]) -> list[str]:
    """What is wrong with the readers that check the folder; transformers always does."""
    asked, python = plain["check"], plain["transformers4"]
    if not isinstance(asked, list) or not set(asked) <= set(READERS):
        return [f"check={asked!r} must be a list of some of {', '.join(READERS)}"]
    if plain["adapter"] and (whole := [reader for reader in BY_RULES if reader in asked]):
        return [f"check=[{', '.join(whole)}] reads whole models; use adapter=false"]
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
