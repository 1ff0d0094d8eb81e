"""Hand-offs of stages with adapters: small, put together with their base, and refused with another one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_handoff import CONFIG
from transformers import PreTrainedTokenizerFast

from lightning_internvl.checkpoints import handoff, load_handoff, weight_source
from lightning_internvl.checkpoints.load_report import LoadReport
from lightning_internvl.checkpoints.weight_source import fingerprint
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.layers import peft
from lightning_internvl.layers.state_dict import own_tensors
from lightning_internvl.model.compose import compose_model, trusted_build
from lightning_internvl.model.vlm import VLM
from lightning_internvl.stages.base import BaseWeights
from lightning_internvl.stages.freezing import FreezePlan

LORA = {"decoder": {"method": "lora", "rank": 2, "alpha": 4, "dropout": 0.0, "targets": peft.BLOCKS}}
ADAPTED = CONFIG | {"peft": LORA}


def first(folder: Path) -> Path:
    handoff.save(compose_model(CONFIG, trusted_build)[0], folder, stage="a", step=1, config=CONFIG, plan=FreezePlan(["decoder"]))
    return folder


def second(folder: Path, base: Path, config: dict[str, Any] = ADAPTED) -> VLM:
    """A stage that adapts the decoder and trains the middleware on the weights of another."""
    model = compose_model(config, trusted_build)[0]
    tensors, plan = weight_source.read_handoff(base)[0], FreezePlan(["middleware", "decoder"], config["peft"])
    LoadReport.of(model, tensors, source="base", new=(), dropped=()).load(model, tensors)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if plan.ever_trains(name):
                parameter.add_(0.1)
    same = frozenset(n for n in own_tensors(model) if not plan.ever_trains(n))
    handoff.save(model, folder, stage="b", step=1, config=config, plan=plan, base=BaseWeights(str(base), same, fingerprint(base)))
    return model


@pytest.fixture
def run(tmp_path: Path) -> Path:
    second(tmp_path / "run" / "b", first(tmp_path / "run" / "a"))
    return tmp_path / "run"


def test_adapters_and_what_trained_whole_lie_alone(run: Path) -> None:
    manifest = json.loads((run / "b" / "manifest.json").read_text())
    assert set(manifest["parts"]) == {"middleware", "decoder"}
    decoder = load_file(run / "b" / "decoder.safetensors")
    assert len(decoder) == 2 * 7
    assert all(peft.is_update(name) for name in decoder)
    assert set(decoder) < set(manifest["trained"])


def test_put_together_with_its_base(run: Path, tmp_path: Path) -> None:
    model = second(tmp_path / "again", run / "a")
    found, _ = weight_source.read_handoff(tmp_path / "again")
    wanted = own_tensors(model)
    assert found.keys() == wanted.keys()
    assert all(tensor.equal(wanted[name]) for name, tensor in found.items())
    loaded = own_tensors(load_handoff.load_model(tmp_path / "again"))
    assert all(tensor.equal(wanted[name]) for name, tensor in loaded.items())


def test_both_may_move_together(run: Path, tmp_path: Path) -> None:
    before = weight_source.read_handoff(run / "b")[0]
    moved = Path(shutil.move(run, tmp_path / "elsewhere"))
    assert all(tensor.equal(before[name]) for name, tensor in weight_source.read_handoff(moved / "b")[0].items())


def test_a_base_that_has_gone_or_is_another_one(run: Path, tmp_path: Path) -> None:
    shutil.move(run / "a", tmp_path / "kept")
    with pytest.raises(ValueError, match=r"holds adapters only, and their base .*/a has gone; put it back"):
        weight_source.read_handoff(run / "b")
    first(run / "a")
    with pytest.raises(ValueError, match=r"holds adapters for another base than what .*/a holds now"):
        weight_source.read_handoff(run / "b")


def test_a_second_fine_tune_goes_on_from_the_first(run: Path, tmp_path: Path) -> None:
    """Adapters on adapters: of equal kind they go on; others are merged, which changes no answer."""
    other = {"decoder": LORA["decoder"] | {"rank": 3}}
    model = compose_model(CONFIG | {"peft": other}, trusted_build)[0]
    tensors = peft.merged_tensors(weight_source.read_handoff(run / "b")[0], LORA)
    report = LoadReport.of(model, tensors, source="b", new=(), dropped=())
    report.load(model, tensors)
    assert all(peft.is_update(name) for name in report.new)
    before, now = load_handoff.load_model(run / "b").decoder, model.decoder.eval()
    embeds, mask = torch.randn(2, 4, 8), torch.ones(2, 4)
    torch.testing.assert_close(now.hidden(embeds, mask), before.hidden(embeds, mask), rtol=1e-5, atol=1e-5)
    third = second(tmp_path / "c", run / "b")
    assert all(tensor.equal(own_tensors(third)[name]) for name, tensor in weight_source.read_handoff(tmp_path / "c")[0].items())


def test_a_fingerprint_sees_the_contents_of_official_files(tmp_path: Path) -> None:
    from lightning_internvl.checkpoints.weight_source import fingerprint

    (tmp_path / "model.safetensors").write_bytes(b"a" * 10_000)
    before = fingerprint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"a" * 9_999 + b"b")
    assert fingerprint(tmp_path) != before
    assert fingerprint("owner/name") == "id:owner/name"


def test_what_was_read_elsewhere_is_kept_with_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A language model and a tokenizer from a folder: the hand-off needs neither again."""
    source = tmp_path / "llm"
    HFCausalLM(config=CONFIG["decoder"]["config"] | {"vocab_size": 700}).lm.save_pretrained(source)
    tokenizer = trusted_build(CONFIG["decoder"]["tokenizer"])
    tokenizer.save_pretrained(source)
    config = CONFIG | {
        "decoder": {
            "_target_": CONFIG["decoder"]["_target_"],
            "pretrained": str(source),
            "tokenizer": {"_target_": "lightning_internvl.data.tokenizer.hf_tokenizer", "pretrained": str(source)},
        }
    }
    built = {"decoder": HFCausalLM(pretrained=str(source), vocab_size=len(tokenizer))}
    model = compose_model(CONFIG, trusted_build)[0]
    model.decoder = built["decoder"]
    folder = tmp_path / "handoff"
    handoff.save(model, folder, stage="a", step=1, config=config, plan=FreezePlan(["decoder"]), tokenizers={"decoder": tokenizer})
    shutil.rmtree(source)
    loaded, tokenizers, _ = load_handoff.load(folder)
    assert isinstance(tokenizers["decoder"], PreTrainedTokenizerFast)
    assert tokenizers["decoder"].get_vocab() == tokenizer.get_vocab()
    assert all(t.equal(own_tensors(model)[n]) for n, t in own_tensors(loaded).items())
    shutil.rmtree(folder / "tokenizers")
    with pytest.raises(ValueError, match="the tokenizer of this hand-off is missing"):
        load_handoff.load(folder)
