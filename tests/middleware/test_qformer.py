"""The Q-Former: who sees whom, one pass for several texts, writing with and without a cache, instructions, a start from BERT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

from lightning_internvl.middleware.qformer import QFormer, apart_mask
from lightning_internvl.middleware.text_streams import TextStream

Q, P, L = 3, 5, 6


def make(**change: object) -> QFormer:
    torch.manual_seed(0)
    settings = {
        "encoder_dim": 10, "dim": 16, "depth": 3, "heads": 2, "mlp_dim": 20, "num_queries": Q, "vocab_size": 30, "embed_dim": 8,
        "text": "write", "max_positions": 12, "init_std": 0.3,
    }  # fmt: skip
    return QFormer(**settings | change).eval()


def visual(rows: int = 2) -> Tensor:
    return torch.randn(rows, P, 10, generator=torch.Generator().manual_seed(1))


def stream(task: str, lengths: tuple[int, ...] = (L, 4), seed: int = 2) -> TextStream:
    ids = torch.randint(0, 30, (len(lengths), L), generator=torch.Generator().manual_seed(seed))
    return TextStream(task, ids, (torch.arange(L) < torch.tensor(lengths)[:, None]).long())


def changed(s: TextStream, row: int, place: int) -> TextStream:
    ids = s.ids.clone()
    ids[row, place] = (ids[row, place] + 7) % 30
    return s._replace(ids=ids)


def moved(model: QFormer, s: TextStream, place: int) -> tuple[bool, list[int]]:
    """Whether the queries and which texts' places of row 0 change with one token of it."""
    (before,), (after,) = model.stream_states(visual(), [s]), model.stream_states(visual(), [changed(s, 0, place)])
    differ = [(a - b).abs().amax(dim=-1)[0] > 1e-6 for a, b in zip(before, after, strict=True)]
    return bool(differ[0].any()), differ[1].nonzero().flatten().tolist()


def test_who_sees_whom() -> None:
    model = make()
    assert moved(model, stream("itm"), 2) == (True, list(range(L)))
    assert moved(model, stream("itc"), 2) == (False, list(range(L)))
    assert moved(model, stream("itg"), 2) == (False, list(range(2, L)))
    (_, seen), (_, other) = (model.stream_states(v, [stream("itc")])[0] for v in (visual(), visual() + 1))
    assert seen.equal(other)  # a text of itc sees no picture
    (_, seen), (_, other) = (model.stream_states(v, [stream("itg")])[0] for v in (visual(), visual() + 1))
    assert not torch.allclose(seen, other)


def test_padding_is_seen_by_no_one() -> None:
    model = make()
    for task in ("itm", "itc", "itg"):
        s = stream(task, (4, 4))
        (queries, text), (same_queries, same_text) = (model.stream_states(visual(), [x])[0] for x in (s, changed(s, 0, 5)))
        torch.testing.assert_close(queries, same_queries)
        torch.testing.assert_close(text[:, :4], same_text[:, :4])


def test_texts_read_together_are_as_if_read_alone() -> None:
    model, streams = make(), [stream("itc"), stream("itm", seed=3), stream("itg", seed=4)]
    together = model.stream_states(visual(), streams)
    for found, s in zip(together, streams, strict=True):
        (alone,) = model.stream_states(visual(), [s])
        for ours, expected in zip(found, alone, strict=True):
            torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(together[0][0], model.query(visual()))
    embedded = torch.nn.functional.normalize(model.project_text(together[0][1], streams[0].mask), dim=-1)
    torch.testing.assert_close(embedded, model.embed_text(streams[0].ids, streams[0].mask))


def test_mask_of_one_row() -> None:
    mask = apart_mask(
        1, [TextStream("itc", *[torch.tensor([[1, 1, 0]])] * 2), TextStream("itg", *[torch.tensor([[1, 1, 0]])] * 2)]
    )
    expected = [
        [1, 0, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0],
        [1, 0, 0, 0, 1, 0, 0], [1, 0, 0, 0, 1, 1, 0], [1, 0, 0, 0, 1, 1, 0],
    ]  # fmt: skip
    assert mask[0, 0].int().tolist() == expected


def test_written_tokens_are_those_that_reading_all_again_would_choose() -> None:
    model, prompt = make(), torch.tensor([[1, 2], [1, 3]])
    new = model.generate(visual(), prompt, max_new_tokens=5, eos_id=29, min_new_tokens=5)
    ids = prompt
    for step in range(5):
        ((_, text),) = model.stream_states(visual(), [TextStream("itg", ids, torch.ones_like(ids))])
        scores = model.head(text[:, -1])
        scores[:, 29] = -torch.inf
        assert scores.argmax(dim=-1).tolist() == new[:, step].tolist()
        ids = torch.cat([ids, new[:, step : step + 1]], dim=1)
    assert model.generate(visual(), prompt, max_new_tokens=5, eos_id=29, num_beams=3).shape[0] == 2


def test_an_instruction_changes_what_the_queries_say() -> None:
    model = make(text="read", embed_dim=None, decoder_dim=12, instructed=True)
    s = stream("itm")
    given = {"qformer_input_ids": s.ids, "qformer_attention_mask": s.mask}
    tokens = model([visual()], **given)
    assert tokens.shape == (2, Q, 12)
    assert model.tokens_out(P) == Q
    assert model.inputs == tuple(given)
    assert not torch.allclose(tokens[0], model([visual()], **given | {"qformer_input_ids": changed(s, 0, 0).ids})[0])
    assert model([visual(1)], qformer_input_ids=s.ids[:0], qformer_attention_mask=s.mask[:0]).shape == (1, Q, 12)
    with pytest.raises(ValueError, match="needs qformer_input_ids"):
        model([visual()])
    with pytest.raises(ValueError, match="2 pictures need as many rows of qformer_input_ids, but there are 1"):
        model([visual()], qformer_input_ids=s.ids[:1])


def test_without_text_nothing_of_it_is_built() -> None:
    model = make(text="none", embed_dim=None, decoder_dim=12, num_queries=64, vision_norm_eps=None)
    assert model([visual()]).shape == (2, 64, 12)
    assert not any(word in name for name in model.state_dict() for word in ("words", "positions", "text_", "head", "ln_vision"))
    model([visual()]).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": "sing"}, "text='sing' is not known; valid choices: none, read, write"),
        ({"dim": 15}, "dim=15 must divide by heads=2"),
        ({"vocab_size": None}, "needs a tokenizer, or vocab_size"),
        ({"text": "none"}, "need a Q-Former that reads text"),
        ({"act": "loud"}, "act='loud' is not known"),
    ],
)
def test_bad_settings(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**change)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="built without a decoder"):
        make()([visual()])
    long = torch.ones(1, 13, dtype=torch.long)
    with pytest.raises(ValueError, match="a text of 13 tokens is longer than the 12 positions"):
        make().embed_text(long, long)


def test_dropout_acts_in_training_only() -> None:
    model = make(dropout=0.3, attention_dropout=0.3)
    assert model.query(visual()).equal(model.query(visual()))
    model.train()
    assert not model.query(visual()).equal(model.query(visual()))


def test_it_works_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = QFormer(encoder_dim=10, vocab_size=30, text="write", embed_dim=8, pretrained="nowhere")
        ids = torch.ones(2, L, dtype=torch.long)
        reads = model.stream_states(torch.empty(2, P, 10), [TextStream(task, ids, ids) for task in ("itm", "itc", "itg")])
    assert reads[2][1].shape == (2, L, 768)


def test_a_start_from_bert(tmp_path: Path) -> None:
    torch.manual_seed(5)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 20}
    bert = BertForMaskedLM(BertConfig(vocab_size=28, max_position_embeddings=12, type_vocab_size=1, **sizes)).eval()
    with torch.no_grad():
        bert.bert.embeddings.token_type_embeddings.weight.zero_()  # the Q-Former knows no types
    bert.save_pretrained(tmp_path)
    model, s = make(pretrained=str(tmp_path)), stream("itc")
    ids = s.ids.clamp(max=27)
    states, _ = model.qformer(model.qformer.embed_text(ids), queries=0, mask=s.mask.bool()[:, None, None])
    expected = bert(input_ids=ids, attention_mask=s.mask).logits
    torch.testing.assert_close(model.head(states)[..., :28][s.mask.bool()], expected[s.mask.bool()], atol=1e-5, rtol=1e-4)
    layer = model.qformer.layers[0]
    assert layer.query_ffn.up.weight.equal(layer.text_ffn.up.weight)
    with pytest.raises(
        ValueError, match=r"of depth, width and feed-forward \(3, 16, 20\) cannot start a Q-Former of \(2, 16, 20\)"
    ):
        make(pretrained=str(tmp_path), depth=2)
