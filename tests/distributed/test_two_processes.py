"""Runs of two processes equal those of one: losses, weights, schedules, resume and hand-off, whatever the strategy."""

from __future__ import annotations

from pathlib import Path

import pytest
from pair import RECOMPUTED, STEPS, STOPS
from runs import STAGES, losses, read_json, same_weights, weights

CLOSE = 1e-5


def assert_close(one: Path, two: Path, stage: str) -> None:
    """Equal losses in every step, and equal weights at the end."""
    first, second = losses(one, stage), losses(two, stage)
    assert len(first) == len(second) == STEPS
    for a, b in zip(first, second, strict=True):
        assert a == pytest.approx(b, rel=CLOSE), (stage, a["step"])
    ours, theirs = weights(one, stage), weights(two, stage)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).abs().max() < CLOSE, (stage, name)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_stage(strategy: str, stage: str, runs_of: Path) -> None:
    assert_close(runs_of / "one", runs_of / strategy, stage)


def test_divided_layers_of_tower_and_decoder(runs_of: Path) -> None:
    assert_close(runs_of / "one", runs_of / "layers", "supervised")


@pytest.mark.parametrize("way", RECOMPUTED)
def test_blocks_that_are_computed_again_or_compiled(way: str, runs_of: Path) -> None:
    assert_close(runs_of / "one_tower", runs_of / way, "contrastive")


def test_a_tower_of_transformers(runs_of: Path) -> None:
    assert_close(runs_of / "one_hf", runs_of / "fsdp2_hf", "contrastive")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_adapters(strategy: str, runs_of: Path) -> None:
    assert_close(runs_of / "one_lora", runs_of / f"{strategy}_lora", "supervised")


def test_adapters_beside_weights_in_four_bits(runs_of: Path) -> None:
    """Packed weights are divided with their scales; pictures, answers and captions are made by both processes together."""
    one, two = runs_of / "one_qlora", runs_of / "fsdp2_qlora"
    assert_close(one, two, "supervised")
    assert read_json(two / "metrics.json").keys() == {"supervised"}
    assert read_json(two / "metrics.json")["supervised"].keys() == read_json(one / "metrics.json")["supervised"].keys()
    samples = [sorted(path.name for path in (run / "stages/supervised/samples").iterdir()) for run in (one, two)]
    assert samples[0] == samples[1] == ["step-000000.json", "step-000005.json"]
    assert "on every device" not in (runs_of / "out-0-0.txt").read_text()
    whole, *shares = (read_json(run / f"checkpoints/supervised/held-{rank}.json") for run, rank in ((one, 0), (two, 0), (two, 1)))
    for share in shares:
        assert share["packed"] == whole["packed"] / 2
        assert share["blocks"] < 0.52 * whole["blocks"]


def test_adapters_beside_weights_in_four_bits_go_on_exactly(runs_of: Path) -> None:
    whole, run = runs_of / "fsdp2_qlora", runs_of / "fsdp2_qlora_from_3"
    assert same_weights(whole, run, "supervised")
    assert losses(run, "supervised") == losses(whole, "supervised")[3:]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_own_data_is_measured_alike_and_a_stage_ends_early_on_all(strategy: str, runs_of: Path) -> None:
    one, two = runs_of / "one_own", runs_of / f"{strategy}_own"
    assert read_json(one / "metrics.json")["finetune"] == pytest.approx(read_json(two / "metrics.json")["finetune"], rel=1e-4)
    best = [read_json(run / "stages/finetune/best.json") for run in (one, two)]
    assert best[0].keys() == best[1].keys()
    for name, value in best[0].items():
        assert value == (best[1][name] if isinstance(value, str) else pytest.approx(best[1][name], rel=1e-4))
    assert len(losses(one, "finetune")) == len(losses(two, "finetune")) == best[0]["step"] + 2 < 9
    ours, theirs = weights(one, "finetune"), weights(two, "finetune")
    assert ours.keys() == theirs.keys()
    assert all((tensor - theirs[name]).abs().max() < 1e-3 for name, tensor in ours.items())


@pytest.mark.parametrize("strategy", STOPS)
def test_a_freezing_schedule(strategy: str, runs_of: Path) -> None:
    assert_close(runs_of / "one_schedule", runs_of / f"{strategy}_schedule", "contrastive")
    tables = [
        read_json(runs_of / run / "stages" / "contrastive" / "freezing.json") for run in ("one_schedule", f"{strategy}_schedule")
    ]
    assert tables[0] == tables[1]
    assert [entry["step"] for entry in tables[0]] == [0, 2, 3]


@pytest.mark.parametrize(("strategy", "step"), [(strategy, step) for strategy, steps in STOPS.items() for step in steps])
def test_resume_before_at_and_after_a_change_is_exact(strategy: str, step: int, runs_of: Path) -> None:
    whole, run = runs_of / f"{strategy}_schedule", runs_of / f"{strategy}_from_{step}"
    assert same_weights(whole, run, "contrastive")
    assert losses(run, "contrastive") == losses(whole, "contrastive")[step:]


@pytest.mark.parametrize("run", ["one_to_two", "two_to_one"])
def test_resume_with_another_number_of_processes(run: str, runs_of: Path) -> None:
    whole = runs_of / "one_schedule"
    assert losses(runs_of / run, "contrastive") == [pytest.approx(row, rel=CLOSE) for row in losses(whole, "contrastive")[2:]]
    ours, theirs = weights(runs_of / run, "contrastive"), weights(whole, "contrastive")
    assert all((tensor - theirs[name]).abs().max() < CLOSE for name, tensor in ours.items())


def test_both_take_the_stages_that_two_have_finished_and_train_the_last_together(runs_of: Path) -> None:
    run, ddp = runs_of / "reused", runs_of / "ddp"
    assert read_json(run / "reused.json") == dict.fromkeys(("contrastive", "generative", "words"), str(ddp))
    assert same_weights(run, ddp, "contrastive")
    assert same_weights(run, ddp, "generative")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["supervised"]
    first, second = losses(run, "supervised"), losses(ddp, "supervised")
    assert first[0] == second[0]
    assert first[-1] != second[-1]
