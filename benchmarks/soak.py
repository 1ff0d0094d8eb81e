"""Does a run that is killed, signalled, starved and started again, over and over, end as one that was left alone?

python benchmarks/soak.py                                  # 5 minutes of all scenarios, on one process and two
python benchmarks/soak.py minutes=60 seed=1                # other draws: which fault, which moment, which start
python benchmarks/soak.py scenarios=shards processes=2 faults=dead_rank,full_disk
python benchmarks/soak.py scenarios=scenes steps=60 peft=lora peft.decoder.rank=2           # with any words of train.py

Scenarios: the three stages on drawn scenes, the three on shards (a torn one and empty captions among them), a fine-tune of a
JSONL file (a broken picture in it). Each is first run once and left alone. Then runs meet up to `most` faults, each at a moment
drawn from the length of that run, and go on with `resume=` or, as a SLURM job that is started again, with the same words. A run
has to end with a fitting status and message within `limit` seconds of a fault and ten times the length of the run that was left
alone. In the end every file must be the same, byte for byte; files with times or a place in them are compared by their values,
or not at all (`TIMED`). Draws follow from the seed, how far a process has come at its moment does not. Prints one JSON line and a
sentence; ends with 1 if anything was wrong.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from PIL import Image
from runs import TINY, once

from benchmarks.soak_faults import FAULTS, OF_PAIRS, STOPS, Trained, wrong_end
from lightning_internvl.data.shards.tar import TarWriter
from lightning_internvl.files import RUN_CONFIG

SETTINGS = {"minutes": 5.0, "seed": 0, "most": 3, "limit": 120, "steps": 10, "scenarios": "", "processes": "1,2", "faults": ""}
# `.metadata` describes a divided checkpoint, and holds a number that PyTorch draws anew for each; a key holds the times of its
# stage, and is not left by one that is killed before its last word.
TIMED = ("*/events.out.*", RUN_CONFIG, "report.html", "timing.json", "launch.json", ".lock*", ".metadata", "stage_key.json")
BAD = ("data.max_bad_fraction=0.5", "data.num_workers=1")
JOB = {
    "SLURM_NTASKS": "1", "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost",
}  # fmt: skip


# --- scenarios -------------------------------------------------------------------------------------------------------


def picture(number: int) -> Image.Image:
    """One of one colour."""
    return Image.new("RGB", (30 + number, 40), (25 * number % 256, 90 * number % 256, 200))


def write_shards(folder: Path) -> Path:
    """Five tar files of ten pairs, one of them without a caption; the fourth is cut off."""
    folder.mkdir()
    for shard in range(5):
        path = folder / f"{shard:05}.tar"
        with TarWriter(path) as tar:
            for number in range(10):
                picture(number).save(folder / "one.jpg")
                caption = "" if number == 4 else f"picture {number} of {shard}"
                tar.write({"key": f"{shard}{number:04}", "jpg": (folder / "one.jpg").read_bytes(), "txt": caption})
        if shard == 3:
            os.truncate(path, 5000)
    (folder / "one.jpg").unlink()
    return folder


def write_chats(folder: Path) -> Path:
    """Twenty records; the picture of one is no picture."""
    folder.mkdir()
    lines = []
    for number in range(20):
        picture(number).save(folder / f"{number}.png")
        said = [{"from": "human", "value": "<image>\nWhich one?"}, {"from": "gpt", "value": f"number {number}"}]
        lines.append(json.dumps({"image": f"{number}.png", "conversations": said}))
    (folder / "7.png").write_bytes(b"none")
    (folder / "chats.jsonl").write_text("\n".join(lines))
    return folder / "chats.jsonl"


def scene_words(folder: Path) -> list[str]:
    """The default recipe."""
    return [*TINY, "data.num_workers=1"]


def shard_words(folder: Path) -> list[str]:
    """The same stages on shards; conversations share rows."""
    data = ["data=webdataset", f"data.shards={write_shards(folder / 'shards')}", "data.lanes=2", "data.turns=2"]
    packed = ["data.shuffle=3", "data.packing=true", "data.packing_window=2", "data.chats_collate.max_text_tokens=64"]
    return [*TINY, *data, *packed, *BAD]


def file_words(folder: Path) -> list[str]:
    """A fine-tune of a tiny model, which is made first, with adapters, measured while it trains."""
    begun = Trained([*once(*TINY, "max_steps=1", "trainer.accelerator=cpu", f"paths.run={folder / 'base'}")], {})
    if begun.ended(600) != 0:
        raise RuntimeError(f"the run that the fine-tune starts from has failed: {begun.said[1][-2000:]}")
    own = ["experiment=finetune", f"init_from={folder / 'base'}", f"data.path={write_chats(folder / 'chats')}"]
    track = ["data.validation=0.3", "trainer.log_every_n_steps=1", "callbacks.samples.images=2", "callbacks.tracking.times=3"]
    return [*own, *track, *BAD, "stages.finetune.batch_size=4"]


SCENARIOS = {"scenes": scene_words, "shards": shard_words, "files": file_words}


# --- one run ---------------------------------------------------------------------------------------------------------


def values(path: Path) -> Any:
    """What two files of a name must have in common: their bytes, or of a history its rows by step, without times."""
    if path.name == "history.jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [{k: v for k, v in row.items() if not k.startswith("time") and "second" not in k} for row in rows]
    return path.read_bytes()


def files(run: Path) -> dict[str, Path]:
    """Those that are compared, by their place in the run."""
    found = {str(path.relative_to(run)): path for path in sorted(run.rglob("*")) if path.is_file()}
    return {name: path for name, path in found.items() if not any(path.relative_to(run).match(one) for one in TIMED)}


def different(whole: Path, run: Path, lost: int) -> list[str]:
    """Names of the files of two runs that are not the same.

    Args:
        lost: so many rows of a history may lack, which a kill between a checkpoint and its row has cost.
    """
    ours, theirs = files(run), files(whole)
    names = ours.keys() ^ theirs.keys()
    for name in ours.keys() & theirs.keys():
        one, other = values(ours[name]), values(theirs[name])
        if name.endswith("history.jsonl"):
            same = one == [row for row in other if row in one] and len(one) >= len(other) - lost
        elif name.endswith("freezing.json"):  # a resume adds the state that it starts from
            same = [entry for entry in json.loads(one) if entry in json.loads(other)] == json.loads(other)
        else:
            same = one == other
        names = names if same else names | {name}
    return sorted(names)


def interrupted(
    words: list[str], run: Path, faults: list[str], seconds: float, limit: float, draw: random.Random
) -> dict[str, Any]:
    """One run with faults, to its end: those that it met, and what was wrong.

    Args:
        seconds: that it takes when it is left alone; ten times as long is too long, beside `limit`.
    """
    met, wrong, alone = list[str](), list[str](), "trainer.devices=1" in words
    for start, fault in enumerate([*faults, None]):
        again = (run / RUN_CONFIG).exists() and not (alone and draw.random() < 0.5)
        job = {**JOB, "SLURM_JOB_START_TIME": str(1000 + start), "SLURM_RESTART_COUNT": str(start)} if alone else {}
        trained, delay = Trained([f"resume={run}"] if again else words, job), draw.uniform(0, seconds / 2)
        if fault:
            trained.process.process.join(delay)
            if trained.lives() and (FAULTS if alone else OF_PAIRS)[fault](trained, draw):
                met.append(fault)
        code = trained.ended((limit if fault else 10 * limit) + 10 * seconds)
        problem = wrong_end(fault, code, trained.said[1]) if fault in met else "hangs" if code is None else code or None
        if problem:
            told = f"{fault} {delay:.1f} s after start {start} ({'resume' if again else 'same words'}): {problem}"
            wrong.append(told)
            print(f"{told}\n{trained.said[0][-500:]}\n{trained.said[1][-3000:]}", file=sys.stderr, flush=True)
        if code == 0:
            break
    return {"met": met, "wrong": wrong, "finished": code == 0}


def soak(folder: Path, settings: dict[str, Any], more: list[str]) -> dict[str, Any]:
    """Runs with faults until the minutes are over; the last one is finished. `more` words are those of `train.py`."""
    draw, begun = random.Random(settings["seed"]), time.monotonic()
    common = ["trainer.accelerator=cpu", f"max_steps={settings['steps']}", "callbacks.checkpoint.every_n_steps=3"]
    wholes = dict[tuple[str, int], float]()
    names = [name for name in settings["scenarios"].split(",") if name] or list(SCENARIOS)
    known = {name: [*SCENARIOS[name](folder), *common] for name in names}
    cases = [(name, int(count)) for count in settings["processes"].split(",") for name in names]
    met, runs, compared, differ, wrong = Counter[str](), Counter[str](), 0, list[str](), list[str]()
    while not runs or time.monotonic() - begun < 60 * settings["minutes"]:
        name, count = cases[sum(runs.values()) % len(cases)]
        place, whole = folder / "run" / name, folder / f"{name}-{count}"
        strategy = ["strategy=fsdp2"] if count > 1 and name == "shards" else []
        words = list(once(*known[name], *strategy, f"trainer.devices={count}", *more, f"paths.run={place}"))
        if (name, count) not in wholes:
            trained, started = Trained(words, {}), time.monotonic()
            if trained.ended(10 * settings["limit"]) != 0:
                raise RuntimeError(f"{name} on {count} processes fails when it is left alone: {trained.said[1][-2000:]}")
            wholes[name, count] = time.monotonic() - started
            place.rename(whole)  # the next one has the same name: it stands in some files
        faults = [one for one in settings["faults"].split(",") if one] or list(OF_PAIRS if count > 1 else FAULTS)
        drawn = draw.choices(faults, k=draw.randint(1, settings["most"]))
        told = interrupted(words, place, drawn, wholes[name, count], settings["limit"], draw)
        lost = sum(fault not in STOPS for fault in told["met"])
        unlike = different(whole, place, lost) if told["finished"] else list(files(whole))
        label = f"{name} on {count}"
        runs[label] += 1
        met.update(told["met"])
        compared += len(files(whole))
        differ += [f"{label}, run {runs[label]}: {one}" for one in unlike]
        wrong += [f"{label}, run {runs[label]}: {one}" for one in told["wrong"]]
        print(f"{label}, run {runs[label]}: {', '.join(told['met'])}: {unlike or 'same'}", file=sys.stderr, flush=True)
        if unlike:
            place.rename(folder / f"different-{name}-{count}-{runs[label]}")
        else:
            shutil.rmtree(place)
    return {
        "runs": dict(runs), "faults": dict(met), "compared": compared, "different": differ, "wrong_ends": wrong,
        "hangs": sum(one.endswith("hangs") for one in wrong), "seconds": round(time.monotonic() - begun),
    }  # fmt: skip


def main(arguments: list[str]) -> int:
    """Read the settings, soak, print one JSON line and a sentence."""
    more = [word for word in arguments if word.partition("=")[0] not in SETTINGS]
    given = dict(word.split("=", 1) for word in arguments if word not in more)
    settings = SETTINGS | {name: type(SETTINGS[name])(value) for name, value in given.items()}
    folder = Path(tempfile.mkdtemp(prefix="soak_"))
    found = soak(folder, settings, more)
    bad = found["different"] or found["wrong_ends"]
    print(json.dumps({"benchmark": "soak", **settings, "settings": more, **found}))
    print(
        f"{len(found['different'])} of {found['compared']} files differ from the uninterrupted run"
        + (f"; {folder}" if bad else "")
    )
    if not bad:
        shutil.rmtree(folder)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
