"""What is left when a run or a stage ends: the list that an error points to, and no logger of the stage before."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from lightning_internvl.cli import LISTS
from lightning_internvl.files import remove_all_but
from lightning_internvl.pipeline import finish_loggers


def test_the_lists_of_samples_that_an_error_names_stay(tmp_path: Path) -> None:
    for name in ("stages/first/skipped.jsonl", "stages/second/skipped.1.jsonl", "stages/first/history.jsonl", "config.yaml"):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).touch()
    remove_all_but(tmp_path / "run", LISTS)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["run/stages/first/skipped.jsonl", "run/stages/second/skipped.1.jsonl"]
    (tmp_path / "other" / "stages").mkdir(parents=True)
    remove_all_but(tmp_path / "other", LISTS)
    assert not (tmp_path / "other").exists()


def test_loggers_that_live_in_the_process_are_finished() -> None:
    done: list[str] = []
    wandb = SimpleNamespace(_experiment=SimpleNamespace(finish=lambda: done.append("wandb")))
    finish_loggers([wandb, SimpleNamespace(_experiment=None), SimpleNamespace()])
    assert done == ["wandb"]
