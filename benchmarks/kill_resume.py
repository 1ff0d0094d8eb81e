"""Is resume exact? Kills a run with SIGKILL at random moments, resumes it each time, and compares what it hands over in the end.

python benchmarks/kill_resume.py                        # 20 kills over the three stages of a tiny default run
python benchmarks/kill_resume.py kills=20 processes=2   # of two processes, either of which is killed
python benchmarks/kill_resume.py kills=5 seed=1 peft=lora peft.decoder.rank=2   # any other settings of train.py

One run is left alone. Another one is killed at a moment that is drawn evenly from the start of its work on, and goes on with
`resume=` until the next kill; when it is through, a new one is begun, until there have been as many kills as asked for. Each
finished run must have handed over the same bytes as the one that was left alone, and measured the same. Prints one JSON line;
ends with 1 if a byte differs.
"""

from __future__ import annotations

import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("contrastive", "generative", "supervised")
TINY = (
    "debug=fast", "max_steps=null", "callbacks.checkpoint.every_n_steps=5", "trainer.accelerator=cpu",
    "encoder.image_size=48", "encoder.patch_size=24", "encoder.dim=16", "encoder.depth=1", "encoder.heads=2",
    "encoder.mlp_dim=16",
    "middleware.dim=16", "middleware.depth=2", "middleware.heads=2", "middleware.mlp_dim=16", "middleware.num_queries=2",
    "middleware.embed_dim=8", "middleware.pool_heads=2",
    "decoder.config.hidden_size=16", "decoder.config.intermediate_size=16", "decoder.config.num_hidden_layers=1",
    "decoder.config.num_attention_heads=2", "decoder.config.num_key_value_heads=2",
    *(f"stages.{stage}.{setting}" for stage in STAGES for setting in ("batch_size=4", "max_steps=60")),
    "data.held_out.scenes=12", "data.held_out.questions=8", "callbacks.samples.images=2",
)  # fmt: skip
OWN = {"kills": 20, "processes": 1, "seed": 0}  # settings of this script
RUNS = 6  # starts that one run takes on the mean: the share of a whole run that passes between two kills


def start(log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """`python train.py ARGUMENTS`; what it says goes to a file."""
    with log.open("ab") as stream:
        return subprocess.Popen(
            [sys.executable, "train.py", *arguments],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=stream,
            stderr=stream,
        )


def handed_over(run: Path) -> dict[str, bytes]:
    """All files that the stages handed over, and the measures."""
    files = [*(path for path in (run / "handoff").rglob("*") if path.is_file()), run / "metrics.json"]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def place(run: Path) -> str:
    """The stage that a run is in."""
    ahead = [stage for stage in STAGES if not (run / "handoff" / stage).exists()]
    return ahead[0] if ahead else "after the last stage"


def works_in(process: subprocess.Popen[bytes], run: Path) -> bool:
    """Wait until a process has begun to work: it has written into a stage's folder. False if it has ended before."""
    begun = time.time()
    while process.poll() is None:
        folders = [path for path in (run / "stages").rglob("*") if path.is_file()]
        if any(path.stat().st_mtime > begun for path in folders):
            return True
        time.sleep(0.01)
    return False


def victim(process: subprocess.Popen[bytes], draw: random.Random) -> int:
    """The process that is killed: the one that was started, or one that it has started as another rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    others = [int(pid) for pid in children.read_text().split()] if children.exists() else []
    ranks = [pid for pid in others if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return draw.choice([process.pid, *ranks])


def kill(process: subprocess.Popen[bytes], run: Path, delay: float, draw: random.Random) -> str | None:
    """Kill a process `delay` seconds after it has begun to work, and say where; None if it was through before."""
    if not works_in(process, run):
        return None
    try:
        process.wait(delay)
        return None
    except subprocess.TimeoutExpired:
        where = place(run)
        os.kill(victim(process, draw), 9)
        process.wait(120)  # of two processes, the other one notices
        return where


def measure(folder: Path, settings: list[str], kills: int, processes: int, seed: int) -> dict[str, Any]:
    """Run, kill, resume, compare."""
    draw, log = random.Random(seed), folder / "log.txt"
    settings = [*TINY, f"trainer.devices={processes}", *settings]
    begun = time.monotonic()
    whole = start(log, *settings, f"paths.run={folder / 'whole'}")
    works_in(whole, folder / "whole")
    worked = time.monotonic()
    check(whole.wait(), log)
    working = time.monotonic() - worked
    expected, places, delays, finished, different = handed_over(folder / "whole"), Counter[str](), [], 0, set[str]()
    while sum(places.values()) < kills or (folder / f"run-{finished}").exists():
        run = folder / f"run-{finished}"
        process = start(log, *([f"resume={run}"] if (run / "config.yaml").exists() else [*settings, f"paths.run={run}"]))
        delay, where = draw.uniform(0, 2 * working / RUNS), None
        if sum(places.values()) < kills:
            where = kill(process, run, delay, draw)
        if where is not None:
            places[where] += 1
            delays.append(round(delay, 2))
            print(f"kill {sum(places.values())}: {where}, {delay:.2f} s after it began to work", file=sys.stderr, flush=True)
            continue
        check(process.wait(), log)
        found = handed_over(run)
        different |= {f"{run.name}/{name}" for name in expected | found if expected.get(name) != found.get(name)}
        finished += 1
    return {
        "kills": sum(places.values()),
        "killed_in": dict(places),
        "seconds_after_start_of_work": delays,
        "whole_run_works_seconds": round(working, 1),
        "runs": finished,
        "files_compared": len(expected),
        "different": sorted(different),
        "seconds": round(time.monotonic() - begun, 1),
    }


def check(code: int, log: Path) -> None:
    """Stop with what a run said if it has failed."""
    if code:
        sys.exit(f"a run has ended with {code}:\n" + log.read_text(errors="replace")[-3000:])


def main(arguments: list[str]) -> None:
    """Read the settings, measure, print one JSON line."""
    given = [(a, *a.split("=", 1)) for a in arguments]
    own = OWN | {name: int(value) for _, name, value in given if name in OWN}
    settings = [a for a, name, _ in given if name not in OWN]
    with tempfile.TemporaryDirectory(prefix="kill_resume_") as folder:
        result = measure(Path(folder), settings, **own)
    machine = {"machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__}
    print(json.dumps({"benchmark": "kill_resume", **machine, **own, "settings": settings, **result}))
    sys.exit(1 if result["different"] else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
