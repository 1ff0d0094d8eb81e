"""A run that is stopped saves its last step, hands nothing over, says how to go on, and ends with the same bits."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path

import pytest
from processes import Started
from runs import ROOT, TINY, fitting, losses, same_weights, tiny_run, train
from torch.utils.data import DataLoader

from lightning_internvl.distributed.checkpoint_files import checkpoint_step
from lightning_internvl.distributed.signals import NOT_FINISHED, RunStopped

STEPS = 60
LONG = (
    "pipeline=[contrastive]", f"max_steps={STEPS}", "callbacks.checkpoint.every_n_steps=1000", "trainer.accelerator=cpu",
    "callbacks.samples=null", "callbacks.evaluation=null", "callbacks.report=null", "logger=[history]",
)  # fmt: skip
SLURM = {
    "SLURM_NTASKS": "1", "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost", "SLURM_JOB_START_TIME": "1000",
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("stopped") / "whole", *LONG)


def rows(run: Path) -> int:
    history = run / "stages" / "contrastive" / "history.jsonl"
    return history.read_text().count("\n") if history.exists() else 0


def stopped_by(number: int, run: Path, *settings: str, folder: Path = ROOT, **variables: str) -> tuple[int, str]:
    """Exit status and stderr of a process that gets a signal after a few steps."""
    process = Started("train.py", *fitting([*TINY, *LONG, *settings]), cwd=folder, variables=variables)
    while rows(found(run)) < 5:
        assert not process.ended(), process.err
        time.sleep(0.002)
    if number == signal.SIGTERM:  # meanwhile it is the only one that may train there
        outcome = train(f"resume={found(run)}")
        assert outcome.code == 2
        assert f"is the folder of a run that trains now (process {process.pid} on" in outcome.err
    process.send_signal(number)
    return process.wait(60), process.err


def found(run: Path) -> Path:
    """The only run below a folder, or the folder."""
    return next((path.parent for path in run.glob("outputs/*/*/config.yaml")), run)


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C"), (signal.SIGHUP, "SIGHUP")])
def test_a_signal_saves_the_step_and_the_run_goes_on_exactly(number: int, name: str, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, said = stopped_by(number, run, f"paths.run={run}")
    step = checkpoint_step(run / "checkpoints" / "contrastive" / "last.ckpt")
    assert code == 128 + number, said
    assert 5 <= step < STEPS
    assert f"stopped by {name}; stage contrastive: step {step} of {STEPS} is saved in {run}/checkpoints" in said
    assert f"python train.py resume={run}\n" in said
    assert "Traceback" not in said
    assert not (run / "handoff").exists()
    assert rows(run) == step  # the last step is logged, too
    assert train(f"resume={run}").code == 0
    assert same_weights(whole, run, "contrastive")
    assert losses(whole, "contrastive") == losses(run, "contrastive")


def test_a_stage_that_runs_out_of_time_is_not_finished(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcome = train(*TINY, *LONG, "trainer.max_time=00:00:00:00", "trainer.accumulate_grad_batches=1", f"paths.run={run}")
    assert outcome.code == NOT_FINISHED
    assert f"not finished: trainer.max_time is over; stage contrastive: no step of {STEPS} is saved" in outcome.err
    assert not (run / "handoff").exists()
    outcome = train(f"resume={run}", "trainer.max_time={milliseconds: 150}")
    assert outcome.code == NOT_FINISHED, outcome.err
    step = checkpoint_step(run / "checkpoints" / "contrastive" / "last.ckpt")
    assert 0 < step < STEPS
    assert f"step {step} of {STEPS} is saved" in outcome.err
    assert rows(run) == step
    outcome = train(f"resume={run}")  # which has no limit
    assert outcome.code == 0, outcome.err
    assert same_weights(whole, run, "contrastive")
    assert losses(whole, "contrastive") == losses(run, "contrastive")


def test_no_step_is_logged_with_the_losses_of_another(tmp_path: Path) -> None:
    run = tmp_path / "run"
    some = ("trainer.log_every_n_steps=3", "trainer.max_time={milliseconds: 150}")
    assert train(*TINY, *LONG, "max_steps=4000", *some, f"paths.run={run}").code == NOT_FINISHED
    assert checkpoint_step(run / "checkpoints" / "contrastive" / "last.ckpt") > 3
    assert {row["step"] % 3 for row in losses(run, "contrastive")} == {2}


def test_a_time_that_is_none(tmp_path: Path) -> None:
    outcome = train(*TINY, *LONG, "trainer.max_time=soon", f"paths.run={tmp_path}/run")
    assert outcome.code == 2
    assert "trainer.max_time='soon' is no time" in outcome.err


def test_a_job_that_slurm_starts_again_goes_on_and_no_other_run_does(whole: Path, tmp_path: Path) -> None:
    code, said = stopped_by(signal.SIGUSR1, tmp_path, folder=tmp_path, **SLURM)
    (run,) = (tmp_path / "outputs" / "internvl_toy").iterdir()
    assert code == 128 + signal.SIGUSR1, said
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        for name, value in (SLURM | {"SLURM_JOB_START_TIME": "2000", "SLURM_RESTART_COUNT": "1"}).items():
            patch.setenv(name, value)
        outcome = train(*TINY, *LONG)
        assert outcome.code == 0, outcome.err
        assert f"SLURM job 77 was started again: goes on with {run}" in " ".join(outcome.out.split())
        assert "contrastive: goes on from step" in outcome.out
        assert losses(run, "contrastive") == losses(whole, "contrastive")
        assert list((tmp_path / "outputs" / "internvl_toy").iterdir()) == [run]
        patch.setenv("SLURM_JOB_ID", "99")
        other = tmp_path / "other"
        (tmp_path / "hpc_ckpt_1.ckpt").write_bytes((run / "checkpoints" / "contrastive" / "last.ckpt").read_bytes())
        assert train(*TINY, *LONG, "max_steps=2", f"paths.run={other}").code == 0
        assert [row["step"] for row in losses(other, "contrastive")] == [0, 1]


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (RunStopped.by(signal.SIGTERM), 143, "stopped by SIGTERM; stage contrastive: no step of 2 is saved"),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), 2, "let more be open (ulimit -n 4096)"),
        (ValueError("this sample is bad"), 2, "error: this sample is bad"),
    ],
    ids=["signal", "open files", "sample"],
)
def test_what_ends_training_while_data_processes_start_is_told(
    error: BaseException, code: int, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr(DataLoader, "_get_iterator", fail)
    outcome = train(*TINY, *LONG, "max_steps=2", f"paths.run={tmp_path / 'run'}")
    assert outcome.code == code, outcome.err
    assert told in outcome.err


def test_without_a_logger(tmp_path: Path) -> None:
    tiny_run(tmp_path / "run", "pipeline=[contrastive]", "max_steps=1", "logger=[]", "callbacks.samples=null")
    assert (tmp_path / "run" / "handoff" / "contrastive").exists()
