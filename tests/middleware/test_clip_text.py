"""CLIP's text tower: who speaks for a text, what padding does, bad input. Numbers: tests/checkpoints/test_clip.py."""

from __future__ import annotations

import pytest
import torch

from lightning_internvl.encoders.clip_vit import CLIPViT
from lightning_internvl.middleware.clip_text import CLIPText
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import ITC, SigLIP
from lightning_internvl.protocols import TextMiddleware

SIZES = {"encoder_dim": 16, "vocab_size": 30, "positions": 10, "dim": 12, "depth": 2, "heads": 3, "mlp_dim": 24, "embed_dim": 8}
IDS = torch.tensor([[5, 9, 29, 0, 0], [5, 29, 7, 6, 0]])
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])


def made(**options: object) -> CLIPText:
    torch.manual_seed(0)
    return CLIPText(**{**SIZES, "eos_token_id": 29, **options}).eval()


@pytest.mark.parametrize(
    ("options", "places"),
    [({}, [2, 1]), ({"pooling": "argmax"}, [2, 1]), ({"eos_token_id": 0}, [3, 4]), ({"pooling": "last"}, [4, 4])],
)
def test_the_token_that_speaks(options: dict[str, object], places: list[int]) -> None:
    middleware = made(**options)
    hidden = middleware.text_model(IDS, middleware._mask(IDS, MASK), False)
    expected = middleware.text_projection(hidden[torch.arange(2), torch.tensor(places)])
    assert isinstance(middleware, TextMiddleware)
    assert middleware.embed_text(IDS, MASK).equal(expected)


def test_the_largest_id_speaks_first_on_ties() -> None:
    middleware = made(pooling="argmax")
    once, twice = torch.tensor([[5, 29, 4, 3]]), torch.tensor([[5, 29, 4, 29]])
    assert middleware.embed_text(once).equal(middleware.embed_text(twice))


def test_padding_and_what_follows_the_end_do_not_count() -> None:
    middleware, more = made(), torch.tensor([[3, 3, 3]]).expand(2, -1)
    longer, mask = torch.cat([IDS, more], dim=1), torch.nn.functional.pad(MASK, (0, 3))
    short = middleware.embed_text(IDS, MASK)
    torch.testing.assert_close(middleware.embed_text(longer, mask), short)
    torch.testing.assert_close(middleware.embed_text(IDS), short)  # causal: nothing after the end token is seen
    left = torch.tensor([[0, 0, 5, 9, 29]]), torch.tensor([[0, 0, 1, 1, 1]])
    assert middleware.embed_text(*left).isfinite().all()


def test_without_causality_every_word_counts() -> None:
    middleware, other = made(causal=False, pooling="last"), IDS.clone()
    other[:, 0] = 17
    assert not middleware.embed_text(IDS).equal(middleware.embed_text(other))
    hidden = IDS.clone()
    hidden[0, 3] = 17  # behind the mask
    assert middleware.embed_text(hidden, MASK)[0].equal(middleware.embed_text(IDS, MASK)[0])


def test_pictures_are_their_first_token() -> None:
    middleware, feats = made(), [torch.randn(3, 5, 16)]
    assert middleware.embed_image(feats).equal(middleware.visual_projection(feats[0][:, 0]))
    plain = made(project_images=False, embed_dim=16)
    assert plain.embed_image(feats).equal(feats[0][:, 0])


@pytest.mark.parametrize("contrast", [ITC(), SigLIP()])
def test_logits_and_loss_of_a_whole_model(contrast: ITC | SigLIP) -> None:
    encoder = CLIPViT(image_size=12, patch_size=6, dim=16, depth=1, heads=2, mlp_dim=16)
    model = VLM(encoder, made(), objectives={"itc": contrast})
    inputs = {"input_ids": IDS, "attention_mask": MASK, "pixel_values": torch.randn(2, 3, 12, 12)}
    assert model(**inputs).loss is None
    output = model(**inputs, return_loss=True)
    image, text = model.encode_image(inputs["pixel_values"]), model.encode_text(IDS, MASK)
    torch.testing.assert_close(output.loss, contrast(image, text))
    assert output.logits_per_image.shape == (2, 2)
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "first"}, "choose from eos, argmax, last"),
        ({"eos_token_id": None}, "eos needs the end token's id"),
        ({"special_tokens": 0}, r"no token before its patches .*head=first"),
        ({"project_images": False}, "embed_dim=8 must be the encoder's width 16"),
    ],
)
def test_settings_that_do_not_fit(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**options)


def test_what_it_cannot_do() -> None:
    middleware = made()
    with pytest.raises(ValueError, match="choose another middleware"):
        middleware([torch.randn(1, 5, 16)])
    with pytest.raises(ValueError, match="mode 'c' alone, not in 'g'"):
        middleware.embed_image([torch.randn(1, 5, 16)], "g")
    with pytest.raises(ValueError, match="11 tokens: the text tower has positions for 10; lower max_length"):
        middleware.embed_text(torch.zeros(1, 11, dtype=torch.long))
    assert middleware.tokens_out(17) == 0
