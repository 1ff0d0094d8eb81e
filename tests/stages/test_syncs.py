"""How often a training step makes the host wait for the device. Each of these moments leaves a GPU without work.

On a CPU the operations are counted whose result the host must know: numbers that are read (`item`), places that are looked up
(`nonzero`, an index of truth values), draws that are checked (`multinomial`). What a step may cost is written in `BUDGET`.
"""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from runs import ROOT, TINY
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_internvl.config.stage_settings import stage_settings
from lightning_internvl.config.targets import build
from lightning_internvl.pipeline import quiet_lightning
from lightning_internvl.training.assembly import Assembly, assemble

aten = torch.ops.aten
READS, LOOKS = "item", "nonzero"
KINDS = {
    aten._local_scalar_dense.default: READS,
    aten.is_nonzero.default: READS,
    aten.equal.default: READS,
    aten.nonzero.default: LOOKS,
    aten.masked_select.default: LOOKS,
    aten._unique2.default: LOOKS,
    aten.unique_dim.default: LOOKS,
    aten.repeat_interleave.Tensor: LOOKS,
    aten.multinomial.default: "multinomial",
}
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
# Of every step on a CPU, once: whether loss and gradient are finite, and whether placeholders and visual tokens are equally many.
# On a GPU the first is read every `callbacks.guard.every_n_steps` steps and the second is left to the device.
GUARD, PLACES = Counter({READS: 1}), Counter({READS: 1})
LABELLED = Counter({LOOKS: 1})  # where labels stand: logits are computed there and nowhere else
MASKS = Counter({READS: 2})  # transformers asks whether a mask leaves nothing out, because kernels are faster then
BUDGET = {
    "contrastive": (GUARD, Counter[str]()),  # on a CPU alone, and on any device
    "generative": (GUARD, LABELLED),
    "mined": (GUARD, LABELLED),
    "supervised": (GUARD + PLACES, LABELLED + MASKS),
    "packed": (GUARD + PLACES, LABELLED),
}
SETTINGS = {"mined": ("stages.generative.module.mined_from_step=0",), "packed": ("data.packing=true",)}
STAGES = {"mined": "generative", "packed": "supervised"}
LEFT_OUT = ("samples", "evaluation", "report", "handoff", "validation")


class Waits(TorchDispatchMode):
    """Counts the operations that the host waits for, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kind = KINDS.get(func)
        if func in INDEXED and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
            kind = LOOKS
        self.counts[kind] += kind is not None
        return func(*args, **kwargs or {})


def assembled(case: str, steps: int, folder: Path, *overrides: str) -> Assembly:
    name = STAGES.get(case, case)
    fixed = (
        *TINY, "max_steps=null", f"stages.{name}.max_steps={steps}", f"paths.run={folder}", "logger=[history]",
        "trainer.log_every_n_steps=1000", "callbacks.checkpoint.every_n_steps=1000",  # what is read now and then does not count
        *(f"~callbacks.{callback}" for callback in LEFT_OUT), *SETTINGS.get(case, ()), *overrides,
    )  # fmt: skip
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = OmegaConf.to_container(compose("config", overrides=list(fixed)), resolve=True)
    quiet_lightning()
    return assemble(stage_settings(config, name), folder, build)


def waits(case: str, steps: int, folder: Path) -> Counter[str]:
    """Of a whole run of so many steps."""
    _, stage, data, trainer = assembled(case, steps, folder)
    with Waits() as counter:
        trainer.fit(stage, data)
    return counter.counts


@pytest.mark.parametrize("case", BUDGET)
def test_a_step_waits_no_more_often_than_it_must(case: str, tmp_path: Path) -> None:
    more, fewer = (waits(case, steps, tmp_path / str(steps)) for steps in (10, 7))
    more.subtract(fewer)  # start and end fall away
    on_a_cpu, anywhere = BUDGET[case]
    assert {kind: count / 3 for kind, count in more.items() if count} == dict(on_a_cpu + anywhere)


def test_the_counter_sees_what_makes_the_host_wait() -> None:
    x, chosen = torch.ones(3), torch.tensor([True, False, True])
    with Waits() as counter:
        (
            x[chosen],
            x[torch.tensor([0, 1])],
            float(x.sum()),
            x.masked_select(chosen),
            chosen.nonzero(),
            x.multinomial(1),
            x.unique(),
        )
        bool(chosen.any())
        x[chosen] = 0
    assert {kind: count for kind, count in counter.counts.items() if count} == {LOOKS: 5, READS: 2, "multinomial": 1}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", BUDGET)
def test_on_a_gpu_a_step_waits_no_more_often_than_it_must(case: str, tmp_path: Path) -> None:
    _, stage, data, trainer = assembled(case, 12, tmp_path, "trainer.accelerator=gpu")
    seen, original = list[int](), stage.on_train_batch_start

    def start(batch: Any, batch_idx: int) -> None:
        seen.append(sum("synchroniz" in str(one.message) for one in caught))
        original(batch, batch_idx)

    stage.on_train_batch_start = start
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            trainer.fit(stage, data)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    steps = [after - before for before, after in itertools.pairwise(seen[6:])]
    assert max(steps) <= BUDGET[case][1].total(), [str(one.message) for one in caught][:20]
