"""InternLM-XComposer 1: the sampler, the image between its flags, gradients, and the labels of its turns."""

from __future__ import annotations

import torch
from golden import Fixture
from marked_labels import labels_by_ends
from torch import Tensor

from lightning_internvl import load_pretrained
from lightning_internvl.checkpoints.adapters import xcomposer1

SYSTEM = "InternLM-XComposer 1 (perceive sampler)"
ECHOES: frozenset[str] = frozenset()


def knows(fixture: Fixture) -> bool:
    return xcomposer1.LAYOUT.recognises(fixture.config, {})


def run(fixture: Fixture) -> dict[str, Tensor]:
    model, inputs = load_pretrained(fixture.folder), fixture.inputs
    with torch.no_grad():
        sampled = model.middleware.query(inputs["image_features"])
    embeds = model.visual_tokens(inputs["image_features"])
    (embeds * inputs["grad_probe"]).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = {f"grad.{name}": g for name, g in xcomposer1.LAYOUT.official_tensors(model.config, gradients).items()}
    found |= {"sampler_output": sampled, "image_embeds": embeds.detach()}
    return found | {"mask_human.targets": labels_by_ends(inputs["mask_human_ids"])}
