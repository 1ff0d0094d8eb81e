"""What backward keeps of a model that is mostly frozen: nothing for gradients of frozen weights, nothing of a frozen tower."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor, nn

from lightning_internvl.cli import CONF
from lightning_internvl.config.stage_settings import stage_settings
from lightning_internvl.config.targets import build
from lightning_internvl.inference.collators import make_view
from lightning_internvl.model.compose import compose_model
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import NextToken
from lightning_internvl.stages.freezing import FreezePlan

LORA = {"decoder": {"method": "lora", "rank": 3, "alpha": 5, "dropout": 0.0, "targets": "blocks"}}


def alignment(adapters: dict[str, Any]) -> tuple[VLM, dict[str, Any]]:
    """LLaVA's stage for the connector at toy size, and two of its samples as a batch."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("config", overrides=["experiment=llava_toy", "paths.run=unused"])
    settings = stage_settings(OmegaConf.to_container(composed, resolve=True), "alignment")
    model, tokenizers = compose_model(settings.parts.config | {"peft": adapters}, build)
    data = build(settings.data.dataset(settings.reads))
    return model, make_view(settings, model, tokenizers, build).training([data[0], data[1]])


def saved_by_layers(model: VLM, batch: dict[str, Any]) -> Counter[str]:
    """How many tensors other than weights the linear layers save in a training step, by layer; `other` stands for all else."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: Counter[str] = Counter()
    inside = ["other"]

    def note(tensor: Tensor) -> Tensor:
        saved[inside[-1]] += tensor.untyped_storage().data_ptr() not in weights
        return tensor.detach()

    def enter(name: str, *_: Any) -> None:
        inside.append(name)

    def leave(*_: Any) -> None:
        inside.pop()

    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    hooks = [module.register_forward_pre_hook(partial(enter, name)) for name, module in linear]
    hooks += [module.register_forward_hook(leave) for _, module in linear]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden, labels = model.hidden_states(**batch)
        loss = NextToken()(hidden, labels, model.decoder.head)
    for hook in hooks:
        hook.remove()
    loss.backward()
    return +saved


@pytest.mark.parametrize("adapters", [{}, LORA], ids=["frozen", "lora"])
def test_frozen_layers_save_nothing_for_gradients_of_their_weights(adapters: dict[str, Any]) -> None:
    model, batch = alignment(adapters)
    FreezePlan(["middleware"], adapters).apply(model, 0)
    saving = set(saved_by_layers(model, batch)) - {"other"}
    trained = {name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m.weight.requires_grad}
    assert saving == trained
    assert len(trained) == 2 + len(adapters) * 2 * 3 * 7  # the connector's, and two for each layer of the decoder's three blocks
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("adapters", [{}, LORA], ids=["frozen", "lora"])
def test_a_frozen_tower_saves_nothing_and_a_trained_one_does(adapters: dict[str, Any]) -> None:
    model, batch = alignment(adapters)
    counts = []
    for rules in (["middleware"], ["middleware", "encoder"]):
        FreezePlan(rules, adapters).apply(model, 0)
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t.detach(), lambda t: t):
            (states,) = model.encoder(batch["pixel_values"], layers=model.middleware.layers)
        counts.append((len(saved), states.requires_grad))
    assert counts[0] == (0, False)
    assert counts[1][0] > 20
    assert counts[1][1]
