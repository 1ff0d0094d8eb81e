"""The generative stage on a Q-Former: matching both ways, its rows and labels, and a step that trains every part it lists."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_internvl.encoders.eva_vit import EvaViT
from lightning_internvl.middleware.qformer import QFormer
from lightning_internvl.middleware.text_streams import TextStream
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import ITM, NextToken, QueryITC
from lightning_internvl.stages import GenerativeStage
from lightning_internvl.stages.generative import match_both


def stage(**options: object) -> GenerativeStage:
    torch.manual_seed(0)
    encoder = EvaViT(image_size=12, patch_size=6, dim=12, depth=2, heads=2, mlp_dim=16)
    middleware = QFormer(
        encoder_dim=12,
        dim=16,
        depth=2,
        heads=2,
        mlp_dim=20,
        num_queries=3,
        text="write",
        vocab_size=31,
        embed_dim=8,
        init_std=0.2,
    )
    objectives = {"itc": QueryITC(label_smoothing=0.1), "itm": ITM(dim=16), "itg": NextToken(label_smoothing=0.1)}
    return GenerativeStage(
        VLM(encoder, middleware, objectives=objectives), name="generative", run_dir=Path(), parts={},
        train=["middleware", "objectives"], optimizer=torch.optim.SGD, scheduler=torch.optim.lr_scheduler.LambdaLR, max_steps=4,
        **options,
    )  # fmt: skip


def batch(rows: int = 5) -> dict[str, Tensor]:
    torch.manual_seed(1)
    found: dict[str, Tensor] = {"pixel_values": torch.randn(rows, 3, 12, 12), "image_ids": torch.arange(rows)}
    for task in ("itc", "itm", "itg"):
        found |= {f"{task}_ids": torch.randint(0, 31, (rows, 6)), f"{task}_mask": torch.ones(rows, 6, dtype=torch.long)}
    return found | {"itg_labels": found["itg_ids"]}


def test_three_rows_a_pair() -> None:
    visual, ids = torch.arange(3.0).reshape(3, 1, 1), torch.tensor([[10], [11], [12]])
    images, texts = torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1])
    shown, itm, labels = match_both(visual, TextStream("itm", ids, torch.ones_like(ids)), images, texts)
    pairs = list(zip(shown.flatten().int().tolist(), itm.ids.flatten().tolist(), strict=True))
    assert pairs == [(0, 10), (1, 11), (2, 12), (1, 10), (2, 11), (0, 12), (0, 12), (1, 10), (2, 11)]
    assert labels.tolist() == [1] * 3 + [0] * 6
    alone = torch.zeros(3, 3, dtype=torch.bool)  # all rows show one picture
    assert match_both(visual, TextStream("itm", ids, ids), images, texts, alone)[2].tolist() == [1] * 3 + [-100] * 6


@pytest.mark.parametrize(
    "options", [{"both_ways": True}, {"both_ways": True, "negatives": "random"}, {"both_ways": False}], ids=str
)
@pytest.mark.parametrize("same_picture", [False, True])
def test_everything_that_is_listed_gets_gradients(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, object], same_picture: bool
) -> None:
    monkeypatch.setattr(GenerativeStage, "global_step", 0)
    trained = stage(same_picture=same_picture, **options)
    trained.plan.apply(trained.model, 0)
    losses = trained.losses(batch())
    assert set(losses) == {"itc", "itm", "itg"}
    sum(losses.values()).backward()
    assert all(p.grad is not None for name, p in trained.model.named_parameters() if not name.startswith("encoder"))
    assert all(p.grad is None for p in trained.model.encoder.parameters())


def test_several_captions_of_a_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GenerativeStage, "global_step", 0)
    trained, data = stage(both_ways=True, same_picture=True), batch(4)
    data["image_ids"] = torch.tensor([7, 7, 8, 9])
    soft = trained.losses(data)["itc"]
    trained.same_picture = False
    assert not torch.allclose(soft, trained.losses(data)["itc"])
    data["image_ids"] = torch.zeros(4, dtype=torch.long)  # nothing to tell apart
    assert all(torch.isfinite(loss) for loss in trained.losses(data).values())


def test_a_contrast_of_the_tower_needs_one() -> None:
    with pytest.raises(ValueError, match="backbone_itc=True needs a middleware that pools the tower; QFormer does not"):
        stage(backbone_itc=True)
