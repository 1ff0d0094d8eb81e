"""Stages that take their parts from where they start: every layout with a decoder, runs, hand-offs, and what they lack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from published import LAYOUTS, NO_WORD, publish
from runs import ROOT, Outcome, losses, same_weights, tiny_run, train, weights
from tokenizer_files import PLAIN, sentencepiece_folder
from torch import Tensor
from transformers import AutoTokenizer

from lightning_internvl import load_pretrained
from lightning_internvl.chat.session import Sampling, Session
from lightning_internvl.checkpoints import handoff
from lightning_internvl.cli import CONF
from lightning_internvl.config.checks import PARTS, check_config
from lightning_internvl.config.stage_settings import stage_settings
from lightning_internvl.config.targets import build
from lightning_internvl.data.templates import load_template
from lightning_internvl.data.tokenizer import token_id, toy_tokenizer
from lightning_internvl.export.report import ExportOptions
from lightning_internvl.export.write import export
from lightning_internvl.inference.load_official import open_model
from lightning_internvl.inference.load_run import open_run
from lightning_internvl.layers.quantization import Bf16Linear, Bf16Table, quantized_layers
from lightning_internvl.layers.state_dict import own_tensors
from lightning_internvl.messages import ConfigError
from lightning_internvl.model.vlm import VLM
from lightning_internvl.stages import SupervisedStage
from lightning_internvl.training.inherit import inherit

ANSWERS = ("cat", "two dogs")
QUESTION = "what is in the top-left?"
STILL = "stages.finetune.optimizer.lr=1e-30"  # trains, and changes nothing
# Chat formats that the toy tokenizer spells letter by letter.
SHORT = {case: ["data.chats_collate.system="] for case in ("xcomposer2", "xcomposer1")}
EXPORTED = (
    "internvl_chat",
    "internvl_chat_llava",
    "llava",
    "minigpt4",
    "xcomposer2",
    "llava_next",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
)  # tests/export has the rest


def picture(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (40 + 30 * number, 50, 3), dtype=np.uint8)


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """Two pictures, each with a question and an answer."""
    lines = []
    for number, answer in enumerate(ANSWERS):
        Image.fromarray(picture(number)).save(tmp_path / f"{number}.png")
        said = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": answer}]
        lines.append({"id": f"n{number}", "image": f"{number}.png", "conversations": said})
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "chats.jsonl"


def finetune(start: Path, chats: Path, run: Path, *more: str) -> Outcome:
    return train(
        "experiment=finetune", f"init_from={start}", f"data.path={chats}", f"paths.run={run}", "max_steps=2", "logger=history",
        "stages.finetune.batch_size=2", "data.num_workers=0", "data.validation=null", "callbacks.report=null",
        "trainer.log_every_n_steps=1", *more,
    )  # fmt: skip


def finetuned(start: Path, chats: Path, run: Path, *more: str) -> Path:
    outcome = finetune(start, chats, run, *more)
    assert outcome.code == 0, outcome.err
    return run


def samples() -> list[dict[str, Any]]:
    return [
        {
            "key": str(number),
            "images": [picture(number)],
            "conversation": [
                {"role": "user", "content": f"<image>\n{QUESTION}"}, {"role": "assistant", "content": answer},
            ],
        }
        for number, answer in enumerate(ANSWERS)
    ]  # fmt: skip


def loss_of(model: VLM, collator: Any) -> float:
    """The loss of both conversations."""
    batch = collator(samples())
    word = token_id(collator.tokenizer, collator.image_tokens.context)
    assert not (batch["labels"] == word).any()
    with torch.no_grad():
        return float(model(**{name: value for name, value in batch.items() if name not in ("keys", "image_counts")}).loss)


def answer(model: VLM, collator: Any) -> str:
    session = Session(model, collator)
    session.show(picture(1))
    return list(session.ask(QUESTION, Sampling(max_new_tokens=6)))[-1]


@pytest.mark.parametrize("case", LAYOUTS)
def test_every_layout(case: str, tmp_path: Path, chats: Path) -> None:
    start = tmp_path / "published"
    publish(case, start)
    run = finetuned(start, chats, tmp_path / "run", STILL, *SHORT.get(case, []))
    text = (run / "config.yaml").read_text()
    assert "inherited" not in text

    theirs = open_model(start, system="" if case in SHORT else None).view
    assert losses(run, "finetune")[0]["train/loss"] == pytest.approx(loss_of(theirs.model, theirs.chats), rel=1e-5)
    opened = open_run(run, build)
    ours, rows = opened.view, opened.view.model.decoder.vocab_size
    assert (ours.model.image_token_id >= rows) == (case in NO_WORD)
    said = answer(theirs.model, theirs.chats)
    assert answer(ours.model, ours.chats) == said

    if case in EXPORTED:
        export(opened, tmp_path / "out", ExportOptions())
        again = open_model(tmp_path / "out").view
        assert answer(again.model, again.chats) == said

    start.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="published has gone; put it back"):
        open_run(run, build)


# --- one after the other ------------------------------------------------------------------------------------------------


def test_a_second_one_goes_on_from_the_first(tmp_path: Path, chats: Path) -> None:
    publish("llava_native", tmp_path / "published")
    first = finetuned(tmp_path / "published", chats, tmp_path / "first", "max_steps=3")
    assert any(tensor.any() for name, tensor in weights(first, "finetune").items() if ".lora_B." in name)
    trained = open_run(first, build).view
    expected = loss_of(trained.model, trained.chats)
    for name, start in {"second": first, "third": first / "handoff" / "finetune"}.items():
        run = finetuned(start, chats, tmp_path / name, STILL)
        assert losses(run, "finetune")[0]["train/loss"] == pytest.approx(expected, rel=1e-5)
        assert f"folder: {first}/handoff/finetune/tokenizers/decoder\n" in (run / "config.yaml").read_text()
        assert same_weights(first, run, "finetune")


def test_two_stages(tmp_path: Path, chats: Path) -> None:
    publish("llava", tmp_path / "published")
    second = (
        "+stage@stages.second=supervised", "pipeline=[finetune,second]", "stages.second.parts=inherited", "stages.second.new=[]",
        "stages.second.module.train=[middleware,decoder]", "stages.second.batch_size=2", "stages.second.evaluation=null",
    )  # fmt: skip
    run = finetuned(tmp_path / "published", chats, tmp_path / "run", *second)
    first, last = weights(run, "finetune"), weights(run, "second")
    assert first.keys() == last.keys()
    assert not all(tensor.equal(last[name]) for name, tensor in first.items())
    assert "inherited" not in (run / "config.yaml").read_text()


@pytest.mark.parametrize("quantization", ["none", "bf16"])
def test_resumed_equals_never_stopped(tmp_path: Path, chats: Path, monkeypatch: pytest.MonkeyPatch, quantization: str) -> None:
    publish("minigpt4", tmp_path / "published")
    words = ("max_steps=3", f"quantization={quantization}")
    whole = finetuned(tmp_path / "published", chats, tmp_path / "whole", *words)

    def crashing(self: SupervisedStage, batch: Any, batch_idx: int) -> Tensor:
        if self.global_step == 2:
            raise RuntimeError("crash")
        return step(self, batch, batch_idx)

    step, run = SupervisedStage.training_step, tmp_path / "run"
    monkeypatch.setattr(SupervisedStage, "training_step", crashing)
    with pytest.raises(RuntimeError, match="crash"):
        finetune(tmp_path / "published", chats, run, *words, "callbacks.checkpoint.every_n_steps=1")
    monkeypatch.undo()
    (tmp_path / "published").rename(tmp_path / "elsewhere")
    assert "published, which is not there; put it back" in train(f"resume={run}").err
    (tmp_path / "elsewhere").rename(tmp_path / "published")
    assert train(f"resume={run}").code == 0
    assert same_weights(whole, run, "finetune")


def test_a_base_in_bfloat16(tmp_path: Path, chats: Path) -> None:
    """It is not written again, and goes out as what it stands for."""
    view = publish("llava_native", tmp_path / "published")
    run = finetuned(tmp_path / "published", chats, tmp_path / "run", "quantization=bf16", "quantization.encoder=bf16")
    assert all(".lora_" in name or name.startswith("middleware.") for name in weights(run, "finetune"))
    opened = open_run(run, build)
    kinds = {part: {type(layer) for layer in quantized_layers(getattr(opened.view.model, part)).values()} for part in PARTS}
    assert kinds == {"encoder": {Bf16Linear}, "middleware": set(), "decoder": {Bf16Linear, Bf16Table}}
    export(opened, tmp_path / "out", ExportOptions())
    there, base = own_tensors(load_pretrained(tmp_path / "out")), own_tensors(view.model)
    for name in ("encoder.encoder.layers.0.mlp.fc1.weight", "decoder.lm.model.embed_tokens.weight"):
        assert there[name].equal(base[name].bfloat16().float())
    merged = "decoder.lm.model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(there[merged], base[merged].bfloat16().float(), rtol=0, atol=1e-3)
    assert not there[merged].equal(base[merged].bfloat16().float())


def test_from_a_run_of_this_project(tmp_path: Path, chats: Path) -> None:
    start = tiny_run(tmp_path / "start", "pipeline=[contrastive,supervised]", "callbacks.report=null", "callbacks.samples=null")
    run, trained = finetuned(start, chats, tmp_path / "run", STILL), open_run(start, build).view
    assert losses(run, "finetune")[0]["train/loss"] == pytest.approx(loss_of(trained.model, trained.chats), rel=1e-5)
    moved = [name for name in handoff.read_manifest(run / "handoff" / "finetune")["trained"] if not name.startswith("decoder.")]
    assert moved
    assert all(name.startswith("middleware.mlp") for name in moved)  # not what only the stages before use
    outcome = finetune(start / "handoff" / "contrastive", chats, tmp_path / "none")
    assert outcome.code == 2
    assert "contrastive has no decoder, so it cannot answer; start from a stage or a checkpoint that has one" in outcome.err

    trained = open_run(start, build)
    export(trained, tmp_path / "out", ExportOptions(layout="handoff"))
    again = finetuned(tmp_path / "out", chats, tmp_path / "again", STILL)
    assert losses(again, "finetune")[0]["train/loss"] == pytest.approx(losses(run, "finetune")[0]["train/loss"], rel=1e-5)


# --- what is given, and what is lacking ---------------------------------------------------------------------------------


def composed(*overrides: str) -> dict[str, Any]:
    """The checked configuration of a fine-tune, in which nothing is inherited yet."""
    words = ["experiment=finetune", "data.path=chats.jsonl", "paths.run=run", "paths.sweep=sweep", *overrides]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_container(compose("config", overrides=words), resolve=True)
    check_config(config)
    return config


def inherited(start: Path, *overrides: str) -> dict[str, Any]:
    """The configuration of a fine-tune that starts there."""
    return inherit(composed(f"init_from={start}", *overrides))


def test_what_is_given_wins(tmp_path: Path) -> None:
    publish("llava_native", tmp_path / "llava")
    data = inherited(tmp_path / "llava")["data"]
    assert data["processor"]["_target_"].endswith(".CenterCrop")
    assert (data["chats_collate"]["template"], data["chats_collate"]["system"]) == ("vicuna", "")
    assert "tokenizer" not in data

    AutoTokenizer.from_pretrained(tmp_path / "llava").save_pretrained(tmp_path / "words")
    given = (
        "data.chats_collate.template=chatml", "processor@data.processor=pad_square", "data.processor.std=[1,1,1]",
        f"data.tokenizer={tmp_path / 'words'}", "+stages.finetune.encoder.drop_path=0.1",
    )  # fmt: skip
    config = inherited(tmp_path / "llava", *given)
    processor, chats = config["data"]["processor"], config["data"]["chats_collate"]
    assert processor["_target_"].endswith(".PadSquare")
    assert (processor["image_size"], processor["mean"][0], processor["std"]) == (96, pytest.approx(0.4814547), [1, 1, 1])
    assert (chats["template"], chats["system"]) == ("chatml", load_template("chatml").system)
    assert config["decoder"]["tokenizer"]["folder"] == str(tmp_path / "words")
    assert stage_settings(config, "finetune").parts.encoder["drop_path"] == 0.1
    config = inherited(tmp_path / "llava", "data.processor.mean=[0,0,0]", "data.chats_collate.system=Hello.")
    assert config["data"]["processor"]["mean"] == [0, 0, 0]
    assert config["data"]["chats_collate"]["system"] == "Hello."


def test_what_a_start_lacks_is_named(tmp_path: Path) -> None:
    view = publish("internvl_chat", tmp_path / "chat")
    fields = json.loads((tmp_path / "chat" / "config.json").read_text())
    (tmp_path / "chat" / "config.json").write_text(json.dumps(fields | {"template": "phi9"}))
    with pytest.raises(ValueError, match=r"chat: .*'phi9', .*; give data\.chats_collate\.template=NAME"):
        inherited(tmp_path / "chat")
    assert inherited(tmp_path / "chat", "data.chats_collate.template=plain")["data"]["chats_collate"]["template"] == "plain"
    with pytest.raises(ValueError, match="unknown chat template 'vicunna'; choose from"):
        inherited(tmp_path / "chat", "data.chats_collate.template=vicunna")

    view.model.save_pretrained(tmp_path / "bare", layout="internvl_native")
    with pytest.raises(ValueError, match=r"bare holds no tokenizer .*; give data\.tokenizer=FOLDER_OR_ID"):
        inherited(tmp_path / "bare")
    wider = toy_tokenizer([f"<{number}>" for number in range(20)])
    wider.pad_token = "<19>"
    wider.save_pretrained(tmp_path / "wider")
    with pytest.raises(ValueError, match=r"pads with id \d+, the language model has \d+ rows; give data\.tokenizer="):
        inherited(tmp_path / "bare", f"data.tokenizer={tmp_path / 'wider'}")

    with pytest.raises(ValueError, match="clip has no decoder, so it cannot answer; start from"):
        inherited(ROOT / "tests" / "fixtures" / "hf" / "clip")


def test_nothing_but_parts_of_this_package_is_inherited(tmp_path: Path) -> None:
    words = ("pipeline=[supervised]", "stages.supervised.new=[encoder,middleware,decoder]", "max_steps=1")
    run = tiny_run(tmp_path / "run", *words, "callbacks.report=null", "callbacks.samples=null")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["processor"]["_target_"] = "os.system"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match=r"data\.processor\._target_: 'os\.system' comes with the run"):
        inherited(run)
    manifest = json.loads((run / "handoff" / "supervised" / "manifest.json").read_text())
    manifest["config"]["encoder"]["_target_"] = "os.system"
    (run / "handoff" / "supervised" / "manifest.json").write_text(json.dumps(manifest))
    config["data"]["processor"]["_target_"] = "lightning_internvl.data.processors.basic.Squash"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match=r"'os\.system' comes with the checkpoint"):
        inherited(run)


def test_inherited_is_for_stages_that_inherit() -> None:
    with pytest.raises(ConfigError, match=r"its parts are those of init_from; give init_from=FOLDER_OR_ID"):
        composed()
    with pytest.raises(ConfigError, match=r"data\.chats_collate\.template=inherited is for .*; pipeline=\[supervised\] has none"):
        composed("pipeline=[supervised]")


def test_a_tokenizer_that_is_published_with_code_of_its_own(tmp_path: Path, chats: Path) -> None:
    start = tmp_path / "published"
    publish("internvl_chat", start)
    for file in start.glob("*token*"):
        file.unlink()
    pieces = sentencepiece_folder(tmp_path / "words", **PLAIN)
    for file in (tmp_path / "words").iterdir():
        file.rename(start / file.name)
    fields = json.loads((start / "config.json").read_text()) | {"template": "internlm2-chat"}
    del fields["image_token_id"]  # which no publisher writes
    (start / "config.json").write_text(json.dumps(fields))
    run = finetuned(start, chats, tmp_path / "run", STILL)

    theirs, opened = open_model(start).view, open_run(run, build).view
    asked = [{**samples()[0], "conversation": samples()[0]["conversation"][:1]}]
    begin, end = pieces.get_piece_size(), pieces.get_piece_size() + 1
    after = [*pieces.encode(f"\n{QUESTION}"), end, begin, *pieces.encode("assistant\n")]
    for chat in (theirs.chats, opened.chats):
        row = chat.prompts(asked)["input_ids"][0].tolist()
        assert (row[:2], row[-len(after) :], row.count(end + 1) > 0) == ([1, begin], after, True)
    assert losses(run, "finetune")[0]["train/loss"] == pytest.approx(loss_of(theirs.model, theirs.chats), rel=1e-5)
    assert answer(opened.model, opened.chats) == answer(theirs.model, theirs.chats)
