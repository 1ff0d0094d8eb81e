"""Visual tokens are drawn to the words of captions, each to the word of what it shows, and nothing but the connector moves."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch

from lightning_internvl.data.gradient_accumulation import COUNTS
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.encoders.intern_vit import InternViT
from lightning_internvl.middleware.connector import MLPConnector
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import WordITC
from lightning_internvl.stages import WordStage
from lightning_internvl.stages.word_alignment import described_words, mean_of_distinct, mean_word, rarity, token_scores, variance
from lightning_internvl.training.optim import adamw, cosine

A, B, C, END = 5, 6, 7, 1
PICTURE, TOKENS = 39, 16  # a placeholder, and how many a picture takes


def stage(encoder: InternViT, folder: Path, train: tuple[str, ...] = ("middleware", "objectives")) -> WordStage:
    config = {
        "model_type": "llama", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }  # fmt: skip
    decoder = HFCausalLM(config=config)
    connector = MLPConnector(encoder_dim=encoder.dim, decoder_dim=16)
    model = VLM(encoder, connector, decoder, objectives={"itc": WordITC()}, image_token_id=PICTURE)
    return WordStage(
        model, name="words", run_dir=folder, parts={}, train=list(train), max_steps=3,
        optimizer=partial(adamw, lr=1e-2, weight_decay=0.0), scheduler=cosine,
    )  # fmt: skip


def batch() -> dict[str, torch.Tensor]:
    """Six pictures, a caption each."""
    words = torch.randint(38, (6, 5))
    labels = words.clone()
    labels[:, :2] = -100
    labels[3, 4] = -100
    return with_pictures(words, labels, [1] * 6) | {"pixel_values": torch.randn(6, 3, 16, 16)}


def with_pictures(words: torch.Tensor, labels: torch.Tensor, pictures: list[int]) -> dict[str, torch.Tensor]:
    """Rows that begin with the placeholders of so many pictures; shorter ones are filled up in the end."""
    width = max(pictures) * TOKENS
    before = torch.arange(width) < TOKENS * torch.tensor(pictures)[:, None]
    ids = torch.cat([torch.where(before, PICTURE, 38), words], dim=1)
    return {"input_ids": ids, "labels": torch.cat([torch.full_like(before, -100, dtype=torch.long), labels], dim=1)}


def test_only_what_is_learnt_is_a_word() -> None:
    ids = torch.tensor([[9, A, B, END], [9, C, END, 0]])
    labels = torch.tensor([[-100, A, B, END], [-100, C, END, -100]])
    for longest in (None, 3):
        assert described_words(ids, labels, longest).tolist() == [[A, B, END], [C, END, -1]]


def test_means_and_variances_are_those_of_what_is_taken_out() -> None:
    ids, words = torch.tensor([[A, A, B], [B, C, -1]]), torch.randn(2, 3, 4)
    words[0, 1], words[1, 0] = words[0, 0], words[0, 2]  # of equal words
    once = torch.stack([words[0, 0], words[0, 2], words[1, 1]])
    torch.testing.assert_close(mean_of_distinct(words, ids), once.mean(dim=0))
    torch.testing.assert_close(variance(words, ids > A), words[ids > A].var())


def test_a_word_of_every_caption_says_nothing() -> None:
    found = rarity(torch.tensor([[A, A, END], [A, B, END], [C, END, -1]]))
    expected = [[math.log(3 / 2), math.log(3 / 2), 0.0], [math.log(3 / 2), math.log(3), 0.0], [math.log(3), 0.0, -1.0]]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_mean_words_leave_out_what_all_captions_share() -> None:
    words = torch.tensor([[[1.0, 0.0], [5.0, 5.0], [9.0, 9.0]]])
    torch.testing.assert_close(mean_word(words, torch.tensor([[2.0, 0.0, -1.0]])), torch.tensor([[1.0, 0.0]]))


def test_scores_take_the_best_of_each() -> None:
    seen = torch.eye(3)[None, :2]  # one picture shows things 0 and 1
    words = torch.eye(3)[torch.tensor([[0, 1], [0, 2]])]  # one caption names both, another one names 0 and 2
    rare = torch.ones(2, 2)
    there = torch.ones(1, 2, dtype=torch.bool)
    by_seen, by_word = token_scores(seen, words, rare, rare > 0, there)
    assert by_seen.tolist() == by_word.tolist() == [[1.0, 0.5]]
    by_seen, _ = token_scores(seen, words, rare, torch.tensor([[True, False], [True, True]]), there)
    assert by_seen.tolist() == [[0.5, 0.5]]
    more = torch.cat([seen, torch.eye(3)[None, 2:]], dim=1)  # a third token that is not there
    for found, known in zip(
        token_scores(more, words, rare, rare > 0, torch.tensor([[True, True, False]])), (by_word, by_word), strict=True
    ):
        assert found.equal(known)


@pytest.mark.parametrize("name", ["itc", "tokens", "distance"])
def test_the_connector_alone_moves_and_comes_near_the_words(name: str, encoder: InternViT, tmp_path: Path) -> None:
    torch.manual_seed(0)
    words, seen = stage(encoder, tmp_path), batch()
    words.plan.apply(words.model, 0)
    optimizer = words.configure_optimizers()["optimizer"]
    before = {n: tensor.detach().clone() for n, tensor in words.model.named_parameters()}
    first = words.losses(seen)[name].item()
    for _ in range(60):
        optimizer.zero_grad()
        words.losses(seen)[name].backward()
        optimizer.step()
    assert words.losses(seen)[name].item() < 0.5 * first
    moved = {n for n, tensor in words.model.named_parameters() if not tensor.equal(before[n])}
    assert all(n.startswith(("middleware.", "objectives.")) for n in moved)
    assert any(n.startswith("middleware.") for n in moved)


def test_words_move_too_where_their_table_trains_but_not_to_lie_where_tokens_are(encoder: InternViT, tmp_path: Path) -> None:
    words, seen = stage(encoder, tmp_path, ("middleware", "decoder.lm.model.embed_tokens", "objectives")), batch()
    words.plan.apply(words.model, 0)
    table = words.model.decoder.lm.get_input_embeddings().weight
    losses = words.losses(seen)
    losses["distance"].backward(retain_graph=True)
    assert not table.grad.any()  # tokens are drawn to words, at their length
    losses["tokens"].backward()
    assert table.grad.abs().sum() > 0


def test_several_pictures_of_a_sample_are_compared_together_and_text_alone_is_not_judged(
    encoder: InternViT, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    words, plain = stage(encoder, tmp_path), batch()
    pixels, said, labels = plain["pixel_values"], plain["input_ids"][:, TOKENS:], plain["labels"][:, TOKENS:]
    alone = words.losses(plain)
    twice = with_pictures(said, labels, [2] * 6) | {"pixel_values": pixels.repeat_interleave(2, dim=0)}
    for name, value in words.losses(twice).items():  # the same picture twice says what it says once
        torch.testing.assert_close(value, alone[name])
    some = words.losses(with_pictures(said, labels, [1, 2, 0, 1, 0, 2]) | {"pixel_values": pixels})
    seen = [parameter for name, parameter in words.model.named_parameters() if name.startswith("middleware.")]
    for name, value in some.items():
        assert 0 < value < math.inf, name
        grads = torch.autograd.grad(value, seen, retain_graph=True)
        assert 0 < sum(one.abs().sum() for one in grads) < math.inf
    none = words.losses(with_pictures(said, labels, [0] * 6) | {"pixel_values": pixels[:0]})
    assert none["tokens"] == none["distance"] == 0
    assert none["itc"].isfinite()


def test_what_every_caption_says_draws_nothing(encoder: InternViT, tmp_path: Path) -> None:
    same = torch.tensor([[A, B, END]] * 6)
    found = stage(encoder, tmp_path).losses(with_pictures(same, same, [1] * 6) | {"pixel_values": torch.randn(6, 3, 16, 16)})
    assert all(value.isfinite() for value in found.values())
    assert found["distance"] == 0


def test_sizes_that_the_host_knows_change_nothing(encoder: InternViT, tmp_path: Path) -> None:
    words, seen = stage(encoder, tmp_path), batch()
    counts = words.counts(seen)
    assert counts == {"words": 3, "placeholders": TOKENS}
    for name, value in words.losses({**seen, COUNTS: counts}).items():
        assert value.equal(words.losses(seen)[name])


def test_rows_are_as_wide_as_the_widest_of_another_process(encoder: InternViT, tmp_path: Path) -> None:
    model, seen = stage(encoder, tmp_path).model, batch()
    most = seen["input_ids"].shape[1] + 5
    tokens, shown = model.visual_in_rows(most, **seen)
    known, there = model.visual_in_rows(TOKENS, **seen)
    assert tokens.shape[:2] == shown.shape == (6, most)
    assert tokens[:, :TOKENS].equal(known)
    assert there.all()
    assert shown.sum(dim=1).tolist() == [TOKENS] * 6
