"""Several micro-batches make the step of one batch: sums over labelled tokens divided by their number in the whole window."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_internvl.choices import IGNORE_INDEX
from lightning_internvl.data.gradient_accumulation import WINDOW_COUNTS, AccumulationWindows
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.encoders.intern_vit import InternViT
from lightning_internvl.middleware.qllama import QLLaMA
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import ITC, ITM, NextToken
from lightning_internvl.objectives.next_token import LABELLED
from lightning_internvl.pipeline import quiet_lightning
from lightning_internvl.stages import GenerativeStage, RetrievalStage, Stage, SupervisedStage

VOCAB, ROWS, LENGTH = 31, 6, 9
SETTINGS: dict[str, Any] = {
    "run_dir": Path(), "parts": {}, "max_steps": 2, "optimizer": lambda model, plan: torch.optim.SGD(model.parameters(), lr=0.0),
    "scheduler": lambda optimizer, total_steps: torch.optim.lr_scheduler.ConstantLR(optimizer),
}  # fmt: skip


class Gradients(L.Callback):
    """Keeps the gradient of each step as the optimizer, after clipping, would see it."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_before_zero_grad(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        self.keep(pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.keep(pl_module)

    def keep(self, stage: L.LightningModule) -> None:
        gradients = [p.grad.flatten() for p in stage.parameters() if p.grad is not None]
        self.seen += [torch.cat(gradients).clone()] if gradients else []


def fit(stage: Stage, batches: Iterable[Any], accumulate: int, **options: Any) -> list[Tensor]:
    """The gradients of the steps over these batches."""
    quiet_lightning()
    seen, options = Gradients(), {"logger": False, "log_every_n_steps": 1, **options}
    L.Trainer(
        accelerator="cpu", max_epochs=1, accumulate_grad_batches=accumulate, callbacks=[seen], **options,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    ).fit(stage, DataLoader(batches, batch_size=None) if isinstance(batches, list) else batches)  # fmt: skip
    return seen.seen


def supervised() -> SupervisedStage:
    torch.manual_seed(0)
    config = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": VOCAB}  # fmt: skip
    model = VLM(torch.nn.Module(), None, HFCausalLM(config=config, embed_std=1.0), objectives={"next_token": NextToken()})
    return SupervisedStage(model, name="supervised", train=["decoder"], weights={"next_token": 2.0}, **SETTINGS)


def answers() -> dict[str, Tensor]:
    """Rows with 1 to 8 labels."""
    torch.manual_seed(3)
    ids = torch.randint(0, VOCAB, (ROWS, LENGTH))
    labels = ids.masked_fill(torch.arange(LENGTH) < torch.tensor([8, 1, 8, 7, 2, 1])[:, None], -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def split(batch: dict[str, Tensor], sizes: list[int]) -> list[dict[str, Tensor]]:
    parts = {name: tensor.split(sizes) for name, tensor in batch.items()}
    return [{name: parts[name][i] for name in parts} for i in range(len(sizes))]


@pytest.mark.parametrize("clip", [None, 0.01])
@pytest.mark.parametrize("sizes", [[1, 2, 3], [5, 1], [1] * 6])
def test_micro_batches_of_uneven_lengths_make_the_step_of_one_batch(sizes: list[int], clip: float | None) -> None:
    (whole,) = fit(supervised(), [answers()], 1, gradient_clip_val=clip)
    stage = supervised()
    windows = AccumulationWindows(split(answers(), sizes), len(sizes), stage.counts)
    (parts,) = fit(stage, windows, len(sizes), gradient_clip_val=clip)
    assert (parts - whole).norm() / whole.norm() < 1e-6


class Logged(Logger):
    """Keeps what is logged of each step."""

    name, version = "logged", ""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append({name: value for name, value in metrics.items() if name.startswith("train/")})

    def log_hyperparams(self, params: Any) -> None: ...


@pytest.mark.parametrize("every", [1, 2])
def test_the_loss_that_is_logged_is_that_of_the_whole_step(every: int) -> None:
    def logged(batches: Iterable[Any], accumulate: int, every: int = 1) -> list[dict[str, float]]:
        kept = Logged()
        fit(supervised(), batches, accumulate, logger=kept, log_every_n_steps=every)
        return kept.rows

    (whole,) = logged([answers()], 1)
    assert whole["train/loss"] == 2 * whole["train/next_token"]
    parts = split(answers(), [1, 2, 3])
    rows = logged(AccumulationWindows([*parts, answers()], 3, supervised().counts), 3, every)
    assert len(rows) == 2 // every  # the last window is short
    assert all(row == pytest.approx(whole) for row in rows)


def test_a_last_window_that_is_short_makes_a_whole_step() -> None:
    stage = supervised()
    steps = fit(stage, AccumulationWindows([*split(answers(), [1, 2, 3]), answers()], 3, stage.counts), 3)
    assert len(steps) == 2
    assert (steps[1] - steps[0]).norm() / steps[0].norm() < 1e-6


class Own(torch.nn.Module):
    """An objective of the user's own, which knows of no samples."""

    def forward(self, hidden: Tensor, labels: Tensor, head: Any, *, shifts: bool = True, count: int | None = None) -> Tensor:
        return NextToken()(hidden, labels, head, shifts=shifts, count=count)


def test_an_objective_of_the_users_own_takes_the_place_of_ours_in_packed_rows_too() -> None:
    ours, own = supervised(), supervised()
    own.model.objectives["next_token"] = Own()
    batch = answers()
    batch["labels"][:, [0, 4]] = IGNORE_INDEX
    for segments in ({}, {"segments": [[4, 5]] * ROWS}):
        assert own.losses({**batch, **segments})["next_token"].equal(ours.losses({**batch, **segments})["next_token"])
        assert own.counts({**batch, **segments}) == ours.counts({**batch, **segments})


def test_a_micro_batch_without_labels_counts_nothing() -> None:
    stage, batch = supervised(), answers()
    empty = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    (alone,) = fit(supervised(), [batch], 1)
    (both,) = fit(stage, AccumulationWindows([empty, batch], 2, stage.counts), 2)
    torch.testing.assert_close(both, alone)
    assert all(gradient.eq(0).all() for gradient in fit(stage, AccumulationWindows([empty] * 2, 2, stage.counts), 2))


def test_losses_that_are_not_counted_weigh_the_same_in_each_micro_batch() -> None:
    class Equal(SupervisedStage):
        def counts(self, batch: dict[str, Any]) -> dict[str, int]:
            return {}

    def equal() -> Stage:
        stage = supervised()
        stage.__class__ = Equal
        return stage

    one, two, three = (fit(equal(), [part], 1)[0] for part in split(answers(), [1, 2, 3]))
    stage = equal()
    steps = fit(stage, AccumulationWindows([*split(answers(), [1, 2, 3])], 2, stage.counts), 2)
    torch.testing.assert_close(steps[0], (one + two) / 2)
    torch.testing.assert_close(steps[1], three)  # alone in its window


def test_losses_that_all_weigh_nothing_are_refused() -> None:
    stage = supervised()
    stage.weights = {"next_token": 0.0}
    with pytest.raises(ValueError, match=r"stages\.supervised\.module\.weights counts no loss \(next_token: 0\)"):
        fit(stage, [answers()], 1)


def test_batches_that_do_not_know_their_window_are_refused() -> None:
    with pytest.raises(ValueError, match="accumulate_grad_batches=2 needs batches that know their window"):
        fit(supervised(), [answers()] * 2, 2)


def test_a_window_is_read_ahead_and_no_further() -> None:
    read: list[int] = []
    batches = ({"n": read.append(n) or n} for n in range(7))
    found = []
    for batch in AccumulationWindows(batches, 3, lambda batch: {"x": batch["n"]}):
        found.append((batch["n"], [counts["x"] for counts in batch[WINDOW_COUNTS]], len(read)))
    windows = [[0, 1, 2]] * 3 + [[3, 4, 5]] * 3 + [[6]]
    assert found == [(n, windows[n], min(7, n + 3)) for n in range(7)]


@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("ids", [[7, 3, 7, 5, 3, 7], [4] * 6, None])
def test_the_generative_stage_counts_what_its_losses_judge(
    encoder: InternViT, qllama: QLLaMA, monkeypatch: pytest.MonkeyPatch, ids: list[int] | None, both_ways: bool
) -> None:
    objectives = {"itc": ITC(), "itm": ITM(dim=16), "itg": NextToken()}
    stage = GenerativeStage(
        VLM(encoder, qllama, objectives=objectives), name="g", train=["*"], negatives="random", both_ways=both_ways, **SETTINGS
    )
    check_counts(stage, pairs(ids, "itc", "itm", "itg"), monkeypatch)


@pytest.mark.parametrize("ids", [[7, 3, 7, 5, 3, 7], [4] * 6])
def test_the_retrieval_stage_counts_what_its_losses_judge(
    encoder: InternViT, qllama: QLLaMA, monkeypatch: pytest.MonkeyPatch, ids: list[int]
) -> None:
    objectives = {"itc": ITC(), "itm": ITM(dim=16)}
    stage = RetrievalStage(VLM(encoder, qllama, objectives=objectives), name="r", train=["*"], negatives="random", **SETTINGS)
    check_counts(stage, pairs(ids, "itc", "itm"), monkeypatch)


def pairs(ids: list[int] | None, *tasks: str) -> dict[str, Tensor]:
    rows = {f"{task}_ids": torch.randint(0, VOCAB, (ROWS, 5)) for task in tasks}
    masks = {f"{task}_mask": torch.ones(ROWS, 5, dtype=torch.long) for task in tasks}
    named = {} if ids is None else {"image_ids": torch.tensor(ids)}
    labels = {"itg_labels": rows["itg_ids"].masked_fill(torch.rand(ROWS, 5) < 0.4, -100)} if "itg" in tasks else {}
    return rows | masks | named | labels | {"pixel_values": torch.randn(ROWS, 3, 16, 16)}


def check_counts(stage: Stage, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    judged: dict[str, int] = {}

    def itm(self: ITM, queries: Tensor, labels: Tensor, original: Any = ITM.forward) -> Tensor:
        judged["itm"] = int((labels != IGNORE_INDEX).sum())
        return original(self, queries, labels)

    def itg(self: NextToken, states: Tensor, targets: Tensor, head: Any, original: Any = NextToken.total_loss) -> Tensor:
        judged["itg"] = judged[LABELLED] = len(targets)
        return original(self, states, targets, head)

    monkeypatch.setattr(ITM, "forward", itm)
    monkeypatch.setattr(NextToken, "total_loss", itg)
    monkeypatch.setattr(type(stage), "global_step", 0)
    stage.losses(batch)
    assert stage.counts(batch) == judged
