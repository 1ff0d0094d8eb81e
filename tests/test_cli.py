"""What the command line promises beside training: quick answers, sweeps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage

import pytest
from runs import ROOT, TINY, read_json, train

SHOWS_MODULES = """
import atexit, json, runpy, sys
atexit.register(lambda: print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})), file=sys.stderr))
sys.argv = ["train.py", "--cfg", "job"]
runpy.run_path("train.py", run_name="__main__")
"""


def test_showing_the_configuration_imports_no_torch() -> None:
    shown = subprocess.run([sys.executable, "-c", SHOWS_MODULES], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "pipeline:\n- contrastive\n" in shown.stdout
    assert not {"torch", "lightning", "transformers", "numpy"} & set(json.loads(shown.stderr))


def test_showing_the_configuration_is_quick() -> None:
    before = getrusage(RUSAGE_CHILDREN)  # processor time, which other programs do not lengthen
    subprocess.run([sys.executable, "train.py", "--cfg", "job"], cwd=ROOT, capture_output=True, check=True)
    after = getrusage(RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 1.5


def test_a_sweep_makes_one_folder_a_job(tmp_path: Path) -> None:
    outcome = train("--multirun", *TINY, "pipeline=[contrastive]", "seed=0,1", f"paths.sweep={tmp_path}/sweep")
    assert outcome.code == 0, outcome.err
    metrics = [read_json(tmp_path / "sweep" / job / "metrics.json") for job in ("0", "1")]
    assert set(metrics[0]) == set(metrics[1]) == {"contrastive"}
    assert metrics[0] != metrics[1]
    for job in ("0", "1"):
        assert f"seed: {job}\n" in (tmp_path / "sweep" / job / "config.yaml").read_text()


@pytest.mark.parametrize("flag", ["--help", "--hydra-help"])
def test_help_is_answered(flag: str) -> None:
    assert train(flag).code == 0
