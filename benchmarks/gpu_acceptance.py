"""What holds and how fast it is on this machine's GPU, in at most ten minutes.

python benchmarks/gpu_acceptance.py                        # one H100 or H200, all parts
python benchmarks/gpu_acceptance.py parts=attention,parity json=FILE
python benchmarks/gpu_acceptance.py dry_run=true           # tiny sizes on whatever is there; what needs real kernels says so

Parts are functions of `gpu_parts.py` and `gpu_speed_parts.py`. Each runs in a process of its own under its own time limit,
and one that fails stops no other. Prints what each found as it ends, then a table and one JSON line; the exit status is 1 where
a part has failed. The contrastive part needs open_clip (`contrastive_step.py` says how to get it), and says so where it is
missing.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # to ask for a GPU must not begin to use it: processes are forked from this one

import gpu_parts
import gpu_speed_parts
import torch
from alternating import arguments, report

LIMITS = {  # seconds, together ten minutes
    "train": 50, "tests": 130, "waits": 50, "attention": 50, "parity": 50, "fsdp2": 30, "quantization": 45, "adamw": 10,
    "packed": 40, "compiled": 75, "contrastive": 25, "supervised": 35, "transfer": 10,
}  # fmt: skip
OK, FAILED, LATE, NEEDS = "ok", "FAILED", "LATE", "not run"


class Outcome(NamedTuple):
    """Of one part: a word, seconds, and its figures or the reason."""

    state: str
    seconds: float
    found: Any


def work(name: str, dry: bool, folder: Path) -> None:
    """The process of a part: its output goes to `log`, its outcome to `found`."""
    os.setsid()  # with all processes that it starts it can be ended
    with Path(folder, "log").open("w") as log:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log.fileno(), stream.fileno())
        try:
            part = getattr(gpu_parts, name, None) or getattr(gpu_speed_parts, name)
            outcome = OK, part(dry, folder)
        except gpu_parts.NotHereError as reason:
            outcome = NEEDS, str(reason)
        except BaseException as error:
            outcome = FAILED, f"{type(error).__name__}: {error}"
            import traceback

            traceback.print_exc()
    Path(folder, "found").write_text(json.dumps(outcome))
    os._exit(0)  # threads of libraries are not waited for


def run(name: str, limit: float, dry: bool) -> Outcome:
    """One part, ended at its limit."""
    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        process = multiprocessing.get_context("fork").Process(target=work, args=(name, dry, Path(folder)))
        process.start()
        process.join(limit)
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
        seconds, written = time.monotonic() - begun, Path(folder, "found")
        if written.exists():
            state, found = json.loads(written.read_text())
        else:
            late = seconds >= limit
            state, found = (LATE, f"more than {limit} s") if late else (FAILED, f"it ended with {process.exitcode}")
        if state in (FAILED, LATE):
            print(Path(folder, "log").read_text()[-3000:], file=sys.stderr)
        return Outcome(state, round(seconds, 1), found)


def main() -> None:
    """Run the parts that are asked for."""
    options = arguments(parts=",".join(LIMITS), json="", dry_run="false")
    names, dry = options["parts"].split(","), options["dry_run"] == "true"
    if unknown := set(names) - LIMITS.keys():
        sys.exit(f"parts {', '.join(sorted(unknown))}: not known; valid choices: {', '.join(LIMITS)}")
    if not dry and not torch.cuda.is_available():
        sys.exit("there is no GPU here; dry_run=true runs what can run without one")
    outcomes = {}
    for name in names:
        outcomes[name] = run(name, LIMITS[name] * (4 if dry else 1), dry)  # a CPU is slow
        print(f"{name}: {outcomes[name].state} {json.dumps(outcomes[name].found)}", flush=True)
    print(f"\n{'part':14s} {'outcome':8s} {'s':>6s}  figures")
    for name, (state, seconds, found) in outcomes.items():
        told = ", ".join(f"{key} {value}" for key, value in found.items()) if isinstance(found, dict) else found
        print(f"{name:14s} {state:8s} {seconds:6.1f}  {str(told)[:180]}")
    results = {"dry_run": dry, "parts": {name: outcome._asdict() for name, outcome in outcomes.items()}}
    report("gpu_acceptance", {}, results)
    if options["json"]:
        Path(options["json"]).write_text(json.dumps(results, indent=1))
    sys.exit(any(outcome.state in (FAILED, LATE) for outcome in outcomes.values()))


if __name__ == "__main__":
    main()
