"""Hand-off folders: whole or not there, strict when read, and never a way to run what a stranger put into one."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lightning_internvl.checkpoints import handoff, load_handoff, weight_source
from lightning_internvl.checkpoints.handoff import own_tensors
from lightning_internvl.checkpoints.load_report import LoadReport
from lightning_internvl.checkpoints.weight_source import read_weights
from lightning_internvl.config.targets import build
from lightning_internvl.model.compose import compose_model, trusted_build
from lightning_internvl.model.vlm import VLM
from lightning_internvl.stages.freezing import FreezePlan

TOKENIZER = {"_target_": "lightning_internvl.data.tokenizer.toy_tokenizer"}
CONFIG: dict[str, Any] = {
    "encoder": {
        "_target_": "lightning_internvl.encoders.intern_vit.InternViT",
        "image_size": 16, "patch_size": 8, "dim": 8, "depth": 1, "heads": 2, "mlp_dim": 8,
    },
    "middleware": {"_target_": "lightning_internvl.middleware.connector.MLPConnector"},
    "decoder": {
        "_target_": "lightning_internvl.decoders.hf_causal.HFCausalLM",
        "tokenizer": TOKENIZER,
        "config": {
            "model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
            "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        },
    },
    "objectives": {"itc": {"_target_": "lightning_internvl.objectives.ITC"}},
    "image_token": "<IMG_CONTEXT>",
}  # fmt: skip


LORA = {"method": "lora", "rank": 2, "alpha": 2, "dropout": 0.0, "targets": "blocks"}


def composed() -> VLM:
    return compose_model(CONFIG, trusted_build)[0]


def save(model: VLM, folder: Path, config: dict[str, Any] = CONFIG, step: int = 7) -> Path:
    handoff.save(
        model, folder, stage="supervised", step=step, config=config, plan=FreezePlan(["middleware", "decoder.lm.model.norm"])
    )
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(composed(), tmp_path / "handoff" / "supervised")


def edit(folder: Path, **changes: Any) -> Path:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))
    return folder


# --- writing --------------------------------------------------------------------------------------------------------


def test_the_older_folder_stays_until_the_new_one_is_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(handoff, "sha256_of", lambda file: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save(composed(), folder, step=8)
    assert weight_source.read_handoff(folder)[1]["step"] == 7
    save(composed(), folder, step=8)
    assert weight_source.read_handoff(folder)[1]["step"] == 8
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    model = composed()
    folder = save(model, tmp_path / "one")
    tensors, manifest = weight_source.read_handoff(folder)
    assert tensors.keys() == own_tensors(model).keys()
    assert all(tensor.equal(tensors[name]) for name, tensor in own_tensors(model).items())
    assert (manifest["stage"], manifest["step"], manifest["config"]) == ("supervised", 7, CONFIG)
    assert {part: entry["origin"] for part, entry in manifest["parts"].items()} == {
        "encoder": "inherited", "middleware": "trained", "decoder": "trained", "objectives": "inherited"
    }  # fmt: skip
    again = load_handoff.load_model(folder)
    assert not again.training
    assert all(tensor.equal(own_tensors(model)[name]) for name, tensor in own_tensors(again).items())
    assert again.image_token_id == model.image_token_id


def test_tied_weights_are_saved_once_and_stay_tied(folder: Path) -> None:
    names = set(load_file(folder / "decoder.safetensors"))
    assert "decoder.lm.model.embed_tokens.weight" in names
    assert "decoder.lm.lm_head.weight" not in names
    lm = load_handoff.load_model(folder).decoder.lm
    assert lm.lm_head.weight is lm.model.embed_tokens.weight


def test_names_are_told_apart_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = composed()
    assert own_tensors(model).keys() == own_tensors(composed()).keys()


def test_a_failure_in_the_middle_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, save_file = [], handoff.save_file

    def failing(tensors: dict[str, torch.Tensor], path: Path, **options: Any) -> None:
        if written:
            raise OSError("no space left")
        written.append(path)
        save_file(tensors, path, **options)

    monkeypatch.setattr(handoff, "save_file", failing)
    with pytest.raises(OSError, match="no space left"):
        save(composed(), tmp_path / "handoff" / "supervised")
    assert written
    assert not any((tmp_path / "handoff").iterdir())


def test_what_a_kill_left_behind_is_not_read_and_goes_away(folder: Path) -> None:
    run = folder.parent.parent
    (run / "config.yaml").write_text("pipeline: [contrastive, supervised]")
    draft = folder.rename(folder.with_name(".supervised.1234abcd.draft"))
    with pytest.raises(ValueError, match="no stage of this run has finished"):
        read_weights(run)
    save(composed(), folder)
    assert not draft.exists()
    assert read_weights(run).tensors.keys() == own_tensors(composed()).keys()


def test_an_older_hand_off_is_replaced(folder: Path) -> None:
    (folder / "left.safetensors").touch()
    save(composed(), folder, step=9)
    assert weight_source.read_handoff(folder)[1]["step"] == 9
    assert not (folder / "left.safetensors").exists()


def test_the_last_stage_of_the_pipeline_counts_and_not_the_newest_file(folder: Path) -> None:
    run = folder.parent.parent
    (run / "config.yaml").write_text("pipeline: [contrastive, supervised]")
    model = composed()
    torch.nn.init.zeros_(model.encoder.embeddings.class_embedding)
    save(model, run / "handoff" / "contrastive")
    assert read_weights(run).tensors["encoder.embeddings.class_embedding"].any()


# --- damage ---------------------------------------------------------------------------------------------------------


def test_another_content_than_the_manifest_describes(folder: Path) -> None:
    path = folder / "middleware.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"middleware\.safetensors is damaged"):
        weight_source.read_handoff(folder)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("{", "is damaged"),
        ("[]", "no manifest of format 1"),
        ('{"format": 2}', "no manifest of format 1"),
        ('{"format": 1}', "is damaged: it needs `config`, and `parts`"),
        ('{"format": 1, "config": {}, "parts": {"../encoder": {"sha256": ""}}}', "is damaged: it needs"),
        ('{"format": 1, "config": {}, "parts": {"encoder": {}}}', "is damaged: it needs"),
        ('{"format": 1, "config": {}, "parts": {"encoder": {"sha256": "0"}}}', r"config\.encoder=None must be a mapping of"),
        ("[" * 100_000, "is damaged"),
    ],
)
def test_manifests_that_are_none(manifest: str, message: str, folder: Path) -> None:
    (folder / "manifest.json").write_text(manifest)
    with pytest.raises(ValueError, match=message):
        weight_source.read_handoff(folder)


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("encoder.dim", "7", r"config\.encoder\.dim='7' must be a whole number"),
        ("encoder.heads", 0, r"config\.encoder\.heads=0 must be a number from 1 on"),
        ("encoder.dim", None, r"config\.encoder lacks dim"),
        ("encoder._target_", 3, r"config\.encoder\._target_=3 must be a dotted path"),
        ("middleware.tokenizer", [], r"config\.middleware\.tokenizer=\[\] must be a mapping"),
        ("objectives", float("nan"), r"config\.objectives=nan must be a mapping"),
        ("objectives.itc", None, r"config\.objectives\.itc=None must be a mapping"),
        ("image_token", 3, r"config\.image_token=3 must be a text"),
        ("decoder", {}, r"config\.decoder has no _target_"),
        ("peft", {"decoder": "foo"}, r"config\.peft\.decoder='foo' must be a mapping"),
        ("peft", {"decoder": {"method": "lora"}}, r"config\.peft\.decoder lacks rank, alpha, dropout, targets"),
        ("peft", {"decoder": LORA | {"rank": float("nan")}}, r"config\.peft\.decoder\.rank=nan must be a whole number above 0"),
        ("peft", {"decoder": LORA | {"dropout": {}}}, r"config\.peft\.decoder\.dropout=\{\} must be a number"),
        ("peft", {"decoder": LORA | {"targets": -1}}, r"config\.peft\.decoder\.targets=-1 must be a list of names"),
        ("quantization", {"decoder": []}, None),
        ("quantization", {"decoder": ["a"]}, r"config\.quantization\.decoder=\['a'\] is not known"),
        ("decoder.config.num_hidden_layers", "7", r": decoder\.config.*num_hidden_layers"),
    ],
)
def test_a_value_that_no_part_takes(path: str, value: Any, told: str | None, folder: Path) -> None:
    config = copy.deepcopy(CONFIG)
    *above, last = path.split(".")
    section: Any = config
    for name in above:
        section = section[name]
    section[last] = value
    edit(folder, config=config)
    if told is None:
        load_handoff.load(folder)
        return
    with pytest.raises(ValueError, match=rf"{folder}/manifest\.json.*{told}"):
        load_handoff.load(folder)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"stage": 3}, "stage=3 must be a text"),
        ({"step": "foo"}, "step='foo' must be a whole number from 0 on"),
        ({"trained": 3}, "trained=3 must be a list of names"),
        ({"parts": {"encoder": {"sha256": None}}}, r"parts\.encoder\.sha256=None must be a text"),
        ({"base": None}, "base=None must be a mapping"),
        ({"base": {"place": 3, "fingerprint": "", "names": []}}, r"base\.place=3 must be a text"),
        ({"base": {"place": "a", "fingerprint": "", "names": [3]}}, r"base\.names=\[3\] must be a list of names"),
        ({"base": {"place": "a", "fingerprint": "", "names": [], "beside": 3}}, r"base\.beside=3 must be a text"),
        ({"base": {"place": "a", "fingerprint": "", "names": [], "parts": []}}, r"base\.parts=\[\] must be a mapping"),
        (
            {"base": {"place": "a", "fingerprint": "", "names": [], "parts": {"encoder": 3}}},
            r"base\.parts\.encoder=3 must be a map",
        ),
    ],
)
def test_a_field_of_a_manifest_that_is_none(changes: dict[str, Any], told: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=rf"{folder}/manifest\.json is damaged: {told}"):
        weight_source.read_handoff(edit(folder, **changes))


def test_a_file_or_the_manifest_is_missing(folder: Path) -> None:
    (folder / "encoder.safetensors").unlink()
    with pytest.raises(ValueError, match=r"encoder\.safetensors is missing"):
        weight_source.read_handoff(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"is no hand-off folder: it holds no manifest\.json"):
        weight_source.read_handoff(folder)


# --- strictness -----------------------------------------------------------------------------------------------------


def compared(model: VLM, tensors: dict[str, torch.Tensor], new: Sequence[str] = (), dropped: Sequence[str] = ()) -> LoadReport:
    return LoadReport.of(model, tensors, source="it", new=new, dropped=dropped)


def test_a_missing_name_must_be_declared_new() -> None:
    model = composed()
    tensors = {n: t for n, t in own_tensors(model).items() if not n.startswith(("middleware.", "objectives."))}
    with pytest.raises(
        ValueError,
        match=r"it lacks names .*`new`:\n  objectives\.itc\.logit_scale\n.*stages\.NAME\.new=\[middleware,objectives\]$",
    ):
        compared(model, tensors, new=["middleware"])
    report = compared(model, tensors, new=["middleware", "*.logit_scale"])
    assert report.counts()["objectives.itc"] == {"loaded": 0, "new": 1, "dropped": 0}
    assert sorted(report.loaded) == sorted(tensors)


def test_a_name_left_over_must_be_declared_dropped() -> None:
    model = composed()
    tensors = own_tensors(model) | {"middleware.queries": torch.zeros(1), "extra.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"it has names that the model lacks .*`dropped`:\n  extra\.weight$"):
        compared(model, tensors, dropped=["middleware"])
    assert compared(model, tensors, dropped=["middleware.queries", "extra"]).dropped == ["middleware.queries", "extra.weight"]


def test_many_names_are_counted_by_group() -> None:
    with pytest.raises(ValueError, match=r"`new`:\n  encoder\.embeddings \(4 names\)\n  encoder\.encoder \(\d+ names\)\n"):
        compared(composed(), {})


def test_another_shape_is_declared_by_the_whole_name_alone() -> None:
    model = composed()
    tensors = own_tensors(model) | {"objectives.itc.logit_scale": torch.zeros(2)}
    with pytest.raises(
        ValueError, match=r"another shape .*:\n  objectives\.itc\.logit_scale: \(2,\), \(1,\)\n.*new=\[objectives,obj"
    ):
        compared(model, tensors, new=["objectives"], dropped=["objectives"])
    report = compared(model, tensors, new=["objectives", "objectives.itc.logit_scale"])
    assert "objectives.itc.logit_scale" in report.new
    assert "objectives.itc.logit_scale" not in report.loaded


# --- strangers' manifests -------------------------------------------------------------------------------------------


def with_setting(path: str, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(CONFIG)
    *parents, last = path.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    node[last] = value
    return config


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("encoder._target_", "os.system"),
        ("encoder._target_", "planted.Encoder"),
        ("encoder._target_", "lightning_internvl.files.write_text"),
        ("encoder._target_", "lightning_internvl.checkpoints.pretrained.load_pretrained"),
        ("encoder._target_", "lightning_internvl.decoders.hf_causal.AutoModelForCausalLM"),
        ("encoder._target_", "lightning_internvl.model.vlm.nn"),
        ("encoder._target_", "lightning_internvl.nothing.Here"),
        ("middleware.norm", {"_target_": "planted.Encoder"}),
        ("decoder.tokenizer._target_", "planted.Encoder"),
        ("decoder.config.layers", [{"_target_": "planted.Encoder"}]),
        ("objectives.itc._target_", "planted.Encoder"),
    ],
)
def test_only_our_parts_are_built(path: str, value: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "planted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"_target_: '.*' (comes with the checkpoint and is no part of|cannot be found)"):
        load_handoff.load_model(edit(folder, config=with_setting(path, value)))
    assert not (tmp_path / "ran").exists()
    assert "planted" not in sys.modules


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("decoder.pretrained", "owner/model"),
        ("decoder.tokenizer", {"_target_": "lightning_internvl.data.tokenizer.hf_tokenizer", "pretrained": "owner/model"}),
        ("decoder.config.trust_remote_code", True),
        ("decoder.config.auto_map", {"AutoModelForCausalLM": "owner/model--code.Model"}),
        ("decoder.config.attn_implementation", "owner/kernels"),
        ("decoder.config._attn_implementation", "owner/kernels"),
        ("decoder.config._name_or_path", "owner/model"),
    ],
)
def test_nothing_is_fetched_for_a_manifest(path: str, value: Any, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"comes with the checkpoint and could fetch weights or code from elsewhere"):
        load_handoff.load_model(edit(folder, config=with_setting(path, value)))


def test_notes_of_a_library_are_dropped(folder: Path) -> None:
    config = with_setting("decoder.config._model_name_or_path", "Smollm2 135M 8k Lc100K")  # as older hand-offs have it
    config["decoder"]["config"] |= {"_commit_hash": "a", "_odd": {"_odder": 1, "size": 2}}
    model = load_handoff.load_model(edit(folder, config=config))
    assert not {"_model_name_or_path", "_odd"} & set(vars(model.decoder.lm.config))
    with pytest.raises(ValueError, match=r"encoder\._note: 1 comes with the checkpoint"):
        load_handoff.load_model(edit(folder, config=with_setting("encoder._note", 1)))


def test_what_a_library_notes_is_not_written(tmp_path: Path) -> None:
    config = copy.deepcopy(CONFIG)
    source = compose_model(CONFIG, trusted_build)[0].decoder.lm
    source.config._model_name_or_path = "Smollm2 135M 8k Lc100K"  # as a GGUF file's reader sets it
    source.config.odd = {"_note": 1, "size": [{"_note": 2}]}
    source.save_pretrained(tmp_path / "lm")
    noted = json.loads((tmp_path / "lm" / "config.json").read_text())
    assert "_model_name_or_path" in noted
    config["decoder"] |= {"pretrained": str(tmp_path / "lm"), "config": None}
    model = compose_model(config, build)[0]
    handoff.save(model, tmp_path / "a", stage="a", step=1, config=config, plan=FreezePlan(["decoder"]))
    written = json.loads((tmp_path / "a" / "manifest.json").read_text())["config"]["decoder"]["config"]
    assert not [key for key in written if key.startswith("_")]
    assert written["odd"] == {"size": [{}]}
    again = load_handoff.load_model(tmp_path / "a")
    assert all(tensor.equal(again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_hand_off_that_nothing_opens_is_not_written(tmp_path: Path) -> None:
    config = with_setting("encoder._note", 1)
    model = compose_model(CONFIG, trusted_build)[0]
    with pytest.raises(ValueError, match=r"encoder\._note: 1 comes with the checkpoint"):
        handoff.save(model, tmp_path / "a", stage="a", step=1, config=config, plan=FreezePlan(["decoder"]))
    assert not (tmp_path / "a").exists()


def test_settings_that_fetch_nothing_are_kept(folder: Path) -> None:
    config = with_setting("decoder.pretrained", None)
    config["decoder"]["config"]["attn_implementation"] = "eager"
    assert load_handoff.load_model(edit(folder, config=config)).decoder.lm.config._attn_implementation == "eager"
