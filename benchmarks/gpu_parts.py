"""The parts of `gpu_acceptance.py` that say what must hold: each a function of whether it is a dry run and of a folder that
it may write to. It gives figures, raises AssertionError where something does not hold, and NotHereError where it cannot be
told here.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from alternating import now
from safetensors.torch import load_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "parity"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "claimed_gpu"))

from golden import HERE, Fixture, extra_roots, find, relative_error
from runners import RUNNERS, runner_for
from runs import ROOT, STAGES, TINY, losses, train as train_command

from lightning_internvl import load_pretrained
from lightning_internvl.choices import BACKENDS
from lightning_internvl.layers.attention import attend, choose_backend, keep_backend
from lightning_internvl.layers.attention_masks import packed as packed_mask, prefix

CLOSE = 0.03  # of attention in bfloat16, of the largest value
PARITY = 0.15  # of outputs and gradients of tiny models in bf16-mixed, of the largest value of each (seen on a CPU: up to 0.09)
LOW = "trainer.precision=bf16-mixed"


class NotHereError(Exception):
    """What is missing."""


def real(dry: bool) -> None:
    """Leave a part out of a dry run that shows nothing without real kernels."""
    if dry:
        raise NotHereError("needs a GPU")


def place() -> torch.device:
    """Where parts compute."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run(folder: Path, *words: str) -> str:
    """`python train.py WORDS`; the line of its attention."""
    told = train_command(f"paths.run={folder}", LOW, *words)
    assert told.code == 0, told.err[-600:]
    return next(line for line in told.out.splitlines() if line.startswith("attention:"))


def train(dry: bool, folder: Path) -> dict[str, Any]:
    """The default recipe with all callbacks, in bf16-mixed."""
    return {"attention": run(folder / "run", *(TINY if dry else ("debug=fast",)))}


def tests(dry: bool, folder: Path) -> dict[str, Any]:
    """The tests marked gpu, but for those of waits."""
    real(dry)
    import pytest

    code = pytest.main(["-m", "gpu", "-q", "-p", "no:cacheprovider", "--ignore=tests/claimed_gpu", str(ROOT / "tests")])
    assert code == 0, f"pytest ended with {code}"
    return {"passed": True}


def waits(dry: bool, folder: Path) -> dict[str, Any]:
    """How often a step of several kinds of recipe makes the host wait."""
    real(dry)
    from steps import real_waits, stages
    from test_claimed_gpu import CASES

    kinds = (
        "internvl_toy",
        "mined",
        "packed",
        "qwen2_vl_toy",
        "qwen2_5_vl_toy",
        "qwen3_vl_toy",
        "flamingo_toy",
        "xcomposer2_toy",
    )
    found = {}
    for case in kinds:
        for name, _, assembly in stages(CASES[case].split(), folder / case, "max_steps=6"):
            found[f"{case} {name}"] = real_waits(assembly)
    assert not any(found.values()), found
    return dict.fromkeys(found, 0)


def attention(dry: bool, folder: Path) -> dict[str, Any]:
    """Each backend beside the formula in float32: results and gradients, apart by at most this share of the largest value."""
    device, (length, width) = place(), (16, 16) if dry else (1024, 64)
    masks = {
        "even": {}, "causal": {"causal": True}, "packed": {"mask": packed_mask([[length // 4, length // 2], [length]], length)},
        "prefix": {"mask": prefix([2, length // 2], [length, length - 3], length)},
    }  # fmt: skip
    found: dict[str, Any] = {}
    for name in (name for name in BACKENDS if name not in ("auto", "math")):
        if dry and name != "sdpa":
            found[name] = "needs a GPU"
            continue
        try:
            choose_backend(name, device, torch.bfloat16)
        except ValueError as error:
            found[name] = str(error)
            continue
        found[name] = max(_apart(device, length, width, groups, **options) for options in masks.values() for groups in (8, 2))
    assert all(isinstance(value, str) or value < CLOSE for value in found.values()), found
    return found


def _apart(device: torch.device, length: int, width: int, groups: int, **options: Any) -> float:
    exact = [torch.randn(2, heads, length, width, device=device, requires_grad=True) for heads in (8, groups, groups)]
    low = [x.detach().bfloat16().requires_grad_() for x in exact]
    gradient = torch.randn_like(exact[0])
    with keep_backend():
        choose_backend("math", device)
        expected = attend(*exact, **options)
        wanted = expected, *torch.autograd.grad(expected, exact, gradient)
    found = attend(*low, **options)
    given = found, *torch.autograd.grad(found, low, gradient.bfloat16())
    pairs = zip(wanted, given, strict=True)
    return round(max(relative_error(one.detach().cpu(), other.detach().cpu()) for one, other in pairs), 4)


class _Placed(Fixture):
    """A fixture whose tensors are on the device."""

    @functools.cached_property
    def inputs(self) -> dict[str, Tensor]:
        return _read(self.folder / "inputs.safetensors")

    @functools.cached_property
    def outputs(self) -> dict[str, Tensor]:
        return _read(self.folder / "outputs.safetensors")


def parity(dry: bool, folder: Path) -> dict[str, Any]:
    """Outputs, losses and gradients of the originals, from their weights, in bf16-mixed: the largest difference of a fixture, as
    a share of the largest value of its tensor."""
    fixtures = [Fixture(HERE / "official" / "internvl_g_stage2")] if dry else find(HERE, *extra_roots())
    with contextlib.ExitStack() as stack:
        for runner in RUNNERS:
            for name, read in {"load_pretrained": _loaded, "load_file": _read}.items():
                if hasattr(runner, name):
                    stack.enter_context(patch.object(runner, name, read))
        # those without a model are of preparation, and of losses among processes
        models = [one for one in fixtures if hasattr(runner_for(one), "load_pretrained")]
        found = {str(one.folder.relative_to(one.folder.parents[1])): _parity(_Placed(one.folder)) for one in models}
    worst = {name: error for name, error in found.items() if not error <= PARITY}
    assert not worst, worst
    return {"fixtures": len(models), "worst": max(found.values()), "of_each": found}


def _read(file: Path) -> dict[str, Tensor]:
    return {name: x.to(place()) for name, x in load_file(file).items()}


def _loaded(folder: Path) -> Any:
    with torch.device("cpu"):
        model = load_pretrained(folder)
    return model.to(place())


def _parity(fixture: Fixture) -> float:
    runner, kind = runner_for(fixture), place().type
    with torch.device(place()), torch.autocast(kind, torch.bfloat16):
        ours = runner.run(fixture)
    floats = {n: x for n, x in fixture.outputs.items() if x.is_floating_point() and n not in runner.ECHOES}
    return round(
        max((relative_error(x.cpu(), ours[n].detach().cpu().reshape(x.shape)) for n, x in floats.items()), default=0.0), 4
    )


def fsdp2(dry: bool, folder: Path) -> dict[str, Any]:
    """Weights divided over one device, with NCCL, in bf16-mixed."""
    real(dry)
    run(folder / "run", *TINY, "strategy=fsdp2", "trainer.devices=1")
    return {stage: losses(folder / "run", stage)[-1]["train/loss"] for stage in STAGES}


def quantization(dry: bool, folder: Path) -> dict[str, Any]:
    """Adapters on frozen weights in 4 and in 8 bits, by bitsandbytes."""
    real(dry)
    found = {}
    for kind, words in {"nf4": ("peft=qlora",), "int8": ("peft=lora", "quantization=int8")}.items():
        run(folder / kind, "experiment=llava_toy", "debug=fast", *words)
        found[kind] = losses(folder / kind, "supervised")[-1]["train/loss"]
    assert all(map(math.isfinite, found.values())), found
    return found


def adamw(dry: bool, folder: Path) -> dict[str, Any]:
    """Fused AdamW beside PyTorch's loop, and how much faster it is."""
    width, device = (16, place()) if dry else (2048, place())
    gradients = [[torch.randn(width, width, device=device) for _ in range(8)] for _ in range(3)]
    ends, seconds = {}, {}
    for kind, options in {"fused": {"fused": True}, "loop": {"foreach": False}}.items():
        weights = [nn.Parameter(torch.ones(width, width, device=device)) for _ in range(8)]
        optimizer = torch.optim.AdamW(weights, lr=1e-3, **options)
        for grads in gradients:
            for weight, grad in zip(weights, grads, strict=True):
                weight.grad = grad
            begun = now()
            optimizer.step()
            seconds[kind] = now() - begun
        ends[kind] = torch.stack([weight.detach() for weight in weights]).cpu()
    apart = relative_error(ends["loop"], ends["fused"])
    assert apart < 1e-5, apart
    return {"apart": apart, "times_faster": round(seconds["loop"] / seconds["fused"], 2)}
