"""How many processes there are, and which run a process that is started again goes on with."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_internvl.files import RUN_CONFIG
from lightning_internvl.launch import earlier_attempt, note_launch, started_from_outside, started_processes


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "NODE_RANK", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_RESTART_COUNT", "ENVIRONMENT"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variables", "processes"),
    [
        ({"SLURM_JOB_NAME": "train", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}, 4),
        ({"SLURM_JOB_NAME": "train", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "ENVIRONMENT": "BATCH"}, 4),
        ({"SLURM_JOB_NAME": "train", "SLURM_PROCID": "0", "ENVIRONMENT": "BATCH"}, 1),  # a batch script without srun
        ({"SLURM_JOB_NAME": "train"}, 1),
        ({"SLURM_JOB_NAME": "bash"}, 1),
        ({"SLURM_JOB_NAME": "interactive", "SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967290"}, 1),
        ({"SLURM_JOB_NAME": "bash", "WORLD_SIZE": "2"}, 2),
    ],
)
def test_tasks_of_slurm_count_under_srun_alone(
    variables: dict[str, str], processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_PROCID", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"SLURM_NTASKS": "4"} | variables).items():
        monkeypatch.setenv(name, value)
    assert started_processes() == processes
    assert started_from_outside() == (processes > 1)


def test_only_a_further_attempt_of_the_same_job_and_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, new = tmp_path / "1000", tmp_path / "2000"
    run.mkdir()
    new.mkdir()
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    monkeypatch.setenv("SLURM_JOB_START_TIME", "1000")
    note_launch(run, ["seed=1"])
    (run / RUN_CONFIG).touch()
    assert earlier_attempt(new, ["seed=1"]) is None  # a second command of the job
    monkeypatch.setenv("SLURM_JOB_START_TIME", "2000")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert earlier_attempt(new, ["seed=1"]) == (run, "SLURM job 77")
    assert earlier_attempt(new, ["seed=2"]) is None
    monkeypatch.setenv("SLURM_JOB_ID", "99")
    assert earlier_attempt(new, ["seed=1"]) is None
    monkeypatch.delenv("SLURM_JOB_ID")
    assert earlier_attempt(new, ["seed=1"]) is None
