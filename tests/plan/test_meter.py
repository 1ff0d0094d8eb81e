"""What counts FLOPs by part lets errors of the model through."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_internvl.plan.meter import OTHER, Meter, watch


class Part(nn.Module):
    """Two layers, the second behind a hook that may refuse what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

    def use(self, x: Tensor) -> Tensor:
        return self(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def refuse(*_: object) -> None:
    raise ValueError("of the model")


@pytest.mark.parametrize("layer", ["", "first", "second"])
def test_a_refused_input_is_told_in_the_words_of_the_model(layer: str) -> None:
    model, x = nn.Module(), torch.ones(1, 2)
    model.part, model.objectives = Part(), nn.ModuleDict()
    refused = model.part.get_submodule(layer)
    hook = refused.register_forward_pre_hook(refuse)
    meter = Meter()
    watch(meter, model)
    with pytest.raises(ValueError, match=r"^of the model$"):
        model.part.use(x)
    assert meter.part == OTHER
    hook.remove()
    assert model.part.use(x).shape == (1, 2)
    assert meter.part == OTHER
