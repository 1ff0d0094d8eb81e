"""On a GPU as on a CPU: the commands run, and a training step never makes the host wait for the device.

The GPU is claimed (see `device.py`), in processes of their own; what needs a real one is marked so.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
from pathlib import Path
from typing import Any

import device
import pytest
import torch
from runs import ROOT, STAGES, TINY, once, read_json
from steps import STEP, real_waits, stages

needs_claim = pytest.mark.skipif(device.why_not() is not None, reason=device.why_not() or "")
# Of reward_toy the last stage writes answers: the host looks at each token whether one has come to its end.
TOYS = sorted(path.stem for path in (ROOT / "conf/experiment").glob("*_toy.yaml") if path.stem != "reward_toy")
PACKED = "data.packing=true"
# In all of them the host waits for nothing.
CASES = {
    **{toy: "" if toy == "internvl_toy" else f"experiment={toy}" for toy in TOYS},
    "mined": "pipeline=[generative] stages.generative.module.mined_from_step=0",
    "packed": f"pipeline=[supervised] {PACKED}",
    "words": "experiment=scenes_smollm2 pipeline=[words] decoder=llama_toy data.chats_collate.template=vicuna",
    "accumulated": "pipeline=[supervised] trainer.accumulate_grad_batches=2",
    "flamingo packed": f"experiment=flamingo_toy pipeline=[start] {PACKED}",
    "t5": "experiment=blip2_toy pipeline=[supervised] decoder=t5_toy data.chats_collate.template=blip2_t5",
    "varlen packed": f"pipeline=[supervised] {PACKED}",
    "xformers": "",
    "xformers qwen2_vl packed": f"experiment=qwen2_vl_toy pipeline=[sft] attention=xformers {PACKED}",
    "deepstack packed": f"experiment=qwen3_vl_toy pipeline=[long] {PACKED}",
    "xformers windows packed": f"experiment=qwen2_5_vl_toy pipeline=[long] attention=xformers {PACKED}",
}


def on_the_claim(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(device.command(*words), cwd=ROOT, env=device.variables(), capture_output=True, text=True)


@needs_claim
def test_no_step_of_any_recipe_makes_the_host_wait() -> None:
    """All stages of all toy recipes, in bf16-mixed."""
    done = on_the_claim("tests/claimed_gpu/steps.py", *(f"{name}={words}" for name, words in CASES.items()))
    rows: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]
    assert {row["case"] for row in rows} == set(CASES), done.stderr
    faults = {f"{row['case']} {row.get('stage')}": row.get("error") or row["waits"] for row in rows}
    assert not {name: fault for name, fault in faults.items() if fault}
    assert all(len(row["losses"]) >= STEP + 2 and all(map(math.isfinite, row["losses"])) for row in rows)
    for kernel in ("xformers", "varlen"):
        assert all(row["calls"].get(kernel, 0) > 0 for row in rows if kernel in row["case"].split())
    chosen = {name: {row["attention"].split()[1] for row in rows if row["case"].startswith(name)} for name in ("xformers", "i")}
    assert chosen == {"xformers": {"xformers"}, "i": {"sdpa"}}


@needs_claim
def test_train_py_runs_whole_with_xformers(tmp_path: Path) -> None:
    """With all callbacks and evaluation; without xformers the next test does."""
    words = once(*TINY, f"paths.run={tmp_path / 'run'}", "trainer.precision=bf16-mixed")
    done = on_the_claim("--xformers", "train.py", *words)
    assert done.returncode == 0, done.stderr
    assert "attention: xformers (xformers" in done.stdout
    assert set(read_json(tmp_path / "run" / "metrics.json")) == set(STAGES)


@needs_claim
def test_the_acceptance_of_a_gpu_is_run_dry(tmp_path: Path) -> None:
    """Each part runs at a tiny size, or says that it needs what is not there; `train` is the whole default recipe."""
    done = on_the_claim("benchmarks/gpu_acceptance.py", "dry_run=true", f"json={tmp_path / 'found.json'}")
    assert done.returncode == 0, done.stdout + done.stderr
    parts = read_json(tmp_path / "found.json")["parts"]
    assert {name for name, part in parts.items() if part["state"] == "ok"} >= {
        "train", "attention", "parity", "adamw", "packed", "supervised", "transfer",
    }  # fmt: skip
    assert {part["found"] for part in parts.values() if part["state"] != "ok"} <= {"needs a GPU", "open_clip is not installed"}
    assert parts["train"]["found"]["attention"].startswith("attention: sdpa (xformers")
    assert parts["attention"]["found"]["sdpa"] < 0.03
    last = json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))
    assert (last["benchmark"], last["device"], last["parts"]) == ("gpu_acceptance", "Claimed GPU 9.0", parts)


REFUSED = """
import json, sys
from device import claimed_gpu
from formulas import kernels_load
from runs import TINY, train
folder, flash = sys.argv[1], json.loads(sys.argv[2])
for name, words, capability, memory in json.loads(sys.argv[3]):
    with claimed_gpu(tuple(capability), memory), kernels_load(*flash):
        told = train(*TINY, "pipeline=[contrastive]", f"paths.run={folder}/{name}", *words)
    print(json.dumps({name: [told.code, told.err]}))
"""
GIB = 2**30
FAULTS = {
    "another build of xformers": (
        ["attention=xformers"], (9, 0), GIB,
        r"attention=xformers cannot run here: its kernels do not load: lib.*; use attention=auto, sdpa or math",
    ),
    "flash in float32": (
        ["attention=flash"], (9, 0), GIB,
        r"attention=flash cannot run here: FlashAttention only support fp16 and bf16 data type; "
        r"with trainer.precision=bf16-mixed it can; use attention=auto, sdpa or math",
    ),
    "no bfloat16": (
        ["trainer.precision=bf16-mixed"], (7, 5), GIB,
        r"trainer.precision=bf16-mixed: Claimed GPU 7.5 has compute capability 7.5, and bfloat16 begins with 8.0; "
        r"use trainer.precision=16-mixed or 32-true",
    ),
    "a full GPU": ([], (9, 0), 100, r"out of memory: cuda:0 has not even room for the few tokens .* tried; another process .*"),
    "too little memory": ([], (9, 0), 65536, r"out of memory: stage contrastive.*\nCUDA out of memory.*\nwhat takes less:\n  .*"),
}  # fmt: skip


@needs_claim
def test_what_a_gpu_cannot_do_is_told_in_one_message(tmp_path: Path) -> None:
    script, cases = tmp_path / "refused.py", [[name, *case[:3]] for name, case in FAULTS.items()]
    script.write_text(REFUSED)
    done = on_the_claim(str(script), str(tmp_path), json.dumps(["flash"]), json.dumps(cases))
    told = {n: v for line in done.stdout.splitlines() if line.startswith("{") for n, v in json.loads(line).items()}
    assert told.keys() == FAULTS.keys(), done.stderr
    for name, (code, err) in told.items():
        assert code, err
        assert re.search(rf"^error: {FAULTS[name][-1]}", err, re.MULTILINE), err
        assert err.count("error:") == 1
        assert "Traceback" not in err


RULES = """
import pytest, torch
from device import claimed_gpu, LOOKS, READS, COPIES
with claimed_gpu() as gpu:
    x, chosen = torch.ones(3, device="cuda"), torch.tensor([True, False, True]).pin_memory().to("cuda", non_blocking=True)
    places = torch.arange(2, device="cuda")
    assert not gpu.waits
    x[places], x.index_add(0, places, x[:2]), torch.nonzero_static(chosen, size=2), x.masked_fill(chosen, 0.0)
    x + torch.tensor(1.0)
    assert not gpu.waits
    x[chosen], float(x.sum()), x.masked_select(chosen), chosen.nonzero(), x.unique(), bool(chosen.any()), x.cpu(), x.tolist()
    torch.tensor([1.0], device="cuda"), torch.ones(1).to("cuda", non_blocking=True)
    found = {kind: sum(n for (one, _), n in gpu.waits.items() if one == kind) for kind in (LOOKS, READS, COPIES)}
    assert found == {LOOKS: 4, READS: 2, COPIES: 4}, found
    with pytest.raises(RuntimeError, match="same device, but found cuda:0 and cpu"):
        x + torch.ones(3)
    with torch.autocast("cuda", torch.bfloat16):
        y = x.requires_grad_() @ torch.ones(3, 2, device="cuda")
        assert (y.dtype, y.softmax(0).dtype) == (torch.bfloat16, torch.float32)
    y.sum().backward()
    assert x.grad.device == torch.device("cuda", 0) and x.grad.tolist() == [2.0, 2.0, 2.0]

from formulas import calls, kernels_load
from lightning_internvl.layers.attention import attend, choose_backend
low, exact = torch.bfloat16, torch.float32
cases = ((7, 5), low, "sdpa"), ((7, 5), exact, "xformers"), ((9, 0), low, "xformers"), ((12, 0), exact, "sdpa")
for capability, dtype, name in cases:
    with claimed_gpu(capability), kernels_load("xformers"):
        assert choose_backend("auto", "cuda", dtype)[0] == name, (capability, dtype)
with claimed_gpu(), kernels_load("xformers"):
    choose_backend("xformers", "cuda", low)
    for width, runs in ((16, True), (20, False)):
        calls.clear()
        heads = [torch.randn(1, 2, 4, width, device="cuda", dtype=low) for _ in range(3)]
        attend(*heads), attend(*heads)
        assert (calls["xformers"] >= 2) is runs, width
"""


@needs_claim
def test_the_claimed_gpu_has_a_gpus_rules(tmp_path: Path) -> None:
    """And the kernels of its capability: none of xformers for bfloat16 on Turing, for Blackwell, or for heads of an odd width."""
    script = tmp_path / "rules.py"
    script.write_text(RULES)
    done = on_the_claim(str(script))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("attention: PyTorch's for heads of width 20 in bfloat16; xformers") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES)
def test_on_a_real_gpu_neither(case: str, tmp_path: Path) -> None:
    """As PyTorch counts them: it knows of the waits of its own kernels."""
    for name, _, assembly in stages(CASES[case].split(), tmp_path, "max_steps=6"):
        assert not (told := real_waits(assembly)), (name, told[:20])
