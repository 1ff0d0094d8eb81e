"""Positions that go on by less than one with each visual token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_internvl.checkpoints.families.language_model import language_config
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.decoders.v2pe import V2PECausalLM

QWEN2 = {
    "model_type": "qwen2", "vocab_size": 23, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128, "pad_token_id": 0,
    "initializer_range": 0.5,
}  # fmt: skip
# words and visual tokens of three rows: several pictures, one at the end, none
ROWS = ["ww....w..wwww", "www.......", "wwwww"]


def decoder(**options: Any) -> V2PECausalLM:
    torch.manual_seed(0)
    return V2PECausalLM(config=QWEN2, **options).eval()


def rows(texts: list[str], left: bool = False) -> tuple[Tensor, Tensor]:
    """The mask of rows, and where visual tokens stand."""
    width = max(map(len, texts))
    padded = [text.rjust(width) if left else text.ljust(width) for text in texts]
    mask, places = (torch.tensor([[letter in kind for letter in text] for text in padded]) for kind in ("w.", "."))
    return mask.long(), places


def one_by_one(text: str, step: float) -> list[float]:
    """As the released code counts: a word stands one behind the whole number that the last token reached."""
    found, last = [], -1.0
    for letter in text:
        last = last + step if letter == "." else math.ceil(last) + 1
        found.append(last)
    return found


@pytest.mark.parametrize("step", [1.0, 0.5, 0.25, 0.3, 1 / 256])
@pytest.mark.parametrize("left", [False, True])
def test_positions_are_those_of_the_formula(step: float, left: bool) -> None:
    mask, places = rows(ROWS, left)
    found = decoder(visual_step=step).positions(mask, places)
    for row, text in enumerate(ROWS):
        assert found[row][mask[row].bool()].tolist() == pytest.approx(one_by_one(text, step), abs=1e-6)
    assert not found[mask == 0].any()


def test_a_step_of_one_is_the_plain_decoder() -> None:
    ours, plain = decoder(visual_step=1.0), HFCausalLM(config=QWEN2).eval()
    plain.load_state_dict(ours.state_dict())
    for left in (False, True):
        mask, places = rows(ROWS, left)
        embeds = torch.randn(*mask.shape, 16)
        seen = mask.bool()
        states = ours.hidden(embeds, mask, visual_places=places, right_padded=not left)
        torch.testing.assert_close(states[seen], plain.hidden(embeds, mask, right_padded=not left)[seen])
    apart = decoder(visual_step=0.25).hidden(embeds, mask, visual_places=places)[seen]
    assert (apart - states[seen]).abs().max() > 1e-2


def test_packed_rows_equal_padded_ones() -> None:
    ours = decoder(visual_step=0.25)
    mask, places = rows(ROWS)
    embeds = torch.randn(*mask.shape, 16)
    padded = ours.hidden(embeds, mask, visual_places=places, right_padded=True)[mask.bool()]
    lengths = [len(text) for text in ROWS]
    row = torch.cat([embeds[i, :n] for i, n in enumerate(lengths)])[None]
    one, seen = torch.ones(1, sum(lengths), dtype=torch.long), torch.cat([places[i, :n] for i, n in enumerate(lengths)])[None]
    assert torch.equal(ours.positions(one, seen, [lengths])[0], ours.positions(mask, places)[mask.bool()])
    torch.testing.assert_close(ours.hidden(row, one, visual_places=seen, segments=[lengths])[0], padded, atol=1e-5, rtol=1e-5)


def test_answers_count_on_from_the_prompt() -> None:
    ours = decoder(visual_step=0.25)
    mask, places = rows(ROWS[:1] + ROWS[2:], left=True)
    embeds = torch.randn(*mask.shape, 16)
    written = ours.generate(embeds, mask, visual_places=places, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert written.shape == (2, 6)
    longer = torch.cat([embeds, ours.embed(written)], dim=1)
    more = torch.nn.functional.pad(mask, (0, 6), value=1)
    states = ours.hidden(longer, more, visual_places=torch.nn.functional.pad(places, (0, 6)))
    again = ours.head(states[:, mask.shape[1] - 1 : -1]).argmax(dim=-1)
    assert torch.equal(again, written)


def test_training_draws_a_step_for_each_picture() -> None:
    ours = decoder(visual_step=1.0, visual_steps=[1, 0.5, 0.25])
    mask, places = rows(["w....w....w"] * 64)
    assert torch.equal(ours.positions(mask, places), torch.arange(11.0).expand(64, -1))
    ours.train()
    torch.manual_seed(1)
    found = ours.positions(mask, places)
    steps = [(found[:, start + 1 : start + 4] - found[:, start : start + 3]) for start in (1, 6)]
    for one in steps:
        assert (one == one[:, :1]).all()
        assert set(one[:, 0].tolist()) == {1, 0.5, 0.25}
    assert (steps[0][:, 0] != steps[1][:, 0]).any()
    torch.manual_seed(1)
    assert torch.equal(found, ours.positions(mask, places))


def test_a_config_of_transformers_holds_a_step_of_one_alone() -> None:
    assert language_config(decoder(visual_steps=[1, 0.5]))["model_type"] == "qwen2"
    with pytest.raises(ValueError, match=r"decoder\.visual_step=0\.5 has no field in a config of transformers"):
        language_config(decoder(visual_step=0.5))


def test_wrong_steps_and_decoders_are_named() -> None:
    for wrong in ({"visual_step": 0}, {"visual_step": 2.0}, {"visual_steps": []}, {"visual_steps": [1, -1]}):
        with pytest.raises(ValueError, match=r"decoder\.visual_steps?=.*steps above 0, at most 1"):
            decoder(**wrong)
    opt = {
        "model_type": "opt",
        "vocab_size": 23,
        "hidden_size": 16,
        "ffn_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    with pytest.raises(ValueError, match="needs rotary positions, which model_type='opt' has not"):
        V2PECausalLM(config=opt | {"word_embed_proj_dim": 16})
