"""Embedding in chunks (GradCache) gives the gradients of the whole batch; on several processes: objectives/test_processes.py"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_internvl.encoders.intern_vit import InternViT
from lightning_internvl.layers.basic import DropPath
from lightning_internvl.middleware.qllama import QLLaMA
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import ITC, SigLIP
from lightning_internvl.stages import ContrastiveStage

PAIRS = 7


def stage_of(encoder: InternViT, qllama: QLLaMA, objective: torch.nn.Module | None = None, **options: Any) -> ContrastiveStage:
    return ContrastiveStage(
        VLM(encoder, qllama, objectives={"itc": objective or ITC(init_scale=3.0)}), name="contrastive", run_dir=Path(), parts={},
        train=["*"], optimizer=torch.optim.SGD, scheduler=torch.optim.lr_scheduler.LambdaLR, max_steps=4, **options,
    )  # fmt: skip


def batch() -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids, mask = torch.randint(0, 31, (PAIRS, 5)), torch.ones(PAIRS, 5, dtype=torch.long)
    return {"pixel_values": torch.randn(PAIRS, 3, 16, 16), "itc_ids": ids, "itc_mask": mask}


def step(stage: ContrastiveStage, loss: Tensor) -> tuple[Tensor, Tensor]:
    stage.zero_grad()
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in stage.parameters() if p.grad is not None])


@pytest.mark.parametrize("objective", [ITC(init_scale=3.0, label_smoothing=0.1), ITC(init_scale=3.0, chunk=2), SigLIP(chunk=3)])
@pytest.mark.parametrize("chunk", [1, 3, 6])
def test_gradients_are_those_of_the_whole_batch(
    encoder: InternViT, qllama: QLLaMA, objective: torch.nn.Module, chunk: int
) -> None:
    whole, cached = (stage_of(encoder, qllama, objective, cached_chunk=c) for c in (None, chunk))
    (loss, expected), (other, found) = (step(stage, stage.losses(batch())["itc"]) for stage in (whole, cached))
    torch.testing.assert_close(other, loss)
    assert torch.cosine_similarity(found.double(), expected.double(), dim=0) > 0.9999
    assert abs(found.norm() / expected.norm() - 1) < 1e-4


def test_both_passes_draw_the_same_patches_and_drop_the_same_branches(encoder: InternViT, qllama: QLLaMA) -> None:
    paths = [module for module in encoder.train().modules() if isinstance(module, DropPath)]
    assert paths
    for path in paths:
        path.rate = 0.3
    stage, pairs = stage_of(encoder, qllama, keep_tokens=0.5, cached_chunk=3), batch()
    torch.manual_seed(2)
    loss, found = step(stage, stage.losses(pairs)["itc"])
    torch.manual_seed(2)
    parts = zip(*(pairs[name].tensor_split(3) for name in ("pixel_values", "itc_ids", "itc_mask")), strict=True)
    image, text = map(torch.cat, zip(*(stage._embed_pairs(*part) for part in parts), strict=True))
    expected_loss, expected = step(stage, stage.model.objectives["itc"](image, text))
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(found, expected)


def test_one_chunk_at_a_time_has_a_graph(encoder: InternViT, qllama: QLLaMA) -> None:
    """Each chunk runs again only once the one before it is through its backward pass."""
    events = list[str]()

    def seen(module: Any, args: Any, output: list[Tensor]) -> None:
        events.append("forward")
        output[0].register_hook(lambda grad: events.append("backward"))

    encoder.register_forward_hook(seen)
    stage = stage_of(encoder, qllama, cached_chunk=3)
    loss = stage.losses(batch())["itc"]
    assert events == ["forward"] * 3
    loss.backward()
    assert events[3:] == ["backward", "forward", "backward", "forward", "backward"]  # the last one is there already


@pytest.mark.parametrize("chunk", [0, -4, 1.5])
def test_a_chunk_of_no_pairs_is_refused(encoder: InternViT, qllama: QLLaMA, chunk: float) -> None:
    with pytest.raises(ValueError, match=f"cached_chunk={chunk!r} must be a whole number above 0"):
        stage_of(encoder, qllama, cached_chunk=chunk)


def test_a_pair_that_comes_twice_is_not_compared_with_itself(encoder: InternViT, qllama: QLLaMA) -> None:
    stage, pairs = stage_of(encoder.eval(), qllama.eval()), batch()
    twice = {name: torch.cat([rows, rows[:2]]) for name, rows in pairs.items()}
    known = twice | {"pair_ids": torch.tensor([*range(PAIRS), 0, 1])}
    assert stage.losses(known)["itc"] < stage.losses(twice)["itc"]
