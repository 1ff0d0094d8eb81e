"""What a filter costs, what a kill costs it, and what it finds: scene pairs, some of them spoilt on purpose.

python benchmarks/filtering.py init_from=RUN                               # 10,000 pairs; RUN has finished a contrastive stage
python benchmarks/filtering.py init_from=RUN pairs=100000 kills=3 keep_share=0.85

Writes shards, filters them once undisturbed and once killed at random times and resumed, and compares all files of both. Prints
one JSON line: pairs a second, finished shards that were scored again after a kill, files that differ, and which share of each
fault was dropped.
"""

from __future__ import annotations

import json
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from lightning_internvl.data.scene_shards import write_scene_shards
from lightning_internvl.data.shards.tar import TarShards
from lightning_internvl.filtering.scores import read_rows

ROOT = Path(__file__).resolve().parents[1]


def command(run: Path, shards: Path, settings: dict[str, Any]) -> list[str]:
    """What starts a filter."""
    rules = f"stages.filter.rules.similarity.keep_share={settings['keep_share']}"
    given = [f"init_from={settings['init_from']}", "data=webdataset", f"data.shards={shards}", f"paths.run={run}"]
    scripts = "stages.filter.rules.scripts={allowed: [latin, han], min: 0.5}"
    return [sys.executable, "train.py", "pipeline=[filter]", *given, rules, scripts]


def undisturbed(run: Path, shards: Path, settings: dict[str, Any]) -> dict[str, float]:
    """A filter from beginning to end: pairs a second of its scoring, and of all of it with its start."""
    begun = time.monotonic()
    subprocess.run(command(run, shards, settings), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    timing = json.loads((run / "timing.json").read_text())["filter"]
    return {
        "pairs_per_second_scored": timing["pairs_per_second"],
        "pairs_per_second_in_all": round(settings["pairs"] / (time.monotonic() - begun), 1),
    }


def killed(run: Path, shards: Path, settings: dict[str, Any], kills: int) -> int:
    """The same, killed at random times while it scores, and resumed; how many shards were scored again that had been finished."""
    arguments, chance = command(run, shards, settings), random.Random(0)
    scores, finished = run / "filter" / "scores", dict[Path, int]()
    count = -(-settings["pairs"] // settings["per_shard"])
    for kill in range(1, kills + 1):
        with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
            while len(list(scores.glob("[!.]*"))) < count * kill // (kills + 1) and process.poll() is None:
                time.sleep(0.01)
            time.sleep(chance.random())
            process.kill()
        finished |= {path: path.stat().st_mtime_ns for path in scores.glob("[!.]*") if path not in finished}
        arguments = [sys.executable, "train.py", f"resume={run}"]
    subprocess.run(arguments, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return sum(path.stat().st_mtime_ns != time_ns for path, time_ns in finished.items())


def differing(one: Path, two: Path) -> list[str]:
    """Files that are not the same in two folders."""
    names = {str(path.relative_to(folder)) for folder in (one, two) for path in folder.rglob("*") if path.is_file()}
    both = {
        name: [(folder / name).read_bytes() if (folder / name).is_file() else None for folder in (one, two)] for name in names
    }
    return sorted(name for name, (a, b) in both.items() if a != b)


def found(run: Path, shards: Path) -> dict[str, Any]:
    """The share of each fault that was dropped, and of what was dropped the share that had a fault."""
    dropped = {row["key"] for path in (run / "filter" / "dropped").glob("*.jsonl") for row in read_rows(path)}
    source, total, gone = TarShards(str(shards)), Counter[str](), Counter[str]()
    for shard in range(len(source)):
        for record in source.read(shard):
            fault = json.loads(record["json"])["fault"] or "none"
            total[fault] += 1
            gone[fault] += record["key"] in dropped
    recall = {fault: round(gone[fault] / number, 4) for fault, number in sorted(total.items())}
    return {
        "dropped_share": recall,
        "precision": round(1 - gone["none"] / max(len(dropped), 1), 4),
        "pairs_by_fault": dict(total),
    }


def main() -> None:
    """Measure, and print what was found."""
    settings: dict[str, Any] = {"pairs": 10_000, "per_shard": 1000, "kills": 3, "spoilt": 0.3, "keep_share": 0.85}
    settings |= {
        key: value if key == "init_from" else json.loads(value) for key, value in (a.split("=", 1) for a in sys.argv[1:])
    }
    settings["init_from"] = str(Path(settings["init_from"]).resolve())
    with tempfile.TemporaryDirectory() as folder:
        shards, whole, torn = (Path(folder) / name for name in ("shards", "whole", "torn"))
        write_scene_shards(shards, settings["pairs"], settings["per_shard"], spoilt=settings["spoilt"])
        made_on = {"machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__}
        known = {name: settings[name] for name in ("pairs", "per_shard", "spoilt", "keep_share", "kills")}
        result: dict[str, Any] = {"benchmark": "filtering", **made_on, **known, **undisturbed(whole, shards, settings)}
        if settings["kills"]:
            result["finished_shards_scored_again"] = killed(torn, shards, settings, settings["kills"])
            result["files_that_differ"] = differing(whole / "filter", torn / "filter")
        print(json.dumps(result | found(whole, shards)))


if __name__ == "__main__":
    main()
