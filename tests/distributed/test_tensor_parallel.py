"""Which layers of which parts are divided, what is refused, and the norm of gradients that are divided in different ways."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.distributed.collectives import data_parallel_rank_and_size, set_data_parallel_group, world_size
from lightning_internvl.distributed.gradients import clip, gradients_of, total_norm
from lightning_internvl.distributed.tensor_parallel import check_layers, styles_of
from lightning_internvl.encoders.clip_vit import CLIPViT
from lightning_internvl.encoders.intern_vit import InternViT
from lightning_internvl.launch import leave_processes

SIZES = {"image_size": 8, "patch_size": 4, "dim": 12, "depth": 2, "heads": 6, "mlp_dim": 12}
LLAMA = {
    "model_type": "llama", "vocab_size": 9, "hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2,
}  # fmt: skip


def model(**parts: nn.Module) -> nn.Module:
    return nn.ModuleDict(parts)


def decoder(**change: Any) -> HFCausalLM:
    with torch.device("meta"):
        return HFCausalLM(config={**LLAMA, **change})


def settings(compiled: dict[str, Any] | None = None, **changed: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What layers are changed and compiled, by part."""
    return changed, compiled or {}


@pytest.mark.parametrize(("kind", "columns", "rows"), [(InternViT, 1, 1), (CLIPViT, 4, 2), (decoder, 5, 2)])
def test_layers_that_are_divided(kind: Any, columns: int, rows: int) -> None:
    part = kind() if kind is decoder else kind(**SIZES)
    styles = list(styles_of(model(part=part)).values())
    assert sum(isinstance(style, ColwiseParallel) for style in styles) == 2 * columns  # of two blocks
    assert sum(isinstance(style, RowwiseParallel) for style in styles) == 2 * rows


def test_what_divides_nothing() -> None:
    norms_of_heads = decoder(model_type="qwen3", head_dim=4)
    assert not styles_of(model(decoder=norms_of_heads, middleware=nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"=2: no part of this stage can divide .*decoder: HFCausalLM.*take parts that can"):
        check_layers(model(decoder=norms_of_heads), 2, *settings())


@pytest.mark.parametrize(
    ("size", "given", "told"),
    [
        (3, settings(), r"=3 does not divide the decoder's num_key_value_heads=2; valid choices with this decoder: 1, 2"),
        (2, settings(peft={"decoder": {"rank": 2}}), r"peft\.decoder holds layers that cannot be divided"),
        (2, settings(quantization={"decoder": "nf4"}), r"quantization\.decoder holds layers"),
        (2, settings({"decoder": True}), r"compile\.decoder has not been shown"),
    ],
)
def test_what_cannot_be_divided(size: int, given: tuple[Any, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        check_layers(model(decoder=decoder()), size, *given)


def test_what_can_be_divided() -> None:
    check_layers(model(encoder=InternViT(**SIZES), decoder=decoder()), 2, *settings(peft={"middleware": {"rank": 2}}))


def test_processes_of_a_group_read_the_same_share() -> None:
    places = [SimpleNamespace(world_size=4, global_rank=n, strategy=SimpleNamespace(tensor_parallel_size=2)) for n in range(4)]
    assert [data_parallel_rank_and_size(place) for place in places] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert data_parallel_rank_and_size(SimpleNamespace(world_size=4, global_rank=3)) == (3, 4)


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    set_data_parallel_group(None)
    leave_processes()


def test_the_norm_over_all_gradients(one_process: None) -> None:
    """Some divided over two dimensions of processes, some over one, some not at all."""
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    set_data_parallel_group(mesh["data_parallel"].get_group())
    assert world_size() == 1
    divided, plain = (nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)) for _ in range(2))
    divided.load_state_dict(plain.state_dict())
    parallelize_module(divided[0], mesh["tensor_parallel"], ColwiseParallel())
    parallelize_module(divided[2], mesh["tensor_parallel"], RowwiseParallel())
    for net in (divided, plain):
        net(torch.ones(2, 3)).square().sum().backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
    grads = gradients_of(torch.optim.SGD(divided.parameters(), lr=1.0))
    clip(grads, 0.1, total_norm(grads))
    for ours, theirs in zip(divided.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.full_tensor() if hasattr(ours.grad, "full_tensor") else ours.grad, theirs.grad)
