"""CLIP and SigLIP: live against transformers, in both directions, and under OpenAI's names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from lightning_internvl import load_pretrained
from lightning_internvl.checkpoints.adapters import clip_openai

EOS = 49
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = SIZES | {"vocab_size": 50, "max_position_embeddings": 12, "pad_token_id": 1, "bos_token_id": 0}
VISION = SIZES | {"hidden_size": 24, "num_hidden_layers": 3, "image_size": 24, "patch_size": 6}


def randomised(model: nn.Module) -> nn.Module:
    """Every number drawn anew, so that none is 0 or 1."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2).add_(1.0 if parameter.ndim == 1 else 0.0)
    return model.eval()


def their_clip(act: str = "quick_gelu", eos: int = EOS, **text: int) -> CLIPModel:
    config = CLIPConfig(
        text_config=TEXT | {"hidden_act": act, "eos_token_id": eos} | text,
        vision_config=VISION | {"hidden_act": act},
        projection_dim=20,
    )
    return randomised(CLIPModel(config))


def their_siglip(**vision: object) -> SiglipModel:
    width = {"hidden_size": 32}
    config = SiglipConfig(text_config=TEXT | width | {"eos_token_id": EOS}, vision_config=VISION | width | vision)
    return randomised(SiglipModel(config))


def texts(*lengths: int) -> dict[str, Tensor]:
    """Rows of that many tokens, the end token last, filled up on the right."""
    ids, mask = (
        torch.ones(len(lengths), max(lengths), dtype=torch.long),
        torch.zeros(len(lengths), max(lengths), dtype=torch.long),
    )
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(2, EOS, (length,))
        ids[row, length - 1], mask[row, :length] = EOS, 1
    return {"input_ids": ids, "attention_mask": mask}


def close(ours: Tensor, theirs: Tensor) -> None:
    assert float((ours - theirs).detach().abs().max()) <= 1e-5 * float(theirs.detach().abs().max()) + 1e-7


def same_state(ours: nn.Module, theirs: nn.Module) -> None:
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    assert all(tensor.equal(other[name]) for name, tensor in mine.items())


@pytest.mark.parametrize(("act", "eos"), [("quick_gelu", EOS), ("gelu", EOS), ("quick_gelu", 2)])
def test_clip_both_ways(tmp_path: Path, act: str, eos: int) -> None:
    torch.manual_seed(0)
    theirs = their_clip(act, eos)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs")
    inputs = texts(5, 9, 7) | {"pixel_values": torch.randn(3, 3, 24, 24)}
    expected, found = theirs(**inputs, return_loss=True), ours(**inputs, return_loss=True)
    for name in ("loss", "logits_per_image", "logits_per_text"):
        close(getattr(found, name), getattr(expected, name))
    close(ours.encode_image(inputs["pixel_values"]), theirs.get_image_features(inputs["pixel_values"]).pooler_output)
    words = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    close(ours.encode_text(**words), theirs.get_text_features(**words).pooler_output)

    ours.save_pretrained(tmp_path / "ours")
    back = CLIPModel.from_pretrained(tmp_path / "ours").eval()
    same_state(back, theirs)
    assert back(**inputs).logits_per_image.equal(theirs(**inputs).logits_per_image)


def test_clip_reads_padding_on_the_left_and_other_picture_sizes(tmp_path: Path) -> None:
    torch.manual_seed(1)
    theirs = their_clip()
    theirs.save_pretrained(tmp_path)
    ours, words = load_pretrained(tmp_path), texts(5, 9)
    words = {name: tensor.flip(1) for name, tensor in words.items()}
    words["input_ids"][:, -1] = EOS
    close(ours.encode_text(**words), theirs.get_text_features(**words).pooler_output)
    pixels = torch.randn(2, 3, 36, 18)
    expected = theirs.get_image_features(pixels, interpolate_pos_encoding=True).pooler_output
    close(ours.encode_image(pixels), expected)
    with pytest.raises(ValueError, match="13 tokens: the text tower has positions for 12"):
        ours.encode_text(torch.zeros(1, 13, dtype=torch.long), torch.ones(1, 13, dtype=torch.long))


def test_clip_resized_equals_clip_interpolating(tmp_path: Path) -> None:
    torch.manual_seed(2)
    their_clip().save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 36, 36)
    resized = load_pretrained(tmp_path, image_size=36)
    close(resized.encode_image(pixels), load_pretrained(tmp_path).encode_image(pixels))
    assert resized.encoder.num_tokens() == 37


@pytest.mark.parametrize("act", ["gelu_pytorch_tanh", "gelu"])
def test_siglip_both_ways(tmp_path: Path, act: str) -> None:
    torch.manual_seed(3)
    theirs = their_siglip(hidden_act=act)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs")
    words = texts(12, 12, 12)
    for mask in (torch.ones_like(words["input_ids"]), texts(7, 12, 9)["attention_mask"]):
        inputs = {"input_ids": words["input_ids"], "attention_mask": mask, "pixel_values": torch.randn(3, 3, 24, 24)}
        expected, found = theirs(**inputs, return_loss=True), ours(**inputs, return_loss=True)
        for name in ("loss", "logits_per_image", "logits_per_text"):
            close(getattr(found, name), getattr(expected, name))
    close(ours.encode_image(inputs["pixel_values"]), theirs.get_image_features(inputs["pixel_values"]).pooler_output)

    ours.save_pretrained(tmp_path / "ours")
    back = SiglipModel.from_pretrained(tmp_path / "ours").eval()
    same_state(back, theirs)
    assert back(**inputs).logits_per_image.equal(theirs(**inputs).logits_per_image)


def test_a_side_that_the_patches_do_not_divide(tmp_path: Path) -> None:
    """As google/siglip-so400m-patch14-384 has it: 27 x 27 patches, six pixels are left out."""
    torch.manual_seed(8)
    theirs = their_siglip(image_size=29)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, pixels = load_pretrained(tmp_path / "theirs"), torch.randn(2, 3, 29, 29)
    assert (ours.encoder.image_size, ours.encoder.num_tokens()) == (29, 17)
    close(ours.encode_image(pixels), theirs.get_image_features(pixels).pooler_output)
    ours.save_pretrained(tmp_path / "ours")
    same_state(SiglipModel.from_pretrained(tmp_path / "ours"), theirs)


def test_siglip_has_the_same_gradients(tmp_path: Path) -> None:
    torch.manual_seed(4)
    theirs = their_siglip()
    theirs.save_pretrained(tmp_path)
    ours, inputs = load_pretrained(tmp_path), texts(12, 12, 12) | {"pixel_values": torch.randn(3, 3, 24, 24)}
    theirs(**inputs, return_loss=True).loss.backward()
    ours(**inputs, return_loss=True).loss.backward()
    expected = dict(theirs.named_parameters())
    close(ours.objectives["itc"].logit_bias.grad, expected["logit_bias"].grad)
    close(ours.middleware.text_projection.weight.grad, expected["text_model.head.weight"].grad)
    close(ours.encoder.head.probe.grad, expected["vision_model.head.probe"].grad)


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip without a head"])
def test_a_tower_alone(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(5)
    config, model = (CLIPVisionConfig, CLIPVisionModel) if kind == "clip" else (SiglipVisionConfig, SiglipVisionModel)
    options = {"vision_use_head": False} if kind == "siglip without a head" else {}
    theirs = randomised(model(config(**VISION, **options)))
    theirs.save_pretrained(tmp_path / "theirs")
    ours, pixels = load_pretrained(tmp_path / "theirs"), torch.randn(2, 3, 24, 24)
    (states,), expected = ours.encoder(pixels), theirs(pixels)
    if expected.pooler_output is not None:
        close(states[:, 0], expected.pooler_output)
    first = ours.encoder.special_tokens
    close(states[:, first:], expected.last_hidden_state[:, 1 if kind == "clip" else 0 :])

    ours.save_pretrained(tmp_path / "ours")
    back = model.from_pretrained(tmp_path / "ours").eval()
    same_state(back, theirs)
    assert back(pixels).last_hidden_state.equal(expected.last_hidden_state)


def test_openai_names_both_ways(tmp_path: Path) -> None:
    torch.manual_seed(6)
    config = their_clip(num_attention_heads=1).config
    config.vision_config.num_attention_heads = 1
    theirs = randomised(CLIPModel(config))
    theirs.save_pretrained(tmp_path / "theirs")
    native = load_pretrained(tmp_path / "theirs")
    native.save_pretrained(tmp_path / "clip.pth")
    state = torch.load(tmp_path / "clip.pth", weights_only=True)
    assert state["visual.proj"].equal(theirs.visual_projection.weight.T)
    assert state["text_projection"].shape == (32, 20)
    attention = theirs.vision_model.encoder.layers[0].self_attn
    rows = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    assert state["visual.transformer.resblocks.0.attn.in_proj_weight"].equal(rows)
    assert state["logit_scale"].shape == ()

    notes = {"input_resolution": torch.tensor(24), "context_length": torch.tensor(12), "vocab_size": torch.tensor(50)}
    torch.save(state | notes, tmp_path / "clip.pt")
    ours, inputs = load_pretrained(tmp_path / "clip.pt"), texts(5, 9, 7) | {"pixel_values": torch.randn(3, 3, 24, 24)}
    close(ours(**inputs).logits_per_image, theirs(**inputs).logits_per_image)
    again = clip_openai.LAYOUT.official_tensors({}, ours.state_dict())
    assert again.keys() == state.keys()
    assert all(tensor.equal(state[name]) for name, tensor in again.items())
    ours.save_pretrained(tmp_path / "back")  # of the largest id: end token 2 in the library
    close(CLIPModel.from_pretrained(tmp_path / "back").eval()(**inputs).logits_per_image, theirs(**inputs).logits_per_image)


def test_heads_come_from_a_config_beside_a_state_dict(tmp_path: Path) -> None:
    torch.manual_seed(7)
    theirs = their_clip()
    theirs.save_pretrained(tmp_path / "theirs")
    state = clip_openai.LAYOUT.official_tensors({}, load_pretrained(tmp_path / "theirs").state_dict())
    torch.save(state, tmp_path / "theirs" / "clip.pt")
    inputs = texts(5, 9, 7) | {"pixel_values": torch.randn(3, 3, 24, 24)}
    ours = load_pretrained(tmp_path / "theirs" / "clip.pt")
    close(ours(**inputs).logits_per_image, theirs(**inputs).logits_per_image)


def test_settings_that_the_parts_lack_are_refused_by_name(tmp_path: Path) -> None:
    theirs = their_clip()
    theirs.config.vision_config.attention_dropout = 0.1
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"vision_config.attention_dropout=0.1 is not supported"):
        load_pretrained(tmp_path)


def test_an_end_token_that_the_library_would_misread_is_not_saved(tmp_path: Path) -> None:
    their_clip().save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs")
    ours.middleware.eos_token_id = 2
    with pytest.raises(ValueError, match="no layout of a folder is known"):
        ours.save_pretrained(tmp_path / "ours")
