"""InternViT: shapes, hidden states, token masking, sizes, drop path. tests/parity compares its numbers."""

from __future__ import annotations

import pytest
import torch

from lightning_internvl.encoders.intern_vit import InternViT
from lightning_internvl.protocols import Encoder

SIZES = {"image_size": 16, "patch_size": 4, "dim": 24, "depth": 3, "heads": 3, "mlp_dim": 32}


def test_shapes_and_protocol(encoder: InternViT) -> None:
    assert isinstance(encoder, Encoder)
    (out,) = encoder(torch.randn(2, 3, 16, 16))
    assert out.shape == (2, encoder.num_tokens(), encoder.dim) == (2, 17, 24)
    assert len(encoder.sharding_units()) == 3


def test_hidden_states_are_counted_as_in_hugging_face(encoder: InternViT) -> None:
    x = torch.randn(2, 3, 16, 16)
    states = [encoder.embeddings(x)]
    for block in encoder.encoder.layers:
        states.append(block(states[-1]))
    for asked in [(0,), (-1,), (3,), (-4, 2), (2, -1, 0, 2)]:
        for index, state in zip(asked, encoder(x, layers=asked), strict=True):
            torch.testing.assert_close(state, states[index])


def test_blocks_behind_the_last_state_asked_for_do_not_run(encoder: InternViT) -> None:
    ran = []
    for index, block in enumerate(encoder.encoder.layers):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    encoder(torch.randn(1, 3, 16, 16), layers=(1, -3))
    assert ran == [0]


@pytest.mark.parametrize("layer", [4, -5])
def test_a_state_that_does_not_exist_is_an_error(encoder: InternViT, layer: int) -> None:
    with pytest.raises(ValueError, match=rf"layers \[{layer}\] do not exist; with 3 blocks they run from 0 to 3"):
        encoder(torch.randn(1, 3, 16, 16), layers=(-1, layer))


def test_patches_are_embedded_as_by_the_convolution(encoder: InternViT) -> None:
    x = torch.randn(2, 3, 16, 16)
    patches = encoder.embeddings.patch_embedding(x).flatten(2).transpose(1, 2)
    positions = encoder.embeddings.position_embedding
    torch.testing.assert_close(encoder.embeddings(x)[:, 1:], patches + positions[:, 1:])
    torch.testing.assert_close(
        encoder.embeddings(x)[:, 0], (encoder.embeddings.class_embedding + positions[:, :1])[0].expand(2, -1)
    )


def test_token_masking_keeps_cls_and_a_share_of_the_patches_of_each_image(encoder: InternViT) -> None:
    x = torch.randn(6, 3, 16, 16)
    whole = encoder.embeddings(x)
    (kept,) = encoder(x, layers=(0,), keep=0.5)
    assert kept.shape == (6, 9, 24)
    assert kept[:, 0].equal(whole[:, 0])
    places = [[int((whole[n, 1:] == token).all(dim=-1).nonzero()) for token in kept[n, 1:]] for n in range(6)]
    assert all(len(set(row)) == 8 for row in places)
    assert len({tuple(sorted(row)) for row in places}) > 1


@pytest.mark.parametrize(("keep", "tokens"), [(1.0, 17), (0.25, 5), (0.001, 2)])
def test_number_of_kept_tokens(encoder: InternViT, keep: float, tokens: int) -> None:
    assert encoder(torch.randn(1, 3, 16, 16), keep=keep)[0].shape[1] == tokens


def test_other_image_sizes_resize_the_table(encoder: InternViT) -> None:
    stored = encoder.embeddings.position_embedding.clone()
    assert encoder(torch.randn(1, 3, 24, 24))[0].shape[1] == encoder.num_tokens(24) == 37
    assert encoder.embeddings.position_embedding.equal(stored)


@pytest.mark.parametrize("size", [(16, 20), (3, 3)])
def test_sizes_that_do_not_fit_are_refused(encoder: InternViT, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"must be square|must hold a patch"):
        encoder(torch.randn(1, 3, *size))


def test_drop_path_grows_over_the_blocks_and_is_off_in_evaluation() -> None:
    encoder = InternViT(**SIZES, drop_path=0.4, layer_scale=1.0)
    assert [block.drop_path.rate for block in encoder.encoder.layers] == pytest.approx([0.0, 0.2, 0.4])
    x = torch.randn(8, 3, 16, 16)
    assert not encoder.train()(x)[0].equal(encoder(x)[0])
    plain = InternViT(**SIZES, layer_scale=1.0)
    plain.load_state_dict(encoder.state_dict())
    assert encoder.eval()(x)[0].equal(plain.train()(x)[0])


def test_drop_path_drops_both_branches_of_a_block(encoder: InternViT) -> None:
    block, x = encoder.encoder.layers[1].train(), torch.randn(2, 17, 24)
    assert not block(x).equal(x)
    block.drop_path.rate = 1 - 1e-12
    assert block(x).equal(x)


def test_query_and_key_norms_span_all_heads_and_use_the_eps_of_the_blocks() -> None:
    encoder = InternViT(**SIZES, norm_eps=1e-3)
    attn = encoder.encoder.layers[0].attn
    assert attn.q_norm.weight.shape == attn.k_norm.weight.shape == (24,)
    assert attn.q_norm.eps == attn.k_norm.eps == encoder.encoder.layers[0].norm1.eps == 1e-3


def test_the_300m_variant_has_other_norms_and_biases() -> None:
    names = dict(InternViT(**SIZES, qk_norm=False, qkv_bias=True, norm="layer_norm").named_parameters())
    assert {"encoder.layers.0.norm1.bias", "encoder.layers.0.attn.qkv.bias"} <= names.keys()
    assert "encoder.layers.0.attn.q_norm.weight" not in names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "group"}, "norm='group' is not known; valid choices: rms_norm, layer_norm"),
        ({"heads": 5}, "must divide"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InternViT(**SIZES | change)


def test_it_can_be_built_without_memory() -> None:
    with torch.device("meta"):
        encoder = InternViT(**SIZES, drop_path=0.1)
    assert all(p.is_meta for p in encoder.parameters())


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_states_are_of_one_type_in_mixed_precision_whatever_type_weights_are_gathered_in(weights: torch.dtype, norm: str) -> None:
    tower = InternViT(norm=norm, drop_path=0.5, **SIZES).train()
    for block in tower.encoder.layers:
        block.to(weights)
    with torch.autocast("cpu", torch.bfloat16):
        states = tower(torch.randn(2, 3, 16, 16), layers=(0, 1, 2, 3))
    assert {state.dtype for state in states} == {torch.bfloat16}
