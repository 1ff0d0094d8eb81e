"""Probes on a frozen tower, and their batch norm over several processes."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import together
from torch import Tensor, nn

from lightning_internvl.launch import leave_processes
from lightning_internvl.middleware.probe import AttentionProbe, GlobalBatchNorm, LinearProbe
from lightning_internvl.protocols import Middleware


def test_the_linear_probe_reads_cls_and_the_mean_of_the_patches() -> None:
    probe, visual = LinearProbe(encoder_dim=6, classes=5), torch.randn(8, 4, 6)
    assert isinstance(probe, Middleware)
    assert (probe.layers, probe.tokens_out(4), probe.sharding_units()) == ((-1,), 0, [])
    features = torch.cat([visual[:, 0], visual[:, 1:].sum(dim=1) / 3], dim=1)
    normed = (features - features.mean(dim=0)) / (features.var(dim=0, unbiased=False) + 1e-6).sqrt()
    torch.testing.assert_close(probe([visual]), probe.head(normed), atol=1e-5, rtol=1e-4)
    assert probe([visual]).shape == (8, 5)
    assert probe.head.weight.std().item() == pytest.approx(0.01, rel=0.5)


def test_the_attention_probe_pools_with_its_own_heads() -> None:
    probe, visual = AttentionProbe(encoder_dim=6, classes=5, heads=3, pooled_dim=4, layer=-2), torch.randn(8, 4, 6)
    assert probe.layers == (-2,)
    assert probe.features(visual).shape == (8, 4)
    probe([visual])[:, 0].sum().backward()
    assert all(parameter.grad is not None for parameter in probe.parameters())


@pytest.mark.parametrize(
    ("probe", "options", "message"),
    [
        (LinearProbe, {"classes": 1}, "2 classes apart or more: classes=1"),
        (AttentionProbe, {"classes": 3, "heads": 4, "pooled_dim": 4}, "width 6 must divide by heads=4"),
    ],
)
def test_settings_that_do_not_fit_are_refused(probe: type[nn.Module], options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        probe(encoder_dim=6, **options)


# --- several processes ----------------------------------------------------------------------------------------------

ROWS, WIDTH = 8, 5


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(4)
    return torch.randn(ROWS, WIDTH) * 3 + 7, torch.randn(ROWS, WIDTH)


def result(rows: slice) -> dict[str, Tensor]:
    """Outputs, gradients and statistics of one process for its rows."""
    torch.manual_seed(3)
    layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), GlobalBatchNorm(WIDTH, eps=1e-6))
    x, weights = (t[rows] for t in batch())
    out = layers(x)
    (out * weights).mean().backward()
    gradient = torch.cat([p.grad.flatten() for p in layers.parameters()])
    return {"out": out.detach(), "gradient": gradient, **{n: b.float() for n, b in layers[1].named_buffers()}}


def work(rank: int, folder: str, world: int) -> None:
    torch.set_num_threads(1)
    meeting, wait = f"file://{folder}/meet-{world}", timedelta(seconds=30)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=wait)
    share = ROWS // world
    found = result(slice(rank * share, (rank + 1) * share))
    dist.all_reduce(found["gradient"])
    found["gradient"] /= world
    torch.save(found, f"{folder}/{world}-{rank}.pt")
    leave_processes()


@pytest.mark.parametrize("world", [2])
def test_batch_norm_sees_the_batches_of_all_processes(tmp_path: Path, world: int) -> None:
    together(work, str(tmp_path), world, count=world)
    found, alone = [torch.load(tmp_path / f"{world}-{rank}.pt") for rank in range(world)], result(slice(None))
    torch.testing.assert_close(torch.cat([f["out"] for f in found]), alone["out"], atol=1e-5, rtol=1e-4)
    for name in ("gradient", "running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(found[0][name], alone[name], atol=1e-5, rtol=1e-4)
        assert found[0][name].equal(found[-1][name])
