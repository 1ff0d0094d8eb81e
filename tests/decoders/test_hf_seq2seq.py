"""Encoder-decoders: what they read and write, tied and untied tables, and a supervised loss without a shift."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_internvl.decoders.hf_seq2seq import HFSeq2SeqLM
from lightning_internvl.model.vlm import shifts_labels
from lightning_internvl.objectives import NextToken

CONFIG = {
    "model_type": "t5", "d_model": 16, "d_kv": 6, "d_ff": 20, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 2,
    "vocab_size": 30, "dropout_rate": 0.0,
}  # fmt: skip


def make(**change: object) -> HFSeq2SeqLM:
    torch.manual_seed(0)
    return HFSeq2SeqLM(config=CONFIG | change).eval()


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 30, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    return ids, mask, torch.tensor([[5, 6, 1, -100], [7, 8, 9, 1]])


@pytest.mark.parametrize("tied", [True, False])
def test_it_is_the_library_s_model(tied: bool) -> None:
    decoder, (ids, mask, labels) = make(tie_word_embeddings=tied), inputs()
    assert decoder.tied == tied
    expected = decoder.lm(inputs_embeds=decoder.embed(ids), attention_mask=mask, labels=labels)
    states = decoder.hidden(decoder.embed(ids), mask, labels=labels)
    torch.testing.assert_close(decoder.head(states), expected.logits)
    loss = NextToken()(states, labels, decoder.head, shifts=shifts_labels(decoder))
    torch.testing.assert_close(loss, expected.loss)
    assert (decoder.lm.lm_head.weight is decoder.lm.shared.weight) == tied
    assert decoder.lm.encoder.embed_tokens.weight is decoder.lm.shared.weight


def test_what_it_reads_may_be_given_instead_of_labels() -> None:
    decoder, (ids, mask, labels) = make(), inputs()
    shifted = torch.tensor([[0, 5, 6, 1], [0, 7, 8, 9]])
    given = decoder.hidden(decoder.embed(ids), mask, decoder_input_ids=shifted)
    torch.testing.assert_close(given, decoder.hidden(decoder.embed(ids), mask, labels=labels))
    with pytest.raises(ValueError, match="needs labels or decoder_input_ids"):
        decoder.hidden(decoder.embed(ids), mask)


def test_it_writes_new_tokens_only() -> None:
    decoder, (ids, mask, _) = make(), inputs()
    new = decoder.generate(decoder.embed(ids), mask, do_sample=False, max_new_tokens=5, min_new_tokens=5)
    assert new.shape == (2, 5)
    states = decoder.hidden(decoder.embed(ids), mask, decoder_input_ids=F.pad(new[:, :-1], (1, 0)))
    assert decoder.head(states)[:, 0].argmax(dim=-1).tolist() == new[:, 0].tolist()


def test_shapes_on_the_meta_device() -> None:
    with torch.device("meta"):
        decoder = HFSeq2SeqLM(config=CONFIG | {"tie_word_embeddings": False})
        ids, mask, labels = (x.to("meta") for x in inputs())
        assert decoder.head(decoder.hidden(decoder.embed(ids), mask, labels=labels)).shape == (2, 4, 30)


def test_blocks_of_both_stacks_are_sharded() -> None:
    assert len(make().sharding_units()) == 3


def test_label_smoothing_of_next_tokens() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 9), torch.tensor([[1, 2, 3, -100, 4], [-100, 5, -100, 6, 7]])
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1)
    torch.testing.assert_close(NextToken(label_smoothing=0.1)(logits, labels, lambda x: x), expected)
    with pytest.raises(ValueError, match=r"label_smoothing=1\.0"):
        NextToken(label_smoothing=1.0)
