"""Live against transformers: BLIP-2 (generation and retrieval) and InstructBLIP at several configurations, there and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
)

from lightning_internvl import load_pretrained
from lightning_internvl.checkpoints.adapters import blip2_hf, instructblip_hf

IMAGE, QUERIES = 50, 5
TEXTS: dict[str, dict[str, Any]] = {
    "opt": {"model_type": "opt", "ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32, "pad_token_id": 1},
    "llama": {"model_type": "llama", "intermediate_size": 48, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "t5": {
        "model_type": "t5",
        "d_ff": 40,
        "d_kv": 12,
        "num_layers": 2,
        "feed_forward_proj": "gated-gelu",
        "decoder_start_token_id": 0,
    },
    "t5 of 2019": {
        "model_type": "t5",
        "d_ff": 40,
        "d_kv": 8,
        "num_layers": 2,
        "num_decoder_layers": 3,
        "decoder_start_token_id": 2,
    },
}
VISION: dict[str, dict[str, Any]] = {
    "as published": {},
    "no biases, another norm": {"qkv_bias": False, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu", "num_hidden_layers": 3},
}
QFORMERS: dict[str, dict[str, Any]] = {
    "every second": {},
    "every third": {"cross_attention_frequency": 3, "num_hidden_layers": 4, "hidden_act": "relu", "layer_norm_eps": 1e-9},
}
CASES = [
    *((text, "as published", "every second") for text in TEXTS),
    ("opt", "no biases, another norm", "every third"),
]


def config_of(kind: type, text: str, vision: str = "as published", qformer: str = "every second", **others: Any) -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
    parts = {
        "vision_config": {
            "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 24,
            "patch_size": 6,
        } | VISION[vision],
        "qformer_config": {
            "hidden_size": 20, "intermediate_size": 36, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 44,
            "max_position_embeddings": 16, "encoder_hidden_size": 24,
        } | QFORMERS[qformer],
        "text_config": ({} if text.startswith("t5") else sizes) | {"d_model": 32, "num_heads": 4, "vocab_size": 60} | TEXTS[text]
        if text.startswith("t5")
        else sizes | TEXTS[text] | {"bos_token_id": 2, "eos_token_id": 2},
    }  # fmt: skip
    parts["qformer_config"] |= others.pop("qformer_config", {})
    return kind(num_query_tokens=QUERIES, image_token_index=others.pop("image_token_index", IMAGE), **parts, **others)


def drawn(model: nn.Module) -> Any:
    """All parameters anew, so that none is 0 or 1."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2).add_(1.0 if parameter.ndim == 1 else 0.0)
    return model.eval()


def batch(*rows: tuple[int, int, int]) -> dict[str, Tensor]:
    """Rows of (pictures, words, padding; negative on the left) as the library takes them."""
    width = max(QUERIES * pictures + words + abs(padding) for pictures, words, padding in rows)
    ids, mask = torch.ones(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for row, (pictures, words, padding) in enumerate(rows):
        text = torch.randint(3, IMAGE, (words,)).tolist()
        tokens = torch.tensor([text[0]] + [IMAGE] * QUERIES * pictures + text[1:])
        start = max(0, -padding)
        ids[row, start : start + len(tokens)], mask[row, start : start + len(tokens)] = tokens, 1
    labels = torch.where((mask == 1) & (ids != IMAGE), ids, -100)
    pixels = torch.randn(sum(pictures for pictures, _, _ in rows), 3, 24, 24)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels}


def for_t5(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    labels = torch.randint(3, 60, (len(inputs["input_ids"]), 6))
    labels[0, 4:] = -100
    return inputs | {"labels": labels}


def instructed(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    pictures = len(inputs["pixel_values"])
    mask = (torch.arange(7) < torch.randint(2, 8, (pictures, 1))).long()
    return inputs | {"qformer_input_ids": torch.randint(1, 44, (pictures, 7)), "qformer_attention_mask": mask}


def close(ours: Tensor, theirs: Tensor) -> None:
    ours, theirs = ours.detach(), theirs.detach()
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max()) + 1e-7


def same_both_ways(theirs: Any, folder: Path, inputs: dict[str, Tensor], seen: Any = slice(None)) -> None:
    """Our logits and loss are theirs; what we save is what they saved, and their class reads it to the same logits."""
    theirs.save_pretrained(folder / "theirs")
    ours = load_pretrained(folder / "theirs")
    expected, found = theirs(**inputs), ours(**inputs)
    close(found.logits[seen], expected.logits[seen])
    close(found.loss, expected.loss)
    ours.save_pretrained(folder / "ours")
    back, report = type(theirs).from_pretrained(folder / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert all(tensor.equal(theirs.state_dict()[name]) for name, tensor in back.state_dict().items())
    assert back.eval()(**inputs).logits.equal(theirs(**inputs).logits)


@pytest.mark.parametrize(("text", "vision", "qformer"), CASES, ids=str)
def test_blip2_both_ways(tmp_path: Path, text: str, vision: str, qformer: str) -> None:
    torch.manual_seed(0)
    theirs = drawn(Blip2ForConditionalGeneration(config_of(Blip2Config, text, vision, qformer)))
    inputs = batch((1, 6, 4), (2, 6, 0), (1, 5, -5))
    seen = inputs["attention_mask"].bool()
    if text.startswith("t5"):
        inputs, seen = for_t5(inputs), slice(None)
    same_both_ways(theirs, tmp_path, inputs, seen)


def untied(model: Any) -> Any:
    """A T5 of version 1.1, as Flan-T5 is: output and input embeddings apart, states not scaled."""
    lm = model.language_model
    lm.lm_head.weight = nn.Parameter(torch.randn_like(lm.lm_head.weight))
    lm.config.scale_decoder_outputs = False
    return model


@pytest.mark.parametrize("kind", [Blip2ForConditionalGeneration, InstructBlipForConditionalGeneration])
def test_untied_t5_both_ways(tmp_path: Path, kind: type) -> None:
    torch.manual_seed(1)
    theirs = untied(drawn(kind(config_of(kind.config_class, "t5"))))
    inputs = for_t5(batch((1, 6, 2), (1, 8, 0)))
    same_both_ways(theirs, tmp_path, instructed(inputs) if kind is InstructBlipForConditionalGeneration else inputs)


@pytest.mark.parametrize(("text", "vision", "qformer"), CASES, ids=str)
def test_instructblip_both_ways(tmp_path: Path, text: str, vision: str, qformer: str) -> None:
    torch.manual_seed(2)
    theirs = drawn(InstructBlipForConditionalGeneration(config_of(InstructBlipConfig, text, vision, qformer)))
    inputs = instructed(batch((1, 6, 4), (1, 11, 0), (1, 5, -5)))
    seen = inputs["attention_mask"].bool()
    if text.startswith("t5"):
        inputs, seen = for_t5(inputs), slice(None)
    same_both_ways(theirs, tmp_path, inputs, seen)


@pytest.mark.parametrize("text", ["opt", "t5"])
def test_same_gradients(tmp_path: Path, text: str) -> None:
    """In float64, but for what T5 computes in float32 all the same: rounding of all in float32 alone can pass the bound."""
    torch.manual_seed(3)
    theirs = drawn(InstructBlipForConditionalGeneration(config_of(InstructBlipConfig, text)))
    theirs.save_pretrained(tmp_path)
    ours, inputs = load_pretrained(tmp_path), instructed(batch((1, 6, -5), (1, 11, 0)))
    inputs = for_t5(inputs) if text == "t5" else inputs
    inputs["pixel_values"] = inputs["pixel_values"].double()
    theirs.double()(**inputs).loss.backward()
    ours.double()(**inputs).loss.backward()
    own = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    gradients = instructblip_hf.LAYOUT.official_tensors(ours.config, own)
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        close(gradient, expected[name])


@pytest.mark.parametrize("text", ["opt", "llama", "t5"])
def test_same_tokens(tmp_path: Path, text: str) -> None:
    torch.manual_seed(4)
    theirs = drawn(Blip2ForConditionalGeneration(config_of(Blip2Config, text)))
    theirs.save_pretrained(tmp_path)
    inputs = {name: tensor for name, tensor in batch((1, 6, -5), (1, 11, 0)).items() if name != "labels"}
    ours, skipped = load_pretrained(tmp_path), 1 if text == "t5" else inputs["input_ids"].shape[1]
    for options in ({"num_beams": 1}, {"num_beams": 3}):
        options |= {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
        assert ours.generate(**inputs, **options).equal(theirs.generate(**inputs, **options)[:, skipped:])


@pytest.mark.parametrize("prefix", [False, True])
def test_retrieval_both_ways(tmp_path: Path, prefix: bool) -> None:
    torch.manual_seed(5)
    config = config_of(
        Blip2Config, "opt", qformer_config={"use_qformer_text_input": True}, image_text_hidden_size=14,
        image_token_index=43 if prefix else None,
    )  # fmt: skip
    theirs = drawn(Blip2ForImageTextRetrieval(config))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs")
    ids, mask = torch.randint(1, 43, (3, 8)), (torch.arange(8) < torch.tensor([[8], [3], [5]])).long()
    if prefix:
        ids = torch.cat([torch.full((3, QUERIES), 43), ids], dim=1)
        mask = torch.cat([torch.ones(3, QUERIES, dtype=torch.long), mask], dim=1)
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(3, 3, 24, 24)}
    for matched in (False, True):
        expected, found = (m(**inputs, use_image_text_matching_head=matched) for m in (theirs, ours))
        close(found.logits_per_image, expected.logits_per_image)
        close(found.logits_per_text, expected.logits_per_text)
    ours.save_pretrained(tmp_path / "ours")
    back, report = Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert back.eval()(**inputs).logits_per_image.equal(theirs(**inputs).logits_per_image)


def test_pictures_of_another_size_resize_the_positions(tmp_path: Path) -> None:
    torch.manual_seed(6)
    theirs = drawn(Blip2ForConditionalGeneration(config_of(Blip2Config, "opt")))
    theirs.save_pretrained(tmp_path)
    inputs = batch((1, 6, 0), (1, 6, 0)) | {"pixel_values": torch.randn(2, 3, 36, 18)}
    expected = theirs(**inputs, interpolate_pos_encoding=True)
    close(load_pretrained(tmp_path)(**inputs).logits, expected.logits)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (Blip2Config, {"image_token_index": None}, "has no image_token_index"),
        (Blip2Config, {"qformer_config": {"use_qformer_text_input": True}}, "use_qformer_text_input=True is not supported"),
        (Blip2Config, {"vision_config": {"attention_dropout": 0.1}}, "attention_dropout=0.1 is not supported"),
        (InstructBlipConfig, {"vision_config": {"image_size": [24, 30]}}, "it must be square"),
    ],
)
def test_settings_that_no_part_has_are_refused_by_name(tmp_path: Path, kind: type, change: dict, message: str) -> None:
    classes = {Blip2Config: Blip2ForConditionalGeneration, InstructBlipConfig: InstructBlipForConditionalGeneration}
    classes[kind](config_of(kind, "opt")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value in change.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path)


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    theirs = Blip2ForConditionalGeneration(config_of(Blip2Config, "opt"))
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["qformer_config"]["num_hidden_layers"] += 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"missing: qformer\.encoder\.layer\.3\.attention"):
        load_pretrained(tmp_path)
    assert blip2_hf.LAYOUT.recognises(config, {})
