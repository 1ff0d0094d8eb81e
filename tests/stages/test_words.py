"""Visual tokens are drawn to the words of captions, and nothing but the connector moves."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.encoders.intern_vit import InternViT
from lightning_internvl.middleware.connector import MLPConnector
from lightning_internvl.model import VLM
from lightning_internvl.objectives import ITC
from lightning_internvl.optim import adamw, cosine
from lightning_internvl.stages import WordStage


def stage(encoder: InternViT, folder: Path) -> WordStage:
    config = {
        "model_type": "llama", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }  # fmt: skip
    decoder = HFCausalLM(config=config)
    connector = MLPConnector(encoder_dim=encoder.dim, decoder_dim=16)
    model = VLM(encoder, connector, decoder, objectives={"itc": ITC()}, image_token_id=39)
    return WordStage(
        model, name="words", run_dir=folder, parts={}, train=["middleware", "objectives"], max_steps=3,
        optimizer=partial(adamw, lr=1e-2, weight_decay=0.0), scheduler=cosine,
    )  # fmt: skip


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(38, (6, 5))
    labels = ids.clone()
    labels[:, :2] = -100
    labels[3, 4] = -100
    return {"input_ids": ids, "labels": labels, "pixel_values": torch.randn(6, 3, 16, 16)}


def test_words_are_the_mean_of_what_is_learnt(encoder: InternViT, tmp_path: Path) -> None:
    words, seen = stage(encoder, tmp_path), batch()
    table = words.model.decoder.lm.get_input_embeddings().weight
    found = words._words(seen["input_ids"], seen["labels"])
    torch.testing.assert_close(found[0], table[seen["input_ids"][0, 2:]].mean(dim=0))
    torch.testing.assert_close(found[3], table[seen["input_ids"][3, 2:4]].mean(dim=0))
    assert not found.requires_grad


def test_the_connector_alone_moves_and_comes_near_the_words(encoder: InternViT, tmp_path: Path) -> None:
    words, seen = stage(encoder, tmp_path), batch()
    words.plan.apply(words.model, 0)
    optimizer = words.configure_optimizers()["optimizer"]
    before = {name: tensor.detach().clone() for name, tensor in words.model.named_parameters()}
    first = None
    for _ in range(60):
        losses = words.losses(seen)
        first = first or {name: value.item() for name, value in losses.items()}
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    last = words.losses(seen)
    assert last["itc"].item() < 0.2 * first["itc"]
    assert last["distance"].item() < 0.2 * first["distance"]
    moved = {name for name, tensor in words.model.named_parameters() if not tensor.equal(before[name])}
    assert all(name.startswith(("middleware.", "objectives.")) for name in moved)
    assert any(name.startswith("middleware.") for name in moved)
