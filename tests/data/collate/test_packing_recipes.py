"""Packed rows through the real parts of every kind: the same loss and gradients as padded rows, and no sample sees another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor

from lightning_internvl.cli import CONF
from lightning_internvl.config.stage_settings import stage_settings
from lightning_internvl.config.targets import build
from lightning_internvl.training.assembly import Assembly, assemble

TINY_LLAMA = (
    "decoder.config.hidden_size=32", "decoder.config.intermediate_size=32", "decoder.config.num_hidden_layers=2",
    "decoder.config.num_attention_heads=2", "decoder.config.num_key_value_heads=2",
)  # fmt: skip
ALBUMS = ("data.chats._target_=lightning_internvl.data.scenes.interleaved.SceneAlbums", "+data.chats.pictures=2")
# What differs between systems: how pictures become tokens, how many there are, how positions count, what else sees the text.
RECIPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "QLLaMA": ("supervised", ("experiment=internvl_toy", *TINY_LLAMA)),
    "tiles": ("sft", ("experiment=internvl_1_5_toy", "data.packing_tiles=12")),
    "tiles, videos as frames": ("sft", ("experiment=internvl_2_5_toy", "data.packing_tiles=12")),
    "steps of visual tokens": ("sft", ("experiment=internvl_3_toy", "decoder.visual_step=0.25", "decoder.visual_steps=null")),
    "Qwen3": ("cpt", ("experiment=internvl_3_5_toy",)),
    "any resolution, M-RoPE": ("sft", ("experiment=qwen2_vl_toy",)),
    "DeepStack, times of videos as text": ("long", ("experiment=qwen3_vl_toy",)),
    "windows, videos in seconds": ("long", ("experiment=qwen2_5_vl_toy",)),
    "grids of squares": ("supervised", ("experiment=llava_next_toy",)),
    "pooled frames": ("onevision", ("experiment=llava_onevision_toy", "decoder.config.model_type=llama")),
    "several pictures": ("supervised", ("experiment=internvl_chat_toy", *ALBUMS)),
    "a Q-Former that reads the question": ("supervised", ("experiment=instructblip_toy",)),
    "OPT": ("supervised", ("experiment=blip2_toy",)),
    "cross-attention to pictures": ("interleaved", ("experiment=flamingo_toy",)),
    "Partial LoRA": ("sft", ("experiment=xcomposer2_toy",)),
    "a tower pair": ("sft", ("experiment=deepseek_vl_toy",)),
    "Qwen": ("sft", ("experiment=qwen_vl_toy",)),
}


def assembled(stage: str, overrides: tuple[str, ...], folder: Path) -> Assembly:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("config", overrides=[*overrides, f"paths.run={folder}", "data.packing=true"])
    config = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    if stage not in config["stages"]:
        stage = config["pipeline"][-1]
    return assemble(stage_settings(config, stage), folder, build)


def samples_of(parts: Assembly, number: int = 7) -> list[dict[str, Any]]:
    """Samples of the recipe, and one without a picture among them."""
    found = [dict(parts.data.dataset[place]) for place in range(number)]
    turns = [{"role": "user", "content": "what is red?"}, {"role": "assistant", "content": "a red apple"}]
    found.insert(2, {"images": [], "conversation": turns, "key": "text"})
    return [parts.data.collate.prepare(sample) for sample in found]


def in_rows(parts: Assembly, samples: list[Any]) -> dict[str, Any]:
    return parts.data.collate.pack([samples[:3], samples[3:4], samples[4:]])


def gradients(parts: Assembly, batch: dict[str, Any]) -> tuple[float, Tensor]:
    parts.stage.zero_grad(set_to_none=True)
    loss = parts.stage.losses(batch)["next_token"]
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in parts.stage.parameters() if p.grad is not None]).double()


@pytest.mark.parametrize("system", RECIPES)
def test_packed_equals_padded_and_samples_do_not_see_each_other(system: str, tmp_path: Path) -> None:
    parts = assembled(*RECIPES[system], tmp_path)
    parts.stage.eval()
    with torch.no_grad():  # weights large enough for every token to matter to those behind it
        for name, parameter in parts.stage.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    samples = samples_of(parts)
    packed, padded = in_rows(parts, samples), parts.data.collate.stack(samples)
    assert packed["labels"].ne(-100).sum() == padded["labels"][:, 1:].ne(-100).sum()  # no state judges the first token

    (packed_loss, packed_grad), (padded_loss, padded_grad) = gradients(parts, packed), gradients(parts, padded)
    assert packed_loss == pytest.approx(padded_loss, rel=1e-5)
    assert float(torch.cosine_similarity(packed_grad, padded_grad, dim=0)) > 0.9999
    assert float((packed_grad - padded_grad).norm() / padded_grad.norm()) < 1e-5

    changed = [one if place != 4 else _changed(one) for place, one in enumerate(samples)]
    before, after = (_states(parts, in_rows(parts, some)) for some in (samples, changed))
    differ = [place for place, (x, y) in enumerate(zip(before, after, strict=True)) if not x.equal(y)]
    assert differ == [4]


def _changed(prepared: dict[str, Any]) -> dict[str, Any]:
    """The sample with other pictures and another text of the same length."""
    ids, labels = prepared["row"]
    other = [max(label - 1, 1) if label != -100 else token for token, label in zip(ids, labels, strict=True)]
    turns = [{**turn, "content": turn["content"].replace("e", "a")} for turn in prepared["conversation"]]
    pictures = [255 - picture for picture in prepared["pictures"]] if isinstance(prepared["pictures"], list) else None
    return {**prepared, "row": (other, labels), "conversation": turns, "pictures": pictures}


@torch.no_grad()
def _states(parts: Assembly, batch: dict[str, Any]) -> list[Tensor]:
    """What the decoder makes of each sample."""
    hidden, _ = parts.stage.model.hidden_states(**batch)
    return [x for row, lengths in zip(hidden, batch["segments"], strict=True) for x in row[: sum(lengths)].split(lengths)]


def test_an_encoder_decoder_is_refused_and_can_have_buckets(tmp_path: Path) -> None:
    recipe = ("experiment=instructblip_toy", "decoder=t5_toy", "data.chats_collate.template=instructblip_t5")
    with pytest.raises(ValueError, match=r"decoder HFSeq2SeqLM does not keep the samples of a row apart; choose data\.packing="):
        assembled("supervised", recipe, tmp_path)
