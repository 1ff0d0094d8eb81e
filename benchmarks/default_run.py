"""The default run over several seeds: what README's table says, as means with their spread.

python benchmarks/default_run.py seeds=3                        # seeds 0, 1 and 2, one run after the other
python benchmarks/default_run.py seeds=3 optimizer=sgd          # further words go to train.py

Each run is `python train.py seed=N` in a process of its own. Prints a table in Markdown (the spread is the largest value less the
smallest) and, last, one JSON line with every metric of every seed, seconds and peak memory.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from lightning_internvl.report.metrics_table import with_chance

ROOT = Path(__file__).resolve().parents[1]


def one_run(seed: int, words: list[str], folder: Path) -> dict[str, Any]:
    """Metrics by stage and name, seconds, and peak memory in GiB. Raises CalledProcessError where the run fails."""
    run = folder / f"seed-{seed}"
    started = time.perf_counter()
    command = [sys.executable, str(ROOT / "train.py"), f"seed={seed}", f"paths.run={run}", *words]
    process = subprocess.Popen(command, stdout=sys.stderr)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise subprocess.CalledProcessError(os.waitstatus_to_exitcode(status), process.args)
    stages = json.loads((run / "metrics.json").read_text())
    metrics = {f"{stage}/{name}": value for stage, found in stages.items() for name, value in found.items()}
    return {"seed": seed, "seconds": time.perf_counter() - started, "peak_gib": used.ru_maxrss / 2**20, "metrics": metrics}


def table(runs: list[dict[str, Any]]) -> str:
    """A row a metric: mean, spread, and the level of chance where there is one."""
    lines = ["| metric | mean | spread | chance |", "| --- | ---: | ---: | ---: |"]
    measured = [{**run["metrics"], "seconds": run["seconds"], "peak memory, GiB": run["peak_gib"]} for run in runs]
    for rows in zip(*map(with_chance, measured), strict=True):
        (name, *_), values, levels = rows[0], [row[1] for row in rows], [row[2] for row in rows]
        chance = "" if None in levels else f"{statistics.mean(levels):.3f}"
        lines.append(f"| {name} | {statistics.mean(values):.3f} | {max(values) - min(values):.3f} | {chance} |")
    return "\n".join(lines)


def main() -> None:
    options = dict(word.split("=", 1) for word in sys.argv[1:] if word.startswith("seeds="))
    words = [word for word in sys.argv[1:] if not word.startswith("seeds=")]
    with tempfile.TemporaryDirectory() as folder:
        runs = [one_run(seed, words, Path(folder)) for seed in range(int(options.get("seeds", 3)))]
    print(table(runs))
    print(json.dumps({"runs": runs, "cores": os.cpu_count(), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
