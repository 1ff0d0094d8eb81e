"""Numbers that are not finite stop a run or leave a step out; whatever goes wrong, the samples of the step are named."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import together
from runs import TINY, Outcome, losses, read_json, same_weights, tiny_run, train, weights
from torch import Tensor

import callbacks
from callbacks.guard import Watched
from lightning_internvl.distributed.checkpoint_files import checkpoint_step
from lightning_internvl.distributed.gradients import total_norm
from lightning_internvl.launch import leave_processes
from lightning_internvl.stages import SupervisedStage, base

ONE = ("pipeline=[supervised]", "stages.supervised.new=[encoder,middleware,decoder]", "callbacks.checkpoint.every_n_steps=1")
QUIET = ("callbacks.samples=null", "callbacks.evaluation=null", "callbacks.report=null", "callbacks.validation=null")
SKIP = ("callbacks.guard.on_nan=skip",)
STEPS = 6


def planted(monkeypatch: pytest.MonkeyPatch, factors: dict[int, float], error: Exception | None = None) -> list[list[str]]:
    """Multiply the loss of some steps, or raise there; the samples of those steps."""
    original, met = SupervisedStage.losses, list[list[str]]()

    def planted_losses(self: SupervisedStage, batch: Any) -> dict[str, Tensor]:
        found = original(self, batch)
        if self.global_step in factors and self.training:
            met.append(batch["keys"])
            if error is not None:
                raise error
            found = {name: value * factors[self.global_step] for name, value in found.items()}
        return found

    monkeypatch.setattr(SupervisedStage, "losses", planted_losses)
    return met


def run(folder: Path, *settings: str) -> Outcome:
    return train(*TINY, *ONE, *QUIET, f"max_steps={STEPS}", f"paths.run={folder}", *settings)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_it_harms(value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    met = planted(monkeypatch, {3: value})
    outcome = run(tmp_path)
    assert outcome.code == 2
    assert "stage supervised, step 3: the loss is not finite; the checkpoint before it is kept" in outcome.err
    assert ", ".join(met[0]) in outcome.err
    assert checkpoint_step(tmp_path / "checkpoints" / "supervised" / "last.ckpt") == 3


def test_a_gradient_that_is_not_finite_is_found_behind_a_loss_that_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = SupervisedStage.losses

    def steep(self: SupervisedStage, batch: Any) -> dict[str, Tensor]:
        weight = next(p for p in self.parameters() if p.requires_grad)
        zero = torch.sqrt((weight * 0).sum())  # 0 with an infinite slope
        return {name: value + zero for name, value in original(self, batch).items()}

    monkeypatch.setattr(SupervisedStage, "losses", steep)
    outcome = run(tmp_path)
    assert outcome.code == 2
    assert "step 0: the gradient is not finite; there is no checkpoint before it" in outcome.err
    assert not tmp_path.exists() or not list(tmp_path.iterdir())


def test_a_step_that_is_skipped_moves_nothing_and_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, states = callbacks.Checkpoint.save, dict[int, Any]()

    def save_and_look(self: Any, trainer: Any, path: Path) -> None:
        save(self, trainer, path)
        self.wait(trainer, path)
        states[trainer.global_step] = torch.load(path, weights_only=True)

    monkeypatch.setattr(callbacks.Checkpoint, "save", save_and_look)
    met = planted(monkeypatch, {2: float("nan"), 4: float("inf")})
    outcome = run(tmp_path, *SKIP)
    assert outcome.code == 0, outcome.err
    assert "supervised: 2 steps were left out, their numbers were not finite: 2, 4" in outcome.out
    found = read_json(tmp_path / "stages" / "supervised" / "not_finite.json")
    assert [(one["step"], one["samples"]) for one in found] == [(2, met[0]), (4, met[1])]
    for before, after, equal in ((2, 3, True), (3, 4, False), (4, 5, True)):
        pairs = [(states[before]["state_dict"][name], x) for name, x in states[after]["state_dict"].items()]
        assert all(a.equal(b) for a, b in pairs) is equal
        moments = [states[step]["optimizer_states"][0]["state"] for step in (before, after)]
        assert all(moments[0][i]["exp_avg"].equal(x["exp_avg"]) for i, x in moments[1].items()) is equal


def test_more_steps_than_the_limit_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, dict.fromkeys(range(1, STEPS), float("nan")))
    outcome = run(tmp_path, *SKIP, "callbacks.guard.limit=2")
    assert outcome.code == 2
    assert "step 3: the loss is not finite" in outcome.err
    assert "3 steps were not finite, more than callbacks.guard.limit=2" in outcome.err


def test_resume_behind_a_skipped_step_is_exact_and_goes_on_counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = {1: float("nan"), 4: float("nan")}
    with monkeypatch.context() as patch:
        planted(patch, bad)
        assert run(tmp_path / "whole", *SKIP).code == 0
        planted(patch, {3: 1.0}, KeyError("ends the process"))
        with pytest.raises(KeyError) as raised:
            run(tmp_path / "run", *SKIP)
    assert "stage supervised, step 3: a batch of 4 samples (input_ids 4 x" in raised.value.__notes__[0]
    planted(monkeypatch, bad)
    outcome = train(f"resume={tmp_path / 'run'}")
    assert outcome.code == 0, outcome.err
    assert "2 steps were left out" in outcome.out
    assert same_weights(tmp_path / "whole", tmp_path / "run", "supervised")
    assert losses(tmp_path / "whole", "supervised")[-1] == losses(tmp_path / "run", "supervised")[-1]


def test_numbers_that_are_looked_at_later_reach_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: nothing is read in a step."""
    look, step = callbacks.Guard.look, callbacks.Guard.on_before_optimizer_step

    def no_look(self: Any, *given: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(callbacks.Guard, "look", lambda *_: False)
            step(self, *given)

    monkeypatch.setattr(callbacks.Guard, "on_before_optimizer_step", no_look)
    met = planted(monkeypatch, {3: float("nan")})
    outcome = run(tmp_path / "run", "callbacks.checkpoint.every_n_steps=2")
    assert outcome.code == 2
    assert "step 3: the loss is not finite; the checkpoint before it is kept" in outcome.err
    assert ", ".join(met[0]) in outcome.err
    last = tmp_path / "run" / "checkpoints" / "supervised" / "last.ckpt"
    assert checkpoint_step(last) == 2
    assert all(x.isfinite().all() for x in torch.load(last, weights_only=True)["state_dict"].values())
    assert look is callbacks.Guard.look


def test_fused_optimizers_leave_a_step_out_without_being_asked() -> None:
    """What a GPU relies on: `found_inf` holds weights, moments and their age."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    for bad in (0.0, 1.0):
        weight.grad = torch.full((3,), float("nan") if bad else 1.0)
        optimizer.found_inf, before = torch.tensor(bad), weight.detach().clone()
        optimizer.step()
        assert weight.equal(before) is bool(bad)
    assert optimizer.state[weight]["step"] == 1
    assert optimizer.state[weight]["exp_avg"].isfinite().all()


def test_a_finite_run_is_the_one_without_a_guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And guard and clipping share one norm a step."""
    norms = list[Tensor]()
    monkeypatch.setattr(base, "total_norm", lambda grads: norms.append(total_norm(grads)) or norms[-1])
    with_guard = tiny_run(tmp_path / "with", *ONE, *QUIET)
    assert len(norms) == checkpoint_step(with_guard / "checkpoints" / "supervised" / "last.ckpt")
    assert any(norm > 1.0 for norm in norms)  # and so clips
    without = tiny_run(tmp_path / "without", *ONE, *QUIET, "~callbacks.guard")
    assert same_weights(with_guard, without, "supervised")
    assert weights(with_guard, "supervised")
    states = [torch.load(r / "checkpoints" / "supervised" / "last.ckpt", weights_only=True) for r in (with_guard, without)]
    assert states[0].keys() == states[1].keys()
    assert states[0]["callbacks"] == states[1]["callbacks"]


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("on_nan=ignore", "valid choices: stop, skip"),
        ("limit=0", "guard.limit=0 must be a number from 1"),
        ("every_n_steps=x", "'x'"),
    ],
)
def test_settings_that_nobody_knows(setting: str, told: str, tmp_path: Path) -> None:
    outcome = run(tmp_path / "run", f"callbacks.guard.{setting}")
    assert outcome.code == 2
    assert told in outcome.err
    assert not (tmp_path / "run").exists()


# --- out of memory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
    ],
)
def test_out_of_memory_names_the_batch_and_what_to_lower(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    met = planted(monkeypatch, {2: 1.0}, error)
    outcome = run(tmp_path)
    assert outcome.code == 2
    assert "out of memory: stage supervised, step 2: a batch of 4 samples (input_ids 4 x" in outcome.err
    assert "pixel_values 4 x 3 x 48 x 48" in outcome.err
    assert ", ".join(met[0]) in outcome.err
    assert "tried to allocate" in outcome.err.lower()
    for advice in (
        "activation_checkpointing=full",
        "stages.supervised.batch_size=2 with +stages.supervised.trainer.accumulate_grad_batches=2",
        "peft=qlora",
    ):
        assert advice in outcome.err
    assert "Traceback" not in outcome.err
    assert checkpoint_step(tmp_path / "checkpoints" / "supervised" / "last.ckpt") == 2


def test_real_memory_that_a_cpu_cannot_give(tmp_path: Path) -> None:
    outcome = train(
        *TINY, *QUIET, f"paths.run={tmp_path / 'run'}", "pipeline=[contrastive]", "encoder.mlp_dim=900000000000",
    )  # fmt: skip
    assert outcome.code == 2
    assert "out of memory: stage contrastive, while it was prepared" in outcome.err
    assert "stages.contrastive.module.cached_chunk=2" in outcome.err


def test_other_errors_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, {2: 1.0}, RuntimeError("a fault of the program"))
    with pytest.raises(RuntimeError, match="a fault of the program"):
        run(tmp_path)


# --- two processes --------------------------------------------------------------------------------------------------


def two(rank: int, folder: str) -> None:
    """The second micro-batch of step 1 is not finite in process 1 alone."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    stage: Any = SimpleNamespace(name="contrastive", checkpoint=Path(folder, "none"), folder=Path(folder))
    steps = [
        Watched(0, [[f"a{rank}"]], torch.zeros(2)),
        Watched(1, [[f"b{rank}"], [f"c{rank}"]], torch.tensor([0.0, rank, rank])),
    ]
    told = dict[str, Any]()
    for choice in ("stop", "skip"):
        guard = callbacks.Guard(on_nan=choice)
        guard.waiting = list(steps)
        try:
            told[choice] = [guard.look(stage), guard.skipped, guard.look(stage)]
        except ValueError as error:
            told[choice] = str(error)
    Path(folder, f"told-{rank}.json").write_text(json.dumps(told))
    leave_processes()


def test_all_processes_decide_alike_and_name_the_samples_of_the_one_that_met_it(tmp_path: Path) -> None:
    together(two, str(tmp_path), count=2)
    first, second = (read_json(tmp_path / f"told-{rank}.json") for rank in (0, 1))
    assert first == second
    assert "stage contrastive, step 1: the loss is not finite" in first["stop"]
    assert "samples of the step: c1\n" in first["stop"]
    assert first["skip"] == [True, [{"step": 1, "what": "the loss", "samples": ["c1"]}], False]
    assert read_json(tmp_path / "not_finite.json") == first["skip"][1]
