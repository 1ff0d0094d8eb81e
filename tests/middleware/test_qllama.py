"""QLLaMA: who sees whom, padding, captions with a cache, tokens for a decoder. tests/parity compares its numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_internvl.middleware.qllama import QLLaMA, Task, TextStream, task_mask
from lightning_internvl.protocols import TextMiddleware

TASKS: tuple[Task, ...] = ("itm", "itc", "itg")
SIZES = {
    "encoder_dim": 24,
    "vocab_size": 31,
    "dim": 16,
    "depth": 4,
    "heads": 2,
    "mlp_dim": 24,
    "num_queries": 4,
    "embed_dim": 8,
    "pool_heads": 2,
}


@pytest.fixture
def visual() -> Tensor:
    return torch.randn(3, 17, 24)


def texts(*lengths: int, width: int = 7, first: int = 1) -> tuple[Tensor, Tensor]:
    """Random ids, padded with 0 to `width`, and their mask."""
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return torch.randint(first, 31, mask.shape) * mask, mask


# Two queries, then a text of two tokens and one of padding. A row looks at the columns marked x.
SEES = {
    "itm": ["xxxx.", "xxxx.", "xxxx.", "xxxx.", "xxxx."],
    "itc": ["xx...", "xx...", "..x..", "..xx.", "..xx."],
    "itg": ["xx...", "xx...", "xxx..", "xxxx.", "xxxx."],
}


@pytest.mark.parametrize("task", TASKS)
def test_task_mask(task: Task) -> None:
    mask = task_mask(task, 2, torch.tensor([[1, 1, 0], [1, 1, 1]]))
    assert mask.shape == (2, 1, 5, 5)
    assert ["".join("x" if seen else "." for seen in row) for row in mask[0, 0].tolist()] == SEES[task]
    unpadded = mask[1, 0].clone()
    assert unpadded[-1, -1]
    assert unpadded[:, :4].equal(mask[0, 0, :, :4])


def test_protocol_shapes_and_layers(qllama: QLLaMA, visual: Tensor) -> None:
    assert isinstance(qllama, TextMiddleware)
    assert qllama.layers == (-1,)
    assert qllama.query(visual).shape == (3, 4, 16)
    assert qllama.embed_text(*texts(3, 7, 5)).shape == (3, 8)
    assert len(qllama.sharding_units()) == 4
    reads = qllama.stream_states(visual, [TextStream(task, *texts(3, 7, 5)) for task in TASKS])
    assert [(q.shape, t.shape) for q, t in reads] == [((3, 4, 16), (3, 7, 16))] * 3


@pytest.mark.parametrize(("every", "crossing"), [(1, [0, 1, 2, 3]), (2, [0, 2]), (3, [0, 3])])
def test_cross_attention_stands_in_every_kth_layer(every: int, crossing: list[int]) -> None:
    layers = QLLaMA(**SIZES, cross_every=every).qllama.model.layers
    assert [i for i, layer in enumerate(layers) if layer.cross_attn is not None] == crossing


def test_streams_read_together_equal_streams_read_alone(qllama: QLLaMA, visual: Tensor) -> None:
    streams = [
        TextStream("itm", *texts(4, 2, 5, width=5)),
        TextStream("itc", *texts(7, 3, 1)),
        TextStream("itg", *texts(2, 6, 3, width=6)),
    ]
    for stream, together in zip(streams, qllama.stream_states(visual, streams), strict=True):
        (alone,) = qllama.stream_states(visual, [stream])
        seen = stream.mask.bool()
        torch.testing.assert_close(together[0], alone[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(together[1][seen], alone[1][seen], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("task", TASKS)
def test_more_padding_and_what_stands_in_it_change_nothing(qllama: QLLaMA, visual: Tensor, task: Task) -> None:
    ids, mask = texts(4, 7, 2)
    padded, padded_mask = F.pad(ids, (0, 5), value=9), F.pad(mask, (0, 5))
    (short,), (long,) = (
        qllama.stream_states(visual, [TextStream(task, ids, mask)]),
        qllama.stream_states(visual, [TextStream(task, padded, padded_mask)]),
    )
    torch.testing.assert_close(short[0], long[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(short[1][mask.bool()], long[1][:, :7][mask.bool()], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(qllama.embed_text(ids, mask), qllama.embed_text(padded, padded_mask), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("task", "text_moves_queries", "image_moves_text"),
    [("itm", True, True), ("itc", False, False), ("itg", False, True)],
)
def test_what_flows_between_image_and_text(
    qllama: QLLaMA, visual: Tensor, task: Task, text_moves_queries: bool, image_moves_text: bool
) -> None:
    (ids, mask), (other_ids, _) = texts(7, 7, 7), texts(7, 7, 7)
    (queries, text), (queries_other_text, _) = qllama.stream_states(
        visual, [TextStream(task, ids, mask), TextStream(task, other_ids, mask)]
    )
    ((queries_other_image, text_other_image),) = qllama.stream_states(visual + 1, [TextStream(task, ids, mask)])
    assert torch.allclose(queries, queries_other_text, atol=1e-5) is not text_moves_queries
    assert torch.allclose(text, text_other_image, atol=1e-5) is not image_moves_text
    assert not torch.allclose(queries, queries_other_image, atol=1e-2)


@pytest.mark.parametrize(("task", "later_moves_earlier"), [("itm", True), ("itc", False), ("itg", False)])
def test_which_texts_are_read_from_left_to_right(qllama: QLLaMA, visual: Tensor, task: Task, later_moves_earlier: bool) -> None:
    ids, mask = texts(7, 7, 7)
    changed = ids.clone()
    changed[:, 4] = (ids[:, 4] % 30) + 1
    (_, text), (_, other) = qllama.stream_states(visual, [TextStream(task, ids, mask), TextStream(task, changed, mask)])
    assert torch.allclose(text[:, :4], other[:, :4], atol=1e-5) is not later_moves_earlier
    assert not torch.allclose(text[:, 4:], other[:, 4:], atol=1e-2)


def test_the_itc_stream_reads_captions_as_the_text_encoder_does(qllama: QLLaMA, visual: Tensor) -> None:
    ids, mask = texts(4, 7, 2)
    ((queries, text),) = qllama.stream_states(visual, [TextStream("itc", ids, mask)])
    # The queries stand in front of the text here and not there; rotary positions are relative.
    torch.testing.assert_close(qllama.project_text(text, mask), qllama.embed_text(ids, mask), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(queries, qllama.query(visual), atol=1e-5, rtol=1e-4)


def test_the_last_token_speaks_for_a_text(qllama: QLLaMA) -> None:
    _, mask = texts(4, 7, 1)
    states = torch.randn(3, 7, 16)
    expected = torch.stack([states[0, 3], states[1, 6], states[2, 0]]) @ qllama.text_projection
    torch.testing.assert_close(qllama.project_text(states, mask), expected)


def test_image_embeddings_of_both_modes(qllama: QLLaMA, visual: Tensor) -> None:
    pooled, queried = qllama.clip_projector(visual), qllama.clip_projector2(qllama.query(visual))
    assert qllama.embed_image([visual], "c").equal(pooled)
    expected = pooled / pooled.norm(dim=-1, keepdim=True) + queried / queried.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(qllama.embed_image([visual], "g"), expected)


# --- captions -------------------------------------------------------------------------------------------------------


def recomputed(qllama: QLLaMA, visual: Tensor, prompt: Tensor, tokens: int) -> Tensor:
    """Greedy tokens, with the whole prefix read again at every step."""
    ids = prompt
    for _ in range(tokens):
        ((_, text),) = qllama.stream_states(visual, [TextStream("itg", ids, torch.ones_like(ids))])
        ids = torch.cat([ids, qllama.qllama.lm_head(text[:, -1]).argmax(dim=-1, keepdim=True)], dim=1)
    return ids[:, prompt.shape[1] :]


def test_captions_with_a_cache_equal_captions_without(qllama: QLLaMA, visual: Tensor) -> None:
    prompt, _ = texts(3, 3, 3, width=3)
    captions = qllama.generate(visual, prompt, max_new_tokens=12, eos_id=99)
    assert captions.equal(recomputed(qllama, visual, prompt, 12))
    assert len({tuple(row) for row in captions.tolist()}) > 1
    assert captions.unique().numel() > 4


def test_captions_end_at_the_end_token_while_others_go_on(qllama: QLLaMA, visual: Tensor) -> None:
    prompt, _ = texts(3, 3, 3, width=3)
    free = qllama.generate(visual, prompt, max_new_tokens=12, eos_id=99).tolist()
    eos = next(token for token in free[1][:9] if token not in free[0])  # ends one row early and another one never
    ended = qllama.generate(visual, prompt, max_new_tokens=12, eos_id=eos, pad_id=30).tolist()
    stop = free[1].index(eos) + 1
    assert ended[1] == free[1][:stop] + [30] * (12 - stop)
    assert ended[0] == free[0]


@pytest.mark.parametrize("early", [True, False])
def test_captions_do_not_end_before_the_shortest_length(qllama: QLLaMA, visual: Tensor, early: bool) -> None:
    prompt, _ = texts(3, width=3)
    free = qllama.generate(visual[:1], prompt, max_new_tokens=12, eos_id=99)[0].tolist()
    eos = free[4]
    before = free.index(eos)
    options = {"max_new_tokens": 12, "eos_id": eos, "min_new_tokens": before + early}
    captions = qllama.generate(visual[:1], prompt, **options)[0].tolist()
    assert (captions == free[: before + 1]) is not early
    assert eos not in captions[: before + early]


def test_captions_stop_when_all_rows_have_ended(qllama: QLLaMA, visual: Tensor) -> None:
    prompt, _ = texts(3, width=3)
    free = qllama.generate(visual[:1], prompt, max_new_tokens=8, eos_id=99)
    eos = int(free[0, 3])
    length = free[0].tolist().index(eos) + 1
    assert qllama.generate(visual[:1], prompt, max_new_tokens=8, eos_id=eos).tolist() == free[:, :length].tolist()


# --- for a decoder --------------------------------------------------------------------------------------------------


def test_decoder_tokens_are_queries_then_patches(visual: Tensor) -> None:
    middleware = QLLaMA(**SIZES, decoder_dim=10, patch_layer=-2).eval()
    assert middleware.layers == (-1, -2)
    last, earlier = visual, torch.randn(3, 17, 24)
    tokens = middleware([last, earlier])
    assert tokens.shape == (3, middleware.tokens_out(17), 10) == (3, 20, 10)
    torch.testing.assert_close(tokens[:, :4], middleware.mlp2(middleware.query(last)))
    torch.testing.assert_close(tokens[:, 4:], middleware.mlp1(earlier[:, 1:]))


def test_queries_alone_may_go_to_the_decoder(visual: Tensor) -> None:
    middleware = QLLaMA(**SIZES, decoder_dim=10, patches=False)
    assert middleware.mlp1 is None
    assert middleware.layers == (-1,)
    assert middleware([visual]).shape == (3, middleware.tokens_out(17), 10) == (3, 4, 10)


def test_without_a_decoder_there_are_no_tokens_for_one(qllama: QLLaMA, visual: Tensor) -> None:
    with pytest.raises(ValueError, match="built without a decoder"):
        qllama([visual])


@pytest.mark.parametrize("change", [{"heads": 3}])
def test_settings_that_do_not_fit_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="dim=16 must divide by heads=3"):
        QLLaMA(**SIZES | change)


def test_queries_start_apart(qllama: QLLaMA) -> None:
    assert torch.pdist(qllama.query_tokens[0]).min() > 0
