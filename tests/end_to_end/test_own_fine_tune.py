"""Fine-tuning on a file of one's own: curve, best weights, early end, samples, shown answers, resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from runs import Outcome, every_checkpoint, read_json, same_weights, tiny_run, train, weights
from safetensors.torch import load_file

from lightning_internvl.files import RUN_CONFIG

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (250, 250, 250)}
RECORDS, STEPS = 20, 8
EARLY = ("optimizer.lr=0.5", "callbacks.tracking.patience=1")  # a rate at which nothing gets better


def write_chats(folder: Path, count: int) -> Path:
    """Pictures of one colour, each with two questions about it."""
    lines = []
    for number in range(count):
        name, colour = list(COLOURS.items())[number % len(COLOURS)]
        Image.new("RGB", (20 + number, 40), colour).save(folder / f"{number}.png")
        said = ["<image>\nWhich colour?", name, "Describe the picture.", f"a picture that is {name} all over"]
        turns = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(said)]
        lines.append(json.dumps({"id": f"n{number}", "image": f"{number}.png", "conversations": turns}))
    path = folder / f"{count}.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model to start from (`base`), and files of many and of eight records."""
    folder = tmp_path_factory.mktemp("own")
    new = "stages.supervised.new=[encoder,middleware,decoder]"
    tiny_run(folder / "base", "pipeline=[supervised]", new, "max_steps=1", "callbacks.samples=null")
    write_chats(folder, RECORDS)
    write_chats(folder, 8)
    return folder


def finetune(folder: Path, name: str, *more: str, records: int = RECORDS) -> Outcome:
    words = (
        "experiment=finetune", f"init_from={folder / 'base'}", f"data.path={folder / f'{records}.jsonl'}",
        f"paths.run={folder / name}", "data.num_workers=0", "trainer.log_every_n_steps=1", "trainer.accelerator=cpu",
        "callbacks.samples.images=2",
    )  # fmt: skip
    with every_checkpoint():
        return train(*words, *more)


@pytest.fixture(scope="module")
def whole(folder: Path) -> tuple[Path, str]:
    """A fine-tune whose loss falls, and what it has printed."""
    words = (f"max_steps={STEPS}", "data.validation=0.3", "callbacks.tracking.times=4", "callbacks.checkpoint.every_n_steps=1")
    outcome = finetune(folder, "whole", *words, "optimizer.lr=0.01")
    assert outcome.code == 0, outcome.err
    return folder / "whole", outcome.out


@pytest.fixture(scope="module")
def early(folder: Path) -> tuple[Path, str]:
    """A fine-tune that ends before its last step."""
    words = ("max_steps=30", "data.validation=0.3", "callbacks.tracking.every_n_steps=2", "callbacks.checkpoint.every_n_steps=1")
    outcome = finetune(folder, "early", *words, *EARLY)
    assert outcome.code == 0, outcome.err
    return folder / "early", outcome.out


def curve(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "stages/finetune/history.jsonl").read_text().splitlines()]
    return {row["step"]: row["val/loss"] for row in rows if "val/loss" in row}


def stopped_at(step: int, whole: Path, run: Path) -> None:
    """A run folder as a process leaves it that was killed after a step."""
    last = Path("checkpoints/finetune/last.ckpt")
    (run / last).parent.mkdir(parents=True)
    shutil.copy(whole / RUN_CONFIG, run)
    shutil.copy(whole / last.with_name(f"step-{step}.ckpt"), run / last)
    shutil.copytree(whole / "best", run / "best")
    (run / "stages/finetune").mkdir(parents=True)
    shutil.copy(whole / "stages/finetune/history.jsonl", run / "stages/finetune")


def test_what_is_printed(whole: tuple[Path, str]) -> None:
    _, out = whole
    assert f"held out; {STEPS} steps of 4 records = " in out
    assert "tokens a record" in out
    assert "finetune: best validation_loss" in out
    assert "answers about held-out data, 3 of " in out
    assert "Which colour?" in out


def test_the_loss_on_held_out_data_is_a_curve(whole: tuple[Path, str]) -> None:
    run, _ = whole
    found, metrics = curve(run), read_json(run / "metrics.json")["finetune"]
    assert list(found) == [0, 1, 3, 5, 7]  # before the first step, and behind every second one
    assert metrics["validation_loss"] == pytest.approx(min(found.values()), rel=1e-5)
    assert metrics.keys() >= {"validation_exact_match", "validation_token_f1", "validation_samples", "validation_answers"}
    page = (run / "report.html").read_text()
    assert 'data-label="validation loss"' in page
    table = page[page.index('<section id="metrics">') :]
    row = table[table.index('title="validation_loss"') :].partition("</tr>")[0]
    assert 'class="bar"' not in row


def test_pictures_with_questions_answers_and_truths_over_time(whole: tuple[Path, str]) -> None:
    run, _ = whole
    times = sorted((run / "stages/finetune/samples").iterdir())
    assert [path.name for path in times] == [f"step-{step:06d}.json" for step in (0, 1, 2, 4, 8)]
    one = read_json(times[0])
    assert len(one["images"]) == len(one["answers"]) == 2
    assert one["answers"][0][0].keys() == {"question", "answer", "truth", "correct"}
    assert one["relevance"]["of"] == "answer"
    assert len(one["relevance"]["grids"]) == 2
    cases = read_json(run / "stages/finetune/cases.json")
    assert {case["question"] for case in cases} <= {"Which colour?", "Describe the picture."}
    page = (run / "report.html").read_text()
    assert all(f'<section id="{name}">' in page for name in ("film", "cases"))
    assert any((run / "tensorboard").rglob("events*"))


def test_the_best_weights_are_handed_over(early: tuple[Path, str]) -> None:
    run, out = early
    best = read_json(run / "stages/finetune/best.json")
    assert best["step"] < 28  # two further measurements are no better
    assert f"finetune: ends at step {best['step'] + 2} of 30, 1 times without a better value" in out
    assert read_json(run / "handoff/finetune/manifest.json")["step"] == best["step"]
    kept = {name: tensor for file in (run / "best/finetune").glob("*.safetensors") for name, tensor in load_file(file).items()}
    handed = weights(run, "finetune")
    assert kept.keys() == handed.keys()
    assert all(tensor.equal(handed[name]) for name, tensor in kept.items())
    metrics = read_json(run / "metrics.json")["finetune"]
    assert metrics["validation_loss"] == pytest.approx(best["value"], rel=1e-5)
    assert "finetune: finished earlier" in train(f"resume={run}").out


@pytest.mark.parametrize(("name", "step"), [("whole", 3), ("whole", STEPS), ("early", 1), ("early", "last")])
def test_a_resumed_run_equals_one_that_was_never_stopped(
    name: str, step: int | str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    whole, _ = request.getfixturevalue(name)
    step = len(list((whole / "checkpoints/finetune").glob("step-*.ckpt"))) if step == "last" else step
    run = tmp_path / "run"
    stopped_at(step, whole, run)
    outcome = train(f"resume={run}")
    assert outcome.code == 0, outcome.err
    assert same_weights(whole, run, "finetune")
    assert curve(run) == curve(whole)
    for file in ("metrics.json", "stages/finetune/cases.json"):
        assert read_json(run / file) == read_json(whole / file)
    assert ("ends at step" in outcome.out) == (name == "early" and step == 1)


def test_eight_records_are_enough_for_a_first_try(folder: Path) -> None:
    outcome = finetune(folder, "eight", "epochs=1", records=8)
    assert outcome.code == 0, outcome.err
    assert "7 records to train on, 1 held out; 2 steps of 4 records = 1.14 epochs" in outcome.out
    assert "So few held-out records say little; data.validation=0.2" in outcome.out
    assert "answers about held-out data, 2 of 2" in outcome.out
    assert "After 2 steps: train longer" in outcome.out  # for it answers nothing


def test_without_held_out_records_nothing_is_measured(folder: Path) -> None:
    outcome = finetune(folder, "none", "max_steps=1", "data.validation=null")
    assert outcome.code == 0, outcome.err
    assert "none held out, so that nothing is measured (data.validation)" in outcome.out
    assert not (folder / "none/metrics.json").exists()
    assert not (folder / "none/best").exists()


def test_a_metric_that_is_not_measured_is_named_before_the_first_step(folder: Path) -> None:
    outcome = finetune(folder, "wrong", "max_steps=1", "callbacks.tracking.best=validation_los", records=8)
    assert outcome.code == 2
    assert "stage finetune has no such metric; did you mean 'validation_loss'?" in outcome.err
