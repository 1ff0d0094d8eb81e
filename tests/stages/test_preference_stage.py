"""Pairs of answers: packed rows, micro-batches and processes give one gradient; pictures are encoded once."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import together
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lightning_internvl.data.gradient_accumulation import window_shares
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.encoders.intern_vit import InternViT
from lightning_internvl.launch import leave_processes
from lightning_internvl.layers import peft
from lightning_internvl.middleware.connector import MLPConnector
from lightning_internvl.model.reference_scores import looked_up, name_of_reference, read_scores, write_scores
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import DPO, KTO, MPO, ORPO, NextToken, Preference, SimPO
from lightning_internvl.stages import PreferenceStage
from lightning_internvl.training.optim import adamw, cosine

VOCAB, PICTURE = 31, 30
LENGTHS = (9, 5, 7, 6), (6, 8, 5, 9)  # of the rows with chosen and with rejected answers, 3 tokens of which are asked
SCORES = {f"{pair:032x}": (-9.0 + pair, -12.0 - 2 * pair) for pair in range(4)}
EACH = [DPO, MPO, KTO, ORPO, SimPO]
ALONE = [DPO, MPO, ORPO, SimPO]  # which judge each pair for itself


def stage(objective: Preference, adapters: bool = False) -> PreferenceStage:
    torch.manual_seed(0)
    config = {
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": VOCAB,
    }  # fmt: skip
    encoder = InternViT(image_size=8, patch_size=8, dim=8, depth=1, heads=2, mlp_dim=8)
    decoder, connector = HFCausalLM(config=config, embed_std=1.0), MLPConnector(encoder_dim=8, decoder_dim=16)
    objectives = {"next_token": NextToken(chunk=4), "preference": objective}
    model = VLM(encoder, connector, decoder, objectives=objectives, image_token_id=PICTURE)
    if adapters:
        peft.add_adapters(model, {"decoder": {"method": "lora", "rank": 2, "alpha": 4, "dropout": 0.1, "targets": "blocks"}})
    found = PreferenceStage(
        model, name="preference", run_dir=Path(), parts={}, train=["decoder"], max_steps=2,
        optimizer=partial(adamw, lr=1e-2, weight_decay=0.0), scheduler=cosine,
    )  # fmt: skip
    found.scores = dict(SCORES)
    return found


def rows() -> tuple[list[Tensor], Tensor]:
    """The rows of chosen answers and then those of rejected ones, which begin alike; a picture a pair."""
    generator = torch.Generator().manual_seed(1)
    asked = [torch.tensor([PICTURE, *torch.randint(PICTURE, (2,), generator=generator).tolist()]) for _ in range(4)]
    made = [
        torch.cat([asked[pair], torch.randint(PICTURE, (length - 3,), generator=generator)])
        for lengths in LENGTHS
        for pair, length in enumerate(lengths)
    ]
    return made, torch.randn(4, 3, 8, 8, generator=generator)


def batch(*pairs: int) -> dict[str, Any]:
    """A padded batch of pairs."""
    made, pixels = rows()
    ids = [made[pair] for pair in pairs] + [made[4 + pair] for pair in pairs]
    lengths = torch.tensor([len(row) for row in ids])
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
    labels = padded.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    named = {"keys": [f"sample {pair}" for pair in pairs], "pair_keys": [[*SCORES][pair] for pair in pairs]}
    return {"input_ids": padded, "attention_mask": mask, "labels": labels, "pixel_values": pixels[[*pairs]], "copies": 2, **named}


def packed() -> dict[str, Any]:
    """All pairs in two rows for each answer."""
    whole, made = batch(0, 1, 2, 3), rows()[0]
    groups = ((0,), (1, 2, 3), (4,), (5, 6, 7))
    ids = torch.nn.utils.rnn.pad_sequence([torch.cat([made[i] for i in group]) for group in groups], batch_first=True)
    labels = torch.full_like(ids, -100)
    for row, group in enumerate(groups):
        taken = torch.cat([whole["labels"][i, : len(made[i])] for i in group])
        labels[row, : len(taken)] = taken
    segments = [[len(made[i]) for i in group] for group in groups]
    mask = (torch.arange(ids.shape[1]) < torch.tensor([sum(row) for row in segments])[:, None]).long()
    return {**whole, "input_ids": ids, "attention_mask": mask, "labels": labels, "segments": segments}


def gradient(found: PreferenceStage, loss: Tensor) -> Tensor:
    found.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in found.model.decoder.parameters() if p.grad is not None])


def loss_of(found: PreferenceStage, given: dict[str, Any]) -> Tensor:
    return found.weighted_sum(found.losses(given))


def relative(one: Tensor, two: Tensor) -> float:
    return float((one - two).norm() / two.norm())


@pytest.mark.parametrize("objective", EACH)
def test_packed_rows_give_the_loss_and_gradient_of_rows_of_their_own(objective: type[Preference]) -> None:
    found = stage(objective())
    alone, together_ = loss_of(found, batch(0, 1, 2, 3)), loss_of(found, packed())
    assert together_.item() == pytest.approx(alone.item(), rel=1e-5)
    assert relative(gradient(found, together_), gradient(found, loss_of(found, batch(0, 1, 2, 3)))) < 1e-5


@pytest.mark.parametrize("objective", ALONE)
def test_micro_batches_of_unequal_size_make_the_step_of_one_batch(objective: type[Preference]) -> None:
    found = stage(objective())
    parts = [batch(0), batch(1, 2), batch(3)]
    window = [found.counts(part) for part in parts]
    total = torch.zeros(())
    for place, part in enumerate(parts):
        shares, _ = window_shares(window, place, 3, torch.device("cpu"))
        total = total + found.weighted_sum({name: shares[name] * x for name, x in found.losses(part).items()}) / 3
    whole = loss_of(found, batch(0, 1, 2, 3))
    assert total.item() == pytest.approx(whole.item(), rel=1e-6)
    assert relative(gradient(found, total), gradient(found, loss_of(found, batch(0, 1, 2, 3)))) < 1e-6


def half(rank: int, folder: str, objective: type[Preference]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = stage(objective())
    found.model.encoder.requires_grad_(False)
    found.model.middleware.requires_grad_(False)
    found.forward = partial(loss_of, found)  # type: ignore[method-assign]
    both = DistributedDataParallel(found)
    loss = both(batch(0) if rank == 0 else batch(1, 2, 3))
    torch.save((gradient(found, loss), loss.detach()), f"{folder}/{rank}")
    del both, loss
    leave_processes()


@pytest.mark.parametrize("objective", [MPO, KTO])
def test_two_processes_with_unequally_many_pairs_make_the_step_of_one(objective: type[Preference], tmp_path: Path) -> None:
    together(half, str(tmp_path), objective, count=2)
    (one, first), (two, second) = (torch.load(tmp_path / str(rank)) for rank in (0, 1))
    found = stage(objective())
    whole = loss_of(found, batch(0, 1, 2, 3))
    assert (first + second).item() / 2 == pytest.approx(whole.item(), rel=1e-5)
    torch.testing.assert_close(one, two)
    assert relative(one, gradient(found, whole)) < 1e-5


def test_both_answers_read_pictures_that_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found, seen = stage(DPO()), []
    found.model.encoder.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    once, one = batch(0, 1, 2, 3), batch(0, 1, 2, 3)
    twice = {**one, "pixel_values": one["pixel_values"].repeat(2, 1, 1, 1), "copies": 1}
    torch.testing.assert_close(found.model.hidden_states(**once).hidden, found.model.hidden_states(**twice).hidden)
    assert seen == [4, 8]


def test_what_is_logged_follows_from_policy_and_reference() -> None:
    found = stage(DPO(beta=0.5))
    found.losses(batch(0, 2))
    pairs = found._pairs(batch(0, 2))
    chosen, rejected = pairs.chosen - torch.tensor([-9.0, -7.0]), pairs.rejected - torch.tensor([-12.0, -16.0])
    wanted = {
        "reward_chosen": 0.5 * chosen.mean(), "reward_rejected": 0.5 * rejected.mean(),
        "margin": 0.5 * (chosen - rejected).mean(), "accuracy": (chosen > rejected).float().mean(),
        "kl": torch.cat([chosen, rejected]).mean(),
    }  # fmt: skip
    torch.testing.assert_close(found.watched, wanted)
    free = stage(SimPO())
    free.losses(batch(0, 2))
    assert "kl" not in free.watched


def test_a_stage_at_its_start_is_its_own_reference() -> None:
    found = stage(DPO())
    found.scores = None
    assert loss_of(found, batch(0, 1)).item() == pytest.approx(0.6931472)
    assert gradient(found, loss_of(found, batch(0, 1))).any()


def test_with_adapters_the_reference_is_the_model_without_them() -> None:
    found = stage(DPO(), adapters=True)
    assert peft.are_fresh(found.model)
    found.eval()
    before = found._log_probabilities(batch(0, 1, 2, 3))[0]
    with torch.no_grad():
        for _, layer in peft.adapted_layers(found.model):
            torch.nn.init.normal_(layer.lora_B["default"].weight)
    assert not peft.are_fresh(found.model)
    found.adapters_off = True
    modes = {module: module.training for module in found.train().modules()}
    pairs = found._pairs(batch(0, 1, 2, 3))
    assert pairs.reference_chosen is not None
    assert pairs.reference_rejected is not None
    torch.testing.assert_close(torch.cat([pairs.reference_chosen, pairs.reference_rejected]), before)
    assert not torch.allclose(torch.cat([pairs.chosen, pairs.rejected]), before)
    assert modes == {module: module.training for module in found.modules()}


def test_weights_of_terms_are_those_of_the_objective_unless_the_stage_names_its_own() -> None:
    settings: dict[str, Any] = {
        "name": "preference", "run_dir": Path(), "parts": {}, "train": ["decoder"], "max_steps": 2, "optimizer": None,
        "scheduler": None,
    }  # fmt: skip
    model = stage(MPO()).model
    assert PreferenceStage(model, **settings).weights == {"preference": 0.8, "quality": 0.2, "generation": 1.0}
    own = PreferenceStage(model, **settings, weights={"quality": 0.5})
    assert own.weights == {"preference": 0.8, "quality": 0.5, "generation": 1.0}


class Processor:
    mean, std = (0.5,), (0.5,)


def test_scores_are_kept_by_weights_and_preparation_and_a_pair_without_any_is_named(tmp_path: Path) -> None:
    path, model = tmp_path / "scores" / "some.safetensors", stage(DPO()).model
    write_scores(path, SCORES)
    assert read_scores(path) == SCORES
    assert read_scores(tmp_path / "none.safetensors") == {}
    chosen, rejected = looked_up(SCORES, [*SCORES][2:], ["c", "d"], torch.device("cpu"))
    assert (chosen.tolist(), rejected.tolist()) == ([-7.0, -6.0], [-16.0, -18.0])
    with pytest.raises(ValueError, match="sample b has no score of the reference"):
        looked_up(SCORES, [next(iter(SCORES)), "unknown"], ["a", "b"], torch.device("cpu"))
    name = name_of_reference(model, Processor, {})
    assert name == name_of_reference(model, Processor, {})
    assert name != name_of_reference(model, Processor, {"decoder": "nf4"})
    with torch.no_grad():
        next(model.decoder.parameters()).view(-1)[0] += 1
    assert name != name_of_reference(model, Processor, {})
