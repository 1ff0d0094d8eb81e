"""A full disk and other troubles of the machine: one sentence that names the thing, and nothing is lost."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightning_internvl.config.explain import explain, is_fault
from lightning_internvl.config.surroundings import explain_surroundings
from lightning_internvl.distributed.checkpoint_writing import save
from lightning_internvl.files import append_text, atomic_file, atomic_folder, errno_of, write_json, write_text
from lightning_internvl.inference.journal import Journal

LONG = "x" * 20_000
TENSORS = {"a": torch.zeros(5000)}


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """Inside, a file of more than a few bytes cannot be written, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def in_folder(write: Callable[[Path], None]) -> Callable[[Path], None]:
    def written(path: Path) -> None:
        with atomic_folder(path, replace=True) as draft:
            (draft / "first").write_text("whole")
            write(draft / "second")

    return written


def through_torch(count: int) -> Callable[[Path], None]:
    def written(path: Path) -> None:
        with atomic_file(path) as draft:
            save({str(number): torch.zeros(count) for number in range(3)}, draft)

    return written


WRITES: dict[str, Callable[[Path], None]] = {
    "text": lambda path: write_text(path, LONG),
    "json": lambda path: write_json(path, LONG),
    "appended": lambda path: append_text(path, LONG),
    "torch, as the file is closed": through_torch(400),
    "torch, before its end": through_torch(200_000),
    "safetensors": in_folder(lambda path: save_file(TENSORS, path)),
    "file of a folder": in_folder(lambda path: path.write_text(LONG)),
}


@pytest.mark.parametrize("kind", WRITES)
def test_what_cannot_be_written_is_named_and_what_was_there_is_whole(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "place"
    if kind in ("safetensors", "file of a folder"):
        place.mkdir()
        before = place / "before"
    else:
        before = place
    before.write_text("before")
    with pytest.raises(OSError, match="place") as raised, small_files():
        WRITES[kind](place)
    assert raised.value.filename == str(place)
    assert before.read_text() == "before"
    assert os.listdir(tmp_path) == ["place"]
    assert explain(raised.value).startswith(f"cannot read or write {place}: ")
    assert "make room there" in explain(raised.value)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.EROFS, "Read-only file system", "/run/x"), "cannot read or write /run/x: .*paths.run=FOLDER"),
        (OSError(errno.EMFILE, "Too many open files", "/run/x"), "cannot read or write /run/x: .*ulimit -n"),
        (
            RuntimeError("unable to open shared memory object </torch_1> in read-write mode: x"),
            "shared memory is full .*--shm-size",
        ),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is"), "shared memory is full"),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), r"prepares data has ended.*num_workers=0.*\(Data"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "a process that prepares data has ended"),
        (RuntimeError("received 0 items of ancdata"), "too many files are open; let more be open"),
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"), "TMPDIR=FOLDER names one"),
        (RuntimeError("Could not determine home directory."), "HOME=FOLDER names one"),
        (MemoryError(), "the machine's memory is full"),
    ],
)
def test_troubles_of_the_machine_are_one_sentence(error: Exception, told: str) -> None:
    assert is_fault(error)
    wrapped = RuntimeError("in a thread")
    wrapped.__cause__ = error
    for one in (error, wrapped):
        sentence = explain_surroundings(one)
        assert sentence
        assert "\n" not in sentence
        assert re.search(told, sentence), sentence


def test_faults_of_the_program_keep_their_traceback() -> None:
    assert errno_of(RuntimeError("shapes differ")) is None
    assert not is_fault(RuntimeError("shapes differ"))
    assert not is_fault(KeyError("logger"))


def test_halves_of_characters_and_other_line_ends_are_kept(tmp_path: Path) -> None:
    answer = "one\u2028two\u0085three \ud83d"
    journal = Journal(tmp_path / "answers.jsonl")
    journal.add([("1", "what?", answer)])
    assert Journal(tmp_path / "answers.jsonl").answer("1", "what?") == answer
    journal.finish([{"key": "1", "question": "what?", "answer": answer}])
    assert Journal(tmp_path / "answers.jsonl").answer("1", "what?") == answer
    write_json(tmp_path / "a.json", {"answer": answer})
    assert json.loads((tmp_path / "a.json").read_text())["answer"] == answer
