"""Composition: where visual tokens go, and what a batch without images does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.encoders.intern_vit import InternViT
from lightning_internvl.middleware.connector import MLPConnector
from lightning_internvl.middleware.qllama import QLLaMA
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import ITC, ITM, NextToken

IMAGE = 22
TOKENS = 20  # 4 queries and 16 patches
LLAMA = {
    "model_type": "llama",
    "hidden_size": 12,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 23,
}


@pytest.fixture
def chat(encoder: InternViT) -> VLM:
    middleware = QLLaMA(
        encoder_dim=24, decoder_dim=12, vocab_size=31, dim=16, depth=2, heads=2, mlp_dim=24, num_queries=4, embed_dim=8,
        pool_heads=2, patch_layer=-2,
    )  # fmt: skip
    return VLM(encoder, middleware, HFCausalLM(config=LLAMA), image_token_id=IMAGE)


@pytest.fixture
def contrastive(encoder: InternViT, qllama: QLLaMA) -> VLM:
    return VLM(encoder, qllama, objectives={"itc": ITC(), "itm": ITM(dim=16), "itg": NextToken()})


def conversation(*images: int) -> Tensor:
    """One row for each entry, with the placeholders of so many images after its first token; padded on the right."""
    rows = [[5, *[IMAGE] * (TOKENS * count), 7, 8] for count in images]
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


def test_visual_tokens_take_the_places_of_their_own_row(chat: VLM) -> None:
    ids, pixels = conversation(2, 0, 1), torch.randn(3, 3, 16, 16)
    embeds, visual = chat.embed(ids, pixels), chat.visual_tokens(pixels)
    assert visual.shape == (3, TOKENS, 12)
    last, second = chat.encoder(pixels, layers=(-1,))[0], chat.encoder(pixels, layers=(-2,))[0]
    torch.testing.assert_close(visual, chat.middleware([last, second]))
    torch.testing.assert_close(embeds[0, 1 : 1 + 2 * TOKENS], visual[:2].flatten(0, 1))
    torch.testing.assert_close(embeds[2, 1 : 1 + TOKENS], visual[2])
    text = ids != IMAGE
    torch.testing.assert_close(embeds[text], chat.decoder.embed(ids)[text])


@pytest.mark.parametrize(("held", "given"), [(2, 1), (0, 1), (1, 2), (1, 0)])
def test_placeholders_and_images_that_differ_are_an_error(chat: VLM, held: int, given: int) -> None:
    with pytest.raises(
        ValueError, match=rf"{given} image\(s\) give {given * TOKENS} visual tokens.*\({held * TOKENS} placeholders\)"
    ):
        chat.embed(conversation(held), torch.randn(given, 3, 16, 16))


def with_gradient(model: VLM, ids: Tensor, pixels: Tensor) -> set[str]:
    model.zero_grad()
    model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=pixels,
        labels=ids.masked_fill(ids == IMAGE, -100),
    ).loss.backward()
    return {name for name, p in model.named_parameters() if p.grad is not None}


def test_a_batch_of_text_keeps_the_visual_parts_in_the_graph(chat: VLM) -> None:
    with_images = with_gradient(chat, conversation(1, 1), torch.randn(2, 3, 16, 16))
    assert {"encoder.embeddings.class_embedding", "middleware.query_tokens", "middleware.mlp1.0.weight"} <= with_images
    text = conversation(0, 0)
    assert with_gradient(chat, text, torch.empty(0, 3, 16, 16)) == with_images
    assert all(not p.grad.any() for n, p in chat.named_parameters() if p.grad is not None and not n.startswith("decoder"))
    torch.testing.assert_close(chat.embed(text, torch.empty(0, 3, 16, 16)), chat.decoder.embed(text))


def test_logits_and_loss_with_a_decoder(chat: VLM) -> None:
    ids, pixels = conversation(1), torch.randn(1, 3, 16, 16)
    labels = ids.masked_fill(ids == IMAGE, -100)
    out = chat(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, labels=labels)
    assert out.logits.shape == (1, ids.shape[1], 23)
    expected = torch.nn.functional.cross_entropy(out.logits[0, -3:-1], ids[0, -2:])
    torch.testing.assert_close(out.loss, expected)
    assert chat(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels).loss is None


def test_answers_are_new_tokens_and_depend_on_the_image(chat: VLM) -> None:
    ids, pixels = conversation(1), torch.randn(2, 3, 16, 16) * 5
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    answer = chat.generate(pixel_values=pixels[:1], input_ids=ids, **options)
    assert answer.shape == (1, 5)
    assert chat.generate(pixel_values=pixels[:1], input_ids=ids, attention_mask=torch.ones_like(ids), **options).equal(answer)
    logits = [chat(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=p[None]).logits for p in pixels]
    assert not torch.allclose(*logits)


@pytest.mark.parametrize("mode", ["c", "g"])
def test_similarities_without_a_decoder(contrastive: VLM, mode: str) -> None:
    pixels, ids = torch.randn(2, 3, 16, 16), torch.randint(1, 31, (3, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
    out = contrastive(input_ids=ids, attention_mask=mask, pixel_values=pixels, mode=mode)
    cosine = torch.cosine_similarity(contrastive.encode_image(pixels, mode)[:, None], contrastive.encode_text(ids, mask), dim=-1)
    torch.testing.assert_close(out.logits_per_image, cosine / 0.07)
    assert out.logits_per_text.equal(out.logits_per_image.T)
    assert out.loss is None


def test_captions_without_a_decoder(contrastive: VLM) -> None:
    pixels, prompt = torch.randn(2, 3, 16, 16), torch.tensor([[4, 9], [4, 9]])
    captions = contrastive.generate(pixel_values=pixels, input_ids=prompt, max_new_tokens=4, eos_id=99)
    expected = contrastive.middleware.generate(contrastive.encoder(pixels)[0], prompt, max_new_tokens=4, eos_id=99)
    assert captions.equal(expected)


def test_no_parameter_is_a_scalar(contrastive: VLM) -> None:
    assert all(p.ndim > 0 for p in contrastive.parameters()), "sharding refuses scalars"


def test_the_plain_connector_composes_too(encoder: InternViT) -> None:
    model = VLM(encoder, MLPConnector(encoder_dim=24, decoder_dim=12), HFCausalLM(config=LLAMA), image_token_id=IMAGE)
    ids = torch.tensor([[5, *[IMAGE] * 16, 7]])
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=torch.randn(1, 3, 16, 16))
    assert out.logits.shape == (1, 18, 23)
