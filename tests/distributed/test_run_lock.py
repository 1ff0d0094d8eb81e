"""A run's folder has one owner."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from processes import together

from lightning_internvl.distributed import run_lock
from lightning_internvl.distributed.run_lock import LOCK, owned
from lightning_internvl.distributed.scratch import OWNER, scratch_folder
from lightning_internvl.files import TEMPORARY, write_json, write_text
from lightning_internvl.messages import ConfigError

SLURM = {"SLURM job 77": "1 at 2000"}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT", 0.05)
    monkeypatch.setattr(run_lock, "SILENCE", 0.3)


def dead() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def left(folder: Path, **fields: object) -> Path:
    """A folder with the lock of another process."""
    folder.mkdir()
    (folder / LOCK).write_text(json.dumps(run_lock.this_process() | fields))
    return folder


def start(rank: int, folder: str, count: int) -> None:
    with owned(Path(folder) / "run", {}, may_move=True) as own:
        (own / "mine").write_text(str(rank))
        while len(list(Path(folder).glob("*/mine"))) < count:
            time.sleep(0.005)
        assert (own / "mine").read_text() == str(rank)


def test_runs_that_start_at_the_same_moment_have_folders_of_their_own(tmp_path: Path) -> None:
    together(start, str(tmp_path), 6, count=6)
    assert sorted(file.read_text() for file in tmp_path.glob("*/mine")) == list("012345")
    assert not list(tmp_path.glob(f"*/{LOCK}"))


def start_pairs(rank: int, folder: str, pairs: int) -> None:
    """Both processes of a pair begin when both are ready, and hold their folders until both have one."""
    for pair in range(pairs):
        place = Path(folder) / str(pair)
        for state in ("ready", "owns"):
            with owned(place / "run", {}, may_move=True) if state == "owns" else contextlib.nullcontext(place) as own:
                own.mkdir(parents=True, exist_ok=True)
                (own / f"{state}-{rank}").write_text(str(own))
                while len(list(place.rglob(f"{state}-*"))) < 2:
                    time.sleep(0.0002)


def test_of_fifty_pairs_that_start_at_the_same_moment_none_mixes(tmp_path: Path) -> None:
    together(start_pairs, str(tmp_path), 50, count=2)
    mixed = [pair for pair in range(50) if len({file.parent for file in tmp_path.glob(f"{pair}/*/owns-*")}) != 2]
    assert not mixed


def test_a_folder_with_an_owner_is_refused(tmp_path: Path) -> None:
    with owned(tmp_path / "run", {}) as folder:
        told = rf"run is the folder of a run that trains now \(process {os.getpid()} on .*\); stop that one, or choose"
        with pytest.raises(ConfigError, match=told), owned(folder, {}):
            pass
        assert (folder / LOCK).exists()
    assert not folder.exists()  # nothing was written there


@pytest.mark.parametrize("started", ["of another process", None])
def test_a_process_that_has_ended_is_followed_with_a_word(
    tmp_path: Path, started: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where its number has been given to another process since."""
    fields = {"pid": os.getpid(), "started": started} if started else {"pid": dead()}
    folder = left(tmp_path / "run", **fields)
    with owned(folder, {}):
        assert json.loads((folder / LOCK).read_text())["pid"] == os.getpid()
    assert "has ended without a word in" in capsys.readouterr().out
    assert not folder.exists()


def test_a_lock_that_was_never_written_whole_is_that_of_a_dead_process(tmp_path: Path, quick: None) -> None:
    (tmp_path / LOCK).write_text('{"pid": 1')
    with owned(tmp_path, {}):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_an_owner_on_another_machine_is_known_by_its_signs_of_life(tmp_path: Path, quick: None) -> None:
    folder = left(tmp_path / "silent", machine="another", host="there", pid=1)
    with owned(folder, {}):
        pass
    folder = left(tmp_path / "lively", machine="another", host="there", pid=1)
    done = threading.Event()
    threading.Thread(target=run_lock._show_life, args=(folder / LOCK, done)).start()
    with pytest.raises(ConfigError, match="process 1 on there"), owned(folder, {}):
        pass
    done.set()


def test_a_later_attempt_of_a_launch_takes_the_folder_of_an_earlier_one(tmp_path: Path) -> None:
    folder = left(tmp_path / "run", machine="another", launches={"SLURM job 77": "0 at 1000"})
    with owned(folder, SLURM):
        assert json.loads((folder / LOCK).read_text())["launches"] == SLURM


def test_folders_for_temporary_files_of_dead_processes_alone_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    owners = {
        "killed": {"pid": dead()}, "number": {"pid": os.getpid(), "started": "of another process"}, "alive": {},
        "far": {"pid": 1, "machine": "another"}, "nobody": {"pid": None, "started": None},
    }  # fmt: skip
    for name, fields in owners.items():
        write_json(tmp_path / f"{TEMPORARY}{name}" / OWNER, run_lock.this_process() | fields)
        write_text(tmp_path / f"{TEMPORARY}{name}/uploads/one.png", "a picture")
    for name, text in (("list", "[]"), ("torn", '{"pid'), ("beginning", None)):
        write_text(tmp_path / f"{TEMPORARY}{name}/one.png", "a picture")
        if text:
            write_text(tmp_path / f"{TEMPORARY}{name}" / OWNER, text)
    shutil.copytree(tmp_path / f"{TEMPORARY}killed", tmp_path / "of_others")
    (tmp_path / f"{TEMPORARY}linked").symlink_to(tmp_path / "of_others")
    kept = {path.name for path in tmp_path.iterdir()} - {f"{TEMPORARY}killed", f"{TEMPORARY}number"}
    with scratch_folder("toy") as first, scratch_folder("toy") as second:
        assert {path.name for path in tmp_path.iterdir()} == kept | {first.name, second.name}
    assert {path.name for path in tmp_path.iterdir()} == kept
    assert (tmp_path / f"{TEMPORARY}alive/uploads/one.png").exists()
    assert (tmp_path / "of_others/uploads/one.png").exists()
