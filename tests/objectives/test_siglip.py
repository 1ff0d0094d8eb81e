"""The sigmoid loss against its formula. Several processes: test_processes.py, and the fixture of open_clip."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_internvl.objectives import ITC, SigLIP

IMAGE, TEXT = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


def probabilities(loss: SigLIP) -> torch.Tensor:
    return loss.logits(F.normalize(IMAGE, dim=-1), F.normalize(TEXT, dim=-1)).sigmoid().detach()


def test_every_pair_is_judged_alone() -> None:
    loss = SigLIP(init_scale=3.0, init_bias=-1.0)
    p = probabilities(loss)
    expected = -sum(math.log(p[i, j] if i == j else 1 - p[i, j]) for i in range(5) for j in range(5)) / 5
    assert loss(IMAGE, TEXT).item() == pytest.approx(expected, rel=1e-5)


def test_captions_of_one_picture_all_match_it() -> None:
    loss, ids = SigLIP(init_scale=3.0, init_bias=-1.0), torch.tensor([4, 1, 4, 2, 1])
    p, same = probabilities(loss), ids[:, None] == ids
    expected = -torch.where(same, p, 1 - p).log().sum() / 5
    torch.testing.assert_close(loss(IMAGE, TEXT, image_ids_B=ids).detach(), expected)


def test_rows_that_are_not_judged_count_nowhere() -> None:
    loss, ignored = SigLIP(init_scale=3.0, init_bias=-1.0), torch.tensor([False, True, False, False, True])
    p = probabilities(loss)
    expected = -torch.where(torch.eye(5, dtype=torch.bool), p, 1 - p).log()[~ignored].sum() / 3
    torch.testing.assert_close(loss(IMAGE, TEXT, ignored).detach(), expected)
    assert loss(IMAGE, TEXT, torch.ones(5, dtype=torch.bool)).item() == 0.0


def test_scale_and_bias_learn() -> None:
    loss = SigLIP()
    assert loss.scale.item() == pytest.approx(10.0)
    loss(IMAGE, TEXT).backward()
    assert loss.logit_scale.grad.abs() > 0
    assert loss.logit_bias.grad.abs() > 0


def test_other_ways_to_gather_are_the_same_on_one_process() -> None:
    first = ITC()(IMAGE, TEXT)
    assert all(ITC(gather=way)(IMAGE, TEXT).equal(first) for way in ("global", "detached"))
    with pytest.raises(ValueError, match="gather='all' is not known; valid choices: exact, global, detached"):
        ITC(gather="all")
