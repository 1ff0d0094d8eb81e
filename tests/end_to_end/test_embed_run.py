"""Runs of the stage `embed`: stopped and resumed they end with the same bits, hand over, and find pictures afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from runs import TINY, call, losses, read_json, same_weights, stopped_before, train
from transformers import AutoTokenizer

from lightning_internvl.data.scenes.datasets import ScenePairs
from lightning_internvl.stages import EmbeddingStage

NEW = "stages.embed.new=[encoder,middleware,decoder,objectives]"
RUN = (
    "pipeline=[embed]", NEW, "stages.embed.batch_size=4", "max_steps=4", "callbacks.checkpoint.every_n_steps=1",
    "data=conversations", "data.num_workers=0", "++data.held_out=null", "trainer.log_every_n_steps=1",
)  # fmt: skip
SIZES = tuple(word for word in TINY if not word.startswith(("stages.", "data.held_out", "callbacks.samples", "debug")))
OBJECTIVE = "stages.embed.objectives.embedding"


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of eight captions with their pictures, and wrong pictures."""
    folder, scenes = tmp_path_factory.mktemp("records"), ScenePairs(0, "train", 48, {"en": 1.0})
    with (folder / "records.jsonl").open("w") as file:
        for place in range(8):
            sample = scenes[place]
            Image.fromarray(sample["image"]).save(folder / f"{place}.png")
            wrong = [{"image": f"{other}.png"} for other in range(place)][-2:]
            record = {"query": sample["caption"], "positive": {"image": f"{place}.png"}, "negatives": wrong}
            file.write(json.dumps(record) + "\n")
    return folder / "records.jsonl"


def run(folder: Path, records: Path, *words: str) -> Any:
    return train(*SIZES, *RUN, f"data.path={records}", f"paths.run={folder}", *words)


LATE = (
    f"{OBJECTIVE}.pooling=late",
    f"{OBJECTIVE}.widths=[16]",
    "stages.embed.module.cached_chunk=2",
    "stages.embed.collate.negatives=2",
)


@pytest.mark.parametrize("words", [LATE, ("peft=lora", "data.validation=0.5")], ids=["late", "adapters"])
def test_stopped_and_resumed_equals_never_stopped(words: tuple[str, ...], records: Path, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", records, *words)
    assert whole.code == 0, whole.err
    with stopped_before(2, EmbeddingStage):
        run(tmp_path / "run", records, *words)
    outcome = train(f"resume={tmp_path}/run")
    assert outcome.code == 0, outcome.err
    assert "embed: goes on from step 2" in outcome.out
    assert same_weights(tmp_path / "whole", tmp_path / "run", "embed")
    assert losses(tmp_path / "whole", "embed") == losses(tmp_path / "run", "embed")
    assert ("train/embedding_16" in losses(tmp_path / "run", "embed")[-1]) == (words is LATE)


def test_a_run_is_measured_and_looks_for_pictures(tmp_path: Path) -> None:
    words = (*TINY, "experiment=embed_toy", "pipeline=[supervised,embed]", "stages.supervised.new=[encoder,middleware,decoder]")
    outcome = train(*words, "stages.embed.batch_size=4", f"paths.run={tmp_path}/run")
    assert outcome.code == 0, outcome.err
    metrics = read_json(tmp_path / "run/metrics.json")
    assert "c_image_to_text_r1" in metrics["embed"]
    measured = call("evaluate.py", f"run={tmp_path}/run", "task=retrieval", f"to={tmp_path}/found")
    assert measured.code == 0, measured.err
    found = read_json(tmp_path / "found/metrics.json")["retrieval"]
    assert found["c_image_to_text_r1"] == metrics["embed"]["c_image_to_text_r1"]
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (32, 32), "red").save(folder / name)
    talk = call("chat.py", f"run={tmp_path}/run", f"gallery={folder}", typed="/find red\n")
    assert talk.code == 0, talk.err
    assert "a.png" in talk.out
    check_folder_for_sentence_transformers(tmp_path)


def check_folder_for_sentence_transformers(folder: Path) -> None:
    to = folder / "texts"
    written = call("export.py", f"run={folder}/run", f"to={to}", "layout=sentence_transformers")
    assert written.code == 0, written.err
    assert "embeddings of texts: 0.0e+00 of the largest" in written.out
    modules = [one["type"].rpartition(".")[2] for one in read_json(to / "modules.json")]
    assert modules == ["Transformer", "Pooling", "Normalize"]
    assert read_json(to / "1_Pooling/config.json")["pooling_mode_lasttoken"] is True
    tokenizer = AutoTokenizer.from_pretrained(to)
    assert tokenizer.decode(tokenizer("two dogs")["input_ids"]) == "<s>two dogs</s>"
    refused = call("export.py", f"run={folder}/run/handoff/supervised", f"to={folder}/other", "layout=sentence_transformers")
    assert refused.code != 0
    assert "layout=sentence_transformers is for the stage embed" in refused.err.replace("\n", " ")


def test_faults_are_named_by_line(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(json.dumps({"query": "a", "positive": "b", "negatives": ["b"]}) + "\n")
    outcome = run(tmp_path / "run", file, "data.max_bad_fraction=0")
    assert outcome.code != 0
    assert "bad.jsonl, line 1: negative 0 equals the positive" in outcome.err.replace("\n", " ")
