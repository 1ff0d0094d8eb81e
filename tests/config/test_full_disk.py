"""A disk that is full at any file which a filter, an evaluation or an export writes: the fault names it, and nothing is lost.

The system itself says that there is no room: a file whose turn has come is /dev/full, or may not grow.
"""

from __future__ import annotations

import os
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from processes import together
from runs import TINY, tiny_run, train

from lightning_internvl.config.explain import explain, is_fault
from lightning_internvl.config.filter_settings import filter_settings
from lightning_internvl.config.targets import build
from lightning_internvl.data.scene_shards import write_scene_shards
from lightning_internvl.evaluation.command import run_evaluation
from lightning_internvl.export.command import run_export
from lightning_internvl.export.settings import check_settings
from lightning_internvl.files import CONF
from lightning_internvl.filtering.command import run_filter
from lightning_internvl.filtering.job import FilterJob

FULL = Path("/dev/full")
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")
DRAFT = re.compile(r"^\.(.+)\.\d+\.draft$")
ANY = re.compile(r"\d{4,}")  # numbers of shards


class Disk:
    """Notes which kinds of files this process writes below a folder, and is full when the turn of one has come."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.written, self.full = folder, dict[str, None](), ""
        self.link: Path | None = None
        sys.addaudithook(self._hear)  # for ever, so this is for a process of its own
        safetensors.torch.serialize_file = self._in_rust(safetensors.torch.serialize_file)

    def _hear(self, event: str, given: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(given[0], str) and given[2] & (os.O_WRONLY | os.O_RDWR):
            self._write(Path(given[0]), adds=bool(given[2] & os.O_APPEND))

    def _in_rust(self, serialize_file: Callable[..., None]) -> Callable[..., None]:
        def write(tensors: Any, path: Any, **options: Any) -> None:
            self._write(Path(path), adds=True)  # a link is replaced
            serialize_file(tensors, path, **options)

        return write

    def _write(self, path: Path, adds: bool) -> None:
        place = path
        while any(DRAFT.match(part) for part in place.parts):  # one may lie in another
            place = Path(*(DRAFT.sub(r"\1", part) for part in place.parts))
        if not place.is_relative_to(self.folder):
            return
        kind = ANY.sub("N", str(place.relative_to(self.folder)))
        self.written[kind] = None
        if kind != self.full:
            return
        self.full = ""
        if adds:
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size if path.exists() else 0, most))
        else:
            path.unlink(missing_ok=True)
            path.symlink_to(FULL)
            self.link = path

    def fault(self, work: Callable[[], None], kind: str) -> str:
        """What is told when the disk is full at a file of this kind."""
        self.full, self.link = kind, None
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        with pytest.raises(Exception) as told:  # noqa: PT011 (any, to see what it is)
            work()
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        if self.link and self.link.is_symlink():  # a file that was begun in its place
            self.link.unlink()
            self.link.touch()
        assert is_fault(told.value), (kind, told.value)
        return explain(told.value)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def check(place: str, works: Callable[[Path], Callable[[], None]], timed: tuple[str, ...], least: int) -> None:
    """Do some work on a disk that is full at each kind of file in turn and goes on, and compare it with work that nothing stops.

    Args:
        works: the work in a folder.
        timed: files with times in them.
        least: kinds of files that are written.
    """
    whole, again = Path(place) / "whole", Path(place) / "again"
    disk = Disk(whole)
    works(whole)()
    kinds, disk.folder = list(disk.written), again
    assert len(kinds) >= least, kinds
    work = works(again)
    for kind in kinds:
        told = disk.fault(work, kind)
        assert "No space left on device" in told or "File too large" in told, (kind, told)
        assert str(again) in told, (kind, told)
        assert "\n" not in told
        assert not [path for path in again.parent.rglob("*") if DRAFT.match(path.name)], kind
    work()
    found, expected = contents(again), contents(whole)
    assert found.keys() == expected.keys()
    assert not [name for name in found if found[name] != expected[name] and Path(name).name not in timed]


def settings_of(command: str, *words: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(compose(command, list(words)), resolve=True)


def filters(_: int, place: str, config: dict[str, Any]) -> None:
    settings = filter_settings(config, "filter")
    check(
        place,
        lambda folder: lambda: run_filter(FilterJob(settings, folder / "filter", build, None), folder),
        ("timing.json", "report.html"),
        least=12,
    )


def evaluates(_: int, place: str, run: str) -> None:
    def works(folder: Path) -> Callable[[], None]:
        words = (f"run={run}", "task=vqa", "samples=2", f"to={folder}", "cases=1")
        return lambda: run_evaluation(settings_of("evaluate", *words), build)

    check(place, works, ("record.json", "index.html"), least=5)


def exports(_: int, place: str, run: str) -> None:
    def works(folder: Path) -> Callable[[], None]:
        return lambda: run_export(check_settings(settings_of("export", f"run={run}", f"to={folder}")), build)

    check(place, works, (), least=5)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("run") / "run", "max_steps=1", "callbacks.evaluation=null")


def test_a_filter(tmp_path: Path) -> None:
    write_scene_shards(tmp_path / "shards", pairs=12, per_shard=6, image_size=32, spoilt=0.5)
    first = tmp_path / "shards" / "0000.tar"  # of which something is dropped and skipped, so that no list is empty
    first.write_bytes((tmp_path / "shards" / "00001.tar").read_bytes()[:5000])
    words = ("data=webdataset", "data.held_out=null", f"data.shards={tmp_path / 'shards'}", "stages.filter.rules.similarity=null")
    shown = train(*TINY, "pipeline=[filter]", *words, "data.max_bad_fraction=0.9", "--cfg", "job", "--resolve")
    assert shown.code == 0, shown.err
    together(filters, str(tmp_path), yaml.safe_load(shown.out), count=1)


def test_an_evaluation(tmp_path: Path, run: Path) -> None:
    together(evaluates, str(tmp_path), str(run), count=1)


def test_an_export(tmp_path: Path, run: Path) -> None:
    together(exports, str(tmp_path), str(run), count=1)
