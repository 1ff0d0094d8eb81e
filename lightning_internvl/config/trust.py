"""What a folder, a file or a hub id may have built, run or fetched: the one gate of all commands.

A configuration that comes with a run or a checkpoint is somebody else's data. Of what it names only
this project's own classes and functions are built, and nothing is fetched, unless the user has
named the package or the hub id: `trust=[package]` on a command line, `with trusting(["package"])`
in Python. What a folder itself records under `trust` does not count.

Names are looked up in the source files: what is refused is not imported. Nothing here imports
PyTorch.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_internvl.config.consent import (
    Untrusted,
    is_trusted,
    place_faults,
    trust_faults,
    trusted_names,
    trusting,
    url_faults,
)
from lightning_internvl.config.signatures import definition
from lightning_internvl.config.targets import BUILDS, OURS, locate, with_current_targets
from lightning_internvl.files import CONF, RUN_CONFIG, parsed_yaml

PACKAGE = "lightning_internvl"
MANIFEST = "manifest.json"
FETCHING = {"pretrained", "init_from_llm", "trust_remote_code", "auto_map", "_name_or_path"}
# what of a run names a place of weights, a tokenizer or a data set of the hub
WEIGHTS = ("pretrained", "init_from_llm")
READERS = {"saved_tokenizer": "folder", "HfShards": "path"}
SHOWN = 8  # faults of one folder that are told

_ADVICE = re.compile(r"trust=\[(.+?)\]")
_NAMED = re.compile(r"_target_: *([\w.]+\.\w+)")


def folder_faults(place: Any, names: Any = ()) -> Iterable[str]:
    """What a run or a hand-off folder names that is not trusted, before any of it is opened;
    nothing for another place.

    Args:
        names: what the user trusts.
    """
    yield from (faults := list(trust_faults(names or [])))
    if faults or not Path(str(place)).is_dir():
        return
    try:
        with trusting(names or ()):
            check_folder(Path(str(place)))
    except Untrusted as error:
        yield str(error)


def check_folder(place: Path) -> None:
    """Check the configuration of a run and the manifests of its hand-offs, or a hand-off folder
    with the run around it.

    A file that is damaged is left to its reader.

    Raises:
        Untrusted: for all that is not trusted.
    """
    inside = (place / MANIFEST).is_file()
    for file in (place, *place.resolve().parents[1:2]) if inside else (place,):
        config = _read(file / RUN_CONFIG, parsed_yaml)
        if isinstance(config, Mapping):
            check_run(with_current_targets(config), file)
    for file in [place / MANIFEST] if inside else sorted(place.glob(f"handoff/*/{MANIFEST}")):
        manifest = _read(file, json.loads)
        if isinstance(manifest, Mapping) and isinstance(manifest.get("config"), Mapping):
            check_parts(manifest["config"], file.parent)
            check_base(manifest, file.parent)


def _read(file: Path, parse: Any) -> Any:
    try:
        return parse(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (ValueError, yaml.YAMLError, RecursionError):
        return None


def check_run(config: Mapping[str, Any], place: Path, fetches: bool = False) -> None:
    """Check the configuration of a run.

    Args:
        place: the run.
        fetches: whether data, weights and tokenizers will be read from where it says.

    Raises:
        Untrusted: for a class or function that is neither this project's nor trusted, for an
            interpolation, which could make one of text, for a hub id that is neither trusted nor
            on this machine, and for a URL whose host is not trusted.
    """
    faults: list[str] = []
    for path, key, value in _settings({name: config[name] for name in config if name != "trust"}):
        faults += _target_faults(path, value, _is_built_of_runs, "the run") if key == "_target_" else ()
        faults += _interpolation_faults(path, value)
        faults += _fetch_faults(path, key, value) if fetches else ()
    start = config.get("init_from")
    # a folder that has gone by now is no hub id
    if fetches and start and not Path(str(start)).parent.is_dir():
        faults += place_faults("init_from", start)
    for part, place in (config.get("init_parts") or {}).items() if fetches else ():
        faults += place_faults(f"init_parts.{part}", place)
    _raise(faults, place)


def with_trust(advice: str, config: Mapping[str, Any], run: Path) -> str:
    """A sentence that says `resume=RUN`, with the `trust=` that the run asks for."""
    try:
        check_run(with_current_targets(config), run, fetches=True)
    except Untrusted as error:
        names = ",".join(sorted(set(_ADVICE.findall(str(error)))))
        word = f"resume={run}"
        return advice.replace(word, f"{word} trust=[{names}]") if names else advice
    return advice


def _fetch_faults(path: str, key: str, value: Any) -> Iterator[str]:
    """Faults of what a setting of a run that goes on would read from elsewhere."""
    yield from url_faults(path, value)
    if str(key) in WEIGHTS:
        yield from place_faults(path, value)
    if isinstance(value, Mapping):
        reads = READERS.get(str(value.get("_target_")).rpartition(".")[2])
        yield from place_faults(f"{path}.{reads}", value.get(reads)) if reads else ()


def check_parts(config: Mapping[str, Any], place: Path | str | None = None) -> None:
    """Check the configuration of a model that comes with a checkpoint, at any depth.

    Raises:
        Untrusted: for a class or function that is neither this project's nor trusted, for settings
            that would fetch weights, code or kernels, and for words that make something else of
            what is built.
    """
    _raise(list(_part_faults("", config, foreign=False, note=False)), place)


def check_base(manifest: Mapping[str, Any], place: Path | str) -> None:
    """Check where a hand-off says that the rest of its weights lies.

    Raises:
        Untrusted: for a hub id that is neither trusted nor on this machine.
    """
    base = manifest.get("base")
    if isinstance(base, Mapping):
        parts = base["parts"].items() if isinstance(base.get("parts"), Mapping) else ()
        faults = [*place_faults("base.place", base.get("place"))]
        faults += [fault for part, entry in parts for fault in place_faults(f"base.parts.{part}", entry.get("place"))]
        _raise(faults, place)


def foreign_targets(config: Any) -> list[str]:
    """The classes and functions from elsewhere that a configuration of the user's own names, but
    those that `conf/` names. Naming one is consent to that one, not to all of its package."""
    foreign = {target for target in targets_of(config) if "." in target and not target.startswith(OURS)}
    return sorted(foreign - named_in_conf())


def targets_of(config: Any) -> set[str]:
    """All classes and functions that a configuration names, at any depth."""
    return {str(value) for _, key, value in _settings(config) if key == "_target_"}


def without_notes(config: Any, noted: bool = False) -> Any:
    """A configuration of parts without what a library has noted about itself: private keys inside
    the `config` of a part, which nothing reads. What could fetch something is left for
    `check_parts` to refuse."""
    if isinstance(config, list | tuple):
        return [without_notes(value, noted) for value in config]
    if not isinstance(config, Mapping):
        return config
    return {
        key: without_notes(value, noted or (key == "config" and "_target_" in config))
        for key, value in config.items()
        if not (noted and _is_note(key, value))
    }


def _is_note(key: str, value: Any) -> bool:
    return str(key).startswith("_") and key not in BUILDS and not _fetches(key, value)


def _fetches(key: str, value: Any) -> bool:
    # of the hub; names without a slash are built in
    kernels = str(key).endswith("_implementation") and "/" in str(value)
    return bool(value) and (key in FETCHING or kernels)


def _part_faults(path: str, node: Any, *, foreign: bool, note: bool) -> Iterator[str]:
    """Faults of a node of a model's configuration.

    Args:
        foreign: whether it belongs to a trusted part from elsewhere, whose settings have meanings
            of their own.
        note: whether it lies in the `config` of a part, in which private keys mean nothing.
    """
    if isinstance(node, list | tuple):
        for number, value in enumerate(node):
            yield from _part_faults(f"{path}.{number}", value, foreign=foreign, note=note)
        return
    if not isinstance(node, Mapping):
        yield from _interpolation_faults(path, node)
        return
    if "_target_" in node:
        yield from _target_faults(_joined(path, "_target_"), node["_target_"], _is_ours, "the checkpoint")
        foreign = is_trusted(str(node["_target_"]))
    for key, value in node.items():
        own = _joined(path, key)
        private = str(key).startswith("_") and key != "_target_" and (key in BUILDS or not note) and bool(value)
        if not foreign and (_fetches(key, value) or private):
            yield (
                f"{own}: {value!r} comes with the checkpoint and could fetch weights or code from "
                "elsewhere; it is not followed. Start a run with these parts and init_from instead"
            )
        elif key != "_target_":
            inner = note or (key == "config" and "_target_" in node)
            yield from _part_faults(own, value, foreign=foreign, note=inner)
        if key == "folder" and not foreign:
            yield from place_faults(own, value)


def _target_faults(path: str, target: Any, allowed: Any, source: str) -> Iterator[str]:
    if not isinstance(target, str) or not re.fullmatch(r"\w+(\.\w+)+", target):
        fault = f"{target!r} comes with {source} and is no part of {PACKAGE}"
        yield f"{path}: {fault}; it is not run, for it names no class"
        return
    if is_trusted(target):
        yield from _strangers(path, target)
    elif not allowed(target):
        package = target.partition(".")[0]
        runs = f"that imports {package} and runs its code as this folder says"
        advice = f"if you trust it, trust=[{package}] allows it: {runs}"
        if target.startswith(OURS):
            advice = "it is not defined there, or nothing that configurations may name"
        yield f"{path}: {target!r} comes with {source} and is no part of {PACKAGE}; it is not run ({advice})"


def _strangers(path: str, target: str) -> Iterator[str]:
    """A trusted package is imported here; what it has imported from others is not trusted with
    it, unless the user has named just that."""
    home = str(getattr(locate(target), "__module__", None))
    if target not in trusted_names() and not (is_trusted(f"{home}.") or f"{home}.".startswith(OURS)):
        yield f"{path}: {target!r} is defined in {home}, not in a package that you trust; it is not run"


def _interpolation_faults(path: str, value: Any) -> Iterator[str]:
    if isinstance(value, str) and "${" in value:
        yield f"{path}: {value!r} comes with the folder and is an interpolation; it is not followed"


def _settings(node: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Path, key and value of all settings of a configuration, at any depth."""
    pairs = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list | tuple) else ()
    for key, value in pairs:
        yield _joined(path, key), key, value
        yield from _settings(value, _joined(path, key))


def _joined(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _raise(faults: Sequence[str], place: Path | str | None) -> None:
    if faults:
        more = [f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
        raise Untrusted([f"{place}: {fault}" if place else fault for fault in [*faults[:SHOWN], *more]])


# --- what is this project's own -----------------------------------------------------------------


def _is_ours(target: str) -> bool:
    """Whether a class or function is defined in this project, wherever it is imported too."""
    return target.startswith(OURS) and definition(*target.rpartition(".")[::2]) is not None


def _is_built_of_runs(target: str) -> bool:
    """Whether configurations of this project name it, or another one in its module."""
    named = named_in_conf()
    if target in named:
        return True
    found = definition(*target.rpartition(".")[::2]) if target.startswith(OURS) else None
    if found is None or found.node.name.startswith("_"):
        return False
    return found.module in {name.rpartition(".")[0] for name in named}


@functools.cache
def named_in_conf() -> frozenset[str]:
    """All that `conf/` names, classes of Lightning among it."""
    texts = (file.read_text(encoding="utf-8") for file in CONF.rglob("*.yaml"))
    found: set[str] = set()
    for line in (line for text in texts for line in text.splitlines()):
        # What a comment shows as an example is trusted only if it is our own.
        found.update(_NAMED.findall(line.partition("#")[0]))
        found.update(name for name in _NAMED.findall(line) if name.startswith(OURS))
    return frozenset(found)
