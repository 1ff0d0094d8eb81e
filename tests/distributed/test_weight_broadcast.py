"""One process loads: which ones start empty, and what they take over from it (in two real processes: tests/distributed)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_internvl.distributed.weight_broadcast import Spread, starts_empty
from lightning_internvl.launch import NUMBERS, leave_processes

FSDP2, DDP = {"_target_": "lightning_internvl.distributed.fsdp2.FSDP2"}, {"_target_": "lightning.pytorch.strategies.DDPStrategy"}


@pytest.mark.parametrize(
    ("number", "strategy", "parts", "empty"),
    [
        ("1", FSDP2, {}, True),
        ("1", FSDP2, {"peft": {"decoder": {"rank": 2}}}, True),
        ("1", FSDP2, {"quantization": {"decoder": "nf4"}}, False),
        ("1", DDP, {}, False),
        ("0", FSDP2, {}, False),
    ],
)
def test_who_starts_empty(
    number: str, strategy: dict[str, Any], parts: dict[str, Any], empty: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NUMBERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_RANK", number)
    assert starts_empty(strategy, parts.get("quantization")) == empty


class Part(nn.Module):
    """Two tied weights, a frozen one in another type, and a buffer that no file holds."""

    decoder = None

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(3, 2), nn.Linear(2, 3, bias=False)
        self.head.weight = self.words.weight
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.register_buffer("table", torch.arange(3.0), persistent=False)


@pytest.fixture
def as_second(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[nn.Module], None]]:
    """Lets the only process be the second one of two; the first one has the model that is given."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def facing(first: nn.Module) -> None:
        tensors = dict([*first.named_parameters(), *first.named_buffers()])
        sent = iter([tensors[name] for name in ("table", "words.weight", "frozen.weight", "frozen.bias")])
        told = [{name: x.dtype for kind in ("parameters", "buffers") for name, x in _named(first, kind)}, None]
        monkeypatch.setattr(dist, "get_rank", lambda: 1)
        monkeypatch.setattr(dist, "broadcast_object_list", lambda held: held.__setitem__(slice(None), told))
        monkeypatch.setattr(dist, "broadcast", lambda room, _: room.copy_(next(sent).detach().flatten().view(torch.uint8)))

    yield facing
    leave_processes()


def _named(model: nn.Module, kind: str) -> Any:
    return getattr(model, f"named_{kind}")(remove_duplicate=False)


def test_values_types_ties_and_freezing_are_those_of_the_first_process(as_second: Callable[[nn.Module], None]) -> None:
    first = Part()
    first.frozen.to(torch.bfloat16)
    with torch.device("meta"):
        second = Part()
    second.register_buffer("table", torch.empty(3, device="meta"), persistent=False)
    as_second(first)
    Spread(second, torch.device("cpu")).fill(second)
    assert second.head.weight is second.words.weight
    assert second.words.weight.requires_grad
    assert not second.frozen.weight.requires_grad
    for (name, ours), (_, theirs) in zip(second.named_parameters(), first.named_parameters(), strict=True):
        assert ours.equal(theirs), name
    assert second.table.tolist() == [0, 1, 2]


def test_a_process_with_weights_of_its_own_is_left_alone(as_second: Callable[[nn.Module], None]) -> None:
    model = Part()
    before = {name: (tensor, tensor.clone()) for name, tensor in model.named_parameters()}
    Spread(model, torch.device("cpu")).fill(model)
    assert all(tensor is before[name][0] and tensor.equal(before[name][1]) for name, tensor in model.named_parameters())
