"""One run in several processes, whoever starts them: the trainer itself, torchrun or SLURM. Nothing
here imports PyTorch early.

Processes that the trainer starts read the configuration that the first one has composed, so they
compose nothing and choose no folder; with `--multirun` each job has processes of its own. Those
that torchrun or srun start compose the same command line.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from lightning_internvl.files import RUN_CONFIG, TEMPORARY, naming, read_json, write_json
from lightning_internvl.messages import told

# a file with the configuration and the folder of the run that a process belongs to
RUN = "LIGHTNING_INTERNVL_RUN"
# of a process or its machine, 0 in the first one
NUMBERS = ("RANK", "SLURM_PROCID", "NODE_RANK", "LOCAL_RANK")
# by a trainer that starts processes
LEFT_BEHIND = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE", RUN)
LAUNCH = "launch.json"  # in a run's folder: what started it
# stands in the name of a folder where processes know nothing of each other
UNKNOWN = "no_common_time"
# names of SLURM jobs in which somebody types; Lightning knows them by these too
SHELLS = ("bash", "interactive")
WATCH = 2.0  # seconds between two looks at the process that started this one


def is_helper() -> bool:
    """Whether this is a further process of a run, not its first one."""
    return any(os.environ.get(name, "0") != "0" for name in NUMBERS)


@contextmanager
def without_collecting() -> Iterator[None]:
    """Inside, which is for the imports of a command, Python does not look for garbage: that takes a
    quarter of their time, and they leave next to none. What is there at the end is never looked
    through again. Where PyTorch is imported already there is nothing to gain, and what a job of a
    sweep has left would be kept.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def under_srun() -> bool:
    """Whether srun has started this process. A shell or a batch script in a SLURM job knows the
    tasks of the job too, but is one process; a batch script even has a SLURM_PROCID, 0."""
    if "SLURM_NTASKS" not in os.environ or os.environ.get("SLURM_JOB_NAME") in SHELLS:
        return False
    # srun leaves this to its processes, with a SLURM_STEP_ID
    batch_script = os.environ.get("ENVIRONMENT") == "BATCH"
    return "SLURM_STEP_ID" in os.environ or ("SLURM_PROCID" in os.environ and not batch_script)


def started_processes() -> int:
    """Processes that torchrun, srun or a script has started, as far as this one knows."""
    return int(os.environ.get("WORLD_SIZE") or (os.environ["SLURM_NTASKS"] if under_srun() else 1))


def started_from_outside() -> bool:
    """Whether torchrun, srun or a script has started several processes."""
    several = os.environ.get("WORLD_SIZE", "1") != "1" or started_processes() != 1
    return RUN not in os.environ and (several or "NODE_RANK" in os.environ)


def launch_time(pattern: str) -> str:
    """The time of the launch, the same in all its processes; `UNKNOWN` where they cannot agree."""
    if not started_from_outside():
        return datetime.now().strftime(pattern)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun has a store that all processes reach
        return datetime.fromtimestamp(_torchrun_time()).strftime(pattern)
    if "SLURM_JOB_START_TIME" in os.environ:
        return datetime.fromtimestamp(float(os.environ["SLURM_JOB_START_TIME"])).strftime(pattern)
    return UNKNOWN


@cache
def _torchrun_time() -> float:
    """When torchrun was started, the same in all processes, restarted ones too."""
    from torch.distributed import TCPStore

    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    key = f"launched/{os.environ['TORCHELASTIC_RUN_ID']}"
    return float(store.compare_set(key, "", str(time.time())))


def launches() -> dict[str, str]:
    """The launches that this process belongs to, each with what tells its attempts apart: torchrun
    starts workers again after a failure (`--max-restarts`), SLURM puts a job back into its queue.
    None for a process that somebody has started by hand."""
    found, env = {}, os.environ
    if "TORCHELASTIC_RUN_ID" in env and "MASTER_PORT" in env:
        name = f"torchrun {env['TORCHELASTIC_RUN_ID']} of {_torchrun_time()}"
        found[name] = env.get("TORCHELASTIC_RESTART_COUNT", "0")
    if "SLURM_JOB_ID" in env and env.get("SLURM_JOB_NAME") not in SHELLS:
        cluster = f" on {env['SLURM_CLUSTER_NAME']}" if "SLURM_CLUSTER_NAME" in env else ""
        attempt = f"{env.get('SLURM_RESTART_COUNT', '0')} at {env.get('SLURM_JOB_START_TIME', '?')}"
        found[f"SLURM job {env['SLURM_JOB_ID']}{cluster}"] = attempt
    return found


def note_launch(run_dir: Path, command: list[str]) -> None:
    """Leave in a new run what started it, if that may start it again."""
    if known := launches():
        write_json(run_dir / LAUNCH, {"launches": known, "command": [told(word) for word in command]})


def earlier_attempt(run_dir: Path, command: list[str]) -> tuple[Path, str] | None:
    """The run that an earlier attempt of this launch has begun with the same command, here or in a
    folder beside this one, and the name of the launch."""
    own = launches()
    for file in [run_dir / LAUNCH, *sorted(run_dir.parent.glob(f"*/{LAUNCH}"))] if own else []:
        noted = read_json(file, {})
        if noted.get("command") != [told(word) for word in command] or not (file.parent / RUN_CONFIG).exists():
            continue
        for name, attempt in noted["launches"].items():
            if own.get(name, attempt) != attempt:
                return file.parent, name
    return None


@contextmanager
def shared_run(config: Mapping[str, Any], run_dir: Path) -> Iterator[None]:
    """Let the processes that a trainer starts inside find the run. Afterwards nothing is left of
    them, so that the next job of a sweep starts its own."""
    if started_from_outside() or RUN in os.environ:
        yield
        return
    before = {name: os.environ.get(name) for name in LEFT_BEHIND}
    with tempfile.TemporaryDirectory(prefix=TEMPORARY) as folder:
        file = Path(folder) / "run.json"
        with naming(file):
            file.write_text(json.dumps({"config": config, "run_dir": str(run_dir.resolve())}), encoding="utf-8")
        os.environ[RUN] = str(file)
        try:
            yield
        finally:
            leave_processes()
            for name, value in before.items():
                os.environ.pop(name, None)
                os.environ |= {name: value} if value is not None else {}


def leave_processes() -> None:
    """End the group of processes of this job, with what of DDP nobody refers to any more: its own
    destructor would end the group holding the interpreter's lock, for which a thread of Gloo may
    wait, and the process would never end."""
    if "torch" not in sys.modules:
        return
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def is_started_by_trainer() -> bool:
    """Whether another process of the same run has started this one."""
    return RUN in os.environ and os.environ.get("LOCAL_RANK", "0") != "0"


def shared_config() -> tuple[dict[str, Any], Path]:
    """The configuration and the folder of the run, in a process that a trainer has started. It ends
    when that one has ended."""
    shared = json.loads(Path(os.environ[RUN]).read_text(encoding="utf-8"))
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    return shared["config"], Path(shared["run_dir"])


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH)
    os._exit(1)
