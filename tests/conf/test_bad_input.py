"""A wrong word, file or number is answered with one screen that names it and the valid choices; nothing is left to be trusted."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import TINY, Outcome, read_json, tiny_run, train

from lightning_internvl.data.order.sampler import StepBatchSampler

SCREEN = 24  # lines


def refused(*arguments: str) -> str:
    """What a command says that must fail."""
    outcome = train(*arguments)
    assert outcome.code == 2, outcome
    return message(outcome)


def message(outcome: Outcome) -> str:
    text = outcome.err.partition("\nerror: ")[2]
    assert text.count("\n") <= SCREEN
    assert len(text) < 2500
    assert "Traceback" not in outcome.err
    return text


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the contrastive stage; not to be changed."""
    return tiny_run(tmp_path_factory.mktemp("finished") / "run", "pipeline=[contrastive]")


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


STAGES = "contrastive, generative, supervised, preference, reward, embed, filter"
BEFORE_ANY_MODEL = {
    "stages.contrastive.batch_size=1": r"contrastive: batch_size=1: ITC .*a single pair.*contrastive\.batch_size=2 or",
    "stages.generative.batch_size=1": r"stages\.generative: batch_size=1: ITC .*give stages\.generative\.batch_size=2 or more",
    "+optimizer.foo=3": r"optimizer: there is no setting 'foo'; valid choices: lr, ",
    "+encoder.foo=3": r"encoder: there is no setting 'foo'; valid choices: image_size, ",
    "+callbacks.samples.foo=3": r"callbacks\.samples: there is no setting 'foo'; valid choices: at, images",
    "encoder.dim=wide": r"encoder\.dim='wide' must be a whole number",
    "encodr=x": r"no setting 'encodr'; did you mean 'encoder'\? valid choices: activation_checkpointing, .*epochs, experiment",
    "encoder=nope": r"no 'nope' in the group encoder; valid choices: .*internvit_toy",
    "experiment=null": r"a group is chosen by the name of a file, .*; ~experiment leaves it out",
    "experiment=nope": r"no 'nope' in the group experiment; valid choices: .*internvl_chat_toy",
    "stages.contrastive.max_step=3": r"'stages\.contrastive\.max_step'; in stages\.contrastive: did you mean 'max_steps'\?",
    "+stages.contrastive.max_step=3": r"stages\.contrastive: 'max_step' is no setting of a stage; did you mean 'max_steps'\?",
    "stages.supervised.middleware=mlp": r"swapped with middleware@stages\.supervised\.middleware=OPTION",
    "encoder.dim.x=3": r"encoder\.dim has no settings below it",
    "optimizer.part_lr={encoder:1}": r"add one with \+optimizer\.part_lr\.NAME=VALUE",
    "~callbacks.sampls": r"no setting 'callbacks\.sampls'; in callbacks: did you mean 'samples'\?",
    "~callbacks.handoff": r"callbacks\.handoff is missing",
    "+sead=3": r"no setting 'sead'; did you mean 'seed'\?",
    "sead": r"'sead' is not understood \(missing EQUAL",
    "seed=[": r"'seed=\[' is not understood \(no viable",
    "seed=one": r"seed='one' must be a whole number",
    "pipeline=[foo]": rf"pipeline: there is no stage 'foo'; valid choices: {STAGES}",
    "pipeline=[contrastve]": rf"did you mean 'contrastive'\? valid choices: {STAGES}",
    "pipeline=contrastive": rf"pipeline='contrastive' must be a list of stages, as in pipeline=\[contrastive\]; .*{STAGES}",
    "pipeline=[contrastive,contrastive]": r"'contrastive' is listed twice",
    "optimizer.lr=-1": r"optimizer\.lr=-1 must be a number above 0",
    "stages.supervised.optimizer.lr=-0.1": r"stages\.supervised: optimizer\.lr=-0\.1 must be a number above 0",
    "data.image_token='<nope>'": r"stages\.words: the tokenizer has no token '<nope>'; choose another template",
    "data.chats_collate.template=qwen2_vl": r"stages\.words: the tokenizer has no token '<\|vision_start\|>'",
    "+middleware.vocab_size=100": r"middleware\.vocab_size=100, but its tokenizer has 622 words; leave vocab_size out",
    "stages.generative.max_steps=0": r"stages\.generative: max_steps=0 must be a whole number above 0",
    "stages.contrastive.parts=[encoder]": r"lacks middleware; only the decoder may be left out",
    "stages.contrastive.module.train=[]": r"module\.train is empty",
    "init_from=./nowhere": r"init_from=\./nowhere: there is no such folder",
    "name=": r"name='' must be a word",
    "name=???": r"name has no value; give name=VALUE",
    "+trainer.max_steps=3": r"trainer\.max_steps=3 is not for the trainer to say: .*stages\.NAME\.max_steps=N",
    "+trainer.limit_train_batches=3": r"trainer\.limit_train_batches=3 is not .*max_steps=N makes all stages shorter",
    "+trainer.fast_dev_run=1": r"trainer\.fast_dev_run=1 is not .*debug=fast",
    "+trainer.overfit_batches=0.5": r"trainer\.overfit_batches=0\.5 is not .*debug=overfit",
    "trainer.max_epochs=2": r"trainer\.max_epochs=2 is not .*epochs=N is the length of all",
    "+trainer.default_root_dir=here": r"trainer\.default_root_dir='here' is not .*paths\.run=FOLDER",
    "trainer.enable_checkpointing=true": r"trainer\.enable_checkpointing=True is not .*callbacks\.checkpoint",
    "+trainer.strategy=ddp": r"trainer\.strategy='ddp' is not .*strategy=auto, ddp or fsdp2",
    "+trainer.logger=false": r"trainer\.logger=False is not .*logger=\[tensorboard,history\]",
    "+stages.generative.trainer={min_steps: 9}": r"stages\.generative: trainer\.min_steps=9 is not .*max_steps=N or epochs=N",
    "matmul_precision=tf32": r"matmul_precision='tf32' is not known; valid choices: highest, high, medium",
    "trainer.precision=bf16-true": r"trainer\.precision=bf16-true holds weights and moments in 16 bits.*; use bf16-mixed",
    "data.jpeg_quality=[75,101]": r"data\.jpeg_quality=\[75, 101\] must be null or two whole .*, as in \[75, 100\]",
    "data.jpeg_quality=75": r"data\.jpeg_quality=75 must be",
    "+stages.supervised.datasets={jpeg_quality: [9, 2]}": r"stages\.supervised: data\.jpeg_quality=\[9, 2\] must be",
    "data.chats_collate.video_frames=[0,8]": r"video_frames=\[0, 8\] must be null or two whole .*, as in \[8, 32\]",
    "+stages.supervised.collate.video_frames=8": r"stages\.supervised: data\.chats_collate\.video_frames=8 must be",
    "data.num_workers=-1": r"data\.num_workers=-1 must be a whole number from 0 on",
    "encoder.image_size=100": r"encoder\.image_size=100 is no multiple of encoder\.patch_size=48; fitting sizes: 96, 144",
}  # fmt: skip
BEFORE_ANY_TRAINING = {
    "attention=foo": r"attention='foo' is not known; valid choices: auto, xformers, flash, flex, sdpa, math",
    "stages.generative.module.negatives=foo": r"stages\.generative: negatives='foo' is not known; valid choices: mined, random",
    "stages.generative.module.mined_from_step=-1": r"stages\.generative: mined_from_step=-1 must be a step, 0 or later",
    "stages.generative.module.matched_share=1": r"stages\.generative: matched_share=1 must lie between 0 and 1",
    "stages.supervised.module.train=[{name: decoder, from_step: 9}]": r"train: nothing .* at step 9 of 4; name a part",
    "stages.supervised.module.train=[{name: decoder, frozen: true}]": r"train: nothing .*every parameter frozen",
    "stages.supervised.module.train=[objectives]": r"train: nothing .*every parameter frozen",
    "data.chats.layout_share=0.95": r"at most 1 together: caption_share=.*, layout_share=0\.95",
    "stages.supervised.module.train=[decodr]": r"stages\.supervised: train: 'decodr' matches no parameter; .*decoder\.lm",
    "+optimizer.part_lr.encodr=0.1": r"stages\.contrastive: optimizer\.part_lr: 'encodr' matches no parameter; .*encoder\.",
    "trainer.precision=bf17": r"'bf17' is invalid\. Allowed precision values: .*bf16-mixed",
    "trainer.accelerator=abacus": r"lightning\.Trainer cannot be built from its settings|`accelerator='abacus'`",
    "callbacks.checkpoint.every_n_minutes=0": r"callbacks\.checkpoint\.every_n_minutes=0 must be a number above 0",
    "data.chats_collate.template=foo": r"'foo'.*chatml",
    "data=conversations": r"stages\.contrastive, .*: no file of image-caption pairs is given; .*data\.pairs_path=FILE",
    "stages.generative.data=foo": r"stages\.generative: data: 'foo' does not fit .*valid choices: pairs .*chats",
    "stages.words.new=[]": r"stages\.words: stage generative lacks names .*`new`:\n(.*\n)*  decoder\.lm \(\d+ names\)",
    "stages.supervised.dropped=[]": r"stages\.supervised: stage words has names .*`dropped`:\n  objectives\.itc",
    "pipeline=[supervised]": r"stages\.supervised: a start without weights .*init_from=RUN.* lacks names .*\n  encoder\.",
}  # fmt: skip


@pytest.mark.parametrize("override", BEFORE_ANY_MODEL)
def test_wrong_words_are_answered_before_any_model_is_built(override: str, tmp_path: Path) -> None:
    said = refused("debug=fast", f"paths.run={tmp_path}/run", override)
    assert re.search(BEFORE_ANY_MODEL[override], said), said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("override", BEFORE_ANY_TRAINING)
def test_settings_that_do_not_fit_are_found_before_the_first_stage_trains(override: str, tmp_path: Path) -> None:
    said = refused(*TINY, f"paths.run={tmp_path}/run", override)
    assert re.search(BEFORE_ANY_TRAINING[override], said), said
    assert not (tmp_path / "run").exists()


def test_a_middleware_that_reads_no_text_cannot_contrast(tmp_path: Path) -> None:
    said = refused("debug=fast", f"paths.run={tmp_path}/run", "middleware=mlp")
    assert "stages.contrastive, stages.generative: middleware MLPConnector hands tokens to a decoder" in said
    said = refused("debug=fast", f"paths.run={tmp_path}/run", "middleware=mlp", "middleware.dim=3")
    assert "in middleware: valid choices: patch_layer" in said


def test_captions_longer_than_the_text_tower_reads(tmp_path: Path) -> None:
    said = refused("experiment=clip_toy", "debug=fast", f"paths.run={tmp_path}/run", "data.pairs_collate.max_length=80")
    assert "pairs_collate.max_length=80: CLIPText reads texts of up to 48 tokens; give data.pairs_collate.max_length=48" in said


# --- runs -----------------------------------------------------------------------------------------------------------


def test_init_from_and_resume_exclude_each_other(finished: Path) -> None:
    assert "exclude each other" in refused(f"resume={finished}", f"init_from={finished}")


def test_resume_takes_no_other_setting(finished: Path) -> None:
    before = sorted(finished.rglob("*"))
    said = refused(f"resume={finished}", "seed=3", "encoder.dim=64")
    assert "leave out seed=3 encoder.dim=64" in said
    assert sorted(finished.rglob("*")) == before


def test_there_must_be_a_run_to_resume(tmp_path: Path) -> None:
    assert f"resume={tmp_path}/none: there is no run" in refused(f"resume={tmp_path}/none")
    assert not (tmp_path / "none").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    assert "there is no run" in refused(f"resume={tmp_path}/other")
    assert (tmp_path / "other" / "file").exists()


def test_a_folder_holds_one_run(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    said = refused(*TINY, f"paths.run={finished}")
    assert f"{finished} already holds a run; go on with resume={finished}" in said
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    said = refused(f"paths.run={tmp_path}/file/run")
    assert f"cannot read or write {tmp_path}/file/run: Not a directory; paths.run=FOLDER chooses another" in said
    assert (tmp_path / "file").read_text() == "mine"


def test_what_stood_in_the_folder_before_stays(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    refused(*TINY, f"paths.run={tmp_path}", "attention=foo")
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


# --- weights --------------------------------------------------------------------------------------------------------


def start_from(source: Path, new: Path, *overrides: str) -> str:
    said = refused(*TINY, "pipeline=[generative]", f"init_from={source}", f"paths.run={new}", *overrides)
    assert not new.exists()
    return said


@pytest.mark.parametrize("file", ["encoder.safetensors", "manifest.json"])
def test_a_corrupt_hand_off(file: str, copy: Path, tmp_path: Path) -> None:
    path = copy / "handoff" / "contrastive" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    assert f"{path} is damaged" in start_from(copy, tmp_path / "new")


def test_a_hand_off_that_lacks_a_file(copy: Path, tmp_path: Path) -> None:
    (copy / "handoff" / "contrastive" / "encoder.safetensors").unlink()
    assert "encoder.safetensors is missing, although manifest.json names it" in start_from(copy, tmp_path / "new")


def test_weights_of_another_shape(finished: Path, tmp_path: Path) -> None:
    said = start_from(finished, tmp_path / "new", "encoder.dim=32")
    assert f"{finished} has tensors of another shape" in said
    assert re.search(r"encoder\.embeddings\.class_embedding: \(1, 1, 16\), \(1, 1, 32\)", said)


def test_weights_that_lack_a_name(finished: Path, tmp_path: Path) -> None:
    said = start_from(finished, tmp_path / "new", "encoder.depth=2")
    assert "lacks names that the stage does not list under `new`:\n  encoder.encoder (" in said
    said = start_from(finished, tmp_path / "new", "stages.generative.new=[]")
    assert "objectives.itm" in said


def test_a_run_in_which_nothing_has_finished(copy: Path, tmp_path: Path) -> None:
    shutil.rmtree(copy / "handoff")
    assert f"no stage of this run has finished; use resume={copy}" in start_from(copy, tmp_path / "new")


def test_a_corrupt_checkpoint(copy: Path) -> None:
    shutil.rmtree(copy / "handoff")
    path = copy / "checkpoints" / "contrastive" / "last.ckpt"
    path.write_bytes(path.read_bytes()[:-2000])
    said = refused(f"resume={copy}")
    assert f"{path} is damaged" in said
    assert "delete it to start the stage again" in said
    path.unlink()
    assert train(f"resume={copy}").code == 0


# --- data -----------------------------------------------------------------------------------------------------------

BAD_RECORDS = {
    "missing": ({"image": "none.png", "caption": "a cat"}, "image {folder}/none.png does not exist"),
    "unreadable": ({"image": "text.png", "caption": "a cat"}, "image {folder}/text.png cannot be read"),
    "no caption": ({"image": "good.png", "caption": " "}, "the caption is empty"),
    "no record": ({"image": "good.png"}, "neither a conversation .* nor a record with image and caption"),
}


def pairs(folder: Path, bad: dict[str, str], place: int) -> list[str]:
    """Arguments for a stage over a list of eight pairs, one of them bad."""
    Image.fromarray(np.zeros((9, 9, 3), dtype=np.uint8)).save(folder / "good.png")
    (folder / "text.png").write_text("no picture")
    records = [{"image": "good.png", "caption": f"picture {i}"} for i in range(8)]
    records[place] = bad
    (folder / "list.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return [
        *(word for word in TINY if not word.startswith("data.")), "data=conversations", f"data.pairs_path={folder}/list.jsonl",
        "pipeline=[contrastive]", "~debug", "stages.contrastive.max_steps=4", "stages.contrastive.batch_size=2",
        "callbacks.checkpoint.every_n_steps=1", f"paths.run={folder}/run",
    ]  # fmt: skip


@pytest.mark.parametrize(("kind", "workers"), [*((kind, 0) for kind in BAD_RECORDS), ("unreadable", 1)])
def test_a_bad_sample_is_named_with_its_line(kind: str, workers: int, tmp_path: Path) -> None:
    bad, reason = BAD_RECORDS[kind]
    place = StepBatchSampler(2, 4, dataset_length=8).batch(0)[1]
    said = refused(*pairs(tmp_path, bad, place), f"data.num_workers={workers}", "data.max_bad_fraction=0")
    assert re.match(f"{tmp_path}/list.jsonl, line {place + 1}: {reason.format(folder=tmp_path)}", said), said
    assert not (tmp_path / "run").exists()


def test_a_bad_sample_late_in_a_stage_costs_nothing_once_it_is_mended(tmp_path: Path) -> None:
    place = StepBatchSampler(2, 4, dataset_length=8).batch(3)[0]
    said = refused(*pairs(tmp_path, *BAD_RECORDS["unreadable"][:1], place), "data.num_workers=0", "data.max_bad_fraction=0")
    assert f"line {place + 1}:" in said
    shutil.copy(tmp_path / "good.png", tmp_path / "text.png")
    outcome = train(f"resume={tmp_path}/run")
    assert outcome.code == 0
    assert re.search("contrastive: goes on from step [23]", outcome.out)
    assert read_json(tmp_path / "run" / "handoff" / "contrastive" / "manifest.json")["step"] == 4


def test_a_list_that_is_not_there(tmp_path: Path) -> None:
    said = refused(
        *TINY[1:-3],
        "data=conversations",
        "pipeline=[contrastive]",
        f"data.pairs_path={tmp_path}/none.jsonl",
        f"paths.run={tmp_path}/run",
    )
    assert f"list {tmp_path}/none.jsonl does not exist" in said
