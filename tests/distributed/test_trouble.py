"""A process that dies, a full disk, other hardware, numbers that do not fit: each ends in time, says why and spoils nothing."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from pair import BARE, LAST, QUIET, WHOLE_BATCH, copy, run_alone
from processes import Started
from runs import once, train, weights

import callbacks
from lightning_internvl import cli
from lightning_internvl.distributed.checkpoint_files import checkpoint_step
from lightning_internvl.distributed.signals import RunStopped, tell_of_dead_processes
from lightning_internvl.files import from_aside, into_place
from lightning_internvl.pipeline import explain_stop

WITHIN = 60.0  # seconds
STAGE = (*QUIET, "pipeline=[contrastive]", "callbacks.checkpoint.every_n_steps=1")


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def runs(pid: int) -> bool:
    """Whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_first_process_dies_and_the_run_goes_on_alone(tmp_path: Path) -> None:
    long = (*BARE, *STAGE, "max_steps=12", "strategy=fsdp2")
    process = Started("train.py", *once(*long, "trainer.devices=2", f"paths.run={tmp_path / 'run'}"))
    while not (tmp_path / "run" / LAST).exists():
        assert not process.ended(), process.err
        time.sleep(0.02)
    (other,) = children(process.pid)
    process.send_signal(signal.SIGKILL)
    begun = time.monotonic()
    while runs(other):
        assert time.monotonic() - begun < WITHIN
        time.sleep(0.1)
    assert 0 < checkpoint_step(tmp_path / "run" / LAST) < 12
    outcome = train(f"resume={tmp_path / 'run'}", "trainer.devices=1")
    assert outcome.code == 0, outcome.err
    assert "1 processes instead of 2, batch_size 4 -> 8" in outcome.out
    run_alone(*long, *WHOLE_BATCH, f"paths.run={tmp_path / 'whole'}")
    ours, theirs = (weights(tmp_path / run, "contrastive") for run in ("run", "whole"))
    assert all((tensor - theirs[name]).abs().max() < 1e-4 for name, tensor in ours.items())


def test_the_trainer_says_that_another_process_has_died(capfd: pytest.CaptureFixture[str]) -> None:
    """Where nothing else finds it, as an exchange over a network that breaks does."""
    tell_of_dead_processes()
    others = [SimpleNamespace(pid=1, returncode=code, poll=lambda: None) for code in (0, -signal.SIGKILL)]
    observer = _ChildProcessObserver(os.getpid(), others)
    observer._terminate_all = lambda: None
    assert observer._run()
    told = "error: the process of rank 2 was killed by SIGKILL, and the trainer kills the others, which would wait for it"
    assert capfd.readouterr().err.strip() == f"{told}; go on with resume=RUN"


@pytest.mark.parametrize(("alone", "code"), [(True, 143), (False, 0)])
def test_a_process_that_stops_alone_ends_with_a_fault(
    alone: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the first one would wait for it in the next sum over all processes."""
    monkeypatch.setattr(cli, "WITHOUT_FIRST", 0)
    monkeypatch.setattr(cli, "is_started_by_trainer", lambda: True)
    monkeypatch.setattr(cli, "is_helper", lambda: True)
    monkeypatch.setattr(sys, "argv", ["train.py"])

    def main() -> None:
        with explain_stop(SimpleNamespace(name="one", max_steps=3), tmp_path):
            raise RunStopped.by(signal.SIGTERM, alone=alone)

    with pytest.raises(SystemExit) as end:
        cli.command(main)
    assert end.value.code == code


@pytest.mark.parametrize("asked", ["0", "1"])
def test_a_process_that_the_trainer_starts_shows_tracebacks_where_they_are_asked_for(
    asked: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its environment is that of the first one, in which Hydra shows them."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", asked)
    environments = []

    def first() -> None:
        environments.append(dict(os.environ))

    def other() -> None:
        raise ValueError("another process of this run has ended")

    cli.command(first)
    assert os.environ["HYDRA_FULL_ERROR"] == asked
    for name in ("HYDRA_FULL_ERROR", cli.VERBOSE):
        monkeypatch.setenv(name, environments[0][name])
    with pytest.raises(ValueError if asked == "1" else SystemExit):
        cli.command(other)
    assert ("error: another process" in capsys.readouterr().err) == (asked == "0")


@pytest.mark.parametrize("strategy", ["auto", "fsdp2"])
def test_a_full_disk_leaves_the_checkpoint_before_it(strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, limits = callbacks.Checkpoint.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def full_at_step_3(self: Any, trainer: Any, path: Path) -> None:
        if trainer.global_step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        try:
            save(self, trainer, path)
            self.wait(trainer, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(callbacks.Checkpoint, "save", full_at_step_3)
    outcome = train(*BARE, *STAGE, f"strategy={strategy}", f"paths.run={tmp_path / 'run'}")
    assert outcome.code == 2
    assert "the checkpoint of step 3 cannot be written" in outcome.err
    assert "of an earlier step is whole" in outcome.err
    assert checkpoint_step(tmp_path / "run" / LAST) == 2
    assert [path.name for path in (tmp_path / "run" / LAST).parent.iterdir()] == ["last.ckpt"]


def test_a_folder_that_was_being_replaced_is_found_again(tmp_path: Path) -> None:
    place, draft = tmp_path / "last", tmp_path / "draft"
    for folder, text in ((place, "old"), (draft, "new")):
        folder.mkdir()
        (folder / "step").write_text(text)
    copy(place, tmp_path / ".last.older")
    into_place(draft, place)
    assert (place / "step").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["last"]
    os.rename(place, tmp_path / ".last.older")  # as far as a process came that was killed
    from_aside(place)
    assert (place / "step").read_text() == "new"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (("strategy=fsdp3",), "did you mean 'fsdp'? valid choices: auto, ddp, fsdp, fsdp2"),
        (("strategy=deepspeed",), "use strategy=fsdp2, which does as ZeRO 3"),
    ],
)
def test_settings_that_do_not_fit(settings: tuple[str, ...], told: str, tmp_path: Path) -> None:
    outcome = train(*BARE, *STAGE, *settings, f"paths.run={tmp_path / 'run'}")
    assert outcome.code == 2
    assert told in outcome.err
    assert not (tmp_path / "run").exists()


def test_processes_that_were_started_and_that_were_asked_for_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    outcome = train(*BARE, *STAGE, "trainer.devices=2", f"paths.run={tmp_path / 'run'}")
    assert "4 processes were started, but trainer.devices=2 x trainer.num_nodes=1 says 2" in outcome.err
    outcome = train(*BARE, *STAGE, "trainer.devices=4", f"paths.root={tmp_path}")
    assert "paths.run=FOLDER" in outcome.err
    assert not list(tmp_path.rglob("config.yaml"))


def test_resume_with_processes_that_cannot_share_a_step(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    shown = train(*BARE, *STAGE, f"paths.run={tmp_path / 'run'}", "--cfg", "job", "--resolve")
    (tmp_path / "run" / "config.yaml").write_text(shown.out)
    outcome = train(f"resume={tmp_path / 'run'}", "trainer.devices=3")
    assert outcome.code == 2
    assert (
        "4 samples, which 3 processes cannot share evenly; fitting numbers of processes (devices x nodes): 1, 2, 4" in outcome.err
    )
    outcome = train(f"resume={tmp_path / 'run'}", "trainer.devices=auto")
    assert "trainer.devices=N" in outcome.err
