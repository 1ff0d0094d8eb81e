"""Runs on pairs of answers in a file: stopped and resumed they end with the same bits, and references are computed once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from runs import TINY, losses, read_json, same_weights, stopped_before, tiny_run, train

from lightning_internvl.data.scenes.preferences import ScenePreferences
from lightning_internvl.stages import PreferenceStage

NEW = "stages.preference.new=[encoder,middleware,decoder,objectives]"
RUN = (
    "pipeline=[preference]", NEW, "stages.preference.batch_size=4", "max_steps=6", "callbacks.checkpoint.every_n_steps=1",
    "data=conversations", "data.chats_collate.template=vicuna", "data.num_workers=0", "++data.held_out=null",
)  # fmt: skip
SIZES = tuple(word for word in TINY if not word.startswith(("stages.", "data.held_out", "callbacks.samples", "debug")))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of twelve pairs of answers about drawn scenes."""
    folder, scenes = tmp_path_factory.mktemp("pairs"), ScenePreferences(0, "train", 48)
    with (folder / "pairs.jsonl").open("w") as file:
        for place in range(12):
            sample = scenes[place]
            Image.fromarray(sample["images"][0]).save(folder / f"{place}.png")
            question, answer = (message["content"] for message in sample["conversation"])
            record = {"image": f"{place}.png", "question": question, "chosen": answer, "rejected": sample["rejected"]}
            file.write(json.dumps(record) + "\n")
    return folder / "pairs.jsonl"


def run(folder: Path, pairs: Path, *words: str) -> Any:
    return train(*SIZES, *RUN, "trainer.log_every_n_steps=1", f"data.path={pairs}", f"paths.run={folder}", *words)


@pytest.mark.parametrize(
    "words",
    [
        ("objective=mpo", "data.packing=true", "stages.preference.batch_size=1", "data.validation=0.2"),
        ("objective=dpo", "++trainer.accumulate_grad_batches=2"),
        ("objective=dpo", "peft=lora", "stages.preference.module.train=[decoder]"),
        ("objective=simpo",),
    ],
    ids=["packed", "accumulated", "adapters", "without a reference"],
)
def test_stopped_and_resumed_equals_never_stopped(words: tuple[str, ...], pairs: Path, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", pairs, *words)
    assert whole.code == 0, whole.err
    with stopped_before(3, PreferenceStage):
        run(tmp_path / "run", pairs, *words)
    outcome = train(f"resume={tmp_path}/run")
    assert outcome.code == 0, outcome.err
    assert "preference: goes on from step 3" in outcome.out
    assert same_weights(tmp_path / "whole", tmp_path / "run", "preference")
    assert losses(tmp_path / "whole", "preference") == losses(tmp_path / "run", "preference")
    scores = list((tmp_path / "run/stages/preference").glob("references/*"))
    assert bool(scores) == (not {"peft=lora", "objective=simpo"} & set(words))
    row = losses(tmp_path / "run", "preference")[-1]
    assert {"train/margin", "train/accuracy", "train/reward_chosen", "train/reward_rejected"} <= row.keys()


def test_a_folder_of_references_serves_another_run(pairs: Path, tmp_path: Path) -> None:
    shared = f"stages.preference.module.references={tmp_path}/shared"
    first, second = (run(tmp_path / name, pairs, shared, f"objective={name}") for name in ("dpo", "kto"))
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "reference: 12 pairs, 0 of them known before" in first.out
    assert "reference: 12 pairs, 12 of them known before" in second.out
    other = run(tmp_path / "other", pairs, shared, "seed=1")  # which starts from other weights
    assert "reference: 12 pairs, 0 of them known before" in other.out


def test_at_the_first_step_the_model_is_its_reference(pairs: Path, tmp_path: Path) -> None:
    assert run(tmp_path, pairs, "objective=dpo").code == 0
    first = losses(tmp_path, "preference")[0]
    assert first["train/preference"] == pytest.approx(0.6931472, abs=1e-5)
    assert first["train/kl"] == pytest.approx(0.0, abs=1e-4)


def test_after_supervised_tuning_it_hands_over(tmp_path: Path) -> None:
    words = (
        "experiment=preference_toy",
        "pipeline=[supervised,preference]",
        "stages.supervised.new=[encoder,middleware,decoder]",
    )
    tiny_run(tmp_path, *words, "stages.preference.batch_size=4")
    assert (tmp_path / "handoff/preference").is_dir()
    assert "answers_accuracy" in read_json(tmp_path / "metrics.json")["preference"]


def test_conversations_without_a_rejected_answer_are_refused(pairs: Path, tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    asked = [{"role": "user", "content": "is it red?"}, {"role": "assistant", "content": "yes"}]
    file.write_text(json.dumps({"messages": asked}) + "\n")
    outcome = run(tmp_path / "run", file, "data.max_bad_fraction=0")
    assert outcome.code != 0
    assert "sample chats.jsonl:1: it has no chosen and rejected answer" in outcome.err.replace("\n", " ")


def test_pictures_that_are_drawn_anew_have_no_scores(pairs: Path, tmp_path: Path) -> None:
    outcome = run(tmp_path, pairs, "processor@data.processor=random_crop")
    assert outcome.code != 0
    assert "RandomCrop draws another part of a picture each time" in outcome.err.replace("\n", " ")
