"""Runs whose model answers by itself: stopped and resumed they end with the same bits and the same answers, each written once;
micro-batches make the step of one batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import TINY, losses, read_json, same_weights, stopped_before, tiny_run, train
from torch import Tensor

from lightning_internvl.stages import RewardStage

SIZES = tuple(word for word in TINY if not word.startswith(("stages.", "callbacks.samples", "debug")))
# A rule that answers of fresh weights meet as often as not.
FORM = "{_target_: lightning_internvl.stages.rewards.answer_format, _partial_: true, pattern: '[^n]*'}"
RUN = (
    "pipeline=[reward]", "stages.reward.new=[encoder,middleware,decoder,objectives]", "stages.reward.batch_size=4", "max_steps=5",
    "stages.reward.module.answers=4", "stages.reward.module.answer_tokens=6", f"+stages.reward.module.rewards.form={FORM}",
    "stages.reward.optimizer.lr=1e-2", "stages.reward.scheduler.warmup_steps=0", "data.num_workers=0",
    "callbacks.checkpoint.every_n_steps=1", "callbacks.samples=null", "trainer.log_every_n_steps=1",
    "stages.reward.evaluation={answers: null, captions: null}",
)  # fmt: skip
LOGGED = {
    "reward", "reward_exact", "reward_form", "reward_std", "equal_groups", "answer_tokens", "cut_off", "entropy", "clipped",
}  # fmt: skip


def run(folder: Path, *words: str) -> Any:
    return train(*SIZES, *RUN, f"paths.run={folder}", *words)


def answers(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "stages/reward/rollouts.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "words",
    [
        ("++trainer.accumulate_grad_batches=2", "stages.reward.module.temperature=0.8"),
        ("peft=lora", "stages.reward.module.train=[decoder]"),
    ],
    ids=["accumulated", "adapters"],
)
def test_stopped_and_resumed_equals_never_stopped(words: tuple[str, ...], tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", *words)
    assert whole.code == 0, whole.err
    with stopped_before(3, RewardStage):
        run(tmp_path / "run", *words)
    assert answers(tmp_path / "run")[-1]["step"] == 3  # which comes again
    outcome = train(f"resume={tmp_path}/run")
    assert outcome.code == 0, outcome.err
    assert "reward: goes on from step 3" in outcome.out
    assert same_weights(tmp_path / "whole", tmp_path / "run", "reward")
    assert losses(tmp_path / "whole", "reward") == losses(tmp_path / "run", "reward")
    assert answers(tmp_path / "whole") == answers(tmp_path / "run")
    rows = losses(tmp_path / "run", "reward")
    assert {f"train/{name}" for name in LOGGED} <= rows[-1].keys()
    assert all(row["train/clipped"] == 0 for row in rows)  # answers are those of the weights that learn
    _check_answers(tmp_path / "run", 4 * (2 if "accumulate" in words[0] else 1), rows)


def _check_answers(folder: Path, questions: int, rows: list[dict[str, float]]) -> None:
    found = answers(folder)
    assert len(found) == questions * 5
    assert len({one["key"] for one in found}) == questions * 5
    for one in found:
        assert one["reward"] == [a + b for a, b in zip(one["reward_exact"], one["reward_form"], strict=True)]
        assert len(one["answers"]) == len(one["advantage"]) == len(one["finished"]) == 4
        assert any(one["advantage"]) == (len(set(one["reward"])) > 1)
    assert any(any(one["advantage"]) for one in found)
    for row in rows:
        of_step = [value for one in found if one["step"] == row["step"] for value in one["reward"]]
        assert row["train/reward"] == pytest.approx(sum(of_step) / len(of_step))


def test_micro_batches_make_the_step_of_one_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def keep(stage: RewardStage, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> None:
        seen.append(torch.cat([p.grad.flatten() for p in stage.model.parameters() if p.grad is not None]))

    monkeypatch.setattr(RewardStage, "configure_gradient_clipping", keep)
    for name, words in {"one": (), "four": ("++trainer.accumulate_grad_batches=4", "stages.reward.batch_size=1")}.items():
        assert run(tmp_path / name, "max_steps=1", *words).code == 0
    assert answers(tmp_path / "one") == answers(tmp_path / "four")
    one, four = seen
    assert one.any()
    assert float((one - four).norm() / one.norm()) < 1e-6
    (first,), (second,) = (losses(tmp_path / name, "reward") for name in ("one", "four"))
    assert first == pytest.approx(second, rel=1e-5, abs=1e-6)


def test_a_function_of_the_users_own_that_fails_is_named(tmp_path: Path) -> None:
    outcome = run(tmp_path, "+stages.reward.module.rewards.mine={_target_: operator.truediv, _partial_: true}")
    assert outcome.code != 0
    assert "reward mine: sample train/0, answer" in outcome.err
    assert "TypeError" in outcome.err


@pytest.mark.parametrize(
    ("word", "fault"),
    [
        ("data.packing=true", "rows cannot be packed before the model has answered"),
        ("stages.reward.module.answers=1", "stages.reward.module.answers=1"),
        ("stages.reward.module.answer_tokens=1000", "tokens before an answer of up to 1000 are more than"),
    ],
)
def test_what_cannot_work_is_named_before_a_step(word: str, fault: str, tmp_path: Path) -> None:
    outcome = run(tmp_path, word)
    assert outcome.code != 0
    assert fault in outcome.err.replace("\n", " ")


def test_after_supervised_tuning_it_hands_over(tmp_path: Path) -> None:
    words = (
        "experiment=reward_toy", "pipeline=[supervised,reward]", "stages.supervised.new=[encoder,middleware,decoder]",
        "stages.reward.batch_size=4",
    )  # fmt: skip
    tiny_run(tmp_path, *words)
    assert (tmp_path / "handoff/reward").is_dir()
    assert "answers_accuracy" in read_json(tmp_path / "metrics.json")["reward"]
