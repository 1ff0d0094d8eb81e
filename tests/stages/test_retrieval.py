"""The retrieval fine-tune: which texts stand beside which pictures. tests/parity compares its numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_internvl.encoders.intern_vit import InternViT
from lightning_internvl.middleware.qllama import QLLaMA, TextStream
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import ITC, ITM
from lightning_internvl.stages import RetrievalStage

IDS = torch.tensor([7, 3, 7, 5, 3, 7])


def stage_of(encoder: InternViT, qllama: QLLaMA, **options: Any) -> RetrievalStage:
    objectives = {"itc": ITC(init_scale=3.0), "itm": ITM(dim=16)}
    return RetrievalStage(
        VLM(encoder, qllama, objectives=objectives), name="retrieval", run_dir=Path(), parts={}, train=["*"],
        optimizer=torch.optim.SGD, scheduler=torch.optim.lr_scheduler.LambdaLR, max_steps=4, **options,
    )  # fmt: skip


def batch(ids: Tensor = IDS) -> dict[str, Tensor]:
    """Rows of one picture have equal pixels; the first word of a caption names its row."""
    texts = {task: torch.randint(8, 31, (len(ids), 5)) for task in ("itc", "itm")}
    texts["itm"][:, 0] = torch.arange(len(ids))
    pictures = torch.randn(8, 3, 16, 16)
    masks = {f"{task}_mask": torch.ones(len(ids), 5, dtype=torch.long) for task in texts}
    return {f"{task}_ids": t for task, t in texts.items()} | masks | {"pixel_values": pictures[ids], "image_ids": ids}


@pytest.mark.parametrize("options", [{"negatives": "random"}, {"negatives": "mined"}, {"mined_from_step": 2}])
def test_every_picture_has_its_own_caption_and_one_of_another_picture(
    encoder: InternViT, qllama: QLLaMA, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    streams: list[TextStream] = []
    read = QLLaMA.stream_states
    monkeypatch.setattr(QLLaMA, "stream_states", lambda self, visual, of: (streams.extend(of), read(self, visual, of))[1])
    monkeypatch.setattr(RetrievalStage, "global_step", 1)
    stage = stage_of(encoder, qllama, **options)
    drawn = set()
    for _ in range(20):
        streams.clear()
        losses = stage.losses(batch())
        assert set(losses) == {"itc", "itc_tower", "itm"}
        assert all(torch.isfinite(loss) for loss in losses.values())
        assert sorted(stream.task for stream in streams) == ["itc", "itm", "itm"]
        rows = [stream.ids[:, 0].tolist() for stream in streams if stream.task == "itm"]
        assert list(range(6)) in rows
        (wrong,) = [row for row in rows if row != list(range(6))]
        assert all(IDS[row] != IDS[place] for place, row in enumerate(wrong))
        drawn |= set(enumerate(wrong))
    assert len(drawn) > 12


def test_a_batch_of_one_picture_is_judged_by_its_right_captions_alone(encoder: InternViT, qllama: QLLaMA) -> None:
    stage = stage_of(encoder, qllama, negatives="random")
    same = batch(torch.full((4,), 2))
    found = stage.losses(same)["itm"]
    ((queries, _),) = qllama.stream_states(
        encoder(same["pixel_values"])[0], [TextStream("itm", same["itm_ids"], same["itm_mask"])]
    )
    torch.testing.assert_close(found, stage.model.objectives["itm"](queries, torch.ones(4, dtype=torch.long)))


def test_the_tower_alone_needs_no_queries(encoder: InternViT, qllama: QLLaMA) -> None:
    stage = stage_of(encoder, qllama, mode="c")
    rows = batch()
    losses = stage.losses(rows)
    assert set(losses) == {"itc_tower"}
    torch.testing.assert_close(losses["itc_tower"], stage_of(encoder, qllama, negatives="random").losses(rows)["itc_tower"])
    losses["itc_tower"].backward()
    trained = {name for name, parameter in stage.model.named_parameters() if parameter.grad is not None}
    assert {"objectives.itc.logit_scale", "middleware.clip_projector.cross_attn.proj.weight"} < trained
    assert not any(word in name for name in trained for word in ("query_tokens", "cross_attn.o_proj", "itm", "clip_projector2"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "x"}, "mode='x' is not known; valid choices: c, g"),
        ({"negatives": "hard"}, "negatives='hard' is not known; valid choices: mined, random"),
        ({"mined_from_step": -1}, "mined_from_step=-1 must be a step"),
    ],
)
def test_settings_that_nobody_knows_are_refused(
    encoder: InternViT, qllama: QLLaMA, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        stage_of(encoder, qllama, **options)
