"""benchmarks/soak.py: what it does to a run, what it compares, and what it takes for a wrong end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.soak import different, main
from benchmarks.soak_faults import wrong_end
from lightning_internvl.files import write_json, write_text

SHORT = ("pipeline=[contrastive]", "callbacks.evaluation=null", "callbacks.report=null", "callbacks.samples=null")


def test_a_run_is_killed_and_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("minutes=0", "scenarios=scenes", "processes=1", "faults=killed", "most=1", "steps=4", *SHORT)
    assert main([*words, "logger=[history]", "data.num_workers=0"]) == 0
    line, sentence = capsys.readouterr().out.splitlines()
    told = json.loads(line)
    assert (told["runs"], told["faults"], told["hangs"]) == ({"scenes on 1": 1}, {"killed": 1}, 0)
    assert told["compared"] > 5
    assert sentence == f"0 of {told['compared']} files differ from the uninterrupted run"


def test_what_differs_is_named(tmp_path: Path) -> None:
    for name in ("whole", "run"):
        run = tmp_path / name
        rows = [{"step": step, "train/loss": 1 / (step + 1), "seconds": len(name)} for step in range(3)]
        write_text(run / "stages/one/history.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        write_json(run / "stages/one/freezing.json", [{"step": 0}])
        write_json(run / "metrics.json", {"one": 1})
        write_json(run / "timing.json", {"one": name})
    whole, run = tmp_path / "whole", tmp_path / "run"
    history = run / "stages/one/history.jsonl"
    assert different(whole, run, lost=0) == []
    write_json(run / "stages/one/freezing.json", [{"step": 0}, {"step": 2}])
    history.write_text("".join(history.read_text().splitlines(keepends=True)[1:]))
    assert different(whole, run, lost=1) == []
    assert different(whole, run, lost=0) == ["stages/one/history.jsonl"]
    history.write_text(history.read_text().replace("0.5", "0.25"))
    write_json(run / "metrics.json", {"one": 2})
    (run / ".metrics.json.1.draft").touch()
    assert different(whole, run, lost=1) == [".metrics.json.1.draft", "metrics.json", "stages/one/history.jsonl"]


@pytest.mark.parametrize(
    ("fault", "code", "said", "told"),
    [
        ("killed", -9, "", None),
        ("SIGTERM", 143, "stopped by SIGTERM; stage one: step 3 is saved", None),
        ("SIGTERM", 143, "", "ended with 143 and no message"),
        ("SIGTERM", 1, "error: it is over", "ended with 1"),
        ("SIGTERM_to_a_rank", 143, "stopped by SIGTERM", None),
        ("SIGTERM_to_a_rank", -9, "error: the process of rank 1 ended with status 143, and", None),
        ("SIGTERM_to_a_rank", -9, "", "ended with -9"),
        ("SIGTERM_to_a_rank", -15, "", "ended with -15"),
        ("SIGTERM_to_a_rank", 2, "error: another process of this run has ended (Connection closed by peer)", None),
        ("SIGTERM_to_a_rank", 2, "error: no space", "ended with 2"),
        ("SIGTERM", -9, "error: the process of rank 1 ended with status 2, and", "ended with -9"),
        ("SIGTERM", -15, "", None),
        ("dead_rank", -9, "", "ended with -9"),
        ("dead_rank", -9, "error: the process of rank 1 was killed by SIGKILL, and", None),
        ("dead_rank", 2, "error: no space", "ended with 2"),
        ("full_disk", -9, "error: the process of rank 1 ended with status 2, and", "ended with -9"),
        ("full_disk", 2, "error: no space", None),
        ("full_disk", 1, "Traceback (most recent call last):", "a traceback, and 1"),
        ("dead_worker", None, "", "hangs"),
    ],
)
def test_how_a_run_may_end(fault: str, code: int | None, said: str, told: str | None) -> None:
    assert wrong_end(fault, code, said) == told
