"""Own pictures of any size, from files, through all stages: random crops for pairs, tiles for conversations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image
from runs import TINY, losses, read_json, tiny_run, train

CROPS = "{_target_: lightning_internvl.data.processors.basic.RandomCrop, image_size: 48, flip: true}"  # of one stage alone


def own_data(folder: Path) -> list[str]:
    """Settings for lists of pairs and of conversations, with none, one and two pictures, in `folder`."""
    names = []
    for number, size in enumerate([(48, 48), (150, 40), (31, 200), (1, 1)]):
        pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        names.append(f"{number}.png")
    pairs = [{"image": name, "caption": f"picture {number}"} for number, name in enumerate(names)]
    chats = [
        {"image": shown, "conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a cat"}]}
        for shown in ([], names[1], names[2:], names[3])
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (folder / "chats.json").write_text(json.dumps(chats))
    return [
        "data=conversations", f"data.pairs_path={folder}/pairs.jsonl", f"data.chats_path={folder}/chats.json",
        "data.num_workers=0", "processor@data.processor=tiles", "data.processor.max_tiles=4",
        f"+stages.contrastive.collate.processor={CROPS}",
    ]  # fmt: skip


def test_a_run_on_own_files(tmp_path: Path) -> None:
    measured = f"data.validation={tmp_path}/pairs.jsonl", "callbacks.samples.at=[1]", "callbacks.tracking.every_n_steps=4"
    run = tiny_run(tmp_path / "run", *own_data(tmp_path), *measured)
    for stage in ("contrastive", "generative", "supervised"):
        rows = losses(run, stage)
        assert len(rows) == 4
        assert all(np.isfinite(row["train/loss"]) for row in rows)
    shows_its_pairs(run)


def shows_its_pairs(run: Path) -> None:
    """Stages of pairs keep what they make of held-out ones, as of built-in scenes."""
    of = {stage: read_json(run / f"stages/{stage}/samples/step-000004.json") for stage in ("contrastive", "generative")}
    for found in of.values():
        assert len(found["images"]) == len(found["similarity"]) == 2
        assert found["captions_true"] == ["picture 0", "picture 1"]
        assert found["neighbours"]["among"] == 4
        assert [len(row) for row in found["neighbours"]["ranked"]] == [4] * 2
    assert len(of["generative"]["captions"]) == 2
    cases = read_json(run / "stages/generative/cases.json")
    assert {(case["right"], case["answer"].split()[0] == case["truth"]) for case in cases} <= {(True, True), (False, False)}
    assert {case["question"] for case in cases} <= {f"Does this belong to the picture: picture {n}" for n in range(4)}
    metrics = read_json(run / "metrics.json")["generative"]
    assert metrics["validation_itm_hard_accuracy"] * 8 == len([case for case in cases if case["right"]])  # all have room
    page = (run / "report.html").read_text()
    assert all(f'<section id="{name}">' in page for name in ("film", "cases"))
    assert any(b"nearest: picture" in file.read_bytes() for file in (run / "tensorboard").rglob("events*"))


def test_a_conversation_that_does_not_fit_is_named(tmp_path: Path) -> None:
    few = (
        "data.chats_collate.max_length=20", "data.max_bad_fraction=0", "pipeline=[supervised]",
        "stages.supervised.new=[encoder,middleware,decoder]",
    )  # fmt: skip
    outcome = train(*TINY, *own_data(tmp_path), *few, f"paths.run={tmp_path}/run")
    assert outcome.code == 2
    assert "error: sample chats.json:1: " in outcome.err
    assert "raise data.chats_collate.max_length, or lower data.processor.max_tiles" in outcome.err
