"""Flamingo against a straightforward reference: token by token, head by head, without masks."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lightning_internvl.decoders.flamingo import FlamingoCausalLM, GatedCrossAttention, most_pictures
from lightning_internvl.encoders.intern_vit import InternViT
from lightning_internvl.middleware.perceiver_resampler import PerceiverResampler
from lightning_internvl.model.vlm import VLM

IMAGE, WIDTH = 50, 16
LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 2,
         "num_key_value_heads": 2, "vocab_size": 60, "max_position_embeddings": 64, "tie_word_embeddings": False,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
OPT = {"model_type": "opt", "hidden_size": 32, "ffn_dim": 40, "num_hidden_layers": 4, "num_attention_heads": 2,
       "vocab_size": 60, "max_position_embeddings": 64, "word_embed_proj_dim": 32, "dropout": 0.0, "pad_token_id": 0,
       "eos_token_id": 2}  # fmt: skip
MPT = {"model_type": "mpt", "d_model": 32, "n_heads": 2, "n_layers": 4, "vocab_size": 60, "max_seq_len": 64}
LANGUAGES = {"llama": LLAMA, "opt": OPT, "mpt": MPT, "gpt_neox": {
    "model_type": "gpt_neox", "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 2,
    "vocab_size": 60, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}}  # fmt: skip


def model(language: str = "llama", gates: float = 0.5, **settings: object) -> VLM:
    torch.manual_seed(0)
    encoder = InternViT(image_size=8, patch_size=4, dim=WIDTH, depth=2, heads=2, mlp_dim=24)
    resampler = PerceiverResampler(encoder_dim=WIDTH, latents=3, depth=2, heads=2, head_dim=8)
    decoder = FlamingoCausalLM(encoder_dim=WIDTH, config=LANGUAGES[language], heads=2, head_dim=8, **settings)
    for block in decoder.cross.values():
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.3)
        nn.init.constant_(block.attn_gate, gates)
        nn.init.constant_(block.ff_gate, gates)
    return VLM(encoder, resampler, decoder, image_token_id=IMAGE).eval()


def rows() -> dict[str, Tensor]:
    """Text before any picture, two pictures, none at all, and padding on either side."""
    ids = torch.tensor([
        [5, 6, IMAGE, 7, 8, IMAGE, 9, 10, 11],
        [0, 0, IMAGE, 12, 13, 14, 15, 16, 17],
        [18, 19, 20, 21, 22, 23, 24, 0, 0],
        [IMAGE, IMAGE, 25, IMAGE, 26, 27, 28, 29, 30],
    ])  # fmt: skip
    pixels = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": pixels}


# --- the reference ------------------------------------------------------------------------------------------------------------


def normed(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + norm.eps).sqrt() * norm.weight + norm.bias


def mixed(q: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """One query (K,) over keys and values (S, K), head by head."""
    found = []
    for q1, k1, v1 in zip(q.chunk(heads), keys.chunk(heads, dim=1), values.chunk(heads, dim=1), strict=True):
        found.append((k1 @ q1 / len(q1) ** 0.5).softmax(dim=0) @ v1)
    return torch.cat(found)


def fed(x: Tensor, ff: nn.Sequential) -> Tensor:
    h = normed(x, ff[0]) @ ff[1].weight.T
    return (0.5 * h * (1 + torch.erf(h / 2**0.5))) @ ff[3].weight.T


def resampled(resampler: PerceiverResampler, patches_PD: Tensor) -> Tensor:
    latents = resampler.latents
    for block in resampler.blocks:
        attn = block.attn
        asked, shown = normed(latents, attn.norm_latents), normed(patches_PD, attn.norm_media)
        keys, values = (torch.cat([shown, asked]) @ attn.to_kv.weight.T).chunk(2, dim=1)
        read = torch.stack([mixed(q, keys, values, attn.heads) for q in asked @ attn.to_q.weight.T])
        latents = latents + read @ attn.to_out.weight.T
        latents = latents + fed(latents, block.ff)
    return normed(latents, resampler.norm)


def crossed(block: GatedCrossAttention, x_LH: Tensor, pictures: list[Tensor], ids: Tensor, all_before: bool) -> Tensor:
    shown, after = 0, []
    for x, token in zip(x_LH, ids.tolist(), strict=True):
        shown += token == IMAGE
        seen = pictures[:shown] if all_before else pictures[max(0, shown - 1) : shown]
        if seen:
            keys, values = (torch.cat(seen) @ block.attn.to_kv.weight.T).chunk(2, dim=1)
            read = mixed(normed(x, block.attn.norm) @ block.attn.to_q.weight.T, keys, values, block.attn.heads)
            x = x + block.attn_gate.tanh() * (block.attn.to_out.weight @ read)
        after.append(x + block.ff_gate.tanh() * fed(x, block.ff))
    return torch.stack(after)


def reference(vlm: VLM, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> Tensor:
    """Logits (B, L, V): the language model run block by block on one row at a time, pictures put in between."""
    decoder, feats = vlm.decoder, vlm.encoder(pixel_values)[0]
    pictures = [resampled(vlm.middleware, feat[1:]) for feat in feats]
    blocks, taken, logits = blocks_in(decoder), 0, []
    for ids, mask in zip(input_ids, attention_mask, strict=True):
        count = int((ids == IMAGE).sum())
        own, taken = pictures[taken : taken + count], taken + count
        plain = copy.deepcopy(decoder.lm)
        for number, block in enumerate(blocks_of(plain, len(blocks))):
            block._forward_pre_hooks.clear()
            if (number + 1) % decoder.every == 0:
                cross = decoder.cross[str(number)]

                def put(_, args, kwargs, cross=cross, own=own, ids=ids):
                    hidden = args[0] if args else kwargs["hidden_states"]
                    changed = crossed(cross, hidden[0], own, ids, decoder.all_before)[None]
                    return ((changed, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": changed})

                block.register_forward_pre_hook(put, with_kwargs=True)
        logits.append(plain(input_ids=ids[None], attention_mask=mask[None]).logits[0])
    return torch.stack(logits)


def blocks_of(lm: nn.Module, count: int) -> nn.ModuleList:
    return next(m for m in lm.modules() if isinstance(m, nn.ModuleList) and len(m) == count)


def blocks_in(decoder: FlamingoCausalLM) -> nn.ModuleList:
    return blocks_of(decoder.lm, 4)


def close(ours: Tensor, theirs: Tensor, share: float = 1e-5) -> None:
    assert float((ours - theirs).abs().max()) <= share * float(theirs.abs().max())


# --- the numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("settings", [{"every": 1}, {"every": 2, "all_before": True}, {"every": 3}], ids=str)
def test_logits_and_gradients_equal_the_reference(language: str, settings: dict[str, object]) -> None:
    vlm, batch = model(language, **settings), rows()
    seen = batch["attention_mask"].bool()
    expected, found = reference(vlm, **batch), vlm(**batch).logits
    close(found[seen].detach(), expected[seen].detach())
    weights = torch.randn(found[seen].shape, generator=torch.Generator().manual_seed(1))
    parts = [vlm.middleware.latents, *vlm.decoder.cross.parameters(), *vlm.middleware.blocks.parameters()]
    ours = torch.autograd.grad((found[seen] * weights).sum(), parts)
    theirs = torch.autograd.grad((expected[seen] * weights).sum(), parts)
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, 1e-4)  # some are sums of much larger numbers


@pytest.mark.parametrize("language", LANGUAGES)
def test_closed_gates_leave_the_language_model_as_it_is(language: str) -> None:
    vlm, batch = model(language, gates=0.0), rows()
    plain = vlm.decoder.lm
    alone = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    seen = batch["attention_mask"].bool()
    assert vlm(**batch).logits[seen].equal(alone[seen].float())
    fresh = FlamingoCausalLM(encoder_dim=WIDTH, config=LANGUAGES[language])
    assert not any(bool(gate) for block in fresh.cross.values() for gate in (block.attn_gate, block.ff_gate))


def test_names_of_the_language_model_stay() -> None:
    decoder = FlamingoCausalLM(encoder_dim=WIDTH, config=LLAMA, every=2)
    names = {name.removeprefix("lm.") for name in decoder.state_dict() if name.startswith("lm.")}
    plain = AutoModelForCausalLM.from_config(decoder.lm.config)
    assert names == plain.state_dict().keys()
    assert list(decoder.cross) == ["1", "3"]
    assert len(decoder.sharding_units()) == 6


def test_a_token_sees_the_picture_before_it_and_no_other() -> None:
    vlm, batch = model(), rows()
    before = vlm(**batch).logits
    changed = batch | {"pixel_values": batch["pixel_values"].clone()}
    changed["pixel_values"][1] += 1.0  # the second picture of row 0, at position 5
    after = vlm(**changed).logits
    same = (before == after).all(dim=-1)
    assert same[0].tolist() == [True] * 5 + [False] * 4
    assert same[1:].all()


def test_generation_goes_on_from_the_last_picture() -> None:
    vlm, batch = model(), {name: x[:1] if name != "pixel_values" else x[:2] for name, x in rows().items()}
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    new = vlm.generate(**batch, **options)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for _ in range(5):
        token = vlm(input_ids=ids, attention_mask=mask, pixel_values=batch["pixel_values"]).logits[:, -1]
        token[:, 2] = -torch.inf
        ids = torch.cat([ids, token.argmax(dim=-1)[:, None]], dim=1)
        mask = torch.ones_like(ids)
    assert new.equal(ids[:, -5:])
    beams = vlm.generate(**batch, num_beams=3, **options)
    assert beams.shape == (1, 5)


def test_left_padded_prompts_of_different_pictures() -> None:
    vlm = model()
    prompts = [[IMAGE, 5, 6], [7, IMAGE, 8, IMAGE, 9, 10], [11, 12]]
    pixels = torch.randn(3, 3, 8, 8)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    single, taken = [], 0
    for prompt in prompts:
        count = prompt.count(IMAGE)
        ids = torch.tensor([prompt])
        single.append(vlm.generate(pixels[taken : taken + count], ids, torch.ones_like(ids), **options))
        taken += count
    ids = torch.tensor([[0] * (6 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (6 - len(p)) + [1] * len(p) for p in prompts])
    assert vlm.generate(pixels, ids, mask, **options).equal(torch.cat(single))


def test_text_alone_keeps_every_parameter_in_the_graph() -> None:
    vlm = model()
    ids = torch.randint(3, 40, (2, 6))
    output = vlm(ids, torch.ones_like(ids), torch.zeros(0, 3, 8, 8), labels=ids)
    output.loss.backward()
    assert all(
        p.grad is not None for p in [*vlm.encoder.parameters(), *vlm.middleware.parameters(), *vlm.decoder.cross.parameters()]
    )
    assert all(float(p.grad.abs().max()) == 0 for p in vlm.middleware.parameters())
    ours = vlm(ids, torch.ones_like(ids)).logits
    assert ours.equal(output.logits)


def test_pictures_and_placeholders_must_agree() -> None:
    vlm, batch = model(), rows()
    with pytest.raises(ValueError, match="5 image"):
        vlm(batch["input_ids"], batch["attention_mask"], batch["pixel_values"][:5])
    with pytest.raises(ValueError, match=r"decoder\.every=9 must be from 1 to 4"):
        FlamingoCausalLM(encoder_dim=WIDTH, config=LLAMA, every=9)


def test_a_video_is_read_as_one_sequence_of_frames() -> None:
    torch.manual_seed(0)
    resampler = PerceiverResampler(encoder_dim=WIDTH, latents=3, depth=2, heads=2, head_dim=8, max_frames=4)
    video = torch.randn(2, 3, 6, WIDTH)
    found = resampler([video])
    shown = (video[:, :, 1:] + resampler.frame_embs[:3, None]).flatten(1, 2)
    close(found[1].detach(), resampled(resampler, shown[1]).detach())
    assert not torch.allclose(found, resampler([video.flip(1)]))
    with pytest.raises(ValueError, match="max_frames=4"):
        resampler([torch.randn(1, 5, 6, WIDTH)])


def test_a_copy_refers_to_itself() -> None:
    vlm, batch = model(), rows()
    copied = copy.deepcopy(vlm)
    for parameter in copied.decoder.cross.parameters():
        nn.init.zeros_(parameter)
    before = vlm(**batch).logits
    assert not torch.allclose(copied(**batch).logits, before)
    assert vlm(**batch).logits.equal(before)
    assert F.mse_loss(copied(**batch).logits, model(gates=0.0)(**batch).logits) < 1e-12


def test_the_row_with_most_pictures_is_known_from_the_samples() -> None:
    assert most_pictures([1, 0, 3]) == 3
    assert most_pictures([1, 0, 3, 2, 2], [[5, 4], [6], [3, 3]]) == 4
    assert most_pictures([]) == 0
